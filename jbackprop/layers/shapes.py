"""Layers that move entries and compute nothing, and the one that repeats them."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers import windows
from jbackprop.layers.checks import shown
from jbackprop.layers.weightless import Shapes, Weightless
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True)
class Reshape(Weightless):
    """The same entries, in the same order, in another shape: dC/dx is dC/dy in the old one.

    Attributes:
        shape: of one example; one -1 stands for what is left over.

    Raises:
        ValueError: a shape that has not as many entries as the input.
    """

    moves: ClassVar[bool] = True

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            shape = tuple(operator.index(n) for n in self.shape)
            if any(isinstance(n, bool) for n in self.shape):
                raise TypeError
        except TypeError:
            raise ValueError(
                f"Reshape: shape is that of one example, and must be a tuple of whole "
                f"numbers, such as (7, 7, 16), not {self.shape!r}"
            ) from None
        if any(n < -1 for n in shape) or shape.count(-1) > 1:
            raise ValueError(
                f"Reshape: sizes in shape must be 0 or more, and at most one -1; not {shape}"
            )
        object.__setattr__(self, "shape", shape)

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Shapes]:
        self._check(params, x)
        known = math.prod(n for n in self.shape if n != -1)
        fits = x.size % known == 0 if -1 in self.shape and known else x.size == known
        if not fits or (-1 in self.shape and not known):
            raise ValueError(
                f"{self} cannot take one example of shape {x.shape}: it has {x.size} entries. The "
                "shape is that of one example, without the batch axis"
            )
        return x.reshape(self.shape), Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return delta.reshape(trace.saved.back.shape), ()


@dataclasses.dataclass(frozen=True)
class Flatten(Weightless):
    """The entries of an example in a row, the last axis fastest: before a Dense over all of it."""

    moves: ClassVar[bool] = True

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Shapes]:
        self._check(params, x)
        return x.reshape(-1), Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        return delta.reshape(trace.saved.back.shape), ()


@dataclasses.dataclass(frozen=True, repr=False)
class Upsample(Weightless):
    """Every entry repeated along each spatial axis: nearest-neighbour interpolation.

        y_tc = x_{floor(t / f), c}                             x (*size, c) -> y (*(f size), c)

    Derivation. x_u reaches the cost through the block of f outputs along each axis that repeat it,
    each of them with the slope 1:

        dC/dx_uc = sum_{t : floor(t / f) = u} dC/dy_tc

    Attributes:
        factor: f, one for all spatial axes (all but the last one), or one for each.

    Raises:
        ValueError: factors below 1, or as many as there are not spatial axes.
    """

    factor: int | tuple[int, ...]

    def __post_init__(self) -> None:
        given = self.factor
        axes = len(given) if isinstance(given, tuple | list) else 1
        each = tuple(given) if isinstance(given, tuple | list) else (given,)
        each = tuple(windows.whole(self, "factor", f) for f in each)
        object.__setattr__(self, "factor", each if isinstance(given, tuple | list) else each[0])
        if not axes:
            raise ValueError("Upsample: factor must be one number, or one for each spatial axis")

    def __repr__(self) -> str:
        return shown(self, "factor")

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(params, x)
        if not isinstance(self.factor, int):
            windows.check_spatial(self, x, len(self.factor))
        factors = windows.steps(self.factor, x.ndim - 1)
        blocks, shape = self._blocks(x.shape[:-1], factors)
        y = jnp.broadcast_to(x.reshape(*shape, x.shape[-1]), (*blocks, x.shape[-1]))
        size = (n * f for n, f in zip(x.shape[:-1], factors, strict=True))
        return y.reshape(*size, x.shape[-1]), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        factors = windows.steps(self.factor, delta.ndim - 1)
        size = tuple(n // f for n, f in zip(delta.shape[:-1], factors, strict=True))
        blocks, _ = self._blocks(size, factors)
        within = tuple(range(1, len(blocks), 2))
        summed = jnp.sum(
            delta.reshape(*blocks, delta.shape[-1]), axis=within, dtype=wide_dtype(delta.dtype)
        )
        return summed.astype(delta.dtype), ()

    @staticmethod
    def _blocks(size: tuple[int, ...], factors: tuple[int, ...]) -> tuple[Any, Any]:
        """(n_1, f_1, n_2, f_2, ...), and the same with ones for the factors."""
        pairs = list(zip(size, factors, strict=True))
        return tuple(m for pair in pairs for m in pair), tuple(m for n, _ in pairs for m in (n, 1))
