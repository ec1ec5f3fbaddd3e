"""The mean cost of a mini-batch, or any weighted sum, and its gradient alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.calls import (
    check_call,
    check_inputs,
    check_loss,
    check_net,
    check_weights,
    refuse_coupling,
)
from jbackprop.checks import real_array
from jbackprop.factored import PyTree, weighted, wide_dtype
from jbackprop.gradient import scaled, sweep
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, examples, like, on_mesh
from jbackprop.sweep import Collect, Node, backward, batch_size, forward, leafwise, total


def value_and_grad(net: Node, loss: Loss) -> Callable[..., tuple[Array, PyTree]]:
    """The cost of a mini-batch and its gradient: like `jax.value_and_grad`, by the delta rule.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.

    Returns:
        A function (params, x, y, weights=None, key=None) -> (value, grads), where value is
        sum_n weights_n C_n, a scalar of float32 at least, and grads are its gradient, in the
        shapes and dtypes of params. The weights (B,) default to 1/B: the mean; ones give the sum.
        An example of weight 0 is not there, even if it holds NaN; but where a layer couples the
        examples, as a batch norm does, it has its part in that. It raises as `backprop` does.

        A loss that fuses with the last linear map, such as `FusedSoftmaxCrossEntropy`, needs a
        network that ends in one; the network's outputs are then never whole.
    """
    check_net(net)
    check_loss(loss)

    def call(
        params: PyTree, x: Any, y: Any, weights: Array | None = None, key: Array | None = None
    ) -> tuple[Array, PyTree]:
        value, grads, _ = value_grad_outputs(
            net, loss, params, x, y, weights, key, outputs=not loss.fuses
        )
        return value, grads

    return call


def value_grad_outputs(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    weights: Array | None = None,
    key: Array | None = None,
    *,
    outputs: bool = True,
) -> tuple[Array, PyTree, Any]:
    """As `value_and_grad` has it, with the network's outputs as third.

    Where they are not wanted, a loss that can do without them does, and they are None.
    """
    check_call(net, loss, params, x, y, key)
    weights = None if weights is None else real_array("weights", weights)
    if loss.fuses and not outputs:
        value, grads = _fused_value_grad(net, loss, params, x, y, weights, key)
        loss.check((*jnp.shape(y), net.behead(params).w.shape[1]), y)
        return value, grads, None
    value, grads, found = _value_grad_outputs(net, loss, params, x, y, weights, key)
    loss.check(jnp.shape(found), y)
    return value, grads, found


@on_mesh(lambda net, loss, params, x, *_: (WHOLE, like(params), examples(x)))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _value_grad_outputs(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    weights: Array | None,
    key: Array | None,
) -> tuple[Array, PyTree, Any]:
    n = batch_size(x)
    check_weights(weights, n)
    collect, divisor, output_weights = weighting(net, params, weights, n)
    swept = sweep(net, loss, params, x, y, collect, key=key, output_weights=output_weights)
    grads = jax.tree.map(
        lambda g, p: (g if divisor == 1 else g / divisor).astype(p.dtype), swept.collected, params
    )
    return _value(swept.losses, weights), grads, swept.outputs


def weighting(net: Node, params: PyTree, weights: Array | None, n: int) -> tuple[Collect, int, Any]:
    """Where the weights enter: what collects, what divides its sums, what multiplies the delta."""
    if weights is None and _is_half(params):
        return total, n, None  # delta / n could underflow in float16: the sum is divided
    if weights is None:
        return total, 1, 1 / n
    if net.couples_examples:
        return total, 1, weights
    return leafwise(lambda pair: pair.total(weights)), 1, None


def _value(losses: Array, weights: Array | None) -> Array:
    return jnp.mean(losses) if weights is None else jnp.sum(weighted(weights, losses))


@on_mesh(lambda net, loss, params, *_: (WHOLE, like(params)))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _fused_value_grad(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    weights: Array | None,
    key: Array | None,
) -> tuple[Array, PyTree]:
    """The same where the loss takes over the last linear map."""
    n = batch_size(x)
    check_weights(weights, n)
    collect, divisor, output_weights = weighting(net, params, weights, n)
    outputs = jax.eval_shape(lambda p, x: forward(net, p, x, key)[0], params, x)  # it may raise
    loss.check(outputs.shape, y)
    body, body_params, w, b, rejoin = net.behead(params)
    h, saved = (x, None) if body is None else forward(body, body_params, x, key)
    even = jnp.full(n, 1 / max(n, 1), wide_dtype(outputs.dtype))
    head = loss.head(h, w, b, y, even if weights is None else weights)
    grads: PyTree = ()
    if body is not None:
        delta = scaled(head.delta_h, output_weights)
        _, grads = backward(body, body_params, body.trace(x, h, saved), delta, collect)
        grads = jax.tree.map(lambda g: g if divisor == 1 else g / divisor, grads)
    grads = rejoin(grads, head.w_grad, head.b_grad)
    return _value(head.losses, weights), jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)


def costs(net: Node, loss: Loss, params: PyTree, x: Any, y: Any, key: Array | None = None) -> Array:
    """C_n of every example, (B,); without the network's outputs where the loss needs none."""
    if not loss.fuses:
        return loss.value(forward(net, params, x, key)[0], y)
    body, own, w, b, _ = net.behead(params)
    return loss.head_losses(x if body is None else forward(body, own, x, key)[0], w, b, y)


def _is_half(params: PyTree) -> bool:
    return any(jnp.finfo(jnp.result_type(p)).bits < 32 for p in jax.tree.leaves(params))


def predict(net: Node, loss: Loss, params: PyTree, x: Any) -> Any:
    """The loss's prediction for every example: probabilities, rates, or the outputs themselves.

    Raises:
        ValueError: a layer couples the examples, so that one of them has no prediction of its own;
            the message says what to do.
    """
    check_inputs(net, params, x)
    check_loss(loss)
    refuse_coupling(net, "a prediction")
    return _predict(net, loss, params, x)


@on_mesh(lambda net, loss, params, x: examples(x))
@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(net: Node, loss: Loss, params: PyTree, x: Any) -> Any:
    return loss.predict(forward(net, params, x)[0])
