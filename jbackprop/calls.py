"""What a network, a loss and a mini-batch must be to be called together."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from jbackprop.checks import check_arrays, check_key, check_params
from jbackprop.losses import Loss
from jbackprop.structure import walk
from jbackprop.sweep import Node, batch_size, no_layer


def check_net(net: Any) -> None:
    """Raise unless it is a network."""
    if not isinstance(net, Node):
        raise no_layer(net)
    try:
        hash(net)
    except TypeError as error:
        raise TypeError(
            f"{net} has no hash ({error}), but a layer is a frozen dataclass that holds no arrays: "
            "they belong into its params, or numbers that never change into a tuple"
        ) from error


def check_loss(loss: Any, what: str = "loss") -> None:
    """Raise unless it is a loss."""
    if not isinstance(loss, Loss):
        hint = ""
        if inspect.isclass(loss):
            hint = "; make an instance: add ()"
        elif callable(loss):
            hint = "; one of your own is a subclass of jb.Loss with value and delta"
        raise TypeError(f"{what} must be a jbackprop Loss, not {loss!r}{hint}")


def check_inputs(net: Any, params: Any, x: Any, key: Any = None) -> None:
    """Raise where a network, its parameters and inputs cannot belong together."""
    check_net(net)
    check_params(params)
    check_arrays("x", x)
    check_key(key, optional=True)
    batch_size(x)


def check_call(net: Any, loss: Any, params: Any, x: Any, y: Any, key: Any = None) -> None:
    """Raise where a network, a loss and a mini-batch cannot belong together."""
    check_net(net)
    check_loss(loss)
    check_inputs(net, params, x, key)
    check_batch(x, y)


def check_batch(x: Any, y: Any) -> None:
    """Raise where inputs and targets cannot belong together."""
    check_arrays("y", y)
    n = batch_size(x)
    lengths = {jnp.shape(leaf)[0] if jnp.ndim(leaf) else None for leaf in jax.tree.leaves(y)}
    if lengths != {n}:
        raise ValueError(
            f"x has {n} examples, but the targets y have "
            f"{' and '.join(map(str, lengths))}: they need one for each example"
        )


def check_weights(weights: Any, n: int) -> None:
    """Raise where they are not one for each of n examples, or are to be 1 / 0."""
    if weights is None and n == 0:
        raise ValueError("the batch is empty: its mean gradient is not defined; give weights")
    if weights is not None and jnp.shape(weights) != (n,):
        hint = "; positions are left out by the loss, SoftmaxCrossEntropy(ignore_index=...)"
        raise ValueError(
            f"weights must have the shape ({n},), not {jnp.shape(weights)}"
            + hint * (jnp.shape(weights)[:1] == (n,))
        )


def coupling_layer(net: Node) -> str:
    """The name of the first layer that couples examples."""
    return next(f"{path} ({layer})" for path, layer, _ in walk(net) if layer.couples_examples)


def refuse_coupling(net: Node, what: str) -> None:
    """Raise where `what` would depend on which examples come together."""
    if net.couples_examples:
        raise ValueError(about_coupling(net, what))


def about_coupling(net: Node, what: str) -> str:
    """Why `what` has no answer, and what to do about it."""
    return (
        f"{coupling_layer(net)} couples the examples, so that {what} would depend on which of "
        "them come together. Fix its statistics first: net, params = fold_batch_norm(net, "
        "params, averages), with the .averages of a Fit, or batch_averages(net, params, x)"
    )
