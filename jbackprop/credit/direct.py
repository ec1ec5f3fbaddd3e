"""Rules in which the error at the output goes to every layer directly."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from jbackprop.credit.carriers import (
    carriers,
    check_single,
    check_untied,
    example_of,
    inputs_of,
)
from jbackprop.credit.rule import Info, Rule, State, keep, taken_apart
from jbackprop.factored import Nothing, PyTree
from jbackprop.gradient import sweep_forward
from jbackprop.losses import Loss
from jbackprop.losses.canonical import Canonical
from jbackprop.mesh import shapes as shapes_of
from jbackprop.objective import weighting
from jbackprop.observe import Wrapper
from jbackprop.structure import opened, rebuild, stack_axes, walk
from jbackprop.sweep import Composite, Layer, Node, Trace, as_told, backward, batch_size, forward

_glorot = initializers.glorot_uniform()


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where the error of each example goes in a trace, when it is known."""

    error: Any
    path: str


jax.tree_util.register_dataclass(_Slot, ["error"], ["path"])


@dataclasses.dataclass(frozen=True, repr=False)
class _Direct(Wrapper):
    """A layer behind which the delta is the error, by feedback weights. Params: (its own, B)."""

    path: str

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, saved = self.inner.forward(params[0], x, key)
        return y, (saved, _Slot(None, self.path))

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        own, feedback = params
        saved, slot = trace.saved
        told = self.inner.backward(own, trace._replace(saved=saved), delta)
        delta_x, factored = as_told(self.inner, own, told)
        if slot.error is None:
            raise ValueError(f"the error does not come to {self}")
        none = Nothing(jnp.zeros(0), None)
        return _project(slot.error, feedback, delta_x), (factored, none)


def _project(error: Array, feedback: Array, delta_x: Array) -> Array:
    """e B, in the shape of one example's delta; position by position where both have the same."""
    if error.ndim == 1 or feedback.shape[0] != error.shape[-1]:
        error = error.reshape(-1)
    return jnp.dot(error, feedback).reshape(delta_x.shape).astype(delta_x.dtype)


