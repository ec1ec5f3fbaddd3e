"""Judging by numbers alone: slopes along random directions, or entry by entry."""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jbackprop.check.judge import Truth, TruthWarning, index_of, measure
from jbackprop.check.numerical import FINER, Slope
from jbackprop.check.precision import float64, norm, ulps
from jbackprop.check.report import Figures, Report

EXACT = 256
"""Arrays of so many entries at most are differentiated numerically entry by entry."""
UNCONFIRMED = 0.01
"""A numerical slope with a larger relative error confirms nothing."""


def confirm(
    truth: Truth, probe: Callable[..., Slope], directions: int, rng: Any, dtype: Any
) -> tuple[Literal["agree", "disagree", "unknown"], str]:
    """Whether numerical slopes along random directions are those of the autodiff truth."""
    tolerance, size = truth.tolerance(dtype), truth.size
    worst = 0.0
    for _ in range(directions):
        d = rng.standard_normal(truth.value.shape)
        slope, mine = probe(d), float(np.vdot(truth.value, d))
        width = slope.high - slope.low
        if not slope.error <= UNCONFIRMED * max(size, abs(slope.value), np.finfo(float).tiny):
            if size == 0 and slope.value == 0:
                continue
            return "unknown", f"numerical differentiation has an error of {slope.error:.1e} here"
        if (
            slope.distance(mine) - slope.error - width - slope.floor
            > 5 * max(tolerance, 1e-9) * size
        ):
            again = probe(d, FINER)  # kinks that are dense look smooth from afar
            slope = slope._replace(error=max(slope.error, abs(slope.value - again.value)))
            if not slope.error <= UNCONFIRMED * max(size, abs(slope.value)):
                return "unknown", "numerical differentiation depends on the step here"
        gap = slope.distance(mine) - slope.error - width - slope.floor
        worst = max(worst, slope.error / size if size else 0.0)
        if gap > 5 * max(tolerance, 1e-9) * size + (0 if size else 1e-300):
            told = f"along a random direction autodiff gives {mine:.6g}, and numbers "
            return "disagree", f"{told}{slope.value:.6g} +- {slope.error:.0e} ({slope.method})"
    return "agree", f"{worst:.0e}"


def confirm_together(
    truths: Sequence[Truth],
    probe: Callable[[list[np.ndarray]], Slope],
    directions: int,
    rng: Any,
    dtypes: Sequence[Any],
) -> set[int]:
    """Which truths numerical slopes along directions in all of them together confirm.

    Every array has an equal part in a direction. All that can be asked together, or none: then
    they have to be confirmed one by one.
    """
    asked = {
        i for i, t in enumerate(truths)
        if t.value.size and t.norm and not t.vanishes and np.all(np.isfinite(t.value))
    }  # fmt: skip
    if len(asked) < 2:
        return set()
    tolerance = min(truths[i].tolerance(dtypes[i]) for i in asked)
    for _ in range(directions):
        drawn = [
            rng.standard_normal(t.value.shape) / t.norm if i in asked else np.zeros(t.value.shape)
            for i, t in enumerate(truths)
        ]
        slope = probe(drawn)
        mine = sum(float(np.vdot(t.value, d)) for t, d in zip(truths, drawn, strict=True))
        gap = abs(slope.value - mine) - slope.error - slope.floor
        if slope.kinked or not slope.error <= UNCONFIRMED or gap > 5 * max(tolerance, 1e-9):
            return set()
    return asked


