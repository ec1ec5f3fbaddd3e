"""Is this the gradient of that function? Is the rule of this function right? For any JAX function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.check import judge
from jbackprop.check.diagnosis import Suspect, diagnose
from jbackprop.check.judge import TruthKind
from jbackprop.check.numerical import Slope, Slopes
from jbackprop.check.precision import (
    allowed, as_given, cast, coarsest, compiled, exactly, float64, is_float,
)  # fmt: skip
from jbackprop.check.programs import enters, without_custom_rules
from jbackprop.check.report import Report, composed, demand
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

    Args:
        fun: any JAX function of args that returns a scalar.
        args: its arguments, any pytrees. Integers, None, strings, functions and PRNG keys are
            handed on as they are. They should be those that the candidate was computed from, in
            the dtype that it was computed in.
        candidate: arrays in the structure of args[argnums]; None or anything at leaves that are no
            floating-point arrays. Unscaled: d fun / d arg.
        argnums: which arguments; several give a candidate that is a tuple.
        truth: "autodiff" is `jax.grad(fun)` in float64; "numerical" knows nothing but values of
            fun in float64 (the complex step where fun is analytic, else Ridders' extrapolation);
            "both" takes autodiff's, confirmed by numbers along random directions in each array.
            Where they disagree there is a `TruthWarning`, and numbers are the truth.
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
    _check_options(truth, directions)
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    inputs = _Inputs(fun, args, numbers, isinstance(argnums, int))
    _check_scalar(fun, args)
    candidates = inputs.match(candidate)

    def scalar(active: list[Any], passive: list[Any]) -> Array:
        return jnp.asarray(inputs.call(fun, active, passive))

    return _judged(
        "jb.check.gradient", _name(fun), inputs, candidates, scalar, scalar,
        truth, tolerance, directions, seed, exact, "gradient",
    )  # fmt: skip


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
        argnums: the arguments to differentiate by; by default all that have floating-point leaves.
        truth: "autodiff" differentiates what the function computes, with all custom rules taken
            away, in float64; the others as in `gradient`, on values of the function alone.
        tolerance: as in `gradient`.
        directions: as in `gradient`.
        seed: of the cotangents and the directions; the report prints it.
        exact: as in `gradient`.

    Returns:
        A `Report`: for every cotangent the vector-Jacobian product by each argument.

    Raises:
        TypeError: no floating-point inputs or outputs, or complex ones.
    """
    _check_options(truth, directions)
    numbers = _all(primals) if argnums is None else argnums
    numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    inputs = _Inputs(fun, primals, numbers, False)
    rng = np.random.default_rng(seed)
    dtype = coarsest(inputs.dtypes)
    with as_given(dtype):
        plain = compiled(lambda a, p: _outputs(inputs.call(fun, a, p)))(inputs.active, inputs.passive)
        outputs = [float64(v) for v in plain]
        names = _output_names(inputs.call_shape(fun))
    if not outputs:
        raise TypeError(f"{_name(fun)} has no floating-point output to differentiate")
    whole = [rng.standard_normal(v.shape) for v in outputs]
    cotangents = {"": whole}
    if len(outputs) > 1:
        for i, name in enumerate(names):
            one = [rng.standard_normal(v.shape) * (j == i) for j, v in enumerate(outputs)]
            cotangents[f"from {name} alone"] = one

    def rule(active: list[Any], passive: list[Any], u: list[Any]) -> Any:
        value, back = jax.vjp(lambda a: _outputs(inputs.call(fun, a, passive)), active)
        u = [v.astype(w.dtype) for v, w in zip(u, value, strict=True)]
        return value, back(u)[0], back([2 * v for v in u])[0], back([0 * v for v in u])[0]

    run, parts = compiled(rule), []
    for label, u in cotangents.items():
        with as_given(dtype):
            given = [jnp.asarray(v, w.dtype) for v, w in zip(u, plain, strict=True)]
            value, found, twice, none = run(inputs.active, inputs.passive, given)
            u = [float64(v) for v in given]  # as it was rounded

        def contracted(active: list[Any], passive: list[Any], f: Any = fun, u: Any = u) -> Array:
            return _inner(u, _outputs(inputs.call(f, active, passive)))

        def bare(active: list[Any], passive: list[Any], contracted: Any = contracted) -> Array:
            return without_custom_rules(contracted)(active, passive)

        report = _judged(
            "", label, inputs, found, contracted, bare,
            truth, tolerance, directions, seed, exact, f"cotangent {label}".strip(),
        )  # fmt: skip
        parts.append(report)
        if not label:
            parts += [
                _same("forward part", names, value, outputs, "what the function itself returns"),
                _same("zero cotangent", inputs.names, none, [0 * float64(v) for v in none], "zero"),
                _same(
                    "twice the cotangent", inputs.names, twice, [2 * float64(v) for v in found],
                    "twice the result: the rule is linear",
                ),
            ]  # fmt: skip
    return composed("jb.check.vjp", _name(fun), parts)


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
    _check_options(truth, directions)
    numbers = _all(primals) if argnums is None else argnums
    numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
    inputs = _Inputs(fun, primals, numbers, False)
    rng = np.random.default_rng(seed)
    dtype = coarsest(inputs.dtypes)
    names = _output_names(inputs.call_shape(fun))
    if not names:
        raise TypeError(f"{_name(fun)} has no floating-point output to differentiate")
    tangents = {"": [rng.standard_normal(v.shape) for v in inputs.active]}
    if len(inputs.active) > 1:
        for i, name in enumerate(inputs.names):
            tangents[f"along {name} alone"] = [
                rng.standard_normal(v.shape) * (j == i) for j, v in enumerate(inputs.active)
            ]

    def outputs(active: list[Any], passive: list[Any]) -> list[Any]:
        return _outputs(inputs.call(fun, active, passive))

    def rule(f: Any, active: list[Any], passive: list[Any], v: list[Any]) -> Any:
        v = [jnp.asarray(d).astype(jnp.asarray(w).dtype) for d, w in zip(v, active, strict=True)]
        return jax.jvp(lambda a: f(a, passive), (list(active),), (v,))[1]

    parts, run = [], compiled(lambda a, p, v: rule(outputs, a, p, v))
    for label, v in tangents.items():
        with as_given(dtype):
            given = [jnp.asarray(d, w.dtype) for d, w in zip(v, inputs.active, strict=True)]
            found = run(inputs.active, inputs.passive, given)
            v = [float64(d) for d in given]

        def bare(point: Any, v: Any = v) -> Any:
            return rule(without_custom_rules(outputs), *point, v)

        def weighed(x: list[Any], data: Any) -> Array:
            passive, weights = data
            return _inner(weights, outputs(x, passive))

        parts.append(
            _judged_arrays(
                "", label, names, [np.asarray(f) for f in found], inputs, bare, weighed,
                v, truth, tolerance, directions, seed, exact, f"tangent {label}".strip(), None, None,
            )
        )  # fmt: skip
    return composed("jb.check.jvp", _name(fun), parts)


