"""A perceptron of any widths, as a JAX user writes it: a loop over its layers.

Parameters: a sequence of {"w": (p, q), "b": (q,)}; empty ones are passed over. Cost: the mean
cross-entropy of integer labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jbackprop.bench.plain.mlp import ACTIVATIONS

Function = Callable[..., Any]


def data(sizes: Sequence[int], batch: int) -> tuple[Any, Any, Any]:
    """Parameters, with () where an activation stands, inputs and labels."""
    key_x, key_y, *keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params: list[Any] = []
    for key, p, q in zip(keys, sizes, sizes[1:], strict=False):
        w = jax.random.normal(key, (p, q)) * (1.5 / p) ** 0.5
        params += [{"w": w, "b": jnp.full(q, 0.01)}, ()]
    x = jax.random.normal(key_x, (batch, sizes[0]))
    return tuple(params[:-1]), x, jax.random.randint(key_y, (batch,), 0, sizes[-1])


def cost(activation: str, checkpoint: bool = False) -> Function:
    """(params, x, y) -> the mean cost; with `jax.checkpoint` around each hidden layer."""
    f = ACTIVATIONS[activation]

    def layer(x: Array, p: Any) -> Array:
        return f(x @ p["w"] + p["b"])

    hidden = jax.checkpoint(layer) if checkpoint else layer

    def mean(params: Any, x: Array, y: Array) -> Array:
        *before, last = (p for p in params if p)
        for p in before:
            x = hidden(x, p)
        z = x @ last["w"] + last["b"]
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return mean


def plain(activation: str, checkpoint: bool = False) -> Function:
    """(params, x, y) -> (value, gradients)."""
    return jax.value_and_grad(cost(activation, checkpoint))


def dense_layers(params: Any) -> list[Any]:
    """The parameters without what has none."""
    return [p for p in params if p]


def feedback(activation: str) -> Function:
    """Feedback alignment: `jax.grad` of Dense layers whose backward rule takes other weights.

    Parameters: (params, feedback weights in the same layout). Gradients: of params.
    """
    f = ACTIVATIONS[activation]

    @jax.custom_vjp
    def dense(x: Array, w: Array, b: Array, back: Array) -> Array:
        return x @ w + b

    def fwd(x: Array, w: Array, b: Array, back: Array) -> tuple[Array, Any]:
        return x @ w + b, (x, back)

    def bwd(kept: Any, delta: Array) -> Any:
        x, back = kept
        return delta @ back.T, x.T @ delta, delta.sum(0), jnp.zeros_like(back)

    dense.defvjp(fwd, bwd)

    def mean(params: Any, others: Any, x: Array, y: Array) -> Array:
        layers, backs = dense_layers(params), dense_layers(others)
        for l, (p, back) in enumerate(zip(layers, backs, strict=True)):
            z = dense(x, p["w"], p["b"], back["w"])
            x = f(z) if l < len(layers) - 1 else z
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def both(pair: Any, x: Array, y: Array) -> Any:
        return jax.value_and_grad(mean)(*pair, x, y)

    return both


def flax(activation: str, sizes: Sequence[int]) -> Function:
    """The cost of the same network in Flax."""
    import flax.linen as nn

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            for l, width in enumerate(sizes[1:-1]):
                x = ACTIVATIONS[activation](nn.Dense(width, name=f"l{l}")(x))
            return nn.Dense(sizes[-1], name=f"l{len(sizes) - 2}")(x)

    net = Network()

    def mean(params: Any, x: Array, y: Array) -> Array:
        z = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(z, y).mean()

    return mean


def to_flax(params: Any) -> Any:
    """From the parameters of this file."""
    layers = enumerate(dense_layers(params))
    return {f"l{l}": {"kernel": p["w"], "bias": p["b"]} for l, p in layers}


def from_flax(tree: Any) -> Any:
    """The reverse of `to_flax`, for gradients or parameters."""
    found: list[Any] = []
    for l in range(len(tree)):
        found += [{"w": tree[f"l{l}"]["kernel"], "b": tree[f"l{l}"]["bias"]}, ()]
    return tuple(found[:-1])


def equinox(activation: str) -> Function:
    """The cost of a list of `eqx.nn.Linear`, mapped over the batch as Equinox does it."""
    f = ACTIVATIONS[activation]

    def mean(linears: Any, x: Array, y: Array) -> Array:
        def one(x: Array) -> Array:
            for linear in linears[:-1]:
                x = f(linear(x))
            return linears[-1](x)

        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(one)(x), y).mean()

    return mean


def to_equinox(params: Any) -> Any:
    """From the parameters of this file; Equinox holds each weight transposed."""
    import equinox as eqx

    made = []
    for p in dense_layers(params):
        shape = jax.eval_shape(lambda p=p: eqx.nn.Linear(*p["w"].shape, key=jax.random.key(0)))
        made.append(eqx.tree_at(lambda m: (m.weight, m.bias), shape, (p["w"].T, p["b"])))
    return made


def from_equinox(linears: Any) -> Any:
    """The reverse of `to_equinox`."""
    found: list[Any] = []
    for linear in linears:
        found += [{"w": linear.weight.T, "b": linear.bias}, ()]
    return tuple(found[:-1])
