"""The training loop: gradient descent by the delta rule, with any Optax optimizer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jbackprop.averages import State, check_folds, fold_batch_norm, mean_averages
from jbackprop.diagnose.nonfinite import first_nonfinite
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.objective import costs, value_grad_outputs
from jbackprop.sweep import Node
from jbackprop.train.checks import check_batch_size, check_data
from jbackprop.train.evaluation import Metric, evaluate, measure
from jbackprop.train.progress import Progress

_LOOK_EVERY = 200  # steps between two looks at the losses; a look waits for the device


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
    """

    number: int
    params: PyTree
    opt_state: PyTree
    history: Mapping[str, list[float]]


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
    """

    params: PyTree
    opt_state: PyTree
    history: dict[str, list[float]]
    stopped: str
    best_epoch: int | None
    averages: State = dataclasses.field(default_factory=dict)


class NonFiniteError(FloatingPointError):
    """The loss, or an update, became NaN or infinite.

    Attributes:
        step: the step, from 1, counted over all epochs.
        place: where in the network it began.
        params: the parameters before that step, all finite.
        history: of the epochs before.
    """

    def __init__(self, message: str, step: int, place: str, params: PyTree, history: Any):
        super().__init__(message)
        self.step, self.place, self.params, self.history = step, place, params, history

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.step, self.place, self.params, self.history)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is fixed while training, and hashable: the static part of a step."""

    net: Node
    loss: Loss
    optimizer: optax.GradientTransformation
    metrics: tuple[tuple[str, Metric], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.metrics)


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
        progress: whether to show progress on stderr; None: a bar for a terminal or a notebook,
            lines for a log file.

    Returns:
        A `Fit`. Ctrl-C ends training and returns what was learnt up to the last full step.

    Raises:
        NonFiniteError: the loss or an update is not finite; says at which step and in which layer
            that began, and carries the parameters before it.
        ValueError, TypeError: data, parameters or options that do not fit; before the first step.
    """
    x, y = check_data("data", net, loss, params, data)
    held_out = validation and check_data("validation", net, loss, params, validation)
    n = len(jax.tree.leaves(y)[0])
    size = check_batch_size(batch_size, n)
    if not hasattr(epochs, "__index__") or isinstance(epochs, bool) or epochs < 1:
        raise ValueError(f"epochs must be an int of at least 1, not {epochs!r}")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be one of Optax's, such as optax.adam(1e-3): {optimizer}")
    names = tuple((metrics or {}).items())
    if "loss" in dict(names):
        raise ValueError("a metric cannot be called 'loss': in the history the loss has that name")
    recorded = ["loss", *dict(names)]
    recorded += [f"validation_{name}" for name in recorded] if held_out else []
    if early_stopping and early_stopping.monitor not in recorded:
        raise ValueError(
            f"EarlyStopping watches {early_stopping.monitor!r}, but the history will have "
            f"{', '.join(recorded)}; give validation data, or another monitor"
        )
    if held_out:
        check_folds(net)
    task = _Task(net, loss, optimizer, names)
    run = _Run(task, params, x, y, size, key)
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
                found = evaluate(fixed, loss, own, held_out, dict(names))
                values |= {f"validation_{name}": value for name, value in found.items()}
            keeper.look(number, values, run.params)
            for name, value in values.items():
                history.setdefault(name, []).append(value)
            bar.epoch(number, values)
            seen = Epoch(number, run.params, run.opt_state, history)
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
    return Fit(best, run.opt_state, history, stopped, keeper.epoch, averages)


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


class _Run:
    """The state of a training run, and its way through an epoch."""

    def __init__(self, task: _Task, params: PyTree, x: Any, y: Any, size: int, key: Array):
        self._task, self._size, self._key = task, size, key
        self._x, self._y = (jax.tree.map(jnp.asarray, part) for part in (x, y))
        self._n = len(jax.tree.leaves(y)[0])
        self._step = 0
        self.params = jax.tree.map(jnp.asarray, params)
        self.opt_state = task.optimizer.init(self.params)
        self._sound = (self.params, self.opt_state)

    def epoch(self, number: int, history: Any) -> dict[str, float]:
        """Go through the data once; the means over its examples of the loss and the metrics."""
        sums: dict[str, float] = {}
        waiting: list[tuple[Any, Any]] = []
        before = (self.params, self.opt_state, self._step)
        for batch in self._batches(number):
            self.params, self.opt_state, means = _step(
                self._task, self.params, self.opt_state, self._x, self._y, batch, self._draw()
            )
            self._step += 1
            waiting.append((batch, means))
            if len(waiting) == _LOOK_EVERY:
                self._look(waiting, before, sums, history)
                waiting, before = [], (self.params, self.opt_state, self._step)
        self._look(waiting, before, sums, history)
        return {name: sums[name] / self._n for name in ("loss", *self._task.names)}

    def averages(self, params: PyTree) -> State:
        """The statistics of all batch norms over the training data; the same for equal params."""
        if not self._task.net.couples_examples:
            return {}
        batches = (_take(self._x, batch) for batch in self._batches(1))
        return mean_averages(self._task.net, params, batches)

    def folded(self) -> tuple[Node, PyTree]:
        """The network to evaluate, and its parameters."""
        if not self._task.net.couples_examples:
            return self._task.net, self.params
        return fold_batch_norm(self._task.net, self.params, self.averages(self.params))

    def _batches(self, number: int) -> Iterator[np.ndarray | None]:
        """The indices of each batch; None for the whole data as it is."""
        if self._size == self._n:
            yield None
            return
        order = np.asarray(jax.random.permutation(jax.random.fold_in(self._key, number), self._n))
        for start in range(0, self._n, self._size):
            yield order[start : start + self._size]

    def _draw(self) -> Array | None:
        """This step's key for layers that draw; a stream of its own beside that of the epochs."""
        if not self._task.net.draws:
            return None
        return jax.random.fold_in(jax.random.fold_in(self._key, 0), self._step)

    def _look(
        self, waiting: list[tuple[Any, Any]], before: Any, sums: dict[str, float], history: Any
    ) -> None:
        """Wait for the steps, add up their means, and stop at the first that is not finite."""
        for batch, means in jax.device_get(waiting):
            if not math.isfinite(means["loss"]):
                self._explain(waiting, before, history)
            size = self._n if batch is None else len(batch)
            for name, mean in means.items():
                sums[name] = sums.get(name, 0.0) + size * float(mean)
        if waiting and not _all_finite(self.params):
            self._explain(waiting, before, history)
        self._sound = (self.params, self.opt_state)

    def settle(self) -> None:
        """After an interruption: back to the last parameters looked at, if these are not finite."""
        if not _all_finite(self.params):
            self.params, self.opt_state = self._sound

    def _explain(self, waiting: list[tuple[Any, Any]], before: Any, history: Any) -> None:
        """Take the steps again, one by one, up to the one that went wrong, and say where."""
        params, opt_state, self._step = before
        for batch, _ in waiting:
            key = self._draw()
            args = (self._task, params, opt_state, self._x, self._y, batch, key)
            new, opt_state, means = _step(*args)
            self._step += 1
            loss = float(means["loss"])
            if math.isfinite(loss) and _all_finite(new):
                params = new
                continue
            x, y = _take(self._x, batch), _take(self._y, batch)
            place = first_nonfinite(self._task.net, self._task.loss, params, x, y, key)
            if place is None and not math.isfinite(loss):
                place = f"the mean of the costs ({self._task.loss}), which overflows"
            place = place or "the optimizer's update: the gradient is finite"
            what = (
                f"the loss became {loss}" if not math.isfinite(loss) else "the update is not finite"
            )
            raise NonFiniteError(
                f"{what} at step {self._step}; it began in {place}. The parameters before that "
                "step are in this error's .params. Often the learning rate is too high",
                self._step,
                place,
                params,
                history,
            )


def _all_finite(tree: PyTree) -> bool:
    return not jax.tree.leaves(tree) or bool(_finite(tree))


@jax.jit
def _finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _take(tree: Any, batch: Any) -> Any:
    if batch is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.take(leaf, batch, axis=0), tree)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    task: _Task, params: PyTree, opt_state: PyTree, x: Any, y: Any, batch: Any, key: Array | None
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """One step: new parameters and state, and the means over the batch of loss and metrics."""
    x, y = _take(x, batch), _take(y, batch)
    value, grads, outputs = value_grad_outputs(
        task.net, task.loss, params, x, y, key=key, outputs=bool(task.metrics)
    )

    def value_fn(params: PyTree) -> Array:  # for optimizers that search along a line
        return jnp.mean(costs(task.net, task.loss, params, x, y, key))

    updates, opt_state = optax.with_extra_args_support(task.optimizer).update(
        grads, opt_state, params, value=value, grad=grads, value_fn=value_fn
    )
    means = {"loss": value} | {k: jnp.mean(v) for k, v in measure(task.metrics, outputs, y)}
    return optax.apply_updates(params, updates), opt_state, means
