"""Pairs from other people's models (`jb.capture`), in units of one plain gradient of the same.

python benchmarks/capture.py [--seconds S] [--only NAME] [--gib G] [--out FILE.json]

The models are written for Equinox and Flax, as their users write them, and a problem is the cost
of one example. The unit of time is `jit(jax.value_and_grad)` of the mean of its `jax.vmap`, taken
in turns with each contestant; that of memory is what the compiler states for it. All answers are
about the costs of single examples, divided by nothing. Under "tracing" the time is that of
`jax.jit(...).trace` alone, the least of a few, in units of that of the plain gradient.

The fields of a result are those of per_example.py, but its note also tells whether the goal is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from contest import Contestant, built, machine, save
from flax import nnx
from jax import Array, lax
from per_example import REFUSALS, Problem, Result, compete, table
from plain.per_example import MAX_NORM, by_jax_privacy, in_parts, whole
from tqdm import tqdm

import jbackprop as jb

QUANTITIES = ("norms", "clipped")
CLASSES, VOCABULARY, HEADS = 10, 64, 4
MICROBATCH, SMALLER = 16, 4  # the smaller one where the whole mini-batch has no more
NORMS_GOAL = {"mlp": 0.8, "cnn": 1.1, "transformer": 0.8, "rnn": 0.8}
CLIPPED_GOAL, MEMORY_GOAL, TRACE_GOAL = 1.25, 1.5, 2.0
REPEATS = 5  # of tracing

Function = Callable[..., Any]
Model = tuple[Function, Any, tuple[Array, Array]]  # cost of one example, params, mini-batch
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def _same(tree: Any) -> Any:
    return tree


def labelled(batch: int, *shape: int) -> tuple[Array, Array]:
    """Inputs and classes."""
    key, key_y = jax.random.split(jax.random.key(1))
    x = jax.random.normal(key, (batch, *shape))
    return x, jax.random.randint(key_y, (batch,), 0, CLASSES)


def mlp(batch: int = 256) -> Model:
    """784-1024-1024-1024-10, relu; Equinox."""
    net = eqx.nn.MLP(784, CLASSES, 1024, 3, jax.nn.relu, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def cost(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(eqx.combine(params, static)(x), y)

    return cost, params, labelled(batch, 784)


class Cnn(nnx.Module):
    """Three convolutions with GroupNorm, the mean over places, a linear head."""

    def __init__(self, rngs: Any) -> None:
        sizes = ((1, 32, 1), (32, 64, 2), (64, 64, 2))
        self.convs = nnx.List([nnx.Conv(i, o, (3, 3), s, rngs=rngs) for i, o, s in sizes])
        self.norms = nnx.List([nnx.GroupNorm(o, 8, rngs=rngs) for _, o, _ in sizes])
        self.head = nnx.Linear(64, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


def cnn(batch: int = 128) -> Model:
    """Images 28x28x1; Flax nnx."""
    graph, params = nnx.split(Cnn(nnx.Rngs(0)), nnx.Param)

    def cost(params: Any, x: Array, y: Array) -> Array:
        return cross_entropy(nnx.merge(graph, params)(x[None])[0], y)

    return cost, params, labelled(batch, 28, 28, 1)


class Block(nn.Module):
    """Attention and two Dense, as `nn.scan` wants a block."""

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        width = x.shape[-1]
        attend = nn.MultiHeadDotProductAttention(HEADS)
        x = x + attend(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """Blocks one by one, or scanned and rematerialised; the head is the embedding."""

    width: int
    depth: int
    scanned: bool

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        embed, mask = nn.Embed(VOCABULARY, self.width), nn.make_causal_mask(ids)
        x = embed(ids) + nn.Embed(len(ids), self.width)(jnp.arange(len(ids)))
        if self.scanned:
            stack = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=nn.broadcast, length=self.depth,
            )  # fmt: skip
            x, _ = stack()(x, mask)
        else:
            for _ in range(self.depth):
                x, _ = Block()(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def transformer(width: int, depth: int, length: int, batch: int, scanned: bool = False) -> Model:
    """A causal language model; Flax linen."""
    net = Transformer(width, depth, scanned)
    ids = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, VOCABULARY)
    params = jax.jit(net.init)(jax.random.key(0), ids[0, 1:])

    def cost(params: Any, ids: Array, targets: Array) -> Array:
        return cross_entropy(net.apply(params, ids), targets).mean()

    return cost, params, (ids[:, :-1], ids[:, 1:])


def rnn(batch: int = 64) -> Model:
    """A GRU 64 -> 256 over 32 steps, and a linear head on its last state; Equinox."""
    keys = jax.random.split(jax.random.key(0))
    net = eqx.nn.GRUCell(64, 256, key=keys[0]), eqx.nn.Linear(256, CLASSES, key=keys[1])
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def cost(params: Any, xs: Array, y: Array) -> Array:
        cell, head = eqx.combine(params, static)
        last, _ = lax.scan(lambda h, x: (cell(x, h), None), jnp.zeros(256), xs)
        return cross_entropy(head(last), y)

    return cost, params, labelled(batch, 32, 64)


PROBLEMS: dict[str, Callable[[], Model]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer of width 128": functools.partial(transformer, 128, 6, 64, 16),
    "transformer of width 256": functools.partial(transformer, 256, 4, 32, 32),
    "transformer of width 512": functools.partial(transformer, 512, 2, 64, 8),
    "rnn": rnn,
    "stack": functools.partial(transformer, 128, 12, 64, 16, scanned=True),
}


def mean_gradient(cost: Function) -> Function:
    """(params, x, y) -> (mean cost, gradient): the unit."""

    def mean(params: Any, x: Array, y: Array) -> Array:
        return jnp.mean(jax.vmap(cost, (None, 0, 0))(params, x, y))

    return jax.value_and_grad(mean)


def collected_norms(cost: Function) -> Function:
    """The norms, of each pair's square norm instead of the pair."""
    captured = jb.capture(cost, collect=lambda pair: pair.square_norm())

    def answer(params: Any, x: Array, y: Array) -> Array:
        squares = jax.tree.leaves(captured(params, x, y)[1])  # scanned: the copies in front
        return jnp.sqrt(sum(s.reshape(-1, len(x)).sum(0) for s in squares))

    return answer


