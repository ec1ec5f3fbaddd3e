"""The pair of a matrix: activation times delta."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored.base import (
    Factored,
    Place,
    Step,
    depth_into_groups,
    einsum,
    fits,
    kind,
    present,
    somewhere,
    stacked_place,
    weighted,
    wide_dtype,
    wide_square,
)


@kind("a", "delta")
class Outer(Factored):
    """g_n = sum_t a_nt (outer) delta_nt: the weights of anything that multiplies by a matrix.

    Attributes:
        a: what the weights were multiplied with, (B, G, T, i).
        delta: the delta of what came out, (B, G, T, o).
    """

    a: Array
    delta: Array
    place: Place | None = None

    @classmethod
    def of(cls, a: Array, delta: Array, steps: tuple[Step, ...] = ()) -> Outer:
        """One example's pair from a (..., i) and delta (..., o): one group, leading axes are T."""
        return cls(
            a.reshape(1, -1, a.shape[-1]), delta.reshape(1, -1, delta.shape[-1]), somewhere(steps)
        )

    def ranks(self, place: Place) -> dict[str, int]:
        return {"a": 4, "delta": 4}

    def check_fits(self, place: Place) -> None:
        fits(self, place, self.a.shape[1], (self.a.shape[3], self.delta.shape[3]))

    def stacked(self) -> Outer:
        place = stacked_place(self.place, self.a.shape[0])
        return Outer(depth_into_groups(self.a), depth_into_groups(self.delta), place)

    def total(self, weights: Array | None = None) -> Array:
        a, delta = self.a, self.delta
        if weights is not None:
            delta = weighted(weights, delta)
            a = present(weights, a).astype(delta.dtype)
        if a.shape[1] == 1:  # one two-dimensional matmul: a 'ngt' contraction is slower
            dtype, over_n = jnp.result_type(a, delta), (((0,), (0,)), ((), ()))
            a, delta = (v.reshape(-1, v.shape[3]).astype(dtype) for v in (a, delta))
            return self.home.restore(
                lax.dot_general(a, delta, over_n, preferred_element_type=wide_dtype(dtype))
            )
        return self.home.restore(einsum("ngti,ngto->gio", a, delta))

    def each(self) -> Array:
        return jax.vmap(self.home.restore)(einsum("ngti,ngto->ngio", self.a, self.delta))

    def square_norm(self) -> Array:
        return self.dot(self)

    def second_moment(self) -> Array:
        if self.a.shape[2] != 1:
            return super().second_moment()
        home = self.home
        squares = einsum("ngi,ngo->gio", *(wide_square(x[:, :, 0]) for x in (self.a, self.delta)))
        return home.restore(squares)

    def dot(self, other: Factored) -> Array:
        if not (isinstance(other, Outer) and self._same_form(other)):
            return super().dot(other)
        t, s, i, o = self.a.shape[2], other.a.shape[2], self.a.shape[3], self.delta.shape[3]
        if t == s == 1:  # <a (outer) delta, a' (outer) delta'> = (a . a')(delta . delta')
            alpha = einsum("ngti,ngti->ng", self.a, other.a)
            return jnp.sum(alpha * einsum("ngto,ngto->ng", self.delta, other.delta), axis=1)
        if t * s * (i + o) > (t + s) * i * o:  # then to write the gradients out is cheaper
            return super().dot(other)
        # g = sum_t a'_t (outer) delta'_t + T mean(a) (outer) mean(delta), primes without the mean:
        # what positions have in common would cancel between the entries of the Gram matrices.
        (a, m), (d, e) = centred(self.a), centred(self.delta)
        (b, n), (f, h) = centred(other.a), centred(other.delta)
        alpha, beta = einsum("ngti,ngsi->ngts", a, b), einsum("ngto,ngso->ngts", d, f)
        product = jnp.sum(alpha * beta, axis=(1, 2, 3))
        means = einsum("ngti,ngti->ng", m, n) * einsum("ngto,ngto->ng", e, h)
        one = einsum("ngti,ngsi->ngts", a, n) * einsum("ngto,ngso->ngts", d, h)
        two = einsum("ngti,ngsi->ngts", m, b) * einsum("ngto,ngso->ngts", e, f)
        product += jnp.sum(t * s * means, axis=1)
        product += s * jnp.sum(one, axis=(1, 2, 3)) + t * jnp.sum(two, axis=(1, 2, 3))
        return jnp.maximum(product, 0) if other is self else product

    def gram(self, other: Factored) -> Array:
        alone = isinstance(other, Outer) and self.a.shape[2] == other.a.shape[2] == 1
        if not (isinstance(other, Outer) and alone and self._same_form(other)):
            return super().gram(other)
        alpha = einsum("ngti,mgti->nmg", self.a, other.a)
        return jnp.sum(alpha * einsum("ngto,mgto->nmg", self.delta, other.delta), axis=2)


def centred(v: Array) -> tuple[Array, Array]:
    """v (B, G, T, feature) less its mean over the positions, and the mean; float32 at least."""
    v = v.astype(wide_dtype(v.dtype))
    mean = jnp.mean(v, axis=2, keepdims=True)
    return v - mean, mean
