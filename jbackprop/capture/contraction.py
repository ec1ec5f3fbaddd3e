"""Contracting pairs where they are born: in the scan whose turns have slices of a parameter."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jbackprop.capture.pairs import pair_of
from jbackprop.capture.plan import Plan
from jbackprop.capture.uses import Use
from jbackprop.factored import Factored

Collect = Callable[..., Any]


Halves = dict[tuple[int, int], Array]
"""The halves of pairs by the number of their use and 0 for deltas, 1 for what was looked at."""
Shared = dict[int, int]
"""By the number of a use: the number of that whose delta, in the form that is due, is its own."""


def zeros_of(found: Sequence[Use], shared: Shared, inside: int = 0) -> Halves:
    """Arrays like what a sweep back gives of some uses, in all but so many of the scans around."""
    zeros: Halves = {}
    for use in found:
        lengths = _lengths(use, inside)
        if shared[use.index] == use.index:
            zeros[use.index, 0] = jnp.zeros((*lengths, *use.delta_like.shape), use.delta_like.dtype)
        if use.again:
            zeros[use.index, 1] = jnp.zeros((*lengths, *use.look_like.shape), use.look_like.dtype)
    return zeros


def sharing(found: Sequence[Use]) -> Shared:
    """Of some uses that are handed over together, those that want the same delta."""
    first: dict[Any, int] = {}
    return {
        use.index: first.setdefault((use.tap, use.delta, use.part.scales), use.index)
        if use.tap >= 0
        else use.index
        for use in found
    }


def halves(found: Sequence[Use], shared: Shared, made: Halves, seen: dict[int, Array]) -> list[Any]:
    """What was looked at (or None) and the delta, for every use."""
    return [
        (made.get((use.index, 1), seen.get(use.index)), made[shared[use.index], 0]) for use in found
    ]


def mini_batch(use: Use, n: int, inside: int = 0) -> tuple[Any, Any]:
    """The shapes of what a use looks at (or None), and of its delta, for n examples."""

    def like(half: Any) -> Any:
        shape = half and (n, *_lengths(use, inside), *half.shape)
        return half and jax.ShapeDtypeStruct(shape, half.dtype)

    return like(use.look_like), like(use.delta_like)


def _lengths(use: Use, inside: int) -> tuple[int, ...]:
    return tuple(level.length for level in use.part.levels[inside:])


def birthplace(found: Sequence[Use]) -> list[Plan]:
    """The scans, from the outermost, each of whose turns has a slice and all uses of that slice.

    What is asked of the parameter can be asked of each slice where the innermost of these ends a
    turn: nothing that meets it is elsewhere.
    """
    scans: list[Plan] = []
    for k in range(min((len(use.scans) for use in found), default=0)):
        levels = [use.part.levels[k] for use in found]
        if any(use.scans[k] is not found[0].scans[k] for use in found):
            break
        if not all(level.grouped and not level.steps for level in levels):
            break
        scans.append(found[0].scans[k])
    return scans


def by_copy(collect: Collect, pair: Factored, *own: Any) -> Any:
    """What is collected of every copy of scanned parameters, in front of one another."""
    if pair.home.stack:
        return jax.vmap(functools.partial(by_copy, collect))(pair.copies(), *own)
    found = collect(pair, *own)
    for v in jax.tree.leaves(found):
        if not jnp.issubdtype(jnp.result_type(v), jnp.floating):
            raise TypeError(
                f"collect must give floating-point arrays, but of {pair.home.path} it gave "
                f"{jnp.result_type(v)}: it is asked in the sweep back"
            )
    return found


@dataclasses.dataclass(frozen=True)
class Contraction:
    """How a slice of one parameter is contracted.

    Attributes:
        leaf: which parameter.
        found: its uses.
        scan: the innermost scan whose turns have slices of it.
        lengths: of the scans from the outermost to that one.
        closed: from what the uses make of a mini-batch (B, ...), the rows read, and what is asked
            besides, to what is collected.
        tree: its structure.
    """

    leaf: int
    found: list[Use]
    scan: Plan
    lengths: tuple[int, ...]
    closed: ClosedJaxpr
    tree: Any

    @property
    def inside(self) -> int:
        """How many levels are around."""
        return len(self.lengths)

    def zeros(self) -> Any:
        """Arrays like what is collected of all slices."""
        shapes = self.closed.out_avals
        return self.tree.unflatten([jnp.zeros((*self.lengths, *v.shape), v.dtype) for v in shapes])

    def __call__(self, made: Any, seen: Any, tag: Array, besides: Any) -> Any:
        """What is collected of one slice; of all examples at once, when it is mapped over them.

        Args:
            made, seen: what the uses made, and the rows read; of one example.
            tag: a number of the example.
            besides: the constants of `closed`, and what it is asked besides.
        """
        own = halves(self.found, sharing(self.found), made, seen)

        @jax.custom_batching.custom_vmap
        def one(mapped: Any, tag: Array, besides: Any) -> Any:
            return [jnp.zeros(v.shape, v.dtype) for v in self.closed.out_avals]

        @one.def_vmap
        def all_of_them(n: int, is_mapped: Any, mapped: Any, tag: Array, besides: Any) -> Any:
            def over_examples(v: Array, own: bool) -> Array:
                return v if own else jnp.broadcast_to(v, (n, *v.shape))

            mapped = jax.tree.map(over_examples, mapped, is_mapped[0])
            consts, aux = besides
            closed = ClosedJaxpr(self.closed.jaxpr, consts)
            found = jaxpr_as_fun(closed)(*jax.tree.leaves((mapped, aux)))
            return list(found), [False] * len(found)

        return self.tree.unflatten(one(own, tag, besides))


def contraction(
    leaf: int,
    found: list[Use],
    scans: list[Plan],
    like: Array,
    path: str,
    n: int,
    collect: Collect,
    aux: Any,
) -> Contraction:
    """Trace what is collected of one slice of a parameter.

    Args:
        leaf: which parameter; `like` are its shape and dtype, `path` is its name.
        found: its uses.
        scans: see `birthplace`.
        like, path: see `leaf`.
        n: B.
        collect: (pair, *what it is asked besides) -> arrays.
        aux: what it is asked besides, stacked as the parameter is; () for nothing.
    """
    depth = len(scans)
    own = jax.ShapeDtypeStruct(like.shape[depth:], like.dtype)
    trees: list[Any] = []

    def collected(made: Any, aux: Any) -> list[Array]:
        pair = pair_of(found, made, own, path, n, depth)
        leaves, tree = jax.tree.flatten(by_copy(collect, pair, *aux))
        trees.append(tree)
        return [jnp.asarray(v) for v in leaves]

    made = [mini_batch(use, n, depth) for use in found]
    part = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[depth:], v.dtype), aux)
    closed = jax.make_jaxpr(collected)(made, part)
    lengths = tuple(level.length for level in found[0].part.levels[:depth])
    return Contraction(leaf, found, scans[-1], lengths, closed, trees[-1])
