"""What a network makes of the targets: right or wrong, or by how much it is off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jbackprop.losses import (
    CrossEntropy,
    Huber,
    Loss,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)

CLASSES = (SoftmaxCrossEntropy, CrossEntropy)
"""The losses whose outputs are one class each."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """A metric of every example.

    Attributes:
        name: "accuracy", "absolute_error", or "" where the loss is of another kind.
        values: (n,): the share of an example's positions (or labels) that are right, one without
            positions; or the mean of |output - target|. NaN where an example has no target.
        labels: (n,) of the target classes, where an example has one; else None.
    """

    name: str
    values: np.ndarray
    labels: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Over the examples that have a target."""
        own = self.values[~np.isnan(self.values)]
        return float(own.mean()) if own.size else float("nan")

    @property
    def wrong(self) -> np.ndarray | None:
        """(n,): whether an example of one class is not right; None where it is not of one class."""
        return None if self.labels is None else self.values < 1

    @classmethod
    def joined(cls, parts: Sequence[Outcome]) -> Outcome:
        """Of several chunks."""
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            parts[0].name,
            np.concatenate([part.values for part in parts]),
            np.concatenate(labels) if labels else None,
        )


def outcome(loss: Loss, outputs: Any, y: Any) -> Outcome:
    """The metric that goes with a loss, of outputs (m, ..., q) and targets."""
    m = len(outputs)
    if isinstance(loss, CLASSES):
        labels = classes_of(outputs, y)
        ignored = getattr(loss, "ignore_index", None)
        there = np.ones(labels.shape, bool) if ignored is None else labels != ignored
        right = (np.argmax(outputs, axis=-1) == labels) & there & finite(outputs)
        number = there.reshape(m, -1).sum(1)
        share = right.reshape(m, -1).sum(1) / np.where(number, number, 1)
        share = np.where(number > 0, share, np.nan)
        return Outcome("accuracy", share, labels if labels.ndim == 1 else None)
    if isinstance(loss, SigmoidCrossEntropy):
        right = ((outputs > 0) == (np.asarray(y) > 0.5)) & np.isfinite(outputs)
        single = (np.asarray(y)[:, 0] > 0.5).astype(int) if outputs.shape[1:] == (1,) else None
        return Outcome("accuracy", right.reshape(m, -1).mean(1), single)
    if isinstance(loss, SquaredError | Huber):
        error = np.abs(outputs.astype(np.float64) - np.asarray(y, np.float64))
        return Outcome("absolute_error", error.reshape(m, -1).mean(1))
    return Outcome("", np.full(m, np.nan))


def classes_of(outputs: Any, y: Any) -> np.ndarray:
    """Labels, of labels or of distributions over the classes."""
    y = np.asarray(y)
    return np.argmax(y, axis=-1) if y.shape == outputs.shape else y


def finite(outputs: Any) -> np.ndarray:
    """Which positions have finite outputs: NaN is the largest for argmax, and right for nobody."""
    return np.isfinite(outputs).all(axis=-1)
