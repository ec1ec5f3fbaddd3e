"""When to stop early, and the best parameters until then."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from jbackprop.checks import check_flags, check_numbers, check_sizes
from jbackprop.factored import PyTree


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stop when nothing has improved for a while, and go back to the best parameters.

    Attributes:
        patience: how many epochs without improvement to wait for.
        monitor: the entry of the history to watch.
        higher_is_better: whether it should grow, as an accuracy.
        min_delta: what counts as an improvement, at least.

    Raises:
        ValueError: a patience below 1; a min_delta that is negative.
        TypeError: a flag that is no bool.
    """

    patience: int = 10
    monitor: str = "validation_loss"
    higher_is_better: bool = False
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self, "patience")
        check_flags(self, "higher_is_better")
        check_numbers(self, "min_delta", least=0)

    def better(self, value: float, best: float | None) -> bool:
        """Whether value improves on the best so far; NaN never does."""
        if best is None:
            return not math.isnan(value)
        gain = value - best if self.higher_is_better else best - value
        return gain > self.min_delta


class Keeper:
    """Keeps the best parameters for early stopping."""

    def __init__(self, rule: EarlyStopping | None, params: PyTree):
        self.rule, self.params = rule, params
        self.epoch: int | None = None
        self.best: float | None = None

    def look(self, number: int, values: Mapping[str, float], params: PyTree) -> None:
        if self.rule is None:
            return
        value = values[self.rule.monitor]
        if self.rule.better(value, self.best):
            self.best, self.params, self.epoch = value, params, number

    def exhausted(self, number: int) -> bool:
        return self.rule is not None and number - (self.epoch or 0) >= self.rule.patience
