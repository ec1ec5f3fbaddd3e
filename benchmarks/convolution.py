"""Convolutional networks: the delta rule against autodiff's arrangements.

python benchmarks/convolution.py [--seconds S] [--only NAME] [--out FILE.json]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from contest import Contestant, Workload, main
from plain import conv

import jbackprop as jb

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


def contestants(shape: tuple[int, ...], channels: tuple[int, ...]) -> Sequence[Contestant]:
    """Everybody."""
    net = conv.network
    found = [Contestant("plain", net(), "plain"), *ours(shape, channels)]
    found += [
        Contestant("checkpoint around a stage", net(checkpoint="stage"), "idiomatic"),
        Contestant("Flax", conv.flax(channels, CLASSES), "flax", conv.to_flax, conv.from_flax),
        Contestant("channels first", net(channels_first=True)),
    ]
    for pool in conv.POOLS:
        if pool != "reduce_window":
            found.append(Contestant(f"pooling by {pool}", net(pool)))
        found += [
            Contestant(f"pooling by {pool}, relu behind it", net(pool, True)),
            Contestant(f"pooling by {pool}, checkpoint around it", net(pool, checkpoint="pool")),
            Contestant(f"pooling by {pool}, relu behind, checkpoint", net(pool, True, "pool")),
        ]
    return found


def workload(shape: tuple[int, ...], channels: tuple[int, ...], batch: int) -> Workload:
    """One network."""
    sizes = "x".join(map(str, shape)), " and ".join(map(str, channels))
    return Workload(
        f"images {sizes[0]}, channels {sizes[1]}, batch {batch}",
        functools.partial(data, shape, channels, batch),
        functools.partial(contestants, shape, channels),
        {"plain": (1.05, 1.0)},
    )


WORKLOADS = (workload((28, 28, 1), (16, 32), 64), workload((32, 32, 3), (32, 64, 128), 32))

if __name__ == "__main__":
    main(WORKLOADS, about=str(__doc__))
