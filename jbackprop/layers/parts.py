"""Parting arrays and tuples: what comes in is passed on, or left out, and the delta goes back."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored import PyTree
from jbackprop.layers.checks import check_features, check_no_params
from jbackprop.layers.weightless import Shapes, Weightless
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True, init=False)
class Split(Weightless):
    """One array as a tuple of arrays, parted along the last axis.

    Equation, for one example: y = (x_1, ..., x_k), where x = x_1 ++ ... ++ x_k.

    Derivation. Every entry of x is one entry of one y_i, so that its delta is that entry's:

        dC/dx = delta_1 ++ ... ++ delta_k

    Attributes:
        sizes: the length of the last axis of each part.

    Raises:
        ValueError: no sizes, one below 1, or an input whose last axis is not as long as their sum.
        TypeError: inputs that are not floating-point numbers.
    """

    sizes: tuple[int, ...]

    def __init__(self, *sizes: int) -> None:
        if not sizes or not all(
            hasattr(size, "__index__") and not isinstance(size, bool) and size >= 1
            for size in sizes
        ):
            raise ValueError(
                f"Split: sizes must be ints of at least 1, one for each part, as in Split(3, 3); "
                f"not {', '.join(map(repr, sizes)) or 'none'}"
            )
        object.__setattr__(self, "sizes", tuple(int(size) for size in sizes))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(str, self.sizes))})"

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Any, None]:
        check_features(self, x, sum(self.sizes))
        self._check(params, x)
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        last = x.ndim - 1
        parts = (
            lax.slice_in_dim(x, end - size, end, axis=last)
            for size, end in zip(self.sizes, ends, strict=True)
        )
        return tuple(parts), None

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Array, tuple[()]]:
        return jnp.concatenate(delta, axis=-1), ()


@dataclasses.dataclass(frozen=True)
class Select(Weightless):
    """One element of a tuple.

    Equation, for one example: y = x_i, where x = (x_1, ..., x_k).

    Derivation. The others do not reach the cost:

        dC/dx_i = delta            dC/dx_j = 0 for j != i

    Attributes:
        index: which element, counted from 0; from the end, if negative.

    Raises:
        ValueError: an input that is no tuple, or a shorter one.
        TypeError: an index that is no int.
    """

    index: int

    def __post_init__(self) -> None:
        _check_index(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index})"

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Shapes]:
        if not isinstance(x, tuple) or not -len(x) <= self.index < len(x):
            raise ValueError(
                f"{self} needs a tuple with an element {self.index}, not "
                f"{jax.tree.map(jnp.shape, x)}"
            )
        check_no_params(self, params)
        return x[self.index], Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, tuple[()]]:
        deltas = list(jax.tree.map(_nothing, trace.saved.back))
        deltas[self.index] = delta
        return tuple(deltas), ()


@dataclasses.dataclass(frozen=True)
class Take(Weightless):
    """One position, such as the last time step.

    Equation, for one example: y = x_s, where x = (x_1, ..., x_T):       x (T, ...) -> y (...)

    Derivation. The others do not reach the cost:

        dC/dx_s = delta            dC/dx_t = 0 for t != s

    Attributes:
        index: which position, counted from 0; from the end, if negative.

    Raises:
        ValueError: an input without positions, or with too few.
        TypeError: an index that is no int; an input that is no array.
    """

    moves: ClassVar[bool] = True

    index: int = -1

    def __post_init__(self) -> None:
        _check_index(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index})"

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Shapes]:
        self._check(params, x)
        if x.ndim == 0 or not -x.shape[0] <= self.index < x.shape[0]:
            raise ValueError(
                f"{self} needs positions on the first axis of an example, with one at "
                f"{self.index}, but one example has the shape {x.shape}"
            )
        return x[self.index], Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        zeros = jnp.zeros(trace.saved.back.shape, delta.dtype)
        return zeros.at[self.index].set(delta), ()


def _check_index(layer: Any) -> None:
    if not hasattr(layer.index, "__index__") or isinstance(layer.index, bool):
        raise TypeError(f"{type(layer).__name__}: index must be an int, not {layer.index!r}")
    object.__setattr__(layer, "index", int(layer.index))


def _nothing(v: jax.ShapeDtypeStruct) -> Array | None:
    """The delta of what does not reach the cost; None for integers, which have none."""
    return jnp.zeros(v.shape, v.dtype) if jnp.issubdtype(v.dtype, jnp.floating) else None
