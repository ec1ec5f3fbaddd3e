"""Factored gradients: what the gradient of a weight is made of.

The backward sweep does not yield gradients. For every parameter it yields a *factored gradient*,
usually the pair (activation, delta), and everything that anyone wants to know about the gradient
is a contraction of it. The arrays of a kind have the canonical axes

    (B, G, T, feature)      n example, g group, t position, then i (input) or o (output)

where the groups have weights of their own (scanned copies, heads) and the positions of one example
share them (tokens, time steps, pixels). A rule for one example writes (G, T, feature), usually
through `of`; `jax.vmap` adds B.

Kinds know no layer and no loss. Each of them answers the same questions, always about the
gradients g_n of the single examples' *unscaled* costs, and always in float32 at least:

    total(weights)     sum_n weights_n g_n              the parameter's shape
    each()             g_n                              (B, *the parameter's shape)
    square_norm()      |g_n|^2                          (B,)
    second_moment()    sum_n g_n * g_n                  the parameter's shape
    dot(other)         <g_n, h_n>                       (B,)
    gram(other)        <g_n, h_m>                       (B, B')
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array, lax

PyTree = Any
Step = tuple[Any, ...]
"""One step of a `Place`: ("transpose", axes), ("reshape", shape) or ("slice", starts, stops)."""

_STEPS: dict[str, Callable[..., Array]] = {
    "transpose": jnp.transpose,
    "reshape": jnp.reshape,
    "slice": lax.slice,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a factored gradient belongs: a parameter, and the way from it to the canonical form.

    Attributes:
        shape: the shape of one copy of the parameter.
        dtype: the parameter's dtype.
        path: the parameter's name in the network, such as ``layers[2].w``; empty while unknown.
        steps: transposes, reshapes and slices that lead from one copy of the parameter to the
            array (G, feature...) whose gradient the kind holds. None at all: a reshape.
        stack: the leading axes along which copies of the parameter are stacked.
    """

    shape: tuple[int, ...]
    dtype: Any
    path: str = ""
    steps: tuple[Step, ...] = ()
    stack: tuple[int, ...] = ()

    def restore(self, canonical: Array) -> Array:
        """Take (stack * G, feature...) back to the parameter's shape.

        The way there is linear and only moves entries, so that the way back is its transpose; a
        part that a slice leaves out is zero.
        """
        if not self.steps and canonical.shape == self.stack + self.shape:
            return canonical
        if not self.steps:
            return canonical.reshape(self.stack + self.shape)

        def there(parameter: Array) -> Array:
            for name, *arguments in self.steps:
                parameter = _STEPS[name](parameter, *arguments)
            return parameter

        parameter = jax.ShapeDtypeStruct(self.shape, canonical.dtype)
        shape = jax.eval_shape(there, parameter).shape
        copies = math.prod(self.stack)
        back = jax.linear_transpose(there, parameter)
        one = jax.vmap(lambda g: back(g.reshape(shape))[0])
        return one(canonical.reshape(copies, -1)).reshape(self.stack + self.shape)


def wide_dtype(dtype: Any) -> Any:
    """The dtype that sums and costs are kept in: float32 at least."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


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


def _einsum(spec: str, *operands: Array) -> Array:
    wide = wide_dtype(jnp.result_type(*operands))
    return jnp.einsum(spec, *operands, preferred_element_type=wide)


def _wide_square(x: Array) -> Array:
    return jnp.square(x.astype(wide_dtype(x.dtype)))


class Factored(abc.ABC):
    """The gradient of one parameter, example by example, in factored form."""

    place: Place | None

    @property
    def home(self) -> Place:
        """The place; a kind made by hand has none, and cannot answer in the parameter's shape."""
        if self.place is None:
            raise ValueError(
                f"this {type(self).__name__} has no place yet: the sweep gives it one. By hand, "
                "use dataclasses.replace(pair, place=Place(shape, dtype))"
            )
        for array in jax.tree.leaves(self) if isinstance(self, Outer | Shift) else ():
            if array.ndim != 4:
                raise ValueError(
                    f"this {type(self).__name__} holds an array of shape {array.shape}, not (B, G, "
                    "T, feature): was it kept under an outer vmap? Ask it inside that vmap"
                )
        return self.place

    @abc.abstractmethod
    def total(self, weights: Array | None = None) -> Array:
        """sum_n weights_n g_n; weights (B,) default to ones. A weight of 0: not there at all."""

    @abc.abstractmethod
    def each(self) -> Array:
        """The gradient of every example, (B, *shape)."""

    @abc.abstractmethod
    def stacked(self) -> Factored:
        """The same, where a scan has put a depth axis in front of B: depth moves into G."""

    def square_norm(self) -> Array:
        """|g_n|^2 of every example, (B,)."""
        return jnp.sum(jnp.square(_flat(self)), axis=1)

    def second_moment(self) -> Array:
        """sum_n g_n * g_n, entry by entry, in the parameter's shape; not divided by anything."""
        return jnp.sum(jnp.square(self.each()), axis=0)

    def dot(self, other: Factored) -> Array:
        """The inner product of every example's gradient with its gradient in `other`, (B,)."""
        return jnp.sum(_flat(self) * _flat(other), axis=1)

    def gram(self, other: Factored) -> Array:
        """The inner product of each example here with each example of `other`, (B, B')."""
        return _einsum("np,mp->nm", _flat(self), _flat(other))

    def _same_form(self, other: Factored) -> bool:
        """Whether inner products of the canonical forms are those of the gradients."""
        mine = dataclasses.replace(self.home, path="")
        return type(other) is type(self) and mine == dataclasses.replace(other.home, path="")


