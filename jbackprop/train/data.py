"""How the examples of a run come: in which order, from where, and ahead of time."""

from __future__ import annotations

import abc
import contextlib
import copy
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.train.checks import Examples, Fitting, check_data, lengths, pair
from jbackprop.train.placement import Part, Placement

_T = TypeVar("_T")


class Picked(NamedTuple):
    """Which examples are a batch: their indices (None: all of them), and weights if any is 0."""

    indices: np.ndarray | None
    weights: np.ndarray | None = None


class Batch(NamedTuple):
    """A batch on its devices.

    Attributes:
        x, y: trees of arrays, (B, ...), or those from which `indices` picks.
        indices: of the examples in x and y, (B,); None where they are the batch.
        weights: (B,), 1, and 0 for what only fills up; None for all 1.
        size: how many examples there are, without what fills up.
        after: the state of the loader that this came from, behind it.
        bytes: that the batch takes by itself.
    """

    x: Any
    y: Any
    indices: Any
    weights: Any
    size: int
    after: Any = None
    bytes: int = 0


Order = Callable[[int], Iterator[Picked]]
"""From the number of an epoch to its batches; the same in every process."""


class Feed(abc.ABC):
    """Gives the batches of each epoch, from any of them on."""

    @abc.abstractmethod
    def batches(self, epoch: int, start: int = 0, state: Any = None) -> Iterator[Batch]:
        """The batches of an epoch, without the first `start` ones.

        `state` is the `after` of the batch before these, where there is one.
        """


class Resident(Feed):
    """Arrays that fit on the device: a step picks its examples there."""

    def __init__(self, examples: Examples, order: Order, place: Placement):
        self._order, self._n = order, examples.n
        fill = -examples.n % place.shards  # only on a mesh, where the data are one batch
        at = filled(np.arange(examples.n), fill) if fill else slice(0, examples.n)
        arrays = (examples.x, examples.y)
        self._x, self._y = place.rows(
            examples.n + fill,
            arrays,
            lambda part: examples.rows(slice(*part) if isinstance(at, slice) else at[slice(*part)]),
        )
        self._weights = _weights(examples.n, fill, place)

    def batches(self, epoch: int, start: int = 0, state: Any = None) -> Iterator[Batch]:
        for indices, weights in itertools.islice(self._order(epoch), start, None):
            size = self._n if indices is None else _count(indices, weights)
            weights = self._weights if indices is None else weights
            yield Batch(self._x, self._y, indices, weights, size)


class Streamed(Feed):
    """Arrays on the host, or memory maps: a batch is read when it is due, each device's own part.

    Args:
        examples: the arrays.
        order: which of them are a batch.
        place: where they go.
        fills: whether a batch that does not come out even among the shards is filled up with
            examples of weight 0, else every device gets all of it.
    """

    def __init__(self, examples: Examples, order: Order, place: Placement, fills: bool):
        self._examples, self._order, self._place, self._fills = examples, order, place, fills

    def batches(self, epoch: int, start: int = 0, state: Any = None) -> Iterator[Batch]:
        shapes = self._examples.x, self._examples.y
        with contextlib.closing(ahead(self._read(epoch, start))) as found:
            for n, parts, weights, size in found:
                for _, y in parts.values():
                    self._examples.check_targets(y)
                x, y = self._place.rows(n, shapes, parts.__getitem__)
                if weights is not None:
                    weights = self._place.rows(n, weights, _slicing(weights))
                yield Batch(x, y, None, weights, size, None, _bytes((x, y)))

    def _read(self, epoch: int, start: int) -> Iterator[Any]:
        """Of each batch its length, the parts that belong here, its weights, how many are there."""
        own = self._examples
        for indices, weights in itertools.islice(self._order(epoch), start, None):
            at = np.arange(own.n) if indices is None else indices
            size = _count(at, weights)
            if fill := -len(at) % self._place.shards if self._fills else 0:
                weights = filled(np.ones(len(at), np.float32) if weights is None else weights, fill)
                weights[len(at) :] = 0
                at = filled(at, fill)
            parts = {part: own.rows(at[slice(*part)]) for part in self._place.parts(len(at))}
            yield len(at), parts, weights, size


