"""Second derivatives in units of one plain gradient: products, diagonals, Kronecker factors.

python benchmarks/curvature.py [--seconds S] [--only NAME] [--batch B] [--torch PYTHON] [--out FILE]

The unit of time is `jit(jax.value_and_grad)` of the same network in plain JAX, taken in turns with
each contestant; that of memory is what the compiler states for it. BackPACK runs in a process of
its own, in units of its own eager `loss.backward()`. All is about the mean cost of the mini-batch.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from contest import Contestant, built, machine, save
from per_example import (
    Problem,
    Result,
    classifier,
    cnn,
    compete,
    mlp,
    table,
    torch_peers,
    transformer,
)
from tqdm import tqdm

import jbackprop as jb
from jbackprop import curvature

GOALS = {
    "hessian_product": (2.5, None),
    "ggn_product": (2.0, None),
    "diag_mc": (1.6, None),
    "kfac": (1.6, None),
    "diag_exact": (6.0, 3.0),
    "kflr": (None, None),
}
"""For a quantity, the most of a gradient's time, and of its total memory."""
RANDOM = ("diag_mc", "kfac")
LOSS = jb.SoftmaxCrossEntropy()

Function = Callable[..., Any]


def direction(params: Any) -> Any:
    """A vector for the products."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = [jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def ours(net: Any, quantity: str, both: tuple[Any, Any], x: Any, y: Any) -> Any:
    """What is asked."""
    ask: dict[str, Function] = {
        "hessian_product": curvature.hessian_product,
        "ggn_product": curvature.ggn_product,
        "diag_mc": curvature.diag_ggn,
        "diag_exact": curvature.diag_ggn,
        "kfac": curvature.kfac,
        "kflr": curvature.kfac,
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

    return {"hessian_product": hessian, "ggn_product": ggn}.get(quantity)


def contestants(problem: Problem, quantity: str) -> Iterator[Contestant]:
    """Ours, and plain JAX where that can do it; they must agree."""
    unpack = factors if quantity in ("kfac", "kflr") else problem.unpack
    automatic = autodiff(problem, quantity)

    def pack(params: Any) -> Any:
        packed = problem.pack(params)
        return packed, direction(packed) if automatic else ()

    if automatic is not None:
        yield Contestant("jax.jvp, jax.grad", automatic, "autodiff", pack, unpack)
    ask = functools.partial(ours, problem.net, quantity)
    yield Contestant("ours", ask, "ours", pack, unpack)


def measure(problem: Problem, quantity: str, options: Any) -> list[Result]:
    """Let everybody compete."""
    load = f"{problem.name}, batch {len(problem.data[1])}, {quantity}"
    unit, *_ = built(problem.plain, problem.data)
    results, wanted = [], None
    for person in tqdm([*contestants(problem, quantity)], desc=load, leave=False, disable=None):
        found, wanted = compete(problem, person, unit, wanted, options)
        own = GOALS[quantity] if person.kind == "ours" else None
        results.append(Result(load, person.name, person.kind, goal=own, **found))
    if options.torch:
        answer = wanted if quantity == "diag_exact" else {}
        rows = torch_peers(problem, quantity, answer, options, "curvature_torch.py")
        results += [Result(load, **row) for row in rows]
    best = min((r.time for r in results if r.kind == "ours" and r.time), default=None)
    return [
        dataclasses.replace(r, over_ours=r.time / best) if r.time and best else r for r in results
    ]


def main() -> None:
    """Measure, print a table for each workload, and save on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each contestant")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--torch", default="", help="the Python that has BackPACK")
    parser.add_argument("--gib", type=float, default=20.0, help="nothing may take more memory")
    parser.add_argument("--out", help="a .json file for the results")
    options = parser.parse_args()
    if options.torch and shutil.which(options.torch) is None:
        parser.error(f"there is no {options.torch}")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    exact = {"diag_exact", "kflr"}
    all_but = {transformer: exact, classifier: GOALS.keys() - exact}  # 4096 deltas; much the same
    for make in (mlp, cnn, transformer, classifier):
        problem = None
        for quantity in GOALS:
            if quantity in all_but.get(make, ()):
                continue
            if options.only in f"{make.__name__}, batch {options.batch}, {quantity}":
                problem = problem or make(options.batch)
                results = measure(problem, quantity, options)
                print("\n" + table(results), flush=True)
                if options.out:
                    save(options.out, results)


if __name__ == "__main__":
    main()