def _flat(pair: Factored) -> Array:
    each = pair.each()
    return each.reshape(each.shape[0], math.prod(each.shape[1:]))


def is_factored(node: object) -> bool:
    """Whether `node` is a factored gradient: the `is_leaf` of trees of them."""
    return isinstance(node, Factored)


def place_in(factored: PyTree, params: PyTree) -> PyTree:
    """Give every factored gradient the shape and dtype of its parameter as its place."""

    def put(w: Any, pair: Factored) -> Factored:
        if not isinstance(pair, Factored):
            raise TypeError(
                f"backward must give a factored gradient (Outer, Shift, Full, ...) for each "
                f"parameter, not {type(pair).__name__}"
            )
        steps = pair.place.steps if pair.place else ()
        _check_fits(pair, steps, tuple(jnp.shape(w)))
        place = Place(tuple(jnp.shape(w)), jnp.result_type(w), steps=steps)
        inner = {"parts": tuple(put(w, p) for p in pair.parts)} if isinstance(pair, Sum) else {}
        return dataclasses.replace(pair, place=place, **inner)  # type: ignore[type-var]

    return jax.tree.map(put, params, factored)


def _check_fits(pair: Factored, steps: tuple[Step, ...], shape: tuple[int, ...]) -> None:
    """Raise where entries would be put back in another order than they came."""
    if steps or not isinstance(pair, Outer | Shift):
        return
    operands = (pair.a, pair.delta) if isinstance(pair, Outer) else (pair.delta,)
    features = tuple(operand.shape[-1] for operand in operands)
    if math.prod(shape) != pair.delta.shape[1] * math.prod(features) or (
        len(shape) >= len(features) and shape[-len(features) :] != features
    ):
        raise ValueError(
            f"{type(pair).__name__} with features {features} does not fit a parameter of shape "
            f"{shape}: are its operands swapped? Steps lead from a parameter to another form"
        )


@dataclass_transform(frozen_default=True)
def _kind(*data: str, meta: tuple[str, ...] = ()) -> Callable[[type[_K]], type[_K]]:
    """Make a class a frozen dataclass and a pytree: arrays and parts are data, the rest static."""

    def decorate(cls: type[_K]) -> type[_K]:
        frozen = dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_dataclass(frozen, list(data), [*meta, "place"])
        return frozen

    return decorate


_K = TypeVar("_K")


def _somewhere(steps: tuple[Step, ...]) -> Place | None:
    """A place of which only the steps are known as yet."""
    return Place((), None, steps=steps) if steps else None


def _depth_into_groups(x: Array) -> Array:
    """(depth, B, G, ...) -> (B, depth * G, ...)."""
    moved = jnp.moveaxis(x, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])


def _stacked_place(place: Place | None, depth: int) -> Place | None:
    return place and dataclasses.replace(place, stack=(depth, *place.stack))


