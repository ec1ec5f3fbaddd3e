"""The judge: arrays that may be gradients, against truths that are known to some precision.

An array's error is |candidate - truth| / |truth|. What it may be is never a constant, and never
grows with the values: it follows from the dtype, from how many roundings and summed terms lead to
the array (`precision.rounding`), and from what automatic differentiation itself loses there, in the
same dtype, at the same point and at points that are the same up to rounding. That loss also tells
the size of what cancels: a gradient that is zero by nature is rounding errors of terms which are
not, and is judged against their size.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.check.numerical import Slope, size
from jbackprop.check.precision import (
    FLOOR64,
    allowed,
    as_given,
    cast,
    coarsest,
    compiled,
    exactly,
    float64,
    is_float,
    rounding,
    roundoff,
    ulps,
)
from jbackprop.check.report import Figures, Report

TruthKind = Literal["autodiff", "numerical", "both"]
Probe = Callable[[int, np.ndarray], Slope]
"""(i, d) -> the slope that is the inner product of the i-th true array with d."""

EXACT = 256
"""Arrays of so many entries at most are differentiated numerically entry by entry."""
HOPELESS = 0.1
"""Where rounding may leave more than this, a candidate within it is not called right."""
CANCELS = 1000.0
"""A truth is zero by nature if what cancels in it is so many times larger."""
UNCONFIRMED = 0.01
"""A numerical slope with a larger relative error confirms nothing."""


class TruthWarning(UserWarning):
    """Automatic and numerical differentiation of the same function disagree."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """One array, by automatic differentiation in float64.

    Attributes:
        value: the array.
        low: its lowest values at points that are the same up to rounding: `value`, but at kinks.
        high: its highest.
        noise: the norm of what autodiff in the lower dtype loses.
        low_dtype: that dtype.
        chain: the roundings and summed terms that lead to it.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    noise: float
    low_dtype: Any
    chain: tuple[int, int]

    @property
    def cancels(self) -> float:
        """The size of what cancels in it, by the rounding errors that it leaves."""
        return self.noise / roundoff(self.low_dtype)

    def tolerance(self, dtype: Any) -> tuple[float, float]:
        """(size, relative error allowed) for a candidate that was computed in dtype."""
        norm = float(np.linalg.norm(self.value))
        base = allowed(self.chain, dtype)
        if self.cancels > CANCELS * norm:
            return self.cancels, base if dtype != jnp.float64 else base * 1e-3
        loss = 2 * self.cancels * roundoff(dtype) / norm if norm else 0.0
        return norm, base + loss


def truths(
    autodiff: Callable[[Any], Sequence[Any]], point: Any, dtypes: Sequence[Any], seed: int
) -> list[Truth]:
    """Automatic differentiation in float64 at a point, and what is to be known about it.

    Args:
        autodiff: point -> arrays; traced for float64 and for the lower dtype.
        point: a tree of arrays; all of its floating-point leaves may be moved a little.
        dtypes: those of the point's floating-point leaves.
        seed: of the little moves.
    """
    rng = np.random.default_rng(seed)
    given = coarsest(list(dtypes))
    low = given if given != jnp.float64 else jnp.dtype("float32")
    run = compiled(lambda at: [jnp.asarray(v) for v in autodiff(at)])

    def moved(by: float, signs: Any) -> Any:
        return jax.tree.map(
            lambda v, s: v + by * size(float64(v)) * s if is_float(v) else v, wide, signs
        )

    wide = cast(point, "float64")
    with exactly():
        value = [float64(v) for v in run(wide)]
        chains = _chains_of(autodiff, wide, len(value))
        lows, highs = ([v.copy() for v in value] for _ in range(2))
        for _ in range(2):
            signs = jax.tree.map(lambda v: rng.choice([-1.0, 1.0], np.shape(v)), wide)
            for side in (-1, 1):
                for i, v in enumerate(run(moved(side * 16 * roundoff(given), signs))):
                    lows[i] = np.fmin(lows[i], float64(v))
                    highs[i] = np.fmax(highs[i], float64(v))
    low_run = compiled(lambda at: [jnp.asarray(v) for v in autodiff(at)])
    noise = [0.0] * len(value)
    for draw in range(3):
        at = point if low == given else cast(wide, low)
        if draw:
            u = 2 * roundoff(low)
            at = jax.tree.map(
                lambda v: (float64(v) * (1 + u * rng.standard_normal(np.shape(v)))).astype(v.dtype)
                if is_float(v) else v,
                at,
            )  # fmt: skip
        with as_given(low):
            found = [float64(v) for v in low_run(at)]
        with exactly():
            right = [float64(v) for v in run(cast(at, "float64"))] if draw or low != given else value
        for i, (f, r) in enumerate(zip(found, right, strict=True)):
            jump = highs[i] - lows[i]  # what flips at a kink is no rounding error
            loss = np.linalg.norm(np.maximum(np.abs(f - r) - jump, 0)) if f.shape == r.shape else 0
            noise[i] = max(noise[i], float(loss) if math.isfinite(loss) else 0.0)
    results = []
    for v, lo, hi, loss, chain in zip(value, lows, highs, noise, chains, strict=True):
        smooth = hi - lo <= 1e4 * roundoff(given) * np.maximum(np.abs(v), size(v, 0.0))
        smooth |= ~np.isfinite(hi - lo)
        results.append(
            Truth(v, np.where(smooth, v, lo), np.where(smooth, v, hi), loss, low, chain)
        )
    return results


