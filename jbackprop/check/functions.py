"""Is this the gradient of that function? Is the rule of this function right?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.check.arrays import Question, judged, same_all
from jbackprop.check.inputs import (
    Inputs,
    all_of,
    check_options,
    check_scalar,
    inner,
    name_of,
    output_names,
    outputs_of,
)  # fmt: skip
from jbackprop.check.judge import How, TruthKind
from jbackprop.check.precision import as_given, coarsest, compiled, float64
from jbackprop.check.programs import without_custom_rules
from jbackprop.check.report import Report, composed, demand, notes_of
from jbackprop.factored import PyTree


def gradient(
    fun: Callable[..., Any],
    *args: Any,
    candidate: PyTree,
    argnums: int | Sequence[int] = 0,
    truth: TruthKind = "both",
    tolerance: float | None = None,
    directions: int = 2,
    seed: int = 0,
    exact: bool | None = None,
) -> Report:
    """Is `candidate` the gradient of a scalar function?

    Each array is judged by norms over all of its entries: where some are small beside the others,
    check them by themselves. A function that draws random numbers, or whose loops carry float32,
    is not the same in float64, or none at all; of such the truth is the program as it is traced in
    the dtypes given, with its floating-point operations done in float64 and without the custom
    rules in it.

    Args:
        fun: any JAX function of args that returns a scalar.
        args: its arguments, any pytrees. Integers, None, strings, functions, PRNG keys and, outside
            of argnums, Python's floats are handed on as they are. They should be those that the
            candidate was computed from, in the dtype that it was computed in.
        candidate: arrays in the structure of args[argnums]; None or anything at leaves that are no
            floating-point arrays. Unscaled: d fun / d arg.
        argnums: which arguments; several give a candidate that is a tuple.
        truth: "autodiff" is `jax.grad(fun)` in float64; "numerical" knows nothing but values of
            fun in float64 (the complex step where fun is analytic, else Ridders' extrapolation);
            "both" takes autodiff's, confirmed by numbers along random directions in each array.
            Where they disagree there is a `TruthWarning`, and numbers are the truth; where numbers
            do not know, a note.
        tolerance: the relative error in norm that is right; by default from each array's dtype,
            the operations that lead to it, and what autodiff itself loses there.
        directions: random directions in each array, for numbers.
        seed: of the directions; the report prints it.
        exact: numbers entry by entry (True), along directions (False), or by size (None: entry by
            entry where an array has at most 256 of them). With "both" entries come from autodiff.

    Returns:
        A `Report` with a leaf for every array.

    Raises:
        ValueError: fun is no scalar, or candidate has another structure than args[argnums].
        TypeError: no floating-point leaf to differentiate by, or complex ones.
    """
    check_options(truth, tolerance, directions, seed, exact)
    numbers = _argnums(argnums)
    inputs = Inputs(fun, args, numbers, isinstance(argnums, int))
    check_scalar(fun, args)
    candidates = inputs.match(candidate)

    def scalar(active: list[Any], passive: list[Any]) -> Array:
        return jnp.asarray(inputs.call(fun, active, passive))

    scalar = inputs.at_any_precision(scalar)
    how = How(truth, tolerance, directions, seed, exact)
    return judged(
        inputs, candidates, scalar, scalar, how, "gradient", name_of(fun), "jb.check.gradient"
    )


def vjp(
    fun: Callable[..., Any],
    *primals: Any,
    argnums: int | Sequence[int] | None = None,
    truth: TruthKind = "both",
    tolerance: float | None = None,
    directions: int = 2,
    seed: int = 0,
    exact: bool | None = None,
) -> Report:
    """Is the reverse rule of a function right? For `jax.custom_vjp`, or any other JAX function.

    Tried are random cotangents for all outputs together, and for each output alone. Besides, the
    rule must be linear in the cotangent, and its forward part must return what the function does.

    Args:
        fun: the function, pytrees to pytrees.
        primals: its arguments; see `gradient` for what may be among them.
        argnums: the arguments to differentiate by; by default all that have floating-point arrays,
            or, if none has, Python's floats.
        truth: "autodiff" differentiates what the function computes, in float64, with its custom
            rules taken away (not those within `shard_map`: there leave it at "both"); the others as
            in `gradient`, on values of the function alone.
        tolerance: as in `gradient`.
        directions: as in `gradient`.
        seed: of the cotangents and the directions; the report prints it.
        exact: as in `gradient`.

    Returns:
        A `Report`: for every cotangent the vector-Jacobian product by each argument.

    Raises:
        TypeError: no floating-point inputs or outputs, or complex ones.
    """
    check_options(truth, tolerance, directions, seed, exact)
    inputs, names = _parted(fun, primals, argnums)
    rng, dtype = np.random.default_rng(seed), coarsest(inputs.dtypes)
    with as_given(dtype):
        plain = compiled(lambda a, p: outputs_of(inputs.call(fun, a, p)))(
            inputs.active, inputs.passive
        )
        outputs = [float64(v) for v in plain]
    cotangents = _drawn(rng, outputs, [f"from {name} alone" for name in names])

    def rule(active: list[Any], passive: list[Any], u: list[Any]) -> Any:
        value, back = jax.vjp(lambda a: outputs_of(inputs.call(fun, a, passive)), active)
        u = [v.astype(w.dtype) for v, w in zip(u, value, strict=True)]
        return value, back(u)[0], back([2 * v for v in u])[0], back([0 * v for v in u])[0]

    run, parts = compiled(rule), []
    exact_outputs = inputs.at_any_precision(lambda a, p: outputs_of(inputs.call(fun, a, p)))
    for label, u in cotangents.items():
        with as_given(dtype):
            given = [jnp.asarray(v, w.dtype) for v, w in zip(u, plain, strict=True)]
            value, found, twice, none = run(inputs.active, inputs.passive, given)
            u = [float64(v) for v in given]  # as it was rounded

        def contracted(active: list[Any], passive: list[Any], u: Any = u) -> Array:
            return inner(u, exact_outputs(active, passive))

        def bare(active: list[Any], passive: list[Any], contracted: Any = contracted) -> Array:
            return without_custom_rules(contracted)(active, passive)

        how, what = How(truth, tolerance, directions, seed, exact), f"cotangent {label}".strip()
        parts.append(judged(inputs, found, contracted, bare, how, what, label))
        if not label:
            parts += [
                same_all("forward part", names, value, outputs, "what the function returns"),
                same_all("zero cotangent", inputs.names, none, [0 * v for v in none], "zero"),
                same_all(
                    "twice the cotangent", inputs.names, twice, [2 * float64(v) for v in found],
                    "twice the result: the rule is linear",
                ),
            ]  # fmt: skip
    return composed("jb.check.vjp", name_of(fun), parts, notes=notes_of(parts))


def jvp(
    fun: Callable[..., Any],
    *primals: Any,
    argnums: int | Sequence[int] | None = None,
    truth: TruthKind = "both",
    tolerance: float | None = None,
    directions: int = 2,
    seed: int = 0,
    exact: bool | None = None,
) -> Report:
    """Is the forward rule of a function right? For `jax.custom_jvp`, or any other JAX function.

    Tried are random tangents for all arguments together, and for each array among them alone.

    Args:
        fun: as in `vjp`.
        primals: as in `vjp`.
        argnums: as in `vjp`.
        truth: as in `vjp`.
        tolerance: as in `gradient`.
        directions: random directions in each output, for numbers.
        seed: of tangents and directions; the report prints it.
        exact: numbers for every entry of an output (True), or along directions.

    Returns:
        A `Report`: for every tangent the Jacobian-vector product of each output.

    Raises:
        TypeError: no floating-point inputs or outputs, or complex ones.
    """
    check_options(truth, tolerance, directions, seed, exact)
    inputs, names = _parted(fun, primals, argnums)
    rng, dtype = np.random.default_rng(seed), coarsest(inputs.dtypes)
    tangents = _drawn(rng, inputs.active, [f"along {name} alone" for name in inputs.names])

    def outputs(active: list[Any], passive: list[Any]) -> list[Any]:
        return outputs_of(inputs.call(fun, active, passive))

    def rule(f: Any, active: list[Any], passive: list[Any], v: list[Any]) -> Any:
        v = [jnp.asarray(d).astype(jnp.asarray(w).dtype) for d, w in zip(v, active, strict=True)]
        return jax.jvp(lambda a: f(a, passive), (list(active),), (v,))[1]

    parts, run = [], compiled(lambda a, p, v: rule(outputs, a, p, v))
    exact_outputs = inputs.at_any_precision(outputs)
    for label, v in tangents.items():
        with as_given(dtype):
            given = [jnp.asarray(d, w.dtype) for d, w in zip(v, inputs.active, strict=True)]
            found = run(inputs.active, inputs.passive, given)
            v = [float64(d) for d in given]

        def bare(point: Any, v: Any = v) -> Any:
            active, passive = point
            return rule(without_custom_rules(exact_outputs), active, passive, v)

        def weighed(x: list[Any], data: Any) -> Array:
            passive, weights = data
            return inner(weights, exact_outputs(x, passive))

        candidates = [np.asarray(f) for f in found]
        how, what = How(truth, tolerance, directions, seed, exact), f"tangent {label}".strip()
        tangent = [np.array(d) for d in v]  # copies: JAX keeps what it made of a constant's array
        question = Question(
            inputs, names, candidates, bare, weighed, tangent, None, None, how, what
        )
        parts.append(question.report("", label))
    return composed("jb.check.jvp", name_of(fun), parts, notes=notes_of(parts))


def _argnums(value: Any) -> tuple[int, ...]:
    numbers = tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"argnums must be an int, or several, not {value!r}")
    return numbers


def _parted(
    fun: Callable[..., Any], primals: tuple[Any, ...], argnums: int | Sequence[int] | None
) -> tuple[Inputs, list[str]]:
    """The arguments of a function, parted, and the names of its outputs."""
    numbers = all_of(primals) if argnums is None else _argnums(argnums)
    inputs = Inputs(fun, primals, numbers, False)
    names = output_names(inputs.call_shape(fun))
    if not names:
        raise TypeError(f"{name_of(fun)} has no floating-point output to differentiate")
    return inputs, names


def _drawn(rng: Any, like: Sequence[Any], labels: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """Random arrays for all places together; and, where there are several, for each alone."""
    found = {"": [rng.standard_normal(v.shape) for v in like]}
    for i, label in enumerate(labels if len(labels) > 1 else []):
        found[label] = [rng.standard_normal(v.shape) * (j == i) for j, v in enumerate(like)]
    return found


def assert_gradient(fun: Callable[..., Any], *args: Any, **options: Any) -> None:
    """As `gradient`; raises AssertionError with the report unless all is right."""
    demand(gradient(fun, *args, **options))


def assert_vjp(fun: Callable[..., Any], *primals: Any, **options: Any) -> None:
    """As `vjp`; raises AssertionError with the report unless all is right."""
    demand(vjp(fun, *primals, **options))


def assert_jvp(fun: Callable[..., Any], *primals: Any, **options: Any) -> None:
    """As `jvp`; raises AssertionError with the report unless all is right."""
    demand(jvp(fun, *primals, **options))
