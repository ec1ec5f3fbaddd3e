"""The pair of a matrix: activation times delta."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored.base import (
    AT_ONCE,
    Factored,
    Method,
    depth_into_groups,
    fits,
    in_blocks,
    kind,
)
from jbackprop.factored.place import Place, Step, somewhere, stacked_place
from jbackprop.factored.sums import einsum, in_shares, present, weighted, wide_dtype, wide_square


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
        if math.prod(a.shape[:-1]) != math.prod(delta.shape[:-1]):
            raise ValueError(
                f"Outer: a and delta must have as many positions each, not {a.shape} and "
                f"{delta.shape}"
            )
        return cls(
            a.reshape(1, -1, a.shape[-1]), delta.reshape(1, -1, delta.shape[-1]), somewhere(steps)
        )

    def ranks(self, place: Place) -> dict[str, int]:
        return {"a": 4, "delta": 4}

    def check_fits(self, place: Place) -> None:
        fits(self, place, self.a.shape[1], (self.a.shape[3], self.delta.shape[3]))

    def _centred(self) -> tuple[Array, Array]:
        """The activations, `centred`; those of positions without a delta have no part in it."""
        there = jnp.any(self.delta != 0, axis=3, keepdims=True) | ~jnp.isfinite(self.a)
        return centred(jnp.where(there, self.a, jnp.zeros((), self.a.dtype)))

    def _written_out(self) -> Array:
        """|g_n|^2 from the gradients; of wide layers for some outputs at a time."""
        (n, g, _, i), o = self.a.shape, self.delta.shape[3]
        width = max(1, min(o, AT_ONCE // max(g * i, 1)))
        chunks = -(-o // width)

        def squares(delta: Array) -> Array:
            def some(pair: tuple[Array, Array]) -> Array:
                return jnp.sum(jnp.square(einsum("ngti,ngto->ngio", *pair)), axis=(1, 2, 3))

            return in_blocks(some, (self.a, delta), n, g * i * width)

        if chunks <= 1:
            return squares(self.delta)
        delta = jnp.pad(self.delta, ((0, 0), (0, 0), (0, 0), (0, chunks * width - o)))
        delta = jnp.moveaxis(delta.reshape(*delta.shape[:3], chunks, width), 3, 0)
        return jnp.sum(lax.map(squares, delta), axis=0)

    def _by_gram(self, entries: int) -> Array:
        """|g_n|^2 from Gram matrices over the positions, as carefully as it takes.

        Where positions cancel, the entries of the Gram matrices are much larger than their sum,
        which then may be hardly more than their rounding. Mostly it is the mean that cancels, and
        it can be taken out before; what is left of the rest is written out. (What holds NaN is
        left so.)
        """
        products, size = in_blocks(_products, self, self.size, entries)
        typical = size / (16 * self.a.shape[2])  # 1/T of it where positions have nothing in common

        def carefully() -> Array:
            products = in_blocks(lambda p: _inner(p, p), self, self.size, entries)
            least = 1024 * jnp.finfo(products.dtype).eps * size
            return _unless(products >= least, products, size, self._written_out)

        return _unless(products >= typical, products, size, carefully)

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
            rows = a.shape[0] * a.shape[2]
            a, delta = (v.reshape(rows, v.shape[3]).astype(dtype) for v in (a, delta))
            return self.home.restore(
                lax.dot_general(a, delta, over_n, preferred_element_type=wide_dtype(dtype))
            )
        return self.home.restore(einsum("ngti,ngto->gio", a, delta))

    def each(self) -> Array:
        return jax.vmap(self.home.restore)(einsum("ngti,ngto->ngio", self.a, self.delta))

    def square_norm(self, method: Method = "auto") -> Array:
        return self.dot(self, method)

    def project(self, vector: Array) -> Array:
        w = self.home.canonical(vector, (self.a.shape[3], self.delta.shape[3]))
        dtype = wide_dtype(jnp.result_type(self.a, self.delta))
        if self.a.shape[1] == 1:
            z = jnp.einsum("ngti,io->ngto", self.a.astype(dtype), w[0].astype(dtype))
        else:
            z = jnp.einsum("ngti,gio->ngto", self.a.astype(dtype), w.astype(dtype))
        return jnp.sum(z * self.delta.astype(dtype), axis=(1, 2, 3))

    def second_moment(self, weights: Array | None = None) -> Array:
        if self.a.shape[2] != 1:
            return super().second_moment(weights)
        home, a, delta = self.home, wide_square(self.a), wide_square(self.delta)
        if weights is not None:
            a, delta = present(weights, a), weighted(weights, delta)
        if a.shape[1] == 1:
            return home.restore(jnp.einsum("ni,no->io", a[:, 0, 0], delta[:, 0, 0]))
        return home.restore(jnp.einsum("ngi,ngo->gio", a[:, :, 0], delta[:, :, 0]))

    def moments(self, weights: Array | None = None) -> tuple[Array, Array]:
        if self.a.shape[2] != 1:
            return super().moments(weights)
        (n, g, _, i), o = self.a.shape, self.delta.shape[3]
        dtype = wide_dtype(jnp.result_type(self.a, self.delta))
        shares = in_shares(weights, n, dtype)[1]
        a, delta = (
            jnp.moveaxis(present(shares, v[:, :, 0].astype(dtype)), 1, 0)
            for v in (self.a, self.delta)
        )
        # Some rows at a time, (blocks * G, n, rows), so that what is found of them stays in the
        # cache until the one is subtracted from the other.
        blocks = max(1, -(-i * o // _IN_CACHE))
        rows = -(-i // blocks)
        a = jnp.pad(a, ((0, 0), (0, 0), (0, rows * blocks - i)))
        a = a.reshape(g, n, blocks, rows).transpose(0, 2, 1, 3).reshape(g * blocks, n, rows)

        def some(block: tuple[Array, Array]) -> tuple[Array, Array]:
            a, at = block
            return _moments(a, lax.dynamic_index_in_dim(delta, at, keepdims=False), shares)

        found = lax.map(some, (a, jnp.arange(g * blocks) // blocks))
        mean, variance = (v.reshape(g, blocks * rows, o)[:, :i] for v in found)
        return self.home.restore(mean), self.home.restore(variance)

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        if not (isinstance(other, Outer) and self.same_form(other)):
            return super().dot(other, method)
        t, s, i, o = self.a.shape[2], other.a.shape[2], self.a.shape[3], self.delta.shape[3]
        if method == "materialise" or (
            method == "auto" and t * s * (i + o) > (t + s) * i * o and not t == s == 1
        ):
            return self._written_out() if other is self else super().dot(other)
        if 0 in (t, s):
            return jnp.zeros(self.size, wide_dtype(jnp.result_type(self.a, self.delta)))
        entries = 0 if t == s == 1 else 2 * self.a.shape[1] * t * s
        if other is self and t > 1:
            return self._by_gram(entries)
        return in_blocks(lambda pairs: _inner(*pairs), (self, other), self.size, entries)

    def gram(self, other: Factored, method: Method = "auto") -> Array:
        if not (isinstance(other, Outer) and self.same_form(other)):
            return super().gram(other, method)
        (n, g, t, i), (m, _, s, o) = self.a.shape, (*other.a.shape[:3], self.delta.shape[3])
        if method == "materialise" or (
            method == "auto" and t * s * (i + o) > i * o and not t == s == 1
        ):
            return super().gram(other)
        if 0 in (t, s):
            return jnp.zeros((n, m), wide_dtype(jnp.result_type(self.a, self.delta)))
        return in_blocks(lambda p: _inner(p, other, "m"), self, n, 2 * m * g * t * s)


_LOST = 1024.0
"""How much smaller than the mean's square a variance may be that is found as a difference."""
_IN_CACHE = 1 << 18
"""Numbers that a cache holds some arrays of."""


