"""Metrics: functions (outputs, targets) -> one number for each example, (B,).

`outputs` are those of the network, before the loss's `predict`. A metric of a data set is the mean
over its examples, so that ragged batches count for what they are.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def accuracy(outputs: Array, y: Array) -> Array:
    """1 where the largest output is that of the target class, else 0; (B,).

    Args:
        outputs: net inputs or probabilities, (B, ..., q).
        y: labels (B, ...), or one-hot rows or distributions (B, ..., q). Over positions: the mean.
    """
    labels = jnp.argmax(y, axis=-1) if y.ndim == outputs.ndim else y
    return _mean(jnp.argmax(outputs, axis=-1).astype("int32") == labels.astype("int32"))


def binary_accuracy(net_inputs: Array, y: Array) -> Array:
    """The share of an example's labels on whose side its net inputs are; (B,).

    Args:
        net_inputs: (B, ..., q), so that a probability above 1/2 is a net input above 0.
        y: 0 or 1, (B, ..., q).
    """
    return _mean((net_inputs > 0) == (y > 0.5))


def absolute_error(outputs: Array, y: Array) -> Array:
    """The mean of |output - target| over an example's outputs; (B,)."""
    return _mean(jnp.abs(outputs - y.astype(outputs.dtype)))


def _mean(values: Array) -> Array:
    return jnp.mean(values.reshape(values.shape[0], -1).astype("float32"), axis=1)
