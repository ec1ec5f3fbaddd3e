"""Second derivatives in units of one plain gradient: products, diagonals, Kronecker factors.

All is about the mean cost of the mini-batch. Products with a vector are compared with autodiff in
float64, the exact diagonal with itself in float64; what is drawn at random, with nothing here: the
tests prove that it is right for the labels drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jbackprop as jb
from jbackprop import curvature
from jbackprop.bench.declare import Contestant, Outside, Workload
from jbackprop.bench.suite.problems import Problem, classifier, cnn, mlp, transformer

QUESTIONS = (
    "Hessian product",
    "Gauss-Newton product",
    "diagonal, one sample",
    "Kronecker factors",
    "exact diagonal",
)
RANDOM = ("diagonal, one sample", "Kronecker factors")
LOSS = jb.SoftmaxCrossEntropy()

Function = Callable[..., Any]
Make = Callable[[int], Problem]


def direction(params: Any) -> Any:
    """A vector for the products."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = [jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def ours(net: Any, quantity: str, both: tuple[Any, Any], x: Any, y: Any) -> Any:
    """What is asked."""
    ask: dict[str, Function] = {
        "Hessian product": curvature.hessian_product,
        "Gauss-Newton product": curvature.ggn_product,
        "diagonal, one sample": curvature.diag_ggn,
        "exact diagonal": curvature.diag_ggn,
        "Kronecker factors": curvature.kfac,
        "exact Kronecker factors": curvature.kfac,
    }
    params, vector = both
    if quantity.endswith("product"):
        return ask[quantity](net, LOSS, params, x, y, vector)
    if quantity in RANDOM:
        roots, key = curvature.MonteCarlo(), jax.random.key(0)
        return ask[quantity](net, LOSS, params, x, y, roots, key=key)
    return ask[quantity](net, LOSS, params, x, y, curvature.Exact())


def factors(found: curvature.BlockDiagonal) -> Any:
    """Kronecker factors by name, as `difference` takes them."""
    return jax.tree.map(lambda v: v, dict(found.blocks))


def autodiff(problem: Problem, quantity: str) -> Function | None:
    """The product by `jax.jvp` and `jax.grad` alone, of the same network."""

    def cost(z: Any, y: Any) -> Any:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), y[..., None], axis=-1))

    def outputs(params: Any, x: Any) -> Any:
        return jb.forward(problem.net, params, x)[0]

    def hessian(both: tuple[Any, Any], x: Any, y: Any) -> Any:
        params, vector = both
        gradient = jax.grad(lambda params: cost(outputs(params, x), y))
        return jax.jvp(gradient, (params,), (vector,))[1]

    def ggn(both: tuple[Any, Any], x: Any, y: Any) -> Any:
        params, vector = both
        z, along = jax.linearize(lambda params: outputs(params, x), params)
        curved = jax.jvp(jax.grad(lambda z: cost(z, y)), (z,), (along(vector),))[1]
        return jax.linear_transpose(along, params)(curved)[0]

    return {"Hessian product": hessian, "Gauss-Newton product": ggn}.get(quantity)


def contestants(problem: Problem, question: str) -> list[Contestant]:
    """Ours, and plain JAX where that can do it."""
    unpack = factors if question == "Kronecker factors" else problem.unpack
    automatic = autodiff(problem, question)

    def pack(params: Any) -> Any:
        packed = problem.pack(params)
        return packed, direction(packed) if automatic else ()

    found = []
    if automatic is not None:
        found.append(Contestant("jax.jvp, jax.grad", automatic, "autodiff", pack, unpack))
    ask = functools.partial(ours, problem.net, question)
    drawn = question in RANDOM
    own = automatic is None and not drawn
    found.append(Contestant("ours", ask, "ours", pack, unpack, own_truth=own, drawn=drawn))
    return found


def workload(make: Make, batch: int, question: str, level: int) -> Workload:
    """One question of one network."""
    problem = make(batch)
    return Workload(
        f"{problem.name}, batch {batch}, {question}",
        problem.name,
        problem.data,
        functools.partial(contestants, problem, question),
        question=question,
        unit=Contestant("plain gradient", problem.plain, "plain"),
        valued=False,
        outside=[Outside("pytorch.py", problem.task)],
        flops=problem.flops,
        level=level,
        tolerance=1e-3,
    )


WORKLOADS = (
    *(workload(mlp, 128, question, 1) for question in QUESTIONS),
    *(workload(cnn, 128, question, 2) for question in QUESTIONS),
    *(workload(transformer, 128, question, 2) for question in QUESTIONS[:-1]),
    workload(classifier, 128, QUESTIONS[-1], 2),  # of the language model it would be 4,096 deltas
)
