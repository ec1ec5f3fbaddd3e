"""Convolutional networks: the delta rule against autodiff's arrangements."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Outside, Workload, peer
from jbackprop.bench.plain import conv
from jbackprop.bench.suite import flops

CLASSES = 10


def data(shape: tuple[int, ...], channels: tuple[int, ...], batch: int) -> tuple[Any, ...]:
    """params, images, labels."""
    key, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(key_x, (batch, *shape))
    return conv.init(key, shape, channels, CLASSES), x, jax.random.randint(key_y, (batch,), 0, 10)


def ours(shape: tuple[int, ...], channels: tuple[int, ...]) -> list[Contestant]:
    """The delta rule."""
    net = jb.cnn(shape, channels, CLASSES)

    def pack(p: Any) -> Any:
        stages = [part for stage in p["stages"] for part in (stage, (), ())]
        return (*stages, (), p["head"])

    def unpack(g: Any) -> Any:
        return {"stages": g[: 3 * len(channels) : 3], "head": g[-1]}

    function = jb.value_and_grad(net, jb.SoftmaxCrossEntropy())
    return [Contestant("ours", function, "ours", pack, unpack)]


def contestants(shape: tuple[int, ...], channels: tuple[int, ...]) -> Sequence[Contestant | Absent]:
    """Everybody."""
    net = conv.network
    found: list[Contestant | Absent] = [Contestant("plain", net(), "plain"), *ours(shape, channels)]
    found += [
        Contestant("checkpoint around a stage", net(checkpoint="stage"), "idiomatic"),
        peer("Flax", "flax", "flax", functools.partial(_flax, channels)),
        Contestant("channels first", net(channels_first=True)),
    ]
    for pool in conv.POOLS:
        if pool != "reduce_window":
            found.append(Contestant(f"pooling by {pool}", net(pool)))
        found.append(Contestant(f"pooling by {pool}, relu behind it", net(pool, True)))
    found.append(Contestant("pooling by slices, checkpoint", net("slices", checkpoint="pool")))
    return found


def _flax(channels: tuple[int, ...]) -> Contestant:
    return Contestant("", conv.flax(channels, CLASSES), "", conv.to_flax, conv.from_flax)


def workload(shape: tuple[int, ...], channels: tuple[int, ...], batch: int, level: int) -> Workload:
    """One network."""
    sizes = "x".join(map(str, shape)), " and ".join(map(str, channels))
    return Workload(
        f"cnn, images {sizes[0]}, channels {sizes[1]}, batch {batch}",
        "cnn",
        functools.partial(data, shape, channels, batch),
        functools.partial(contestants, shape, channels),
        outside=[Outside("pytorch.py", "cnn")] if channels == (32, 64) else [],
        flops=flops.cnn(shape, channels, CLASSES, batch),
        level=level,
    )


WORKLOADS = (
    workload((28, 28, 1), (32, 64), 64, 1),
    workload((28, 28, 1), (16, 32), 64, 2),
    workload((32, 32, 3), (32, 64, 128), 32, 2),
)
