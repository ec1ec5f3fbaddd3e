"""Manual against automatic gradients: time, memory and trace time, as ratios from one run.

The automatic side is the network as a JAX user writes it by hand, with `jax.nn` activations and
Optax losses, under `jax.jit(jax.value_and_grad(...))`; it uses nothing of this library.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jbackprop.compose import mlp
from jbackprop.layers import Gelu, Relu, Tanh
from jbackprop.losses import SoftmaxCrossEntropy
from jbackprop.objective import value_and_grad
from jbackprop.sweep import Node
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class Workload:
    """A multilayer perceptron with softmax cross-entropy, on random data."""

    sizes: tuple[int, ...]
    batch: int
    activation: str = "tanh"

    @property
    def name(self) -> str:
        widths = [str(size) for size in self.sizes]
        runs: list[str] = []
        for width in widths:  # 32-32-32 is written 32x3
            base, _, count = runs[-1].partition("x") if runs else ("", "", "")
            if base == width:
                runs[-1] = f"{base}x{int(count or 1) + 1}"
            else:
                runs.append(width)
        return f"{'-'.join(runs)} {self.activation}, batch {self.batch}"


WORKLOADS = (
    Workload((784, 128, 10), 32),
    Workload((784, 128, 10), 256, "relu"),
    Workload((784, 512, 512, 10), 128, "gelu"),
    Workload((784, 1024, 1024, 1024, 1024, 10), 256, "relu"),
    Workload((784, 1024, 1024, 1024, 1024, 10), 1024),
    Workload((64, *[32] * 30, 10), 64),
    Workload((64, *[32] * 60, 10), 32, "relu"),
)

_OURS: dict[str, Node] = {"tanh": Tanh(), "relu": Relu(), "gelu": Gelu()}
_PLAIN: dict[str, Callable[[Any], Any]] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    # the same arithmetic on both sides: jax.nn.gelu takes erfc, which is slower
    "gelu": lambda z: 0.5 * z * (1 + jax.lax.erf(z * 0.5**0.5)),
}


def manual(load: Workload) -> Callable[..., Any]:
    """params, x, y -> (value, grads), by the delta rule."""
    return value_and_grad(mlp(load.sizes, _OURS[load.activation]), SoftmaxCrossEntropy())


def automatic(load: Workload) -> Callable[..., Any]:
    """The same by `jax.value_and_grad` of plain JAX."""
    activation = _PLAIN[load.activation]

    def cost(params: Any, x: Any, y: Any) -> Any:
        dense = [p for p in params if p]
        for p in dense[:-1]:
            x = activation(x @ p["w"] + p["b"])
        z = x @ dense[-1]["w"] + dense[-1]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return jax.value_and_grad(cost)


def data(load: Workload) -> tuple[Any, Any, Any]:
    """params, x, y."""
    key, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    params = mlp(load.sizes).init(key)
    x = jax.random.normal(key_x, (load.batch, load.sizes[0]))
    return params, x, jax.random.randint(key_y, (load.batch,), 0, load.sizes[-1])


@dataclasses.dataclass(frozen=True)
class Result:
    """Manual over automatic, from interleaved runs.

    Attributes:
        name: the workload.
        manual_ms, automatic_ms: median time of one call.
        time: median of the paired ratios of time.
        quartiles: of the same ratios.
        memory: ratio of temporary memory, as the compiler states it; None where it does not.
        temp_bytes: the temporary memory of both.
        trace: ratio of the median times to trace.
        agreement: the worst relative difference of the two gradients, leaf by leaf.
    """

    name: str
    manual_ms: float
    automatic_ms: float
    time: float
    quartiles: tuple[float, float]
    memory: float | None
    temp_bytes: tuple[int, int]
    trace: float
    agreement: float


def paired(
    f: Callable[[], Any], g: Callable[[], Any], rounds: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Times of one call of f and of g, taken in turns: f g, g f, f g, ...

    Each sample repeats the call so often that it lasts about 5 ms; at most `rounds` of them, and
    at most about `seconds`, but never fewer than 5.
    """
    start = time.perf_counter()
    once = min(_timed(h, 3) for h in (f, g, f, g))
    calls = max(1, round(0.005 / once))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        if i >= 5 and time.perf_counter() - start > seconds:
            break
        for side in (0, 1) if i % 2 else (1, 0):
            times[side].append(_timed((f, g)[side], calls))
    return times


def _timed(f: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        out = f()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def trace_times(load: Workload, repeats: int = 7) -> tuple[float, float]:
    """Median seconds to trace manual and automatic, every time from nothing, in turns."""
    args = data(load)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for side, make in enumerate((manual, automatic)):
            jax.clear_caches()
            f = jax.jit(make(load))
            start = time.perf_counter()
            f.trace(*args)
            times[side].append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def measure(load: Workload, rounds: int = 60, seconds: float = 10.0) -> Result:
    """Measure one workload."""
    args = data(load)
    compiled = [jax.jit(make(load)).lower(*args).compile() for make in (manual, automatic)]
    f, g = (lambda c=c: c(*args) for c in compiled)
    (_, ours), (_, theirs) = f(), g()
    norms = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    agreement = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in norms)
    memory = [c.memory_analysis() for c in compiled]
    temps = tuple(0 if m is None else int(m.temp_size_in_bytes) for m in memory)
    times = paired(f, g, rounds, seconds)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    trace = trace_times(load)
    return Result(
        name=load.name,
        manual_ms=1e3 * statistics.median(times[0]),
        automatic_ms=1e3 * statistics.median(times[1]),
        time=middle,
        quartiles=(low, high),
        memory=temps[0] / temps[1] if temps[1] else None,
        temp_bytes=(temps[0], temps[1]),
        trace=trace[0] / trace[1],
        agreement=agreement,
    )


def run(loads: Iterable[Workload] = WORKLOADS, **options: Any) -> Iterator[Result]:
    """Measure one workload after the other."""
    for load in loads:
        yield measure(load, **options)


def table(results: Iterable[Result]) -> str:
    """Results as a table of text."""
    rows = (
        (
            r.name,
            f"{r.manual_ms:.3f}",
            f"{r.automatic_ms:.3f}",
            f"{r.time:.3f} ({r.quartiles[0]:.2f} to {r.quartiles[1]:.2f})",
            "?" if r.memory is None else f"{r.memory:.3f}",
            f"{r.trace:.2f}",
            f"{r.agreement:.0e}",
        )
        for r in results
    )
    columns = (
        "network", ">manual ms", ">automatic ms", ">time ratio (quartiles)", ">memory ratio",
        ">trace ratio", ">difference",
    )  # fmt: skip
    return render(columns, rows)
