"""Judging all arrays of one gradient: by autodiff, by numbers, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jbackprop.check import judge
from jbackprop.check.diagnosis import Suspect, diagnose
from jbackprop.check.inputs import Inputs
from jbackprop.check.judge import How
from jbackprop.check.numbers import EXACT, by_numbers, confirm, confirm_together, warn_of
from jbackprop.check.numerical import FIRST, Slope, Slopes
from jbackprop.check.precision import (
    Chain,
    allowed,
    as_given,
    cast,
    coarsest,
    compiled,
    exactly,
    float64,
    norm,
)
from jbackprop.check.programs import enters
from jbackprop.check.report import Report, composed


def judged(
    inputs: Inputs, candidates: Sequence[Any], scalar: Any, trusted: Any, how: How, what: str,
    kind: str = "", path: str = "",
) -> Report:  # fmt: skip
    """The report on candidates for the gradient of `scalar(active, passive)`.

    `trusted` computes the same, and is what autodiff is let loose on.
    """

    def autodiff(point: Any) -> Any:
        active, passive = point
        return jax.grad(trusted)(active, passive)

    def weighed(x: list[Any], data: Any) -> Array:
        return scalar(x, data[0])

    return Question(
        inputs,
        inputs.names,
        candidates,
        autodiff,
        weighed,
        None,
        trusted,
        scalar,
        how,
        what,
        bare=trusted is not scalar,
    ).report(path, kind)


MOST_KINKS = 32
"""So many entries that differ from autodiff are tried for a kink, by numbers."""


@dataclasses.dataclass
class Question:
    """Are these the true arrays of a function at a point?

    Attributes:
        inputs: the point.
        names: of the arrays.
        candidates: the arrays.
        autodiff: (active, passive) -> the true arrays.
        weighed: (active, (passive, weights)) -> a scalar, for numbers: the i-th array's inner
            product with d is its slope along d in the i-th active array; or, where there is a
            tangent, along that, with d for the i-th weights.
        tangent: see there.
        program: the scalar whose gradient the arrays are, without custom rules; None if they are
            no gradient.
        scalar: the same as it is.
        how: what the caller chose.
        what: what the arrays are.
        bare: whether autodiff is of the function with its custom rules taken away.
    """

    inputs: Inputs
    names: Sequence[str]
    candidates: Sequence[Any]
    autodiff: Any
    weighed: Any
    tangent: list[np.ndarray] | None
    program: Any
    scalar: Any
    how: How
    what: str
    bare: bool = True

    def __post_init__(self) -> None:
        self.point = self.inputs.active, self.inputs.passive
        self.dtypes = [np.asarray(c).dtype for c in self.candidates]
        self.rng = np.random.default_rng([self.how.seed, 1])
        self.notes: list[str] = []

    def report(self, path: str, kind: str) -> Report:
        known = self.known()
        self.confirmed: set[int] = set()
        if known and self.how.truth == "both" and self.shaped(known):
            self.confirmed = confirm_together(
                known, self.slope_of_all, self.how.directions, self.rng, self.dtypes
            )
        answers = [self.answer(i, known[i] if known else None) for i in range(len(self.names))]
        leaves = [leaf for leaf, _ in answers]
        if any(leaf.verdict == "wrong" for leaf in leaves):
            parameters = self.inputs.active if self.tangent is None else [None] * len(leaves)
            suspects = [
                Suspect(leaf.path, float64(c), value, leaf, parameter, dtype)
                for (leaf, value), c, parameter, dtype in zip(
                    answers, self.candidates, parameters, self.dtypes, strict=True
                )
            ]
            program = self.program if known or self.how.truth == "numerical" else None
            leaves = diagnose(suspects, self.inputs.sizes(), program, self.point)
        source = "values of the function alone, in float64"
        if known:
            source = "automatic differentiation in float64"
        if known and self.how.truth == "both":
            source += (
                f", compared with numbers along {self.how.directions} random direction(s) in each"
            )
        computed = " and ".join(dict.fromkeys(map(str, self.inputs.dtypes)))
        told = f"Computed in {computed}; truth: {source} (seed {self.how.seed})."
        return composed(path, kind, leaves, notes=[told, *self.notes])

    def known(self) -> list[judge.Truth] | None:
        """The truth by autodiff, if it is asked for and there is one."""
        if self.how.truth == "numerical":
            return None
        try:
            run = compiled(self.autodiff)
            return judge.truths(run, self.point, self.inputs.dtypes, self.how.seed)
        except Exception as error:  # whatever a function may raise that has no derivative here
            if self.how.truth == "autodiff":
                raise
            told = str(error).split("\n")[0][:200]
            self.notes.append(
                f"warning: jax cannot differentiate it, so that numbers are the truth: "
                f"{type(error).__name__}: {told}"
            )
            return None

    def answer(self, i: int, truth: judge.Truth | None) -> tuple[Report, np.ndarray | None]:
        """The verdict on the i-th array, and the truth, as far as it is known entry by entry."""
        name, c, dtype = self.names[i], self.candidates[i], self.dtypes[i]
        if truth is None:
            return self.by_numbers(i, None)
        leaf = judge.compare(name, self.what, c, truth, dtype, self.how.tolerance)
        at_kink = leaf.verdict == "inconclusive" and np.any(truth.high > truth.low)
        if (leaf.verdict == "wrong" or at_kink) and np.shape(c) == truth.value.shape:
            truth = self.kinks(i, c, truth, leaf)
            leaf = judge.compare(name, self.what, c, truth, dtype, self.how.tolerance)
        if leaf.verdict == "inconclusive" and not np.any(c) and not self.enters(i):
            why = "zero, as it must be: the function does not depend on it"
            return Report(name, self.what, why=why, figures=leaf.figures), truth.value
        if leaf.ok and self.how.truth != "autodiff" and np.any(truth.high > truth.low):
            leaf = self.tied(i, c, truth, leaf)
        if self.how.truth == "autodiff" or np.shape(c) != truth.value.shape:
            return leaf, truth.value
        if not np.all(np.isfinite(truth.value)):
            return self.by_numbers(i, truth)
        if i in self.confirmed:
            return leaf, truth.value
        verdict, told = confirm(
            truth, functools.partial(self.slope, i), self.how.directions, self.rng, dtype
        )
        if verdict == "disagree":
            found, value = self.by_numbers(i, truth)
            if self.bare and found.ok:  # what the custom rule is there for
                self.notes.append(
                    f"{name}: judged by numbers, because without its custom rules jax.grad of the "
                    f"function is wrong here: {told}"
                )
                return found, value
            self.notes.append("warning: " + warn_of(name, told))
            if leaf.ok and found.verdict == "wrong":
                told = "it agrees with jax.grad, but not with the values of the function"
                words = "a custom rule inside the function is wrong, or a stop_gradient is in it"
                found = dataclasses.replace(judge.because(found, told), diagnosis=words)
            return found, value
        if verdict == "unknown":
            self.notes.append(f"{name}: jax.grad is not confirmed by numbers: {told}")
        return leaf, truth.value

    def kinks(self, i: int, c: Any, truth: judge.Truth, leaf: Report) -> judge.Truth:
        """The truth with the slopes on both sides of a few entries, if these are at a kink."""
        assert leaf.figures is not None
        wide = float64(c)
        gap = np.maximum(np.maximum(truth.low - wide, wide - truth.high), 0)
        off = np.argwhere(gap > leaf.figures.tolerance * np.abs(truth.value))
        if not 0 < len(off) <= MOST_KINKS or not np.all(np.isfinite(wide)):
            return truth
        low, high = truth.low.copy(), truth.high.copy()
        for at in map(tuple, off):
            one = np.zeros(truth.value.shape)
            one[at] = 1.0
            slope = self.slope(i, one)
            if not slope.kinked:
                return truth
            low[at], high[at] = slope.low - slope.error, slope.high + slope.error
        return dataclasses.replace(truth, low=low, high=high, settled=True)

    def tied(self, i: int, c: Any, truth: judge.Truth, leaf: Report) -> Report:
        """Each entry may be possible at its kink, but not all at once: the largest of equals."""
        assert leaf.figures is not None
        at = np.asarray(truth.high > truth.low, np.float64)
        slope, claim = self.slope(i, at), float(np.vdot(float64(c), at))
        size = truth.size + norm(c)
        limit = slope.error + leaf.figures.tolerance * size * float(np.sqrt(at.sum()))
        if slope.kinked or not abs(claim - slope.value) > limit:
            return leaf
        told = (
            f"moved together, the {int(at.sum())} entries that are at a kink have no kink, but the "
            f"slope {slope.value:.6g}, and theirs add up to {claim:.6g}"
        )
        words = "a tie: the gradient must go to one of the equals, or be shared out among them"
        error = abs(claim - slope.value) / (truth.norm or 1)
        figures = dataclasses.replace(leaf.figures, error=error)
        leaf = dataclasses.replace(leaf, own="wrong", diagnosis=words, figures=figures)
        return judge.because(leaf, told)

    def by_numbers(self, i: int, truth: judge.Truth | None) -> tuple[Report, np.ndarray | None]:
        name, c, dtype, how = self.names[i], self.candidates[i], self.dtypes[i], self.how
        if self.tangent is None and np.shape(c) != np.shape(self.inputs.active[i]):
            why = f"has the shape {np.shape(c)}, but must have {np.shape(self.inputs.active[i])}"
            return Report(name, self.what, own="wrong", why=why), None
        limit = how.tolerance
        if limit is None:
            limit = allowed(truth.chain if truth else self.chains[i], dtype)
        exact = how.exact if how.exact is not None else np.size(c) <= EXACT
        leaf, value = by_numbers(
            name, self.what, c, lambda d: self.slope(i, d), dtype, limit, how.directions,
            self.rng, exact,
        )  # fmt: skip
        if leaf.verdict == "inconclusive" and not np.any(c) and not self.enters(i):
            why = "zero, as it must be: the function does not depend on it"
            leaf = Report(name, self.what, why=why, figures=leaf.figures)
        return leaf, value

    @functools.cached_property
    def chains(self) -> list[Chain]:
        """What leads to each array, by autodiff; or to the value, where there is none."""

        def value(point: Any) -> list[Any]:
            weights = [np.zeros(np.shape(c)) for c in self.candidates]
            return [self.weighed(point[0], (point[1], weights))] * len(self.candidates)

        with as_given(coarsest(self.inputs.dtypes)):
            try:
                return judge.chains_of(self.autodiff, self.point)
            except Exception:  # whatever a function may raise that has no derivative
                return judge.chains_of(value, self.point)

    @functools.cached_property
    def slopes(self) -> Slopes:
        wide = [float64(v) for v in self.inputs.active]
        return Slopes(self.weighed, wide, self.data(self.only(-1, np.zeros(()))))

    def data(self, weights: list[np.ndarray]) -> Any:
        passive = cast(self.inputs.passive, "float64")
        return passive, () if self.tangent is None else weights

    def only(self, i: int, d: np.ndarray) -> list[np.ndarray]:
        """d for the i-th array, zeros for the others."""
        due = self.candidates if self.tangent is not None else self.inputs.active
        return [d if j == i else np.zeros(np.shape(v)) for j, v in enumerate(due)]

    def slope(self, i: int, d: np.ndarray, first: float = FIRST) -> Slope:
        """The inner product of the i-th true array with d, by numbers."""
        return self.slope_of_all(self.only(i, d), first)

    def slope_of_all(self, directions: list[np.ndarray], first: float = FIRST) -> Slope:
        """The sum over all true arrays of their inner products with these, by numbers."""
        along = directions if self.tangent is None else self.tangent
        return self.slopes.along(along, self.data(directions), first)

    def shaped(self, known: Sequence[judge.Truth]) -> bool:
        """Whether all candidates have the shape of the truth."""
        return all(
            np.shape(c) == t.value.shape for c, t in zip(self.candidates, known, strict=True)
        )

    def enters(self, i: int) -> bool:
        """Whether the function depends on the i-th active array at all."""
        moving, fun = [i], self.scalar
        if self.tangent is not None:
            moving = [j for j, v in enumerate(self.tangent) if np.any(v)]
            _, weights = self.data(self.only(i, np.ones(np.shape(self.candidates[i]))))

            def fun(active: list[Any], passive: list[Any]) -> Array:
                return self.weighed(active, (passive, weights))

        try:
            with exactly():
                active, passive = cast(self.point, "float64")
                return enters(fun, active, passive, moving)
        except jax.errors.ConcretizationTypeError:
            return True


def same_all(
    what: str, names: Sequence[str], found: Sequence[Any], due: Sequence[Any], meaning: str
) -> Report:
    """Equal up to a few roundings."""
    leaves = []
    for name, f, d in zip(names, found, due, strict=True):
        leaves.append(judge.same(name, what, f, d, meaning))
    return composed("", what, leaves)
