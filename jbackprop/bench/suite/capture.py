"""Pairs from other people's models (`jb.capture`), in units of one plain gradient of the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Workload, peer
from jbackprop.bench.plain.per_example import MAX_NORM, by_jax_privacy, in_parts, whole

MICROBATCH, SMALLER = 16, 4
"""The smaller one where the whole mini-batch has no more."""

Function = Callable[..., Any]


@functools.cache
def model(name: str, *sizes: Any) -> Any:
    """(cost of one example, params, mini-batch); needs Flax and Equinox."""
    from jbackprop.bench.plain import captured

    return getattr(captured, name)(*sizes)


def mean_gradient(cost: Function) -> Function:
    """(params, x, y) -> (mean cost, gradient): the unit."""

    def mean(params: Any, x: Array, y: Array) -> Array:
        return jnp.mean(jax.vmap(cost, (None, 0, 0))(params, x, y))

    return jax.value_and_grad(mean)


def collected_norms(cost: Function) -> Function:
    """The norms, of each pair's square norm instead of the pair."""
    captured = jb.capture(cost, collect=lambda pair: pair.square_norm())

    def answer(params: Any, x: Array, y: Array) -> Array:
        squares = jax.tree.leaves(captured(params, x, y)[1])  # scanned: the copies in front
        return jnp.sqrt(sum(s.reshape(-1, len(x)).sum(0) for s in squares))

    return answer


def ours(cost: Function, quantity: str, size: int) -> dict[str, Function]:
    """The pairs kept, contracted as they are born, or that of some examples at a time."""
    kept, later, few = jb.capture(cost), jb.capture.deferred(cost), f"microbatches of {size}"

    def norms(source: Any, microbatch: int | None = None) -> Array:
        return jb.per_example.norms(source, microbatch=microbatch)

    def clipped(source: Any, **how: Any) -> Any:
        return jb.per_example.clipped_gradient(source, MAX_NORM, **how).gradient

    if quantity == "norms":
        return {
            "kept": lambda *args: norms(kept(*args)[1]),
            "collect": collected_norms(cost),
            f"deferred, {few}": lambda *args: norms(later(*args), size),
        }
    written_out = {"microbatch": size, "method": "materialise"}
    return {
        "kept": lambda *args: clipped(kept(*args)[1]),
        "deferred": lambda *args: clipped(later(*args)),
        f"written out, {few}": lambda *args: clipped(later(*args), **written_out),
    }


def contestants(name: str, sizes: Sequence[Any], quantity: str) -> list[Contestant | Absent]:
    """Everybody; the first takes little memory."""
    cost, _, (x, _) = model(name, *sizes)
    # of a mini-batch of one example, as `plain.per_example` and JAX Privacy call it
    one = jax.value_and_grad(lambda params, x, y: cost(params, x[0], y[0]))
    size = MICROBATCH if len(x) > MICROBATCH else SMALLER
    few, unroll = f"microbatches of {size}", name == "cnn"  # as in per_example.py
    found: list[Contestant | Absent] = [
        Contestant(f"vmap(grad), {few}", in_parts(one, quantity, size, unroll), "vmap(grad)"),
        Contestant("vmap(grad), whole", whole(one, quantity), "vmap(grad)"),
    ]
    for way, function in ours(cost, quantity, size).items():
        found.append(Contestant(f"capture, {way}", function, "ours"))
    for parts, how in ((None, "whole"), (size, few)):
        function = by_jax_privacy(one, quantity, parts)
        made = functools.partial(Contestant, "", function)
        found.append(peer(f"jax_privacy, {how}", "jax_privacy", "jax_privacy", made))
    return found


def _data(name: str, sizes: Sequence[Any]) -> Any:
    _, params, batch = model(name, *sizes)
    return (params, *batch)


def _unit(name: str, sizes: Sequence[Any]) -> Function:
    """The plain gradient, made when it is traced."""
    return lambda *args: mean_gradient(model(name, *sizes)[0])(*args)


def workload(title: str, name: str, sizes: Sequence[Any], quantity: str, level: int) -> Workload:
    """One question of one model."""
    return Workload(
        f"capture, {title}, {quantity}",
        "capture",
        functools.partial(_data, name, sizes),
        functools.partial(contestants, name, sizes, quantity),
        question=quantity,
        unit=Contestant("plain gradient", _unit(name, sizes), "plain"),
        valued=False,
        level=level,
        tolerance=1e-3,
    )


MODELS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "Equinox MLP of 1024, batch 256": ("mlp", ()),
    "Flax nnx CNN, batch 128": ("cnn", ()),
    "Flax transformer of 128, 16 x 64 tokens": ("transformer", (128, 6, 64, 16)),
    "Flax transformer of 256, 32 x 32 tokens": ("transformer", (256, 4, 32, 32)),
    "Flax transformer of 512, 8 x 64 tokens": ("transformer", (512, 2, 64, 8)),
    "Equinox GRU of 256, batch 64, 32 steps": ("rnn", ()),
    "12 scanned Flax blocks, 16 x 64 tokens": ("transformer", (128, 12, 64, 16, True)),
}
WORKLOADS = tuple(
    workload(title, name, sizes, quantity, 1 if (name, quantity) == ("cnn", "norms") else 2)
    for title, (name, sizes) in MODELS.items()
    for quantity in ("norms", "clipped sum")
)
