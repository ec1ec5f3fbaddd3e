"""The head of a language model under autodiff: Dense with softmax cross-entropy, mean over rows.

Parameters: {"w": (D, V), "b": (V,), "x": (N, D)}; x is among them, because its gradient is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

Loss = Callable[[Array, Array], Array]


def by_optax(z: Array, y: Array) -> Array:
    """One cost for each row."""
    return optax.softmax_cross_entropy_with_integer_labels(z, y)


def by_logsumexp(z: Array, y: Array) -> Array:
    """logsumexp(z) - z_y."""
    return jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]


def by_mask(z: Array, y: Array) -> Array:
    """z_y by a comparison, whose gradient needs no scatter."""
    hit = y[:, None] == jnp.arange(z.shape[-1])
    return jax.nn.logsumexp(z, axis=-1) - jnp.sum(jnp.where(hit, z, 0), axis=-1)


def _total(loss: Loss, w: Array, b: Array, x: Array, y: Array) -> Array:
    return jnp.sum(loss(x @ w + b, y))


def whole(loss: Loss = by_optax, checkpoint: bool = False) -> Callable[..., Any]:
    """All rows at once."""
    total: Callable[..., Array] = functools.partial(_total, loss)
    total = jax.checkpoint(total) if checkpoint else total
    return jax.value_and_grad(lambda p, y: total(p["w"], p["b"], p["x"], y) / len(y))


def _cut(rows: int, *arrays: Array) -> tuple[Array, ...]:
    return tuple(a.reshape(-1, rows, *a.shape[1:]) for a in arrays)


def blocks(rows: int, loss: Loss = by_optax, unroll: bool = False) -> Callable[..., Any]:
    """A checkpointed scan over blocks of rows: no (N, V) array."""
    total = jax.checkpoint(functools.partial(_total, loss), prevent_cse=unroll)

    def cost(p: Any, y: Array) -> Array:
        def body(sum_: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
            return sum_ + total(p["w"], p["b"], *part), None

        parts = _cut(rows, p["x"], y)
        return lax.scan(body, jnp.zeros(()), parts, unroll=unroll)[0] / len(y)

    return jax.value_and_grad(cost)


def gradients_forward(rows: int, loss: Loss = by_optax) -> Callable[..., Any]:
    """A scan over blocks of rows that takes each block's gradient at once, and adds up.

    Nothing is made twice; it needs the factor of the cost beforehand.
    """
    both = jax.value_and_grad(functools.partial(_total, loss), argnums=(0, 1, 2))

    def value_and_grad(p: Any, y: Array) -> tuple[Array, Any]:
        def body(carry: Any, part: tuple[Array, ...]) -> tuple[Any, Array]:
            value, (w, b, x) = both(p["w"], p["b"], *part)
            return jax.tree.map(jnp.add, carry, (value, w, b)), x

        start = (jnp.zeros(()), jnp.zeros_like(p["w"]), jnp.zeros_like(p["b"]))
        (value, w, b), x = lax.scan(body, start, _cut(rows, p["x"], y))
        n = len(y)
        return value / n, {"w": w / n, "b": b / n, "x": x.reshape(p["x"].shape) / n}

    return value_and_grad


def over_vocabulary(columns: int) -> Callable[..., Any]:
    """A checkpointed scan over blocks of classes with a running logsumexp: no (N, V) array.

    The gradient of each block's weights is made once, and nothing of that size is added up.
    """

    def cost(p: Any, y: Array) -> Array:
        n, (width, classes) = len(y), p["w"].shape
        blocks = classes // columns
        w = jnp.moveaxis(p["w"].reshape(width, blocks, columns), 1, 0)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def body(carry: Any, part: Any) -> tuple[Any, None]:
            top, total, own = carry
            start, w, b = part
            z = p["x"] @ w + b
            new = lax.stop_gradient(jnp.maximum(top, jnp.max(z, axis=1)))
            total = total * jnp.exp(top - new) + jnp.sum(jnp.exp(z - new[:, None]), axis=1)
            hit = (y - start)[:, None] == jnp.arange(columns)
            return (new, total, own + jnp.sum(jnp.where(hit, z, 0), axis=1)), None

        first = (jnp.full(n, -1e30), jnp.zeros(n), jnp.zeros(n))
        parts = (columns * jnp.arange(blocks), w, p["b"].reshape(blocks, columns))
        (top, total, own), _ = lax.scan(body, first, parts)
        return jnp.mean(top + jnp.log(total) - own)

    return jax.value_and_grad(cost)
