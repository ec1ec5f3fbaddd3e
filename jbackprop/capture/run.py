"""Running a planned program so that the deltas of what is used come back with it.

Where a use wants a delta there is a *tap*: the identity, whose backward rule hands the pair over as
the cotangent of a *sink*, an argument that the program does not read. So one `jax.vjp` with respect
to the sinks gives every pair; what is recomputed (`jax.checkpoint`) or scanned stays so.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal

from jbackprop.capture.contraction import Contraction, Halves, sharing, zeros_of
from jbackprop.capture.operations import Factor
from jbackprop.capture.plan import CHECKPOINTS, Action, Plan
from jbackprop.capture.uses import Use

Seen = dict[int, Array]
"""By the number of a use: what it looked at, if that is kept."""
Frames = tuple[dict[Any, Any], ...]
"""The variables of each program around, from the outermost."""


@dataclasses.dataclass
class Sinks:
    """What goes along with a program's inputs, and is scanned wherever the program is.

    Attributes:
        kept: arrays like the halves of pairs that the sweep back gives.
        collected: by the number of a parameter: arrays like those that are collected of it.
        aux: by the number of a parameter: what its collecting gets besides.
    """

    kept: Halves
    collected: dict[int, Any]
    aux: dict[int, Any]

    def inside(self, plan: Plan) -> Sinks:
        """Those of a program that is inside this one."""
        leaves = {use.part.leaf for use in plan.uses}
        indices = {use.index for use in plan.uses}

        def some(found: dict[int, Any]) -> dict[int, Any]:
            return {k: v for k, v in found.items() if k in leaves}

        kept = {k: v for k, v in self.kept.items() if k[0] in indices}
        return Sinks(kept, some(self.collected), some(self.aux))


jax.tree_util.register_dataclass(Sinks, ["kept", "collected", "aux"], [])


@dataclasses.dataclass(frozen=True)
class Run:
    """What is the same all over a program.

    Attributes:
        contractions: by the number of a parameter: those done where its pairs are born.
        tag: a number of the example, by which what is of one example is known as such.
        frames: the variables of the programs around.
        looked: by the number of a use: what it looks at, if that is made again.
    """

    contractions: Mapping[int, Contraction]
    tag: Array
    frames: Frames = ()
    looked: dict[int, Array] = dataclasses.field(default_factory=dict)

    def within(self, *frames: dict[Any, Any]) -> Run:
        """With these programs around."""
        return dataclasses.replace(self, frames=frames)


def evaluate(plan: Plan, args: Sequence[Any], sinks: Sinks, run: Run) -> tuple[list[Any], Seen]:
    """The results of a program, with its taps."""
    env: dict[Any, Any] = dict(zip(plan.jaxpr.constvars, plan.consts, strict=True))
    env.update(zip(plan.jaxpr.invars, args, strict=True))
    run = run.within(*run.frames, env)
    seen: Seen = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for number, eqn in enumerate(plan.jaxpr.eqns):
        names = source_info_util.current_name_stack() + eqn.source_info.name_stack
        traceback = eqn.source_info.traceback
        with source_info_util.user_context(traceback, name_stack=names), eqn.ctx.manager:
            values = [read(v) for v in eqn.invars]
            action = plan.actions.get(number)
            results = (
                _bind(eqn, values)
                if action is None
                else _act(eqn, action, values, sinks, run, seen)
            )
        env.update(zip(eqn.outvars, results, strict=True))
    for v, key in plan.exports:
        run.frames[-2][key] = env[v]
    results = [read(v) for v in plan.jaxpr.outvars]
    if plan.last:
        results[0] = _tap(results[0], plan.last, sinks, run)
    return results, seen


def _bind(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    results = eqn.primitive.bind(*functions, *values, **params)
    return results if eqn.primitive.multiple_results else [results]


def _act(
    eqn: JaxprEqn, action: Action, values: list[Any], sinks: Sinks, run: Run, seen: Seen
) -> list[Any]:
    for use in action.looks:
        assert use.look is not None
        (run.looked if use.again else seen)[use.index] = use.look(values)
    for k, found in action.before.items():
        values[k] = _tap(values[k], found, sinks, run)
    if action.inner is None:
        results = list(_bind(eqn, values))
    else:
        own = sinks.inside(action.inner)
        results, more = _inside(eqn, action.inner, values, own, run)
        seen.update(more)
    for k, found in action.after.items():
        results[k] = _tap(results[k], found, sinks, run)
    return results


def _inside(
    eqn: JaxprEqn, plan: Plan, values: list[Any], sinks: Sinks, run: Run
) -> tuple[list[Any], Seen]:
    if eqn.primitive.name == "scan":
        return _scan(eqn, plan, values, sinks, run)
    if eqn.primitive.name not in CHECKPOINTS:
        with jax.named_scope(str(eqn.params.get("name", eqn.primitive.name))):
            return evaluate(plan, values, sinks, run)
    *around, here = run.frames
    keys = [key for _, key in plan.exports]

    def redone(values: list[Any], sinks: Sinks) -> Any:
        inner = dict(here)
        results, seen = evaluate(plan, values, sinks, run.within(*around, inner))
        return results, seen, [inner[key] for key in keys]

    p = eqn.params
    again = jax.checkpoint(redone, prevent_cse=p["prevent_cse"], policy=p["policy"])
    results, seen, exports = again(values, sinks)
    here.update(zip(keys, exports, strict=True))
    return results, seen


def _scan(
    eqn: JaxprEqn, plan: Plan, values: list[Any], sinks: Sinks, run: Run
) -> tuple[list[Any], Seen]:
    p = eqn.params
    nc, nx = p["num_consts"], p["num_consts"] + p["num_carry"]
    here = [c for k, c in run.contractions.items() if c.scan is plan and k in sinks.collected]

    def turn(carry: list[Any], moving: Any) -> Any:
        slices, own = moving
        inputs = [*values[:nc], *carry, *slices]
        results, seen = (
            _contracted(plan, here, inputs, own, run) if here else evaluate(plan, inputs, own, run)
        )
        return results[: nx - nc], (results[nx - nc :], seen)

    options = {"_split_transpose": True} if p.get("_split_transpose") else {}
    moving = (values[nx:], sinks)
    length, reverse, unroll = p["length"], p["reverse"], p["unroll"]
    carry, (rest, seen) = lax.scan(
        turn, values[nc:nx], moving, length, reverse=reverse, unroll=unroll, **options
    )
    return [*carry, *rest], seen


def _contracted(
    plan: Plan, here: list[Contraction], inputs: list[Any], sinks: Sinks, run: Run
) -> tuple[list[Any], Seen]:
    """One turn of a scan, whose backward rule contracts the pairs of some parameters at once."""
    active = [
        k
        for k, v in enumerate(inputs)
        if plan.active[k] and jnp.issubdtype(jnp.result_type(v), jnp.inexact)
    ]
    mine = {c.leaf for c in here}
    # What is read of the programs around goes in as an argument.
    outer = {
        by
        for use in plan.uses
        for by in use.part.scales
        if isinstance(by, Factor) and by.depth < len(run.frames)
    }
    passive = (
        [None if k in active else v for k, v in enumerate(inputs)],
        [run.frames[by.depth][by.key] for by in outer],
        run.tag,
        {c.leaf: (c.closed.consts, sinks.aux[c.leaf]) for c in here},
    )
    rest = {k: v for k, v in sinks.collected.items() if k not in mine}
    others = {k: v for k, v in sinks.aux.items() if k not in mine}

    def inside(moving: Any, passive: Any) -> Any:
        moved, kept, collected, local = moving
        still, factors, tag, _ = passive
        frames: Frames = tuple({} for _ in run.frames)
        for by, value in zip(outer, factors, strict=True):
            frames[by.depth][by.key] = value
        values = list(still)
        for k, v in zip(active, moved, strict=True):
            values[k] = v
        own = Sinks({**kept, **local}, collected, others)
        return evaluate(plan, values, own, dataclasses.replace(run, tag=tag, frames=frames))

    def local() -> Any:
        zeros = [zeros_of(c.found, sharing(c.found), c.inside) for c in here]
        return {k: v for own in zeros for k, v in own.items()}

    @jax.custom_vjp
    def turn(moving: Any, own: Any, passive: Any) -> Any:
        results, seen = inside((*moving, local()), passive)
        return results, {k: v for k, v in seen.items() if k in wanted}

    def there(moving: Any, own: Any, passive: Any) -> Any:
        found, back, seen = jax.vjp(
            lambda moving: inside(moving, passive), (*moving, local()), has_aux=True
        )
        return (found, {k: v for k, v in seen.items() if k in wanted}), (back, seen, passive[2:])

    def back(saved: Any, deltas: Any) -> Any:
        back, seen, (tag, besides) = saved
        ((*moved, made),) = back(deltas[0])
        own = {c.leaf: c(made, seen, tag, besides[c.leaf]) for c in here}
        return tuple(moved), own, None

    wanted = {use.index for use in plan.uses if use.part.leaf not in mine}
    turn.defvjp(there, back)
    moving = ([inputs[k] for k in active], sinks.kept, rest)
    own = {k: v for k, v in sinks.collected.items() if k in mine}
    return turn(moving, own, passive)


def _tap(y: Any, found: list[Use], sinks: Sinks, run: Run) -> Any:
    """y; what the uses make of its delta goes to their sinks."""
    keys, beside, own = [], [], []
    for use in found:
        for half in (0, 1):
            if (use.index, half) in sinks.kept:
                keys.append((use, half))
                own.append(sinks.kept[use.index, half])
                factors = [_factor(by, run.frames) for by in use.part.scales]
                beside.append(run.looked.pop(use.index) if half else factors)

    @jax.custom_vjp
    def tapped(y: Any, beside: Any, sinks: Any) -> Any:
        return y

    def back(beside: Any, delta: Array) -> Any:
        pairs = zip(keys, beside, strict=True)
        return delta, None, [v if half else _scaled(use, delta, v) for (use, half), v in pairs]

    tapped.defvjp(lambda y, beside, sinks: (y, beside), back)
    return tapped(y, beside, own)


def _scaled(use: Use, delta: Array, factors: Sequence[Any]) -> Array:
    """The delta in the form that is due, times the numbers that the parameter was."""
    delta = delta.astype(use.delta_like.dtype)
    if factors:
        numbers = [jnp.asarray(by, delta.dtype) for by in factors]
        delta = delta * functools.reduce(operator.mul, numbers)
    return use.delta.of(delta)


def _factor(by: Any, frames: Frames) -> Any:
    if not isinstance(by, Factor):
        return by
    value = frames[by.depth][by.key].reshape(())
    return 1 / value if by.inverse else value
