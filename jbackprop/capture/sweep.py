"""One forward sweep and one sweep back of a planned program, over a mini-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.capture.contraction import (
    Collect,
    birthplace,
    by_copy,
    contraction,
    halves,
    sharing,
    zeros_of,
)
from jbackprop.capture.pairs import pair_of
from jbackprop.capture.program import Program
from jbackprop.capture.run import Run, Sinks, evaluate
from jbackprop.factored import Factored, PyTree


def run(program: Program, collect: Collect | None = None, aux: PyTree = None) -> tuple[Any, ...]:
    """Costs (B,), what comes with them, and the pairs or what was collected of them, by leaf.

    Args:
        program: traced and planned.
        collect: (pair, its part of aux) -> arrays, of one copy of scanned parameters at a time.
        aux: a tree like params, for each copy of scanned parameters in front of one another.
    """
    n, leaves, every = program.n, program.params, range(len(program.params))
    besides = {} if aux is None else dict(enumerate(program.tree.flatten_up_to(aux)))
    own = [(besides[k],) if k in besides else () for k in every]
    born = {}
    if collect is not None:
        for k in every:
            found = program.of(k)
            scans = birthplace(found)
            if scans:
                at = (leaves[k], program.paths[k], n)
                born[k] = contraction(k, found, scans, *at, collect, own[k])
    kept = [use for use in program.plan.uses if use.part.leaf not in born]
    shared = sharing(kept)

    def example(moving: list[Array], tag: Array) -> Any:
        def forward(kept: Any, collected: Any) -> Any:
            sinks = Sinks(kept, collected, {k: own[k] for k in born})
            values = [*leaves, *moving]
            results, seen = evaluate(program.plan, values, sinks, Run(born, tag))
            return results[0], (results[1:], seen)

        zeros = zeros_of(kept, shared)
        value, back, (more, seen) = jax.vjp(
            forward, zeros, {k: c.zeros() for k, c in born.items()}, has_aux=True
        )
        made, collected = back(jnp.ones((), value.dtype))
        return value, more, made, seen, collected

    costs, more, made, seen, collected = jax.vmap(example, out_axes=(0, 0, 0, 0, None))(
        program.batch, jnp.zeros(n)
    )
    results = []
    for k in every:
        if k in born:
            results.append(collected[k])
            continue
        found = program.of(k)
        own_halves = halves(found, shared, made, seen)
        pair = pair_of(found, own_halves, leaves[k], program.paths[k], n)
        if any(use.scans for use in found):
            # What a scan stacks is moved once, not by each of those who read it.
            pair = jax.lax.optimization_barrier(pair)
        results.append(pair if collect is None else by_copy(collect, pair, *own[k]))
    return costs, jax.tree.unflatten(program.aux, more), results


def run_several(
    program: Program,
    deltas: Callable[..., Array],
    own: PyTree,
    ask: Callable[[list[Factored]], PyTree],
    axis_name: str,
) -> PyTree:
    """What `ask` gives of the pairs of several deltas of a model's outputs.

    Args:
        program: of a model's outputs, traced and planned.
        deltas: (z, its part of own) -> deltas (v, *z.shape) of one example's output z.
        own: arrays (B, ...) that go with the examples.
        ask: from the pairs, one for each parameter, of one delta under a `jax.vmap` over all of
            them, whose axis has the name `axis_name`; what it gives must not vary along that.
    """
    leaves, every = program.params, range(len(program.params))
    shared = sharing(program.plan.uses)

    def example(moving: list[Array], tag: Array, own: Any) -> Any:
        def forward(kept: Any) -> Any:
            values = [*leaves, *moving]
            results, seen = evaluate(program.plan, values, Sinks(kept, {}, {}), Run({}, tag))
            return results[0], seen

        z, back, seen = jax.vjp(forward, zeros_of(program.plan.uses, shared), has_aux=True)
        return jax.vmap(lambda delta: back(delta)[0])(deltas(z, own)), seen

    made, seen = jax.vmap(example, out_axes=(1, 0))(program.batch, jnp.zeros(program.n), own)
    again = {key: v[0] for key, v in made.items() if key[1]}  # what was looked at varies with none

    def of(made: Any) -> Any:
        pairs = []
        for k in every:
            found = program.of(k)
            own_halves = halves(found, shared, made | again, seen)
            at = (leaves[k], program.paths[k], program.n)
            pairs.append(pair_of(found, own_halves, *at, turning=False))
        return ask(pairs)

    made = {key: v for key, v in made.items() if not key[1]}
    return jax.vmap(of, axis_name=axis_name, out_axes=None)(made)
