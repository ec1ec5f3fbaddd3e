"""Metrics: functions (outputs, targets) -> one number for each example, (B,).

`outputs` are those of the network, before the loss's `predict`. A metric of a data set is the mean
over its examples, so that ragged batches count for what they are.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_arrays


def accuracy(outputs: Array, y: Array) -> Array:
    """1 where the largest output is that of the target class, else 0; (B,).

    Args:
        outputs: net inputs or probabilities, (B, ..., q).
        y: labels (B, ...), or one-hot rows or distributions (B, ..., q). Over positions: the mean,
            where a place that the loss ignores counts as wrong.

    Raises:
        ValueError: targets of another shape; so do the others. A single output, which is always the
            largest.
    """
    _check(outputs, y)
    if outputs.shape[-1] == 1:
        raise ValueError(
            f"accuracy: of outputs {outputs.shape} the only one is always the largest; "
            "binary_accuracy is for one output of two classes"
        )
    labels = jnp.argmax(y, axis=-1) if y.shape == outputs.shape else y
    _same("accuracy", outputs.shape[:-1], labels.shape)
    return _mean(jnp.argmax(outputs, axis=-1).astype("int32") == labels.astype("int32"))


def binary_accuracy(net_inputs: Array, y: Array) -> Array:
    """The share of an example's labels on whose side its net inputs are; (B,).

    Args:
        net_inputs: (B, ..., q), so that a probability above 1/2 is a net input above 0.
        y: 0 or 1, (B, ..., q).
    """
    _check(net_inputs, y)
    _same("binary_accuracy", net_inputs.shape, y.shape)
    return _mean((net_inputs > 0) == (y > 0.5))


def absolute_error(outputs: Array, y: Array) -> Array:
    """The mean of |output - target| over an example's outputs; (B,)."""
    _check(outputs, y)
    _same("absolute_error", outputs.shape, y.shape)
    return _mean(jnp.abs(outputs - y.astype(outputs.dtype)))


def _check(outputs: Any, y: Any) -> None:
    for name, array in (("outputs", outputs), ("targets", y)):
        check_arrays(name, array)
        if not hasattr(array, "ndim") or array.ndim == 0:
            raise ValueError(f"{name} must be one array with a batch axis, (B, ...)")


def _same(name: str, needed: tuple[int, ...], got: tuple[int, ...]) -> None:
    if needed != got:
        raise ValueError(f"{name}: the targets need the shape {needed}, not {got}")


def _mean(values: Array) -> Array:
    return jnp.mean(values.astype("float32"), axis=tuple(range(1, values.ndim)))
