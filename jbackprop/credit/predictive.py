"""Predictive coding."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_flags, check_numbers, check_sizes
from jbackprop.credit.chain import (
    check_chain,
    join_units,
    nothing,
    split_units,
    unit_backward,
    unit_forward,
    unit_keys,
    units,
)
from jbackprop.credit.rule import (
    Info,
    Rule,
    State,
    keep,
    taken_apart,
    widened,
)
from jbackprop.credit.settling import largest, norm, settle, share
from jbackprop.factored import PyTree
from jbackprop.sweep import Node, batch_size


@dataclasses.dataclass(frozen=True)
class PredictiveCoding(Rule):
    """Activities settle between what is predicted of them and what they predict.

    Every unit l of the network (a layer with weights and its activation) has an activity v^l beside
    its prediction f_l(v^{l-1}), and the errors e^l = v^l - f_l(v^{l-1}). Activities reduce the
    energy of one example,

        F = C(f_L(v^{L-1})) + 1/2 sum_{l < L} |e^l|^2
        v^l <- v^l - rate dF/dv^l,       dF/dv^l = e^l - (df_{l+1}/dv^l)^T e^{l+1}

    with -dC/df_L for e^L, until they are in equilibrium. There -e^l obeys a delta rule of its own,
    at activities that are not those of the forward sweep, and it is the delta that weights follow:

        delta^l = -e^l,        dF/dW^l = the layer's own pair of v^{l-1} and delta^l

    With `fixed_prediction` predictions and derivatives stay those of the forward sweep. In
    equilibrium -e^l then is the delta of backpropagation; at rate 1 it is there after as many steps
    as there are units, exactly.

    Source: Whittington and Bogacz, An approximation of the error backpropagation algorithm in a
    predictive coding network with local Hebbian synaptic plasticity (2017); Millidge, Tschantz and
    Buckley, Predictive coding approximates backprop along arbitrary computation graphs (2022), for
    fixed predictions; Rosenbaum, On the relationship between predictive coding and backpropagation
    (2022), for the cost at the output.

    Initialisation: activities are those of the forward sweep. Nothing is learned but the weights.

    Assumes: a chain of units, in which nothing couples the examples; and weights W on the way back
    (another rule could learn these).

    Attributes:
        rate: of the activities, above 0. At too high a rate they do not settle: see the residual.
        steps: at most so many.
        tolerance: stop when in every unit |dF/dv^l| is at most this part of the greater of its two
            terms, |e^l| and |(df_{l+1}/dv^l)^T e^{l+1}|, over the batch.
        fixed_prediction: whether predictions are those of the forward sweep.

    `Info.extra` has "steps" that were taken, and the "residual" in the end: what is compared with
    the tolerance, 1 where an error has not come to a unit yet, NaN where activities diverge.

    Raises:
        ValueError: settings out of range; a composite with weights inside, by name.
    """

    rate: float = 0.1
    steps: int = 200
    tolerance: float = 1e-3
    fixed_prediction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "rate", above=0)
        check_sizes(self, "steps")
        check_numbers(self, "tolerance", least=0)
        check_flags(self, "fixed_prediction")

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        check_chain(net, type(self).__name__)
        return None

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        net, loss, n = state.net, state.loss, batch_size(x)
        params, x = widened((params, x))
        chain, own, keys = units(net), split_units(net, params), unit_keys(net, key)

        def predict(activities: list[Array]) -> tuple[list[Array], list[Any]]:
            ins = [x, *activities]
            swept = [unit_forward(*part) for part in zip(chain, own, ins, keys, strict=True)]
            return [found[0] for found in swept], [found[1] for found in swept]

        start: list[Array] = []
        still = []  # the traces of the forward sweep
        for unit, params_of, own_keys in zip(chain, own, keys, strict=True):
            v, trace = unit_forward(unit, params_of, start[-1] if start else x, own_keys)
            start.append(v)
            still.append(trace)
        outputs = start.pop()
        if self.fixed_prediction:  # what is carried along is v - f then, which is 0 to begin with
            start = [jnp.zeros_like(v) for v in start]

        def errors(activities: list[Array]) -> tuple[list[Array], list[Any]]:
            """Delta of every unit, and the traces at which they hold."""
            if self.fixed_prediction:
                return [*(-e for e in activities), loss.delta(outputs, y)], still
            predicted, traces = predict(activities)
            hidden = [p - v for p, v in zip(predicted[:-1], activities, strict=True)]
            return [*hidden, loss.delta(predicted[-1], y)], traces

        def ways(activities: list[Array]) -> tuple[list[Array], Array]:
            """-dF/dv, and its size in the unit where it is largest beside what it is made of."""
            deltas, traces = errors(activities)
            parts = list(zip(chain, own, traces, deltas, strict=True))[1:]
            back = [unit_backward(*part, nothing)[0] for part in parts]
            pairs = list(zip(back, deltas[:-1], strict=True))
            found = [d - b for b, d in pairs]
            sizes = [jnp.maximum(norm(b), norm(d)) for b, d in pairs]
            return found, largest(share(norm(s), n) for s, n in zip(found, sizes, strict=True))

        activities, taken, residual = settle(ways, start, self.rate, self.steps, self.tolerance)
        deltas, traces = errors(activities)
        swept = zip(chain, own, traces, deltas, strict=True)
        kept = [unit_backward(*part, keep)[1] for part in swept]
        grads, by_path = taken_apart(net, join_units(net, kept), n)
        extra = {"steps": taken, "residual": residual}
        losses = loss.value(outputs, y)
        return grads, Info(jnp.mean(losses), outputs, by_path, extra)
