"""The canonical family: losses whose delta is the error in prediction.

The negative log likelihood of an exponential family in its natural parameter z, with sufficient
statistic y, is C = A(z) - y z + const, where A is the log-partition function and A'(z) = mean(z)
the expected y. Whatever the family, therefore,

    delta = dC/dz = mean(z) - y

- "output minus target". Source: Bishop, Pattern recognition and machine learning (2006), section
4.3.6; McCullagh and Nelder, Generalized linear models (1989), section 2.2.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.losses.base import (
    Loss,
    check_range,
    check_same_shape,
    mean_over_positions,
    positions,
    wide,
)


class Canonical(Loss):
    """A loss of the canonical family: subclasses give `cost` and `mean`, the delta is here."""

    @abc.abstractmethod
    def cost(self, z: Array, y: Any) -> Array:
        """A(z) - y z + const, summed over the last axis."""

    @abc.abstractmethod
    def mean(self, z: Array) -> Array:
        """A'(z), the expected y."""

    def targets(self, z: Array, y: Any) -> Any:
        """y as `cost` and `error` want it: an array like z."""
        self.check(z.shape, y)
        return jnp.asarray(y).astype(z.dtype)

    def value(self, z: Array, y: Any) -> Array:
        v = wide(z)
        return mean_over_positions(self.cost(v, self.targets(v, y)))

    def delta(self, z: Array, y: Any) -> Array:
        """mean(z) - y; over T positions divided by T."""
        v = wide(z)
        return self._delta(v, self.targets(v, y)).astype(z.dtype)

    def value_and_delta(self, z: Array, y: Any) -> tuple[Array, Array]:
        v = wide(z)
        t = self.targets(v, y)
        return mean_over_positions(self.cost(v, t)), self._delta(v, t).astype(z.dtype)

    def _delta(self, z: Array, t: Any) -> Array:
        error, number = self.error(z, t), positions(z)
        return error if number == 1 else error / number

    def error(self, z: Array, y: Any) -> Array:
        """mean(z) - y, where y came from `targets`."""
        return self.mean(z) - y

    def predict(self, z: Array) -> Array:
        """mean(z), in z's dtype."""
        return self.mean(wide(z)).astype(z.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        check_same_shape(self, z_shape, y)


@dataclasses.dataclass(frozen=True)
class SquaredError(Canonical):
    """C = 1/2 sum_o (z_o - y_o)^2: the normal distribution with unit variance, A(z) = z^2 / 2.

    mean(z) = z, so the delta is z - y, the error in prediction. Note the 1/2, and that the outputs
    of an example are summed, not averaged.

    Shapes: z and y (B, ..., q), y real.
    """

    def cost(self, z: Array, y: Array) -> Array:
        return 0.5 * jnp.sum(jnp.square(z - y), axis=-1)

    def mean(self, z: Array) -> Array:
        return z


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy(Canonical):
    """Log loss: C = -sum_o [y_o log s_o + (1 - y_o) log(1 - s_o)] with s = sigmoid(z).

    For two classes (one output) or many labels at once. From net inputs, log s = -softplus(-z) and
    log(1 - s) = -softplus(z), so that C = sum_o [softplus(z_o) - y_o z_o]: the Bernoulli
    distribution with A(z) = softplus(z). mean(z) = sigmoid(z), so the delta is s - y.

    Shapes: z and y (B, ..., q), y in [0, 1].
    """

    def cost(self, z: Array, y: Array) -> Array:
        # softplus(z) - y z would cancel for large z: its two halves never do
        return jnp.sum(y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z), axis=-1)

    def mean(self, z: Array) -> Array:
        return lax.logistic(z)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        super().check(z_shape, y)
        check_range(self, y, 0, 1, "targets are probabilities, 0 to 1")


@dataclasses.dataclass(frozen=True)
class PoissonNLL(Canonical):
    """C = sum_o [e^{z_o} - y_o z_o]: counts y with the rate e^z, A(z) = e^z; log y! is left out.

    mean(z) = e^z, so the delta is e^z - y. Where e^z overflows the cost is inf.

    Shapes: z and y (B, ..., q), y not negative.
    """

    def cost(self, z: Array, y: Array) -> Array:
        return jnp.sum(jnp.exp(z) - y * z, axis=-1)

    def mean(self, z: Array) -> Array:
        return jnp.exp(z)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        super().check(z_shape, y)
        check_range(self, y, 0, np.inf, "targets are counts, not negative")
