"""What it costs to check a network of a million parameters: seconds, and memory of the process.

python benchmarks/million.py [--out FILE.json]

Each check runs in a process of its own, from nothing: tracing and compiling are part of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

CHECKS = {
    "network": "every delta, gradient and rule of it",
    "gradient": "its gradient as a plain JAX function",
    "one entry": "the same, where one entry of the largest leaf is wrong",
    "numerical": "the same gradient, by numbers alone",
}


def measured(name: str) -> dict[str, object]:
    """Run one check here."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jbackprop as jb

    net, loss = jb.mlp([784, 512, 512, 512, 128, 10], jb.Tanh()), jb.SoftmaxCrossEntropy()
    params = net.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((128, 784)).astype("float32")
    y = rng.integers(0, 10, 128)

    def cost(params: object, x: object, y: object) -> jax.Array:
        return jnp.mean(loss.value(jb.forward(net, params, x)[0], y))

    candidate = jax.jit(jax.grad(cost))(params, x, y)
    if name == "one entry":
        w = np.array(candidate[0]["w"])
        w[300, 200] *= 1.5
        candidate = ({"w": w, "b": candidate[0]["b"]}, *candidate[1:])
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if name == "network":
        report = jb.check.network(net, loss, params, x, y)
    else:
        report = jb.check.gradient(
            cost, params, x, y, candidate=candidate,
            truth="numerical" if name == "numerical" else "both",
        )  # fmt: skip
    seconds = time.perf_counter() - start
    assert report.verdict == ("wrong" if name == "one entry" else "right"), str(report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "check": name,
        "verdict": report.verdict,
        "diagnosis": [leaf.diagnosis for leaf in report.wrong],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "seconds": round(seconds, 1),
        "peak_mib": round(peak / 1024),
        "before_mib": round(base / 1024),
    }


def main() -> None:
    """Measure all of them, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one)))
        return
    results = []
    for name, what in CHECKS.items():
        environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
        done = subprocess.run(
            [sys.executable, __file__, "--one", name],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        if done.returncode:
            sys.exit(done.stderr)
        results.append(found := json.loads(done.stdout))
        memory = f"peak {found['peak_mib']} MiB (before it {found['before_mib']})"
        print(f"{found['parameters']:,} parameters, {what}: {found['seconds']} s, {memory}")
    if args.out:
        import jax

        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "jax": jax.__version__}
        args.out.write_text(json.dumps(machine | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
