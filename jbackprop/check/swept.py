"""What `check.network` compares: the deltas and gradients of a network, by autodiff and by rules.

Everything comes in one structure: for the loss and for every layer, by path, a dictionary of
arrays. Of copies in a scanned composite they are stacked, as their parameters are. What is frozen
has no gradient to compare, but a delta and a dC/dx like any other layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored import PyTree, is_factored
from jbackprop.gradient import sweep
from jbackprop.losses import Loss
from jbackprop.observe import Observed, Seen, seen, tapped
from jbackprop.structure import stack_axes, walk
from jbackprop.sweep import (
    BATCH_AXIS,
    Collect,
    Composite,
    Layer,
    Node,
    Trace,
    backward,
    batch_size,
    forward,
    inside,
    total,
)


@dataclasses.dataclass(frozen=True, repr=False)
class _Entered(Observed):
    """A layer that saves its input and its key, for the forward sweep only."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, _ = self.inner.forward(params, x, key)
        return y, Seen((x, key), self.path)


@dataclasses.dataclass(frozen=True)
class _Melted(Composite):
    """In the place of a frozen composite: autodiff goes into it, so that its taps have a truth."""

    name: str
    layer: Node

    def children(self) -> dict[str, Node]:
        return {self.name: self.layer}

    def init(self, key: Array) -> PyTree:
        return self.layer.init(key)

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        with inside(self.name, self.layer):
            return forward(self.layer, params, x, key)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        raise NotImplementedError("for the forward sweep only")


def _melted(net: Node) -> Node:
    """The network with nothing frozen, at the same paths."""
    if not isinstance(net, Composite):
        return net
    layers = {name: _melted(child) for name, child in net.children().items()}
    if net.learns or len(layers) != 1:
        return net.with_children(list(layers.values()))
    return _Melted(*next(iter(layers.items())))


def learns(net: Node) -> dict[str, bool]:
    """By path, whether a layer has gradients: not, if it or anything around it is frozen."""

    def each(node: Node, path: str, on: bool) -> Iterator[tuple[str, bool]]:
        on = on and node.learns
        if not isinstance(node, Composite):
            yield path or "net", on
            return
        for name, child in node.children().items():
            yield from each(child, f"{path}.{name}" if path else name, on)

    return dict(each(net, "", True))


