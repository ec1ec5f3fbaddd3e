"""The size of the delta, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.compose import FanOut, Parallel, Skip
from jbackprop.factored import wide_dtype
from jbackprop.gradient import Backprop, deltas
from jbackprop.structure import copies
from jbackprop.sweep import Composite, Node
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class DeltaFlow:
    """How the delta shrinks or grows on its way back. Printed, it is a table.

    Attributes:
        norms: by path, first layer first: the mean over the batch of |delta_n|, the Euclidean norm
            of the unscaled delta of one example, over all arrays of the delta where it is a tuple.
        ratios: by path: the norm here over that of the next layer listed that is not beside it, in
            another branch of the same `FanOut`, `Parallel` or `Skip`. Below 1 the delta vanishes on
            its way to the input, above 1 it explodes. The last layer has none.
    """

    norms: dict[str, float]
    ratios: dict[str, float]

    def __str__(self) -> str:
        rows = [
            (path, f"{norm:.3e}", f"{self.ratios[path]:.3f}" if path in self.ratios else "")
            for path, norm in self.norms.items()
        ]
        return render(("layer", ">|delta|", ">over the next layer's"), rows)


def delta_norms(bp: Backprop) -> DeltaFlow:
    """The norm of the delta of every layer that has weights, and its ratio from layer to layer.

    Args:
        bp: from `jbackprop.backprop`.
    """
    found = {path: _norm(delta) for path, delta in deltas(bp).items()}
    norms = {path: float(jnp.mean(norm)) for path, norm in found.items() if norm is not None}
    places = places_of(bp.net)
    paths = list(norms)
    ratios = {}
    for i, path in enumerate(paths):
        ahead = (p for p in paths[i + 1 :] if not beside(places[path], places[p]))
        following = next(ahead, None)
        if following is not None:
            ratio = norms[path] / norms[following] if norms[following] else float("nan")
            ratios[path] = ratio
    return DeltaFlow(norms, ratios)


Place = tuple[tuple[str, bool], ...]
"""The steps from the whole network to a layer: (name, whether its siblings are beside it)."""


def _places(node: Node, place: Place = ()) -> Iterator[Place]:
    """The place of every copy of every layer, in the order of `copies`."""
    if not isinstance(node, Composite):
        yield place
        return
    beside = isinstance(node, FanOut | Parallel | Skip)
    for name, child in node.children().items():
        for i in range(1 if node.copies is None else node.copies):
            yield from _places(child, (*place, (f"{name}[{i}]", beside)))


def places_of(net: Node) -> dict[str, Place]:
    """By path, the place of every copy of every layer."""
    return dict(zip((shown for shown, _, _ in copies(net)), _places(net), strict=True))


def beside(one: Place, other: Place) -> bool:
    """Whether the ways to two layers part in different branches of one composite."""
    steps = zip(one, other, strict=False)
    return next((a[1] for a, b in steps if a != b), False)


def _norm(delta: Any) -> Array | None:
    """|delta_n|, of entries divided by the largest first: squares of vanishing ones underflow."""
    leaves = [d for d in jax.tree.leaves(delta) if jnp.issubdtype(d.dtype, jnp.floating)]
    if not leaves:
        return None
    dtype = wide_dtype(jnp.result_type(*leaves))
    flat = jnp.concatenate([d.astype(dtype).reshape(d.shape[0], -1) for d in leaves], axis=1)
    largest = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale[:, 0] * jnp.linalg.norm(flat / scale, axis=1)
