"""Manual against automatic gradients on this machine: `python benchmarks/gradient.py [NAME.json]`.

Seven multilayer perceptrons, from 784-128-10 to 784-1024x4-10 and sixty narrow layers; the other
side is plain JAX under jit(value_and_grad). Interleaved runs; medians of paired ratios. Given a
file name, the results are saved there with the machine that they are from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from jbackprop import bench


def main(path: str | None = None, rounds: int = 200, seconds: float = 12.0) -> None:
    """Measure all workloads, print the table, and save it if a path is given."""
    loads = tqdm(bench.WORKLOADS, unit="workload", disable=not sys.stderr.isatty())
    results = list(bench.run(loads, rounds=rounds, seconds=seconds))
    machine = {
        "device": str(jax.devices()[0].device_kind),
        "cores": len(jax.devices()) if jax.default_backend() != "cpu" else _cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dtype": "float32",
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print(bench.table(results))
    if path:
        saved = machine | {"results": [dataclasses.asdict(result) for result in results]}
        Path(path).write_text(json.dumps(saved, indent=2) + "\n")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
