"""What is added to, or multiplied with, every position: biases and scales."""

from __future__ import annotations

import abc

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored.base import Factored, Method, depth_into_groups, fits, kind
from jbackprop.factored.place import Place, Step, somewhere, stacked_place
from jbackprop.factored.sums import einsum, present, weighted, wide_dtype


class _Summed(Factored):
    """g_n = sum_t s_nt, of summands (B, G, T, o) that a subclass makes."""

    delta: Array

    def ranks(self, place: Place) -> dict[str, int]:
        return {"delta": 4}

    @abc.abstractmethod
    def _summands(self, weights: Array | None = None) -> Array:
        """s_nt, times weights_n: (B, G, T, o)."""

    def check_fits(self, place: Place) -> None:
        fits(self, place, self.delta.shape[1], self.delta.shape[3:])

    def total(self, weights: Array | None = None) -> Array:
        s = self._summands(weights)
        if s.shape[1] == 1:  # as in Outer: XLA recognises the delta that it has already
            s = s.reshape(s.shape[0] * s.shape[2], s.shape[3])
            return self.home.restore(jnp.sum(s, axis=0, dtype=wide_dtype(s.dtype)))
        return self.home.restore(jnp.sum(s, axis=(0, 2), dtype=wide_dtype(s.dtype)))

    def each(self) -> Array:
        return jax.vmap(self.home.restore)(self._sum())

    def square_norm(self, method: Method = "auto") -> Array:
        return jnp.sum(jnp.square(self._sum()), axis=(1, 2))

    def project(self, vector: Array) -> Array:
        s = self._sum()
        w = self.home.canonical(vector, s.shape[2:]).astype(s.dtype)
        return einsum("ngo,go->n", s, w)

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        if not (isinstance(other, _Summed) and self.same_form(other)):
            return super().dot(other, method)
        return jnp.sum(self._sum() * other._sum(), axis=(1, 2))

    def _sum(self) -> Array:
        _ = self.home  # raises for what was kept under an outer vmap
        s = self._summands()
        n, g, t, o = s.shape  # as three axes: on CPUs XLA sums along one of four 17 times slower
        return jnp.sum(s.reshape(n * g, t, o), axis=1, dtype=wide_dtype(s.dtype)).reshape(n, g, o)


@kind("delta")
class Shift(_Summed):
    """g_n = sum_t delta_nt: a bias, added at every position.

    Attributes:
        delta: the delta of what the bias was added to, (B, G, T, o).
    """

    delta: Array
    place: Place | None = None

    @classmethod
    def of(cls, delta: Array, steps: tuple[Step, ...] = ()) -> Shift:
        """One example's delta (..., o): one group, leading axes are positions."""
        return cls(delta.reshape(1, -1, delta.shape[-1]), somewhere(steps))

    def stacked(self) -> Shift:
        place = stacked_place(self.place, self.delta.shape[0])
        return Shift(depth_into_groups(self.delta), place)

    def _summands(self, weights: Array | None = None) -> Array:
        return self.delta if weights is None else weighted(weights, self.delta)


@kind("h", "delta")
class Scale(_Summed):
    """g_n = sum_t h_nt * delta_nt: a gain, multiplied with every position.

    Attributes:
        h: what the gain was multiplied with, (B, G, T, o).
        delta: the delta of the product, (B, G, T, o).
    """

    h: Array
    delta: Array
    place: Place | None = None

    @classmethod
    def of(cls, h: Array, delta: Array, steps: tuple[Step, ...] = ()) -> Scale:
        """One example's h and delta (..., o): one group, leading axes are positions."""
        o = delta.shape[-1]
        return cls(h.reshape(1, -1, o), delta.reshape(1, -1, o), somewhere(steps))

    def stacked(self) -> Scale:
        place = stacked_place(self.place, self.h.shape[0])
        return Scale(depth_into_groups(self.h), depth_into_groups(self.delta), place)

    def _summands(self, weights: Array | None = None) -> Array:
        delta = self.delta if weights is None else weighted(weights, self.delta)
        dtype = wide_dtype(jnp.result_type(self.h, delta))  # products are not rounded to 16 bits
        h = self.h if weights is None else present(weights, self.h)
        return h.astype(dtype) * delta.astype(dtype)
