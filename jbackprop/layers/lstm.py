"""Long short-term memory."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_numbers
from jbackprop.factored import PyTree
from jbackprop.layers.recurrent import Recurrent, carried, recurrent_input


@dataclasses.dataclass(frozen=True, repr=False)
class LSTM(Recurrent):
    """Long short-term memory: a cell state that is carried from step to step by addition.

    Equation, for one example, t = 1 ... T, h_0 = c_0 = 0, s the logistic function, * elementwise:

        z_t = x_t W_x + h_{t-1} W_h + b                              x (T, p), z (T, 4q)
        i_t = s(z^i_t)    f_t = s(z^f_t)    g_t = tanh(z^g_t)    o_t = s(z^o_t)
        c_t = f_t * c_{t-1} + i_t * g_t                              (q,)
        h_t = o_t * tanh(c_t)                                        y = h (T, q)

    The four blocks of q columns of z, and so of W_x, W_h and b, are in this order: the input gate
    i, the forget gate f, the candidate g, the output gate o.

    Derivation. Write dC/dh_t and dC/dc_t for the *complete* derivatives. h_t reaches the cost as
    the output y_t and through the net input of the next step; c_t through h_t and through the next
    cell state:

        dC/dh_t = dC/dy_t + delta_{t+1} W_h^T                        delta_{T+1} = 0
        dC/dc_t = dC/dh_t * o_t * (1 - tanh^2 c_t) + dC/dc_{t+1} * f_{t+1}

    The gates are factors of c_t and h_t, so that

        dC/do_t = dC/dh_t * tanh c_t            dC/di_t = dC/dc_t * g_t
        dC/df_t = dC/dc_t * c_{t-1}             dC/dg_t = dC/dc_t * i_t

    and with s' = s (1 - s) and tanh' = 1 - tanh^2 the delta of the net inputs, delta_t = dC/dz_t:

        delta^i = dC/di * i (1 - i)    delta^f = dC/df * f (1 - f)
        delta^g = dC/dg * (1 - g^2)    delta^o = dC/do * o (1 - o)

    From it, with all four blocks at once,

        dC/dx_t = delta_t W_x^T
        dC/dW_x = sum_t x_t (outer) delta_t
        dC/dW_h = sum_t h_{t-1} (outer) delta_t
        dC/db   = sum_t delta_t

    On the way dC/dc_{t+1} -> dC/dc_t there is one factor, f_{t+1}, and no matrix: where the forget
    gate is open, the delta comes through unchanged over hundreds of steps. Hochreiter and
    Schmidhuber call it the constant error carousel.

    Kept are the gates i, f, g, o and the cell state before, c_{t-1}, 5q numbers a step; c_t and
    its tanh are made again. To make the gates again, W_h would be needed, which may only carry.

    Source: Hochreiter and Schmidhuber, Long short-term memory, Neural Computation 9 (1997); the
    forget gate: Gers, Schmidhuber and Cummins, Learning to forget, Neural Computation 12 (2000).

    Params: ``{"w_x": (p, 4q), "w_h": (q, 4q), "b": (4q,)}``.

    Attributes:
        p, q, reverse, truncate, states, w_init, u_init: as in `Recurrent`. A state is (h (q,),
            c (q,)).
        forget_bias: what `init` sets the forget gate's part of b to: 1 by default, so that the gate
            is open (0.73) before anything is learnt. Gers et al. (2000), section 4.1.

    Raises:
        ValueError: sizes below 1; inputs, states or parameters of another shape.
        TypeError: inputs that are not floating-point; a flag that is no bool.
    """

    forget_bias: float = 1.0

    gates: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "forget_bias")

    def init(self, key: Array) -> PyTree:
        params = super().init(key)
        forget = slice(self.q, 2 * self.q)
        return params | {"b": params["b"].at[forget].set(self.forget_bias)}

    def zero_state(self, dtype: Any) -> PyTree:
        return (jnp.zeros((self.q,), dtype), jnp.zeros((self.q,), dtype))

    def _step(
        self, params: PyTree, state: tuple[Array, Array], z: Array
    ) -> tuple[PyTree, tuple[Array, ...]]:
        h_before, c_before = state
        z = z + recurrent_input(h_before, params["w_h"])
        z_i, z_f, z_g, z_o = jnp.split(z, 4)
        i, f, g, o = jax.nn.sigmoid(z_i), jax.nn.sigmoid(z_f), jnp.tanh(z_g), jax.nn.sigmoid(z_o)
        c = f * c_before + i * g
        h = o * jnp.tanh(c)
        return (h, c), (i, f, g, o, c_before)

    def _step_back(
        self, params: PyTree, kept: tuple[Array, ...], delta_state: tuple[Array, Array]
    ) -> tuple[PyTree, Array]:
        i, f, g, o, c_before = kept
        delta_h, delta_c = delta_state
        tanh_c = jnp.tanh(f * c_before + i * g)
        delta_c = delta_c + delta_h * o * (1 - tanh_c * tanh_c)
        delta = jnp.concatenate([
            delta_c * g * i * (1 - i),
            delta_c * c_before * f * (1 - f),
            delta_c * i * (1 - g * g),
            delta_h * tanh_c * o * (1 - o),
        ])  # fmt: skip
        return (carried(delta, params["w_h"]), delta_c * f), delta
