"""Recurrence: what all recurrent layers share, and the plain recurrent layer.

One example is a sequence x (T, p), and every step has a hidden state of its own, h (T, q). A
recurrent layer is a very deep network whose layers share their weights: unrolled, step t is layer
t, with one input from below, x_t, and one from the step before, h_{t-1}. Its delta rule is thus
the one of a deep network: *backpropagation through time*. And since the steps share the weights,
the gradient of a weight is a sum over the steps,

    dC/dW_x = sum_t x_t (outer) delta_t        dC/dW_h = sum_t h_{t-1} (outer) delta_t

where delta_t = dC/dz_t is the delta of the net input of step t. Time is position: these are the
kinds `Outer` and `Shift`. Only what one step hands to the next has to be computed step by step.
Back, the loop carries delta_t W_h^T and hands out delta_t; the sums and the delta of x are one
matmul each over all steps, behind the loop. (Autodiff adds the outer product of every step to
dC/dW_h inside the loop.)

Forward, x_t W_x is made inside the loop. One matmul for all steps before it is the common advice;
but the net inputs of all steps are the largest array that there would be, written twice (time has
to come first) and read once, which on a CPU costs as much as it saves and a third of the memory.

Source: Werbos, Backpropagation through time: what it does and how to do it, Proceedings of the
IEEE 78 (1990), equations 13 to 17.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from jbackprop.checks import check_flags, check_functions, check_key, check_sizes
from jbackprop.factored import Outer, PyTree, Shift, wide_dtype
from jbackprop.layers.activations import Tanh
from jbackprop.layers.checks import check_features, check_params, shown
from jbackprop.layers.dense import Init, glorot_uniform
from jbackprop.layers.elementwise import Elementwise
from jbackprop.sweep import Layer, Trace

_orthogonal = initializers.orthogonal()


def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Saxe, McClelland and Ganguli (2014): a random rotation, which keeps the size of a delta."""
    return _orthogonal(key, shape, dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Recurrent(Layer):
    """What the recurrent layers share: x (T, p) -> y (T, q), the hidden states of all steps.

    The first step starts from a state of zeros. With `states` the layer is handed a state and
    hands out the last one, so that one layer can go on where another, or it itself on the piece of
    the sequence before, has stopped; their deltas go the same way back:

        x = (sequence (T, p), first state)  ->  y = (hidden states (T, q), last state)

    With `truncate` = k, backpropagation through time is cut after every k steps. Counted from 0 in
    the order in which the layer runs, the steps k, 2k, 3k, ... take the state of the step before
    them as a given number: no delta crosses from step k to step k - 1. So every delta reaches back
    to the start of its piece of k steps, that is through at most k - 1 states. The states
    themselves do cross; the forward sweep computes the same numbers as without `truncate`, through
    `lax.stop_gradient` at the cuts, so that autodiff of it is truncated likewise. (The sums over t
    are not cut: x_k and h_{k-1} still have their outer products with delta_k. A first state that
    is handed in gets its delta from the first piece.)

    Attributes:
        p: the number of inputs of each step.
        q: the number of hidden units.
        reverse: whether it runs from the last step to the first. y_t still belongs to x_t.
        truncate: after how many steps backpropagation through time is cut; None is never.
        states: whether a first state is handed in and the last one handed out; see above.
        w_init: initialiser of each gate's block (p, q) of w_x, by default Glorot and Bengio's.
        u_init: initialiser of each gate's block (q, q) of w_h, by default orthogonal.
    """

    p: int
    q: int
    reverse: bool = False
    truncate: int | None = None
    states: bool = False
    w_init: Init = glorot_uniform
    u_init: Init = orthogonal

    gates: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sizes(self, "p", "q")
        check_flags(self, "reverse", "states")
        check_functions(self, "w_init", "u_init")
        if self.truncate is not None:
            check_sizes(self, "truncate")

    def __repr__(self) -> str:
        return shown(self, "p", "q")

    @property
    def reads(self) -> tuple[str, ...]:
        # Nobody reads the first and last cell states, which are parts of x and y: what is read of
        # x and y is saved instead.
        return () if self.states else ("x", "y")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters."""
        wide = self.gates * self.q
        return {"w_x": (self.p, wide), "w_h": (self.q, wide), "b": (wide,)}

    def init(self, key: Array) -> PyTree:
        dtype = jnp.result_type(float)
        check_key(key, f"{self}.init: key")
        keys = jax.random.split(key, (2, self.gates))
        blocks_x = [self.w_init(k, (self.p, self.q), dtype) for k in keys[0]]
        blocks_h = [self.u_init(k, (self.q, self.q), dtype) for k in keys[1]]
        biases = {n: jnp.zeros(s, dtype) for n, s in self.shapes().items() if n not in _WEIGHTS}
        return {
            "w_x": jnp.concatenate(blocks_x, axis=1),
            "w_h": jnp.concatenate(blocks_h, axis=1),
        } | biases

    # What a subclass gives: the step, and its delta rule.

    def zero_state(self, dtype: Any) -> PyTree:
        """The state before the first step: here the hidden state (q,)."""
        return jnp.zeros((self.q,), dtype)

    @abc.abstractmethod
    def _step(self, params: PyTree, state: PyTree, z: Array) -> tuple[PyTree, PyTree]:
        """The next state, and what the way back needs, from the state before and z = x_t W_x + b.

        In float32 at least. The hidden state is the state itself, or its first part.
        """

    def _for_loop(self, kept: PyTree, h: Array, before: Array) -> PyTree:
        """What the loop back reads: of what was kept, of the hidden states and of those before."""
        return kept

    @abc.abstractmethod
    def _step_back(
        self, params: PyTree, kept: PyTree, delta_state: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The delta rule of a step: from dC/dstate, complete, to that of the state before.

        As second, the deltas of the net inputs, for `_pairs`.
        """

    def _pairs(self, x: Array, before: Array, deltas: PyTree) -> tuple[Array, PyTree]:
        """The delta of x W_x of all steps, and the factored gradients."""
        pairs = {"w_x": Outer.of(x, deltas), "w_h": Outer.of(before, deltas)}
        return deltas, pairs | {"b": Shift.of(deltas)}

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, PyTree]:
        x, first = self._parts(x)
        check_params(self, params, self.shapes())
        dtype = jnp.result_type(x, params["w_x"])
        wide = wide_dtype(dtype)
        first = self.zero_state(dtype) if first is None else first

        def step(state: PyTree, at: tuple[Array, Any]) -> tuple[PyTree, tuple[Array, PyTree]]:
            x_t, cut = at
            if cut is not None:
                state = jax.tree.map(lambda s: jnp.where(cut, lax.stop_gradient(s), s), state)
            z = jnp.dot(x_t, params["w_x"]).astype(wide) + params["b"].astype(wide)
            state, kept = self._step(params, _cast(state, wide), z)
            state = _cast(state, dtype)
            return state, (_hidden(state), _cast(kept, dtype))

        at = x, self._cuts(len(x))
        last, (h, kept) = lax.scan(step, _cast(first, dtype), at, reverse=self.reverse)
        return ((h, last), (kept, x, h, _hidden(first))) if self.states else (h, kept)

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        if self.states:
            (kept, x, h, h_0), (delta_y, delta_last) = trace.saved, delta
        else:
            x, kept, h, delta_y = trace.x, trace.saved, trace.y, delta
            h_0, delta_last = jnp.zeros_like(h[0]), self.zero_state(delta.dtype)
        edge = h_0.astype(h.dtype)[None]
        # h_{t-1} of every step: where the layer runs backwards, the step before is behind
        before = jnp.concatenate([h[1:], edge] if self.reverse else [edge, h[:-1]])

        def step(delta_state: PyTree, at: Any) -> tuple[PyTree, PyTree]:
            delta_t, cut, kept_t = at
            wide = wide_dtype(delta_t.dtype)
            delta_state = _plus_hidden(_cast(delta_state, wide), delta_t.astype(wide))
            delta_state, deltas = self._step_back(params, _cast(kept_t, wide), delta_state)
            if cut is not None:
                delta_state = jax.tree.map(lambda d: jnp.where(cut, jnp.zeros_like(d), d),
                                           delta_state)  # fmt: skip
            return _cast(delta_state, delta_t.dtype), _cast(deltas, delta_t.dtype)

        at = delta_y, self._cuts(len(h)), self._for_loop(kept, h, before)
        delta_first, deltas = lax.scan(step, delta_last, at, reverse=not self.reverse)
        delta_z, pairs = self._pairs(x, before, deltas)
        delta_x = carried(delta_z, params["w_x"]).astype(x.dtype)
        return ((delta_x, _cast(delta_first, x.dtype)) if self.states else delta_x), pairs

    def _cuts(self, steps: int) -> Array | None:
        """Whether a step takes the state before it as given, for every step; None: no step does."""
        if self.truncate is None:
            return None
        order = np.arange(steps)
        cuts = (order > 0) & (order % self.truncate == 0)
        return jnp.asarray(cuts[::-1] if self.reverse else cuts)

    def _parts(self, x: Any) -> tuple[Array, PyTree | None]:
        """The sequence and the first state of one example, checked; None where none is due."""
        state = None
        if self.states:
            if not isinstance(x, tuple) or len(x) != 2:
                raise ValueError(
                    f"{self} needs (sequence, first state) as its input, not "
                    f"{jax.tree.map(jnp.shape, x)}; to start from zeros leave `states` out"
                )
            x, state = x
            found, due = (
                jax.tree.map(lambda s: (jnp.shape(s), jnp.result_type(s)), tree)
                for tree in (state, self.zero_state(jnp.result_type(x)))
            )
            if found != due:
                raise ValueError(
                    f"{self} needs a first state like {due} for each example, in the dtype of the "
                    f"sequence, not {found}"
                )
        elif isinstance(x, tuple):
            raise ValueError(f"{self} takes one array; to hand in a first state set states=True")
        check_features(self, x, self.p)
        if jnp.ndim(x) != 2 or x.shape[0] == 0:
            batch = "; a single sequence needs a batch axis: x[None]" if jnp.ndim(x) == 1 else ""
            raise ValueError(
                f"{self} needs a sequence (T, {self.p}) of at least one step for each example, but "
                f"one has the shape {jnp.shape(x)}{batch}"
            )
        return x, state


