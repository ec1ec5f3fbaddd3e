"""Sums of factored gradients, gradients written out, shares of sums, and none at all."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored.base import Factored, Method, kind
from jbackprop.factored.place import Place, stacked_place
from jbackprop.factored.sums import over_examples, present, wide_dtype


@kind("parts")
class Sum(Factored):
    """g_n = the sum of its parts: a parameter that was used several times, cross terms included.

    Attributes:
        parts: factored gradients of one parameter, of any kinds.
    """

    parts: tuple[Factored, ...]
    place: Place | None = None

    def with_deltas(self, f: Callable[[Array], Array]) -> Sum:
        return dataclasses.replace(self, parts=tuple(part.with_deltas(f) for part in self.parts))

    def at(self, place: Place) -> Sum:
        return Sum(tuple(part.at(place) for part in self.parts), place)

    def stacked(self) -> Sum:
        parts = tuple(part.stacked() for part in self.parts)
        depth = jax.tree.leaves(self.parts)[0].shape[0]
        return Sum(parts, stacked_place(self.place, depth))

    def total(self, weights: Array | None = None) -> Array:
        return _add(part.total(weights) for part in self.parts)

    def each(self) -> Array:
        return _add(part.each() for part in self.parts)

    def copies(self) -> Sum:
        place = self.home
        parts = tuple(part.copies() for part in self.parts)
        return Sum(parts, dataclasses.replace(place, stack=place.stack[1:]))

    @property
    def entries(self) -> int:
        return sum(part.entries for part in self.parts)

    def square_norm(self, method: Method = "auto") -> Array:
        """sum_jk <part_j, part_k>; a rounded sum is never reported below 0."""
        norms = _add(part.square_norm(method) for part in self.parts)
        pairs = list(itertools.combinations(self.parts, 2))
        cross = [2 * one.dot(other, method) for one, other in pairs]
        return jnp.maximum(_add([norms, *cross]), 0)

    def project(self, vector: Array) -> Array:
        return _add(part.project(vector) for part in self.parts)

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        theirs = other.parts if isinstance(other, Sum) else (other,)
        return _add(mine.dot(their, method) for mine in self.parts for their in theirs)

    def gram(self, other: Factored, method: Method = "auto") -> Array:
        theirs = other.parts if isinstance(other, Sum) else (other,)
        return _add(mine.gram(their, method) for mine in self.parts for their in theirs)


def _add(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


@kind("g", meta=("why",))
class Full(Factored):
    """g_n itself, (B, *shape): the fallback for a rule that fits no other kind.

    It costs a copy of the parameter for every example; `why` says why it is needed.
    """

    g: Array
    why: str
    place: Place | None = None
    deltas: ClassVar[tuple[str, ...]] = ("g",)

    def ranks(self, place: Place) -> dict[str, int]:
        return {"g": 1 + len(place.stack) + len(place.shape)}

    def stacked(self) -> Full:
        place = stacked_place(self.place, self.g.shape[0])
        return Full(jnp.moveaxis(self.g, 0, 1), self.why, place)

    def copies(self) -> Full:
        place = dataclasses.replace(self.home, stack=self.home.stack[1:])
        return Full(jnp.moveaxis(self.g, 1, 0), self.why, place)

    def total(self, weights: Array | None = None) -> Array:
        _ = self.home  # raises for what was kept under an outer vmap
        wide = wide_dtype(self.g.dtype)
        if weights is None:
            return jnp.sum(self.g, axis=0, dtype=wide)
        return over_examples(weights.astype(wide), present(weights, self.g).astype(wide))

    def each(self) -> Array:
        _ = self.home  # raises for what was kept under an outer vmap
        return self.g.astype(wide_dtype(self.g.dtype))


@kind("none")
class Nothing(Factored):
    """g_n = 0: a parameter that is frozen.

    Attributes:
        none: an array without entries that counts the examples, (B, 0).
    """

    none: Array
    place: Place | None = None
    deltas: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def like(cls, pair: Factored) -> Nothing:
        """Nothing in the place of a pair of a mini-batch."""
        b = jax.tree.leaves(pair)[0].shape[0]
        place = pair.home
        return cls(jnp.zeros((b, 0)), Place(place.shape, place.dtype, place.path))

    def stacked(self) -> Nothing:
        return Nothing(self.none[0], stacked_place(self.place, self.none.shape[0]))

    def copies(self) -> Nothing:
        place = dataclasses.replace(self.home, stack=self.home.stack[1:])
        return Nothing(jnp.zeros((self.home.stack[0], self.size, 0)), place)

    def square_norm(self, method: Method = "auto") -> Array:
        return jnp.zeros(self.size, wide_dtype(self.home.dtype))

    def project(self, vector: Array) -> Array:
        return jnp.zeros(self.size, wide_dtype(self.home.dtype))

    def second_moment(self, weights: Array | None = None) -> Array:
        return self.total()

    def moments(self, weights: Array | None = None) -> tuple[Array, Array]:
        return self.total(), self.total()

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        return self.square_norm()

    def gram(self, other: Factored, method: Method = "auto") -> Array:
        return jnp.zeros((self.size, other.size), wide_dtype(self.home.dtype))

    def total(self, weights: Array | None = None) -> Array:
        return jnp.zeros(self.home.stack + self.home.shape, wide_dtype(self.home.dtype))

    def each(self) -> Array:
        total = self.total()
        return jnp.zeros((self.size, *total.shape), total.dtype)


@kind("pair", meta=("why",))
class Coupled(Factored):
    """An example's share of the gradient of the summed costs: their sum has a meaning, it has none.

    So are the gradients of a network with a layer that couples the examples, such as a batch norm.
    `total()` is right; whatever is asked of single examples raises a ValueError.

    Attributes:
        pair: the shares.
        why: what is said to whoever asks.
    """

    pair: Factored
    why: str
    place: Place | None = None
    deltas: ClassVar[tuple[str, ...]] = ()

    def stacked(self) -> Coupled:
        depth = jax.tree.leaves(self.pair)[0].shape[0]
        return Coupled(self.pair.stacked(), self.why, stacked_place(self.place, depth))

    def total(self, weights: Array | None = None) -> Array:
        if weights is not None:
            raise ValueError(self.why)
        return self.pair.total()

    def each(self) -> Array:
        raise ValueError(self.why)
