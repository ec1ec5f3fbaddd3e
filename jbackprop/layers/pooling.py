"""Pooling: one number for every window of positions, channel by channel."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers import windows
from jbackprop.layers.checks import shown
from jbackprop.layers.weightless import Shapes, Weightless
from jbackprop.sweep import Trace


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The windows along one axis: where they stand, and what each entry of them sees.

    Pooling takes one axis after the other: the maximum of the rows' maxima is the maximum, the sum
    of their sums the sum. So a window is a row of `width` entries here, and `stride` from the next;
    there are `outputs` of them, over `size` entries with `low` of padding in front, `high` behind.
    """

    axis: int
    size: int
    width: int
    stride: int
    low: int
    high: int
    outputs: int

    def seen(self, x: Array, fill: float) -> list[Array]:
        """For each entry of the window, what it sees at every place of it: `width` slices of x."""
        if self.high:  # there never is more padding in front than behind
            x = self._sized(x, self.low, self.high, fill=fill)
        span = (self.outputs - 1) * self.stride + 1
        return [lax.slice_in_dim(x, k, k + span, self.stride, self.axis) for k in range(self.width)]

    def real(self) -> list[np.ndarray]:
        """For each entry of the window, at which places it is not padding."""
        starts = np.arange(self.outputs) * self.stride - self.low
        return [(starts + k >= 0) & (starts + k < self.size) for k in range(self.width)]

    def spread(self, shares: list[Array]) -> Array:
        """The transpose of `seen`: each entry's share, added where the entry lay."""
        like = shares[0]
        if self.width == self.stride:  # windows side by side: nothing to add
            x = jnp.stack(shares, axis=self.axis + 1)
            covered = self.outputs * self.width
            x = x.reshape(*like.shape[: self.axis], covered, *like.shape[self.axis + 1 :])
            return self._sized(x, -self.low, self.size + self.low - covered)
        span = (self.outputs - 1) * self.stride + 1
        total = None
        for k, share in enumerate(shares):
            front = k - self.low
            part = self._sized(share, front, self.size - front - span, self.stride - 1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _sized(self, x: Array, front: int, behind: int, between: int = 0, fill: float = 0) -> Array:
        ends = [(front, behind, between) if i == self.axis else (0, 0, 0) for i in range(x.ndim)]
        return lax.pad(x, jnp.asarray(fill, x.dtype), ends)


@dataclasses.dataclass(frozen=True, repr=False)
class _Pooling(Weightless):
    """What both poolings share."""

    window: tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: str = "VALID"

    def __post_init__(self) -> None:
        windows.check_window(self, "window")
        if self.stride is not None:
            windows.check_steps(self, "stride", len(self.window))
        windows.check_padding(self, len(self.window), explicit=False)

    def __repr__(self) -> str:
        return shown(self, "window")

    @abc.abstractmethod
    def _pool(self, x: Array) -> tuple[Array, Shapes | None]:
        """The output and what is saved, of an input that has been checked."""

    def forward(
        self, params: PyTree, x: Array, key: Array | None = None
    ) -> tuple[Array, Shapes | None]:
        self._check(params, x)
        windows.check_spatial(self, x, len(self.window))
        windows.check_outputs(self, x, tuple(axis.outputs for axis in self._axes(x.shape[:-1])))
        return self._pool(x)

    def _axes(self, size: tuple[int, ...]) -> list[_Axis]:
        strides = (
            self.window if self.stride is None else windows.steps(self.stride, len(self.window))
        )
        padding = windows.pairs(self.padding, size, self.window, strides)
        found = []
        for i, (n, k, s, pair) in enumerate(zip(size, self.window, strides, padding, strict=True)):
            found.append(_Axis(i, n, k, s, *pair, (n + sum(pair) - k) // s + 1))
        return found


@dataclasses.dataclass(frozen=True, repr=False)
class MaxPool(_Pooling):
    """The largest entry of every window, channel by channel.

        y_tc = max_k x_{ts+k-p, c}                              x (*size, c) -> y (*outputs, c)

    with s the stride and p the padding, which never is the largest.

    Derivation. Where one entry of a window is larger than all the others, y_t is that entry as long
    as it stays so: dy_tc/dx_uc is 1 for it and 0 for the others, and

        dC/dx_uc = sum of dC/dy_tc over the windows t whose largest entry is u

    Where several are the largest, y has a kink, and the rule takes the first of them in the order
    of the window (the last axis fastest); it alone gets the delta, so that none is lost or doubled.
    A NaN counts as the largest, as it does in the output.

    Who won is found again from x and y, entry by entry of the window: no index is stored, and no
    scatter is needed. The rows of a window are taken one axis after the other. The first row that
    has the largest entry, and in it the first such entry, is the first in the window's order.

    Source: Ranzato, Huang, Boureau and LeCun, Unsupervised learning of invariant feature
    hierarchies (CVPR 2007); the winner takes it all: Riesenhuber and Poggio (1999).

    Attributes:
        window: its size along each spatial axis, such as (2, 2).
        stride: from one window to the next; one number, or one for each axis. None: the window's
            size, so that the windows lie side by side.
        padding: "VALID", only whole windows; "SAME", ceil(size / stride) of them.

    Raises:
        ValueError: sizes below 1, examples with other axes, a window larger than the input.
        TypeError: inputs that are not floating-point numbers.
    """

    reads: ClassVar[tuple[str, ...]] = ("x", "y")

    def _pool(self, x: Array) -> tuple[Array, None]:
        return self._stages(x)[-1], None

    def _stages(self, x: Array) -> list[Array]:
        """x, and the maxima after each axis; the last axis is the first to be taken."""
        stages = [x]
        for axis in reversed(self._axes(x.shape[:-1])):
            largest, *others = axis.seen(stages[-1], -jnp.inf)
            for other in others:  # a later one must be larger: the first of equals stays
                largest = jnp.where((other > largest) | (other != other), other, largest)
            stages.append(largest)
        return stages

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        axes = self._axes(trace.x.shape[:-1])
        stages = [*self._stages(trace.x)[:-1], trace.y]
        dtype = delta.dtype
        delta = delta.astype(wide_dtype(dtype))
        zero = jnp.zeros((), delta.dtype)
        for i, axis in enumerate(axes):
            x, y = stages[-2 - i], stages[-1 - i]
            shares, free = [], None
            for entry, real in zip(axis.seen(x, -jnp.inf), axis.real(), strict=True):
                wins = (entry == y) | (entry != entry)
                if not real.all():
                    there = real.reshape(-1, *(1,) * (y.ndim - axis.axis - 1))
                    wins = wins & jnp.broadcast_to(there, y.shape)
                first = wins if free is None else wins & free
                free = ~wins if free is None else free & ~wins
                shares.append(jnp.where(first, delta, zero))
            delta = axis.spread(shares)
        return delta.astype(dtype), ()


@dataclasses.dataclass(frozen=True, repr=False)
class AveragePool(_Pooling):
    """The mean over every window, channel by channel.

        y_tc = 1/n_t sum_k x_{ts+k-p, c}                        x (*size, c) -> y (*outputs, c)

    where n_t counts the entries of window t that are there: padding is no entry, and an average at
    the border is that of fewer numbers.

    Derivation. dy_tc/dx_uc = 1/n_t for every entry u of window t, and 0 outside it, so that

        dC/dx_uc = sum of 1/n_t dC/dy_tc over the windows t that contain u

    Attributes:
        window: its size along each spatial axis, such as (2, 2).
        stride: from one window to the next; one number, or one for each axis. None: the window's
            size, so that the windows lie side by side.
        padding: "VALID", only whole windows; "SAME", ceil(size / stride) of them.

    Raises:
        ValueError: sizes below 1, examples with other axes, a window larger than the input.
        TypeError: inputs that are not floating-point numbers.
    """

    def _pool(self, x: Array) -> tuple[Array, Shapes]:
        y = x.astype(wide_dtype(x.dtype))
        axes = self._axes(x.shape[:-1])
        for axis in axes:
            first, *others = axis.seen(y, 0)
            for other in others:
                first = first + other
            y = first
        return (y * self._shares(axes, y)).astype(x.dtype), Shapes.of(x)

    @staticmethod
    def _shares(axes: list[_Axis], y: Array) -> Array:
        """1/n_t at every output."""
        counts = np.ones(1)
        for axis in axes:
            counts = counts[..., None, :] * np.sum(axis.real(), axis=0)[:, None]
        return jnp.asarray(1 / counts, y.dtype)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        axes = self._axes(trace.saved.back.shape[:-1])
        wide = delta.astype(wide_dtype(delta.dtype))
        wide = wide * self._shares(axes, wide)
        for axis in axes:
            wide = axis.spread([wide] * axis.width)
        return wide.astype(delta.dtype), ()


class _Global(Weightless):
    """One number for each channel, over all positions."""

    def _check(self, params: PyTree, x: Array) -> None:
        super()._check(params, x)
        if x.ndim < 2 or math.prod(x.shape[:-1]) == 0:
            raise ValueError(
                f"{self} needs positions and an axis of channels, such as (height, width, "
                f"channels), but one example has the shape {x.shape}"
            )


@dataclasses.dataclass(frozen=True)
class GlobalAveragePool(_Global):
    """The mean over all positions of every channel.

        y_c = 1/T sum_t x_tc         x (*size, c) -> y (c,), T positions in all

    Derivation. dy_c/dx_tc = 1/T at every position: dC/dx_tc = 1/T dC/dy_c.

    Source: Lin, Chen and Yan, Network in network (2014), section 3.2.
    """

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, Shapes]:
        self._check(params, x)
        y = jnp.mean(x, axis=tuple(range(x.ndim - 1)), dtype=wide_dtype(x.dtype))
        return y.astype(x.dtype), Shapes.of(x)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        shape = trace.saved.back.shape
        return jnp.broadcast_to(delta / math.prod(shape[:-1]), shape), ()


@dataclasses.dataclass(frozen=True)
class GlobalMaxPool(_Global):
    """The largest entry of every channel over all positions.

        y_c = max_t x_tc             x (*size, c) -> y (c,)

    Derivation. As for `MaxPool`: dC/dx_tc is dC/dy_c at the position that holds the largest entry,
    the first of them in order (the last axis fastest) where there are several, and 0 elsewhere.
    """

    reads: ClassVar[tuple[str, ...]] = ("x", "y")

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(params, x)
        positions = x.reshape(-1, x.shape[-1])
        return jnp.take_along_axis(positions, jnp.argmax(positions, 0)[None], 0)[0], None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, tuple[()]]:
        x = trace.x.reshape(-1, trace.x.shape[-1])
        first = jnp.argmax((x == trace.y[None]) | (x != x), axis=0)
        here = lax.broadcasted_iota(first.dtype, x.shape, 0) == first[None]
        delta_x = jnp.where(here, delta[None], jnp.zeros((), delta.dtype))
        return delta_x.reshape(trace.x.shape), ()
