"""Batch normalisation: the one rule that sums over the batch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array, lax

from jbackprop.factored import wide_dtype
from jbackprop.layers.normalization import Normalization
from jbackprop.sweep import BATCH_AXIS


@dataclasses.dataclass(frozen=True, repr=False)
class BatchNorm(Normalization):
    """Batch normalisation: the set of an entry is its channel at all positions of all examples.

    Equation, for examples n = 1..B, their positions t = 1..P (all axes but the last; there may be
    none) and channels o:

        m_o   = 1/(B P) sum_n sum_t x_nto
        v_o   = 1/(B P) sum_n sum_t (x_nto - m_o)^2
        h_nto = (x_nto - m_o) / sqrt(v_o + epsilon)
        y_nto = h_nto g_o + b_o                           x (..., channels) -> y (..., channels)

    Derivation: that of `layers/normalization.py`, where the mean M goes over the batch. It is still
    symmetric, but now x_n reaches the costs of all examples, through m and v. So the delta here is
    not that of one example's own cost, but of the sum of all costs, weighted as they are where the
    deltas begin. With delta = d(sum_m C_m)/dy, e_nto = delta_nto g_o and r_o the factor,

        dC/dx_nto = r_o (e_nto - 1/(B P) sum_ms e_mso - h_nto 1/(B P) sum_ms h_mso e_mso)
        dC/dg_o   = sum_n sum_t h_nto delta_nto           dC/db_o = sum_n sum_t delta_nto

    The rule is written for one example all the same: the sums over the others are `lax.pmean` over
    the batch axis, which `sweep.BATCH_AXIS` names. Where the examples are spread over devices each
    of these means is a collective: no other rule of this library has one.

    It couples the examples: questions about one example's gradient have no answer, and are refused;
    an example of weight 0 still takes part in m and v. This is the layer to train with. To predict,
    or to ask about single examples, fix the statistics: see `jbackprop.batch_averages` and
    `jbackprop.fold_batch_norm`.

    Source: Ioffe and Szegedy, Batch normalization (2015), algorithm 1 and section 3.

    Params: ``{"scale": (channels,), "shift": (channels,)}``, those that there are; () for neither.

    Attributes:
        channels: the length of the last axis.
        epsilon: is added to the variance.
        scale: whether there is a g.
        shift: whether there is a b.

    Raises:
        ValueError: a size below 1; a negative epsilon; inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    channels: int
    epsilon: float = 1e-5
    scale: bool = True
    shift: bool = True

    sizes: ClassVar[tuple[str, ...]] = ("channels",)
    couples_examples: ClassVar[bool] = True

    def mean(self, v: Array) -> Array:
        own = jnp.mean(v, axis=tuple(range(v.ndim - 1)), keepdims=True)
        return lax.pmean(own, BATCH_AXIS)

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """m and the unbiased variance, v BP / (BP - 1): (channels,) each; v itself if BP is 1."""
        x = x.astype(wide_dtype(x.dtype))
        number = x.size // self.channels * lax.psum(1, BATCH_AXIS)
        m = self.mean(x)
        v = self.mean(jnp.square(x - m)) * (number / max(number - 1, 1))
        return m.reshape(-1), v.reshape(-1)
