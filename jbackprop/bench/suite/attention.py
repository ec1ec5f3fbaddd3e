"""Attention over a long sequence: the delta rule in blocks against autodiff's arrangements."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jbackprop as jb
from jbackprop.bench.declare import Contestant, Workload
from jbackprop.bench.plain import attention
from jbackprop.bench.suite import flops


def data(length: int, heads: int, d: int) -> tuple[Any, ...]:
    """(q, k, v), and the delta of the output: (1, T, heads, d) each."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, delta = (jax.random.normal(key, (1, length, heads, d)) for key in keys)
    return (q, k, v), delta


def ours(heads: int, causal: bool) -> Contestant:
    """The delta rule."""
    layer = jb.Attention(heads, causal=causal)

    def function(x: Any, delta: Any) -> Any:
        flat = jax.tree.map(lambda a: a.reshape(*a.shape[:2], -1), (x, delta))
        y, saved = jb.forward(layer, (), flat[0])
        trace = layer.trace(flat[0], y, saved)
        grads, _ = jb.backward(layer, (), trace, flat[1], jb.sweep.total)
        return jnp.sum(y * flat[1]), jax.tree.map(lambda g, a: g.reshape(a.shape), grads, x)

    return Contestant("ours", function, "ours")


def theirs(attend: attention.Attend) -> Any:
    """The same by `jax.value_and_grad`."""
    return jax.value_and_grad(lambda x, delta: jnp.sum(attend(*x) * delta))


def contestants(length: int, heads: int, causal: bool) -> Sequence[Contestant]:
    """Everybody."""
    found = []
    for name, attend in attention.ATTEND.items():
        kind = "plain" if name == "plain" else "tuned"
        found.append(Contestant(name, theirs(functools.partial(attend, causal=causal)), kind))
    found.insert(1, ours(heads, causal))
    whole = jax.checkpoint(functools.partial(attention.plain, causal=causal))
    found.append(Contestant("checkpoint", theirs(whole), "idiomatic"))
    for size in (length // 16, length // 8):
        blocks = theirs(attention.blocked(size, causal))
        found.append(Contestant(f"checkpointed blocks of {size}", blocks, "tuned"))
        if causal:
            part = theirs(attention.triangle(size))
            found.append(Contestant(f"blocks of {size} with their keys only", part, "tuned"))
    found.append(Contestant("running softmax", theirs(attention.online(length // 8, causal))))
    return found


WORKLOADS = tuple(
    Workload(
        f"attention{', causal' if causal else ''}, {length} positions, 4 heads of 64",
        "attention",
        functools.partial(data, length, 4, 64),
        functools.partial(contestants, length, 4, causal),
        flops=flops.attention(1, length, 4 * 64),
        level=1 if causal else 2,
    )
    for length in (2048,)
    for causal in (True, False)
)
