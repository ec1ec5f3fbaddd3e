"""The deep multilayer perceptron of `plain.mlp` in Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.bench.plain.mlp import ACTIVATIONS


def scanned(activation: str, before: bool = False, checkpoint: bool = False) -> Callable[..., Any]:
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


def pack(params: Any) -> Any:
    """From the parameters of `plain.mlp`; Equinox holds each weight transposed."""
    depth, width, _ = params["w"].shape
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(width, width, key=key))
    linears = make(jax.random.split(jax.random.key(0), depth))
    new = (jnp.swapaxes(params["w"], 1, 2), params["b"])
    return eqx.tree_at(lambda m: (m.weight, m.bias), linears, new)


def unpack(grads: Any) -> Any:
    """The reverse of `pack`."""
    return {"w": jnp.swapaxes(grads.weight, 1, 2), "b": grads.bias}
