"""Questions about single examples under autodiff: `vmap(grad)`, whole or in parts, and JAX Privacy.

Each is made of `plain`, (params, x, y) -> (mean cost, gradient), and a quantity: "norms",
"clipped sum" (the sum of clipped gradients) or "variance".
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

MAX_NORM = 1.0
Function = Callable[..., Any]


def norms_of(g: Any) -> Array:
    """|g_n| (B,) of a tree of gradients (B, ...)."""
    squares = [jnp.sum(jnp.square(v), axis=range(1, v.ndim)) for v in jax.tree.leaves(g)]
    return jnp.sqrt(functools.reduce(jnp.add, squares))


def clipped_of(g: Any) -> Any:
    """sum_n min(1, C / |g_n|) g_n."""
    factors = jnp.minimum(1, MAX_NORM / norms_of(g))
    return jax.tree.map(lambda v: jnp.tensordot(factors, v, 1), g)


def moments_of(g: Any) -> tuple[Any, Any]:
    """The mean and the variance about it. As dots: XLA's sums over a first axis are slow."""

    def mean(v: Array) -> Array:
        return jnp.tensordot(jnp.full(len(v), 1 / len(v)), v, 1)

    means = jax.tree.map(mean, g)
    return means, jax.tree.map(lambda v, m: mean(jnp.square(v - m)), g, means)


def each(plain: Function) -> Function:
    """(params, x, y) -> the gradient of every example, (B, ...)."""
    return jax.vmap(lambda params, x, y: plain(params, x[None], y[None])[1], (None, 0, 0))


def whole(plain: Function, quantity: str) -> Function:
    """`vmap(grad)`: all gradients at once."""
    ask = {"norms": norms_of, "clipped sum": clipped_of, "variance": lambda g: moments_of(g)[1]}
    return lambda params, x, y: ask[quantity](each(plain)(params, x, y))


def in_parts(plain: Function, quantity: str, size: int, unroll: bool = False) -> Function:
    """`vmap(grad)` of so many examples at a time."""

    def norms(carry: Any, g: Any) -> Any:
        return carry, norms_of(g)

    def clipped(total: Any, g: Any) -> Any:
        return jax.tree.map(jnp.add, total, clipped_of(g)), ()

    def variance(carry: Any, g: Any) -> Any:
        """Put the moments about two means together (Chan, Golub and LeVeque, 1983)."""
        n, means, variances = carry
        share = size / (n + size)
        own_means, own = moments_of(g)
        gap = jax.tree.map(jnp.subtract, own_means, means)
        means = jax.tree.map(lambda m, d: m + share * d, means, gap)

        def both(v: Array, own: Array, d: Array) -> Array:
            return v + share * (own - v + (1 - share) * jnp.square(d))

        return (n + size, means, jax.tree.map(both, variances, own, gap)), ()

    step = {"norms": norms, "clipped sum": clipped, "variance": variance}[quantity]

    def answer(params: Any, x: Any, y: Any) -> Any:
        parts = jax.tree.map(lambda d: d.reshape(-1, size, *d.shape[1:]), (x, y))
        zero = jax.tree.map(jnp.zeros_like, params)
        start = (0.0, zero, zero) if quantity == "variance" else zero

        def body(carry: Any, part: Any) -> Any:
            return step(carry, each(plain)(params, *part))

        end, found = lax.scan(body, start, parts, unroll=unroll)
        if quantity == "norms":
            return found.reshape(-1)
        return end[2] if quantity == "variance" else end

    return answer


def by_jax_privacy(plain: Function, quantity: str, size: int | None) -> Function:
    """Clipped sums of `jax_privacy`, or the norms on the way to them."""
    cost = inspect.unwrap(plain)  # of which `plain` is the value and the gradient
    norms = quantity == "norms"

    def answer(params: Any, x: Any, y: Any) -> Any:
        if quantity == "variance":
            raise NotImplementedError("norms and clipped sums only")
        from jax_privacy.clipping import clipped_grad

        options = {"microbatch_size": size, "return_grad_norms": norms}
        clipped = clipped_grad(cost, l2_clip_norm=MAX_NORM, batch_argnums=(1, 2), **options)
        found = clipped(params, x, y)
        return found[1].grad_norms if norms else found

    return answer
