"""Backpropagation with the lid off: costs, deltas and pairs of a mini-batch, and sums of its pairs.

Costs and deltas are per example and unscaled everywhere. Dividing by the size of the batch, or
weighting in any other way, happens once, on the pairs (activation, delta); where a layer couples
the examples, so that a pair is no longer one example's, at the output delta instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.calls import (
    about_coupling,
    check_call,
    check_inputs,
    check_net,
    check_weights,
    coupling_layer,
)
from jbackprop.checks import check_params, real_array
from jbackprop.factored import Coupled, Factored, PyTree, is_factored, weighted
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, examples, on_mesh, stacked
from jbackprop.structure import by_copy, rebuild, stack_axes, suffix, walk
from jbackprop.sweep import Collect, Node, Trace, backward, forward, total


class Kept(NamedTuple):
    """What `backprop` keeps of one layer: its delta dC/dz (B, ...), and its factored gradients."""

    delta: Any
    factored: PyTree


@dataclasses.dataclass(frozen=True)
class Backprop:
    """One mini-batch, swept forward and back. Every cost and every delta is one example's own.

    Where a layer couples the examples (`BatchNorm`), a delta before it is that of the summed costs,
    and the pairs are `Coupled`: they have a total, and raise where one example's part is asked for.

    Attributes:
        losses: C_n, (B,), float32 at least.
        outputs: the outputs of the last layer, (B, ...): net inputs, for the canonical losses.
        delta_x: dC/dx, in x's structure; None at integer leaves.
        kept: a tree like params, with `Kept` in the place of each layer that has weights.
        net: the network.
    """

    losses: Array
    outputs: Array
    delta_x: Any
    kept: PyTree
    net: Node

    @property
    def factored(self) -> PyTree:
        """A tree like params of factored gradients: `Outer`, `Shift`, ..."""
        return rebuild(self.net, self.kept, lambda path, layer, own: (layer, collected(own)))[1]


jax.tree_util.register_dataclass(Backprop, ["losses", "outputs", "delta_x", "kept"], ["net"])


def collected(kept: Any) -> PyTree:
    """What was collected of one layer, without its delta."""
    return kept.factored if isinstance(kept, Kept) else kept


def _named(path: str, kept: Any) -> Any:
    """The path of its parameter for every factored gradient of one layer."""
    if not isinstance(kept, Kept):
        return kept

    def name(where: Any, pair: Factored) -> Factored:
        assert pair.place is not None
        place = dataclasses.replace(pair.place, path=path + suffix(where))
        return dataclasses.replace(pair, place=place)  # type: ignore[type-var]

    pairs = jax.tree_util.tree_map_with_path(name, kept.factored, is_leaf=is_factored)
    return Kept(kept.delta, pairs)


class Ahead(NamedTuple):
    """The result of one forward sweep: costs, outputs, the output delta, and the trace."""

    losses: Array
    outputs: Any
    delta: Any
    trace: Trace


class Swept(NamedTuple):
    """The result of one forward and one backward sweep."""

    losses: Array
    outputs: Any
    delta_x: Any
    collected: PyTree


def sweep_forward(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None = None,
    output_weights: Array | float | None = None,
) -> Ahead:
    """Forward, and the loss's delta, which is multiplied by `output_weights`.

    They are one number for all examples, or (B,).
    """
    outputs, saved = forward(net, params, x, key)
    losses, delta = loss.value_and_delta(outputs, y)
    shapes = jnp.shape(losses), jnp.shape(delta)
    if shapes != (outputs.shape[:1], outputs.shape):
        raise ValueError(
            f"{loss}: value and delta have the shapes {shapes[0]} and {shapes[1]} for outputs "
            f"{outputs.shape}; they must be {outputs.shape[:1]}, one cost for each example, and "
            f"{outputs.shape}"
        )
    delta = scaled(delta, output_weights)
    # The delta is read by several; made once, it keeps XLA from making it anew for each of them.
    losses, delta = jax.lax.optimization_barrier((losses, delta))
    return Ahead(losses, outputs, delta, net.trace(x, outputs, saved))


def sweep(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    collect: Collect,
    *,
    transport: PyTree = None,
    key: Array | None = None,
    output_weights: Array | float | None = None,
) -> Swept:
    """Forward, the loss's delta, backward."""
    if net.couples_examples:
        collect = _of_all(net, collect)
    losses, outputs, delta, trace = sweep_forward(net, loss, params, x, y, key, output_weights)
    delta_x, collected = backward(net, params, trace, delta, collect, transport)
    return Swept(losses, outputs, delta_x, collected)