def assert_gradient(fun: Callable[..., Any], *args: Any, **options: Any) -> None:
    """As `gradient`; raises AssertionError with the report unless all is right."""
    demand(gradient(fun, *args, **options))


def assert_vjp(fun: Callable[..., Any], *primals: Any, **options: Any) -> None:
    """As `vjp`; raises AssertionError with the report unless all is right."""
    demand(vjp(fun, *primals, **options))


def assert_jvp(fun: Callable[..., Any], *primals: Any, **options: Any) -> None:
    """As `jvp`; raises AssertionError with the report unless all is right."""
    demand(jvp(fun, *primals, **options))


# --- The arguments of a function ----------------------------------------------------------------


class _Inputs:
    """A function's arguments, parted: to differentiate by, other arrays, and the rest."""

    def __init__(
        self, fun: Callable[..., Any], args: tuple[Any, ...], argnums: tuple[int, ...], single: bool
    ) -> None:
        for n in argnums:
            if not -len(args) <= n < len(args):
                raise ValueError(f"argnums {n}: {_name(fun)} was given {len(args)} arguments")
        self.argnums, self.single = tuple(n % len(args) for n in argnums), single
        self.labels = labels = _labels(fun, len(args))
        found, self._tree = jax.tree_util.tree_flatten_with_path(args)
        self._leaves = [_as_array(leaf) for _, leaf in found]
        self._paths = [path for path, _ in found]
        self._chosen, self._others = [], []
        for i, (path, leaf) in enumerate(zip(self._paths, self._leaves, strict=True)):
            name = labels[path[0].idx] + _keys(path[1:])
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(f"{name} is complex: only real arguments can be checked")
            if is_float(leaf) and path[0].idx in self.argnums:
                self._chosen.append(i)
            elif hasattr(leaf, "dtype"):
                self._others.append(i)
        self.names = [labels[p[0].idx] + _keys(p[1:]) for p in map(self._paths.__getitem__, self._chosen)]
        self.active = [self._leaves[i] for i in self._chosen]
        self.passive = [self._leaves[i] for i in self._others]
        if not self.active:
            raise TypeError(
                f"there is no floating-point array to differentiate {_name(fun)} by in the "
                f"arguments {', '.join(labels[n] for n in self.argnums)}"
            )
        self.dtypes = [v.dtype for v in (*self.active, *self.passive) if is_float(v)]

    def call(self, fun: Callable[..., Any], active: Sequence[Any], passive: Sequence[Any]) -> Any:
        leaves = list(self._leaves)
        for at, values in ((self._chosen, active), (self._others, passive)):
            for i, v in zip(at, values, strict=True):
                leaves[i] = v
        return fun(*jax.tree.unflatten(self._tree, leaves))

    def call_shape(self, fun: Callable[..., Any]) -> Any:
        try:
            return jax.eval_shape(
                lambda a, p: self.call(fun, a, p), self.active, self.passive
            )
        except jax.errors.ConcretizationTypeError:
            return self.call(fun, self.active, self.passive)

    def match(self, candidate: PyTree) -> list[np.ndarray]:
        """The candidate's arrays, one for each active leaf."""
        parts = (candidate,) if self.single else candidate
        if not isinstance(parts, tuple | list) or len(parts) != len(self.argnums):
            raise ValueError(
                f"candidate must be a tuple of {len(self.argnums)} gradients, one for each of "
                f"argnums {self.argnums}"
            )
        given = {}
        for number, part in zip(self.argnums, parts, strict=True):
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
                given[(number, _keys(path))] = leaf
        found = []
        for i, name in zip(self._chosen, self.names, strict=True):
            path = self._paths[i]
            leaf = given.pop((path[0].idx, _keys(path[1:])), None)
            if leaf is None:
                raise ValueError(
                    f"candidate has no gradient for {name}: it must have the structure of the "
                    "argument, with an array for every floating-point leaf (zeros, if that is it)"
                )
            array = np.asarray(leaf)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                if not np.issubdtype(array.dtype, np.integer) and array.dtype != object:
                    raise TypeError(f"candidate for {name} has the dtype {array.dtype}")
                raise TypeError(f"candidate for {name} must be floating-point, not {array.dtype}")
            found.append(array)
        others = {(p[0].idx, _keys(p[1:])) for p in self._paths}
        extra = [key for key in given if key not in others]
        if extra:
            raise ValueError(
                f"candidate has gradients for what is not in the argument: "
                f"{', '.join(key or 'the whole' for _, key in extra)}"
            )
        return found


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, float | np.floating) and not isinstance(leaf, np.ndarray):
        return np.asarray(leaf, getattr(leaf, "dtype", jnp.result_type(float)))
    return leaf


