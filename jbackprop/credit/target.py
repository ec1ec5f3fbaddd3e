"""Difference target propagation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_numbers
from jbackprop.credit.carriers import (
    as_transport,
    carriers,
    check_single,
    example_of,
    inputs_of,
    like_fresh,
    map_feedback,
)
from jbackprop.credit.chain import (
    Unit,
    activates,
    check_chain,
    join_units,
    nothing,
    split_units,
    unit_backward,
    unit_forward,
    units,
    weighted,
)
from jbackprop.credit.rule import Info, Rule, State, keep, taken_apart, widened
from jbackprop.factored import PyTree
from jbackprop.sweep import Node, backward, batch_size, total


@dataclasses.dataclass(frozen=True)
class DifferenceTargetPropagation(Rule):
    """Every unit has a target, carried back by an inverse that is learned:

        t^{L-1} = h^{L-1} - step dC/dh^{L-1}
        t^{l-1} = h^{l-1} + g_l(t^l) - g_l(h^l)           l = L-1, ..., 2
        g_l(h) = f_{l-1}(h V_l^T + c_l)

    for units h^l = f_l(h^{l-1} W_l + b_l). Each unit follows the gradient of its own distance from
    its target, 1/2 |h^l - t^l|^2 / step, through its own activation and no further:

        delta^l = ((h^l - t^l) / step) * f_l'(z^l)         dC/dW^l ~ h^{l-1} (outer) delta^l

    and the last one that of the cost. Division by the step makes them as large as deltas are: as
    the step goes to 0, t^{l-1} - h^{l-1} becomes the product with the derivative of g_l, in place
    of the transpose of that of f_l.

    The inverses learn to undo the units near their activities, in `update`, by gradient descent on

        1/2 |g_l(f_l(h^{l-1} + noise xi)) - (h^{l-1} + noise xi)|^2,        xi ~ N(0, 1)

    averaged over the batch. With r = that difference times f_{l-1}', the gradient of V is the
    layer's own pair, of r in place of its input and h in place of its delta.

    Source: Lee, Zhang, Fischer and Bengio, Difference target propagation (2015), algorithm 1.

    Initialisation: V as the layer's initialiser draws W, independently of it; c = 0.

    Assumes: a chain of units, each a layer whose net input is linear in its input (`Dense`, `Conv`)
    and elementwise activations behind it. What else a unit holds, such as pooling or a softmax, is
    no part of f_{l-1} in g_l: it goes back as in backpropagation. The one gradient that true
    weights carry is that of the cost with respect to h^{L-1}.

    Attributes:
        step: the step of the first target, above 0.
        inverse_rate: the learning rate of the inverses, above 0.
        noise: the standard deviation of what is added to activities to learn the inverses.

    `Info.extra` has "reconstruction", the mean over the batch of the inverses' cost.

    Raises:
        ValueError: settings out of range; layers that it is not defined for, by name.
    """

    step: float = 0.1
    inverse_rate: float = 0.01
    noise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "step", "inverse_rate", "noise", above=0)

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        name = type(self).__name__
        check_chain(net, name)
        kept = carriers(net, params, name, unread=True)
        check_single(net, kept, name)
        if net.draws:
            raise ValueError(f"{name} is not defined for layers that draw, such as dropout")
        for unit, own in list(zip(units(net), split_units(net, kept), strict=True))[1:-1]:
            at = weighted(unit)
            if not jax.tree.leaves(own[at]):
                raise ValueError(
                    f"{name} is not defined for {unit[at].path}, {unit[at].node}: it has weights, "
                    "but none that go from its inputs to its outputs and could be undone"
                )
        x = example_of(net, params, name) if x is None else x
        shapes = inputs_of(net, params, x)
        drawn = split_units(net, like_fresh(net, key, kept, name))
        inner = list(zip(units(net), drawn, strict=True))[1:-1]
        v = [own[weighted(unit)] for unit, own in inner]
        c = [jnp.zeros(shapes[u[0].path].shape[-1], shapes[u[0].path].dtype) for u, _ in inner]
        return v, c

    def feedback(self, state: State, params: PyTree) -> PyTree:
        parts = split_units(state.net, jax.tree.map(lambda _: None, params))
        for i, v in enumerate(state.learned[0]):
            own, at = parts[i + 1], weighted(units(state.net)[i + 1])
            parts[i + 1] = (*own[:at], v, *own[at + 1 :])
        return join_units(state.net, parts)

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        net, loss, n = state.net, state.loss, batch_size(x)
        params, x = widened((params, x))
        state = dataclasses.replace(state, learned=widened(state.learned))
        chain, own = units(net), split_units(net, params)
        h, traces = [x], []
        for unit, params_of in zip(chain, own, strict=True):
            found, trace = unit_forward(unit, params_of, h[-1])
            h.append(found)
            traces.append(trace)
        outputs, delta = h[-1], loss.delta(h[-1], y)
        kept = [unit_backward(chain[-1], own[-1], traces[-1], delta, keep)]
        offset = -self.step * kept[0][0]  # t - h
        for i in reversed(range(len(chain) - 1)):
            kept.append(unit_backward(chain[i], own[i], traces[i], -offset / self.step, keep))
            if i:
                inverse = _Inverse.of(state, chain, own, i)
                offset = inverse(traces[i], h[i + 1] + offset)[0] - inverse(traces[i], h[i + 1])[0]
        grads, deltas = taken_apart(net, join_units(net, [found for _, found in reversed(kept)]), n)
        learned, cost = self._inverses(state, chain, own, h)
        extra = {"reconstruction": cost}
        return grads, Info(jnp.mean(loss.value(outputs, y)), outputs, deltas, extra, learned)

    def update(
        self, state: State, params: PyTree, updates: PyTree, info: Info
    ) -> tuple[PyTree, State]:
        learned = map_feedback(
            lambda v, g: (v.astype(g.dtype) - self.inverse_rate * g).astype(v.dtype),
            state.learned,
            info.learned,
        )
        return updates, state.next(learned)

    def _inverses(
        self, state: State, chain: tuple[Unit, ...], own: list[Any], h: list[Array]
    ) -> tuple[PyTree, Array]:
        """The gradients of the inverses, and their mean cost."""
        keys, n = jax.random.split(state.drawn, len(chain)), batch_size(h[0])
        v_grads, c_grads, cost = [], [], jnp.zeros(())
        for i in range(1, len(chain) - 1):
            near = h[i] + self.noise * jax.random.normal(keys[i], h[i].shape, h[i].dtype)
            there, traces = unit_forward(chain[i], own[i], near)
            inverse = _Inverse.of(state, chain, own, i)
            back, (at, before) = inverse(traces, there)
            r = unit_backward(inverse.below, inverse.below_own, before, back - near, nothing)[0]
            first = weighted(chain[i])
            trace = traces[first]._replace(x=inverse.to_weights(traces, r))
            found = backward(chain[i][first].node, inverse.carry, trace, at, total)[1]
            v_grads.append(map_feedback(lambda _, g: g / n, state.learned[0][i - 1], found))
            c_grads.append(jnp.sum(r, axis=tuple(range(r.ndim - 1))) / n)
            cost = cost + jnp.sum(jnp.square(back - near)).astype(cost.dtype) / (2 * n)
        return (v_grads, c_grads), cost


class _Inverse(NamedTuple):
    """g of a unit: from its activity to that of the unit below.

    Attributes:
        unit, own: the unit and its parameters.
        carry: parameters of its link with weights, in which V is for W.
        c: the bias of g.
        below, below_own: the activations of the unit below.
    """

    unit: Unit
    own: tuple[PyTree, ...]
    carry: PyTree
    c: Array
    below: Unit
    below_own: tuple[PyTree, ...]

    @classmethod
    def of(cls, state: State, chain: tuple[Unit, ...], own: list[Any], i: int) -> _Inverse:
        """That of unit i, from 1."""
        v, c = (part[i - 1] for part in state.learned)
        at, below = weighted(chain[i]), chain[i - 1]
        carry = as_transport(chain[i][at].node, own[i][at], v)
        start = len(below)
        while start and activates(below[start - 1]):
            start -= 1
        return cls(chain[i], own[i], carry, c, below[start:], own[i - 1][start:])

    def __call__(self, traces: Any, h: Array) -> tuple[Array, Any]:
        """g(h); and what came to V, with the traces of the activations."""
        at = weighted(self.unit)
        there = self._back(traces, h, at + 1, len(self.unit))
        z, _ = backward(self.unit[at].node, self.own[at], traces[at], there, nothing, self.carry)
        z = self._back(traces, z, 0, at)
        c = self.c.reshape((1,) * (z.ndim - 1) + self.c.shape)
        found, before = unit_forward(self.below, self.below_own, z + c)
        return found, (there, before)

    def to_weights(self, traces: Any, r: Array) -> Array:
        """From the slope of g's net input to that of what V gives."""
        at = weighted(self.unit)
        if not at:
            return r
        z = traces[at].x
        return jax.vjp(lambda z: self._back(traces, z, 0, at), z)[1](r)[0]

    def _back(self, traces: Any, h: Array, first: int, end: int) -> Array:
        """Through links without weights, activations left out."""
        for i in reversed(range(first, end)):
            if not activates(self.unit[i]):
                h, _ = backward(self.unit[i].node, self.own[i], traces[i], h, nothing)
        return h