def _chains_of(autodiff: Callable[..., Any], point: Any, n: int) -> list[tuple[int, int]]:
    try:
        return rounding(autodiff, point)
    except jax.errors.ConcretizationTypeError:  # cannot be traced: as many as one would think
        most = max(np.size(v) for v in jax.tree.leaves(point))
        return [(30, most)] * n


def compare(
    path: str, kind: str, candidate: Any, truth: Truth, dtype: Any, tolerance: float | None = None
) -> Report:
    """The verdict on one array."""
    c, t = float64(candidate), truth.value
    scale, limit = truth.tolerance(dtype)
    cancels = truth.cancels > CANCELS * float(np.linalg.norm(t))
    limit = limit if tolerance is None else tolerance
    if c.shape != t.shape:
        why = f"has the shape {c.shape}, but must have {t.shape}"
        return Report(path, kind, own="wrong", why=why, figures=Figures(math.inf, limit))
    if not np.all(np.isfinite(t)):
        at = _index(~np.isfinite(t))
        why = f"the truth is not finite, {t[at]} at {list(at)}"
        return Report(path, kind, own="inconclusive", why=why)
    distance = np.maximum(np.maximum(truth.low - c, c - truth.high), 0)
    kinks = int(np.sum(truth.high > truth.low))
    figures = measure(c, t, distance, scale, limit, dtype, kinks, cancels)
    if not np.all(np.isfinite(c)):
        at = _index(~np.isfinite(c))
        figures = dataclasses.replace(
            figures, index=at, candidate=float(c[at]), truth=float(t[at]), ulps=math.nan
        )
        return Report(
            path, kind, own="wrong", why=f"{c[at]} at {list(at)}, where the truth is finite",
            figures=figures,
        )  # fmt: skip
    if scale == 0 and not np.any(c):
        why = (
            "nothing but zeros to compare: the gradient vanishes here, whatever the rule. Is it "
            "used at all, and are its units alive?"
        )
        return Report(path, kind, own="inconclusive", why=why, figures=figures)
    notes = []
    if kinks:
        entries = f"{kinks} of {t.size} entries lie" if kinks > 1 else f"1 of {t.size} entries lies"
        notes.append(f"{entries} within rounding of a kink: there any slope between is right")
    if cancels and np.any(t):
        notes.append("zero by nature: judged against the size of what cancels")
    if not figures.error <= limit:
        width = truth.high - truth.low
        beyond = np.linalg.norm(np.maximum(distance - width, 0))
        if kinks and beyond <= limit * scale:
            notes.append("the difference is confined to these entries")
            return Report(
                path, kind, own="inconclusive", why="; ".join(notes), figures=figures
            )  # fmt: skip
        if kinks:
            notes.append("these do not explain the error")
        return Report(path, kind, own="wrong", why="; ".join(notes), figures=figures)
    if limit > HOPELESS and tolerance is None:
        why = (
            f"in {jnp.dtype(dtype)} jax.grad itself may lose {limit:.0%} here, too much to judge "
            "by: check in float64"
        )
        return Report(path, kind, own="inconclusive", why=why, figures=figures)
    return Report(path, kind, why="; ".join(notes), figures=figures)


def measure(
    c: np.ndarray, t: np.ndarray, distance: np.ndarray, scale: float, limit: float, dtype: Any,
    kinks: int = 0, cancels: bool = False,
) -> Figures:  # fmt: skip
    """The figures of one array."""
    norms = float(np.linalg.norm(c)), float(np.linalg.norm(t))
    error = float(np.linalg.norm(distance))
    relative = error / scale if scale else (0.0 if error == 0 else math.inf)
    with np.errstate(all="ignore"):
        cosine = float(np.vdot(c / norms[0], t / norms[1])) if all(norms) else math.nan
    ratio = norms[0] / norms[1] if norms[1] else (math.inf if norms[0] else math.nan)
    if not c.size:
        return Figures(relative, limit, cosine, ratio, kinks=kinks, cancels=cancels)
    at = _index(distance == np.max(distance))
    return Figures(
        relative, limit, cosine, ratio, at, float(c[at]), float(t[at]),
        ulps(float(c[at]), float(t[at]), dtype), kinks, cancels,
    )  # fmt: skip


