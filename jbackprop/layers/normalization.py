"""Normalisation: one derivation for all of them.

Every normalisation takes the entries of x in sets, centres each set at its mean, divides by the
root of its mean square, and gives each feature a gain g and a shift b. They differ in the sets
alone: all features of a position (layer norm), a group of features at all positions (group norm),
one feature at all positions of all examples (batch norm).

Equation. Let M be the operator that puts in the place of every entry the mean over its set:

    c = x - M x                         centred; root mean square norm leaves this out: c = x
    v = M (c * c)                       the variance of the set
    r = 1 / sqrt(v + epsilon)
    h = r * c
    y = h * g + b

Derivation. M is symmetric, being a mean over sets: <u, M w> = <M u, w>; M M = M; and whatever is
one number in each set passes through it, M (r * u) = r * M u. Let delta = dC/dy. The last line is
that of `layers/gain.py`:

    dC/dg = sum h * delta       dC/db = sum delta       and    e = dC/dh = delta * g.

1. From h to c. A change dc of c changes h directly, and through the r of the set:

       dv = 2 M (c * dc),     dr = -1/2 r^3 dv = -r^3 M (c * dc),     dh = r * dc + c * dr

   so that the cost changes by

       <e, dh> = <r * e, dc> - <e * c, r^3 M (c * dc)>
               = <r * e, dc> - <c * M (r^3 * e * c), dc>              M is symmetric
               = <r * (e - h * M (h * e)), dc>                        r c = h, r passes M

   hence dC/dc = r * (e - h * M (h * e)): what changes the scale of the set alone is taken out.

2. From c to x. dc = dx - M dx, hence dC/dx = dC/dc - M dC/dc. As M (h * M (..)) = M h * M (..) and
   M h = 0,

       dC/dx = r * (e - M e - h * M (h * e))

   what shifts the whole set is taken out too. Without centring there is no step 2, and no M e.

This is exact for any epsilon. The rule reads x alone and makes r and h again: two means over a set
cost less than to keep them. The mean square is that of c, never M (x * x) - (M x)^2, which cancels.

References:
    Ba, Kiros and Hinton, Layer normalization (2016), equation 4.
    Ioffe and Szegedy, Batch normalization (2015), whose section 3 has the delta in another form.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_flags, check_numbers, check_sizes
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers.checks import check_features, check_params, shown
from jbackprop.layers.gain import rescaled, rescaled_back
from jbackprop.sweep import Layer, Trace


class Normalization(Layer):
    """What all normalisations share; a subclass says over which sets it takes the `mean`.

    Statistics are computed in float32 at least; y has x's dtype.
    """

    reads: ClassVar[tuple[str, ...]] = ("x",)
    centred: ClassVar[bool] = True
    axes: ClassVar[int] = 1  # that one example has at least
    sizes: ClassVar[tuple[str, ...]] = ("features",)

    epsilon: float
    scale: bool
    shift: bool

    @abc.abstractmethod
    def mean(self, v: Array) -> Array:
        """M v: the mean over the set of every entry, in a shape that broadcasts to v's."""

    def standardized(self, x: Array) -> tuple[Array, Array]:
        """h and r."""
        c = x.astype(wide_dtype(x.dtype))
        if self.centred:
            c = c - self.mean(c)
        r = lax.rsqrt(self.mean(c * c) + self.epsilon)
        return c * r, r

    def __post_init__(self) -> None:
        check_sizes(self, *self.sizes)
        check_flags(self, "scale", "shift")
        check_numbers(self, "epsilon", least=0)

    def __repr__(self) -> str:
        return shown(self, *self.sizes)

    def init(self, key: Array) -> PyTree:
        first = {"scale": jnp.ones, "shift": jnp.zeros}
        dtype = jnp.result_type(float)
        return {name: first[name](shape, dtype) for name, shape in self._shapes.items()} or ()

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        check_features(self, x, self.width, self.axes)
        check_params(self, params, self._shapes)
        h, _ = self.standardized(x)
        return rescaled(params, h).astype(x.dtype), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, PyTree]:
        h, r = self.standardized(trace.x)
        e, factored = rescaled_back(params, h, delta.astype(h.dtype))
        left = e - h * self.mean(h * e)
        if self.centred:
            left = left - self.mean(e)
        return (r * left).astype(trace.x.dtype), factored

    @property
    def width(self) -> int:
        """The length of the last axis."""
        return int(getattr(self, self.sizes[-1]))

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        present = {"scale": self.scale, "shift": self.shift}
        return {name: (self.width,) for name, there in present.items() if there}


