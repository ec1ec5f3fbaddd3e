"""Looking at, and reaching into, every layer of a network without knowing how it is composed.

Both work by wrapping each layer in one that does a little more: `Observed` saves its output,
`Tapped` adds a parameter to it, whose gradient is by definition the layer's delta.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.calls import check_inputs
from jbackprop.factored import Full, PyTree
from jbackprop.mesh import examples, on_mesh, stacked
from jbackprop.mesh import shapes as shapes_of
from jbackprop.structure import by_copy, opened, rebuild, stack_axes
from jbackprop.sweep import Layer, Node, Trace, as_told, forward


@dataclasses.dataclass(frozen=True)
class Seen:
    """The output of one layer, and the path of that layer."""

    y: Any
    path: str


jax.tree_util.register_dataclass(Seen, ["y"], ["path"])


@dataclasses.dataclass(frozen=True)
class Wrapper(Layer):
    """A layer that does a little more than the one inside."""

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
class Observed(Wrapper):
    """A layer that saves its output, for the forward sweep only."""

    path: str

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, _ = self.inner.forward(params, x, key)
        return y, Seen(y, self.path)

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        raise NotImplementedError("Observed is for looking at the forward sweep")


@dataclasses.dataclass(frozen=True, repr=False)
class Tapped(Wrapper):
    """A layer with a parameter, the tap, added to its output. Params: (the layer's, tap).

    The gradient of one example's cost with respect to the tap is that example's delta. The tap must
    be zero, so that what the layer reads of its output is the same with and without it.
    """

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        own, tap = params
        y, saved = self.inner.forward(own, x, key)
        return jax.tree.map(lambda v, t: v if t is None else v + t, y, tap), saved

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        own, _ = params
        found = self.inner.backward(own, trace, delta)
        delta_x, factored = as_told(self.inner, own, found)
        return delta_x, (factored, jax.tree.map(lambda d: Full(d, "the delta itself"), delta))


def activations(
    net: Node, params: PyTree, x: Any, key: Array | None = None
) -> OrderedDict[str, Any]:
    """The output of every layer, (B, ...), by path in forward order.

    The copies of a layer in a scanned composite are told apart: `layers[1].layer[0]`, ...

    Args:
        net: a layer or a composite.
        params: its parameters.
        x: the inputs, (B, ...).
        key: for layers that draw; None draws nothing.

    Raises:
        ValueError, TypeError: inputs or parameters that do not fit.
    """
    check_inputs(net, params, x, key)
    return by_copy(net, _activations(net, params, x, key))


def seen_split(net: Node, params: PyTree, x: Any, *_: Any) -> dict[str, Any]:
    """On a mesh of explicit axes: what is seen of every layer, as the examples are split."""
    return {path: stacked(examples(x), axes) for path, axes in stack_axes(net).items()}


@on_mesh(seen_split)
@functools.partial(jax.jit, static_argnums=0)
def _activations(net: Node, params: PyTree, x: Any, key: Array | None) -> dict[str, Any]:
    return seen(net, params, x, Observed, key)


def seen(
    net: Node,
    params: PyTree,
    x: Any,
    wrap: Callable[[Layer, str], Node],
    key: Array | None = None,
) -> dict[str, Any]:
    """What the layers that `wrap` (layer, path) makes have `Seen` on a forward sweep, by path.

    Of copies in a scanned composite it is stacked, (copies, B, ...).
    """
    observed, _ = rebuild(opened(net), params, lambda path, layer, own: (wrap(layer, path), own))
    _, saved = forward(observed, params, x, key)
    leaves = jax.tree.leaves(saved, is_leaf=lambda node: isinstance(node, Seen))
    return {leaf.path: leaf.y for leaf in leaves if isinstance(leaf, Seen)}


def tapped(
    net: Node,
    params: PyTree,
    x: Any,
    wrap: Callable[[Layer], Layer] = Tapped,
    *,
    all_layers: bool = True,
) -> tuple[Node, PyTree]:
    """The network with a tap of zeros behind every layer, and its parameters.

    Behind copies that are scanned the taps are stacked as their parameters are. Not `all_layers`:
    behind those with weights.
    """
    shapes = jax.eval_shape(functools.partial(_activations, net, key=None), *shapes_of((params, x)))
    stacks = stack_axes(net)

    def tap(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
        if not (all_layers or jax.tree.leaves(own)):
            return layer, own

        def zeros(y: Any) -> Any:
            shape = y.shape[: stacks[path]] + y.shape[stacks[path] + 1 :]
            return jnp.zeros(shape, y.dtype) if jnp.issubdtype(y.dtype, jnp.floating) else None

        return wrap(layer), (own, jax.tree.map(zeros, shapes[path]))

    return rebuild(net, params, tap)