def inputs_of(
    net: Node, params: PyTree, x: Any, key: Array | None
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """By path the input of every layer, and its examples' keys; and the outputs of the last."""
    entered = seen(net, params, x, _Entered, key)
    inputs = {path: x for path, (x, _) in entered.items()}
    keys = {path: keys for path, (_, keys) in entered.items()}
    return inputs, keys, forward(net, params, x, key)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_autodiff(net: Node, loss: Loss, point: Any, key: Array | None) -> dict[str, Any]:
    """The truth, where the dtype is float64."""
    params, x, y = point
    taps, both = tapped(_melted(net), params, x)

    def costs(both: PyTree, x: Any, y: Any) -> Array:
        return loss.value(forward(taps, both, x, key)[0], y)

    def cost(*at: Any) -> Array:
        return jnp.sum(costs(*at))

    def deltas_of_one(example: Any) -> dict[str, Any]:
        g = jax.grad(cost)(both, *jax.tree.map(lambda leaf: leaf[None], example))
        return {path: part[1] for path, _, part in walk(net, g)}

    if key is None or not net.draws:
        of_each = jax.vmap(deltas_of_one)((x, y))
    else:  # alone, an example would draw otherwise: its own cost, among all the others
        _, back = jax.vjp(lambda both: costs(both, x, y), both)

        def deltas_by_cost(chosen: Array) -> dict[str, Any]:
            return {path: part[1] for path, _, part in walk(net, back(chosen)[0])}

        value = jax.eval_shape(costs, both, x, y)
        of_each = jax.vmap(deltas_by_cost)(jnp.eye(batch_size(x), dtype=value.dtype))
    stacks = stack_axes(net)
    deltas = {  # (B, copies, ...) -> (copies, B, ...)
        path: jax.tree.map(lambda d, k=stacks[path]: jnp.moveaxis(d, 0, k), delta)
        for path, delta in of_each.items()
    }
    entered, keys, z = inputs_of(net, params, x, key)
    delta = jax.grad(lambda z: jnp.sum(loss.value(z, y)))(z)
    found: dict[str, Any] = {"loss": {"delta": delta, "value": loss.value(z, y)}}
    learning = learns(net)
    for path, _, (own, _) in walk(net, jax.grad(cost)(both, x, y)):
        found[path] = {"delta": deltas[path]} | ({"gradient": own} if learning[path] else {})
    for path, layer, own in walk(net, params):
        by_vjp = over_copies(functools.partial(_by_vjp, layer), stacks[path])
        found[path]["dC/dx"] = by_vjp(own, entered[path], keys[path], deltas[path])
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_rule(net: Node, loss: Loss, point: Any, key: Array | None) -> dict[str, Any]:
    """All together, as the sweep has them."""
    params, x, y = point
    taps, both = tapped(net, params, x)

    def collect(factored: PyTree, delta: Any, aux: Any) -> PyTree:
        own, _ = factored
        own = jax.tree.map(lambda pair: pair.total(), own, is_leaf=is_factored)
        return {"delta": delta, "gradient": own}

    swept = sweep(taps, loss, both, x, y, collect, key=key)
    found: dict[str, Any] = {}
    learning = learns(net)
    for path, _, part in walk(net, swept.collected):
        found[path] = dict(part) if isinstance(part, dict) else {}
        if not learning[path]:  # zeros, by design
            found[path].pop("gradient", None)
    value, delta = loss.value_and_delta(swept.outputs, y)  # which is what the sweep starts from
    return found | {"loss": {"delta": delta, "value": value}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_each_rule(
    net: Node, loss: Loss, point: Any, key: Array | None, deltas: dict[str, Any]
) -> dict[str, Any]:
    """Each layer by itself, with the true delta handed in."""
    params, x, y = point
    entered, keys, z = inputs_of(net, params, x, key)
    found: dict[str, Any] = {"loss": {"delta": loss.delta(z, y)}}
    stacks, learning = stack_axes(net), learns(net)
    for path, layer, own in walk(net, params):
        if not jax.tree.leaves((deltas[path], own)):  # it hands integers on
            continue
        alone = over_copies(functools.partial(_by_its_rule, layer), stacks[path])
        found[path] = alone(own, entered[path], keys[path], deltas[path])
        if not learning[path]:
            del found[path]["gradient"]
    return found


def _swept_alone(layer: Layer, own: PyTree, x: Any, keys: Array | None) -> tuple[Any, Any]:
    """The forward of one layer, with the keys that its examples have had in the network."""
    if keys is None:
        return forward(layer, own, x)
    return jax.vmap(layer.forward, in_axes=(None, 0, 0), axis_name=BATCH_AXIS)(own, x, keys)


def _by_its_rule(
    layer: Layer, own: PyTree, x: Any, keys: Array | None, delta: Any
) -> dict[str, Any]:
    z, saved = _swept_alone(layer, own, x, keys)
    delta = jax.tree.map(lambda v, d: None if d is None else d.astype(v.dtype), z, delta)
    delta_x, own = backward(layer, own, layer.trace(x, z, saved), delta, total)
    return {"gradient": own, "dC/dx": floats(delta_x, x)}


def over_copies(rule: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """The rule of one copy for stacks of them."""
    for _ in range(axes):
        rule = jax.vmap(rule)
    return rule


def floats(delta_x: Any, x: Any) -> Any:
    """A tree like x with None at its integer leaves."""
    return jax.tree.map(
        lambda v, d: d if jnp.issubdtype(jnp.result_type(v), jnp.floating) else None, x, delta_x
    )


def _by_vjp(layer: Layer, own: PyTree, x: Any, keys: Array | None, delta: Any) -> Any:
    """delta times the Jacobian of the layer's own forward by x; None at integer leaves."""
    leaves, tree = jax.tree.flatten(x)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def of(floats: list[Any]) -> Any:
        left = iter(floats)
        full = [next(left) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        z, _ = _swept_alone(layer, own, jax.tree.unflatten(tree, full), keys)
        outputs = jax.tree.leaves(z)
        return [y for y in outputs if jnp.issubdtype(y.dtype, jnp.floating)]

    _, back = jax.vjp(of, [leaf for m, leaf in zip(moves, leaves, strict=True) if m])
    found = iter(back(jax.tree.leaves(delta))[0])
    return jax.tree.unflatten(tree, [next(found) if m else None for m in moves])


def output_of(layer: Layer, own: PyTree, x: Any, keys: Array | None = None) -> Any:
    """The output of one layer for a mini-batch."""
    return _swept_alone(layer, own, x, keys)[0]