@dataclasses.dataclass(frozen=True, repr=False)
class LayerNorm(Normalization):
    """Layer normalisation: the set of an entry is all features of its position.

    Equation, for position t of one example with q features:

        m_t  = 1/q sum_o x_to
        v_t  = 1/q sum_o (x_to - m_t)^2
        h_to = (x_to - m_t) / sqrt(v_t + epsilon)
        y_to = h_to g_o + b_o                             x (..., q) -> y (..., q)

    Derivation: that of this file. With e_to = delta_to g_o and r_t = 1 / sqrt(v_t + epsilon),

        dC/dx_to = r_t (e_to - 1/q sum_k e_tk - h_to 1/q sum_k h_tk e_tk)
        dC/dg_o  = sum_t h_to delta_to                    dC/db_o = sum_t delta_to

    Source: Ba, Kiros and Hinton, Layer normalization (2016), equation 4.

    Params: ``{"scale": (q,), "shift": (q,)}``, those that there are; () for neither.

    Attributes:
        features: q, the length of the last axis.
        epsilon: is added to the variance.
        scale: whether there is a g.
        shift: whether there is a b.

    Raises:
        ValueError: a size below 1; a negative epsilon; inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    features: int
    epsilon: float = 1e-5
    scale: bool = True
    shift: bool = True

    def mean(self, v: Array) -> Array:
        return jnp.mean(v, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, repr=False)
class RMSNorm(Normalization):
    """Root mean square normalisation: a layer norm that does not centre.

    Equation, for position t of one example with q features:

        h_to = x_to / sqrt(1/q sum_k x_tk^2 + epsilon)
        y_to = h_to g_o                                   x (..., q) -> y (..., q)

    Derivation: step 1 of this file alone. With e_to = delta_to g_o and r_t the factor of x_to,

        dC/dx_to = r_t (e_to - h_to 1/q sum_k h_tk e_tk)              dC/dg_o = sum_t h_to delta_to

    Source: Zhang and Sennrich, Root mean square layer normalization (2019), equation 4.

    Params: ``{"scale": (q,)}``, with a shift also ``"shift": (q,)``; () for neither.

    Attributes:
        features: q, the length of the last axis.
        epsilon: is added to the mean square.
        scale: whether there is a g.
        shift: whether there is a shift too; by default not.

    Raises:
        ValueError: a size below 1; a negative epsilon; inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    features: int
    epsilon: float = 1e-5
    scale: bool = True
    shift: bool = False

    centred: ClassVar[bool] = False

    def mean(self, v: Array) -> Array:
        return jnp.mean(v, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, repr=False)
class GroupNorm(Normalization):
    """Group normalisation: the set of an entry is its group of channels at all positions.

    Equation, for one example with positions t = 1..P (all axes but the last), and channels o that
    are parted, in their order, into groups G of q = channels / groups:

        m_G  = 1/(P q) sum_t sum_{k in G} x_tk
        v_G  = 1/(P q) sum_t sum_{k in G} (x_tk - m_G)^2
        h_to = (x_to - m_G) / sqrt(v_G + epsilon)         for o in G
        y_to = h_to g_o + b_o                             x (..., channels) -> y (..., channels)

    Derivation: that of this file. With e_to = delta_to g_o, r_G the factor, and both means over all
    positions s and all channels k of the group,

        dC/dx_to = r_G (e_to - mean e_sk - h_to mean h_sk e_sk)
        dC/dg_o  = sum_t h_to delta_to                    dC/db_o = sum_t delta_to

    Source: Wu and He, Group normalization (2018), equations 1 to 7.

    Params: ``{"scale": (channels,), "shift": (channels,)}``, those that there are; () for neither.

    Attributes:
        groups: into how many groups the channels are parted; must divide them.
        channels: the length of the last axis.
        epsilon: is added to the variance.
        scale: whether there is a g.
        shift: whether there is a b.

    Raises:
        ValueError: a size below 1; groups that do not divide the channels; a negative epsilon;
            inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    groups: int
    channels: int
    epsilon: float = 1e-5
    scale: bool = True
    shift: bool = True

    sizes: ClassVar[tuple[str, ...]] = ("groups", "channels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels % self.groups:
            divisors = [str(g) for g in range(1, self.channels + 1) if self.channels % g == 0]
            raise ValueError(
                f"{self}: {self.groups} groups do not divide {self.channels} channels; these do: "
                f"{', '.join(divisors)}"
            )

    def mean(self, v: Array) -> Array:
        return _group_mean(v, self.groups)


@dataclasses.dataclass(frozen=True, repr=False)
class InstanceNorm(Normalization):
    """Instance normalisation: the set of an entry is its channel at all positions of its example.

    Equation, for one example with positions t = 1..P (all axes but the last) and channels o:

        m_o  = 1/P sum_t x_to
        v_o  = 1/P sum_t (x_to - m_o)^2
        h_to = (x_to - m_o) / sqrt(v_o + epsilon)
        y_to = h_to g_o + b_o                             x (..., channels) -> y (..., channels)

    Derivation: that of this file; it is a group norm with one channel in each group. With
    e_to = delta_to g_o and r_o the factor,

        dC/dx_to = r_o (e_to - 1/P sum_s e_so - h_to 1/P sum_s h_so e_so)
        dC/dg_o  = sum_t h_to delta_to                    dC/db_o = sum_t delta_to

    Source: Ulyanov, Vedaldi and Lempitsky, Instance normalization (2016), equation 5.

    Params: ``{"scale": (channels,), "shift": (channels,)}``, those that there are; () for neither.

    Attributes:
        channels: the length of the last axis.
        epsilon: is added to the variance.
        scale: whether there is a g.
        shift: whether there is a b.

    Raises:
        ValueError: a size below 1; a negative epsilon; inputs without positions; inputs or
            parameters of another shape.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    channels: int
    epsilon: float = 1e-5
    scale: bool = True
    shift: bool = True

    sizes: ClassVar[tuple[str, ...]] = ("channels",)
    axes: ClassVar[int] = 2  # one entry alone has no spread

    def mean(self, v: Array) -> Array:
        return jnp.mean(v, axis=tuple(range(v.ndim - 1)), keepdims=True)


def _group_mean(v: Array, groups: int) -> Array:
    """The mean over all positions and each group's channels: (..., C) -> (1, ..., 1, C)."""
    q = v.shape[-1] // groups
    means = jnp.mean(v.reshape(-1, groups, q), axis=(0, 2))
    return jnp.repeat(means, q).reshape((1,) * (v.ndim - 1) + v.shape[-1:])
