"""A convolutional network under autodiff: stages of convolution, relu and max-pooling, then Dense.

Parameters: {"stages": ({"w": (3, 3, c_in, c_out), "b": (c_out,)}, ...), "head": {"w", "b"}}.
Images are (B, H, W, C); cost: the mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

Pool = Callable[[Array], Array]


def init(key: Array, shape: Sequence[int], channels: Sequence[int], classes: int) -> Any:
    """Random parameters."""
    high, wide, c = shape
    stages = []
    for each in channels:
        key, key_w, key_b = jax.random.split(key, 3)
        w = jax.random.normal(key_w, (3, 3, c, each)) * (2 / (9 * c)) ** 0.5
        stages.append({"w": w, "b": 0.1 * jax.random.normal(key_b, (each,))})
        high, wide, c = high // 2, wide // 2, each
    size = high * wide * c
    w = jax.random.normal(key, (size, classes)) * size**-0.5
    return {"stages": tuple(stages), "head": {"w": w, "b": jnp.zeros(classes)}}


def by_window(x: Array) -> Array:
    """`lax.reduce_window`, as Flax's max_pool has it."""
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def by_reshape(x: Array) -> Array:
    """The maximum over the axes of a reshape."""
    B, H, W, C = x.shape
    x = x[:, : H // 2 * 2, : W // 2 * 2]
    return x.reshape(B, H // 2, 2, W // 2, 2, C).max((2, 4))


def by_slices(x: Array) -> Array:
    """The maximum of four strided slices."""
    H, W = (n // 2 * 2 for n in x.shape[1:3])
    rows = jnp.maximum(x[:, 0:H:2, :W], x[:, 1:H:2, :W])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


POOLS: dict[str, Pool] = {
    "reduce_window": by_window,
    "reshape": by_reshape,
    "slices": by_slices,
}


def network(
    pool: str = "reduce_window",
    relu_last: bool = False,
    checkpoint: str = "",
    channels_first: bool = False,
) -> Callable[..., Any]:
    """params, images, labels -> (value, grads).

    Args:
        pool: one of `POOLS`.
        relu_last: relu behind the pooling, where there is a quarter to do; the same function.
        checkpoint: "", "stage" (around each), or "pool" (around relu and pooling).
        channels_first: the convolutions' images as (B, C, H, W).
    """
    pooled = POOLS[pool]
    axes = ("NCHW", "HWIO", "NCHW") if channels_first else ("NHWC", "HWIO", "NHWC")

    def convolved(x: Array, p: Any) -> Array:
        if channels_first:
            x = jnp.moveaxis(x, 3, 1)
        z = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=axes)
        return (jnp.moveaxis(z, 1, 3) if channels_first else z) + p["b"]

    def active(z: Array) -> Array:
        return jax.nn.relu(pooled(z)) if relu_last else pooled(jax.nn.relu(z))

    if checkpoint == "pool":
        active = jax.checkpoint(active)

    def stage(x: Array, p: Any) -> Array:
        return active(convolved(x, p))

    if checkpoint == "stage":
        stage = jax.checkpoint(stage)

    def cost(params: Any, x: Array, y: Array) -> Array:
        for p in params["stages"]:
            x = stage(x, p)
        z = x.reshape(len(x), -1) @ params["head"]["w"] + params["head"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return jax.value_and_grad(cost)


def flax(channels: Sequence[int], classes: int) -> Callable[..., Any]:
    """The same in Flax; its parameters are those of here, by other names."""
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            for i, c in enumerate(channels):
                x = nn.relu(nn.Conv(c, (3, 3), name=f"stage{i}")(x))
                x = nn.max_pool(x, (2, 2), (2, 2))
            return nn.Dense(classes, name="head")(x.reshape(len(x), -1))

    net = Network()

    def cost(params: Any, x: Array, y: Array) -> Array:
        z = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return jax.value_and_grad(cost)


def to_flax(params: Any) -> Any:
    """From the parameters of this file."""

    def renamed(p: Any) -> Any:
        return {"kernel": p["w"], "bias": p["b"]}

    stages = {f"stage{i}": renamed(p) for i, p in enumerate(params["stages"])}
    return stages | {"head": renamed(params["head"])}


def from_flax(grads: Any) -> Any:
    """The reverse of `to_flax`."""

    def renamed(g: Any) -> Any:
        return {"w": g["kernel"], "b": g["bias"]}

    stages = tuple(renamed(grads[f"stage{i}"]) for i in range(len(grads) - 1))
    return {"stages": stages, "head": renamed(grads["head"])}
