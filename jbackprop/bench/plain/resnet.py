"""A pre-activation residual network with group norm under autodiff, stages of one block each.

Parameters: {"stem": w, "blocks": ({"norm1", "conv1", "norm2", "conv2", "short"}, ...), "norm",
"head": {"w", "b"}}; kernels (3, 3, c_in, c_out) without bias, norms {"scale", "shift"}; "short" is
a kernel of 1 or None. Cost: the mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

GROUPS = 8


def init(key: Array, c: int, channels: Sequence[int], classes: int) -> Any:
    """Random parameters; from the second stage on the size is halved."""
    keys = iter(jax.random.split(key, 8 * len(channels) + 2))

    def kernel(size: int, p: int, q: int) -> Array:
        return jax.random.normal(next(keys), (size, size, p, q)) * (2 / (size * size * p)) ** 0.5

    def norm(width: int) -> Any:
        drawn = jax.random.normal(next(keys), (2, width))
        return {"scale": 1 + 0.1 * drawn[0], "shift": 0.1 * drawn[1]}

    width, stem, blocks = channels[0], kernel(3, c, channels[0]), []
    for wider in channels:
        blocks.append(
            {"norm1": norm(width), "conv1": kernel(3, width, wider), "norm2": norm(wider),
             "conv2": kernel(3, wider, wider),
             "short": None if wider == width else kernel(1, width, wider)}
        )  # fmt: skip
        width = wider
    w = jax.random.normal(next(keys), (width, classes)) * width**-0.5
    head = {"w": w, "b": jnp.zeros(classes)}
    return {"stem": stem, "blocks": tuple(blocks), "norm": norm(width), "head": head}


def _conv(x: Array, w: Array, stride: int = 1) -> Array:
    axes = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=axes)


def _active(x: Array, p: Any) -> Array:
    """relu of the group norm."""
    B, H, W, C = x.shape
    g = x.reshape(B, H, W, GROUPS, C // GROUPS)
    mean = g.mean((1, 2, 4), keepdims=True)
    variance = ((g - mean) ** 2).mean((1, 2, 4), keepdims=True)
    h = ((g - mean) * lax.rsqrt(variance + 1e-5)).reshape(x.shape)
    return jax.nn.relu(h * p["scale"] + p["shift"])


def network(checkpoint: bool = False) -> Callable[..., Any]:
    """params, images, labels -> (value, grads); with `jax.checkpoint` around each block."""

    def block(x: Array, p: Any, stride: int) -> Array:
        h = _conv(_active(x, p["norm1"]), p["conv1"], stride)
        h = _conv(_active(h, p["norm2"]), p["conv2"])
        return h + (x if p["short"] is None else _conv(x, p["short"], stride))

    around = jax.checkpoint(block, static_argnums=2) if checkpoint else block

    def cost(params: Any, x: Array, y: Array) -> Array:
        x = _conv(x, params["stem"])
        for l, p in enumerate(params["blocks"]):
            x = around(x, p, 2 if l else 1)
        x = _active(x, params["norm"]).mean((1, 2))
        z = x @ params["head"]["w"] + params["head"]["b"]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return jax.value_and_grad(cost)
