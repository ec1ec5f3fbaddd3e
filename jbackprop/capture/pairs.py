"""From what the taps give to factored gradients: which axes are groups and which are positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.capture.uses import Use
from jbackprop.factored import (
    Factored,
    Full,
    Lookup,
    Nothing,
    Outer,
    Patches,
    Place,
    Scale,
    Shift,
    Step,
    Sum,
    wide_dtype,
    widest_dtype,
)


def pair_of(
    found: Sequence[Use],
    made: Sequence[tuple[Array | None, Array]],
    like: Any,
    path: str,
    n: int,
    inside: int = 0,
    turning: bool = True,
) -> Factored:
    """The factored gradient of one parameter from all its uses.

    Args:
        found: its uses.
        made: what each of them looked at, if anything, and its delta: (B, one axis for each level
            of scans, ...).
        like: the parameter's shape and dtype; of one slice of it, if `inside`.
        path: its name.
        n: B.
        inside: so many of the levels are left out: it is about one turn of those scans.
        turning: whether the two of a pair may change places, to be of one form with another.
    """
    if not found:
        return Nothing(jnp.zeros((n, 0)), Place(tuple(like.shape), like.dtype, path))
    depth = _stacked(found) - inside
    every = zip(found, made, strict=True)
    pairs = [_one(use, *own, like, path, inside, depth) for use, own in every]
    parts = _side_by_side(found, pairs, turning)
    home = home_of(found, like, path, inside)
    return parts[0] if len(parts) == 1 else Sum(tuple(parts), home)


def home_of(found: Sequence[Use], like: Any, path: str, inside: int = 0) -> Place:
    """The parameter, and along which leading axes it is scanned, wherever it is used."""
    depth = _stacked(found) - inside if found else 0
    shape = tuple(like.shape)
    return Place(shape[depth:], like.dtype, path, stack=shape[:depth])


def _stacked(found: Sequence[Use]) -> int:
    """Along how many leading axes a parameter is scanned as it is, in all its uses."""
    every = [[level for level in use.part.levels if level.grouped] for use in found]
    depth = 0
    for levels in zip(*every, strict=False):
        if any(level.steps for level in levels):
            break
        depth += 1
    return depth


def _side_by_side(found: Sequence[Use], pairs: Sequence[Factored], turning: bool) -> list[Factored]:
    """Pairs of the same form as one, with their positions side by side."""
    parts: list[tuple[Use, Factored]] = []
    for use, pair in zip(found, pairs, strict=True):
        for k, (other, there) in enumerate(parts):
            both = _joined(other, there, use, pair, turning)
            if both is not None:
                parts[k] = (other, both)
                break
        else:
            parts.append((use, pair))
    return [pair for _, pair in parts]


def _joined(use: Use, one: Factored, other: Use, two: Factored, turning: bool) -> Factored | None:
    if turning and isinstance(one, Outer) and isinstance(two, Outer) and one.place != two.place:
        # W here, its transpose there: a (outer) delta = (delta (outer) a)^T.
        (b, i, o), turned = use.order, other.order
        if turned != (b, o, i) or _way(use) != _way(other):
            return None
        two = Outer(two.delta, two.a, one.place)
    if not one.same_form(two):
        return None
    if isinstance(one, Patches):
        return None
    if isinstance(one, Full):
        return dataclasses.replace(one, g=one.g + two.g)  # type: ignore[attr-defined]

    def side_by_side(x: Array, y: Array) -> Array:
        return jnp.concatenate(_of_one_dtype(x, y), axis=2)

    return jax.tree.map(side_by_side, one, two)


def _of_one_dtype(x: Array, y: Array) -> tuple[Array, Array]:
    """Both as they are, or in float32 at least."""
    if x.dtype == y.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return x, y
    dtype = widest_dtype([wide_dtype(x.dtype), wide_dtype(y.dtype)])
    return x.astype(dtype), y.astype(dtype)


def _way(use: Use) -> Any:
    """What was done to its parameter before the use, but for being held in scans."""
    return use.part.steps, [level for level in use.part.levels if level.grouped]


def _one(
    use: Use, look: Any, delta: Array, like: Any, path: str, inside: int, depth: int
) -> Factored:
    levels = use.part.levels[inside:]
    grouped = [k + 1 for k, level in enumerate(levels) if level.grouped]
    held = [k + 1 for k, level in enumerate(levels) if not level.grouped]
    first = 1 + len(levels)  # the axes of one use begin here

    def merged(x: Array, *runs: Sequence[int]) -> Array:
        shape = [x.shape[0], *(math.prod(x.shape[k] for k in run) for run in runs)]
        return x.transpose(0, *(k for run in runs for k in run)).reshape(shape)

    def canonical(x: Array) -> Array:
        rest = [[k] for k in range(first + 2, x.ndim)]
        return merged(x, [*grouped, first], [*held, first + 1], *rest)

    place = _place(use, like, path, inside, depth)
    if look is not None:
        look, delta = _of_one_dtype(look, delta)
    if use.kind == "Full":
        written = jax.vmap(place.restore)(delta.astype(place.dtype))
        return Full(written, use.why, dataclasses.replace(place, steps=()))
    if use.kind == "Patches":
        assert use.geometry is not None
        places = [[k] for k in range(first + 1, delta.ndim)]
        a, delta = (merged(x, grouped, [*held, first], *places) for x in (look, delta))
        if a.shape[2] == 1:
            return Patches(a[:, :, 0], delta[:, :, 0], use.geometry, place)
        return Patches(a, delta, _longer(use.geometry), place)
    delta = canonical(delta)
    if use.kind == "Shift":
        return Shift(delta, place)
    a = canonical(look)
    if use.kind == "Lookup":
        return Lookup(a, delta, use.rows, place)
    return Outer(a, delta, place) if use.kind == "Outer" else Scale(a, delta, place)


def _longer(geometry: Any) -> Any:
    """With one axis more in front, along which the kernel is one entry long: positions."""
    return dataclasses.replace(
        geometry,
        kernel=(1, *geometry.kernel),
        strides=(1, *geometry.strides),
        padding=((0, 0), *geometry.padding),
        dilation=(1, *geometry.dilation),
        spread=(1, *geometry.spread),
    )


def _place(use: Use, like: Any, path: str, inside: int, depth: int) -> Place:
    """Where a use's canonical form lies in its parameter, of which `depth` axes are copies."""
    shape = tuple(like.shape)
    grouped = [level for level in use.part.levels[inside:] if level.grouped]
    steps: list[Step] = []
    depths: list[int] = []
    for level in grouped[depth:]:
        steps += [_under(step, depths) for step in level.steps]
        depths.append(level.length)
    steps += [_under(step, depths) for step in use.steps]
    return Place(shape[depth:], like.dtype, path, tuple(steps), shape[:depth])


def _under(step: Step, depths: Sequence[int]) -> Step:
    """A step of an array, done to a stack of such arrays."""
    n, front = len(depths), tuple(range(len(depths)))
    name, *rest = step
    if name == "transpose":
        return name, (*front, *(k + n for k in rest[0]))
    if name == "reshape":
        return name, (*depths, *rest[0])
    if name == "flip":
        return name, tuple(k + n for k in rest[0])
    starts, stops, *strides = rest
    by = [(*(1 for _ in front), *strides[0])] if strides else []
    return name, (*(0 for _ in front), *starts), (*depths, *stops), *by
