"""Training with differential privacy."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.calls import refuse_coupling
from jbackprop.checks import check_numbers
from jbackprop.factored import PyTree
from jbackprop.per_example.clipping import Scheme, check_bounds, clipped_sums
from jbackprop.per_example.noise import noised, sensitivity_of
from jbackprop.per_example.source import Deferred, check_microbatch
from jbackprop.structure import trainable_mask
from jbackprop.train.accounting import Privacy, epsilon_of, noise_multiplier
from jbackprop.train.data import Batch, Loaded, Order, Picked, take
from jbackprop.train.evaluation import measure
from jbackprop.train.position import Position
from jbackprop.train.run import Run
from jbackprop.train.step import Task, ended, plain_updates


@dataclasses.dataclass(frozen=True)
class Private:
    """How to train privately, by DP-SGD: `jbackprop.fit(..., private=Private(...))`.

    In every step each example of the data is drawn with the probability batch_size / n, whatever
    the others do (Poisson sampling), its gradient is clipped, and the optimizer gets

        (sum of clipped gradients + N(0, (noise_multiplier * max_norm)^2 I)) / batch_size

    Who knows the key knows the noise: the key of a private `fit` must be secret, and used once.

    Source: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, Deep learning with
    differential privacy (2016), algorithm 1.

    Attributes:
        max_norm: of the gradient of one example's own cost; or by layer, as in
            `per_example.clipped_gradient`.
        noise_multiplier: give it, or epsilon.
        epsilon: what all epochs together may give away; the noise follows from it, a multiplier of
            0.3 at least.
        delta: well below one over the number of examples.
        scheme: how gradients are clipped; see `per_example.clipped_gradient`.
        microbatch: so many examples at a time; bounds the memory, and changes nothing else.

    Raises:
        ValueError: both or neither of noise_multiplier and epsilon, or values out of range.
    """

    max_norm: float | Mapping[str, float]
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    scheme: Scheme = "flat"
    microbatch: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_norm", check_bounds(self.max_norm, self.scheme))
        check_microbatch(self.microbatch)
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ValueError("Private: give either noise_multiplier or epsilon, and not both")
        if self.noise_multiplier is not None:
            check_numbers(self, "noise_multiplier", least=0)
        if self.epsilon is not None:
            check_numbers(self, "epsilon", above=0)
        check_numbers(self, "delta", above=0, below=1)

    def multiplier(self, probability: float, steps: int) -> float:
        """The noise multiplier, found by `dp_accounting` where only epsilon is given."""
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.epsilon is not None
        return noise_multiplier(self.epsilon, self.delta, probability, steps)

    def report(self, multiplier: float, probability: float, steps: int) -> Privacy:
        """What so many steps amount to."""
        epsilon = epsilon_of(multiplier, probability, steps, self.delta)
        return Privacy(epsilon, self.delta, multiplier, probability, steps)


class PrivateRun(Run):
    """The same, by DP-SGD."""

    def __init__(self, private: Private, epochs: int, *others: Any):
        self._private, self._epochs = private, epochs
        super().__init__(*others)

    def _prepared(self, task: Task) -> Task:
        refuse_coupling(task.net, "the gradient of one of them")
        if isinstance(self._data, Loaded):
            raise ValueError(
                "private training draws its own batches (Poisson sampling): give data as (x, y), "
                "arrays or memory maps, not as a loader"
            )
        if task.nonfinite != "raise":
            raise ValueError(
                f"nonfinite={task.nonfinite!r} would tell of the private data which steps were "
                'thrown away: private training has "raise" only'
            )
        private, size, n = self._private, self._size, self._data.n
        self._steps, self._probability = -(-n // size), size / n
        self._multiplier = private.multiplier(self._probability, self._epochs * self._steps)
        # Two streams apart from those of `Run`: to draw the examples, and for the noise.
        sampling, self._noise = jax.random.split(jax.random.fold_in(self._key, 2**32 - 1))
        self._sampling = np.asarray(jax.random.key_data(sampling)).ravel().tolist()
        self._begun = 0  # steps: counted before they are done, so that an interruption hides none
        self.privacy()  # it raises now rather than after all is done
        capacity = _capacity(size, n)
        self._places = capacity + -capacity % self._place.shards
        return dataclasses.replace(task, scheme=private.scheme, microbatch=private.microbatch)

    def privacy(self) -> Privacy:
        return self._private.report(self._multiplier, self._probability, self._begun)

    def go_on(self, params: PyTree, opt_state: PyTree, at: Position) -> None:
        super().go_on(params, opt_state, at)
        self._begun = at.step

    def _order(self, n: int) -> Order:
        def order(epoch: int) -> Iterator[Picked]:
            for step in range((epoch - 1) * self._steps, epoch * self._steps):
                own = np.random.default_rng([*self._sampling, step])
                drawn = np.flatnonzero(own.random(n) < self._probability)
                yield Picked(*_padded(drawn, self._places))

        return order

    def _whole(self, n: int) -> bool:
        return False

    def _advance(self, params: PyTree, opt_state: PyTree, batch: Batch) -> tuple[Any, Any, Any]:
        self._begun = max(self._begun, self.at.step + 1)
        return _step(
            self._task, params, opt_state, batch.x, batch.y, batch.indices, batch.weights,
            self._places, self._draw(), self._noise, self.at.step, self._private.max_norm,
            self._multiplier, self._size,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 7))
def _step(
    task: Task,
    params: PyTree,
    opt_state: PyTree,
    x: Any,
    y: Any,
    indices: Any,
    weights: Array,
    places: int,
    key: Array | None,
    noise_key: Array,
    step: Array,
    max_norm: Any,
    multiplier: Array,
    size: Array,
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """One step of DP-SGD, of the examples of the batch whose weight is 1."""
    x, y = take(x, indices), take(y, indices)
    bp = Deferred(params, x, y, key, task.net, task.loss)
    at_once, n = min(places, task.microbatch or places), weights.shape[0]
    assert task.scheme is not None
    sums, found = clipped_sums(bp, max_norm, weights, task.scheme, "auto", at_once, n)
    grads = noised(
        jax.random.fold_in(noise_key, step), sums, trainable_mask(task.net, params),
        multiplier * sensitivity_of(max_norm), size, params,
    )  # fmt: skip
    if task.grads is not None:
        grads = task.grads.hold(grads)
    # Neither the value nor a way to ask for it: they are of the data.
    updates, next_state = plain_updates(
        task, grads, opt_state, params, "which is of the private data"
    )
    values = {"loss": found.losses} | dict(measure(task.metrics, found.outputs, y))
    count = jnp.maximum(jnp.sum(weights), 1)
    means = {
        name: jnp.sum(jnp.where(weights == 0, 0, v)) / count.astype(v.dtype)
        for name, v in values.items()
    }
    return ended(task, params, opt_state, grads, updates, next_state, means)


def _capacity(size: int, n: int) -> int:
    """How many places a mini-batch of `size` expected examples of n has: seldom too few."""
    return min(n, math.ceil(size + 4 * math.sqrt(size * (1 - size / n))))


def _padded(batch: Any, places: int) -> tuple[Any, Any]:
    """Indices, filled up to a multiple of `places`, and weights: 0 where it is filled up."""
    total = places * max(1, -(-len(batch) // places))
    indices, weights = np.zeros(total, np.int32), np.zeros(total, np.float32)
    indices[: len(batch)], weights[: len(batch)] = batch, 1
    return indices, weights
