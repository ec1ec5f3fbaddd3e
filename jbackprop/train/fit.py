"""The training loop: gradient descent by the delta rule, with any Optax optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax
from jax import Array

from jbackprop.averages import State as Averages
from jbackprop.averages import check_folds
from jbackprop.credit import Rule, State
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.sweep import Node
from jbackprop.train.accounting import Privacy
from jbackprop.train.checks import check_batch_size, check_data
from jbackprop.train.evaluation import Metric, evaluate
from jbackprop.train.private import Private, PrivateRun
from jbackprop.train.progress import Progress
from jbackprop.train.ruled import RuledRun
from jbackprop.train.run import Run, Task


@dataclasses.dataclass(frozen=True)
class EarlyStopping:
    """Stop when nothing has improved for a while, and go back to the best parameters.

    Attributes:
        patience: how many epochs without improvement to wait for.
        monitor: the entry of the history to watch.
        higher_is_better: whether it should grow, as an accuracy.
        min_delta: what counts as an improvement, at least.
    """

    patience: int = 10
    monitor: str = "validation_loss"
    higher_is_better: bool = False
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if not hasattr(self.patience, "__index__") or self.patience < 1:
            raise ValueError(
                f"EarlyStopping: patience must be an int of at least 1, not {self.patience}"
            )
        if not self.min_delta >= 0:
            raise ValueError(f"EarlyStopping: min_delta must not be negative: {self.min_delta}")

    def better(self, value: float, best: float | None) -> bool:
        """Whether value improves on the best so far; NaN never does."""
        if best is None:
            return not math.isnan(value)
        gain = value - best if self.higher_is_better else best - value
        return gain > self.min_delta


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What a callback sees after each epoch.

    Attributes:
        number: of the epoch, from 1.
        params: the parameters by now.
        opt_state: the optimizer's state.
        history: all values so far, the last of each list those of this epoch.
        rule_state: the state of the rule that assigns credit, where one was given.
    """

    number: int
    params: PyTree
    opt_state: PyTree
    history: Mapping[str, list[float]]
    rule_state: State | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` has learnt.

    Attributes:
        params: the parameters: the last ones, or with early stopping the best.
        opt_state: the optimizer's last state.
        history: by name, one value for each epoch: "loss" and the metrics, means over the epoch's
            training examples as they were seen while learning; with validation data the same names
            with "validation_" in front, after the epoch.
        stopped: "finished", "early", "callback" or "interrupted" (Ctrl-C).
        best_epoch: with early stopping the epoch, from 1, that params are from; else None.
        averages: by path, the statistics of every batch norm under params: means over the training
            data, in mini-batches as in training. `fold_batch_norm(net, params, averages)` is the
            network to predict and evaluate with. {} where there is no batch norm.
        privacy: (epsilon, delta) and what they follow from, with `private`; else None.
        rule_state: the last state of the `rule`; else None.
    """

    params: PyTree
    opt_state: PyTree
    history: dict[str, list[float]]
    stopped: str
    best_epoch: int | None
    averages: Averages = dataclasses.field(default_factory=dict)
    privacy: Privacy | None = None
    rule_state: State | None = None


def fit(
    net: Node,
    loss: Loss,
    params: PyTree,
    data: tuple[Any, Any],
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int | None = None,
    key: Array,
    validation: tuple[Any, Any] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Iterable[Callable[[Epoch], Any]] = (),
    early_stopping: EarlyStopping | None = None,
    private: Private | None = None,
    rule: Rule | None = None,
    progress: bool | None = None,
) -> Fit:
    """Train a network by the delta rule.

    The same key on the same machine gives the same result, bit by bit.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: where to start from; left as they are.
        data: (x, y), NumPy or JAX arrays with the examples along the first axis. Floating-point x
            are cast to the parameters' dtype.
        optimizer: from Optax.
        epochs: how often to go through the data.
        batch_size: None for batch gradient descent, 1 for stochastic, else mini-batches. Each step
            follows the mean gradient of its batch; the ragged last batch of an epoch takes part,
            and counts in the history for as many examples as it has.
        key: shuffles the data, anew in each epoch (not in batch gradient descent), and serves
            layers that draw.
        validation: (x, y) to evaluate on after each epoch; with batch norms folded, see `Fit`.
        metrics: by name, functions (outputs, targets) -> (B,); see `jbackprop.metrics`.
        callbacks: each is called with an `Epoch` after every epoch; training stops when one returns
            something true.
        early_stopping: when to stop; the best parameters are then returned.
        private: to train with differential privacy, see `Private`: in about n / batch_size steps an
            epoch each example takes part by chance, and batch_size is what is expected of a
            mini-batch. What was given away is in the `privacy` of the result, which needs
            `pip install 'jbackprop[private]'`; history and callbacks are not private. Optimizers
            that search along a line are refused the cost, which is not either.
        rule: to assign credit in another way than by backpropagation, see `jbackprop.credit`: what
            it has for the gradient goes to the optimizer, and "loss" in the history is what it
            reduces, beside what else it tells of itself. Validation is of the outputs as the rule
            has them. Its state is in the result and in what callbacks see. Optimizers that search
            along a line, or ask for the curvature, are refused: the direction is none of theirs.
        progress: whether to show progress on stderr; None: a bar for a terminal or a notebook,
            lines for a log file.

    Returns:
        A `Fit`. Ctrl-C ends training and returns what was learnt up to the last full step.

    Raises:
        NonFiniteError: the loss or an update is not finite; says at which step and in which layer
            that began, and carries the parameters before it.
        ValueError, TypeError: data, parameters or options that do not fit; before the first step.
    """
    if rule is not None and not isinstance(rule, Rule):
        raise TypeError(f"rule must be a rule of jbackprop.credit, not {rule!r}")
    x, y = check_data("data", net, loss, params, data, rule)
    held_out = validation and check_data("validation", net, loss, params, validation, rule)
    n = len(jax.tree.leaves(y)[0])
    size = check_batch_size(batch_size, n)
    if not hasattr(epochs, "__index__") or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs must be an int of at least 1, not {epochs!r}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be one of Optax's, such as optax.adam(1e-3): {optimizer}")
    names = tuple((metrics or {}).items())
    if "loss" in dict(names):
        raise ValueError("a metric cannot be called 'loss': in the history the loss has that name")
    for name, _ in names:
        if name.startswith("validation_"):
            raise ValueError(
                f"a metric cannot be called {name!r}: in the history that is one of the validation "
                "data"
            )
    recorded = ["loss", *dict(names)]
    recorded += [f"validation_{name}" for name in recorded] if held_out else []
    if early_stopping and early_stopping.monitor not in recorded:
        raise ValueError(
            f"EarlyStopping watches {early_stopping.monitor!r}, but the history will have "
            f"{', '.join(recorded)}; give validation data, or another monitor"
        )
    if held_out:
        check_folds(net)
    task = Task(net, loss, optimizer, names, rule)
    if rule is not None and private is not None:
        raise ValueError(
            "private training clips the gradients of backpropagation: give private or rule"
        )
    if rule is not None:
        run: Run = RuledRun(task, params, x, y, size, key)
    elif private is None:
        run = Run(task, params, x, y, size, key)
    else:
        if early_stopping and not early_stopping.monitor.startswith("validation_"):
            raise ValueError(
                f"EarlyStopping watches {early_stopping.monitor!r}, which is of the private data: "
                "give validation data, and monitor its loss or metrics"
            )
        run = PrivateRun(task, params, x, y, size, key, private, epochs)
    keeper = _Keeper(early_stopping, params)
    hooks = tuple(callbacks)
    history: dict[str, list[float]] = {}
    bar = Progress(epochs, progress)
    stopped = "finished"
    try:
        for number in range(1, epochs + 1):
            values = run.epoch(number, history)
            if held_out:
                fixed, own = run.folded()
                found = evaluate(
                    fixed, loss, own, held_out, dict(names),
                    rule_state=run.states()[1],
                )  # fmt: skip
                values |= {f"validation_{name}": value for name, value in found.items()}
            keeper.look(number, values, run.params)
            for name, value in values.items():
                history.setdefault(name, []).append(value)
            bar.epoch(number, values)
            opt_state, rule_state = run.states()
            seen = Epoch(number, run.params, opt_state, history, rule_state)
            if any([bool(callback(seen)) for callback in hooks]):  # noqa: C419, call every one
                stopped = "callback"
                break
            if keeper.exhausted(number):
                stopped = "early"
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
        run.settle()
    finally:
        bar.close()
    best = keeper.params if early_stopping and keeper.epoch else run.params
    averages = run.averages(best)
    opt_state, rule_state = run.states()
    return Fit(best, opt_state, history, stopped, keeper.epoch, averages, run.privacy(), rule_state)


class _Keeper:
    """Keeps the best parameters for early stopping."""

    def __init__(self, rule: EarlyStopping | None, params: PyTree):
        self.rule, self.params = rule, params
        self.epoch: int | None = None
        self._best: float | None = None

    def look(self, number: int, values: Mapping[str, float], params: PyTree) -> None:
        if self.rule is None:
            return
        value = values[self.rule.monitor]
        if self.rule.better(value, self._best):
            self._best, self.params, self.epoch = value, params, number

    def exhausted(self, number: int) -> bool:
        return self.rule is not None and number - (self.epoch or 0) >= self.rule.patience