def ours(cost: Function, quantity: str, size: int) -> dict[str, Function]:
    """The pairs kept, contracted as they are born, or that of some examples at a time."""
    kept, later, few = jb.capture(cost), jb.capture.deferred(cost), f"microbatches of {size}"

    def norms(source: Any, microbatch: int | None = None) -> Array:
        return jb.per_example.norms(source, microbatch=microbatch)

    def clipped(source: Any, **how: Any) -> Any:
        return jb.per_example.clipped_gradient(source, MAX_NORM, **how).gradient

    if quantity == "norms":
        return {
            "kept": lambda *args: norms(kept(*args)[1]),
            "collect": collected_norms(cost),
            f"deferred, {few}": lambda *args: norms(later(*args), size),
        }
    written_out = {"microbatch": size, "method": "materialise"}
    return {
        "kept": lambda *args: clipped(kept(*args)[1]),
        "deferred": lambda *args: clipped(later(*args)),
        f"written out, {few}": lambda *args: clipped(later(*args), **written_out),
    }


def contestants(cost: Function, name: str, quantity: str, batch: int) -> list[Contestant]:
    """Everybody; with the first, which takes little memory, the others must agree."""
    # of a mini-batch of one example, as `plain.per_example` and JAX Privacy call it
    one = jax.value_and_grad(lambda params, x, y: cost(params, x[0], y[0]))
    size = MICROBATCH if batch > MICROBATCH else SMALLER
    own = ours(cost, quantity, size)
    few, unroll = f"microbatches of {size}", name == "cnn"  # as in per_example.py
    return [
        Contestant(f"vmap(grad), {few}", in_parts(one, quantity, size, unroll), "vmap"),
        Contestant("vmap(grad), whole", whole(one, quantity), "vmap"),
        *(Contestant(f"capture, {way}", f, "ours") for way, f in own.items()),
        Contestant("jax_privacy, whole", by_jax_privacy(one, quantity, None), "jax_privacy"),
        Contestant(f"jax_privacy, {few}", by_jax_privacy(one, quantity, size), "jax_privacy"),
    ]