def by_numbers(
    path: str, kind: str, candidate: Any, probe: Callable[[np.ndarray], Slope], dtype: Any,
    limit: float, directions: int, rng: Any, exact: bool,
) -> tuple[Report, np.ndarray | None]:  # fmt: skip
    """The verdict on one array where only slopes are known; with the truth, if it is small."""
    c = float64(candidate)
    if not np.all(np.isfinite(c)):
        at, one = index_of(~np.isfinite(c)), np.zeros(c.shape)
        one[at] = 1.0
        slope = probe(one)
        if not slope.error <= UNCONFIRMED * max(abs(slope.low), abs(slope.high)):
            why = f"{c[at]} at {list(at)}, where numbers do not know the truth either"
            return Report(path, kind, own="inconclusive", why=why), None
        due = f"from {slope.low:.6g} to {slope.high:.6g}" if slope.kinked else f"{slope.value:.6g}"
        figures = Figures(math.inf, limit, index=at, candidate=float(c[at]), truth=slope.value)
        why = f"{c[at]} at {list(at)}, where the truth is {due}"
        return Report(path, kind, own="wrong", why=why, figures=figures), None
    if exact:
        slopes = [probe(one) for one in _units(c.shape)]
        value, low, high, error = (
            np.array([getattr(s, name) for s in slopes]).reshape(c.shape)
            for name in ("value", "low", "high", "error")
        )
        at_kink = high > low
        distance = np.maximum(np.maximum(low - c, c - high) - np.where(at_kink, error, 0), 0)
        blur = norm(np.where(at_kink, 0, error))
        scale, kinks = norm(value), int(np.sum(at_kink))
        figures = measure(c, value, distance, scale, limit, dtype, kinks)
        gap, loss = figures.error, blur / scale if scale else 0.0
        known: np.ndarray | None = value
        if scale == 0 or not math.isfinite(scale):
            gap, loss = norm(c), blur
            if gap <= loss or not math.isfinite(scale):
                why = "nothing but zeros to compare" if scale == 0 else "the truth is not finite"
                return Report(path, kind, own="inconclusive", why=why, figures=figures), None
        note = f"{kinks} of {c.size} entries at a kink: any slope between is right" if kinks else ""
        slack = loss
    else:
        drawn = [rng.standard_normal(c.shape) for _ in range(max(directions, 3))]
        slopes = [probe(d) for d in drawn]
        gaps = [s.distance(float(np.vdot(c, d))) for s, d in zip(slopes, drawn, strict=True)]
        scale = _rms([s.value for s in slopes])
        loss = _rms([s.error for s in slopes]) / scale if scale else math.inf
        gap, slack, known = _rms(gaps) / scale if scale else math.inf, loss, None
        along = _rms([float(np.vdot(c, d)) for d in drawn])
        ratio = along / scale if scale else math.nan
        figures, note = Figures(gap, limit, ratio=ratio), ""
        if scale == 0 and not np.any(c):
            why = "nothing but zeros to compare"
            return Report(path, kind, own="inconclusive", why=why, figures=figures), None
    if gap > limit + 3 * slack:
        found = [] if exact else _bisect(c, probe, rng, limit, scale)
        where = "; ".join(f"{list(i)}: {float(c[i]):.6g} for {t:.6g}" for i, t in found)
        told = "; ".join(filter(None, (note, where and f"entries that are wrong: {where}")))
        if found:
            at, value_at = found[0]
            figures = dataclasses.replace(
                figures, index=at, candidate=float(c[at]), truth=value_at,
                ulps=ulps(float(c[at]), value_at, dtype),
            )  # fmt: skip
        return Report(path, kind, own="wrong", why=told, figures=figures), known
    if loss > limit or not math.isfinite(loss):
        why = f"the numerical error is {loss:.0e}, above the tolerance {limit:.0e}"
        return Report(path, kind, own="inconclusive", why=why, figures=figures), known
    return Report(path, kind, why=note, figures=figures), known


def _rms(values: Sequence[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _units(shape: tuple[int, ...]) -> Any:
    for i in range(math.prod(shape)):
        one = np.zeros(math.prod(shape))
        one[i] = 1.0
        yield one.reshape(shape)


def _bisect(
    c: np.ndarray, probe: Callable[[np.ndarray], Slope], rng: Any, limit: float, scale: float,
    most: int = 3,
) -> list[tuple[tuple[int, ...], float]]:  # fmt: skip
    """Entries that are wrong, with their true values: halves of a direction that fail, halved."""
    found: list[tuple[tuple[int, ...], float]] = []

    def fails(span: range) -> bool:
        d = np.zeros(c.size)
        d[span.start : span.stop] = rng.standard_normal(len(span))
        slope = probe(d.reshape(c.shape))
        gap = slope.distance(float(np.vdot(c.ravel(), d)))
        return gap > limit * scale * math.sqrt(len(span) / c.size) + 3 * slope.error

    def search(span: range) -> None:
        if len(found) >= most:
            return
        if len(span) == 1:
            one = np.zeros(c.size)
            one[span.start] = 1.0
            at = tuple(int(i) for i in np.unravel_index(span.start, c.shape))
            found.append((at, probe(one.reshape(c.shape)).value))
            return
        half = len(span) // 2
        for part in (span[:half], span[half:]):
            if fails(part):
                search(part)

    search(range(c.size))
    return found


def warn_of(path: str, told: str) -> str:
    """Warn that autodiff and numbers disagree; returns the words."""
    words = (
        f"{path}: automatic and numerical differentiation disagree: {told}. Numbers know no "
        "stop_gradient and no custom rule, so they are taken for the truth; if one of these is "
        "meant, use truth='autodiff'"
    )
    frame, level = sys._getframe(1), 2  # whose call it was: the first frame that is not ours
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("jbackprop."):
        frame, level = frame.f_back, level + 1
    warnings.warn(words, TruthWarning, stacklevel=level)
    return words