def _of_all(net: Node, collect: Collect) -> Collect:
    """The same, of pairs that have no answer to questions about one example."""
    why = about_coupling(net, "the gradient of one of them")

    def shares(factored: PyTree, delta: Any, aux: Any) -> PyTree:
        coupled = jax.tree.map(
            lambda pair: Coupled(pair, why, pair.place), factored, is_leaf=is_factored
        )
        return collect(coupled, delta, aux)

    return shares


def scaled(delta: Array, weights: Array | float | None) -> Array:
    """A delta times one number, or times one for each example."""
    if weights is None:
        return delta
    if isinstance(weights, float):
        return weights * delta
    return weighted(weights, delta).astype(delta.dtype)


def _split(net: Node, loss: Loss, params: PyTree, x: Any, *_: Any) -> Backprop:
    """On a mesh of explicit axes: all that is kept as the examples are split."""
    split, stacks = examples(x), stack_axes(net)

    def kept(path: str, layer: Node, own: PyTree) -> tuple[Node, PyTree]:
        return layer, Kept(stacked(split, stacks[path]), split) if jax.tree.leaves(own) else own

    return Backprop(split, split, split, rebuild(net, params, kept)[1], net)


@on_mesh(_split)
@functools.partial(jax.jit, static_argnums=(0, 1))
def _backprop(
    net: Node, loss: Loss, params: PyTree, x: Any, y: Any, transport: PyTree, key: Array | None
) -> Backprop:
    def keep(factored: PyTree, delta: Any, aux: Any) -> Kept:
        return Kept(delta, factored)

    swept = sweep(net, loss, params, x, y, keep, transport=transport, key=key)
    _, kept = rebuild(net, swept.collected, lambda path, layer, kept: (layer, _named(path, kept)))
    return Backprop(swept.losses, swept.outputs, swept.delta_x, kept, net)


def backprop(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    transport: PyTree = None,
    key: Array | None = None,
) -> Backprop:
    """Backpropagation with the lid off: every cost, every delta and every pair of a mini-batch.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: the network's parameters.
        x: the inputs, (B, ...).
        y: the targets, as the loss wants them.
        transport: a tree like params that carries the deltas in place of the weights; see
            `jbackprop.sweep.backward`.
        key: for layers that draw random numbers; None draws nothing.

    Returns:
        A `Backprop`. Nothing in it is divided by anything: costs, deltas and pairs are those of
        each example's own cost. `gradient`, `deltas` and the like take it.

    Raises:
        ValueError: inputs, targets, parameters or transport that do not fit; the message names the
            layer. Values of targets are checked where they can be seen, that is outside jit.
        TypeError: integers where floating-point numbers are due, or the other way round.
    """
    check_call(net, loss, params, x, y, key)
    check_params(transport, "transport")
    bp = _backprop(net, loss, params, x, y, transport, key)
    loss.check(jnp.shape(bp.outputs), y)
    return bp


