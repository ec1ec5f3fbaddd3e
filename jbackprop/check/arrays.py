"""Judging all arrays of one gradient: by autodiff, by numbers, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jbackprop.check import judge
from jbackprop.check.diagnosis import Suspect, diagnose
from jbackprop.check.inputs import Inputs, keys
from jbackprop.check.judge import TruthKind
from jbackprop.check.numbers import EXACT, by_numbers, confirm, warn_of
from jbackprop.check.numerical import Slope, Slopes
from jbackprop.check.precision import allowed, cast, coarsest, exactly, float64
from jbackprop.check.programs import enters
from jbackprop.check.report import Report, composed


def judged(
    path: str, kind: str, inputs: Inputs, candidates: Sequence[Any], scalar: Any, trusted: Any,
    truth: TruthKind, tolerance: float | None, directions: int, seed: int, exact: bool | None,
    what: str,
) -> Report:  # fmt: skip
    """The report on candidates for the gradient of `scalar(active, passive)`."""

    def autodiff(point: Any) -> Any:
        active, passive = point
        return jax.grad(trusted)(active, passive)

    def weighed(x: list[Any], data: Any) -> Array:
        return scalar(x, data[0])

    return judged_arrays(
        path, kind, inputs.names, candidates, inputs, autodiff, weighed, None,
        truth, tolerance, directions, seed, exact, what, trusted, scalar,
    )  # fmt: skip


def judged_arrays(
    path: str, kind: str, names: Sequence[str], candidates: Sequence[Any], inputs: Inputs,
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
        numbers = known is None
        leaf, value = None, None
        if known is not None:
            leaf, value = judge.compare(name, what, c, known[i], dtype, tolerance), known[i].value
            finite = bool(np.all(np.isfinite(value)))
            if truth == "both" and np.shape(c) == value.shape:
                verdict, told = ("unknown", "") if not finite else confirm(
                    known[i], lambda d, i=i: probe(i, d), directions, rng, dtype
                )  # fmt: skip
                if verdict == "disagree":
                    notes.append("warning: " + warn_of(name, told))
                    numbers = True
                elif not finite:
                    numbers = True
                elif verdict == "unknown":
                    notes.append(f"{name}: jax.grad is not confirmed by numbers: {told}")
                else:
                    confirmed.append(told)
        if numbers:
            size = int(np.size(c))
            each = exact if exact is not None else size <= EXACT
            chain = known[i].chain if known else judge.chains_of(
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
                leaf, value = by_numbers(
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


def _enters(scalar: Any, inputs: Inputs, i: int) -> bool:
    try:
        with exactly():
            return scalar is None or enters(
                scalar, *cast((inputs.active, inputs.passive), "float64"), i
            )
    except jax.errors.ConcretizationTypeError:
        return True


def _sizes(inputs: Inputs) -> dict[int, str]:
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


def _labels_of(inputs: Inputs, path: Any) -> str:
    return f"{inputs.labels[path[0].idx]}{keys(path[1:])}"


def same_all(
    what: str, names: Sequence[str], found: Sequence[Any], due: Sequence[Any], meaning: str
) -> Report:
    """Equal up to a few roundings."""
    leaves = []
    for name, f, d in zip(names, found, due, strict=True):
        leaves.append(judge.same(name, what, f, d, meaning))
    return composed("", what, leaves)