def _labels(fun: Callable[..., Any], n: int) -> list[str]:
    """The names of a function's first n arguments."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"args[{i}]" for i in range(n)]


def _keys(path: Any) -> str:
    """A path in a pytree, as one would write it: .w, [0], ..."""
    words = []
    for key in path:
        if hasattr(key, "idx"):
            words.append(f"[{key.idx}]")
        else:
            words.append(f".{getattr(key, 'key', getattr(key, 'name', key))}")
    return "".join(words)


def _name(fun: Callable[..., Any]) -> str:
    inner = getattr(fun, "func", fun)  # of a partial
    return str(getattr(inner, "__qualname__", getattr(inner, "__name__", type(inner).__name__)))


def _all(primals: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(
        i for i, p in enumerate(primals) if any(is_float(_as_array(v)) for v in jax.tree.leaves(p))
    )


def _outputs(out: Any) -> list[Any]:
    """The floating-point leaves of what a function returns."""
    leaves = [jnp.asarray(v) for v in jax.tree.leaves(out)]
    return [v for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact)]


def _inner(weights: Sequence[Any], values: Sequence[Array]) -> Array:
    """<weights, values> over all arrays; nothing is conjugated where values are complex."""
    start = jnp.zeros((), values[0].dtype)
    terms = zip(weights, values, strict=True)
    present = [(w, v) for w, v in terms if isinstance(w, jax.core.Tracer) or np.any(w)]
    return sum((jnp.sum(jnp.asarray(w).astype(v.dtype) * v) for w, v in present), start=start)


def _output_names(out: Any) -> list[str]:
    found = jax.tree_util.tree_flatten_with_path(out)[0]
    if any(jnp.issubdtype(jnp.result_type(v), jnp.complexfloating) for _, v in found):
        raise TypeError("the function returns complex numbers: only real ones can be checked")
    return [
        "output" + _keys(path) for path, v in found if jnp.issubdtype(jnp.result_type(v), jnp.floating)
    ]


def _check_options(truth: str, directions: int) -> None:
    if truth not in ("autodiff", "numerical", "both"):
        raise ValueError(f"truth must be 'autodiff', 'numerical' or 'both', not {truth!r}")
    if directions < 1:
        raise ValueError(f"directions must be at least 1, not {directions}")


def _check_scalar(fun: Callable[..., Any], args: tuple[Any, ...]) -> None:
    inputs = _Inputs(fun, args, _all(args), False)
    out = inputs.call_shape(fun)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or jnp.shape(leaves[0]) != ():
        shapes = jax.tree.map(jnp.shape, out)
        raise ValueError(
            f"{_name(fun)} must return one scalar, not {shapes}: sum it, or take jb.check.vjp"
        )
    if not jnp.issubdtype(jnp.result_type(leaves[0]), jnp.floating):
        raise TypeError(
            f"{_name(fun)} must return a real floating-point scalar, not {jnp.result_type(leaves[0])}"
        )


# --- Judging all arrays of one gradient ---------------------------------------------------------


def _judged(
    path: str, kind: str, inputs: _Inputs, candidates: Sequence[Any], scalar: Any, trusted: Any,
    truth: TruthKind, tolerance: float | None, directions: int, seed: int, exact: bool | None,
    what: str,
) -> Report:  # fmt: skip
    """The report on candidates for the gradient of `scalar(active, passive)`."""

    def autodiff(point: Any) -> Any:
        active, passive = point
        return jax.grad(trusted)(active, passive)

    def weighed(x: list[Any], data: Any) -> Array:
        return scalar(x, data[0])

    return _judged_arrays(
        path, kind, inputs.names, candidates, inputs, autodiff, weighed, None,
        truth, tolerance, directions, seed, exact, what, trusted, scalar,
    )  # fmt: skip


def _judged_arrays(
    path: str, kind: str, names: Sequence[str], candidates: Sequence[Any], inputs: _Inputs,
    autodiff: Any, weighed: Any, tangent: list[np.ndarray] | None, truth: TruthKind,
    tolerance: float | None, directions: int, seed: int, exact: bool | None, what: str,
    program: Any, scalar: Any,
) -> Report:  # fmt: skip
    point = (inputs.active, inputs.passive)
    notes, rng = [], np.random.default_rng([seed, 1])
    dtypes = [coarsest([*inputs.dtypes, np.asarray(c).dtype]) for c in candidates]
    known: list[judge.Truth] | None = None
    if truth != "numerical":
        try:
            known = judge.truths(autodiff, point, inputs.dtypes, seed)
        except Exception as error:  # whatever a function may raise that has no derivative here
            if truth == "autodiff":
                raise
            told = str(error).split("\n")[0][:200]
            notes.append(f"jax cannot differentiate it ({type(error).__name__}: {told})")
    slopes: Slopes | None = None

    def probe(i: int, d: np.ndarray) -> Slope:
        nonlocal slopes
        wide = [float64(v) for v in inputs.active]
        with exactly():
            passive = cast(inputs.passive, "float64")
        shapes = [np.shape(c) for c in candidates]
        if tangent is None:
            data: Any = (passive, ())
            along = [d if j == i else np.zeros_like(w) for j, w in enumerate(wide)]
        else:
            data = (passive, [d if j == i else np.zeros(s) for j, s in enumerate(shapes)])
            along = tangent
        if slopes is None:
            slopes = Slopes(weighed, wide, data)
        return slopes.along(along, data)

    leaves: list[Report] = []
    values: list[np.ndarray | None] = []
    confirmed: list[str] = []
    for i, (name, c, dtype) in enumerate(zip(names, candidates, dtypes, strict=True)):
        by_numbers = known is None
        leaf, value = None, None
        if known is not None:
            leaf, value = judge.compare(name, what, c, known[i], dtype, tolerance), known[i].value
            finite = bool(np.all(np.isfinite(value)))
            if truth == "both" and np.shape(c) == value.shape:
                verdict, told = ("unknown", "") if not finite else judge.confirm(
                    known[i], lambda d, i=i: probe(i, d), directions, rng, dtype
                )  # fmt: skip
                if verdict == "disagree":
                    notes.append("warning: " + judge.warn_of(name, told))
                    by_numbers = True
                elif not finite:
                    by_numbers = True
                elif verdict == "unknown":
                    notes.append(f"{name}: jax.grad is not confirmed by numbers: {told}")
                else:
                    confirmed.append(told)
        if by_numbers:
            size = int(np.size(c))
            each = exact if exact is not None else size <= judge.EXACT
            chain = known[i].chain if known else judge._chains_of(
                lambda p: [weighed(p[0], (p[1], [np.zeros(np.shape(c)) for c in candidates]))],
                point, 1,
            )[0]  # fmt: skip
            limit = tolerance if tolerance is not None else allowed(chain, dtype)
            shape = np.shape(inputs.active[i]) if tangent is None else np.shape(c)
            if np.shape(c) != shape:
                why = f"has the shape {np.shape(c)}, but must have {shape}"
                leaf, value = Report(name, what, own="wrong", why=why), None
            else:
                fooled = leaf is not None and leaf.ok
                leaf, value = judge.by_numbers(
                    name, what, c, lambda d, i=i: probe(i, d), dtype, limit, directions, rng, each
                )
                if fooled and leaf.verdict == "wrong":
                    told = "it agrees with jax.grad, but not with the values of the function"
                    leaf = judge.because(leaf, told)
        assert leaf is not None
        if leaf.verdict == "inconclusive" and not np.any(c) and not _enters(scalar, inputs, i):
            why = "zero, as it must be: the function does not depend on it"
            leaf = Report(name, what, why=why, figures=leaf.figures)
        leaves.append(leaf)
        values.append(value)
    if any(leaf.verdict == "wrong" for leaf in leaves):
        suspects = [
            Suspect(leaf.path, float64(c), value, leaf, point_value, dtype)
            for leaf, c, value, point_value, dtype in zip(
                leaves, candidates, values,
                inputs.active if tangent is None else [None] * len(leaves), dtypes, strict=True,
            )
        ]  # fmt: skip
        leaves = diagnose(suspects, _sizes(inputs), program, point)
    if known is None:
        source = "values of the function alone, in float64"
    else:
        source = "automatic differentiation in float64"
        if confirmed:
            source += f", confirmed by numbers along {directions} random directions in each array"
    dtype = coarsest(inputs.dtypes)
    notes.insert(0, f"Computed in {dtype}; truth: {source} (seed {seed}).")
    return composed(path, kind, leaves, notes=notes)


def _enters(scalar: Any, inputs: _Inputs, i: int) -> bool:
    try:
        with exactly():
            return scalar is None or enters(scalar, *cast((inputs.active, inputs.passive), "float64"), i)
    except jax.errors.ConcretizationTypeError:
        return True


def _sizes(inputs: _Inputs) -> dict[int, str]:
    """The lengths of axes by number, with what they are the length of; for naming factors."""
    shaped = [
        (path, i in inputs._chosen, np.shape(leaf))
        for i, (path, leaf) in enumerate(zip(inputs._paths, inputs._leaves, strict=True))
        if hasattr(leaf, "shape")
    ]
    # Batches come first: axis 0 of what is not differentiated by.
    axes = sorted(
        (chosen, axis, n, f"the length of axis {axis} of {_labels_of(inputs, path)}")
        for path, chosen, shape in shaped
        for axis, n in enumerate(shape)
        if n > 2
    )
    found: dict[int, str] = {}
    for _, _, n, label in axes:
        found.setdefault(int(n), label)
    return found


def _labels_of(inputs: _Inputs, path: Any) -> str:
    return f"{inputs.labels[path[0].idx]}{_keys(path[1:])}"


def _same(
    what: str, names: Sequence[str], found: Sequence[Any], due: Sequence[Any], meaning: str
) -> Report:
    """Equal up to a few roundings."""
    leaves = []
    for name, f, d in zip(names, found, due, strict=True):
        leaves.append(judge.same(name, what, f, d, meaning))
    return composed("", what, leaves)
