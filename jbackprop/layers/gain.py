"""A gain and a shift for every feature: what follows a normalisation, or scales a residual branch.

For one feature o at one position t,

    y_to = h_to g_o + b_o

so that with delta = dC/dy

    dC/dh_to = delta_to g_o            every h_to reaches the cost through y_to alone
    dC/dg_o  = sum_t h_to delta_to     g_o is used at every position; the kind is `Scale`
    dC/db_o  = sum_t delta_to          the kind is `Shift`
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_numbers, check_sizes
from jbackprop.factored import PyTree, Scale, Shift
from jbackprop.layers.checks import check_features, check_params, shown
from jbackprop.layers.weightless import Weightless
from jbackprop.sweep import Layer, Trace


def rescaled(params: PyTree, h: Array) -> Array:
    """h g + b, in h's dtype; `params` has "scale" (g) and "shift" (b), or one of them, or none."""
    for name in params:
        w = jnp.broadcast_to(params[name].astype(h.dtype), h.shape)
        h = h * w if name == "scale" else h + w
    return h


def rescaled_back(params: PyTree, h: Array, delta: Array) -> tuple[Array, PyTree]:
    """From delta = dC/dy to dC/dh and the factored gradients, for h and delta of one dtype."""
    if not params:
        return delta, params
    factored: dict[str, Any] = {}
    delta_h = delta
    if "scale" in params:
        delta_h = delta * jnp.broadcast_to(params["scale"].astype(delta.dtype), delta.shape)
        factored["scale"] = Scale.of(h, delta)
    if "shift" in params:
        factored["shift"] = Shift.of(delta)
    return delta_h, factored


class _Rescaling(Layer):
    """What a gain has in common with a gain and a shift."""

    features: int
    init_value: float

    reads: ClassVar[tuple[str, ...]] = ("x",)
    first: ClassVar[dict[str, float | None]] = {"scale": None}  # None: init_value

    def __post_init__(self) -> None:
        check_sizes(self, "features")
        check_numbers(self, "init_value")

    def __repr__(self) -> str:
        return shown(self, "features")

    def init(self, key: Array) -> PyTree:
        dtype = jnp.result_type(float)
        values = {n: self.init_value if v is None else v for n, v in self.first.items()}
        return {name: jnp.full((self.features,), v, dtype) for name, v in values.items()}

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        check_features(self, x, self.features)
        check_params(self, params, dict.fromkeys(self.first, (self.features,)))
        return rescaled(params, x), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, PyTree]:
        return rescaled_back(params, trace.x, delta)


@dataclasses.dataclass(frozen=True, repr=False)
class Gain(_Rescaling):
    """A trainable gain for every feature.

    Equation, for one example:

        y_to = x_to g_o                                   x (..., features) -> y (..., features)

    Derivation: that of this file, with h = x and no b.

    At the end of a residual branch, with a small first value, it is LayerScale: x + g * branch(x).

    Source: Touvron, Cord, Sablayrolles, Synnaeve and Jégou, Going deeper with image transformers
    (2021), equation 4.

    Params: ``{"scale": (features,)}``.

    Attributes:
        features: the length of the last axis.
        init_value: the first value of every gain.

    Raises:
        ValueError: a size below 1; inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers.
    """

    features: int
    init_value: float = 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class Affine(_Rescaling):
    """A trainable gain and shift for every feature.

    Equation, for one example:

        y_to = x_to g_o + b_o                             x (..., features) -> y (..., features)

    Derivation: that of this file, with h = x. A batch norm with fixed statistics is this layer; see
    `jbackprop.fold_batch_norm`.

    Params: ``{"scale": (features,), "shift": (features,)}``; the shift begins at 0.

    Attributes:
        features: the length of the last axis.
        init_value: the first value of every gain.

    Raises:
        ValueError: a size below 1; inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers.
    """

    features: int
    init_value: float = 1.0

    first: ClassVar[dict[str, float | None]] = {"scale": None, "shift": 0.0}


@dataclasses.dataclass(frozen=True)
class Times(Weightless):
    """Multiplication by a fixed number, as for a residual branch: y = c x, so dC/dx = c dC/dy.

    Attributes:
        c: the number.

    Raises:
        ValueError: c that is no finite number.
        TypeError: inputs that are not floating-point numbers.
    """

    c: float

    def __post_init__(self) -> None:
        check_numbers(self, "c")

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(params, x)
        return self.c * x, None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, Any]:
        return self.c * delta, ()
