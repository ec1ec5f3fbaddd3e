"""What composites and ready nets refuse to be made of."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from jbackprop.sweep import Composite, Node


def check_layers(composite: Composite, **parts: Any) -> None:
    """Raise a TypeError where one of these, by their names, is no layer."""
    for name, part in parts.items():
        if not isinstance(part, Node):
            raise TypeError(f"{type(composite).__name__}: {name} is {_no_layer(part)}")


def check_activation(net: str, activation: Any, default: Node, name: str = "activation") -> Node:
    """The activation, or what it is by default; raise a TypeError where it is no layer."""
    if activation is not None and not isinstance(activation, Node):
        raise TypeError(f"{net}: {name} is {_no_layer(activation)}")
    return default if activation is None else activation


def check_shape(net: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one example as ints; raise unless it has spatial axes and one of channels."""
    shape = check_widths(net, "shape", shape)
    if len(shape) < 2:
        raise ValueError(
            f"{net}: shape must be that of one example with its channels, such as (28, 28, 1), "
            f"not {shape}"
        )
    return shape


def check_widths(net: str, name: str, widths: Sequence[int], least: int = 1) -> tuple[int, ...]:
    """The sizes as ints; raise unless there are at least `least` of them, all of 1 or more."""
    try:
        sizes = tuple(operator.index(n) for n in widths)
        if any(isinstance(n, bool) for n in widths):
            raise TypeError
    except TypeError:
        raise ValueError(
            f"{net}: {name} must be whole numbers, such as (16, 32), not {widths!r}"
        ) from None
    if len(sizes) < least or any(n < 1 for n in sizes):
        raise ValueError(f"{net}: {name} must be {least} or more sizes of at least 1, not {sizes}")
    return sizes


def _no_layer(part: Any) -> str:
    hint = ""
    if isinstance(part, type):
        hint = "; make an instance: add ()"
    elif isinstance(part, list | tuple):
        hint = "; hand its layers over one by one: add * in front"
    elif callable(part):
        hint = "; with its derivative a function of units is one: Activation(f, derivative)"
    return f"{part!r}, which is no layer{hint}"
