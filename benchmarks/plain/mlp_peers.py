"""The deep multilayer perceptron of `plain.mlp` in Flax and in Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from plain.mlp import ACTIVATIONS


class _Layer(nn.Module):
    activation: str
    before: bool
    width: int

    @nn.compact
    def __call__(self, a: Array, _: None) -> tuple[Array, None]:
        f = ACTIVATIONS[self.activation]
        dense = nn.Dense(self.width, name="dense")
        return (dense(f(a)) if self.before else f(dense(a))), None


def flax(
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


def to_flax(params: Any) -> Any:
    """From the parameters of `plain.mlp`."""
    return {"dense": {"kernel": params["w"], "bias": params["b"]}}


def from_flax(grads: Any) -> Any:
    """The reverse of `to_flax`."""
    return {"w": grads["dense"]["kernel"], "b": grads["dense"]["bias"]}


def equinox(activation: str, before: bool = False, checkpoint: bool = False) -> Callable[..., Any]:
    """A scan over a stacked `eqx.nn.Linear`, mapped over the batch as Equinox does it."""
    f = ACTIVATIONS[activation]

    def body(a: Array, linear: Any) -> tuple[Array, None]:
        apply = jax.vmap(linear)
        return (apply(f(a)) if before else f(apply(a))), None

    step = eqx.filter_checkpoint(body, prevent_cse=False) if checkpoint else body

    def cost(linears: Any, x: Array, y: Array) -> Array:
        a, _ = lax.scan(step, x, linears)
        return 0.5 * jnp.sum((a - y) ** 2) / len(x)

    return jax.value_and_grad(cost)


def to_equinox(params: Any) -> Any:
    """From the parameters of `plain.mlp`; Equinox holds each weight transposed."""
    depth, width, _ = params["w"].shape
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(width, width, key=key))
    linears = make(jax.random.split(jax.random.key(0), depth))
    new = (jnp.swapaxes(params["w"], 1, 2), params["b"])
    return eqx.tree_at(lambda m: (m.weight, m.bias), linears, new)


def from_equinox(grads: Any) -> Any:
    """The reverse of `to_equinox`."""
    return {"w": jnp.swapaxes(grads.weight, 1, 2), "b": grads.bias}
