"""What composites of any number of layers have in common."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
from jax import Array

from jbackprop.checks import check_key
from jbackprop.compose.checks import check_layers
from jbackprop.factored import PyTree
from jbackprop.sweep import Composite, Node


@dataclasses.dataclass(frozen=True, init=False)
class Variadic(Composite):
    """A composite made as `Name(layer, layer, ...)`.

    Params: a tuple with the parameters of each layer, () for a layer that has none.

    Raises:
        ValueError: no layers; params of another network.
        TypeError: something among the layers that is not one.
    """

    layers: tuple[Node, ...]

    def __init__(self, *layers: Node):
        name = type(self).__name__
        object.__setattr__(self, "layers", layers)
        if not layers:
            raise ValueError(f"{name} needs at least one layer")
        check_layers(self, **{f"layers[{i}]": layer for i, layer in enumerate(layers)})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"

    def with_children(self, layers: Any) -> Self:
        new = object.__new__(type(self))  # a subclass stays one, whatever its __init__ takes
        vars(new).update((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        vars(new)["layers"] = tuple(layers)
        return new

    def init(self, key: Array) -> tuple[PyTree, ...]:
        check_key(key, f"{type(self).__name__}.init: key")
        keys = jax.random.split(key, len(self.layers))
        return tuple(layer.init(k) for layer, k in zip(self.layers, keys, strict=True))
