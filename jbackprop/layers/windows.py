"""What convolutions and pooling share: sizes along each axis, and where a window may stand."""

from __future__ import annotations

import operator
from typing import Any

Pairs = tuple[tuple[int, int], ...]
Padding = str | int | Pairs


def whole(layer: Any, name: str, value: Any, least: int = 1) -> int:
    """The value as an int; raise unless it is one of at least `least`."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{type(layer).__name__}: {name} must be whole numbers of at least {least}, "
            f"not {value!r}"
        )
    return operator.index(value)


def check_window(layer: Any, name: str) -> None:
    """Make the field a tuple of sizes, one for each spatial axis."""
    value = getattr(layer, name)
    if not isinstance(value, tuple | list) or not value:
        raise ValueError(
            f"{type(layer).__name__}: {name} must be a tuple with one size for each spatial axis, "
            f"such as (3, 3) for images and (3,) for sequences, not {value!r}"
        )
    object.__setattr__(layer, name, tuple(whole(layer, name, size) for size in value))


def check_steps(layer: Any, name: str, axes: int) -> None:
    """Make the field one number for all spatial axes, or, where they differ, a tuple."""
    value = getattr(layer, name)
    each = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(each) != axes:
        raise ValueError(
            f"{type(layer).__name__} of {axes} spatial axes: {name} must be one number, or one for "
            f"each axis, not {value!r}"
        )
    each = tuple(whole(layer, name, step) for step in each)
    object.__setattr__(layer, name, each[0] if len(set(each)) == 1 else each)


def steps(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One number for each axis."""
    return (value,) * axes if isinstance(value, int) else value


def check_padding(layer: Any, axes: int, explicit: bool = True) -> None:
    """Make the field padding "SAME", "VALID" or one (before, after) for each spatial axis."""
    value = getattr(layer, "padding")  # noqa: B009, a layer has it, a type does not say so
    if isinstance(value, str):
        value = value.upper() if value.upper() in ("SAME", "VALID") else None
    elif not explicit or isinstance(value, bool):
        value = None
    elif hasattr(value, "__index__"):
        value = ((operator.index(value),) * 2,) * axes
    else:
        pairs = [tuple(pair) if isinstance(pair, tuple | list) else () for pair in value or ()]
        numbers = all(hasattr(n, "__index__") for pair in pairs for n in pair)
        fit = numbers and len(pairs) == axes and all(len(pair) == 2 for pair in pairs)
        value = tuple((operator.index(p[0]), operator.index(p[1])) for p in pairs) if fit else None
    if value is None:
        other = f", one number, or {axes} pairs (before, after)" if explicit else ""
        raise ValueError(
            f'{type(layer).__name__}: padding must be "SAME", "VALID"{other}, not {layer.padding!r}'
        )
    object.__setattr__(layer, "padding", value)


def pairs(
    padding: Any, size: tuple[int, ...], reach: tuple[int, ...], strides: tuple[int, ...]
) -> Pairs:
    """The (before, after) of each axis, for windows that span `reach` entries.

    "SAME" has ceil(size / stride) windows; where the padding is odd, the one more goes behind.
    """
    if padding == "VALID":
        return ((0, 0),) * len(size)
    if padding != "SAME":
        return padding
    found = []
    for n, r, s in zip(size, reach, strides, strict=True):
        total = max((-(-n // s) - 1) * s + r - n, 0)
        found.append((total // 2, total - total // 2))
    return tuple(found)


def check_spatial(layer: Any, x: Any, axes: int) -> None:
    """Raise unless one example has that many spatial axes and one of channels."""
    if x.ndim != axes + 1:
        expected = ("length", "height, width", "depth, height, width")
        names = expected[axes - 1] if axes <= 3 else f"{axes} axes"
        hint = (
            "; without channels add their axis, x[..., None], and without a batch its, x[None]"
            if x.ndim == axes
            else ""
        )
        raise ValueError(
            f"{layer} needs examples ({names}, channels), but one has the shape {x.shape}{hint}"
        )


def check_outputs(layer: Any, x: Any, outputs: tuple[int, ...]) -> None:
    """Raise where the window stands nowhere."""
    if any(n < 1 for n in outputs):
        raise ValueError(
            f"{layer}: the window does not fit into an example of shape {x.shape}; make it "
            'smaller, or pad with padding="SAME"'
        )
