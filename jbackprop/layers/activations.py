"""The elementwise activations, each with its derivative derived.

Where f has a kink, f' there is a convention; each class states its own. Constants that leave f'
undefined or not a function of the output are refused.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_flags, check_numbers
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers.checks import check_no_params
from jbackprop.layers.elementwise import Elementwise
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True)
class Identity(Elementwise):
    """a = z, so f'(z) = 1: a linear unit. Takes whatever there is, also integers and tuples."""

    reads: ClassVar[tuple[str, ...]] = ()

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, None]:
        check_no_params(self, params)
        return x, None

    def activate(self, z: Array) -> Array:
        return z

    def slope(self, z: Array, a: Array) -> Array:
        return jnp.ones_like(a)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return delta, ()


@dataclasses.dataclass(frozen=True)
class Sigmoid(Elementwise):
    """a = 1 / (1 + e^-z).

    f' = e^-z / (1 + e^-z)^2 = a * (e^-z / (1 + e^-z)) = a (1 - a).
    """

    def activate(self, z: Array) -> Array:
        return lax.logistic(z)

    def slope(self, z: Array, a: Array) -> Array:
        return a * (1 - a)


@dataclasses.dataclass(frozen=True)
class Tanh(Elementwise):
    """a = tanh z = (e^z - e^-z) / (e^z + e^-z).

    With s = sinh z and c = cosh z: f' = (c c - s s) / c^2 = 1 - a^2 = (1 - a)(1 + a); the product
    loses nothing where |a| is near 1.
    """

    def activate(self, z: Array) -> Array:
        return jnp.tanh(z)

    def slope(self, z: Array, a: Array) -> Array:
        return (1 - a) * (1 + a)


@dataclasses.dataclass(frozen=True)
class Relu(Elementwise):
    """a = max(z, 0), so f' = 1 where z > 0, which is where a > 0, else 0. At the kink f'(0) = 0."""

    kinks: ClassVar[tuple[float, ...]] = (0.0,)

    def activate(self, z: Array) -> Array:
        return jax.nn.relu(z)

    def slope(self, z: Array, a: Array) -> Array:
        return (a > 0).astype(a.dtype)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return jnp.where(trace.y > 0, delta, jnp.zeros((), delta.dtype)), ()


@dataclasses.dataclass(frozen=True)
class LeakyRelu(Elementwise):
    """a = z where z > 0, else alpha z.

    f' = 1 where z > 0, which is where a > 0 (alpha >= 0), else alpha. At the kink f'(0) = alpha.

    Source: Maas, Hannun and Ng, Rectifier nonlinearities improve neural network acoustic models
    (2013), equation 2.

    Raises:
        ValueError: an alpha that is negative, or no finite number.
    """

    alpha: float = 0.01
    kinks: ClassVar[tuple[float, ...]] = (0.0,)

    def __post_init__(self) -> None:
        check_numbers(self, "alpha")
        if self.alpha < 0:
            raise ValueError(
                f"{self}: alpha must not be negative, or the sign of the output no longer tells "
                "the sign of z; use Activation(f, derivative) for such a unit"
            )

    def activate(self, z: Array) -> Array:
        return jnp.where(z > 0, z, self.alpha * z)

    def slope(self, z: Array, a: Array) -> Array:
        return jnp.where(a > 0, jnp.ones((), a.dtype), jnp.asarray(self.alpha, a.dtype))


def _negative(z: Array) -> Array:
    """z where z is not positive, else 0: keeps e^z finite in the branch that is not taken."""
    return jnp.where(z > 0, jnp.zeros((), z.dtype), z)


