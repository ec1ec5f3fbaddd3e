"""The forward-forward algorithm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.checks import check_numbers, check_sizes
from jbackprop.credit.chain import (
    check_chain,
    join_units,
    split_units,
    unit_backward,
    unit_forward,
    units,
)
from jbackprop.credit.rule import Info, Rule, State, keep, taken_apart
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.losses import Loss
from jbackprop.sweep import Node, batch_size


@dataclasses.dataclass(frozen=True)
class ForwardForward(Rule):
    """Every unit learns by itself to tell a right label in its input from a wrong one.

    The first `classes` numbers of an example are replaced by its label: `on` in the label's place,
    else 0. Positive examples have their own label, negative ones another, drawn at random. Each
    unit h^l = f_l(n(h^{l-1}) W + b), with n(h) = h / sqrt(mean h^2) (of x: x itself), is to have a
    high goodness g^l = mean (h^l)^2 for the positive ones and a low one for the negative:

        C^l = log(1 + exp(threshold - g+)) + log(1 + exp(g- - threshold))
        dC^l/dh^l = -sigmoid(threshold - g) 2 h^l / q   (positive),
                     sigmoid(g - threshold) 2 h^l / q   (negative),     q the size of h^l

    and its delta goes through its own activation and no further: delta^l = dC^l/dh^l * f'(z^l). The
    cost is the sum over all units; no unit sees another's. The network's loss has no part in it (it
    is what `fit` and `evaluate` report of the `outputs`, and must take integer labels); a network
    ends in a hidden unit rather than in net inputs for the classes.

    `outputs` are (B, classes): for each label that is put in, the goodness summed over all units,
    or over all but the first if there are several. The greatest is the prediction. `truth` is the
    gradient of the same cost where units do see each other's, by backpropagation through all.

    Source: Hinton, The forward-forward algorithm: some preliminary investigations (2022), sections
    2 and 3.3. The goodness is a mean here, not a sum of squares: a threshold then serves units of
    every width.

    Initialisation: nothing to begin with. Negative labels are drawn from the state's key.

    Assumes: integer labels; inputs of floating-point numbers whose first entries may be overwritten
    (the corner of a digit); a chain of units, in which nothing couples the examples or draws.

    Attributes:
        classes: how many labels there are.
        threshold: of the goodness, above 0.
        on: the number for the label.

    `Info.extra` has the mean goodness of each unit, positive and negative: "positive", "negative",
    (units,). `Info.outputs` is None: they take a forward sweep for each label.

    Raises:
        ValueError: settings out of range; composites with weights inside; other targets.
    """

    classes: int = 10
    threshold: float = 2.0
    on: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "classes", least=2)
        check_numbers(self, "threshold", "on", above=0)

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        check_chain(net, type(self).__name__)
        if net.draws:
            raise ValueError("ForwardForward is not defined for layers that draw, such as dropout")
        return None

    def check(self, net: Node, loss: Loss, params: PyTree, x: Any, y: Any) -> None:
        if jnp.ndim(y) != 1 or not jnp.issubdtype(jnp.result_type(y), jnp.integer):
            raise ValueError(
                f"ForwardForward needs integer labels (B,), not {jnp.shape(y)} of "
                f"{jnp.result_type(y)}"
            )
        if not isinstance(y, jax.core.Tracer) and (np.min(y) < 0 or np.max(y) >= self.classes):
            raise ValueError(
                f"ForwardForward: labels must be from 0 to {self.classes - 1}, but they go from "
                f"{np.min(y)} to {np.max(y)}; classes says how many there are"
            )
        loss.check((len(y), self.classes), y)
        if not jnp.issubdtype(jnp.result_type(*jax.tree.leaves(x)), jnp.floating):
            raise TypeError(
                "ForwardForward puts labels among the numbers of an example, which must be "
                f"floating-point ones, not {jax.tree.map(jnp.result_type, x)}"
            )
        if not hasattr(x, "dtype") or x[0].size < self.classes:
            raise ValueError(
                f"ForwardForward puts {self.classes} labels in the place of an example's first "
                f"numbers, but an example has the shape {jax.tree.map(jnp.shape, x)}"
            )

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        net, n = state.net, batch_size(x)
        both = self._both(state, x, y)
        sign = _signs(both, n)
        kept, costs, seen = [], [], []
        h = both
        for unit, own in zip(units(net), split_units(net, params), strict=True):
            h, traces = unit_forward(unit, own, h)
            g = _goodness(h)
            costs.append(jax.nn.softplus(sign * (self.threshold - g)))
            slope = -sign * jax.nn.sigmoid(sign * (self.threshold - g)) * 2 / (h.size // (2 * n))
            delta = slope.reshape(-1, *(1,) * (h.ndim - 1)).astype(h.dtype) * h
            kept.append(unit_backward(unit, own, traces, delta, keep)[1])
            seen.append((jnp.mean(g[:n]), jnp.mean(g[n:])))
            h = _normalised(h)
        grads, deltas = taken_apart(net, join_units(net, kept), n)
        deltas = jax.tree.map(lambda d: d[:n], deltas)
        positive, negative = (jnp.stack(part) for part in zip(*seen, strict=True))
        extra = {"positive": positive, "negative": negative}
        return grads, Info(jnp.sum(jnp.stack(costs)) / n, None, deltas, extra)

    def outputs(self, state: State, params: PyTree, x: Any) -> Any:
        labels = jnp.arange(self.classes)

        def of(label: Array) -> Array:
            good = self._goodnesses(state, params, self._with(x, jnp.full(batch_size(x), label)))
            return jnp.sum(jnp.stack(good[1:] or good), axis=0)

        return lax.map(of, labels).T

    def truth(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> PyTree:
        both, n = self._both(state, x, y), batch_size(x)
        sign = _signs(both, n)

        def cost(params: PyTree) -> Array:
            good = jnp.stack(self._goodnesses(state, params, both))
            return jnp.sum(jax.nn.softplus(sign[None] * (self.threshold - good))) / n

        return jax.grad(cost)(params)

    def true_deltas(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> dict[str, Any]:
        return {}

    def _goodnesses(self, state: State, params: PyTree, x: Array) -> list[Array]:
        found = []
        for unit, own in zip(units(state.net), split_units(state.net, params), strict=True):
            h = unit_forward(unit, own, x)[0]
            found.append(_goodness(h))
            x = _normalised(h)
        return found

    def _both(self, state: State, x: Array, y: Array) -> Array:
        """The examples with their labels, and behind them with others."""
        y = jnp.asarray(y, jnp.int32)
        shift = jax.random.randint(state.drawn, y.shape, 1, self.classes, jnp.int32)
        wrong = (y + shift) % self.classes
        return jnp.concatenate([self._with(x, y), self._with(x, wrong)])

    def _with(self, x: Array, y: Array) -> Array:
        x = jnp.asarray(x)
        flat = x.reshape(x.shape[0], -1)
        label = self.on * jax.nn.one_hot(y, self.classes, dtype=x.dtype)
        return jnp.concatenate([label, flat[:, self.classes :]], axis=1).reshape(x.shape)


def _signs(both: Array, n: int) -> Array:
    """1 for each positive example, -1 for each negative one."""
    return jnp.repeat(jnp.asarray([1, -1], wide_dtype(both.dtype)), n)


def _goodness(h: Array) -> Array:
    """The mean square of each example's activities, (B,)."""
    flat = h.reshape(h.shape[0], -1)
    return jnp.mean(jnp.square(flat.astype(wide_dtype(h.dtype))), axis=1)


def _normalised(h: Array) -> Array:
    """Each example over the root of its mean square."""
    size = _goodness(h).reshape(-1, *(1,) * (h.ndim - 1))
    return h / jnp.sqrt(size + jnp.finfo(size.dtype).eps).astype(h.dtype)