_WEIGHTS = ("w_x", "w_h")


def carried(delta: Array, w: Array) -> Array:
    """delta W^T over the last axis, in delta's dtype."""
    last = delta.ndim - 1
    return lax.dot_general(delta, w.astype(delta.dtype), (((last,), (1,)), ((), ())))


def recurrent_input(h: Array, w: Array) -> Array:
    """h W_h of one step, multiplied in the dtype of the weights, in float32 at least."""
    return jnp.dot(h.astype(w.dtype), w).astype(h.dtype)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda v: v.astype(dtype), tree)


def _hidden(state: PyTree) -> Array:
    return state[0] if isinstance(state, tuple) else state


def _plus_hidden(delta_state: PyTree, delta: Array) -> PyTree:
    if isinstance(delta_state, tuple):
        return (delta_state[0] + delta, *delta_state[1:])
    return delta_state + delta


_TANH = Tanh()


@dataclasses.dataclass(frozen=True, repr=False)
class RNN(Recurrent):
    """The plain recurrent layer (Elman's): every step sees the hidden state of the step before.

    Equation, for one example, t = 1 ... T, h_0 = 0:

        z_t = x_t W_x + h_{t-1} W_h + b                              x (T, p), z (T, q)
        h_t = f(z_t)                                                 y = h (T, q)

    Derivation. Let delta_t = dC/dz_t, and dC/dh_t the *complete* derivative: h_t reaches the cost
    directly, as the output y_t, and through the net input of the next step,

        dC/dh_t = dC/dy_t + delta_{t+1} W_h^T                        delta_{T+1} = 0
        delta_t = dC/dh_t * f'(z_t)

    which is the delta rule with a second source of deltas at every layer. From delta_t,

        dC/dx_t = delta_t W_x^T
        dC/dW_x = sum_t x_t (outer) delta_t
        dC/dW_h = sum_t h_{t-1} (outer) delta_t
        dC/db   = sum_t delta_t

    Over n steps the factors W_h^T and f' multiply n times: deltas vanish, or explode. That is what
    the gates of `LSTM` and `GRU` are for (examples/adding_problem.py shows it).

    Source: Elman, Finding structure in time, Cognitive Science 14 (1990); Werbos (1990), as above.

    Params: ``{"w_x": (p, q), "w_h": (q, q), "b": (q,)}``.

    Attributes:
        p, q, reverse, truncate, states, w_init, u_init: as in `Recurrent`. A state is h (q,).
        activation: f, an `Elementwise` activation; by default `Tanh`.

    Raises:
        ValueError: sizes below 1; inputs, states or parameters of another shape.
        TypeError: an activation that is not elementwise; inputs that are not floating-point; a
            flag that is no bool.
    """

    activation: Elementwise = _TANH

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.activation, Elementwise):
            raise TypeError(
                f"RNN: activation must be an elementwise activation layer such as Tanh(), not "
                f"{self.activation!r}"
            )

    def _step(self, params: PyTree, state: Array, z: Array) -> tuple[Array, PyTree]:
        z = z + recurrent_input(state, params["w_h"])
        return self.activation.activate(z), z if "x" in self.activation.reads else None

    def _for_loop(self, kept: Any, h: Array, before: Array) -> Array:
        return self.activation.slope(kept, h)

    def _step_back(self, params: PyTree, kept: Array, delta_state: Array) -> tuple[Array, Array]:
        slope = kept
        delta = delta_state * slope
        return carried(delta, params["w_h"]), delta
