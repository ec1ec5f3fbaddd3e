"""Other ways to assign credit: the gradient of one mini-batch, in units of the plain one.

Feedback alignment is compared with `jax.grad` of layers whose backward rule takes other weights;
the other rules, each of which has an answer of its own, with themselves in float64. That they are
what their papers say is proved in the tests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

import jbackprop as jb
from jbackprop.bench.declare import Contestant, Workload
from jbackprop.bench.plain import perceptron
from jbackprop.bench.suite import flops
from jbackprop.bench.suite.mlp import named

SIZES, BATCH = (784, 256, 256, 10), 50
LOSS = jb.SoftmaxCrossEntropy()


def rules() -> dict[str, Any]:
    """By name."""
    c = jb.credit
    return {
        "sign-symmetry": c.SignSymmetry(loss=LOSS),
        "Kolen-Pollack": c.KolenPollack(decay=1e-3, loss=LOSS),
        "weight mirror": c.WeightMirror(loss=LOSS),
        "direct feedback alignment": c.DirectFeedbackAlignment(loss=LOSS),
        "direct random target projection": c.DirectRandomTargetProjection(loss=LOSS),
        "difference target propagation": c.DifferenceTargetPropagation(loss=LOSS),
    }


def _net() -> Any:
    return jb.mlp(SIZES, jb.Tanh())


def by_rule(rule: Any) -> Contestant:
    """The gradient of a rule."""
    net = _net()

    def gradient(both: Any, x: Any, y: Any) -> Any:
        params, state = both
        grads, _ = state.rule.gradient(state, params, x, y)
        return (), grads

    def pack(params: Any) -> Any:
        return params, rule.init(jax.random.key(1), net, params)

    return Contestant("", gradient, "rule", pack, own_truth=True)


def feedback_of(params: Any) -> Any:
    """Weights for the way back, in the layout of the parameters."""
    return jax.tree.map(lambda p: p[::-1], params)


def feedback_alignment() -> list[Contestant]:
    """In plain JAX, and ours with the same weights as transport."""
    net = _net()

    def ours(pair: Any, x: Any, y: Any) -> Any:
        params, back = pair
        bp = jb.backprop(net, LOSS, params, x, y, transport=back)
        return bp.losses.mean(), jb.gradient(bp)

    def pack(params: Any) -> Any:
        return params, feedback_of(params)

    plain = perceptron.feedback("tanh")
    return [
        Contestant("jax.grad of a custom rule", plain, "custom_vjp", pack),
        Contestant("ours, transport=", ours, "ours", pack),
    ]


def all_rules() -> list[Contestant]:
    """Backpropagation, and everybody by the interface of `jb.credit`."""
    found = [Contestant("jax.value_and_grad", perceptron.plain("tanh"), "plain")]
    for name, rule in rules().items():
        found.append(dataclasses.replace(by_rule(rule), name=name))
    return found


def _workload(what: str, contestants: Callable[[], list[Contestant]], **more: Any) -> Workload:
    return Workload(
        f"{what}, {named(SIZES)} tanh, batch {BATCH}",
        "credit",
        functools.partial(perceptron.data, SIZES, BATCH),
        contestants,
        question="credit",
        flops=flops.mlp(SIZES, BATCH),
        **more,
    )


WORKLOADS = (
    _workload(
        "feedback alignment",
        feedback_alignment,
        unit=Contestant("plain gradient", perceptron.plain("tanh"), "plain"),
    ),
    _workload("rules of credit", all_rules, tolerance=1e-3),
)
