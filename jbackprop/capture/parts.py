"""How a variable of a traced program follows a parameter: moves that only rearrange entries.

A variable v that depends on parameters alone is followed as long as its differential is a sum

    dv = sum_k s_k E_k(d w_k)

of *parts*: w_k is a parameter, E_k moves its entries (reshapes, transposes, slices, flips), repeats
them (broadcasts) and puts them in a box of v (concatenation), and s_k is a product of numbers.
Whatever else is added to v belongs to somebody else's differential. A move gives the parts of what
it makes, or None where it cannot be followed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jbackprop.factored import Step

Box = tuple[int, int]
"""Where a part lies on one axis of its variable: from the first entry to before the last."""


@dataclasses.dataclass(frozen=True)
class Level:
    """A scan that a parameter went into.

    Attributes:
        length: of the scan.
        grouped: whether each turn has a slice of its own (scanned weights: groups), rather than all
            of them the same (positions).
        steps: what was done to the array before the leading axis of it was scanned.
    """

    length: int
    grouped: bool
    steps: tuple[Step, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a variable, see above.

    Attributes:
        leaf: which parameter.
        shape: of the parameter (of one slice of it, in a scan) after the steps.
        axes: for each axis of the variable the axis of that array which lies along it, or None: the
            array is repeated there. Axes of length 1 count as repeated, and lie along nothing.
        boxes: for each axis of the variable the box that the part fills; None for all of it.
        steps: what was done to the array since the innermost level.
        levels: the scans around, from the outermost.
        scales: what it was multiplied with, to be looked up when the program runs.
    """

    leaf: int
    shape: tuple[int, ...]
    axes: tuple[int | None, ...]
    boxes: tuple[Box | None, ...]
    steps: tuple[Step, ...] = ()
    levels: tuple[Level, ...] = ()
    scales: tuple[Any, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it fills its variable."""
        return all(box is None for box in self.boxes)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of the array as they lie along the variable."""
        return tuple(axis for axis in self.axes if axis is not None)

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The lengths of its box in a variable of this shape."""
        pairs = zip(shape, self.boxes, strict=True)
        return tuple(n if box is None else box[1] - box[0] for n, box in pairs)


Parts = tuple[Part, ...]


def of_leaf(leaf: int, shape: tuple[int, ...], levels: tuple[Level, ...] = ()) -> Part:
    """The part that is a whole parameter."""
    axes = tuple(k if n != 1 else None for k, n in enumerate(shape))
    return Part(leaf, shape, axes, (None,) * len(shape), levels=levels)


def _replace(part: Part, **changes: Any) -> Part:
    return dataclasses.replace(part, **changes)


def arranged(part: Part, perm: Sequence[int]) -> tuple[Step, ...]:
    """Its steps and a transpose that puts these axes first, in this order."""
    return (*part.steps, *_transpose(part.shape, perm))


def _transpose(shape: Sequence[int], perm: Sequence[int]) -> tuple[Step, ...]:
    rest = tuple(k for k in range(len(shape)) if k not in perm)
    long = [k for k in perm if shape[k] != 1]
    return () if long == sorted(long) else (("transpose", (*perm, *rest)),)


def transpose(part: Part, permutation: Sequence[int]) -> Part:
    """v.transpose(permutation)."""
    axes = tuple(part.axes[k] for k in permutation)
    return _replace(part, axes=axes, boxes=tuple(part.boxes[k] for k in permutation))


def broadcast(part: Part, old: Sequence[int], new: Sequence[int], into: Sequence[int]) -> Part:
    """Axis k of v (of shape `old`) becomes axis into[k] of the shape `new`; others are repeated."""
    axes: list[int | None] = [None] * len(new)
    boxes: list[Box | None] = [None] * len(new)
    for k, to in enumerate(into):
        if old[k] == new[to]:
            axes[to], boxes[to] = part.axes[k], part.boxes[k]
    return _replace(part, axes=tuple(axes), boxes=tuple(boxes))


def reshape(part: Part, old: Sequence[int], new: Sequence[int]) -> Part | None:
    """v.reshape(new): axes that are repeated and those that are not must not be merged."""
    groups = _factors(old, new)
    if groups is None:
        return None
    axes: list[int | None] = [None] * len(new)
    boxes: list[Box | None] = [None] * len(new)
    sizes: list[int] = []  # of the array's axes after the reshape, in the order of the variable
    for before, after in groups:
        long = [k for k in before if old[k] != 1 or part.boxes[k] is not None]
        if any(part.boxes[k] is not None for k in long):
            ends = [k for k in after if new[k] != 1] or list(after[:1])
            if len(long) != 1 or len(ends) != 1 or old[long[0]] != new[ends[0]]:
                return None
            boxes[ends[0]] = part.boxes[long[0]]
            if part.axes[long[0]] is not None:
                axes[ends[0]] = len(sizes)
                sizes.append(part.shape[part.axes[long[0]] or 0])
            continue
        real = [k for k in long if part.axes[k] is not None]
        if real and len(real) != len(long):
            return None
        if real:
            for k in after:
                if new[k] != 1:
                    axes[k] = len(sizes)
                    sizes.append(new[k])
    if sizes == [part.shape[k] for k in part.order]:  # nothing but axes of length 1 has changed
        order = part.order
        renamed = tuple(None if k is None else order[k] for k in axes)
        return _replace(part, axes=renamed, boxes=tuple(boxes))
    steps = (*arranged(part, part.order), ("reshape", tuple(sizes)))
    return _replace(part, axes=tuple(axes), boxes=tuple(boxes), steps=steps, shape=tuple(sizes))


def _factors(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """The axes in the shortest runs of equal products; None for arrays without entries."""
    if 0 in old or 0 in new:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        k, m, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        else:
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((tuple(range(k, i)), tuple(range(m, j))))
    return groups


def cut(
    part: Part, starts: Sequence[int], stops: Sequence[int], strides: Sequence[int] | None
) -> Part | tuple[()] | None:
    """v[starts:stops:strides]; () where nothing of the part is left."""
    strides = strides or (1,) * len(starts)
    first, last, by = [0] * len(part.shape), list(part.shape), [1] * len(part.shape)
    axes, boxes = list(part.axes), list(part.boxes)
    for k, (start, stop, stride) in enumerate(zip(starts, stops, strides, strict=True)):
        box, axis = boxes[k], axes[k]
        if box is not None:
            if stride != 1:
                return None
            low, high = max(box[0], start), min(box[1], stop)
            if low >= high:
                return ()
            boxes[k] = None if (low, high) == (start, stop) else (low - start, high - start)
            start, stop = low - box[0], high - box[0]
        if axis is not None:
            first[axis], last[axis], by[axis] = start, stop, stride
            if len(range(start, stop, stride)) == 1:
                axes[k] = None
    shape = tuple(len(range(*ends)) for ends in zip(first, last, by, strict=True))
    if shape == part.shape:
        return _replace(part, axes=tuple(axes), boxes=tuple(boxes))
    step = ("slice", tuple(first), tuple(last), *([tuple(by)] if set(by) != {1} else []))
    return _replace(
        part, shape=shape, axes=tuple(axes), boxes=tuple(boxes), steps=(*part.steps, step)
    )


def flip(part: Part, shape: Sequence[int], dimensions: Sequence[int]) -> Part:
    """v, back to front along some axes."""
    boxes = list(part.boxes)
    for k in dimensions:
        box = boxes[k]
        boxes[k] = None if box is None else (shape[k] - box[1], shape[k] - box[0])
    turned = tuple(axis for axis in (part.axes[k] for k in dimensions) if axis is not None)
    steps = (*part.steps, *([("flip", turned)] if turned else []))
    return _replace(part, boxes=tuple(boxes), steps=steps)


def put(part: Part, shape: Sequence[int], axis: int, start: int, total: int) -> Part:
    """The part of a longer variable (concatenation, padding) in which v starts at `start`."""
    if total == shape[axis]:
        return part
    low, high = part.boxes[axis] or (0, shape[axis])
    boxes = list(part.boxes)
    boxes[axis] = (start + low, start + high)
    return _replace(part, boxes=tuple(boxes))


def scaled(part: Part, by: Any) -> Part:
    """v times a number, which is looked up."""
    return _replace(part, scales=(*part.scales, by))


def held(part: Part, length: int) -> Part:
    """v as a constant of a scan."""
    return _replace(part, levels=(*part.levels, Level(length, grouped=False)))


def scanned(part: Part, length: int) -> Part | None:
    """A slice of v, scanned along its first axis."""
    if part.boxes[0] is not None:
        return None
    if part.axes[0] is None:  # repeated
        return held(_replace(part, axes=part.axes[1:], boxes=part.boxes[1:]), length)
    part = part if part.axes[0] == 0 else _in_order(part)
    axes = tuple(None if axis is None else axis - 1 for axis in part.axes[1:])
    levels = (*part.levels, Level(length, True, part.steps))
    return Part(part.leaf, part.shape[1:], axes, part.boxes[1:], (), levels, part.scales)


def _in_order(part: Part) -> Part:
    """The same with an array whose axes lie as they do along the variable."""
    sizes = tuple(part.shape[k] for k in part.order)
    steps = arranged(part, part.order)
    if len(sizes) != len(part.shape):
        steps = (*steps, ("reshape", sizes))
    count = iter(range(len(sizes)))
    axes = tuple(None if axis is None else next(count) for axis in part.axes)
    return _replace(part, shape=sizes, axes=axes, steps=steps)
