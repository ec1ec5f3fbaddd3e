"""The last Dense with softmax cross-entropy over a big vocabulary, in one or in two."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jbackprop as jb
from jbackprop.bench.declare import Contestant, Workload
from jbackprop.bench.plain import head
from jbackprop.bench.suite import flops


def data(rows: int, width: int, vocab: int) -> tuple[Any, ...]:
    """{"w", "b", "x"}, labels."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(keys[0], (width, vocab)) * width**-0.5,
        "b": 0.1 * jax.random.normal(keys[1], (vocab,)),
        "x": jax.random.normal(keys[2], (rows, width)),
    }
    return params, jax.random.randint(keys[3], (rows,), 0, vocab)


def ours() -> list[Contestant]:
    """The delta rule, of the head alone."""
    loss = jb.FusedSoftmaxCrossEntropy()

    def fused(p: Any, y: Any) -> Any:
        mean = jnp.full(len(y), 1 / len(y))
        found = loss.head(p["x"], p["w"], p["b"], y, mean)
        grads = {"w": found.w_grad, "b": found.b_grad, "x": found.delta_h / len(y)}
        return jnp.mean(found.losses), grads

    return [Contestant("ours", fused, "ours")]


def contestants(rows: int, vocab: int) -> Sequence[Contestant]:
    """Everybody."""
    found = [
        Contestant("optax loss", head.whole(), "plain"),
        *ours(),
        Contestant("logsumexp", head.whole(head.by_logsumexp)),
        Contestant("logsumexp, mask", head.whole(head.by_mask)),
        Contestant("checkpoint around Dense and loss", head.whole(checkpoint=True)),
    ]
    for size in (rows // 32, rows // 16, rows // 4):
        found += [
            Contestant(f"checkpoint, blocks of {size}", head.blocks(size), "idiomatic"),
            Contestant(f"gradients forward, blocks of {size}", head.gradients_forward(size)),
        ]
    for size in (vocab // 32, vocab // 16):
        found.append(Contestant(f"checkpoint, {size} classes a block", head.over_vocabulary(size)))
    return found


def workload(rows: int, width: int, vocab: int, level: int) -> Workload:
    """One head."""
    return Workload(
        f"head, {rows} positions, width {width}, vocabulary {vocab}",
        "head",
        functools.partial(data, rows, width, vocab),
        functools.partial(contestants, rows, vocab),
        flops=flops.dense(rows, width, vocab),
        level=level,
    )


WORKLOADS = (workload(512, 256, 8192, 1), workload(4096, 256, 32768, 2))
