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
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.check.numerical import size
from jbackprop.check.precision import (
    Chain,
    allowed,
    as_given,
    as_jax,
    cast,
    coarsest,
    exactly,
    float64,
    is_float,
    norm,
    rounding,
    roundoff,
    ulps,
)
from jbackprop.check.report import Figures, Report

TruthKind = Literal["autodiff", "numerical", "both"]

HOPELESS = 0.1
"""Where rounding may leave more than this, a candidate within it is not called right."""


class How(NamedTuple):
    """How a check is to be made; `functions.gradient` says what each means."""

    truth: TruthKind = "both"
    tolerance: float | None = None
    directions: int = 2
    seed: int = 0
    exact: bool | None = None


CANCELS = 1000 * float(jnp.finfo("float64").eps)
"""A truth is zero by nature if this, of what cancels in it, is more: it is itself but rounding."""


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
        near: the norm of its changes at points that are the same up to rounding in the dtype given.
        chain: the roundings and summed terms that lead to it.
        settled: whether `low` and `high` are known by numbers, where a candidate is beyond them.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    noise: float
    low_dtype: Any
    near: float
    chain: Chain
    settled: bool = False

    @functools.cached_property
    def norm(self) -> float:
        """|truth|."""
        return norm(self.value)

    @property
    def vanishes(self) -> bool:
        """Whether it is zero by nature."""
        return bool(self.noise) and self.norm <= CANCELS * self.cancels

    @property
    def size(self) -> float:
        """What errors are relative to: its norm, or the size of what cancels."""
        return self.cancels if self.vanishes else self.norm

    @property
    def cancels(self) -> float:
        """The size of what cancels in it, by the rounding errors that it leaves."""
        return self.noise / roundoff(self.low_dtype)

    def tolerance(self, dtype: Any) -> float:
        """The relative error allowed for a candidate that was computed in dtype, or coarser."""
        base = allowed(self.chain, dtype)
        if self.vanishes:
            return base if dtype != jnp.float64 else base * 1e-3
        loss = max(self.cancels * roundoff(coarsest([dtype, self.chain.dtype])), self.near)
        return base + (2 * loss / self.norm if self.norm else 0.0)


def truths(
    run: Callable[[Any], Sequence[Any]], point: Any, dtypes: Sequence[Any], seed: int
) -> list[Truth]:
    """Automatic differentiation in float64 at a point, and what is to be known about it.

    Args:
        run: point -> arrays, compiled, for float64 and for the lower dtype.
        point: a tree of arrays; all of its floating-point leaves may be moved a little.
        dtypes: those of the point's floating-point leaves.
        seed: of the little moves.
    """
    rng = np.random.default_rng(seed)
    given = coarsest(list(dtypes))
    low = given if given != jnp.float64 else jnp.dtype("float32")

    def moved(by: float, signs: Any) -> Any:
        return jax.tree.map(
            lambda v, s: v + by * size(float64(v)) * s if is_float(v) else v, wide, signs
        )

    wide = cast(point, "float64")
    with as_given(given):
        chains = chains_of(run, point)
    with exactly():
        value = [float64(v) for v in run(wide)]
        kinks = [np.zeros(v.shape, bool) for v in value]
        lows, highs = ([v.copy() for v in value] for _ in range(2))
        for _ in range(2):
            signs = jax.tree.map(lambda v: rng.choice([-1.0, 1.0], np.shape(v)), wide)
            by = 16 * roundoff(given)
            beside = [
                [float64(v) for v in run(moved(side * by, signs))]
                for side in (-1, 1, -1 / 8, 1 / 8, -1 / 64, 1 / 64)
            ]
            for i, v in enumerate(value):
                sides = [arrays[i] for arrays in beside]
                lows[i] = np.fmin(lows[i], np.fmin(sides[0], sides[1]))
                highs[i] = np.fmax(highs[i], np.fmax(sides[0], sides[1]))
                kinks[i] |= _jumps(v, sides, 1e3 * roundoff(given))
    noise, nears = [0.0] * len(value), [0.0] * len(value)
    jumps = [np.where(k, hi - lo, 0) for k, hi, lo in zip(kinks, highs, lows, strict=True)]

    def jittered(at: Any, u: float) -> Any:
        return jax.tree.map(
            lambda v: (
                (float64(v) * (1 + u * rng.standard_normal(np.shape(v)))).astype(v.dtype)
                if is_float(v)
                else v
            ),
            at,
        )

    def lost(found: Sequence[Any], right: Sequence[Any]) -> list[float]:
        with np.errstate(all="ignore"):  # a flip at a kink is no rounding error
            gaps = [
                norm(np.maximum(np.abs(float64(f) - float64(r)) - jump, 0))
                for f, r, jump in zip(found, right, jumps, strict=True)
            ]
        return [gap if math.isfinite(gap) else 0.0 for gap in gaps]

    for draw in range(3):
        at = point if low == given else cast(wide, low)
        if draw:
            at = jittered(at, 2 * roundoff(low))
        with as_given(low):
            found = run(at)
        with exactly():
            right = run(cast(at, "float64")) if draw or low != given else value
            noise = list(map(max, noise, lost(found, right)))
            if draw and low != given:
                nears = list(map(max, nears, lost(run(jittered(wide, 2 * roundoff(given))), value)))
    truths = []
    for i, v in enumerate(value):
        truth = Truth(v, v, v, noise[i], low, nears[i], chains[i])
        if not truth.vanishes:  # the rounding errors of what is zero by nature jump, too
            at_least, at_most = (np.where(kinks[i], side[i], v) for side in (lows, highs))
            truth = dataclasses.replace(truth, low=at_least, high=at_most)
        truths.append(truth)
    return truths


