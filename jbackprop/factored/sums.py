"""Sums over examples: in float32 at least, and of an example of weight 0 nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

PyTree = Any


def wide_dtype(dtype: Any) -> Any:
    """The dtype that sums and costs are kept in: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def widest_dtype(dtypes: Sequence[Any]) -> Any:
    """Of floating-point dtypes of 32 bits and more, also where JAX promotes nothing by itself."""
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def _column(weights: Array, like: Array) -> Array:
    return weights.reshape(weights.shape + (1,) * (like.ndim - 1))


def present(weights: Array, values: Array) -> Array:
    """values_n, but 0 for what is not finite in an example of weight 0: it is not there."""
    absent = (_column(weights, values) == 0) & ~jnp.isfinite(values)
    return jnp.where(absent, jnp.zeros((), values.dtype), values)


def weighted(weights: Array, values: Array) -> Array:
    """weights_n * values_n, in float32 at least: a small weight must not underflow in float16."""
    wide = wide_dtype(values.dtype)
    return _column(weights.astype(wide), values) * present(weights, values).astype(wide)


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum`, accumulated in float32 at least."""
    wide = wide_dtype(jnp.result_type(*operands))
    return jnp.einsum(spec, *operands, preferred_element_type=wide)


def wide_square(x: Array) -> Array:
    """x * x, in float32 at least."""
    return jnp.square(x.astype(wide_dtype(x.dtype)))


def weighted_square(g: Array, weights: Array | None) -> Array:
    """sum_n weights_n g_n * g_n of g (B, ...)."""
    if weights is None:
        weights = jnp.ones(g.shape[0], g.dtype)
    return over_examples(weights.astype(g.dtype), jnp.square(present(weights, g)))


def over_examples(weights: Array, values: Array) -> Array:
    """sum_n weights_n values_n of values (B, ...): a product of matrices, which XLA does faster."""
    return jnp.tensordot(weights, values, 1, precision=lax.Precision.HIGHEST)


def promoted_sum(values: Sequence[Array]) -> Array:
    """The sum of arrays in the widest of their dtypes."""
    dtype = widest_dtype([v.dtype for v in values])
    return functools.reduce(jnp.add, [v.astype(dtype) for v in values])


class Moments(NamedTuple):
    """The moments of some examples: the sum of their weights, means and variances (trees)."""

    mass: Array
    mean: PyTree
    variance: PyTree

    def join(self, other: Moments) -> Moments:
        """Those of both together, without loss; zeros are those of no examples.

        Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing
        sample variances (1979).
        """
        mass = self.mass + other.mass
        share = other.mass / jnp.where(mass == 0, 1, mass)

        def mean(m: Array, new: Array) -> Array:
            return m + share.astype(m.dtype) * (new - m)

        def variance(v: Array, new: Array, m: Array, its: Array) -> Array:
            part = share.astype(v.dtype)
            return v + part * (new - v) + part * (1 - part) * jnp.square(its - m)

        return Moments(
            mass,
            jax.tree.map(mean, self.mean, other.mean),
            jax.tree.map(variance, self.variance, other.variance, self.mean, other.mean),
        )


def in_shares(weights: Array | None, n: int, dtype: Any) -> tuple[Array, Array]:
    """The sum of the weights (ones by default), and the weights over it; zeros if it is 0."""
    if weights is None:
        return jnp.asarray(n, dtype), jnp.full(n, 1 / max(n, 1), dtype)
    weights = weights.astype(dtype)
    mass = jnp.sum(weights)
    return mass, weights / jnp.where(mass == 0, 1, mass)