def goal(problem: str, quantity: str) -> tuple[str, float, tuple[str, ...]]:
    """What is judged, a field of `Result`, the most that it may be, and in which ways of ours."""
    name = problem.split()[0]
    if (
        name == "stack"
    ):  # scanned and rematerialised: of all examples at once, without keeping pairs
        return "memory", MEMORY_GOAL, ("collect", "deferred")
    return "time", NORMS_GOAL[name] if quantity == "norms" else CLIPPED_GOAL, ("",)


def judged(
    results: list[Result], what: str, most: float, ways: tuple[str, ...] = ("",)
) -> list[Result]:
    """With a note at the best of ours (of those whose name ends so), whether the goal is met."""
    measured = [r for r in results if r.kind == "ours" and r.time is not None]
    ours = [r for r in measured if r.contestant.endswith(ways)]
    best = min(ours, key=lambda r: getattr(r, what), default=None)
    if best is None:
        return results
    verdict = "met" if getattr(best, what) <= most else "missed"
    noted = dataclasses.replace(best, note=f"{what} {most:.2f} {verdict}")
    return [noted if r is best else r for r in results]


def tracing(cost: Function, data: Sequence[Any], nothing: bool) -> tuple[float, float]:
    """The least seconds to trace plain's gradient and the pairs, from nothing or with caches."""
    times: tuple[list[float], list[float]] = ([], [])
    makers: tuple[Function, Function] = mean_gradient, jb.capture
    for _ in range(REPEATS):
        for side, make in enumerate(makers):
            if nothing:
                jax.clear_caches()
            f = jax.jit(make(cost))
            start = time.perf_counter()
            f.trace(*data)
            times[side].append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def measure(name: str, quantity: str, model: Model, options: Any) -> list[Result]:
    """Let everybody compete."""
    cost, params, (x, y) = model
    load = f"{name}, batch {len(x)}, {quantity}"
    problem = Problem(name, (params, x, y), mean_gradient(cost), cost, _same, _same)
    unit, *_ = built(problem.plain, problem.data)
    results: list[Result] = []
    wanted = None
    people = contestants(cost, name, quantity, len(x))
    for person in tqdm(people, desc=load, leave=False, disable=not sys.stderr.isatty()):
        found, wanted = compete(problem, person, unit, wanted, options)
        results.append(Result(load, person.name, person.kind, **found))
    results = judged(results, *goal(name, quantity))
    best = min((r.time for r in results if r.kind == "ours" and r.time), default=None)
    return [
        dataclasses.replace(r, over_ours=r.time / best) if r.time and best else r for r in results
    ]


def measure_tracing(name: str, model: Model) -> list[Result]:
    """The pairs alone against the plain gradient, in the time to trace a new function."""
    cost, params, batch = model
    load, results = f"{name}, batch {len(batch[0])}, tracing", []
    for how, nothing in {"from nothing": True, "with JAX's caches": False}.items():
        plain, pairs = tracing(cost, (params, *batch), nothing)
        results.append(Result(load, f"plain gradient, {how}", "plain", 1e3 * plain, 1.0))
        own = Result(load, f"capture, {how}", "ours", 1e3 * pairs, pairs / plain)
        results += judged([own], "time", TRACE_GOAL)
    return results


def main() -> None:
    """Measure, print a table for each workload, and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contestant")
    parser.add_argument("--only", default="", help="problems and quantities that contain this")
    parser.add_argument("--gib", type=float, default=20.0, help="nothing may take more memory")
    out = Path(__file__).parent / "results" / "capture.json"
    parser.add_argument("--out", default=str(out), help="a .json file for the results")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for name, make in PROBLEMS.items():
        model = functools.cache(make)
        for quantity in (*QUANTITIES, "tracing"):
            if options.only not in (load := f"{name}, {quantity}"):
                continue
            try:
                if quantity == "tracing":
                    results = measure_tracing(name, model())
                else:
                    results = measure(name, quantity, model(), options)
            except REFUSALS as error:  # such as a library that is not there
                results = [Result(load, "everybody", "", note=str(error)[:48])]
            print("\n" + table(results), flush=True)
            save(options.out, results)


if __name__ == "__main__":
    main()
