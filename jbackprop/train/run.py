"""A training run: its state, and its way through an epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jbackprop import credit
from jbackprop.averages import AveragesByPath, fold_batch_norm, mean_averages
from jbackprop.diagnose.nonfinite import first_nonfinite
from jbackprop.factored import PyTree
from jbackprop.sweep import Node
from jbackprop.train.accounting import Privacy
from jbackprop.train.checks import Examples
from jbackprop.train.data import (
    Batch,
    Feed,
    Loaded,
    Order,
    Resident,
    Streamed,
    shuffled,
    take,
    with_last,
)
from jbackprop.train.placement import Placement
from jbackprop.train.position import Position
from jbackprop.train.step import Task, finite, step

_LOOK_EVERY = 200  # steps between two looks at the losses; a look waits for the device
_HELD = 1 << 28  # bytes of batches that may wait for a look
_IN_A_ROW = {"skip": 100, "rollback": 10}  # after so many nothing is left to hope for


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


class Run:
    """The state of a training run, and its way through an epoch."""

    def __init__(
        self,
        task: Task,
        params: PyTree,
        data: Examples | Loaded,
        size: int,
        key: Array,
        place: Placement,
    ):
        self._size, self._key, self._place = size, key, place
        self._data = data
        self._task = task = self._prepared(task)
        self.at = Position()
        self.params = place.params(params)
        self.opt_state = self._begin()
        self._task = dataclasses.replace(
            task, layout=place.layout(self.params, self.opt_state), grads=place.layout(self.params)
        )
        self._feed = data if isinstance(data, Loaded) else self._feed_of(data)
        self._waiting: list[tuple[Batch, Any]] = []
        self._before = self._sound = (self.params, self.opt_state, self.at)

    def _prepared(self, task: Task) -> Task:
        """The task as a run of this kind has it; here it refuses what it cannot do."""
        return task

    def _begin(self) -> PyTree:
        def init(params: PyTree) -> PyTree:
            return jax.tree.map(jnp.asarray, self._task.optimizer.init(params))

        return self._place.state(self.params, init)

    def _order(self, n: int) -> Order:
        return shuffled(n, self._size, self._key)

    def _feed_of(self, data: Examples) -> Feed:
        """On a mesh a batch is put together on the host, as its examples come from everywhere."""
        order, shards = self._order(data.n), self._place.shards
        if self._size % shards and self._size != data.n and not self._fills:
            raise ValueError(
                f"batch_size is {self._size}, which {shards} shards do not share evenly, and this "
                f"network, rule or optimizer sees a batch as a whole: take a multiple of {shards}"
            )
        if not data.mapped and (self._place.mesh is None or self._whole(data.n)):
            return Resident(data, order, self._place)
        return Streamed(data, order, self._place, fills=self._fills)

    def _whole(self, n: int) -> bool:
        """Whether every batch is the whole data as it is, and can be filled up."""
        return self._size == n and (self._fills or n % self._place.shards == 0)

    @functools.cached_property
    def _fills(self) -> bool:
        """Whether examples of weight 0 change nothing; they do where an optimizer is given them."""
        return not self._task.net.couples_examples and not self._asks_for_batch()

    def _asks_for_batch(self) -> bool:
        def update(params: PyTree, state: PyTree) -> Any:
            return optax.with_extra_args_support(self._task.optimizer).update(
                params, state, params, value=jnp.zeros(()), grad=params,
                value_fn=lambda params, **_: jnp.zeros(()),
            )  # fmt: skip

        try:
            jax.eval_shape(update, self.params, self.opt_state)
        except TypeError:
            return True
        return False

    def epoch(
        self, number: int, history: Any, each: Callable[[], Any] = lambda: None
    ) -> dict[str, float]:
        """Go through the data once, or through what is left of it.

        Args:
            number: of the epoch, from 1.
            history: for errors.
            each: called after every step but the last.

        Returns:
            The means over the epoch's examples of the loss and the metrics.
        """
        self._before = (self.params, self.opt_state, self.at.copy())
        feed = self._feed.batches(number, self.at.index, self.at.loader)
        with contextlib.closing(feed):  # type: ignore[type-var]
            for batch, last in with_last(feed):
                self._go(batch, history)
                if not last:
                    each()
        self.look(history)
        at, names = self.at, ("loss", *self._task.names)
        others = (name for name in at.sums if name not in names)
        values = {k: at.sums.get(k, math.nan) / max(at.seen, 1) for k in (*names, *others)}
        if self._task.nonfinite != "raise":
            values["skipped"] = float(at.lost)
        at.next_epoch()
        return values

    def _go(self, batch: Batch, history: Any) -> None:
        self.params, self.opt_state, means = self._advance(self.params, self.opt_state, batch)
        self.at.step += 1
        self.at.index += 1
        self.at.loader = batch.after
        self._waiting.append((batch, means))
        every = min(_LOOK_EVERY, max(1, _HELD // max(batch.bytes, 1)))
        if self.at.step % every == 0:
            self.look(history)

    def states(self) -> tuple[PyTree, credit.State | None]:
        """The optimizer's state, and the rule's."""
        return self.opt_state, None

    def privacy(self) -> Privacy | None:
        """What was given away."""
        return None

    def averages(self, params: PyTree) -> AveragesByPath:
        """The statistics of all batch norms over the training data; the same for equal params."""
        if not self._task.net.couples_examples:
            return {}
        batches = (take(batch.x, batch.indices) for batch in self._feed.batches(1))
        return mean_averages(self._task.net, params, batches)

    def folded(self) -> tuple[Node, PyTree]:
        """The network to evaluate, and its parameters."""
        if not self._task.net.couples_examples:
            return self._task.net, self.params
        return fold_batch_norm(self._task.net, self.params, self.averages(self.params))

    def _advance(self, params: PyTree, opt_state: PyTree, batch: Batch) -> tuple[Any, Any, Any]:
        """One step."""
        return step(
            self._task, params, opt_state, batch.x, batch.y, batch.indices, batch.weights,
            self._draw(),
        )  # fmt: skip

    def _draw(self) -> Array | None:
        """This step's key for layers that draw; a stream of its own beside that of the epochs."""
        if not self._task.net.draws:
            return None
        return jax.random.fold_in(jax.random.fold_in(self._key, 0), self.at.step)

    def look(self, history: Any) -> None:
        """Wait for the steps, and add up their means; see to what is not finite."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        at, policy = self.at, self._task.nonfinite
        found = jax.device_get([means for _, means in waiting])
        good = [math.isfinite(means["loss"]) for means in found]
        sound = policy == "skip" or (all(good) and _all_finite(self.params))
        if not sound and policy == "rollback":
            self.params, self.opt_state, _ = self._before
            good = [False] * len(waiting)
            at.in_a_row += 1
        longest = 0
        for (batch, _), means, fine in zip(waiting, found, good, strict=True):
            if policy == "skip":
                at.in_a_row = 0 if fine else at.in_a_row + 1
                longest = max(longest, at.in_a_row)
            if not fine:
                at.lost += 1
                continue
            at.seen += batch.size
            for name, mean in means.items():
                at.sums[name] = at.sums.get(name, 0.0) + batch.size * float(mean)
        if not sound and (policy == "raise" or at.in_a_row >= _IN_A_ROW[policy]):
            self._explain(waiting, history)
        if policy == "skip" and longest >= _IN_A_ROW[policy]:
            at.in_a_row = longest
            self._explain(waiting, history)
        if sound and policy == "rollback":
            at.in_a_row = 0
        self._before = self._sound = (self.params, self.opt_state, at.copy())

    def go_on(self, params: PyTree, opt_state: PyTree, at: Position) -> None:
        """From a checkpoint."""
        self.params, self.opt_state, self.at = params, opt_state, at
        self._sound = (params, opt_state, at)

    def stop(self, history: Any) -> None:
        """To be gone on from elsewhere: with all looked at, or nothing done since the last look.

        "rollback" goes back to a look: one out of turn would be gone back to instead.
        """
        if self._task.nonfinite != "rollback":
            self.look(history)
        else:
            self.params, self.opt_state, self.at = self._before

    def settle(self) -> None:
        """After an interruption: back to the last parameters looked at, if these are not finite."""
        if not _all_finite(self.params):
            self.params, self.opt_state, _ = self._sound

    def _explain(self, waiting: list[tuple[Batch, Any]], history: Any) -> None:
        """Take the steps again, one by one, up to the one that went wrong, and say where."""
        params, opt_state, self.at.step = *self._before[:2], self._before[2].step
        for batch, _ in waiting:
            key = self._draw()
            new, after, means = self._advance(params, opt_state, batch)
            self.at.step += 1
            loss = float(means["loss"])
            if math.isfinite(loss) and _all_finite(new):
                params, opt_state = new, after
                continue
            x, y = take(batch.x, batch.indices), take(batch.y, batch.indices)
            place = first_nonfinite(self._task.net, self._task.loss, params, x, y, key)
            if place is None and not math.isfinite(loss):
                place = f"the mean of the costs ({self._task.loss}), which overflows"
            place = place or self._beyond(params, opt_state, x, y, key)
            what = (
                f"the loss became {loss}" if not math.isfinite(loss) else "the update is not finite"
            )
            often = ""
            if self._task.nonfinite != "raise":
                often = (
                    f" ({self._task.nonfinite!r} was of no use {self.at.in_a_row} times in a row)"
                )
            raise NonFiniteError(
                f"{what} at step {self.at.step}{often}; it began in {place}. The parameters before "
                "that step are in this error's .params. Often the learning rate is too high",
                self.at.step,
                place,
                self._place.handed_back(params),
                history,
            )

    def _beyond(self, params: PyTree, opt_state: PyTree, x: Any, y: Any, key: Any) -> str:
        """Where it began, if not in the network."""
        eps = "; in float16 an eps of 1e-8, as Adam has, is 0: give it 1e-4"
        narrow = any(v.dtype == jnp.float16 for v in jax.tree.leaves(params))
        return "the optimizer's update: the gradient is finite" + eps * narrow


def _all_finite(tree: PyTree) -> bool:
    return not jax.tree.leaves(tree) or bool(_finite(tree))


@jax.jit
def _finite(tree: PyTree) -> Array:
    return finite(tree)
