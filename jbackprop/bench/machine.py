"""What the figures are from: the machine, the versions, and how fast this machine can be at all."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jbackprop

_PACKAGES = (
    "jax", "jaxlib", "numpy", "optax", "flax", "equinox", "jax_privacy", "scikit-learn",
)  # fmt: skip


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Device, processor, memory, versions, flags and the commit."""
    config: Any = jax.config
    return {
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": cores(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
        "jbackprop": jbackprop.__version__,
        "commit": _commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": str(config.jax_default_matmul_precision or "default"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str:
    """Of the source that runs, with "+" where it was changed since; "" outside a repository."""
    folder = Path(jbackprop.__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(
            ("git", "-C", str(folder), *words), capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "--short", "HEAD") if tracked else ""
        return commit + ("+" if commit and git("status", "--porcelain", "--", ".") else "")
    except OSError:
        return ""


def ceilings(seconds: float = 2.0) -> dict[str, float]:
    """The most that was seen of this machine: FLOP/s in a matmul, bytes/s in a stream.

    The matmul is of two square matrices in float32 as `jax.default_matmul_precision` has it; the
    stream is y = a + 3 b over arrays that no cache holds, two read and one written.

    Args:
        seconds: for each.
    """
    n, m = 2048, 2**25
    a = jnp.ones((n, n), jnp.float32)
    x = jnp.ones(m, jnp.float32)
    matmul = jax.jit(jnp.matmul).lower(a, a).compile()
    stream = jax.jit(lambda a, b: a + 3 * b).lower(x, x).compile()
    return {
        "matmul_flops": 2 * n**3 / _best(lambda: matmul(a, a), seconds),
        "stream_bytes": 3 * 4 * m / _best(lambda: stream(x, x), seconds),
    }


def _best(f: Callable[[], Any], seconds: float) -> float:
    jax.block_until_ready(f())
    end, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(f())
        best = min(best, time.perf_counter() - start)
    return best


def _meminfo(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(name + ":"):
                return 1024 * int(line.split()[1])
    return 0


def room() -> int:
    """Bytes that a contestant may take: most of what is free where the arrays are."""
    stats = jax.devices()[0].memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        return int(0.9 * (limit - stats.get("bytes_in_use", 0)))
    return int(0.8 * _meminfo("MemAvailable")) or 2**62
