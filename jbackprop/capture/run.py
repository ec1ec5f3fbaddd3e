"""Running a planned program so that the deltas of what is used come back with it.

Where a use wants a delta there is a *tap*: the identity, whose backward rule hands the pair over as
the cotangent of a *sink*, an argument that the program does not read. So one `jax.vjp` with respect
to the sinks gives every pair; what is recomputed (`jax.checkpoint`) or scanned stays so.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import source_info_util
from jax.extend.core import JaxprEqn, Literal

from jbackprop.capture.plan import CHECKPOINTS, Action, Factor, Plan
from jbackprop.capture.uses import Use

Sinks = dict[int, tuple[Array, ...]]
"""By the number of a use: arrays like those that it makes for one example."""
Seen = dict[int, Array]
"""By the number of a use: the rows of a table that were read."""
Frames = tuple[dict[Any, Any], ...]
"""The variables of each program around, from the outermost."""


def evaluate(
    plan: Plan, args: Sequence[Any], sinks: Sinks, frames: Frames = ()
) -> tuple[list[Any], Seen]:
    """The results of a program, with its taps."""
    env: dict[Any, Any] = dict(zip(plan.jaxpr.constvars, plan.consts, strict=True))
    env.update(zip(plan.jaxpr.invars, args, strict=True))
    frames = (*frames, env)
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
                else _act(eqn, action, values, sinks, frames, seen)
            )
        env.update(zip(eqn.outvars, results, strict=True))
    for v, key in plan.exports:
        frames[-2][key] = env[v]
    results = [read(v) for v in plan.jaxpr.outvars]
    if plan.last:
        results[0] = _tap(results[0], plan.last, results, sinks, frames, seen)
    return results, seen


def _bind(eqn: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    results = eqn.primitive.bind(*functions, *values, **params)
    return results if eqn.primitive.multiple_results else [results]


def _act(
    eqn: JaxprEqn, action: Action, values: list[Any], sinks: Sinks, frames: Frames, seen: Seen
) -> list[Any]:
    read = list(values)
    for k, found in action.before.items():
        values[k] = _tap(values[k], found, read, sinks, frames, seen)
    if action.inner is None:
        results = list(_bind(eqn, values))
    else:
        results = _inside(eqn, action.inner, values, sinks, frames, seen)
    for k, found in action.after.items():
        results[k] = _tap(results[k], found, read, sinks, frames, seen)
    return results


def _inside(
    eqn: JaxprEqn, plan: Plan, values: list[Any], sinks: Sinks, frames: Frames, seen: Seen
) -> list[Any]:
    own = {use.index: sinks[use.index] for use in plan.uses}
    if eqn.primitive.name == "scan":
        results, more = _scan(eqn, plan, values, own, frames)
    elif eqn.primitive.name in CHECKPOINTS:
        p = eqn.params
        keys = [key for _, key in plan.exports]

        def redone(values: list[Any], own: Sinks) -> Any:
            inner: dict[Any, Any] = dict(frames[-1])
            results, more = evaluate(plan, values, own, (*frames[:-1], inner))
            return results, more, [inner[key] for key in keys]

        again = jax.checkpoint(redone, prevent_cse=p["prevent_cse"], policy=p["policy"])
        results, more, exports = again(values, own)
        frames[-1].update(zip(keys, exports, strict=True))
    else:
        with jax.named_scope(str(eqn.params.get("name", eqn.primitive.name))):
            results, more = evaluate(plan, values, own, frames)
    seen.update(more)
    return results


def _scan(
    eqn: JaxprEqn, plan: Plan, values: list[Any], sinks: Sinks, frames: Frames
) -> tuple[list[Any], Seen]:
    p = eqn.params
    nc, nx = p["num_consts"], p["num_consts"] + p["num_carry"]

    def turn(carry: list[Any], moving: Any) -> Any:
        slices, own = moving
        results, seen = evaluate(plan, [*values[:nc], *carry, *slices], own, frames)
        return results[: nx - nc], (results[nx - nc :], seen)

    options = {"_split_transpose": True} if p.get("_split_transpose") else {}
    moving = (values[nx:], sinks)
    length, reverse, unroll = p["length"], p["reverse"], p["unroll"]
    carry, (rest, seen) = lax.scan(
        turn, values[nc:nx], moving, length, reverse=reverse, unroll=unroll, **options
    )
    return [*carry, *rest], seen


def _tap(
    y: Any, found: list[Use], values: Sequence[Any], sinks: Sinks, frames: Frames, seen: Seen
) -> Any:
    """y; what the uses make of its delta goes to their sinks."""
    reads, factors = [], []
    for use in found:
        own = [values[k] for k in use.reads]
        if use.ids is not None:
            seen[use.index] = lax.stop_gradient(use.ids(own))
            own = []
        reads.append([lax.stop_gradient(jnp.asarray(v)) for v in own])
        factors.append([_factor(by, frames) for by in use.part.scales])
    return _tapped(tuple(found), y, reads, factors, [sinks[use.index] for use in found])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(found: tuple[Use, ...], y: Any, reads: Any, factors: Any, sinks: Any) -> Any:
    return y


def _tapped_there(found: tuple[Use, ...], y: Any, reads: Any, factors: Any, sinks: Any) -> Any:
    return y, (reads, factors)


def _tapped_back(found: tuple[Use, ...], saved: Any, delta: Array) -> Any:
    made = []
    for use, reads, factors in zip(found, *saved, strict=True):
        own = delta
        for by in factors:
            own = own * jnp.asarray(by, own.dtype)
        made.append(use.emit(reads, own))
    return delta, None, None, made


_tapped.defvjp(_tapped_there, _tapped_back)


def _factor(by: Any, frames: Frames) -> Any:
    if not isinstance(by, Factor):
        return by
    value = lax.stop_gradient(frames[by.depth][by.key].reshape(()))
    return 1 / value if by.inverse else value
