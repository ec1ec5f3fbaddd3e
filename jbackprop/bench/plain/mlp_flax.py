"""The deep multilayer perceptron of `plain.mlp` in Flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.bench.plain.mlp import ACTIVATIONS


class _Layer(nn.Module):
    activation: str
    before: bool
    width: int

    @nn.compact
    def __call__(self, a: Array, _: None) -> tuple[Array, None]:
        f = ACTIVATIONS[self.activation]
        dense = nn.Dense(self.width, name="dense")
        return (dense(f(a)) if self.before else f(dense(a))), None


def scanned(
    activation: str, width: int, depth: int, before: bool = False, checkpoint: bool = False
) -> Callable[..., Any]:
    """`nn.scan` over the layers, or over `nn.remat` of a layer."""
    layer = nn.remat(_Layer, prevent_cse=False) if checkpoint else _Layer
    stack = nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)(
        activation, before, width
    )

    def cost(params: Any, x: Array, y: Array) -> Array:
        a, _ = stack.apply({"params": params}, x, None)
        return 0.5 * jnp.sum((a - y) ** 2) / len(x)

    return jax.value_and_grad(cost)


def pack(params: Any) -> Any:
    """From the parameters of `plain.mlp`."""
    return {"dense": {"kernel": params["w"], "bias": params["b"]}}


def unpack(grads: Any) -> Any:
    """The reverse of `pack`."""
    return {"w": grads["dense"]["kernel"], "b": grads["dense"]["bias"]}
