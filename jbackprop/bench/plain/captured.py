"""Models of Flax and Equinox as they come: the cost of one example, parameters, a mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax

CLASSES, VOCABULARY, HEADS = 10, 64, 4

Model = tuple[Callable[..., Any], Any, tuple[Array, Array]]
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def labelled(batch: int, *shape: int) -> tuple[Array, Array]:
    """Inputs and classes."""
    key, key_y = jax.random.split(jax.random.key(1))
    x = jax.random.normal(key, (batch, *shape))
    return x, jax.random.randint(key_y, (batch,), 0, CLASSES)


def mlp(batch: int = 256) -> Model:
    """784-1024-1024-1024-10, relu; Equinox."""
    net = eqx.nn.MLP(784, CLASSES, 1024, 3, jax.nn.relu, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def cost(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(eqx.combine(params, static)(x), y)

    return cost, params, labelled(batch, 784)


class Cnn(nnx.Module):
    """Three convolutions with GroupNorm, the mean over places, a linear head."""

    def __init__(self, rngs: Any) -> None:
        sizes = ((1, 32, 1), (32, 64, 2), (64, 64, 2))
        self.convs = nnx.List([nnx.Conv(i, o, (3, 3), s, rngs=rngs) for i, o, s in sizes])
        self.norms = nnx.List([nnx.GroupNorm(o, 8, rngs=rngs) for _, o, _ in sizes])
        self.head = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def cnn(batch: int = 128) -> Model:
    """Images 28x28x1; Flax nnx."""
    graph, params = nnx.split(Cnn(nnx.Rngs(0)), nnx.Param)

    def cost(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(nnx.merge(graph, params)(x[None])[0], y)

    return cost, params, labelled(batch, 28, 28, 1)


class Block(nn.Module):
    """Attention and two Dense, as `nn.scan` wants a block."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        width = x.shape[-1]
        attend = nn.MultiHeadDotProductAttention(HEADS)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """Blocks one by one, or scanned and rematerialised; the head is the embedding."""

    width: int
    depth: int
    scanned: bool

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        embed, mask = nn.Embed(VOCABULARY, self.width), nn.make_causal_mask(ids)
        x = embed(ids) + nn.Embed(len(ids), self.width)(jnp.arange(len(ids)))
        if self.scanned:
            stack = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=nn.broadcast, length=self.depth,
            )  # fmt: skip
            x, _ = stack()(x, mask)
        else:
            for _ in range(self.depth):
                x, _ = Block()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def transformer(width: int, depth: int, length: int, batch: int, scanned: bool = False) -> Model:
    """A causal language model; Flax linen."""
    net = Transformer(width, depth, scanned)
    ids = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, VOCABULARY)
    params = jax.jit(net.init)(jax.random.key(0), ids[0, 1:])

    def cost(params: Any, ids: Array, targets: Array) -> Array:
        return cross_entropy(net.apply(params, ids), targets).mean()

    return cost, params, (ids[:, :-1], ids[:, 1:])


def rnn(batch: int = 64) -> Model:
    """A GRU 64 -> 256 over 32 steps, and a linear head on its last state; Equinox."""
    keys = jax.random.split(jax.random.key(0))
    net = eqx.nn.GRUCell(64, 256, key=keys[0]), eqx.nn.Linear(256, CLASSES, key=keys[1])
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def cost(params: Any, xs: Array, y: Array) -> Array:
        cell, head = eqx.combine(params, static)
        last, _ = lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(256), xs)
        return cross_entropy(head(last), y)

    return cost, params, labelled(batch, 32, 64)
