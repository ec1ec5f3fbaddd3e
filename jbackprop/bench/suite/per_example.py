"""Questions about single examples, in units of one plain gradient: norms, clipped sum, variance.

All answers are about the costs of single examples, divided by nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Outside, Workload, peer, same
from jbackprop.bench.plain.per_example import MAX_NORM, by_jax_privacy, in_parts, whole
from jbackprop.bench.suite.problems import Problem, cnn, mlp, transformer

QUANTITIES = ("norms", "clipped sum", "variance")
MICROBATCH = 16
TOLERANCE = 1e-3
"""In float32 a net input at a kink may be rounded to its other side."""

Function = Callable[..., Any]
Make = Callable[[int], Problem]


def ours(problem: Problem, quantity: str) -> Iterator[Contestant]:
    """The pairs kept; contracted as they are born; that, of some examples at a time."""
    asks: dict[str, Function] = {
        "norms": jb.per_example.norms,
        "clipped sum": lambda bp, **how: (
            jb.per_example.clipped_gradient(bp, MAX_NORM, **how).gradient
        ),
        "variance": jb.per_example.variance,
    }
    loss = jb.SoftmaxCrossEntropy()
    unpack = same if quantity == "norms" else problem.unpack
    few, later = f"microbatches of {MICROBATCH}", jb.per_example.deferred
    ways: dict[str, tuple[Function, dict[str, Any]]] = {
        "kept": (jb.backprop, {}),
        "deferred": (later, {}),
        f"deferred, {few}": (later, {"microbatch": MICROBATCH}),
    }
    if quantity == "clipped sum":
        how = {"microbatch": MICROBATCH, "method": "materialise"}
        ways[f"written out, {few}"] = (later, how)
    for name, (source, options) in ways.items():

        def answer(
            params: Any, x: Any, y: Any, source: Any = source, options: Any = options
        ) -> Any:
            return asks[quantity](source(problem.net, loss, params, x, y), **options)

        yield Contestant(f"ours, {name}", answer, "ours", problem.pack, unpack)


def contestants(problem: Problem, quantity: str) -> list[Contestant | Absent]:
    """Everybody; the first takes little memory."""
    few, plain = f"microbatches of {MICROBATCH}", problem.plain
    unroll = problem.name == "cnn"  # inside a loop, XLA's convolutions on a CPU are very slow
    parts = functools.partial(in_parts, plain, quantity)
    found: list[Contestant | Absent] = [
        Contestant(f"vmap(grad), {few}", parts(MICROBATCH, unroll), "vmap(grad)"),
        Contestant("vmap(grad), whole", whole(plain, quantity), "vmap(grad)"),
        Contestant("grad, one by one", parts(1), "vmap(grad)"),
        *ours(problem, quantity),
    ]
    for size, name in ((None, "whole"), (MICROBATCH, few)):
        function = by_jax_privacy(plain, quantity, size)
        made = functools.partial(Contestant, "", function)
        found.append(peer(f"jax_privacy, {name}", "jax_privacy", "jax_privacy", made))
    return found


def workload(make: Make, batch: int, quantity: str, level: int) -> Workload:
    """One question of one network."""
    problem = make(batch)
    return Workload(
        f"{problem.name}, batch {batch}, {quantity}",
        problem.name,
        problem.data,
        functools.partial(contestants, problem, quantity),
        question=quantity,
        unit=Contestant("plain gradient", problem.plain, "plain"),
        valued=False,
        outside=[Outside("pytorch.py", problem.task)],
        flops=problem.flops,
        level=level,
        tolerance=TOLERANCE,
    )


NETWORKS = (mlp, cnn, transformer)
WORKLOADS = (
    workload(mlp, 32, "norms", 0),
    *(workload(make, 128, quantity, 1) for make in NETWORKS for quantity in QUANTITIES),
    *(
        workload(make, batch, quantity, 2)
        for make in NETWORKS
        for quantity in QUANTITIES
        for batch in (32, 512)
        if (make, batch, quantity) != (mlp, 32, "norms")
    ),
)
