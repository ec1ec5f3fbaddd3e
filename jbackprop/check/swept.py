"""What `check.network` compares: the deltas and gradients of a network, by autodiff and by rules.

Everything comes in one structure: for the loss and for every layer, by path, a dictionary of
arrays. Of copies in a scanned composite they are stacked, as their parameters are.
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
from jbackprop.sweep import Composite, Layer, Node, backward, forward, total


@dataclasses.dataclass(frozen=True, repr=False)
class _Entered(Observed):
    """A layer that saves its input, for the forward sweep only."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, _ = self.inner.forward(params, x, key)
        return y, Seen(x, self.path)


def inputs_of(net: Node, params: PyTree, x: Any) -> tuple[dict[str, Any], Any]:
    """The input of every layer, by path; and the outputs of the last."""
    return seen(net, params, x, _Entered), forward(net, params, x)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_autodiff(net: Node, loss: Loss, point: Any) -> dict[str, Any]:
    """The truth, where the dtype is float64."""
    params, x, y = point
    taps, both = tapped(net, params, x)

    def cost(both: PyTree, x: Any, y: Any) -> Array:
        return jnp.sum(loss.value(forward(taps, both, x)[0], y))

    def deltas_of_one(example: Any) -> dict[str, Any]:
        g = jax.grad(cost)(both, *jax.tree.map(lambda leaf: leaf[None], example))
        return {path: part[1] for path, _, part in learning(net, g)}

    stacks = stack_axes(net)
    deltas = {  # (B, copies, ...) -> (copies, B, ...)
        path: jax.tree.map(lambda d, k=stacks[path]: jnp.moveaxis(d, 0, k), delta)
        for path, delta in jax.vmap(deltas_of_one)((x, y)).items()
    }
    entered, z = inputs_of(net, params, x)
    delta = jax.grad(lambda z: jnp.sum(loss.value(z, y)))(z)
    found: dict[str, Any] = {"loss": {"delta": delta, "value": loss.value(z, y)}}
    for path, _, (own, _) in learning(net, jax.grad(cost)(both, x, y)):
        found[path] = {"delta": deltas[path], "gradient": own}
    for path, layer, own in learning(net, params):
        by_vjp = over_copies(functools.partial(_by_vjp, layer), stacks[path])
        found[path]["dC/dx"] = by_vjp(own, entered[path], deltas[path])
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_rule(net: Node, loss: Loss, point: Any) -> dict[str, Any]:
    """All together, as the sweep has them."""
    params, x, y = point
    taps, both = tapped(net, params, x)

    def collect(factored: PyTree, delta: Any, aux: Any) -> PyTree:
        own, _ = factored
        own = jax.tree.map(lambda pair: pair.total(), own, is_leaf=is_factored)
        return {"delta": delta, "gradient": own}

    swept = sweep(taps, loss, both, x, y, collect)
    parts = ((path, part) for path, _, part in learning(net, swept.collected))
    found = {path: part if isinstance(part, dict) else {} for path, part in parts}
    value, delta = loss.value_and_delta(swept.outputs, y)  # which is what the sweep starts from
    return found | {"loss": {"delta": delta, "value": value}}


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_each_rule(net: Node, loss: Loss, point: Any, deltas: dict[str, Any]) -> dict[str, Any]:
    """Each layer by itself, with the true delta handed in."""
    params, x, y = point
    entered, z = inputs_of(net, params, x)
    found: dict[str, Any] = {"loss": {"delta": loss.delta(z, y)}}
    stacks = stack_axes(net)
    for path, layer, own in learning(net, params):
        if not jax.tree.leaves((deltas[path], own)):  # it hands integers on
            continue
        alone = over_copies(functools.partial(_by_its_rule, layer), stacks[path])
        found[path] = alone(own, entered[path], deltas[path])
    return found


def _by_its_rule(layer: Layer, own: PyTree, x: Any, delta: Any) -> dict[str, Any]:
    z, saved = forward(layer, own, x)
    delta = jax.tree.map(lambda v, d: None if d is None else d.astype(v.dtype), z, delta)
    delta_x, own = backward(layer, own, layer.trace(x, z, saved), delta, total)
    return {"gradient": own, "dC/dx": floats(delta_x, x)}


def learning(net: Node, tree: PyTree = None) -> list[tuple[str, Layer, PyTree]]:
    """As `walk`, without what is frozen: there is nothing to compare."""

    def frozen(node: Node, path: str) -> Iterator[str]:
        if not node.learns:
            yield path
        elif isinstance(node, Composite):
            for name, child in node.children().items():
                yield from frozen(child, f"{path}.{name}" if path else name)

    paths = list(frozen(net, ""))
    return [
        found
        for found in walk(net, tree)
        if not any(found[0] == p or found[0].startswith(f"{p}.") or not p for p in paths)
    ]


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


def _by_vjp(layer: Layer, own: PyTree, x: Any, delta: Any) -> Any:
    """delta times the Jacobian of the layer's own forward by x; None at integer leaves."""
    leaves, tree = jax.tree.flatten(x)
    moves = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def of(floats: list[Any]) -> Any:
        left = iter(floats)
        full = [next(left) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        outputs = jax.tree.leaves(forward(layer, own, jax.tree.unflatten(tree, full))[0])
        return [y for y in outputs if jnp.issubdtype(y.dtype, jnp.floating)]

    _, back = jax.vjp(of, [leaf for m, leaf in zip(moves, leaves, strict=True) if m])
    found = iter(back(jax.tree.leaves(delta))[0])
    return jax.tree.unflatten(tree, [next(found) if m else None for m in moves])


def output_of(layer: Layer, own: PyTree, x: Any) -> Any:
    """The output of one layer for a mini-batch."""
    return forward(layer, own, x)[0]
