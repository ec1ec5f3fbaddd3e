"""A residual network: the delta rule against autodiff, plain and checkpointed."""

from __future__ import annotations

import functools
from typing import Any

import jax

import jbackprop as jb
from jbackprop.bench.declare import Contestant, Workload
from jbackprop.bench.plain import resnet
from jbackprop.bench.suite import flops

SHAPE, CHANNELS, CLASSES, BATCH = (32, 32, 3), (16, 32, 64), 10, 32


def data(batch: int) -> tuple[Any, ...]:
    """params, images, labels."""
    key, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    params = resnet.init(key, SHAPE[-1], CHANNELS, CLASSES)
    x = jax.random.normal(key_x, (batch, *SHAPE))
    return params, x, jax.random.randint(key_y, (batch,), 0, CLASSES)


_NET: Any = jb.resnet(SHAPE, CHANNELS, 1, CLASSES, resnet.GROUPS)


@functools.cache
def _tree() -> Any:
    return jax.tree.structure(jax.eval_shape(_NET.init, jax.random.key(0)))


def _in_order(p: Any) -> list[Any]:
    """The leaves in our order, in which a norm and the head have their own."""
    found = [p["stem"]]
    for b in p["blocks"]:
        parts = (b["norm1"], b["conv1"], b["norm2"], b["conv2"], b["short"])
        found += jax.tree.leaves(parts)
    return found + jax.tree.leaves((p["norm"], p["head"]))


def pack(p: Any) -> Any:
    """Our parameters."""
    return jax.tree.unflatten(_tree(), _in_order(p))


def unpack(grads: Any) -> Any:
    """Gradients in the plain order."""
    template = jax.eval_shape(lambda: data(1)[0])
    places = jax.tree.unflatten(jax.tree.structure(template), range(len(jax.tree.leaves(template))))
    leaves = dict(zip(_in_order(places), jax.tree.leaves(grads), strict=True))
    return jax.tree.unflatten(jax.tree.structure(template), [leaves[i] for i in range(len(leaves))])


def contestants() -> list[Contestant]:
    """Everybody."""
    ours = jb.value_and_grad(_NET, jb.SoftmaxCrossEntropy())
    return [
        Contestant("plain", resnet.network(), "plain"),
        Contestant("ours", ours, "ours", pack, unpack),
        Contestant("checkpoint around a block", resnet.network(True), "idiomatic"),
    ]


def _counted() -> float:
    positions, total = BATCH * SHAPE[0] * SHAPE[1], 0.0
    total += flops.conv(positions, 9, SHAPE[-1], CHANNELS[0], first=True)
    width = CHANNELS[0]
    for l, wider in enumerate(CHANNELS):
        positions //= 4 if l else 1
        total += flops.conv(positions, 9, width, wider) + flops.conv(positions, 9, wider, wider)
        total += flops.conv(positions, 1, width, wider) if wider != width else 0
        width = wider
    return total + flops.dense(BATCH, width, CLASSES)


WORKLOADS = (
    Workload(
        f"resnet, images 32x32x3, channels 16, 32 and 64, batch {BATCH}",
        "resnet",
        functools.partial(data, BATCH),
        contestants,
        flops=_counted(),
        level=1,
    ),
)
