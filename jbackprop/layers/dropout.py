"""Dropout."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_numbers
from jbackprop.factored import PyTree
from jbackprop.layers.weightless import Weightless
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True)
class Dropout(Weightless):
    """Inverted dropout: each unit is left out with a probability, the others grow accordingly.

    Equation, for one unit, with m = 1 with probability 1 - rate, else 0:

        y = x m / (1 - rate)                              so that the expectation of y is x

    Derivation. m does not depend on x: the delta passes where the unit did,

        dC/dx = delta m / (1 - rate)

    Saved is the key that m was drawn from, not m: it is drawn again on the way back. Every example
    has a key of its own. Without a key nothing is drawn, and y = x: that is how to predict.

    Source: Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, Dropout (2014), section 10,
    where the factor stands in the training as it does here.

    Attributes:
        rate: the probability that a unit is left out, from 0 to below 1.

    Raises:
        ValueError: a rate out of range.
        TypeError: inputs that are not floating-point numbers.
    """

    rate: float

    def __post_init__(self) -> None:
        check_numbers(self, "rate", least=0, below=1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rate})"

    @property
    def draws(self) -> bool:
        return self.rate > 0

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        self._check(params, x)
        key = key if self.draws else None
        return self._thinned(x, key), key

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return self._thinned(delta, trace.saved), ()

    def _thinned(self, x: Array, key: Array | None) -> Array:
        if key is None:
            return x
        # Bits, not uniform numbers: the draw is the same in every dtype, and cheaper.
        stays = jax.random.bits(key, x.shape, jnp.uint32) >= jnp.uint32(int(self.rate * 2**32))
        return jnp.where(stays, x / (1 - self.rate), jnp.zeros((), x.dtype))
