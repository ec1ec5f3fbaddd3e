"""Running a traced program with changes.

A program (jaxpr) is evaluated operation by operation, into jits, custom rules, checkpoints and the
bodies of scans and conditionals, with a visitor that may put another operation in the place of
each. `without_custom_rules` leaves what a function computes, to differentiate that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbackprop.check.precision import subprograms

Visit = Callable[[Any, list[Any], list[bool], Callable[[], list[Any]]], list[Any]]
"""(operation, inputs, which of them depend on what is differentiated, go on) -> outputs."""

CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
CALLS = ("pjit", "jit", "closed_call", "core_call", "remat", "checkpoint", "remat2", *CUSTOM)


def without_custom_rules(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays with no custom derivative rule in it."""

    def bare(*args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
        flat = jax.tree.leaves(args)
        if not _has_custom(closed.jaxpr):
            return fun(*args)
        out = evaluate(closed, flat, [True] * len(flat), lambda eqn, values, depends, go: go())
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return bare


def _has_custom(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in CUSTOM or any(map(_has_custom, subprograms(eqn)))
        for eqn in jaxpr.eqns
    )


def enters(
    fun: Callable[..., Any], active: list[Any], passive: list[Any], which: Sequence[int]
) -> bool:
    """Whether what fun computes depends on some of the active arrays at all."""
    closed = jax.make_jaxpr(fun)(active, passive)
    return any(reached(closed.jaxpr, [j in which for j in range(len(closed.jaxpr.invars))]))


def reached(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which outputs of a program depend on any of the inputs that are flagged."""
    at = dict(zip(jaxpr.invars, flags, strict=True))
    for eqn in jaxpr.eqns:
        given = [not hasattr(v, "val") and at.get(v, False) for v in eqn.invars]
        inner = subprograms(eqn)
        if inner and eqn.primitive.name in CALLS and len(inner[0].invars) == len(given):
            found = reached(inner[0], given)
        else:
            found = [any(given)] * len(eqn.outvars)
        at |= dict(zip(eqn.outvars, found, strict=True))
    return [not hasattr(v, "val") and at.get(v, False) for v in jaxpr.outvars]


def evaluate(closed: Any, args: Sequence[Any], depends: Sequence[bool], visit: Visit) -> list[Any]:
    """Run a closed program; `visit` sees every operation, and may put another in its place."""
    return _run(closed.jaxpr, closed.consts, args, depends, visit)[0]


def _run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], depends: Sequence[bool], visit: Visit
) -> tuple[list[Any], list[bool]]:
    env: dict[Any, tuple[Any, bool]] = {}
    for var, value in zip(jaxpr.constvars, consts, strict=True):
        env[var] = (value, False)
    for var, value, flag in zip(jaxpr.invars, args, depends, strict=True):
        env[var] = (value, flag)

    def read(v: Any) -> tuple[Any, bool]:
        return (v.val, False) if hasattr(v, "val") else env[v]

    for eqn in jaxpr.eqns:
        values, flags = (
            map(list, zip(*map(read, eqn.invars), strict=True)) if eqn.invars else ([], [])
        )

        def go(eqn: Any = eqn, values: Any = values, flags: Any = flags) -> list[Any]:
            return step(eqn, values, flags, visit)

        outs = visit(eqn, values, flags, go)
        for var, value in zip(eqn.outvars, outs, strict=True):
            moves = jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.floating)
            env[var] = (value, any(flags) and moves and eqn.primitive.name != "stop_gradient")
    found = [read(v) for v in jaxpr.outvars]
    return [value for value, _ in found], [flag for _, flag in found]


def step(eqn: Any, values: list[Any], flags: list[bool], visit: Visit) -> list[Any]:
    """One operation; those that hold programs are entered."""
    name, params = eqn.primitive.name, eqn.params
    inner = params.get("call_jaxpr", params.get("fun_jaxpr", params.get("jaxpr")))
    if name in CALLS and inner is not None:
        return _run(
            getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values, flags, visit
        )[0]
    if name == "scan":
        n, m = params["num_consts"], params["num_carry"]
        body, constants = params["jaxpr"], values[:n]

        def body_step(carry: Any, x: Any) -> Any:
            outs, _ = _run(body.jaxpr, body.consts, [*constants, *carry, *x], inside, visit)
            return outs[:m], outs[m:]

        inside = list(flags)
        inside[n : n + m] = [
            jnp.issubdtype(jnp.result_type(v), jnp.floating) for v in values[n : n + m]
        ]
        carry, ys = lax.scan(
            body_step, values[n : n + m], values[n + m :], params["length"], params["reverse"]
        )
        return [*carry, *ys]
    if name == "cond":
        branches = [
            lambda *ops, b=b: _run(b.jaxpr, b.consts, ops, flags[1:], visit)[0]
            for b in params["branches"]
        ]
        return lax.switch(values[0], branches, *values[1:])
    bound = eqn.primitive.get_bind_params(params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # older JAX: a pair
    out = eqn.primitive.bind(*functions, *values, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]