class Loaded(Feed):
    """Any iterable of batches (x, y), or a function from the number of an epoch to one.

    Where its iterator has `get_state` and `set_state`, as those of `grain` have, it is taken up
    in the middle of an epoch by them; else by going through the batches that were had before.
    """

    def __init__(self, loader: Any, needs: Fitting, place: Placement, name: str = "data"):
        self._loader, self._needs, self._place, self._name = loader, needs, place, name
        self._outputs: tuple[int, ...] | None = None
        _ = needs.dtype  # known before another thread asks: JAX's settings may be this thread's own
        if isinstance(loader, Iterator):
            raise TypeError(
                f"{name} is an iterator, which is empty after one epoch: give what can be iterated "
                "anew (a list, a loader), or a function from the number of an epoch to an iterable"
            )

    def batches(self, epoch: int, start: int = 0, state: Any = None) -> Iterator[Batch]:
        number, needs = start, self._needs
        with contextlib.closing(ahead(self._read(epoch, start, state))) as found:
            for x, y, n, after in found:
                number += 1
                if self._outputs is None:
                    self._outputs = needs.shapes(x, y)
                else:
                    needs.loss.check((n, *self._outputs), y)
                x, y = self._place.own_rows((x, y))
                size = n * (1 if self._place.mesh is None else jax.process_count())
                yield Batch(x, y, None, None, size, after, _bytes((x, y)))
        if number == 0:
            raise ValueError(
                f"{self._name}: there is no batch in epoch {epoch}. An iterator is empty after one "
                "epoch: give what can be iterated anew, or a function from the epoch's number"
            )

    def _read(self, epoch: int, start: int, state: Any) -> Iterator[Any]:
        """Of each batch x and y, how many examples there are, and the loader's state behind it."""
        loader = self._loader(epoch) if callable(self._loader) else self._loader
        if not isinstance(loader, Iterable):
            raise TypeError(
                f"{self._name} must be an iterable of batches (x, y), or a function from the "
                f"number of an epoch to one; for epoch {epoch} it gave {type(loader).__name__}"
            )
        batches: Any = iter(loader)
        keeps = hasattr(batches, "get_state") and hasattr(batches, "set_state")
        if start and keeps and state is not None:
            batches.set_state(state)
        elif start:
            had = sum(1 for _ in itertools.islice(batches, start))
            if had < start:
                raise ValueError(
                    f"{self._name}: epoch {epoch} was left behind batch {start}, but now it has "
                    f"{had} only: these are other data"
                )
        for number, batch in enumerate(batches, start + 1):
            name = f"{self._name}, batch {number} of epoch {epoch}"
            x, y = jax.tree.map(np.array, pair(name, batch))  # it may fill the same arrays anew
            n = lengths(name, x, y)
            after = copy.deepcopy(batches.get_state()) if keeps else None  # it may be its live one
            yield self._needs.values(name, x, y), y, n, after


def examples_of(name: str, needs: Fitting, data: Any, place: Placement) -> Examples | Loaded:
    """Data as they were given: a pair of arrays, or a loader of batches."""
    two = isinstance(data, list) and len(data) == 2
    is_pair = isinstance(data, tuple) or (two and not all(isinstance(v, tuple) for v in data))
    if not is_pair and (callable(data) or isinstance(data, Iterable)):
        return Loaded(data, needs, place, name)
    return check_data(name, needs, data)


def shuffled(n: int, size: int, key: Any) -> Order:
    """All examples once in each epoch, in an order of its own; as they are if a batch has all."""

    def order(epoch: int) -> Iterator[Picked]:
        if size == n:
            yield Picked(None)
            return
        mixed = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), n))
        for start in range(0, n, size):
            yield Picked(mixed[start : start + size])

    return order


def ahead(items: Iterator[_T], depth: int = 2) -> Generator[_T, None, None]:
    """The same, made up to `depth` ahead in a thread; what goes wrong there is raised here.

    JAX's settings can be a thread's own: nothing that depends on them belongs in such a thread.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    left = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if left.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    def given() -> Generator[_T, None, None]:
        thread = threading.Thread(target=work, name="jbackprop read-ahead", daemon=True)
        thread.start()
        try:
            while True:
                more, item = ready.get()
                if more:
                    yield item
                elif item is None:
                    return
                else:
                    raise item
        finally:
            left.set()
            thread.join(timeout=5)  # it may be waiting for its next item

    return given()


def with_last(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last one."""
    before = None
    for batch in batches:
        if before is not None:
            yield before, False
        before = batch
    if before is not None:
        yield before, True


def filled(values: np.ndarray, fill: int) -> np.ndarray:
    """The values, and the first of them so many times more."""
    return np.concatenate([values, np.repeat(values[:1], fill)])


def _weights(n: int, fill: int, place: Placement) -> Any:
    if not fill:
        return None
    weights = (np.arange(n + fill) < n).astype(np.float32)
    return place.rows(n + fill, weights, _slicing(weights))


def _slicing(values: np.ndarray) -> Callable[[Part], np.ndarray]:
    return lambda part: values[slice(*part)]


def _count(indices: np.ndarray, weights: np.ndarray | None) -> int:
    return len(indices) if weights is None else int(np.sum(weights != 0))


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def take(tree: Any, indices: Any) -> Any:
    """The examples at the indices; all of them for None."""
    if indices is None:
        return tree
    return jax.tree.map(lambda leaf: jnp.take(leaf, indices, axis=0), tree)
