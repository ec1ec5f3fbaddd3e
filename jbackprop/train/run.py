"""A training run: its state, and its way through an epoch."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jbackprop import credit
from jbackprop.averages import State, fold_batch_norm, mean_averages
from jbackprop.diagnose.nonfinite import first_nonfinite
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.objective import costs, value_grad_outputs
from jbackprop.per_example.clipping import Scheme
from jbackprop.sweep import Node
from jbackprop.train.accounting import Privacy
from jbackprop.train.evaluation import Metric, measure

_LOOK_EVERY = 200  # steps between two looks at the losses; a look waits for the device


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
class Task:
    """What is fixed while training, and hashable: the static part of a step.

    `rule` assigns the credit where it is not backpropagation; the last two are of private training.
    """

    net: Node
    loss: Loss
    optimizer: optax.GradientTransformation
    metrics: tuple[tuple[str, Metric], ...]
    rule: credit.Rule | None = None
    scheme: Scheme | None = None
    microbatch: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.metrics)


class Run:
    """The state of a training run, and its way through an epoch."""

    def __init__(self, task: Task, params: PyTree, x: Any, y: Any, size: int, key: Array):
        self._task, self._size, self._key = task, size, key
        self._x, self._y = (jax.tree.map(jnp.asarray, part) for part in (x, y))
        self._n = len(jax.tree.leaves(y)[0])
        self._step = 0
        self.params = jax.tree.map(jnp.asarray, params)
        self.opt_state = self._begin()
        self._sound = (self.params, self.opt_state)

    def epoch(self, number: int, history: Any) -> dict[str, float]:
        """Go through the data once; the means over its examples of the loss and the metrics."""
        sums: dict[str, float] = {}
        waiting: list[tuple[Any, Any]] = []
        before = (self.params, self.opt_state, self._step)
        self._seen = 0
        for batch in self._batches(number):
            self.params, self.opt_state, means = self._advance(self.params, self.opt_state, batch)
            self._step += 1
            waiting.append((batch, means))
            if len(waiting) == _LOOK_EVERY:
                self._look(waiting, before, sums, history)
                waiting, before = [], (self.params, self.opt_state, self._step)
        self._look(waiting, before, sums, history)
        first = ("loss", *self._task.names)
        return {
            name: sums[name] / max(self._seen, 1)
            for name in (*first, *(other for other in sums if other not in first))
        }

    def _begin(self) -> PyTree:
        return self._task.optimizer.init(self.params)

    def states(self) -> tuple[PyTree, credit.State | None]:
        """The optimizer's state, and the rule's."""
        return self.opt_state, None

    def privacy(self) -> Privacy | None:
        """What was given away."""
        return None

    def averages(self, params: PyTree) -> State:
        """The statistics of all batch norms over the training data; the same for equal params."""
        if not self._task.net.couples_examples:
            return {}
        batches = (take(self._x, batch) for batch in self._batches(1))
        return mean_averages(self._task.net, params, batches)

    def folded(self) -> tuple[Node, PyTree]:
        """The network to evaluate, and its parameters."""
        if not self._task.net.couples_examples:
            return self._task.net, self.params
        return fold_batch_norm(self._task.net, self.params, self.averages(self.params))

    def _advance(self, params: PyTree, opt_state: PyTree, batch: Any) -> tuple[Any, Any, Any]:
        """One step."""
        args = params, opt_state, self._x, self._y, batch, self._draw()
        return _step(self._task, *args)

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
            self._seen += size
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
            new, after, means = self._advance(params, opt_state, batch)
            self._step += 1
            loss = float(means["loss"])
            if math.isfinite(loss) and _all_finite(new):
                params, opt_state = new, after
                continue
            x, y = take(self._x, batch), take(self._y, batch)
            place = first_nonfinite(self._task.net, self._task.loss, params, x, y, key)
            if place is None and not math.isfinite(loss):
                place = f"the mean of the costs ({self._task.loss}), which overflows"
            place = place or self._beyond(params, opt_state, x, y, key)
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

    def _beyond(self, params: PyTree, opt_state: PyTree, x: Any, y: Any, key: Any) -> str:
        """Where it began, if not in the network."""
        return "the optimizer's update: the gradient is finite"


def _all_finite(tree: PyTree) -> bool:
    return not jax.tree.leaves(tree) or bool(_finite(tree))


@jax.jit
def _finite(tree: PyTree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def take(tree: Any, batch: Any) -> Any:
    """The examples of a batch; all of them for None."""
    if batch is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.take(leaf, batch, axis=0), tree)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    task: Task, params: PyTree, opt_state: PyTree, x: Any, y: Any, batch: Any, key: Array | None
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """One step: new parameters and state, and the means over the batch of loss and metrics."""
    x, y = take(x, batch), take(y, batch)
    value, grads, outputs = value_grad_outputs(
        task.net, task.loss, params, x, y, key=key, outputs=bool(task.metrics)
    )

    # For optimizers that search along a line, or ask for the curvature.
    def value_fn(params: PyTree, batch: Any = None, batch_key: Any = None) -> Array:
        return jnp.mean(costs(task.net, task.loss, params, x, y, key))  # Optax hands them on to it

    updates, opt_state = optax.with_extra_args_support(task.optimizer).update(
        grads, opt_state, params,
        value=value, grad=grads, value_fn=value_fn, batch=(x, y), batch_key=key,
    )  # fmt: skip
    means = {"loss": value} | {k: jnp.mean(v) for k, v in measure(task.metrics, outputs, y)}
    return optax.apply_updates(params, updates), opt_state, means


def plain_updates(
    task: Task, grads: PyTree, opt_state: PyTree, params: PyTree, why: str, **extra: Any
) -> tuple[PyTree, PyTree]:
    """What an optimizer makes of a gradient that asks for no cost; one that does is refused."""
    try:
        return optax.with_extra_args_support(task.optimizer).update(
            grads, opt_state, params, **extra
        )
    except TypeError as error:
        if "keyword-only" not in str(error):
            raise
        raise TypeError(f"the optimizer asks for the cost, {why}: {error}") from error
