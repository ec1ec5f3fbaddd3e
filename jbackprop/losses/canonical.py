"""The canonical family: losses whose delta is the error in prediction.

The negative log likelihood of an exponential family in its natural parameter z, with sufficient
statistic y, is C = A(z) - y z + const, where A is the log-partition function and A'(z) = mean(z)
the expected y. Whatever the family, therefore,

    delta = dC/dz = mean(z) - y

- "output minus target". Its second derivative does not know y at all,

    d delta/dz = A''(z) = variance(z)

- the covariance of y under the model. Since E[y] = mean(z), the delta of a y drawn from the model
has the mean 0 and that covariance: the Hessian is E[delta (outer) delta], the Fisher matrix, and
deltas at drawn targets are roots of it on average. Over T positions the cost is their mean, and so
the Hessian has A''/T for each of them; the delta of a drawn y is divided by sqrt(T) then, not by T.

Source: Bishop, Pattern recognition and machine learning (2006), section 4.3.6; McCullagh and
Nelder, Generalized linear models (1989), section 2.2; Martens, New insights and perspectives on the
natural gradient method (2020), section 9, for the Fisher matrix.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.losses.base import (
    Loss,
    check_range,
    check_same_shape,
    columns_of_diagonal,
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

    def variance_product(self, z: Array, v: Array) -> Array:
        """A''(z) v at every position; the derivative of `mean` along v, unless derived by hand."""
        return jax.jvp(self.mean, (z,), (v,))[1]

    def variance_root(self, z: Array) -> Array:
        """S (r, B, ..., q): sum_r S_r (outer) S_r = A''(z) at every position."""
        raise NotImplementedError(self._no_root("variance_root"))

    def hessian_product(self, z: Array, y: Any, v: Array) -> Array:
        """A''(z) v; over T positions divided by T."""
        w = wide(z)
        product = self.variance_product(w, v.astype(w.dtype))
        return self._counted(product, w, y, root=False).astype(z.dtype)

    def hessian_root(self, z: Array, y: Any) -> Array:
        w = wide(z)
        return self._counted(self.variance_root(w), w, y, root=True).astype(z.dtype)

    def sampled_root(self, key: Array, z: Array, y: Any) -> Array:
        """mean(z) - y with y drawn from the model; over T positions divided by sqrt(T)."""
        w = wide(z)
        drawn = self.mean(w) - self.sample(key, w).astype(w.dtype)
        return self._counted(drawn, w, y, root=True).astype(z.dtype)

    def _counted(self, values: Array, z: Array, y: Any, root: bool) -> Array:
        """Values (..., B, positions, q) times what a position counts, or the root of that."""
        self.check(z.shape, y)
        number = positions(z)
        return values / (math.sqrt(number) if root else number)

    def predict(self, z: Array) -> Array:
        """mean(z), in z's dtype."""
        return self.mean(wide(z)).astype(z.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        check_same_shape(self, z_shape, y)


class _Independent(Canonical):
    """Outputs that are independent of each other: A'' is a diagonal matrix, diag(variance(z)).

    A product with it is variance(z) * v, and of its root S = diag(sqrt(variance)) the column o is
    sqrt(variance_o) at o, and 0 elsewhere.
    """

    @abc.abstractmethod
    def variance(self, z: Array) -> Array:
        """A''(z) of every output."""

    def variance_product(self, z: Array, v: Array) -> Array:
        return self.variance(z) * v

    def variance_root(self, z: Array) -> Array:
        return columns_of_diagonal(jnp.sqrt(self.variance(z)))


@dataclasses.dataclass(frozen=True)
class SquaredError(_Independent):
    """C = 1/2 sum_o (z_o - y_o)^2: the normal distribution with unit variance, A(z) = z^2 / 2.

    mean(z) = z, so the delta is z - y, the error in prediction. Note the 1/2, and that the outputs
    of an example are summed, not averaged. A'' = 1: the Hessian is the identity, and so is its
    root; a drawn y is z plus standard normal noise, whose negative then is the delta.

    Shapes: z and y (B, ..., q), y real.

    Raises:
        ValueError: targets of another shape than the outputs.
    """

    def cost(self, z: Array, y: Array) -> Array:
        return 0.5 * jnp.sum(jnp.square(z - y), axis=-1)

    def mean(self, z: Array) -> Array:
        return z

    def variance(self, z: Array) -> Array:
        return jnp.ones_like(z)

    def sample(self, key: Array, z: Array) -> Array:
        return z + jax.random.normal(key, z.shape, z.dtype)


@dataclasses.dataclass(frozen=True)
class SigmoidCrossEntropy(_Independent):
    """Log loss: C = -sum_o [y_o log s_o + (1 - y_o) log(1 - s_o)] with s = sigmoid(z).

    For two classes (one output) or many labels at once. From net inputs, log s = -softplus(-z) and
    log(1 - s) = -softplus(z), so that C = sum_o [softplus(z_o) - y_o z_o]: the Bernoulli
    distribution with A(z) = softplus(z). mean(z) = sigmoid(z), so the delta is s - y, and the
    Hessian ds/dz = s (1 - s) on the diagonal, with the root sqrt(s (1 - s)).

    Shapes: z and y (B, ..., q), y in [0, 1].

    Raises:
        ValueError: targets of another shape than the outputs; out of range, where that can be seen.
    """

    def cost(self, z: Array, y: Array) -> Array:
        # softplus(z) - y z would cancel for large z: its two halves never do
        return jnp.sum(y * jax.nn.softplus(-z) + (1 - y) * jax.nn.softplus(z), axis=-1)

    def mean(self, z: Array) -> Array:
        return lax.logistic(z)

    def variance(self, z: Array) -> Array:
        return lax.logistic(z) * lax.logistic(-z)  # 1 - s would cancel where s is nearly 1

    def sample(self, key: Array, z: Array) -> Array:
        return jax.random.bernoulli(key, lax.logistic(z)).astype(z.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        super().check(z_shape, y)
        check_range(self, y, 0, 1, "targets are probabilities, 0 to 1")


@dataclasses.dataclass(frozen=True)
class PoissonNLL(_Independent):
    """C = sum_o [e^{z_o} - y_o z_o]: counts y with the rate e^z, A(z) = e^z; log y! is left out.

    mean(z) = e^z, so the delta is e^z - y, and the Hessian e^z on the diagonal, with the root
    e^(z/2). Where e^z overflows the cost is inf. Targets are drawn with JAX's default generator of
    random numbers only.

    Shapes: z and y (B, ..., q), y not negative.

    Raises:
        ValueError: targets of another shape than the outputs, or negative, where that can be seen.
    """

    def cost(self, z: Array, y: Array) -> Array:
        return jnp.sum(jnp.exp(z) - y * z, axis=-1)

    def mean(self, z: Array) -> Array:
        return jnp.exp(z)

    def variance(self, z: Array) -> Array:
        return jnp.exp(z)

    def variance_root(self, z: Array) -> Array:
        return columns_of_diagonal(jnp.exp(z / 2))

    def sample(self, key: Array, z: Array) -> Array:
        return jax.random.poisson(key, jnp.exp(z)).astype(z.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        super().check(z_shape, y)
        check_range(self, y, 0, np.inf, "targets are counts, not negative")
