"""Skip connections."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_key
from jbackprop.compose.checks import check_layers
from jbackprop.factored import PyTree
from jbackprop.sweep import Collect, Composite, Node, Trace, backward, forward, inside, keys_for


@dataclasses.dataclass(frozen=True)
class Skip(Composite):
    """A branch, and a way around it: y = x + f(x), or y = s(x) + f(x) with a layer as shortcut.

    Derivation. x reaches y in two ways, and its delta is the sum of what comes back by both:

        dC/dx = (dy/dx)^T dC/dy = (I + df/dx)^T delta = delta + (df/dx)^T delta

    with (ds/dx)^T delta for the first term where there is a shortcut. The delta reaches x even if
    the branch passes none, which is what makes very deep stacks trainable.

    What the branch gives is kept only if the branch reads it; it is not to be had from y by
    subtracting x, which would lose digits.

    Source: He, Zhang, Ren and Sun, Identity mappings in deep residual networks (2016), equations 1,
    2 and 5.

    Params: the branch's; with a shortcut a tuple (branch's, shortcut's).

    Attributes:
        branch: f, which keeps the shape that the shortcut gives.
        shortcut: s; by default x itself.

    Raises:
        ValueError: a branch that does not give the shape of what it is added to.
        TypeError: a branch or a shortcut that is no layer.
    """

    branch: Node
    shortcut: Node | None = None

    def __post_init__(self) -> None:
        check_layers(self, branch=self.branch)
        if self.shortcut is not None:
            check_layers(self, shortcut=self.shortcut)

    def __repr__(self) -> str:
        other = "" if self.shortcut is None else f", {self.shortcut}"
        return f"{type(self).__name__}({self.branch}{other})"

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return ("x",) if any("x" in layer.reads for layer in self._layers) else ()

    @property
    def _layers(self) -> tuple[Node, ...]:
        return tuple(self.children().values())

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{type(self).__name__}.init: key")
        keys = jax.random.split(key, len(self._layers))
        return self.join([layer.init(k) for layer, k in zip(self._layers, keys, strict=True)])

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        keys, kept, ways = keys_for(self._layers, key), [], []
        children = zip(self.children().items(), self.split(params), keys, strict=True)
        for (name, layer), own, own_key in children:
            with inside(name, layer):
                y, saved = forward(layer, own, x, own_key)
            kept.append((y if "y" in layer.reads else None, saved))
            ways.append(y)
        branch, around = ways[0], x if self.shortcut is None else ways[1]
        _check(self, branch, around)
        return jax.tree.map(jnp.add, around, branch), tuple(kept)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        ways, collected = [delta] if self.shortcut is None else [], []
        trees = (self.split(tree) for tree in (params, transport, aux))
        parts = zip(self.children().items(), trace.saved, *trees, strict=True)
        for (name, layer), (y, saved), own, own_transport, own_aux in parts:
            with inside(name, layer):
                delta_x, found = backward(
                    layer, own, layer.trace(trace.x, y, saved), delta, collect,
                    own_transport, own_aux,
                )  # fmt: skip
            ways.append(delta_x)
            collected.append(found)
        return jax.tree.map(jnp.add, *ways), self.join(collected)


def _check(skip: Skip, branch: Any, around: Any) -> None:
    shapes = [jax.tree.map(jnp.shape, way) for way in (branch, around)]
    if shapes[0] != shapes[1]:
        hint = (
            "give it a shortcut, Skip(branch, shortcut), that makes x the branch's shape"
            if skip.shortcut is None
            else "make the shortcut give the branch's shape"
        )
        raise ValueError(
            f"{type(skip).__name__}: the branch gives {shapes[0]}, to be added to {shapes[1]} "
            f"(B, ...): {hint}"
        )