@dataclasses.dataclass(frozen=True)
class DirectFeedbackAlignment(Rule):
    """The error at the output goes to every layer by fixed random weights:

        delta^l = (e B^l) * f'(z^l),         e = dC/do, of the network's outputs o

    in place of delta^{l+1} (W^{l+1})^T: wherever a weight would carry a delta from its outputs to
    its inputs, e B comes to its inputs instead. Norms, gains, pooling and activations pass on what
    comes as ever, and a skip connection adds what comes around its branch to it. The last layer's
    delta, and so its gradient, is that of backpropagation.

    Source: Nokland, Direct feedback alignment provides learning in deep neural networks (2016).

    Initialisation: Glorot and Bengio's uniform one, of B as a matrix from e to the layer's inputs.
    Where both e and the inputs have the same positions (tokens), B serves each position by itself.

    Assumes: that each layer has one weight that carries (not `LSTM`). A `Checkpoint` keeps its
    traces here: nothing is done again on the way back.

    Raises:
        ValueError: in `init`, sizes of activations that do not follow from the parameters, if no x
            is given.
    """

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        name = type(self).__name__
        kept = carriers(net, params, name)
        check_untied(net, name)
        check_single(net, kept, name)
        _check_opens(net, name)
        x = example_of(net, params, name) if x is None else x
        shapes = inputs_of(net, params, x)
        error = jax.eval_shape(
            lambda params, x: forward(net, params, x)[0], *shapes_of((params, x))
        ).shape[1:]
        axes = stack_axes(net)
        keys = iter(jax.random.split(key, sum(1 for _ in walk(net))))

        def of(path: str, layer: Layer, own: PyTree) -> tuple[Node, Any]:
            drawn, weights = next(keys), jax.tree.leaves(own)
            if not weights:
                return layer, None
            copies = weights[0].shape[: axes[path]]
            shape = shapes[path].shape[axes[path] + 1 :]
            sizes = math.prod(error), math.prod(shape)
            if len(error) > 1 and error[:-1] == shape[:-1]:
                sizes = error[-1], shape[-1]
            flat = jax.random.split(drawn, math.prod(copies))
            made = [_glorot(own_key, sizes, weights[0].dtype) for own_key in flat]
            return layer, jnp.stack(made).reshape(*copies, *sizes)

        return rebuild(net, kept, of)[1]

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        net, loss, n = state.net, state.loss, batch_size(x)
        found = walk(net, state.learned)
        feedback: dict[str, Any] = {
            path: own if jax.tree.leaves(own) else None for path, _, own in found
        }

        def wrapped(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
            if feedback[path] is None:
                return layer, own
            return _Direct(layer, path), (own, feedback[path])

        direct, both = rebuild(opened(net), params, wrapped)
        _, divisor, scale = weighting(net, params, None, n)
        losses, outputs, delta, trace = sweep_forward(direct, loss, both, x, y, key, scale)
        error = self.error(loss, outputs, y, delta, 1.0 if scale is None else scale)
        axes = stack_axes(net)

        def filled(slot: Any) -> Any:
            if not isinstance(slot, _Slot):
                return slot
            copies = feedback[slot.path].shape[: axes[slot.path]]
            return _Slot(jnp.broadcast_to(error, copies + error.shape), slot.path)

        def unwrapped(path: str, layer: Layer, own: Any) -> tuple[Node, Any]:
            if feedback[path] is None:
                return layer, own
            return layer, own._replace(factored=own.factored[0])

        saved = jax.tree.map(filled, trace.saved, is_leaf=lambda v: isinstance(v, _Slot))
        _, kept = backward(direct, both, trace._replace(saved=saved), delta, keep)
        factor = 1 if scale is None else n
        grads, deltas = taken_apart(net, rebuild(net, kept, unwrapped)[1], divisor, factor)
        return grads, Info(jnp.mean(losses), outputs, deltas)

    def error(self, loss: Loss, outputs: Array, y: Any, delta: Array, scale: float) -> Array:
        """What goes to every layer, (B, ...) like the outputs, times `scale`."""
        return delta


def _check_opens(node: Node, rule: str) -> None:
    if isinstance(node, Composite) and node.inverts and node.copies is None:
        raise ValueError(
            f"{rule} is not defined for {node}: it recovers its inputs on the way back, where the "
            "error cannot be handed to its layers; use Skip"
        )
    for child in node.children().values() if isinstance(node, Composite) else ():
        _check_opens(child, rule)


@dataclasses.dataclass(frozen=True)
class DirectRandomTargetProjection(DirectFeedbackAlignment):
    """The target itself goes to every layer by fixed random weights, before any output is known:

        delta^l = -(y B^l) * f'(z^l)

    for the target y of a canonical loss: labels as one-hot vectors, else the values. It is direct
    feedback alignment with e = o - y taken for -y, and needs no backward phase. The last layer's
    delta is o - y as ever.

    Source: Frenkel, Lefebvre and Bol, Learning without feedback: fixed random learning signals
    allow for feedforward training of deep neural networks (2021), where it is + y B: as B is
    symmetric about 0, either is as likely.

    Initialisation: as for `DirectFeedbackAlignment`.

    Assumes: a canonical loss, whose output delta is o - y (labels are projected as one-hot vectors,
    smoothed or not); that the sign of the error follows from the target, as it does for one-hot
    targets and outputs between 0 and 1.

    Raises:
        ValueError: another loss.
    """

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        weighs = [getattr(self.loss, name, None) for name in ("class_weights", "ignore_index")]
        if not isinstance(self.loss, Canonical) or weighs != [None, None]:
            raise ValueError(
                f"DirectRandomTargetProjection is not defined for {self.loss}: it needs a "
                "canonical loss, whose delta is o - y for every class and position, such as "
                "SoftmaxCrossEntropy(), SigmoidCrossEntropy() or SquaredError()"
            )
        return super().begin(key, net, params, x)

    def error(self, loss: Loss, outputs: Array, y: Any, delta: Array, scale: float) -> Array:
        y = jnp.asarray(y)
        if jnp.issubdtype(y.dtype, jnp.integer) and y.ndim < outputs.ndim:
            y = jax.nn.one_hot(y, outputs.shape[-1], dtype=delta.dtype)
        positions = math.prod(outputs.shape[1:-1])
        return (-scale / max(positions, 1)) * y.astype(delta.dtype)
