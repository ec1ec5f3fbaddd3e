"""Layers one after the other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import Array

from jbackprop.factored import PyTree
from jbackprop.sweep import Collect, Composite, Node, Trace, backward, forward, inside


@dataclasses.dataclass(frozen=True, init=False)
class Sequential(Composite):
    """A chain: each layer's output is the next one's input.

    Forward a^l = f_l(a^{l-1}), backward delta^{l-1} = (df_l/da^{l-1})^T delta^l, layer by layer.
    Every boundary between two layers is stored once, and only where one of the two reads it.

    Params: a tuple with the parameters of each layer, () for a layer that has none.

    Raises:
        ValueError: no layers; params of another network.
        TypeError: something among the layers that is not one.
    """

    layers: tuple[Node, ...]

    def __init__(self, *layers: Node):
        object.__setattr__(self, "layers", layers)
        if not layers:
            raise ValueError("Sequential needs at least one layer")
        for i, layer in enumerate(layers):
            if not isinstance(layer, Node):
                raise TypeError(
                    f"Sequential: layers[{i}] is {layer!r}, which is no layer"
                    + ("; make an instance: add ()" if isinstance(layer, type) else "")
                )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.layers))})"

    def with_children(self, layers: Any) -> Sequential:
        new = object.__new__(type(self))  # a subclass stays one, whatever its __init__ takes
        vars(new).update((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        vars(new)["layers"] = tuple(layers)
        return new

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        first = ("x",) if "x" in self.layers[0].reads else ()
        return first + (("y",) if "y" in self.layers[-1].reads else ())

    def init(self, key: Array) -> tuple[PyTree, ...]:
        keys = jax.random.split(key, len(self.layers))
        return tuple(layer.init(k) for layer, k in zip(self.layers, keys, strict=True))

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        own = self.split(params)
        keys = _keys_for(self.layers, key)
        boundaries, saved = [], []
        for i, layer in enumerate(self.layers):
            with inside(f"layers[{i}]", layer):
                x, kept = forward(layer, own[i], x, keys[i])
            boundaries.append(x if self._kept(i) else None)
            saved.append(kept)
        return x, (tuple(boundaries), tuple(saved))

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        boundaries, saved = trace.saved
        ends = (trace.x, *boundaries[:-1], trace.y)
        own, transports, auxes = (self.split(tree) for tree in (params, transport, aux))
        collected: list[PyTree] = []
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            x = ends[i] if "x" in layer.reads else None
            y = ends[i + 1] if "y" in layer.reads else None
            with inside(f"layers[{i}]", layer):
                delta, found = backward(
                    layer,
                    own[i],
                    Trace(x, y, saved[i]),
                    delta,
                    collect,
                    transports[i],
                    auxes[i],
                )
            collected.append(found)
        return delta, tuple(reversed(collected))

    def _kept(self, i: int) -> bool:
        """Whether the boundary behind layer i is stored here; the ends are the caller's."""
        if i + 1 == len(self.layers):
            return False
        return "y" in self.layers[i].reads or "x" in self.layers[i + 1].reads


def _keys_for(layers: tuple[Node, ...], key: Array | None) -> list[Array | None]:
    """A key for each layer that draws, None for the others."""
    drawing = [i for i, layer in enumerate(layers) if layer.draws]
    keys: list[Array | None] = [None] * len(layers)
    if key is not None and drawing:
        for i, own in zip(drawing, jax.random.split(key, len(drawing)), strict=True):
            keys[i] = own
    return keys
