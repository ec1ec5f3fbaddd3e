"""Rotary positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.checks import check_flags, check_numbers, check_sizes
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers.checks import check_features, check_no_params, shown
from jbackprop.layers.weightless import Weightless
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True)
class Rotary(Weightless):
    """Rotary position embedding: each pair of features turns by an angle that grows with position.

    Equation, for one example and one head of d features, t = 0..T-1. Pairs (x_i, x_j) turn

        y_i = x_i cos(t w_i) - x_j sin(t w_i)
        y_j = x_i sin(t w_i) + x_j cos(t w_i)           w_i = base^(-2 i / d),   i = 0..d/2-1

    where j = i + d / 2: the first half of the features turns with the second half. Interleaved
    pairs are neighbours, x_{2i} and x_{2i+1} in the place of x_i and x_j, as in the source; the two
    differ by the order of the features, which does not matter to products of queries and keys.

        x (T, heads d) -> y (T, heads d), the heads side by side on the last axis

    The product of a query at t and a key at s depends on t and s through the angles (t - s) w_i.

    Derivation. A rotation is orthogonal, its transpose is that by the opposite angle:

        dC/dx_i =  delta_i cos(t w_i) + delta_j sin(t w_i)
        dC/dx_j = -delta_i sin(t w_i) + delta_j cos(t w_i)

    Nothing is kept. The angles are made in float64 when the program is.

    Source: Su et al., RoFormer: enhanced transformer with rotary position embedding (2021),
    equations 14, 15 and 34.

    Attributes:
        heads: the number of heads.
        base: of the frequencies, above 0.
        interleaved: whether neighbours are pairs.

    Raises:
        ValueError: heads below 1; a base that is no positive number; inputs of other than two axes,
            or whose heads have not an even number of features.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    heads: int
    base: float = 10000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "heads")
        check_flags(self, "interleaved")
        check_numbers(self, "base", above=0)

    def __repr__(self) -> str:
        return shown(self, "heads")

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        check_no_params(self, params)
        features = x.shape[-1] if getattr(x, "shape", ()) else 0
        check_features(self, x, features, axes=2)
        if x.ndim != 2 or features == 0 or features % (2 * self.heads):
            raise ValueError(
                f"{self} needs positions and {self.heads} heads of an even number of features, "
                f"(T, {self.heads} d), but one example has the shape {x.shape}"
            )
        return self._turned(x, 1), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return self._turned(delta, -1), ()

    def _turned(self, x: Array, sign: int) -> Array:
        """x turned, forwards (1) or backwards (-1)."""
        T, half = len(x), x.shape[1] // self.heads // 2
        axis = 3 if self.interleaved else 2
        parts = x.reshape((T, self.heads, half, 2) if axis == 3 else (T, self.heads, 2, half))
        wide = wide_dtype(x.dtype)
        a, b = (jnp.take(parts, i, axis=axis).astype(wide) for i in (0, 1))
        angles = np.arange(T)[:, None] * self.base ** (-np.arange(half) / half)
        cos, sin = (jnp.asarray(f(angles), wide)[:, None] for f in (np.cos, np.sin))
        turned: list[Any] = [a * cos - sign * b * sin, sign * a * sin + b * cos]
        return jnp.stack(turned, axis=axis).reshape(x.shape).astype(x.dtype)