def gradient(bp: Backprop | PyTree, weights: Array | None = None) -> PyTree:
    """sum_n weights_n dC_n/dparams, in the shapes and dtypes of params.

    Args:
        bp: from `backprop`, or a tree of factored gradients, as from `capture`.
        weights: (B,), by default 1/B each, which is the mean over the batch. An example of weight
            0 is not there, even if it holds NaN (but it has its part in a batch norm's statistics).

    Raises:
        ValueError: weights of another shape, weights where a layer couples the examples (their
            pairs are not one example's; give the weights to `value_and_grad` instead), or the mean
            over an empty batch.
        TypeError: what is neither.
    """
    factored = bp.factored if isinstance(bp, Backprop) else bp
    pairs = jax.tree.leaves(factored, is_leaf=is_factored)
    if not isinstance(bp, Backprop) and not (pairs and all(map(is_factored, pairs))):
        raise TypeError(
            "gradient takes what backprop gives, or a tree of factored gradients, not "
            f"{type(bp).__name__}; capture gives (costs, factored)"
        )
    n = bp.losses.shape[0] if isinstance(bp, Backprop) else pairs[0].size
    weights = None if weights is None else real_array("weights", weights)
    check_weights(weights, n)
    if isinstance(bp, Backprop) and weights is not None and bp.net.couples_examples:
        raise ValueError(
            f"{coupling_layer(bp.net)} couples the examples, so that weights cannot be put on "
            "their pairs; use value_and_grad(net, loss)(params, x, y, weights)"
        )
    return _summed(factored, weights, n)


@on_mesh(lambda *_: WHOLE)
def _summed(factored: PyTree, weights: Array | None, n: int) -> PyTree:
    return jax.tree.map(
        lambda pair: _cast(pair.total(weights), pair, 1 if weights is not None else n),
        factored,
        is_leaf=is_factored,
    )


def _cast(total: Array, pair: Factored, divisor: int) -> Array:
    return (total if divisor == 1 else total / divisor).astype(pair.home.dtype)


def deltas(bp: Backprop) -> OrderedDict[str, Any]:
    """The delta of every layer that has weights, dC_n/dz_n (B, ...), by path, first layer first.

    z is the layer's output: the net input of the activation behind it; where it is a tuple, so is
    the delta. Unscaled: the mean cost's deltas are these divided by B. The copies of a layer in a
    scanned composite are told apart: `layers[1].layer[0]`, ...

    Raises:
        TypeError: what `backprop` did not give.
    """
    if not isinstance(bp, Backprop):
        raise TypeError(
            f"deltas takes what backprop gives, not {type(bp).__name__}: nothing else keeps them"
        )
    return deltas_of(bp.net, bp.kept)


def deltas_of(net: Node, tree: PyTree) -> OrderedDict[str, Any]:
    """The delta of every `Kept` of a tree like the network's params, by path."""
    found = walk(net, tree)
    return by_copy(net, {path: kept.delta for path, _, kept in found if isinstance(kept, Kept)})


def as_function(net: Node) -> Callable[..., Any]:
    """The network as a function whose reverse rule, under `jax.grad`, is the hand-written one.

    For use inside any other JAX model.

    Args:
        net: a layer or a composite.

    Returns:
        A function (params, x, key=None) -> outputs with a `jax.custom_vjp`, for mini-batches x
        (B, ...): beside layers that take one example, such as Equinox's, those go under `jax.vmap`.
        The key is for layers that draw; None draws nothing. The same function for equal networks.
        Like every `custom_vjp` it has no forward mode. It raises as `backprop` does.

    Raises:
        TypeError: what is no network.
    """
    check_net(net)
    return _as_function(net)


@functools.lru_cache(maxsize=256)
def _as_function(net: Node) -> Callable[..., Any]:
    @jax.custom_vjp
    def function(params: PyTree, x: Any, key: Array | None = None) -> Any:
        return forward(net, params, x, key)[0]

    def there(params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        outputs, saved = forward(net, params, x, key)
        return outputs, (params, net.trace(x, outputs, saved))

    def back(residuals: Any, delta: Any) -> tuple[PyTree, Any, None]:
        params, trace = residuals
        delta_x, grads = backward(net, params, trace, delta, total)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), delta_x, None

    function.defvjp(there, back)

    split = on_mesh(lambda params, x, key=None: examples(x))(function)

    def checked(params: PyTree, x: Any, key: Array | None = None) -> Any:
        check_inputs(net, params, x, key)
        return split(params, x, key)

    return checked
