"""What composites and ready nets refuse to be made of."""

from __future__ import annotations

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


def _no_layer(part: Any) -> str:
    hint = "; make an instance: add ()" if isinstance(part, type) else ""
    return f"{part!r}, which is no layer{hint}"
