"""The gated recurrent unit."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored import Outer, PyTree, Shift
from jbackprop.layers.recurrent import Recurrent, carried, recurrent_input


@dataclasses.dataclass(frozen=True, repr=False)
class GRU(Recurrent):
    """The gated recurrent unit: a hidden state that is a moving average, with learnt gates.

    Equation, for one example, t = 1 ... T, h_0 = 0, s the logistic function, * elementwise:

        z_t = x_t W_x + b            v_t = h_{t-1} W_h               x (T, p), z and v (T, 3q)
        r_t = s(z^r_t + v^r_t)       u_t = s(z^u_t + v^u_t)
        m_t = v^n_t + b_h            n_t = tanh(z^n_t + r_t * m_t)
        h_t = (1 - u_t) * n_t + u_t * h_{t-1}                        y = h (T, q)

    The three blocks of q columns of W_x, W_h and b are in this order: the reset gate r, the update
    gate u, the candidate n. The reset gate is applied behind the matmul with W_h, not before it (as
    in PyTorch and cuDNN), which needs one matmul a step; the candidate has a second bias, b_h,
    inside the reset.

    Derivation. Write dC/dh_t for the *complete* derivative. h_t reaches the cost as the output y_t,
    through the next step's average, and through its net inputs:

        dC/dh_t = dC/dy_t + dC/dh_{t+1} * u_{t+1} + dC/dv_{t+1} W_h^T

    The average, the candidate and the reset gate are products and sums:

        dC/du_t = dC/dh_t * (h_{t-1} - n_t)     dC/dn_t = dC/dh_t * (1 - u_t)
        dC/dz^u = dC/du * u (1 - u)             dC/dz^n = dC/dn * (1 - n^2)
        dC/dm   = dC/dz^n * r                   dC/dr   = dC/dz^n * m
        dC/dz^r = dC/dr * r (1 - r)

    So there are two deltas, equal but for the candidate, where r stands between:

        delta_t   = dC/dz_t = [dC/dz^r, dC/dz^u, dC/dz^n]
        delta^v_t = dC/dv_t = [dC/dz^r, dC/dz^u, dC/dm  ]

        dC/dx_t = delta_t W_x^T                 dC/dW_x = sum_t x_t (outer) delta_t
        dC/db   = sum_t delta_t                 dC/dW_h = sum_t h_{t-1} (outer) delta^v_t
        dC/db_h = sum_t dC/dm_t

    Kept are r, u, n and m, 4q numbers a step.

    Source: Cho et al., Learning phrase representations using RNN encoder-decoder for statistical
    machine translation, EMNLP (2014), equations 5 to 8 (there the reset gate is before the matmul,
    and u and 1 - u have changed places).

    Params: ``{"w_x": (p, 3q), "w_h": (q, 3q), "b": (3q,), "b_h": (q,)}``.

    Attributes:
        p, q, reverse, truncate, states, w_init, u_init: as in `Recurrent`. A state is h (q,).

    Raises:
        ValueError: sizes below 1; inputs, states or parameters of another shape.
        TypeError: inputs that are not floating-point; a flag that is no bool.
    """

    gates: ClassVar[int] = 3

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"b_h": (self.q,)}

    def _step(
        self, params: PyTree, state: Array, z: Array
    ) -> tuple[Array, tuple[Array, Array, Array, Array]]:
        z_r, z_u, z_n = jnp.split(z, 3)
        v_r, v_u, v_n = jnp.split(recurrent_input(state, params["w_h"]), 3)
        r, u = jax.nn.sigmoid(z_r + v_r), jax.nn.sigmoid(z_u + v_u)
        m = v_n + params["b_h"].astype(z.dtype)
        n = jnp.tanh(z_n + r * m)
        return (1 - u) * n + u * state, (r, u, n, m)

    def _for_loop(self, kept: PyTree, h: Array, before: Array) -> PyTree:
        return (*kept, before)

    def _step_back(
        self, params: PyTree, kept: PyTree, delta_state: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        r, u, n, m, before = kept
        delta_h = delta_state
        delta_u = delta_h * (before - n) * u * (1 - u)
        delta_n = delta_h * (1 - u) * (1 - n * n)
        delta_r = delta_n * m * r * (1 - r)
        delta_v = jnp.concatenate([delta_r, delta_u, delta_n * r])
        return delta_h * u + carried(delta_v, params["w_h"]), (delta_v, delta_n)

    def _pairs(self, x: Array, before: Array, deltas: tuple[Array, Array]) -> tuple[Array, PyTree]:
        delta_v, delta_n = deltas
        gates = 2 * self.q
        delta = jnp.concatenate([delta_v[:, :gates], delta_n], axis=1)
        return delta, {
            "w_x": Outer.of(x, delta),
            "w_h": Outer.of(before, delta_v),
            "b": Shift.of(delta),
            "b_h": Shift.of(delta_v[:, gates:]),
        }
