"""Scaled dot-product attention under autodiff: q, k, v (B, T, H, d) -> (B, T, H, d).

o_t = sum_s softmax_s(q_t . k_s / sqrt d) v_s, over s <= t if causal.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

Attend = Callable[..., Array]


def _seen(rows: Array, columns: Array) -> Array:
    return columns[None, :] <= rows[:, None]


def plain(q: Array, k: Array, v: Array, causal: bool = True) -> Array:
    """Two einsums with a softmax between them."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    if causal:
        seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)


def heads_first(q: Array, k: Array, v: Array, causal: bool = True) -> Array:
    """The axes brought in order for batched matmuls first, the queries scaled instead of scores."""
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
    scores = q @ jnp.swapaxes(k, 2, 3)
    if causal:
        steps = jnp.arange(scores.shape[-1])
        scores = scores + jnp.where(_seen(steps, steps), 0.0, -1e30)
    return jnp.swapaxes(jax.nn.softmax(scores, axis=-1) @ v, 1, 2)


def library(q: Array, k: Array, v: Array, causal: bool = True) -> Array:
    """`jax.nn.dot_product_attention`."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal)


def late_division(q: Array, k: Array, v: Array, causal: bool = True) -> Array:
    """The softmax's division behind the second matmul, where it is of d numbers and not of T."""
    scores = jnp.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    if causal:
        steps = jnp.arange(scores.shape[-1])
        scores = jnp.where(_seen(steps, steps), scores, -jnp.inf)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    e = jnp.exp(scores - top)
    total = jnp.swapaxes(jnp.sum(e, axis=-1), 1, 2)[..., None]
    return jnp.einsum("bhts,bshd->bthd", e, v) / total


def keys_first(q: Array, k: Array, v: Array, causal: bool = True) -> Array:
    """Scores as (S, T): the softmax's sums go from row to row, which suits a CPU better."""
    scores = jnp.einsum("bshd,bthd->bhst", k, q * q.shape[-1] ** -0.5)
    if causal:
        steps = jnp.arange(scores.shape[-1])
        scores = jnp.where(_seen(steps, steps).T, scores, -jnp.inf)
    return jnp.einsum("bhst,bshd->bthd", jax.nn.softmax(scores, axis=-2), v)


def keys_first_late(q: Array, k: Array, v: Array, causal: bool = True) -> Array:
    """Both: scores as (S, T), and the division behind the second matmul."""
    scores = jnp.einsum("bshd,bthd->bhst", k, q * q.shape[-1] ** -0.5)
    if causal:
        steps = jnp.arange(scores.shape[-1])
        scores = jnp.where(_seen(steps, steps).T, scores, -jnp.inf)
    e = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-2, keepdims=True)))
    total = jnp.swapaxes(jnp.sum(e, axis=-2), 1, 2)[..., None]
    return jnp.einsum("bhst,bshd->bthd", e, v) / total


def blocked(size: int, causal: bool = True, inner: Attend | None = None) -> Attend:
    """Blocks of queries one after the other, each against all keys, each checkpointed."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        B, T, H, d = q.shape
        blocks = jnp.moveaxis(q.reshape(B, T // size, size, H, d), 1, 0)

        @jax.checkpoint
        def one(part: tuple[Array, Array]) -> Array:
            i, q = part
            scores = jnp.einsum("bthd,bshd->bhts", q, k) * d**-0.5
            if causal:
                seen = _seen(i * size + jnp.arange(size), jnp.arange(T))
                scores = jnp.where(seen, scores, -jnp.inf)
            return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)

        out = lax.map(one, (jnp.arange(T // size), blocks))
        return jnp.moveaxis(out, 0, 1).reshape(B, T, H, d)

    return attend


def triangle(size: int) -> Attend:
    """Causal: an unrolled loop over blocks of queries, each against the keys up to it only."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        @jax.checkpoint
        def one(q: Array, k: Array, v: Array) -> Array:
            scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
            start = k.shape[1] - q.shape[1]
            seen = _seen(start + jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
            scores = jnp.where(seen, scores, -jnp.inf)
            return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)

        ends = range(size, q.shape[1] + 1, size)
        parts = [one(q[:, e - size : e], k[:, :e], v[:, :e]) for e in ends]
        return jnp.concatenate(parts, axis=1)

    return attend


def by_heads(attend: Attend) -> Attend:
    """One head after the other, each checkpointed."""

    def each(q: Array, k: Array, v: Array) -> Array:
        one = jax.checkpoint(lambda part: attend(*(a[:, :, None] for a in part))[:, :, 0])
        heads = tuple(jnp.moveaxis(a, 2, 0) for a in (q, k, v))
        return jnp.moveaxis(lax.map(one, heads), 0, 2)

    return each


def online(size: int, causal: bool = True) -> Attend:
    """Blocks of keys inside blocks of queries with a running softmax; both loops checkpointed.

    No (T, T) array is whole, neither forward nor back.
    """

    def attend(q: Array, k: Array, v: Array) -> Array:
        B, T, H, d = q.shape
        n = T // size

        def cut(a: Array) -> Array:
            return jnp.moveaxis(a.reshape(B, n, size, H, d), 1, 0)

        keys = (jnp.arange(n), cut(k), cut(v))

        @jax.checkpoint
        def row(part: tuple[Array, Array]) -> Array:
            i, q = part

            @jax.checkpoint
            def step(carry: tuple[Array, Array, Array], block: tuple[Array, ...]) -> tuple:
                top, total, out = carry
                j, k, v = block
                scores = jnp.einsum("bthd,bshd->bhts", q, k) * d**-0.5
                if causal:
                    seen = _seen(i * size + jnp.arange(size), j * size + jnp.arange(size))
                    scores = jnp.where(seen, scores, -1e30)
                new = lax.stop_gradient(jnp.maximum(top, scores.max(-1)))
                e = jnp.exp(scores - new[..., None])
                shrink = jnp.exp(top - new)
                out = out * shrink[..., None] + jnp.einsum("bhts,bshd->bhtd", e, v)
                return (new, total * shrink + e.sum(-1), out), None

            start = (
                jnp.full((B, H, size), -1e30),
                jnp.zeros((B, H, size)),
                jnp.zeros((B, H, size, d)),
            )
            (_, total, out), _ = lax.scan(step, start, keys)
            return jnp.swapaxes(out / total[..., None], 1, 2)

        return jnp.moveaxis(lax.map(row, (jnp.arange(n), cut(q))), 0, 1).reshape(B, T, H, d)

    return attend


ATTEND: dict[str, Attend] = {
    "plain": plain,
    "heads first": heads_first,
    "jax.nn": library,
    "late division": late_division,
    "keys first": keys_first,
    "keys first, late division": keys_first_late,
}
