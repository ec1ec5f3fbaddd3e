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
import math
from collections.abc import Callable
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


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum`, accumulated in float32 at least."""
    wide = wide_dtype(jnp.result_type(*operands))
    return jnp.einsum(spec, *operands, preferred_element_type=wide)


def wide_square(x: Array) -> Array:
    """x * x, in float32 at least."""
    return jnp.square(x.astype(wide_dtype(x.dtype)))


class Factored(abc.ABC):
    """The gradient of one parameter, example by example, in factored form.

    Attributes:
        place: which parameter, and how its entries lie in the canonical form.
    """

    place: Place | None

    @property
    def home(self) -> Place:
        """The place; a kind made by hand has none, and cannot answer in the parameter's shape."""
        if self.place is None:
            raise ValueError(
                f"this {type(self).__name__} has no place yet: the sweep gives it one. By hand, "
                "use dataclasses.replace(pair, place=Place(shape, dtype))"
            )
        for name, rank in self.ranks(self.place).items():
            array = getattr(self, name)
            if array.ndim != rank:
                raise ValueError(
                    f"{name} of this {type(self).__name__} has the shape {array.shape}, but {rank} "
                    "axes are due: was it kept under an outer vmap? Ask it inside that vmap"
                )
        return self.place

    def ranks(self, place: Place) -> dict[str, int]:
        """How many axes its arrays have."""
        return {}

    @abc.abstractmethod
    def total(self, weights: Array | None = None) -> Array:
        """sum_n weights_n g_n; weights (B,) default to ones. A weight of 0: not there at all."""

    @abc.abstractmethod
    def each(self) -> Array:
        """The gradient of every example, (B, *shape)."""

    @abc.abstractmethod
    def stacked(self) -> Factored:
        """The same, where a scan has put a depth axis in front of B: depth moves into G."""

    def at(self, place: Place) -> Factored:
        """The same, with its place known but for the steps, which are the rule's."""
        place = dataclasses.replace(place, steps=self.place.steps if self.place else ())
        self.check_fits(place)
        return dataclasses.replace(self, place=place)  # type: ignore[type-var]

    def check_fits(self, place: Place) -> None:  # noqa: B027, not every kind can tell
        """Raise where entries would be put back in another order than they came."""

    def square_norm(self) -> Array:
        """|g_n|^2 of every example, (B,)."""
        return jnp.sum(jnp.square(flat(self)), axis=1)

    def second_moment(self) -> Array:
        """sum_n g_n * g_n, entry by entry, in the parameter's shape; not divided by anything."""
        return jnp.sum(jnp.square(self.each()), axis=0)

    def dot(self, other: Factored) -> Array:
        """The inner product of every example's gradient with its gradient in `other`, (B,)."""
        return jnp.sum(flat(self) * flat(other), axis=1)

    def gram(self, other: Factored) -> Array:
        """The inner product of each example here with each example of `other`, (B, B')."""
        return einsum("np,mp->nm", flat(self), flat(other))

    def _same_form(self, other: Factored) -> bool:
        """Whether inner products of the canonical forms are those of the gradients."""
        mine = dataclasses.replace(self.home, path="")
        return type(other) is type(self) and mine == dataclasses.replace(other.home, path="")


def flat(pair: Factored) -> Array:
    """The gradients of the examples as rows, (B, number of entries)."""
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
        return pair.at(Place(tuple(jnp.shape(w)), jnp.result_type(w)))

    return jax.tree.map(put, params, factored)


def fits(pair: Factored, place: Place, groups: int, features: tuple[int, ...]) -> None:
    """Raise unless the canonical (groups, *features) is a reshape of the parameter."""
    if place.steps:
        return
    shape = place.shape
    if math.prod(shape) != groups * math.prod(features) or (
        len(shape) >= len(features) and shape[-len(features) :] != features
    ):
        raise ValueError(
            f"{type(pair).__name__} with features {features} does not fit a parameter of shape "
            f"{shape}: are its operands swapped? Steps lead from a parameter to another form"
        )


@dataclass_transform(frozen_default=True)
def kind(*data: str, meta: tuple[str, ...] = ()) -> Callable[[type[_K]], type[_K]]:
    """Make a class a frozen dataclass and a pytree: arrays and parts are data, the rest static."""

    def decorate(cls: type[_K]) -> type[_K]:
        frozen = dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_dataclass(frozen, list(data), [*meta, "place"])
        return frozen

    return decorate


_K = TypeVar("_K")


def somewhere(steps: tuple[Step, ...]) -> Place | None:
    """A place of which only the steps are known as yet."""
    return Place((), None, steps=steps) if steps else None


def depth_into_groups(x: Array) -> Array:
    """(depth, B, G, ...) -> (B, depth * G, ...)."""
    moved = jnp.moveaxis(x, 0, 1)
    n, depth, groups = moved.shape[:3]  # written out: there may be no examples
    return moved.reshape(n, depth * groups, *moved.shape[3:])


def stacked_place(place: Place | None, depth: int) -> Place | None:
    """The place of `depth` copies, if it is known."""
    return place and dataclasses.replace(place, stack=(depth, *place.stack))
