"""Looking at, and reaching into, every layer of a network without knowing how it is composed.

Both work by wrapping each layer in one that does a little more: `Observed` saves its output,
`Tapped` adds a parameter to it, whose gradient is by definition the layer's delta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored import Full, PyTree
from jbackprop.sweep import Layer, Node, Trace, as_told, forward, rebuild


@dataclasses.dataclass(frozen=True)
class Seen:
    """The output of one layer, and the path of that layer."""

    y: Any
    path: str


jax.tree_util.register_dataclass(Seen, ["y"], ["path"])


@dataclasses.dataclass(frozen=True)
class _Wrapper(Layer):
    inner: Layer

    @property
    def reads(self) -> tuple[str, ...]:
        return self.inner.reads

    @property
    def draws(self) -> bool:
        return self.inner.draws

    @property
    def couples_examples(self) -> bool:
        return self.inner.couples_examples

    def __repr__(self) -> str:
        return repr(self.inner)

    def init(self, key: Array) -> PyTree:
        raise NotImplementedError("a wrapped layer takes the parameters of the layer inside")


@dataclasses.dataclass(frozen=True, repr=False)
class Observed(_Wrapper):
    """A layer that saves its output, for the forward sweep only."""

    path: str

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, _ = self.inner.forward(params, x, key)
        return y, Seen(y, self.path)

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        raise NotImplementedError("Observed is for looking at the forward sweep")


@dataclasses.dataclass(frozen=True, repr=False)
class Tapped(_Wrapper):
    """A layer with a parameter, the tap, added to its output. Params: (the layer's, tap).

    The gradient of one example's cost with respect to the tap is that example's delta. The tap must
    be zero, so that what the layer reads of its output is the same with and without it.
    """

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        own, tap = params
        y, saved = self.inner.forward(own, x, key)
        return jax.tree.map(jnp.add, y, tap), saved

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        own, _ = params
        found = self.inner.backward(own, trace, delta)
        delta_x, factored = as_told(self.inner, own, found)
        return delta_x, (factored, jax.tree.map(lambda d: Full(d, "the delta itself"), delta))


def activations(
    net: Node, params: PyTree, x: Any, key: Array | None = None
) -> OrderedDict[str, Any]:
    """The output of every layer, (B, ...), by path in forward order.

    Args:
        net: a layer or a composite.
        params: its parameters.
        x: the inputs, (B, ...).
        key: for layers that draw.
    """
    return OrderedDict((seen.path, seen.y) for seen in _activations(net, params, x, key))


@functools.partial(jax.jit, static_argnums=0)
def _activations(net: Node, params: PyTree, x: Any, key: Array | None) -> list[Seen]:
    observed, _ = rebuild(net, params, lambda path, layer, own: (Observed(layer, path), own))
    _, saved = forward(observed, params, x, key)
    return seen_in(saved)


def seen_in(saved: Any) -> list[Seen]:
    """Every `Seen` in what a forward sweep saved, in forward order."""
    leaves = jax.tree.leaves(saved, is_leaf=lambda node: isinstance(node, Seen))
    return [leaf for leaf in leaves if isinstance(leaf, Seen)]


def tapped(net: Node, params: PyTree, x: Any) -> tuple[Node, PyTree]:
    """The network with a tap of zeros behind every layer, and its parameters."""
    shapes = jax.eval_shape(functools.partial(activations, net), params, x)

    def tap(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
        zeros = jax.tree.map(lambda y: jnp.zeros(y.shape[1:], y.dtype), shapes[path])
        return Tapped(layer), (own, zeros)

    return rebuild(net, params, tap)