def _index(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


# --- By numbers alone --------------------------------------------------------------------------


def confirm(
    truth: Truth, probe: Callable[[np.ndarray], Slope], directions: int, rng: Any, dtype: Any
) -> tuple[Literal["agree", "disagree", "unknown"], str]:
    """Whether numerical slopes along random directions are those of the autodiff truth."""
    _, tolerance = truth.tolerance(dtype)
    norm = float(np.linalg.norm(truth.value))
    size = max(norm, truth.cancels if truth.cancels > CANCELS * norm else 0.0)
    worst = 0.0
    for _ in range(directions):
        d = rng.standard_normal(truth.value.shape)
        slope, mine = probe(d), float(np.vdot(truth.value, d))
        width = slope.high - slope.low
        if not slope.error <= UNCONFIRMED * max(size, abs(slope.value), np.finfo(float).tiny):
            if size == 0 and slope.value == 0:
                continue
            return "unknown", f"numerical differentiation has an error of {slope.error:.1e} here"
        gap = slope.distance(mine) - slope.error - width
        worst = max(worst, slope.error / size if size else 0.0)
        if gap > 5 * max(tolerance, 1e-9) * size + (0 if size else 1e-300):
            told = f"along a random direction jax.grad gives {mine:.6g}, and numbers {slope.value:.6g} "
            return "disagree", told + f"+- {slope.error:.0e} ({slope.method})"
    return "agree", f"{worst:.0e}"


def by_numbers(
    path: str, kind: str, candidate: Any, probe: Callable[[np.ndarray], Slope], dtype: Any,
    limit: float, directions: int, rng: Any, exact: bool,
) -> tuple[Report, np.ndarray | None]:  # fmt: skip
    """The verdict on one array where only slopes are known; with the truth, if it is small."""
    c = float64(candidate)
    if not np.all(np.isfinite(c)):
        at = _index(~np.isfinite(c))
        return Report(path, kind, own="wrong", why=f"{c[at]} at {list(at)}"), None
    if exact:
        slopes = [probe(one) for one in _units(c.shape)]
        value, low, high, error = (
            np.array([getattr(s, name) for s in slopes]).reshape(c.shape)
            for name in ("value", "low", "high", "error")
        )
        distance = np.maximum(np.maximum(low - c, c - high), 0)
        scale, blur = float(np.linalg.norm(value)), float(np.linalg.norm(error))
        kinks = int(np.sum(high > low))
        figures = measure(c, value, distance, scale, limit, dtype, kinks)
        gap, loss = figures.error, blur / scale if scale else 0.0
        known: np.ndarray | None = value
        if scale == 0 or not math.isfinite(scale):
            gap, loss = float(np.linalg.norm(c)), blur
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
        ratio = float(np.linalg.norm(c)) / scale if scale else math.nan
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


def same(path: str, kind: str, found: Any, due: Any, meaning: str, ulp: float = 8.0) -> Report:
    """Whether two arrays that must be equal are, up to a few roundings of the first's dtype."""
    dtype = jnp.result_type(found)
    f, d = float64(found), float64(due)
    if f.shape != d.shape:
        return Report(path, kind, own="wrong", why=f"has the shape {f.shape}, not {d.shape}: {meaning}")
    scale, limit = float(np.linalg.norm(d)), 2 * ulp * roundoff(dtype)
    nan = np.isnan(f) & np.isnan(d) | (f == d)
    gap = np.where(nan, 0, np.abs(np.where(nan, 0, f) - np.where(nan, 0, d)))
    figures = measure(f, d, gap, scale, limit, dtype)
    wrong = not figures.error <= limit
    return Report(
        path, kind, own="wrong" if wrong else "right", why=f"must be {meaning}" * wrong,
        figures=figures,
    )  # fmt: skip


def because(leaf: Report, why: str) -> Report:
    """The leaf with one more reason."""
    return dataclasses.replace(leaf, why="; ".join(filter(None, (why, leaf.why))))


def warn_of(path: str, told: str) -> str:
    """Warn that autodiff and numbers disagree; returns the words."""
    words = (
        f"{path}: automatic and numerical differentiation disagree: {told}. Numbers know no "
        "stop_gradient and no custom rule, so they are taken for the truth; if one of these is "
        "meant, use truth='autodiff'"
    )
    warnings.warn(words, TruthWarning, stacklevel=4)
    return words


__all__ = [
    "EXACT", "FLOOR64", "Probe", "Truth", "TruthKind", "TruthWarning", "by_numbers", "compare",
    "confirm", "truths", "warn_of",
]  # fmt: skip
