"""Losses outside the canonical family: the general rule delta^L = dC/da * f'(z) serves them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.checks import check_numbers
from jbackprop.losses.base import (
    Loss,
    check_range,
    check_same_shape,
    columns_of_diagonal,
    mean_over_positions,
    positions,
    wide,
)


@dataclasses.dataclass(frozen=True)
class Huber(Loss):
    """C = sum_o h(z_o - y_o): h(e) = e^2 / 2 where |e| <= d, else d (|e| - d / 2).

    h' = e where |e| <= d, else d sign e, that is e clipped to [-d, d]: an outlier's pull is
    bounded. No kink: both branches meet with the slope d.

    h'' = 1 where |e| <= d, else 0: the Hessian has these on its diagonal, and so has its root. (At
    |e| = d the second derivative jumps; it counts as 1.)

    Source: Huber, Robust estimation of a location parameter (1964), equation 3.

    Shapes: z and y (B, ..., q).

    Attributes:
        d: where the square turns into a line; positive.

    Raises:
        ValueError: targets of another shape than the outputs; d that is not positive.
    """

    d: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "d", above=0)

    def value(self, z: Array, y: Any) -> Array:
        check_same_shape(self, z.shape, y)
        z = wide(z)
        e = z - jnp.asarray(y).astype(z.dtype)
        inner = jnp.clip(e, -self.d, self.d)  # h = inner (e - inner / 2) on both branches
        return mean_over_positions(jnp.sum(inner * (e - 0.5 * inner), axis=-1))

    def delta(self, z: Array, y: Any) -> Array:
        check_same_shape(self, z.shape, y)
        v = wide(z)
        e = v - jnp.asarray(y).astype(v.dtype)
        return (jnp.clip(e, -self.d, self.d) / positions(z)).astype(z.dtype)

    def _curved(self, z: Array, y: Any) -> Array:
        check_same_shape(self, z.shape, y)
        v = wide(z)
        return (jnp.abs(v - jnp.asarray(y).astype(v.dtype)) <= self.d).astype(v.dtype)

    def hessian_product(self, z: Array, y: Any, v: Array) -> Array:
        curved = self._curved(z, y)
        return (curved / positions(z) * v.astype(curved.dtype)).astype(z.dtype)

    def hessian_root(self, z: Array, y: Any) -> Array:
        return columns_of_diagonal(jnp.sqrt(self._curved(z, y) / positions(z))).astype(z.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        check_same_shape(self, z_shape, y)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Loss):
    """C = -sum_c y_c log a_c for outputs that *are* probabilities, as behind a Softmax layer.

    delta_c = -y_c / a_c. Behind a Softmax layer the ordinary delta rule turns that into
    a_j (delta_j - sum_c a_c delta_c) = a_j sum_c y_c - y_j, the canonical o - y, as long as no
    probability underflows. Take `SoftmaxCrossEntropy` on net inputs: it is exact there too.

    d delta_c/da_c = y_c / a_c^2: the Hessian has these on its diagonal, its root sqrt(y_c) / a_c.
    It knows y: behind a Softmax layer, with a label, the Gauss-Newton matrix of this split is
    (o - y) (outer) (o - y), not that of `SoftmaxCrossEntropy`, where the softmax is on the loss's
    side of the split. Hence no Fisher matrix from here either.

    Below the smallest normal number of its dtype a probability counts as that number and its delta
    and its Hessian are 0, so that nothing here is ever infinite.

    Shapes: a and y (B, ..., q), y distributions (one-hot rows for labels).

    Raises:
        ValueError: targets of another shape than the outputs, or negative, where that can be seen.
    """

    def value(self, a: Array, y: Any) -> Array:
        check_same_shape(self, a.shape, y)
        v = wide(jnp.maximum(a, _tiny(a)))
        return mean_over_positions(-jnp.sum(jnp.asarray(y).astype(v.dtype) * jnp.log(v), axis=-1))

    def delta(self, a: Array, y: Any) -> Array:
        check_same_shape(self, a.shape, y)
        v = wide(a)
        ratio = jnp.asarray(y).astype(v.dtype) / jnp.maximum(v, _tiny(a).astype(v.dtype))
        delta = jnp.where(a > _tiny(a), -ratio / positions(a), 0)
        return delta.astype(a.dtype)

    def _root(self, a: Array, y: Any) -> Array:
        """sqrt(y_c) / a_c, over T positions divided by sqrt(T)."""
        check_same_shape(self, a.shape, y)
        v = wide(a)
        root = jnp.sqrt(jnp.asarray(y).astype(v.dtype)) / jnp.maximum(v, _tiny(a).astype(v.dtype))
        return jnp.where(a > _tiny(a), root / math.sqrt(positions(a)), 0)

    def hessian_product(self, a: Array, y: Any, v: Array) -> Array:
        root = self._root(a, y)
        return (jnp.square(root) * v.astype(root.dtype)).astype(a.dtype)

    def hessian_root(self, a: Array, y: Any) -> Array:
        return columns_of_diagonal(self._root(a, y)).astype(a.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        check_same_shape(self, z_shape, y)
        check_range(self, y, 0, np.inf, "a distribution has no negative entries")


def _tiny(a: Array) -> Array:
    return jnp.asarray(jnp.finfo(a.dtype).tiny, a.dtype)
