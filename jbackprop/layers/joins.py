"""Joins: one array of several. They follow a `FanOut`, which gives a tuple, one of each branch.

Each takes x = (x_1, ..., x_k), arrays of one dtype and, but for `Concatenate`, one shape.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored import PyTree
from jbackprop.layers.checks import check_floating, check_no_params
from jbackprop.layers.weightless import Shapes, Weightless
from jbackprop.sweep import Trace


class Join(Weightless):
    """What the joins share: what they take."""

    least: ClassVar[int] = 1
    alike: ClassVar[str] = "shape"

    @abc.abstractmethod
    def join(self, x: tuple[Array, ...]) -> tuple[Array, Any]:
        """y, and what is saved."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Array, Any]:
        check_no_params(self, params)
        if not isinstance(x, tuple) or len(x) < self.least:
            raise ValueError(
                f"{self} needs a tuple of {self.least} or more arrays, such as FanOut and Parallel "
                f"give, not {jax.tree.map(jnp.shape, x)}"
            )
        for part in x:
            check_floating(self, part)
        forms = {(self.form(part.shape), part.dtype) for part in x}
        if len(forms) > 1:
            raise ValueError(
                f"{self} needs arrays of one dtype and {self.alike}; of one example they have "
                f"the shapes {[part.shape for part in x]} and the dtypes "
                f"{[str(part.dtype) for part in x]}"
            )
        return self.join(x)

    def form(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What must be alike in all shapes."""
        return shape


@dataclasses.dataclass(frozen=True)
class Add(Join):
    """The sum: y = x_1 + ... + x_k.

    Derivation. dy/dx_i is the identity for each i, so that dC/dx_i = delta.

    Raises:
        ValueError: an input that is no tuple of arrays of one shape and dtype.
        TypeError: arrays that are not floating-point numbers.
    """

    def join(self, x: tuple[Array, ...]) -> tuple[Array, Shapes]:
        return functools.reduce(jnp.add, x), Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        return (delta,) * len(trace.saved.leaves), ()


@dataclasses.dataclass(frozen=True)
class Multiply(Join):
    """The product, entry by entry: y = x_1 * ... * x_k.

    Derivation. Entry by entry, y depends on x_i through one factor:

        dC/dx_i = delta * prod_{j != i} x_j

    It is not delta * y / x_i, which has no value where x_i = 0. Two runs give the products of the
    others: one of delta and those before i, from the left, one of those behind i, from the right.

    With a sigmoid on one of two branches it is a gated linear unit (Dauphin et al., Language
    modeling with gated convolutional networks (2016), equation 1).

    Raises:
        ValueError: an input that is no tuple of two or more arrays of one shape and dtype.
        TypeError: arrays that are not floating-point numbers.
    """

    least: ClassVar[int] = 2
    reads: ClassVar[tuple[str, ...]] = ("x",)

    def join(self, x: tuple[Array, ...]) -> tuple[Array, None]:
        return functools.reduce(jnp.multiply, x), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        x = trace.x
        before = list(itertools.accumulate(x[:-1], jnp.multiply, initial=delta))
        behind = list(itertools.accumulate(x[:0:-1], jnp.multiply))[::-1]
        return (*map(jnp.multiply, before[:-1], behind), before[-1]), ()


@dataclasses.dataclass(frozen=True)
class Concatenate(Join):
    """The parts side by side along the last axis: y = x_1 ++ ... ++ x_k.

    Derivation. Every entry of x_i is one entry of y, and has its delta: dC/dx_i is the part of
    delta where x_i lies.

    Raises:
        ValueError: an input that is no tuple of arrays that are alike but for their last axis.
        TypeError: arrays that are not floating-point numbers.
    """

    alike: ClassVar[str] = "shape but for the last axis"

    def form(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (len(shape), *shape[:-1])

    def join(self, x: tuple[Array, ...]) -> tuple[Array, Shapes]:
        if x[0].ndim == 0:
            raise ValueError(f"{self} needs arrays with an axis, not numbers")
        return jnp.concatenate(x, axis=-1), Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        ends = list(itertools.accumulate(part.shape[-1] for part in trace.saved.leaves))
        return tuple(jnp.split(delta, ends[:-1], axis=-1)), ()


@dataclasses.dataclass(frozen=True)
class Maximum(Join):
    """The largest, entry by entry: y = max(x_1, ..., x_k). Behind dense branches it is maxout.

    Derivation. Entry by entry, y is the x_i that is largest, and no small change of the others
    reaches it:

        dC/dx_i = delta where x_i is the largest, else 0

    At a tie y has no derivative. The convention here: the first of the largest takes the delta.
    Saved is which of them it was, one byte for each entry; the x_i are not kept.

    Source: Goodfellow, Warde-Farley, Mirza, Courville and Bengio, Maxout networks (2013),
    section 3.

    Raises:
        ValueError: an input that is no tuple of arrays of one shape and dtype.
        TypeError: arrays that are not floating-point numbers.
    """

    def join(self, x: tuple[Array, ...]) -> tuple[Array, tuple[Array, Shapes]]:
        y = x[0]
        winner = jnp.zeros(y.shape, jnp.uint8 if len(x) <= 256 else jnp.int32)
        for i in range(1, len(x)):
            winner = jnp.where(x[i] > y, jnp.asarray(i, winner.dtype), winner)
            y = jnp.maximum(y, x[i])
        return y, (winner, Shapes.of(x))

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        winner, shapes = trace.saved
        zero = jnp.zeros((), delta.dtype)
        return tuple(jnp.where(winner == i, delta, zero) for i in range(len(shapes.leaves))), ()
