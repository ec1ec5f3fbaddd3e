"""What a loss is."""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.factored import wide_dtype


class Head(NamedTuple):
    """What a loss that is fused with the last linear map gives for a mini-batch.

    Attributes:
        losses: C_n, (B,), unscaled.
        delta_h: dC_n/dh_n, in the shape and dtype of h, unscaled.
        w_grad: sum_n weights_n dC_n/dw, (p, V), float32 at least.
        b_grad: the same of b, (V,); None without a b.
    """

    losses: Array
    delta_h: Array
    w_grad: Array
    b_grad: Array | None


class Loss(abc.ABC):
    """The cost of each example, and its delta: the gradient with respect to the loss's input z.

    For a user's own: subclass as a frozen dataclass (compiled programs take its attributes to be
    constants) and give `value` and `delta`. Losses ship with
    one convention: the cost of an example *sums* over the last axis (outputs, classes) and is the
    *mean* over the axes between the batch and the last (positions), of which there often are none.

    Attributes:
        fuses: whether it can do without the net inputs: `head` then takes the inputs of the
            network's last linear map; see `FusedSoftmaxCrossEntropy`.
    """

    fuses: ClassVar[bool] = False

    @abc.abstractmethod
    def value(self, z: Array, y: Any) -> Array:
        """C_n, the unscaled cost of every example: z (B, ..., q) -> (B,), float32 at least."""

    @abc.abstractmethod
    def delta(self, z: Array, y: Any) -> Array:
        """dC_n/dz_n, never averaged over the batch: (B, ..., q), in z's dtype."""

    def value_and_delta(self, z: Array, y: Any) -> tuple[Array, Array]:
        """Both at once, for losses that can share work between them."""
        return self.value(z, y), self.delta(z, y)

    def predict(self, z: Array) -> Array:
        """What the user calls the output, from net outputs z; z itself unless overridden."""
        return z

    def head(self, h: Array, w: Array, b: Array | None, y: Any, weights: Array) -> Head:
        """Costs and gradients from the inputs of the last linear map; for those that `fuses`."""
        raise NotImplementedError(f"{self} needs the net inputs")

    def head_losses(self, h: Array, w: Array, b: Array | None, y: Any) -> Array:
        """The costs alone, (B,)."""
        raise NotImplementedError(f"{self} needs the net inputs")

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:  # noqa: B027, checking is optional
        """Raise where targets do not fit outputs of this shape; values only where y is concrete."""


def is_concrete(y: Any) -> bool:
    """Whether the values of y can be looked at: it is no tracer."""
    return not isinstance(y, jax.core.Tracer)


def wide(z: Array) -> Array:
    """z in float32 at least: what costs are computed in."""
    return z.astype(wide_dtype(z.dtype))


def positions(z: Array) -> int:
    """How many positions an example of z (B, ..., q) has."""
    return int(np.prod(z.shape[1:-1], dtype=int))


def mean_over_positions(cost: Array) -> Array:
    """(B, ...) -> (B,); 0 where an example has no positions."""
    axes = tuple(range(1, cost.ndim))
    return jnp.sum(cost, axis=axes) / max(math.prod(cost.shape[1:]), 1) if axes else cost


def check_same_shape(loss: Loss, z_shape: tuple[int, ...], y: Any) -> None:
    """For losses whose targets have the shape of the outputs."""
    if len(z_shape) < 2:
        raise ValueError(f"{loss} needs outputs with a batch axis, (B, ..., q), not {z_shape}")
    if tuple(jnp.shape(y)) != tuple(z_shape):
        hint = ""
        if tuple(jnp.shape(y)) == z_shape[:-1]:
            hint = "; for a single output use y[..., None]"
            if z_shape[-1] > 1:
                hint = (
                    f"; class labels are for SoftmaxCrossEntropy, "
                    f"or use jax.nn.one_hot(y, {z_shape[-1]})"
                )
        raise ValueError(
            f"{loss}: targets have the shape {tuple(jnp.shape(y))}, but the network's outputs "
            f"{tuple(z_shape)}; they must be the same{hint}"
        )


def check_range(loss: Loss, y: Any, low: float, high: float, what: str) -> None:
    """Raise if a concrete y has a value outside [low, high]; NaN is left to flow."""
    if not is_concrete(y):
        return
    values = np.asarray(y)
    if values.size and (np.nanmin(values) < low or np.nanmax(values) > high):
        at = np.unravel_index(int(np.argmax((values < low) | (values > high))), values.shape)
        place = ", ".join(map(str, at))
        raise ValueError(f"{loss}: {what}, but y[{place}] is {values[at]}")