def _moments(a: Array, delta: Array, shares: Array) -> tuple[Array, Array]:
    """The mean and the variance of a_n (outer) delta_n, of a (n, i) and delta (n, o).

    A matmul for each moment, and the mean's square less: exact to a few digits unless that is
    nearly all of the second. Then example by example.
    """
    own = shares[:, None]
    mean = a.T @ (own * delta)
    variance = jnp.square(a).T @ (own * jnp.square(delta)) - jnp.square(mean)

    def one_by_one() -> Array:
        def add(so_far: Array, n: tuple[Array, Array, Array]) -> tuple[Array, None]:
            a, delta, share = n
            return so_far + share * jnp.square(jnp.outer(a, delta) - mean), None

        return lax.scan(add, jnp.zeros_like(mean), (a, delta, shares))[0]

    sound = jnp.all(jnp.square(mean) <= _LOST * variance)
    return mean, lax.cond(sound, lambda: variance, one_by_one)


def _unless(good: Array, products: Array, size: Array, f: Callable[[], Array]) -> Array:
    """The products (B,), by f for the examples where they are not good; `size` tells NaN."""
    bad = ~good & ~jnp.isnan(size)
    return lax.cond(jnp.any(bad), lambda: jnp.where(bad, f(), products), lambda: products)


def _products(pair: Outer) -> tuple[Array, Array]:
    """|g_n|^2 from Gram matrices, and (sum_t |a_t| |delta_t|)^2, which no sum of theirs exceeds."""
    a, delta = (einsum("ngtf,ngsf->ngts", v, v) for v in (pair.a, pair.delta))
    own_a, own_delta = (jnp.sqrt(jnp.diagonal(v, axis1=2, axis2=3)) for v in (a, delta))
    size = jnp.sum(jnp.square(jnp.sum(own_a * own_delta, axis=2)), axis=1)
    return jnp.sum(a * delta, axis=(1, 2, 3)), size


def _inner(one: Outer, other: Outer, m: str = "n") -> Array:
    """<g_n, h_m> from Gram matrices over the positions; n = m for the products of each example."""
    t, s = one.a.shape[2], other.a.shape[2]
    nm = "n" if m == "n" else "nm"

    def of(x: Array, y: Array) -> Array:
        return einsum(f"ngtf,{m}gsf->{nm}gts", x, y)

    if t == s == 1:  # <a (outer) delta, a' (outer) delta'> = (a . a')(delta . delta')
        return jnp.sum(of(one.a, other.a) * of(one.delta, other.delta), axis=(-3, -2, -1))
    # g = sum_t a'_t (outer) delta'_t + T mean(a) (outer) mean(delta), primes without the mean:
    # what positions have in common would cancel between the entries of the Gram matrices.
    (a, am), (d, dm) = one._centred(), centred(one.delta)
    (b, bm), (e, em) = (a, am) if other is one else other._centred(), centred(other.delta)
    product = jnp.sum(of(a, b) * of(d, e), axis=(-3, -2, -1))
    means = of(am, bm) * of(dm, em)
    left = jnp.sum(of(a, bm) * of(d, em), axis=-2, keepdims=True)
    right = jnp.sum(of(am, b) * of(dm, e), axis=-1, keepdims=True)
    return product + jnp.sum(t * s * means + s * left + t * right, axis=(-3, -2, -1))


def centred(v: Array) -> tuple[Array, Array]:
    """v (B, G, T, feature) less its mean over the positions, and the mean; float32 at least."""
    v = v.astype(wide_dtype(v.dtype))
    mean = jnp.mean(v, axis=2, keepdims=True)
    return v - mean, mean