@_kind("a", "delta")
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
            a.reshape(1, -1, a.shape[-1]), delta.reshape(1, -1, delta.shape[-1]), _somewhere(steps)
        )

    def stacked(self) -> Outer:
        place = _stacked_place(self.place, self.a.shape[0])
        return Outer(_depth_into_groups(self.a), _depth_into_groups(self.delta), place)

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
        return self.home.restore(_einsum("ngti,ngto->gio", a, delta))

    def each(self) -> Array:
        return jax.vmap(self.home.restore)(_einsum("ngti,ngto->ngio", self.a, self.delta))

    def square_norm(self) -> Array:
        return self.dot(self)

    def second_moment(self) -> Array:
        if self.a.shape[2] != 1:
            return super().second_moment()
        squares = _einsum("ngi,ngo->gio", *(_wide_square(x[:, :, 0]) for x in (self.a, self.delta)))
        return self.home.restore(squares)

    def dot(self, other: Factored) -> Array:
        if not (isinstance(other, Outer) and self._same_form(other)):
            return super().dot(other)
        t, s, i, o = self.a.shape[2], other.a.shape[2], self.a.shape[3], self.delta.shape[3]
        if t == s == 1:  # <a (outer) delta, a' (outer) delta'> = (a . a')(delta . delta')
            alpha = _einsum("ngti,ngti->ng", self.a, other.a)
            return jnp.sum(alpha * _einsum("ngto,ngto->ng", self.delta, other.delta), axis=1)
        if t * s * (i + o) > (t + s) * i * o:  # then to write the gradients out is cheaper
            return super().dot(other)
        alpha = _einsum("ngti,ngsi->ngts", self.a, other.a)
        beta = _einsum("ngto,ngso->ngts", self.delta, other.delta)
        product = jnp.sum(alpha * beta, axis=(1, 2, 3))
        return jnp.maximum(product, 0) if other is self else product

    def gram(self, other: Factored) -> Array:
        alone = isinstance(other, Outer) and self.a.shape[2] == other.a.shape[2] == 1
        if not (isinstance(other, Outer) and alone and self._same_form(other)):
            return super().gram(other)
        alpha = _einsum("ngti,mgti->nmg", self.a, other.a)
        return jnp.sum(alpha * _einsum("ngto,mgto->nmg", self.delta, other.delta), axis=2)


@_kind("delta")
class Shift(Factored):
    """g_n = sum_t delta_nt: a bias, added at every position.

    Attributes:
        delta: the delta of what the bias was added to, (B, G, T, o).
    """

    delta: Array
    place: Place | None = None

    @classmethod
    def of(cls, delta: Array, steps: tuple[Step, ...] = ()) -> Shift:
        """One example's delta (..., o): one group, leading axes are positions."""
        return cls(delta.reshape(1, -1, delta.shape[-1]), _somewhere(steps))

    def stacked(self) -> Shift:
        place = _stacked_place(self.place, self.delta.shape[0])
        return Shift(_depth_into_groups(self.delta), place)

    def total(self, weights: Array | None = None) -> Array:
        delta = self.delta if weights is None else weighted(weights, self.delta)
        if delta.shape[1] == 1:  # as in Outer: XLA recognises the delta that it has already
            delta = delta.reshape(-1, delta.shape[3])
            return self.home.restore(jnp.sum(delta, axis=0, dtype=wide_dtype(delta.dtype)))
        return self.home.restore(jnp.sum(delta, axis=(0, 2), dtype=wide_dtype(delta.dtype)))

    def each(self) -> Array:
        return jax.vmap(self.home.restore)(self._summed())

    def square_norm(self) -> Array:
        return jnp.sum(jnp.square(self._summed()), axis=(1, 2))

    def dot(self, other: Factored) -> Array:
        if not (isinstance(other, Shift) and self._same_form(other)):
            return super().dot(other)
        return jnp.sum(self._summed() * other._summed(), axis=(1, 2))

    def _summed(self) -> Array:
        return jnp.sum(self.delta, axis=2, dtype=wide_dtype(self.delta.dtype))


@_kind("parts")
class Sum(Factored):
    """g_n = the sum of its parts: a parameter that was used several times, cross terms included.

    Attributes:
        parts: factored gradients of one parameter, of any kinds.
    """

    parts: tuple[Factored, ...]
    place: Place | None = None

    def stacked(self) -> Sum:
        parts = tuple(part.stacked() for part in self.parts)
        return Sum(parts, parts[0].place)

    def total(self, weights: Array | None = None) -> Array:
        return _add(part.total(weights) for part in self.parts)

    def each(self) -> Array:
        return _add(part.each() for part in self.parts)

    def square_norm(self) -> Array:
        """sum_jk <part_j, part_k>; a rounded sum is never reported below 0."""
        return jnp.maximum(self.dot(self), 0)

    def dot(self, other: Factored) -> Array:
        theirs = other.parts if isinstance(other, Sum) else (other,)
        return _add(mine.dot(their) for mine in self.parts for their in theirs)

    def gram(self, other: Factored) -> Array:
        theirs = other.parts if isinstance(other, Sum) else (other,)
        return _add(mine.gram(their) for mine in self.parts for their in theirs)


def _add(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)


@_kind("g", meta=("why",))
class Full(Factored):
    """g_n itself, (B, *shape): the fallback for a rule that fits no other kind.

    It costs a copy of the parameter for every example; `why` says why it is needed.
    """

    g: Array
    why: str
    place: Place | None = None

    def stacked(self) -> Full:
        place = _stacked_place(self.place, self.g.shape[0])
        return Full(jnp.moveaxis(self.g, 0, 1), self.why, place)

    def total(self, weights: Array | None = None) -> Array:
        g = self.g if weights is None else weighted(weights, self.g)
        return jnp.sum(g, axis=0, dtype=wide_dtype(g.dtype))

    def each(self) -> Array:
        return self.g.astype(wide_dtype(self.g.dtype))
