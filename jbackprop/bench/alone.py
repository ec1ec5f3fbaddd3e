"""The peak of a process of its own: `python -m jbackprop.bench.alone WORKLOAD CONTESTANT`.

A process that has done other things has memory to spare, and its peak says nothing. This one makes
the inputs, compiles the contestant, calls it once, and says how much it took at most.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import jax

from jbackprop.bench.declare import Contestant, Workload

SECONDS = 600
"""After which nobody waits for an answer."""


def peak_of(load: Workload, person: Contestant) -> int | None:
    """Bytes: of the device where it counts them, otherwise of the whole process with JAX in it.

    None where that is not known: the workload is not of the suite, or the process died.
    """
    command = [sys.executable, "-m", "jbackprop.bench.alone", load.name, person.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        return int(json.loads(done.stdout)["peak"]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None


def main(workload: str, contestant: str) -> None:
    """Do it, and print the peak."""
    from jbackprop.bench.suite import WORKLOADS

    load = next(load for load in WORKLOADS if load.name == workload)
    everybody = [load.unit, *load.contestants()]
    person = next(p for p in everybody if isinstance(p, Contestant) and p.name == contestant)
    params, *data = load.data()
    args = (person.pack(params), *data)
    jax.block_until_ready((jax.jit(person.function) if person.jit else person.function)(*args))
    stats = jax.devices()[0].memory_stats() or {}
    print(json.dumps({"peak": stats.get("peak_bytes_in_use") or _resident()}))


def _resident() -> int:
    """The highest resident size of this process so far."""
    with contextlib.suppress(ImportError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(most) * (1 if sys.platform == "darwin" else 1024)
    raise SystemExit("this system does not say how much memory a process took")


if __name__ == "__main__":
    main(*sys.argv[1:])
