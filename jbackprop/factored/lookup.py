"""Rows that were looked up in a table."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored.base import Factored, Method, depth_into_groups, fits, in_blocks, kind
from jbackprop.factored.outer import Outer
from jbackprop.factored.place import Place, Step, somewhere, stacked_place
from jbackprop.factored.sums import einsum, weighted, wide_dtype


@kind("ids", "delta", meta=("rows",))
class Lookup(Factored):
    """g_n = sum_t e_{id_nt} (outer) delta_nt: an embedding, whose row id_nt was read at t.

    Only the rows that were read have a gradient. Ids out of range, also negative ones, drop out.

    Attributes:
        ids: the rows that were read, (B, G, T), integers.
        delta: the delta of what was read, (B, G, T, o).
        rows: the number of rows of the table.
    """

    ids: Array
    delta: Array
    rows: int
    place: Place | None = None

    @classmethod
    def of(cls, ids: Array, delta: Array, rows: int, steps: tuple[Step, ...] = ()) -> Lookup:
        """One example's ids (...) and delta (..., o): one group, all axes of ids are positions."""
        o = delta.shape[-1]
        return cls(ids.reshape(1, -1), delta.reshape(1, -1, o), rows, somewhere(steps))

    def ranks(self, place: Place) -> dict[str, int]:
        return {"ids": 3, "delta": 4}

    def check_fits(self, place: Place) -> None:
        fits(self, place, self.delta.shape[1], (self.rows, self.delta.shape[3]))

    def stacked(self) -> Lookup:
        place = stacked_place(self.place, self.ids.shape[0])
        ids = depth_into_groups(self.ids)
        return Lookup(ids, depth_into_groups(self.delta), self.rows, place)

    def total(self, weights: Array | None = None) -> Array:
        delta = self.delta if weights is None else weighted(weights, self.delta)
        return self.home.restore(_over_examples(self._where(self.ids), delta, self.rows))

    def each(self) -> Array:
        tables = jax.vmap(lambda ids, delta: _scattered(ids, delta, self.rows))
        return jax.vmap(self.home.restore)(tables(self._where(self.ids), self.delta))

    def square_norm(self, method: Method = "auto") -> Array:
        return jnp.sum(jnp.square(self._merged()[1]), axis=(1, 2, 3))

    def project(self, vector: Array) -> Array:
        dtype = wide_dtype(self.delta.dtype)
        w = self.home.canonical(vector, (self.rows, self.delta.shape[3])).astype(dtype)
        return self._along(w[None], self.ids, self.delta.astype(dtype))[:, 0]

    def second_moment(self, weights: Array | None = None) -> Array:
        ids, delta = self._merged()
        squares = jnp.square(delta)
        squares = squares if weights is None else weighted(weights, squares)
        return self.home.restore(_over_examples(ids, squares, self.rows))

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        if self._turns(other):
            return self._dot_outer(other)  # type: ignore[arg-type]
        if not (isinstance(other, Lookup) and self.same_form(other)):
            return super().dot(other, method)
        mine, theirs = self._merged(), other._merged()
        same = mine[0][:, :, :, None] == theirs[0][:, :, None, :]
        products = jnp.einsum("ngto,ngso->ngts", mine[1], theirs[1])
        return jnp.sum(jnp.where(same, products, 0), axis=(1, 2, 3))

    def gram(self, other: Factored, method: Method = "auto") -> Array:
        if not (isinstance(other, Lookup) and self.same_form(other)):
            return super().gram(other, method)
        delta = other.delta.astype(wide_dtype(other.delta.dtype))

        def rows(mine: Lookup) -> Array:
            tables = jax.vmap(lambda ids, delta: _scattered(ids, delta, mine.rows))
            written = tables(mine._where(mine.ids), mine.delta)
            return self._along(written, other.ids, delta).T

        entries = self.entries + other.size * math.prod(self.delta.shape[1:])
        return in_blocks(rows, self, self.size, entries)

    def _along(self, tables: Array, ids: Array, delta: Array) -> Array:
        """sum_t tables_n[id_mt] . delta_mt, (m, n): tables (n, G, rows, o), ids (m, G, T)."""
        ids = self._where(ids)

        def one(ids: Array, delta: Array) -> Array:
            group = jnp.arange(ids.shape[0])[:, None]
            read = tables.at[:, group, ids].get(mode="fill", fill_value=0)
            return einsum("ngto,gto->n", read, delta)

        return jax.vmap(one)(ids, delta)

    def _turns(self, other: Factored) -> bool:
        """Whether `other` is the pair of the same table, turned: that of a tied head."""
        if not isinstance(other, Outer) or self.home.steps:
            return False
        return (
            other.home.steps == (("transpose", (1, 0)),)
            and self.delta.shape[1] == (other.delta.shape[1])
        )

    def _dot_outer(self, other: Outer) -> Array:
        """sum_ts (delta_t . h_s) d_s[id_t], where `other` is sum_s h_s (outer) d_s, turned."""
        ids = self._where(self.ids)
        dtype = wide_dtype(jnp.result_type(self.delta, other.delta))
        products = einsum("ngsi,ngti->ngst", other.a.astype(dtype), self.delta.astype(dtype))
        inside = ids < self.rows
        at = jnp.where(inside, ids, 0)[:, :, None]  # d_s[id_t]: (B, G, S, T)
        read = jnp.take_along_axis(other.delta, at, axis=3).astype(dtype)
        return jnp.sum(jnp.where(inside[:, :, None], products * read, 0), axis=(1, 2, 3))

    def _where(self, ids: Array) -> Array:
        """The rows, and `rows` for what is out of range."""
        ids = ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids  # int8 cannot hold `rows`
        return jnp.where((ids >= 0) & (ids < self.rows), ids, self.rows)

    def _merged(self) -> tuple[Array, Array]:
        """Every row once: ids (B, G, T), `rows` where nothing is left, and the sums of deltas."""
        _ = self.home  # raises for what was kept under an outer vmap

        def merge(ids: Array, delta: Array) -> tuple[Array, Array]:
            order = jnp.argsort(ids)
            ids, delta = ids[order], delta[order].astype(wide_dtype(delta.dtype))
            first = jnp.concatenate([jnp.ones(1, bool), ids[1:] != ids[:-1]])[: len(ids)]
            slot = jnp.cumsum(first) - 1
            delta = jnp.where((ids < self.rows)[:, None], delta, 0)
            merged = jnp.full_like(ids, self.rows).at[slot].set(ids)
            return merged, jax.ops.segment_sum(delta, slot, len(ids), indices_are_sorted=True)

        return jax.vmap(jax.vmap(merge))(self._where(self.ids), self.delta)


def _scattered(ids: Array, delta: Array, rows: int) -> Array:
    """The table (G, rows, o) of sums of delta (G, T, o) by ids (G, T)."""
    groups, _, o = delta.shape
    table = jnp.zeros((groups, rows, o), wide_dtype(delta.dtype))
    group = jnp.broadcast_to(jnp.arange(groups)[:, None], ids.shape)
    return table.at[group, ids].add(delta.astype(table.dtype), mode="drop")


def _over_examples(ids: Array, delta: Array, rows: int) -> Array:
    """The same with the examples (B, ...) among the positions."""
    ids, delta = jnp.moveaxis(ids, 0, 1), jnp.moveaxis(delta, 0, 1)
    groups, o = ids.shape[0], delta.shape[-1]
    return _scattered(ids.reshape(groups, -1), delta.reshape(groups, -1, o), rows)