@dataclasses.dataclass(frozen=True)
class Elu(Elementwise):
    """a = z where z > 0, else alpha (e^z - 1).

    f' = 1 where z > 0; else alpha e^z = a + alpha. At 0 f' = alpha (a kink unless alpha is 1).

    Source: Clevert, Unterthiner and Hochreiter, Fast and accurate deep network learning by
    exponential linear units (2016), equation 15.

    Raises:
        ValueError: an alpha that is negative, or no finite number.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "alpha", least=0)

    @property
    def kinks(self) -> tuple[float, ...]:  # type: ignore[override]
        return () if self.alpha == 1 else (0.0,)

    def activate(self, z: Array) -> Array:
        return jnp.where(z > 0, z, self.alpha * jnp.expm1(_negative(z)))

    def slope(self, z: Array, a: Array) -> Array:
        return jnp.where(a > 0, jnp.ones((), a.dtype), a + self.alpha)


_SELU_ALPHA = 1.6732632423543772848170429916717
_SELU_SCALE = 1.0507009873554804934193349852946


@dataclasses.dataclass(frozen=True)
class Selu(Elementwise):
    """a = s z where z > 0, else s alpha (e^z - 1), with s = 1.0507..., alpha = 1.6733...

    f' = s where z > 0; else s alpha e^z = a + s alpha. At the kink f'(0) = s alpha.

    Source: Klambauer et al., Self-normalizing neural networks (2017), equation 2.
    """

    kinks: ClassVar[tuple[float, ...]] = (0.0,)

    def activate(self, z: Array) -> Array:
        return _SELU_SCALE * jnp.where(z > 0, z, _SELU_ALPHA * jnp.expm1(_negative(z)))

    def slope(self, z: Array, a: Array) -> Array:
        return jnp.where(a > 0, jnp.asarray(_SELU_SCALE, a.dtype), a + _SELU_SCALE * _SELU_ALPHA)


@dataclasses.dataclass(frozen=True)
class Celu(Elementwise):
    """a = z where z > 0, else alpha (e^(z / alpha) - 1), which has no kink.

    f' = 1 where z > 0; else e^(z / alpha) = a / alpha + 1.

    Source: Barron, Continuously differentiable exponential linear units (2017), equation 2.

    Raises:
        ValueError: an alpha that is not positive, or no finite number.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self, "alpha", above=0)

    def activate(self, z: Array) -> Array:
        return jnp.where(z > 0, z, self.alpha * jnp.expm1(_negative(z) / self.alpha))

    def slope(self, z: Array, a: Array) -> Array:
        return jnp.where(a > 0, jnp.ones((), a.dtype), a / self.alpha + 1)


@dataclasses.dataclass(frozen=True)
class Softplus(Elementwise):
    """a = log(1 + e^z).

    f' = e^z / (1 + e^z) = 1 - 1 / (1 + e^z) = 1 - e^-a, exact through the output by expm1.
    """

    def activate(self, z: Array) -> Array:
        return jax.nn.softplus(z)

    def slope(self, z: Array, a: Array) -> Array:
        return -jnp.expm1(-a)


@dataclasses.dataclass(frozen=True)
class Softsign(Elementwise):
    """a = z / (1 + |z|).

    f' = ((1 + |z|) - z sign z) / (1 + |z|)^2 = 1 / (1 + |z|)^2. Through the output it would be
    (1 - |a|)^2, but a has lost by rounding what 1 - |a| needs as |z| grows (at |z| = 1000 all
    digits of bfloat16 and half of float32's), while f' still matters: so it is computed from z.
    """

    reads: ClassVar[tuple[str, ...]] = ("x",)

    def activate(self, z: Array) -> Array:
        return z / (1 + jnp.abs(z))

    def slope(self, z: Array, a: Array) -> Array:
        s = 1 / (1 + jnp.abs(z))
        return s * s


@dataclasses.dataclass(frozen=True)
class Silu(Elementwise):
    """a = z s with s = sigmoid(z); also called swish.

    f' = s + z s (1 - s) = s (1 + z (1 - s)). Not monotonic, hence not a function of the output.

    Source: Elfwing, Uchibe and Doya, Sigmoid-weighted linear units (2018), equations 3 and 4.
    """

    reads: ClassVar[tuple[str, ...]] = ("x",)

    def activate(self, z: Array) -> Array:
        return z * lax.logistic(z)

    def slope(self, z: Array, a: Array) -> Array:
        s = lax.logistic(z)
        return s * (1 + z * (1 - s))


