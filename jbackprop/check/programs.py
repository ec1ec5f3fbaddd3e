"""Running a traced program with changes.

A program (jaxpr) is evaluated operation by operation, into jits, custom rules, checkpoints and the
bodies of scans and conditionals, with a visitor that may put another operation in the place of
each. `without_custom_rules` leaves what a function computes, to differentiate that;
`at_any_precision` computes the same in float64 where a function would not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbackprop.check.precision import (
    as_given,
    cast,
    coarsest,
    exactly,
    is_float,
    subprograms,
)

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


def evaluate(
    closed: Any,
    args: Sequence[Any],
    depends: Sequence[bool],
    visit: Visit,
    constant: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """Run a closed program; `visit` sees every operation, and may put another in its place.

    `constant` sees every number that is written in the program.
    """
    return _Run(visit, constant).program(closed, args, depends)[0]


def step(eqn: Any, values: list[Any], flags: list[bool], visit: Visit) -> list[Any]:
    """One operation; those that hold programs are entered."""
    return _Run(visit, lambda value: value).step(eqn, values, flags)


class _Run(NamedTuple):
    visit: Visit
    constant: Callable[[Any], Any]

    def program(
        self, closed: Any, args: Sequence[Any], depends: Sequence[bool]
    ) -> tuple[list[Any], list[bool]]:
        jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
        env: dict[Any, tuple[Any, bool]] = {}
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            env[var] = (self.constant(value), False)
        for var, value, flag in zip(jaxpr.invars, args, depends, strict=True):
            env[var] = (value, flag)

        def read(v: Any) -> tuple[Any, bool]:
            return (self.constant(v.val), False) if hasattr(v, "val") else env[v]

        for eqn in jaxpr.eqns:
            values, flags = (
                map(list, zip(*map(read, eqn.invars), strict=True)) if eqn.invars else ([], [])
            )

            def go(eqn: Any = eqn, values: Any = values, flags: Any = flags) -> list[Any]:
                return self.step(eqn, values, flags)

            outs = self.visit(eqn, values, flags, go)
            for var, value in zip(eqn.outvars, outs, strict=True):
                moves = jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.floating)
                env[var] = (value, any(flags) and moves and eqn.primitive.name != "stop_gradient")
        found = [read(v) for v in jaxpr.outvars]
        return [value for value, _ in found], [flag for _, flag in found]

    def step(self, eqn: Any, values: list[Any], flags: list[bool]) -> list[Any]:
        """One operation; those that hold programs are entered."""
        name, params = eqn.primitive.name, eqn.params
        if name in CALLS and (inner := called(eqn)) is not None:
            return self.program(inner, values, flags)[0]
        if name == "scan":
            n, m = params["num_consts"], params["num_carry"]
            constants = values[:n]
            inside = [f or i in range(n, n + m) for i, f in enumerate(flags)]

            def body(carry: Any, x: Any) -> Any:
                outs, _ = self.program(params["jaxpr"], [*constants, *carry, *x], inside)
                return outs[:m], outs[m:]

            carry, ys = lax.scan(
                body, values[n : n + m], values[n + m :], params["length"], params["reverse"]
            )
            return [*carry, *ys]
        if name == "cond":
            branches = [
                lambda *ops, b=b: self.program(b, ops, flags[1:])[0] for b in params["branches"]
            ]
            return lax.switch(values[0], branches, *values[1:])
        if name == "while":
            n, m = params["cond_nconsts"], params["body_nconsts"]
            ahead, constants, start = values[:n], values[n : n + m], values[n + m :]
            inside = [True] * (n + m + len(start))
            return lax.while_loop(
                lambda c: self.program(params["cond_jaxpr"], [*ahead, *c], inside[m:])[0][0],
                lambda c: self.program(params["body_jaxpr"], [*constants, *c], inside[n:])[0],
                start,
            )
        return bind(eqn, values)


def called(eqn: Any) -> Any:
    """The program that a call holds."""
    params = eqn.params
    return params.get("call_jaxpr", params.get("fun_jaxpr", params.get("jaxpr")))


def bind(eqn: Any, values: Sequence[Any], **changes: Any) -> list[Any]:
    """One operation as it is, but for changes of its parameters."""
    bound = eqn.primitive.get_bind_params(eqn.params | changes)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # older JAX: a pair
    out = eqn.primitive.bind(*functions, *values, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]


# --- The same at another precision ---------------------------------------------------------------

_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")
_BITS = ("bitcast_convert_type", "reduce_precision", "nextafter", *_DRAWS)
"""Operations on bits: done as given."""


def at_any_precision(
    f: Callable[..., Any], active: Sequence[Any], passive: Sequence[Any], dtype: Any
) -> Callable[..., Any]:
    """A function that computes in float64 what f(active, passive) computes in the dtypes given.

    That is f itself, unless it draws random numbers (in float64 it would draw others) or cannot be
    traced in float64 (a loop that carries float32): then it is f as traced in the dtypes given,
    with all floating-point numbers in it promoted and its custom rules taken away.
    """
    try:
        with exactly(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wide = jax.make_jaxpr(f)(*cast((list(active), list(passive)), "float64"))
        if not _draws(wide.jaxpr):
            return f
    except jax.errors.ConcretizationTypeError:
        return f
    except Exception:  # whatever f raises in float64: as given it may not
        pass
    with as_given(dtype):
        closed, shape = jax.make_jaxpr(f, return_shape=True)(list(active), list(passive))
    given = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves((active, passive))]

    def promoted(active: Sequence[Any], passive: Sequence[Any]) -> Any:
        flat = jax.tree.leaves((list(active), list(passive)))
        if [getattr(leaf, "dtype", None) for leaf in flat] == given:
            return f(active, passive)
        moved = {jnp.result_type(leaf) for leaf in jax.tree.leaves(list(active))}
        if not all(jnp.issubdtype(d, jnp.floating) for d in moved):
            raise TypeError(f"a program that was traced for {given} cannot be run in {moved}")
        visit, constant = _promotion(coarsest(list(moved)))
        flat = [
            v if is_float(v) or not hasattr(v, "dtype") or v.dtype == var.aval.dtype
            else lax.convert_element_type(v, var.aval.dtype)
            for v, var in zip(flat, closed.jaxpr.invars, strict=True)
        ]  # fmt: skip
        out = evaluate(closed, list(map(constant, flat)), [True] * len(flat), visit, constant)
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return promoted


def _draws(jaxpr: Any) -> bool:
    return any(
        eqn.primitive.name in _DRAWS or any(map(_draws, subprograms(eqn))) for eqn in jaxpr.eqns
    )


def _promotion(dtype: Any) -> tuple[Visit, Callable[[Any], Any]]:
    def constant(value: Any) -> Any:
        return lax.convert_element_type(value, dtype) if is_float(value) else value

    def visit(eqn: Any, values: list[Any], depends: list[bool], go: Any) -> list[Any]:
        name = eqn.primitive.name
        if name in ("scan", "cond", "while") or (name in CALLS and called(eqn) is not None):
            return go()
        if name == "custom_linear_solve":
            lengths, programs = eqn.params["const_lengths"], eqn.params["jaxprs"]
            start = lengths.matvec + lengths.vecmat
            own, b = values[start : start + lengths.solve], values[sum(lengths) :]
            solve = [*own, *b]
            return evaluate(programs.solve, solve, [True] * len(solve), visit, constant)
        if name in _BITS or (subprograms(eqn) and not name.startswith("scatter")):
            given = [
                lax.convert_element_type(v, var.aval.dtype) if is_float(v) else v
                for v, var in zip(values, eqn.invars, strict=True)
            ]
            return [constant(v) for v in bind(eqn, given)]
        changes = {
            key: dtype
            for key, value in eqn.params.items()
            if key in ("new_dtype", "dtype", "preferred_element_type", "out_dtype")
            and value is not None
            and jnp.issubdtype(value, jnp.floating)
        }
        if "precision" in eqn.params:
            changes["precision"] = None
        if name.startswith("scatter"):
            changes = {"update_jaxpr": None, "update_consts": ()}
        return [constant(v) for v in bind(eqn, values, **changes)]

    return visit, constant
