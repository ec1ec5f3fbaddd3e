"""How the entries of many arrays are spread: counted as they come, chunk by chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

BINS = 40
PER_DECADE = 4
_LOWEST, _HIGHEST = -324, 309  # of float64, subnormal numbers and all


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """How the entries of an array are spread.

    Mean, standard deviation, extremes and histogram are of the finite entries.

    Attributes:
        count: the number of entries, over all examples.
        nonfinite: how many of them are NaN or infinite.
        zeros: the share of the finite ones that are exactly 0.
        mean, std: their mean, and their standard deviation (divided by their number).
        least, most: the smallest and the largest; NaN if there is none.
        edges, counts: a histogram of those that are not 0, as `numpy.histogram` has it: of the
            entries themselves, 40 bins from least to most; for deltas of log10 of their absolute
            values, four bins a decade.
    """

    count: int
    nonfinite: int
    zeros: float
    mean: float
    std: float
    least: float
    most: float
    edges: np.ndarray
    counts: np.ndarray


def entries(tree: Any) -> np.ndarray:
    """All numbers in the arrays of a tree, in float64, in one axis."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return leaves[0] if len(leaves) == 1 else np.concatenate([np.zeros(0), *leaves])


def norm(tree: Any) -> np.ndarray:
    """|v_n| of the arrays (B, ...) of a tree together: (B,), float64.

    Divided by the largest first, as squares of vanishing numbers would be 0.
    """
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)
    largest = np.max(np.abs(flat), axis=1, keepdims=True, initial=0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return scale[:, 0] * np.linalg.norm(flat / scale, axis=1)


class Tally:
    """Counts what `Spread` says, in one pass, but for the histogram of the entries themselves.

    That needs their extremes: ask for `edges` when all were added, and then `recount`.
    """

    def __init__(self) -> None:
        self.count = self.finite = self.zeros = 0
        self.mean = self._m2 = 0.0
        self.least, self.most = np.inf, -np.inf
        self.decades = np.zeros((_HIGHEST - _LOWEST) * PER_DECADE, np.int64)
        self.linear = np.zeros(BINS, np.int64)

    def add(self, tree: Any, decades: bool = False) -> None:
        """Count the entries of arrays; with `decades` also by their size."""
        v = entries(tree)
        self.count += v.size
        v = v[np.isfinite(v)]
        if not v.size:
            return
        mean = float(v.mean())
        # Two sets of numbers joined: Chan, Golub and LeVeque (1979).
        both, shift = self.finite + v.size, mean - self.mean
        self._m2 += float(np.square(v - mean).sum()) + shift**2 * self.finite * v.size / both
        self.mean += shift * v.size / both
        self.finite = both
        self.least, self.most = min(self.least, float(v.min())), max(self.most, float(v.max()))
        other = v[v != 0]
        self.zeros += v.size - other.size
        if decades:
            at = np.floor(np.log10(np.abs(other)) * PER_DECADE).astype(np.int64)
            self.decades += np.bincount(at - _LOWEST * PER_DECADE, minlength=len(self.decades))

    @property
    def edges(self) -> np.ndarray:
        """Of the histogram of the entries themselves."""
        return np.histogram_bin_edges([], BINS, self._range)

    @property
    def _range(self) -> tuple[float, float]:
        return (self.least, self.most) if self.finite else (0.0, 1.0)

    def recount(self, tree: Any) -> None:
        """Once more, now that the extremes are known."""
        v = entries(tree)
        self.linear += np.histogram(v[np.isfinite(v) & (v != 0)], BINS, self._range)[0]

    def spread(self, decades: bool = False) -> Spread:
        """What was counted."""
        there = self.finite > 0
        return Spread(
            self.count,
            self.count - self.finite,
            self.zeros / self.finite if there else float("nan"),
            self.mean if there else float("nan"),
            float(np.sqrt(self._m2 / self.finite)) if there else float("nan"),
            self.least if there else float("nan"),
            self.most if there else float("nan"),
            *(self._by_decades() if decades else (self.edges, self.linear)),
        )

    def _by_decades(self) -> tuple[np.ndarray, np.ndarray]:
        used = np.flatnonzero(self.decades)
        first, last = (used[0], used[-1] + 1) if used.size else (0, 0)
        edges = np.arange(first, last + 1) / PER_DECADE + _LOWEST
        return edges, self.decades[first:last]
