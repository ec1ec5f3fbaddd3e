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

    For `jbackprop.curvature` give the second derivative as well, H_n = d^2 C_n / dz_n^2: a product
    with it and a root of it. No two positions of an example meet in a cost, so that H_n has a block
    (q, q) for each of them, and that is how products and roots are to be understood.

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

    def hessian_product(self, z: Array, y: Any, v: Array) -> Array:
        """H_n v_n, unscaled like `delta`: v (B, ..., q) -> (B, ..., q), in z's dtype.

        Where H_n could be indefinite, that of the part of it that the Gauss-Newton matrix has.
        """
        raise NotImplementedError(self._no_root("hessian_product"))

    def hessian_root(self, z: Array, y: Any) -> Array:
        """S (r, B, ..., q) in z's dtype: at every position sum_r S_r (outer) S_r is its block of H.

        Only a positive semi-definite H has one.
        """
        raise NotImplementedError(self._no_root("hessian_root"))

    def sampled_root(self, key: Array, z: Array, y: Any) -> Array:
        """A random S (B, ..., q) whose S (outer) S, all positions together, is H_n on average.

        By default the columns of `hessian_root` with random signs, e_r = +1 or -1 anew at each
        position: the mean of e_r e_s is 0 unless r = s, and that of S S^T is sum_r S_r S_r^T.

        Source: Hutchinson, A stochastic estimator of the trace of the influence matrix (1989).
        """
        root = self.hessian_root(z, y)
        signs = jax.random.rademacher(key, (*root.shape[:-1], 1), dtype=root.dtype)
        return jnp.sum(signs * root, axis=0)

    def sample(self, key: Array, z: Array) -> Any:
        """Targets y drawn from the distribution over them that net outputs z stand for."""
        raise NotImplementedError(
            f"{self} is no negative log likelihood of a distribution that targets could be drawn "
            "from, so that it has no Fisher matrix: use the Gauss-Newton matrix (ggn), or a loss "
            "such as SoftmaxCrossEntropy or SquaredError"
        )

    def _no_root(self, what: str) -> str:
        return (
            f"{self} gives no {what}, which this needs: the second derivative of its cost with "
            f"respect to z. Give {type(self).__name__} a method {what}; see jbackprop.Loss"
        )

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


def columns_of_diagonal(d: Array) -> Array:
    """The columns of diag(d) at every position: (B, ..., q) -> (q, B, ..., q)."""
    return unit_vectors(d) * d[None]


def unit_vectors(z: Array) -> Array:
    """e_c for every position of z (B, ..., q): (q, 1, ..., q)."""
    q = z.shape[-1]
    return jnp.eye(q, dtype=z.dtype).reshape((q,) + (1,) * (z.ndim - 1) + (q,))


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