def _jumps(v: np.ndarray, sides: Sequence[np.ndarray], least: float) -> np.ndarray:
    """Where an array jumps within rounding: at a kink, not where it is merely steep or erratic.

    At a kink it has, at an eighth and at a 64th of the distance, the one value or the other.
    """
    minus, plus, *closer = sides
    with np.errstate(all="ignore"):
        width = np.maximum(np.abs(plus - minus), np.maximum(np.abs(v - minus), np.abs(v - plus)))
        jumps = width > least * np.maximum(np.abs(v), size(v, 0.0))
        for c in closer:
            jumps &= np.minimum(np.abs(c - minus), np.abs(c - plus)) <= 0.05 * width
        return jumps


def chains_of(autodiff: Callable[..., Any], point: Any) -> list[Chain]:
    """`rounding`, or a guess where a function cannot be traced."""
    try:
        return rounding(autodiff, point)
    except jax.errors.ConcretizationTypeError:  # cannot be traced: as many as one would think
        leaves = [v for v in jax.tree.leaves(point) if is_float(v)]
        guess = Chain(30, max(map(np.size, leaves)), coarsest([v.dtype for v in leaves]))
        return [guess] * len(jax.tree.leaves(autodiff(as_jax(point))))


def compare(
    path: str, kind: str, candidate: Any, truth: Truth, dtype: Any, tolerance: float | None = None
) -> Report:
    """The verdict on one array."""
    c, t = float64(candidate), truth.value
    dtype = coarsest([dtype, truth.chain.dtype])
    scale, cancels = truth.size, truth.vanishes
    limit = truth.tolerance(dtype) if tolerance is None else tolerance
    if c.shape != t.shape:
        why = f"has the shape {c.shape}, but must have {t.shape}"
        return Report(path, kind, own="wrong", why=why, figures=Figures(math.inf, limit))
    if not c.size:
        return Report(path, kind, why="empty")
    if not np.all(np.isfinite(t)):
        at = index_of(~np.isfinite(t))
        why = f"the truth is not finite, {t[at]} at {list(at)}"
        return Report(path, kind, own="inconclusive", why=why)
    distance = np.maximum(np.maximum(truth.low - c, c - truth.high), 0)
    kinks = int(np.sum(truth.high > truth.low))
    figures = measure(c, t, distance, scale, limit, dtype, kinks, cancels)
    if not np.all(np.isfinite(c)):
        at = index_of(~np.isfinite(c))
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
    if scale == 0:
        notes.append("the truth is zero everywhere")
    if not figures.error <= limit:
        width = truth.high - truth.low
        beyond = norm(np.maximum(distance - width, 0))
        if kinks and beyond <= limit * scale and not truth.settled:
            notes.append("the difference is confined to these entries")
            return Report(
                path, kind, own="inconclusive", why="; ".join(notes), figures=figures
            )  # fmt: skip
        if kinks and not truth.settled:
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
    norms, error = (norm(c), norm(t)), norm(distance)
    relative = error / scale if scale else (0.0 if error == 0 else math.inf)
    with np.errstate(all="ignore"):
        cosine = float(np.vdot(c / norms[0], t / norms[1])) if all(norms) else math.nan
    ratio = norms[0] / norms[1] if norms[1] else (math.inf if norms[0] else math.nan)
    if not c.size:
        return Figures(relative, limit, cosine, ratio, kinks=kinks, cancels=cancels)
    at = index_of(distance == np.max(distance))
    return Figures(
        relative, limit, cosine, ratio, at, float(c[at]), float(t[at]),
        ulps(float(c[at]), float(t[at]), dtype), kinks, cancels,
    )  # fmt: skip


def index_of(mask: np.ndarray) -> tuple[int, ...]:
    """Where a mask is first true."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def same(path: str, kind: str, found: Any, due: Any, meaning: str, ulp: float = 8.0) -> Report:
    """Whether two arrays that must be equal are, up to a few roundings of the first's dtype."""
    dtype = jnp.result_type(found)
    f, d = float64(found), float64(due)
    if f.shape != d.shape:
        return Report(
            path, kind, own="wrong", why=f"has the shape {f.shape}, not {d.shape}: {meaning}"
        )
    scale, limit = norm(d), 2 * ulp * roundoff(dtype)
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
