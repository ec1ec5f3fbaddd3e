"""Softmax as a layer."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored import PyTree
from jbackprop.layers.weightless import Weightless
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True)
class Softmax(Weightless):
    """Probabilities over the last axis: a_c = e^{z_c} / sum_k e^{z_k}, computed from z - max z.

    Derivation. log a_c = z_c - log sum_k e^{z_k}, so da_c/dz_j = a_c ([c = j] - a_j), a full
    matrix and not an elementwise f'. Its product with delta_c = dC/da_c is

        dC/dz_j = sum_c delta_c a_c ([c = j] - a_j) = a_j (delta_j - sum_c a_c delta_c)

    For classification take `SoftmaxCrossEntropy` on the net inputs instead of this layer and a loss
    on probabilities: it is exact where a probability underflows.

    Raises:
        ValueError: examples without an axis.
        TypeError: inputs that are not floating-point numbers.
    """

    reads: ClassVar[tuple[str, ...]] = ("y",)

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(params, x)
        if jnp.ndim(x) == 0:
            raise ValueError("Softmax needs an axis of classes: one example has the shape ()")
        return jax.nn.softmax(x, axis=-1), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        a = trace.y
        return a * (delta - jnp.sum(a * delta, axis=-1, keepdims=True)), ()