@dataclasses.dataclass(frozen=True)
class Gelu(Elementwise):
    """a = z Phi(z), with Phi the normal distribution function and phi = Phi' its density.

    f' = Phi(z) + z phi(z), Phi(z) = (1 + erf(z / sqrt 2)) / 2, phi(z) = e^(-z^2 / 2) / sqrt(2 pi).

    With `tanh=True` Phi is replaced by P(z) = (1 + tanh u) / 2, u = k (z + c z^3), where
    k = sqrt(2 / pi), c = 0.044715, and f' = P + z (1 - tanh^2 u) k (1 + 3 c z^2) / 2.
    Not monotonic, hence not a function of the output.

    Source: Hendrycks and Gimpel, Gaussian error linear units (2016), section 2.

    Raises:
        TypeError: a flag that is no bool.
    """

    tanh: bool = False
    reads: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        check_flags(self, "tanh")

    def activate(self, z: Array) -> Array:
        v = z.astype(wide_dtype(z.dtype))  # 16 bits would lose 1 + erf z, small for z below 0
        if self.tanh:
            return (0.5 * v * (1 + jnp.tanh(self._u(_bounded(v))))).astype(z.dtype)
        return (0.5 * v * (1 + lax.erf(v * math.sqrt(0.5)))).astype(z.dtype)

    def slope(self, z: Array, a: Array) -> Array:
        v = z.astype(wide_dtype(z.dtype))
        if self.tanh:
            b = _bounded(v)
            t = jnp.tanh(self._u(b))
            slope = 0.5 * (1 + t) + 0.5 * b * (1 - t) * (1 + t) * _K * (1 + 3 * _C * b * b)
        else:
            density = jnp.exp(-0.5 * v * v) * (1 / math.sqrt(2 * math.pi))
            slope = 0.5 * (1 + lax.erf(v * math.sqrt(0.5))) + v * density
        return slope.astype(z.dtype)

    @staticmethod
    def _u(z: Array) -> Array:
        return _K * (z + _C * z * z * z)


_K, _C = math.sqrt(2 / math.pi), 0.044715


def _bounded(z: Array) -> Array:
    """z within -10 to 10, beyond which tanh u is 1 in every dtype, but z^3 may overflow."""
    return jnp.clip(z, -10, 10)


@dataclasses.dataclass(frozen=True)
class Mish(Elementwise):
    """a = z t with t = tanh(softplus(z)).

    f' = t + z (1 - t^2) sigmoid(z), since softplus' = sigmoid. Not a function of the output.

    Source: Misra, Mish: a self regularized non-monotonic activation function (2020), section 2.
    """

    reads: ClassVar[tuple[str, ...]] = ("x",)

    def activate(self, z: Array) -> Array:
        return z * jnp.tanh(jax.nn.softplus(z))

    def slope(self, z: Array, a: Array) -> Array:
        t = jnp.tanh(jax.nn.softplus(z))
        return t + z * (1 - t) * (1 + t) * lax.logistic(z)


@dataclasses.dataclass(frozen=True)
class HardTanh(Elementwise):
    """a = z where |z| < 1, else sign z.

    f' = 1 where |z| < 1, which is where |a| < 1, else 0. At the kinks f'(-1) = f'(1) = 0.
    """

    kinks: ClassVar[tuple[float, ...]] = (-1.0, 1.0)

    def activate(self, z: Array) -> Array:
        return jnp.where(jnp.abs(z) < 1, z, jnp.sign(z))

    def slope(self, z: Array, a: Array) -> Array:
        return (jnp.abs(a) < 1).astype(a.dtype)
