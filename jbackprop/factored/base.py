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

    total(weights)          sum_n weights_n g_n              the parameter's shape
    each()                  g_n                              (B, *the parameter's shape)
    square_norm()           |g_n|^2                          (B,)
    project(vector)         <g_n, vector>                    (B,)
    second_moment(weights)  sum_n weights_n g_n * g_n        the parameter's shape
    moments(weights)        the mean and the variance of g_n the parameter's shape, both
    dot(other)              <g_n, h_n>                       (B,)
    gram(other)             <g_n, h_m>                       (B, B')

Whatever must write gradients of single examples out does so for a few of them at a time.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored.place import Place
from jbackprop.factored.sums import (
    Moments,
    PyTree,
    einsum,
    in_shares,
    over_examples,
    present,
    weighted_square,
)

_K = TypeVar("_K")
_T = TypeVar("_T")
Method = Literal["auto", "gram", "materialise"]
"""How inner products of gradients are found where an example has several positions: from the Gram
matrices of activations and deltas over the positions, by writing the gradients out, or whichever
takes fewer products."""


class Factored(abc.ABC):
    """The gradient of one parameter, example by example, in factored form.

    Attributes:
        place: which parameter, and how its entries lie in the canonical form.
        deltas: which of its arrays are linear in the delta of the output; the others do not depend
            on it.
    """

    place: Place | None
    deltas: ClassVar[tuple[str, ...]] = ("delta",)

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

    def with_deltas(self, f: Callable[[Array], Array]) -> Factored:
        """The same, where f has changed what is linear in the delta of the output."""
        changed = {name: f(getattr(self, name)) for name in self.deltas}
        return dataclasses.replace(self, **changed)  # type: ignore[type-var]

    def copies(self) -> Factored:
        """The inverse of `stacked`: the outermost axis of copies in front of B, for `jax.vmap`."""
        place = self.home
        depth, n = place.stack[0], self.size

        def apart(v: Array) -> Array:
            return jnp.moveaxis(v.reshape(n, depth, v.shape[1] // depth, *v.shape[2:]), 1, 0)

        return dataclasses.replace(
            jax.tree.map(apart, self), place=dataclasses.replace(place, stack=place.stack[1:])
        )

    @property
    def size(self) -> int:
        """B, the number of examples."""
        return int(jax.tree.leaves(self)[0].shape[0])

    @property
    def entries(self) -> int:
        """How many numbers it takes to write the gradient of one example out."""
        return math.prod(self.home.stack + self.home.shape)

    def square_norm(self, method: Method = "auto") -> Array:
        """|g_n|^2 of every example, (B,)."""
        return self._by_example(lambda pair: jnp.sum(jnp.square(flat(pair)), axis=1))

    def project(self, vector: Array) -> Array:
        """The inner product of every example's gradient with one array like the parameter, (B,)."""
        vector = self.home.checked(vector)

        def products(pair: Factored) -> Array:
            written = flat(pair)
            return written @ vector.reshape(-1).astype(written.dtype)

        return self._by_example(products)

    def second_moment(self, weights: Array | None = None) -> Array:
        """sum_n weights_n g_n * g_n, entry by entry, in the parameter's shape.

        Not divided by anything; weights (B,) default to ones. A weight of 0: not there at all.
        """
        return self._over_examples(lambda g, w: weighted_square(g, w), weights)

    def moments(self, weights: Array | None = None) -> tuple[Array, Array]:
        """The mean of g_n and its variance about that, entry by entry, in the parameter's shape.

        With p_n = weights_n / sum weights (1/B without), they are m = sum_n p_n g_n and
        sum_n p_n (g_n - m)^2. Both are 0 where all weights are.
        """

        def some(part: Any) -> tuple[tuple[()], Moments]:
            g, own = part[0].each(), part[1]
            mass, shares = in_shares(own, g.shape[0], g.dtype)
            g = present(shares, g)
            mean = over_examples(shares, g)
            return (), Moments(mass, mean, weighted_square(g - mean[None], shares))

        n = self.size
        size = block_size(n, self.entries)
        tree = (self, weights)
        found = some(tree)[1] if size >= n else scan_examples(some, tree, n, size, Moments.join)[1]
        return found.mean, found.variance

    def dot(self, other: Factored, method: Method = "auto") -> Array:
        """The inner product of every example's gradient with its gradient in `other`, (B,)."""

        def products(pairs: tuple[Factored, Factored]) -> Array:
            return jnp.sum(flat(pairs[0]) * flat(pairs[1]), axis=1)

        return in_blocks(products, (self, other), self.size, self.entries + other.entries)

    def gram(self, other: Factored, method: Method = "auto") -> Array:
        """The inner product of each example here with each example of `other`, (B, B')."""

        def rows(mine: Factored) -> Array:
            written = flat(mine)

            def columns(theirs: Factored) -> Array:
                return einsum("mp,np->mn", flat(theirs), written)

            return in_blocks(columns, other, other.size, 2 * other.entries).T

        return in_blocks(rows, self, self.size, 2 * self.entries)

    def _by_example(self, f: Callable[[Any], Array]) -> Array:
        return in_blocks(f, self, self.size, self.entries)

    def _over_examples(self, f: Callable[[Array, Any], Array], weights: Array | None) -> Array:
        """The sum over the examples of f(g, weights)."""

        def some(part: Any) -> Array:
            return f(part[0].each(), part[1])

        return in_blocks(some, (self, weights), self.size, self.entries, summed=True)

    def same_form(self, other: Factored) -> bool:
        """Whether inner products of the canonical forms are those of the gradients."""
        return type(other) is type(self) and self._form() == other._form()

    def _form(self) -> Any:
        """All but the name, and the lengths of the batch and of the positions."""
        sizes = [(v.shape[1:2], v.shape[3:]) for v in jax.tree.leaves(self)]
        return dataclasses.replace(self.home, path=""), sizes, getattr(self, "rows", None)


AT_ONCE = 1 << 20
"""Numbers written out at once, about; on each device that examples are spread over."""


def in_blocks(
    f: Callable[[Any], _T], tree: PyTree, n: int, entries: int, summed: bool = False
) -> _T:
    """f of a few examples at a time; `entries` is what f writes out for one of them.

    Args:
        f: gives what belongs to each example (b, ...), or their sum; a tree of arrays.
        tree: of arrays (n, ...).
        n: the number of examples.
        entries: so many numbers that about `AT_ONCE` are written at once.
        summed: whether the results of f are to be added up rather than joined.
    """
    size = block_size(n, entries)
    if size >= n:
        return f(tree)
    if summed:
        return scan_examples(lambda block: ((), f(block)), tree, n, size)[1]
    return scan_examples(lambda block: (f(block), ()), tree, n, size)[0]


def block_size(n: int, entries: int) -> int:
    """How many of n examples are taken at once, if `entries` are written out for each."""
    spread = devices_of(n)
    own = n // spread
    blocks = min(-(-own * max(entries, 1) // AT_ONCE), own)
    return spread * -(-own // max(blocks, 1))


def devices_of(*sizes: int) -> int:
    """How many devices so many examples may be spread over: a multiple of how many they are.

    A program is not told where its arrays will lie, but JAX splits them evenly, or not at all.
    """
    return math.gcd(jax.device_count(), *sizes)


def scan_examples(
    f: Callable[[Any], tuple[PyTree, PyTree]],
    tree: PyTree,
    n: int,
    size: int,
    join: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """f of `size` examples at a time, one block after the other; the last may be shorter.

    Where there are several devices a block has examples from all over the batch, as many from each
    part that may be a device's own: examples that are spread over them stay where they are.

    Args:
        f: from a block of `tree` to what belongs to each of its examples (size, ...), and what is
            of all of them together.
        tree: of arrays (n, ...).
        n: the number of examples.
        size: of a block.
        join: makes one of what is of the blocks so far (zeros: of none) and of the next one. By
            default they are added up.
    """
    spread = devices_of(n, size)
    own, some = n // spread, size // spread  # of one part
    whole, rest = divmod(own, some)
    join = join or functools.partial(jax.tree.map, jnp.add)

    def parts(v: Array) -> Array:
        return v.reshape(spread, own, *v.shape[1:])

    def block(v: Array) -> Array:  # (parts, blocks, ...) to (blocks, ...)
        v = jnp.moveaxis(v[:, : whole * some].reshape(spread, whole, some, *v.shape[2:]), 1, 0)
        return v.reshape(whole, size, *v.shape[3:])

    def parted(v: Array) -> Array:  # and back
        v = jnp.moveaxis(v.reshape(whole, spread, some, *v.shape[2:]), 1, 0)
        return v.reshape(spread, whole * some, *v.shape[3:])

    def step(so_far: PyTree, block: PyTree) -> tuple[PyTree, PyTree]:
        each, new = f(block)
        return join(so_far, new), each

    tree = jax.tree.map(parts, tree)
    first = jax.tree.map(lambda v: v[:, :some].reshape(size, *v.shape[2:]), tree)
    shapes = jax.eval_shape(f, first)[1]
    nothing = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    together, each = lax.scan(step, nothing, jax.tree.map(block, tree))
    each = jax.tree.map(parted, each)
    if rest:
        last = jax.tree.map(lambda v: v[:, whole * some :].reshape(-1, *v.shape[2:]), tree)
        together, left = step(together, last)
        left = jax.tree.map(lambda v: v.reshape(spread, rest, *v.shape[1:]), left)
        each = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), each, left)
    return jax.tree.map(lambda v: v.reshape(n, *v.shape[2:]), each), together


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
            f"{shape}: are its operands swapped? If not, give the steps that lead from the "
            f"parameter there: {type(pair).__name__}.of(..., "
            f"steps=(('reshape', {(groups, *features)}),))"
        )


@dataclass_transform(frozen_default=True)
def kind(*data: str, meta: tuple[str, ...] = ()) -> Callable[[type[_K]], type[_K]]:
    """Make a class a frozen dataclass and a pytree: arrays and parts are data, the rest static."""

    def decorate(cls: type[_K]) -> type[_K]:
        frozen = dataclasses.dataclass(frozen=True)(cls)
        jax.tree_util.register_dataclass(frozen, list(data), [*meta, "place"])
        return frozen

    return decorate


def depth_into_groups(x: Array) -> Array:
    """(depth, B, G, ...) -> (B, depth * G, ...)."""
    moved = jnp.moveaxis(x, 0, 1)
    n, depth, groups = moved.shape[:3]  # written out: there may be no examples
    return moved.reshape(n, depth * groups, *moved.shape[3:])
