"""What is wrong with a gradient: the mistakes that people make, fitted to the one at hand.

A diagnosis is offered only where it explains the error to tolerance. Mistakes in one array (a
factor, an order of axes, another array's gradient, a missing sum or regularisation term, a few
entries) are looked for there; mistakes in one derivative of the program are planted, one after the
other, in the true gradient, and that which gives the candidate is the one that was made.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jbackprop.check.edits import Edits
from jbackprop.check.precision import cast, exactly, float64, norm
from jbackprop.check.report import Report


@dataclasses.dataclass(frozen=True)
class Suspect:
    """One array of a gradient, right or wrong.

    Attributes:
        name: of the array.
        candidate: in float64.
        truth: in float64; None if it is known along directions only.
        leaf: the verdict on it.
        parameter: the value at which the gradient was taken, if it is a gradient by one.
        dtype: that of the candidate.
    """

    name: str
    candidate: np.ndarray
    truth: np.ndarray | None
    leaf: Report
    parameter: Any
    dtype: Any

    @property
    def limit(self) -> float:
        """The distance to the truth, in norm, that is within tolerance."""
        f = self.leaf.figures
        if f is None or self.truth is None:
            return 0.0
        distance = norm(self.candidate - self.truth) if (
            self.candidate.shape == self.truth.shape
        ) else math.inf  # fmt: skip
        scale = distance / f.error if 0 < f.error < math.inf and distance < math.inf else float(
            norm(self.truth)
        )  # fmt: skip
        return min(f.tolerance * scale, distance / 4)

    def telling(self, free: int = 0) -> bool:
        """Whether a fit with some free numbers is no coincidence, of a hundred that are tried."""
        size = norm(self.truth) if self.truth is not None else 0.0
        within = max(self.limit / size, 1e-15) if size else 1.0
        return 100 * within ** max(self.candidate.size - free, 0) < 0.01

    def explained(self, other: np.ndarray, target: np.ndarray | None = None) -> bool:
        """Whether an array is the truth (or another target) to tolerance."""
        target = self.truth if target is None else target
        if target is None or other.shape != target.shape:
            return False
        return bool(norm(other - target) <= self.limit)


def diagnose(
    suspects: Sequence[Suspect],
    sizes: Mapping[int, str],
    program: Callable[..., Any] | None = None,
    point: Any = None,
    neighbours: Mapping[str, Any] | None = None,
) -> list[Report]:
    """The leaves again, with a diagnosis for each wrong one that a known mistake explains.

    Args:
        suspects: all arrays of one gradient.
        sizes: numbers that may have become factors, and what each is.
        program: scalar(active, passive), whose gradient by `active` the suspects are; or None.
        point: (active, passive), for the program.
        neighbours: further elementwise functions, by name.
    """
    leaves = [s.leaf for s in suspects]
    vague: list[int] = []
    for i, suspect in enumerate(suspects):
        if suspect.leaf.verdict != "wrong" or suspect.truth is None:
            continue
        if suspect.leaf.figures and suspect.leaf.figures.cancels:
            continue  # its truth is rounding: nothing can be fitted to it
        if not np.all(np.isfinite(suspect.truth)):
            continue
        if not np.all(np.isfinite(suspect.candidate)):
            leaves[i] = dataclasses.replace(leaves[i], diagnosis=_not_finite(suspect))
            continue
        certain, words = next(_in_one_array(suspect, suspects, sizes), (False, ""))
        leaves[i] = dataclasses.replace(leaves[i], diagnosis=words)
        if suspect.leaf.diagnosis:  # known before: a rule inside that is wrong
            both = "; ".join(filter(None, (suspect.leaf.diagnosis, words)))
            leaves[i] = dataclasses.replace(leaves[i], diagnosis=both)
        elif not certain:
            vague.append(i)
    if vague and program is not None:
        words = _in_one_derivative(suspects, vague, program, point, dict(neighbours or {}))
        if words:
            for i in vague:
                leaves[i] = dataclasses.replace(leaves[i], diagnosis=words)
    return leaves


def _not_finite(s: Suspect) -> str:
    """How much of it is not finite, and whether the rest is right."""
    assert s.truth is not None
    c, finite = s.candidate, np.isfinite(s.candidate)
    if c.shape != s.truth.shape or not np.any(finite):
        return "nan or inf in every entry" if not np.any(finite) else ""
    words = " and ".join(
        name for name, found in (("nan", np.isnan(c)), ("inf", np.isinf(c))) if np.any(found)
    )
    f = s.leaf.figures
    limit = f.tolerance * norm(s.truth) if f else 0.0
    rest = norm((c - s.truth)[finite]) <= limit
    n = c.size - int(np.sum(finite))
    return f"yours but for {words} in {n} of {c.size} entries; the others are right" * bool(rest)


# --- Mistakes in one array ----------------------------------------------------------------------


def _in_one_array(
    s: Suspect, others: Sequence[Suspect], sizes: Mapping[int, str]
) -> Iterator[tuple[bool, str]]:
    """(whether it is certain, words) of every explanation, the simplest first."""
    c, t = s.candidate, s.truth
    assert t is not None
    if c.shape == t.shape and not np.any(c):
        yield True, "it is all zeros: the gradient is lost on the way (a stop_gradient?)"
        return
    if not s.telling():
        return
    factors = list(_factors(sizes))
    if c.shape == t.shape:
        for value, factor in factors:
            if s.explained(value * c):
                yield True, f"yours times {factor}"
                return
    for moved, words in _rearranged(c, t.shape):
        if s.explained(moved):
            yield True, words
        for value, factor in factors:
            if s.explained(value * moved):
                yield True, f"{words}, times {factor}"
    for other in others:
        same = other is not s and other.truth is not None and other.truth.shape == c.shape
        if same and s.explained(c, other.truth) and np.any(c):
            yield True, f"it is the gradient of {other.name}; that of {s.name} is due here"
    if c.shape != t.shape:
        return
    if s.parameter is not None:
        w = float64(s.parameter)
        for shape, words in ((w, "the parameter"), (np.sign(w), "the sign of the parameter")):
            yield from _multiple(s, shape, words, factors)
    if np.all(c >= 0) and np.any(t > 0) and s.explained(np.where(t < 0, -c, c)):
        yield True, "yours with the signs of the truth: an absolute value has been taken"
    yield from _few_entries(s, factors)
    fitted = float(np.vdot(c, t) / np.vdot(c, c))
    if s.telling(1) and fitted and s.explained(fitted * c):
        yield False, f"yours times {fitted:.6g}"


def _factors(sizes: Mapping[int, str]) -> Iterator[tuple[float, str]]:
    """Numbers that people forget, or have too many of, and their names."""
    yield -1.0, "-1: its sign is flipped"
    named = [(2.0, "2"), (0.5, "1/2"), (3.0, "3"), (1 / 3, "1/3"), (4.0, "4"), (0.25, "1/4")]
    for n, what in sizes.items():
        named += [
            (float(n), f"{n}, {what}: a mean where the sum is due"),
            (1 / n, f"1/{n}, {n} being {what}: a sum where the mean is due"),
        ]
    for n, what in sizes.items():
        named += [
            (math.sqrt(n), f"sqrt({n}), {n} being {what}"),
            (1 / math.sqrt(n), f"1/sqrt({n}), {n} being {what}"),
            (2 / n, f"2/{n}, {n} being {what}"),
            (n / 2, f"{n}/2, {n} being {what}"),
        ]
    for value, name in named:
        yield value, name
        yield -value, f"-{name}"


def _rearranged(c: np.ndarray, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, str]]:
    """The candidate with axes permuted, summed, flipped or shifted, if that has the shape."""
    axes = range(c.ndim)
    if 2 <= c.ndim <= 5:
        for order in itertools.permutations(axes):
            if order != tuple(axes) and tuple(c.shape[i] for i in order) == shape:
                plain = c.ndim == 2
                yield (
                    c.transpose(order),
                    ("yours transposed" if plain else f"yours with its axes in the order {order}"),
                )
    for n in range(1, c.ndim + 1):
        for gone in itertools.combinations(axes, n):
            left = tuple(c.shape[i] for i in axes if i not in gone)
            if left == shape and c.shape != shape:
                where = f"axis {gone[0]}" if n == 1 else f"axes {gone}"
                yield c.sum(gone), f"yours summed over {where}: it is not reduced there"
                yield c.mean(gone), f"yours averaged over {where}: it is not reduced there"
    if c.shape != shape:
        if c.size == math.prod(shape):
            yield c.reshape(shape), f"yours in the shape {shape}"
        return
    for n in range(1, min(c.ndim, 4) + 1):
        for some in itertools.combinations(axes, n):
            where = f"axis {some[0]}" if n == 1 else f"axes {some}"
            yield np.flip(c, some), f"yours flipped along {where}"
    for axis in axes:
        for by in (1, -1):
            if c.shape[axis] > 2:
                yield np.roll(c, by, axis), f"yours shifted by {by} along axis {axis}"


def _multiple(
    s: Suspect, w: np.ndarray, words: str, factors: Sequence[tuple[float, str]]
) -> Iterator[tuple[bool, str]]:
    """A term that is a multiple of the parameter: weight decay."""
    assert s.truth is not None
    if w.shape != s.truth.shape or not np.any(w) or not s.telling(1):
        return
    if abs(np.vdot(w / norm(w), s.truth)) > 0.999 * norm(s.truth):
        return  # then it is no other than a factor
    for factor, name in ((1.0, ""), *factors):
        rest = s.truth - factor * s.candidate
        by = float(np.vdot(w, rest) / np.vdot(w, w))
        if by and s.explained(factor * s.candidate + by * w):
            scaled = f"yours times {name}" if name else "yours"
            term = f"{abs(by):.6g} times {words}"
            sign = "plus" if by > 0 else "minus"
            why = "a regularisation term is missing" if by > 0 else "a term too many"
            chosen = abs(by - float(f"{by:.2g}")) <= 1e-4 * abs(by)  # a strength, not a coincidence
            yield chosen, f"{scaled} {sign} {term}: {why}"
            return


def _few_entries(s: Suspect, factors: Sequence[tuple[float, str]]) -> Iterator[tuple[bool, str]]:
    """All is right but a few entries, or one slice."""
    c, t = s.candidate, s.truth
    assert t is not None
    gap = np.abs(c - t)
    order = np.argsort(gap, axis=None)[::-1]
    rest = np.sqrt(np.cumsum(np.square(gap.ravel()[order])[::-1])[::-1])
    n = int(np.sum(rest > s.limit))  # so many entries must be wrong at least
    if n == 0 or n > c.size // 2:
        return
    at = np.unravel_index(order[:n], c.shape)
    for axis, index in enumerate(at):
        if c.ndim > 1 and n > 1 and len(set(index.tolist())) == 1 and c.shape[axis] > 1:
            where = (slice(None),) * axis + (int(index[0]),)
            label = f"index {int(index[0])} of axis {axis}"
            if c.ndim == 2:
                label = f"{('row', 'column')[axis]} {int(index[0])}"
            if not np.any(c[where]):
                yield True, f"yours but for {label}, which is all zeros"
            for value, words in factors:
                fixed = c.copy()
                fixed[where] *= value
                if s.explained(fixed):
                    yield True, f"yours but for {label}, which is to be taken times {words}"
            yield True, f"yours but for {label}; all others are right"
            return
    if n <= max(3, c.size // 100):
        listed = "; ".join(
            f"{[int(i) for i in one]} {c[tuple(one)]:.6g} for {t[tuple(one)]:.6g}"
            for one in list(zip(*at, strict=True))[:3]
        )
        entries = "entry" if n == 1 else "entries"
        more = ", ..." if n > 3 else ""
        yield True, f"yours but for {n} {entries} of {c.size}: {listed}{more}"


# --- Mistakes in one derivative of the program --------------------------------------------------


def _in_one_derivative(
    suspects: Sequence[Suspect], vague: Sequence[int], program: Any, point: Any, neighbours: Any
) -> str:
    """The words of the edit whose gradient is the candidate, in all arrays; "" if there is none."""
    for i in vague:
        truth = suspects[i].truth
        if truth is None or suspects[i].candidate.shape != truth.shape:
            return ""
    found: list[tuple[float, str]] = []
    try:
        with exactly():
            active, passive = cast(point, "float64")
            edits = Edits(program, active, passive, neighbours)
            for edit, arrays in edits.gradients():
                gaps = [
                    _gap(s, float64(g), i in vague)
                    for i, (s, g) in enumerate(zip(suspects, arrays, strict=True))
                ]
                if not edit.words and max(gaps) <= 1:
                    return ""  # what it computes explains it without a mistake: it is fooled
                if max(gaps) <= 1:
                    found.append((max(gaps), edit.words))
    except jax.errors.ConcretizationTypeError:  # cannot be traced
        return ""
    near = [words for gap, words in found if gap <= 1.001 * min(found)[0]]
    return min(near, key=lambda words: not words.startswith("the part"), default="")


def _gap(s: Suspect, mutated: np.ndarray, wrong: bool) -> float:
    """How far the candidate is from an edited gradient, in units of what is allowed."""
    if s.leaf.verdict == "wrong" and not wrong:
        return 0.0  # explained by itself
    if mutated.shape != s.candidate.shape or not np.all(np.isfinite(mutated)):
        return math.inf
    distance = norm(s.candidate - mutated)
    if wrong:
        assert s.truth is not None
        larger = float(norm(mutated) / (norm(s.truth) or 1))
        return distance / (s.limit * max(larger, 1)) if s.limit else math.inf
    f = s.leaf.figures
    within = f.tolerance * norm(mutated) if f else 0.0
    return distance / within if within else (0.0 if distance == 0 else math.inf)
