"""What all elementwise activations share, and a user's own activation.

For one unit a = f(z), so that da_i/dz_j = f'(z_i) where i = j, else 0, and the delta rule is

    dC/dz = dC/da * f'(z)

Each activation says how f' is computed: through the output a where that is as exact (the output is
kept anyway, as the next layer's input), else from the net input z.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_functions
from jbackprop.factored import PyTree
from jbackprop.layers.weightless import Weightless
from jbackprop.sweep import Trace


class Elementwise(Weightless):
    """a = f(z) for every unit by itself, of any shape. Subclasses give `activate` and `slope`.

    Attributes:
        kinks: where f' jumps; each class states which value it takes there.
    """

    reads: ClassVar[tuple[str, ...]] = ("y",)
    kinks: ClassVar[tuple[float, ...]] = ()

    @abc.abstractmethod
    def activate(self, z: Array) -> Array:
        """The activation, in z's dtype."""

    @abc.abstractmethod
    def slope(self, z: Array, a: Array) -> Array:
        """f'(z). Only what `reads` names may be used ("x" is z, "y" is a): the other is None."""

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(params, x)
        return self.activate(x), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return delta * self.slope(trace.x, trace.y), ()


@dataclasses.dataclass(frozen=True)
class Activation(Elementwise):
    """A user's own activation: f and its derivative, both of the net input, elementwise.

    `jb.check.network` finds it out when `derivative` is not the derivative of `f`.

    Attributes:
        f: a = f(z), an array function that keeps shape and dtype.
        derivative: f'(z).

    Raises:
        TypeError: f or derivative that is no function; inputs that are not floating-point numbers.
        ValueError: a derivative that does not keep the shape.
    """

    f: Callable[[Array], Array]
    derivative: Callable[[Array], Array]

    reads: ClassVar[tuple[str, ...]] = ("x",)

    def __post_init__(self) -> None:
        check_functions(self, "f", "derivative")

    def __repr__(self) -> str:
        names = (getattr(g, "__name__", repr(g)) for g in (self.f, self.derivative))
        return f"{type(self).__name__}({', '.join(names)})"

    def activate(self, z: Array) -> Array:
        return self.f(z)

    def slope(self, z: Array, a: Array) -> Array:
        slope = self.derivative(z)
        if jnp.shape(slope) != z.shape:
            raise ValueError(
                f"{self}: the derivative has the shape {jnp.shape(slope)} at a net input of shape "
                f"{z.shape}; it must be f' of every unit"
            )
        return slope.astype(z.dtype)
