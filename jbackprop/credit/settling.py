"""Activities that settle, and whether they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored import wide_dtype


def settle(
    ways: Callable[[list[Array]], tuple[list[Array], Array]],
    start: list[Array],
    rate: float,
    most: int,
    tolerance: float,
) -> tuple[list[Array], Array, Array]:
    """Go on until there is no way to go.

    Args:
        ways: of activities, one array a unit: which way each goes, and what is left, one number.
        start: the first activities.
        rate: how much of the way is a step.
        most: so many steps at most.
        tolerance: what is left when it has settled. (NaN has not.)

    Returns:
        The last activities, how many steps it took, and what is left.
    """

    def more(carry: tuple[list[Array], Array, list[Array], Array]) -> Array:
        return (carry[1] < most) & ~(carry[3] <= tolerance)

    def step(
        carry: tuple[list[Array], Array, list[Array], Array],
    ) -> tuple[list[Array], Array, list[Array], Array]:
        s, i, way, _ = carry
        s = [v + rate * w for v, w in zip(s, way, strict=True)]
        return s, i + 1, *ways(s)

    s, steps, _, left = lax.while_loop(more, step, (start, jnp.asarray(0), *ways(start)))
    return s, steps, left


def share(part: Array, whole: Array) -> Array:
    """One norm over another; 0 for 0 / 0, NaN where one of them is not finite."""
    found = part / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny)
    return jnp.where(jnp.isfinite(whole), found, jnp.nan)


def norm(a: Array) -> Array:
    """The root of the sum of squares, which do not overflow and do not underflow."""
    a = a.astype(wide_dtype(a.dtype)).reshape(-1)
    size = largest_entry(a)
    return size[0] * jnp.linalg.norm(a / size)


def largest(numbers: Iterable[Array]) -> Array:
    """The largest; 0 if there are none, NaN if there is one among them."""
    found = list(numbers)
    return jnp.max(jnp.stack(found)) if found else jnp.zeros(())


def largest_entry(u: Array) -> Array:
    """The largest size of an entry along the last axis, (..., 1): to divide by before one squares.

    It and its reciprocal are normal numbers: XLA may multiply by that.
    """
    tiny = jnp.finfo(u.dtype).tiny
    return jnp.clip(jnp.max(jnp.abs(u), axis=-1, keepdims=True, initial=0), tiny, 1 / tiny)
