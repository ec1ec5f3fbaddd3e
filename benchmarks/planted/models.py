"""Functions to be differentiated, each with its gradient derived by hand: masks, sums, models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from planted.nets import Problem, Tree, half_square, normal, tanh_slope

# Sums of which some terms are left out.


def masked_mean(z: Array, y: Array, mask: Array) -> Array:
    """The mean of (z - y)^2 / 2 over the places that are not masked."""
    return 0.5 * jnp.sum(mask * jnp.square(z - y)) / jnp.sum(mask)


def masked_mean_grad(
    z: Array, y: Array, mask: Array, *, count: Callable[[Array], Any] = jnp.sum
) -> Array:
    """Over the number of places that count."""
    return mask * (z - y) / count(mask)


def dropout(p: Tree, x: Array, mask: Array, c: Array) -> Array:
    """A hidden layer of which a fixed mask drops half."""
    return jnp.sum(c * ((jnp.tanh(x @ p["w"]) * mask * 2) @ p["v"]))


def dropout_grad(
    p: Tree, x: Array, mask: Array, c: Array, *, drop: Callable[[Array], Array] = lambda mask: mask
) -> Tree:
    """The delta passes the mask on its way back."""
    z = x @ p["w"]
    delta = (c @ p["v"].T) * 2 * drop(mask) * tanh_slope(z)
    return {"v": (jnp.tanh(z) * mask * 2).T @ c, "w": x.T @ delta}


_mask = (normal(12, (6, 7)) > 0.2).astype(float)
MASKED = Problem("masked mean", masked_mean, masked_mean_grad, (*normal(13, (6, 7), (6, 7)), _mask))
_v, _w = normal(14, (7, 2), (3, 7))
_x, _c = normal(15, (6, 3), (6, 2))
DROPOUT = Problem("dropout", dropout, dropout_grad, ({"v": _v, "w": _w}, _x, _mask, _c))


# What else there is.


def _logsumexp(z: Array, c: Array) -> Array:
    return jnp.sum(c * jax.nn.logsumexp(z, axis=1))


def _logsumexp_grad(z: Array, c: Array, *, share: Callable[[Array], Array] = jax.nn.softmax) -> Any:
    return c[:, None] * share(z)


LOGSUMEXP = Problem("logsumexp", _logsumexp, _logsumexp_grad, tuple(normal(16, (5, 6), (5,))))


def _pool(x: Array, c: Array) -> Array:
    return jnp.sum(c * jnp.max(jnp.reshape(x, (-1, 4)), axis=1))


def _pool_grad(x: Array, c: Array, *, winner: Callable[..., Array] = jnp.argmax) -> Array:
    won = jax.nn.one_hot(winner(jnp.reshape(x, (-1, 4)), axis=1), 4, dtype=x.dtype)
    return jnp.reshape(c[:, None] * won, x.shape)


POOL = Problem("max pooling", _pool, _pool_grad, tuple(normal(17, (6, 8), (12,))))


def _log_determinant(a: Array) -> Array:
    return jnp.linalg.slogdet(a)[1]


LOG_DETERMINANT = Problem(
    "log determinant",
    _log_determinant,
    lambda a, *, turn=jnp.transpose: turn(jnp.linalg.inv(a)),
    (3 * np.eye(5) + normal(18, (5, 5)),),
)


def _heads_cost(w: Array, x: Array, y: Array) -> Array:
    return half_square(jnp.einsum("bp,hpd->bhd", x, w), y)


def _heads_grad(w: Array, x: Array, y: Array) -> Array:
    return jnp.einsum("bp,bhd->hpd", x, jnp.einsum("bp,hpd->bhd", x, w) - y)


HEADS = Problem("heads", _heads_cost, _heads_grad, tuple(normal(19, (4, 4, 4), (5, 4), (5, 4, 4))))


def _gated(p: Tree, c: Array) -> Array:
    return jnp.sum(c * p["value"] * jax.nn.sigmoid(p["gate"]))


def _gated_grad(
    p: Tree, c: Array, *, gate: Callable[..., Array] = lambda v, g: v * g * (1 - g)
) -> Any:
    g = jax.nn.sigmoid(p["gate"])
    return {"gate": c * gate(p["value"], g), "value": c * g}


_gate, _value, _c = normal(20, (4, 6), (4, 6), (4, 6))
GATED = Problem("gated unit", _gated, _gated_grad, ({"gate": _gate, "value": _value}, _c))


def _gaussian(p: Tree, y: Array) -> Array:
    e = (y - p["mean"]) * jnp.exp(-p["log_scale"])
    return jnp.mean(0.5 * e * e + p["log_scale"])


def _gaussian_grad(p: Tree, y: Array, *, log_term: float = 1.0) -> Any:
    s = jnp.exp(-p["log_scale"])
    e = (y - p["mean"]) * s
    return {"log_scale": (log_term - e * e) / y.size, "mean": -e * s / y.size}


_mean, _log_scale, _y = normal(21, (30,), (30,), (30,))
GAUSSIAN = Problem(
    "gaussian likelihood",
    _gaussian,
    _gaussian_grad,
    ({"log_scale": 0.3 * _log_scale, "mean": _mean}, _y),
)


def _tied(w: Array, x: Array) -> Array:
    return half_square(jnp.tanh(x @ w) @ w.T, x)


def _tied_grad(w: Array, x: Array, *, encoder: float = 1.0, decoder: float = 1.0) -> Array:
    z = x @ w
    delta = jnp.tanh(z) @ w.T - x
    return decoder * (delta.T @ jnp.tanh(z)) + encoder * (x.T @ ((delta @ w) * tanh_slope(z)))


TIED = Problem(
    "autoencoder with tied weights", _tied, _tied_grad, tuple(normal(22, (5, 3), (6, 5), scale=0.7))
)


def _residual(ws: Tree, x: Array, c: Array) -> Array:
    for w in ws:
        x = x + jnp.tanh(x @ w)
    return jnp.sum(c * x)


def _residual_grad(ws: Tree, x: Array, c: Array, *, skip: float = 1.0) -> Tree:
    inputs = [x]
    for w in ws:
        inputs.append(inputs[-1] + jnp.tanh(inputs[-1] @ w))
    grads: list[Array] = []
    for w, a in zip(reversed(ws), reversed(inputs[:-1]), strict=True):
        d = c * tanh_slope(a @ w)
        grads.insert(0, a.T @ d)
        c = skip * c + d @ w.T
    return grads


_ws = list(normal(23, *[(4, 4)] * 3, scale=0.5))
RESIDUAL = Problem(
    "residual network", _residual, _residual_grad, (_ws, *normal(24, (6, 4), (6, 4)))
)


def _cosine(v: Array, u: Array) -> Array:
    return jnp.dot(u, v) / jnp.sqrt(jnp.dot(v, v))


def _cosine_grad(v: Array, u: Array, *, length: float = 1.0) -> Array:
    n = jnp.sqrt(jnp.dot(v, v))
    return (u - length * v * jnp.dot(u, v) / (n * n)) / n


COSINE = Problem("cosine similarity", _cosine, _cosine_grad, tuple(normal(25, (12,), (12,))))

MODELS = (
    MASKED, DROPOUT, LOGSUMEXP, POOL, LOG_DETERMINANT, HEADS, GATED, GAUSSIAN, TIED, RESIDUAL,
    COSINE,
)  # fmt: skip
