"""Where the pairs come from: kept ones, or a sweep that contracts them as they are born."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.calls import check_call, refuse_coupling
from jbackprop.checks import size_of
from jbackprop.factored import (
    Factored,
    Full,
    Nothing,
    Place,
    PyTree,
    is_factored,
    promoted_sum,
    scan_examples,
)
from jbackprop.gradient import Ahead, Backprop, sweep_forward
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, examples, like, shapes
from jbackprop.structure import by_copy, rebuild, stack_axes, trainable_mask
from jbackprop.sweep import Node, backward, batch_size


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A mini-batch that is swept when something is asked of it; no pair of it is ever kept.

    Whatever takes what `backprop` gives takes this as well, with the same result. The pairs are
    contracted inside the sweep, layer by layer as they are born: in a scanned stack (`Repeat`) one
    copy's are alive at a time. What needs the pairs twice, such as clipping (first the norms, then
    the weighted sum), sweeps back twice over one trace: that takes more time, but no more memory
    than a gradient. With `microbatch=` the forward sweep is done in parts too, so that the traces
    of `microbatch` examples are alive at most.

    Make it with `deferred`. A pytree, to be passed through `jax.jit`.
    """

    params: PyTree
    x: Any
    y: Any
    key: Array | None
    net: Node
    loss: Loss


jax.tree_util.register_dataclass(Deferred, ["params", "x", "y", "key"], ["net", "loss"])


def deferred(
    net: Node, loss: Loss, params: PyTree, x: Any, y: Any, key: Array | None = None
) -> Deferred:
    """A mini-batch for the questions of `jbackprop.per_example`, without keeping its pairs.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: the network's parameters.
        x: the inputs, (B, ...).
        y: the targets, as the loss wants them.
        key: for layers that draw; None draws nothing. With `microbatch=` each part of the
            mini-batch draws from a key of its own, so that the draws are other ones than without.

    Raises:
        ValueError, TypeError: as `backprop`; and where a layer couples the examples.
    """
    check_call(net, loss, params, x, y, key)
    refuse_coupling(net, "the gradient of one of them")
    outputs = jax.eval_shape(
        lambda params, x, y: sweep_forward(net, loss, params, x, y).outputs,
        *shapes((params, x, y)),
    )
    loss.check(outputs.shape, y)
    return Deferred(params, x, y, key, net, loss)


@runtime_checkable
class Collecting(Protocol):
    """A mini-batch of any program, which can be asked for its pairs again and again.

    That is what `jbackprop.capture.deferred` gives.
    """

    params: PyTree
    batch: Any
    size: int

    def collect(self, f: Callable[..., Array], aux: PyTree = None) -> PyTree:
        """f(pair, its part of aux) of each copy of every parameter, stacked in front."""

    def homes(self) -> tuple[PyTree, PyTree]:
        """Trees like params: the `Place` of each pair, and whether there is a pair at all."""

    def replaced(self, batch: Any) -> Any:
        """The same with other examples."""


Pairs = Backprop | Deferred | Collecting | PyTree
"""What can be asked: from `backprop`, `capture` or `deferred` ones, or a tree of factored
gradients."""


class Source(abc.ABC):
    """The pairs of one mini-batch, or of a part of it.

    Attributes:
        n: the number of examples.
        net: the network, where it is known.
        ahead: costs and outputs (B, ...), where they are known.
    """

    n: int
    net: Node | None
    ahead: Any

    @abc.abstractmethod
    def ask(self, f: Callable[..., Array], aux: PyTree = None, by_copy: bool = False) -> PyTree:
        """f(pair) of every parameter, or f(pair, its part of aux), in a tree like params.

        Where copies of a layer are scanned, f may be asked of one copy at a time or of all: then
        what it gives has the axes of copies in front or, summed over them or in its due place, not.
        With `by_copy` it is always the former, and aux has those axes too.
        """

    @abc.abstractmethod
    def learns(self) -> PyTree:
        """A tree like params: whether a parameter is not frozen."""

    def copy_axes(self) -> PyTree:
        """A tree like params: how many axes of copies a parameter has in front."""
        if self.net is None:
            return jax.tree.map(lambda home: len(home.stack), self.homes())
        axes = stack_axes(self.net)
        return jax.tree.map(lambda path: axes.get(path, 0), self.layers())

    def homes(self) -> PyTree:
        """A tree like params: the `Place` of each pair, where no network is known."""
        raise NotImplementedError

    def layers(self) -> PyTree:
        """A tree like params: the path of the layer that each parameter belongs to."""
        if self.net is None:
            leaves, tree = jax.tree_util.tree_flatten_with_path(self.homes())
            parents = [jax.tree_util.keystr(path[:-1]) or "net" for path, _ in leaves]
            stacks: dict[str, set[Any]] = {}
            for parent, (_, home) in zip(parents, leaves, strict=True):
                stacks.setdefault(parent, set()).add(home.stack)
            # Parameters side by side of which some are stacked and some are not: no one layer.
            own = [jax.tree_util.keystr(path) for path, _ in leaves]
            both = zip(parents, own, strict=True)
            return jax.tree.unflatten(
                tree, [parent if len(stacks[parent]) == 1 else path for parent, path in both]
            )

        def name(path: str, layer: Node, part: PyTree) -> tuple[Node, PyTree]:
            return layer, jax.tree.map(lambda _: path, part)

        return rebuild(self.net, self.learns(), name)[1]

    def by_layer(self, found: PyTree) -> OrderedDict[str, Any]:
        """The sums over the parameters of every layer, by path, copies in front."""
        sums: OrderedDict[str, Any] = OrderedDict()
        for path, value in zip(jax.tree.leaves(self.layers()), jax.tree.leaves(found), strict=True):
            sums[path] = promoted_sum([sums[path], value]) if path in sums else value
        return sums

    def learning(self) -> set[str]:
        """The paths of the layers of which something is not frozen."""
        pairs = zip(jax.tree.leaves(self.layers()), jax.tree.leaves(self.learns()), strict=True)
        return {path for path, learns in pairs if learns}

    def shown(self, found: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Of the layers that learn by path, the copies of a layer told apart as in `deltas`."""
        learning = self.learning()
        own = OrderedDict((path, v) for path, v in found.items() if path in learning)
        return self._by_copy(own)

    def _by_copy(self, found: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
        if self.net is not None:
            return by_copy(self.net, found)
        layers, homes = jax.tree.leaves(self.layers()), jax.tree.leaves(self.homes())
        stacks = {path: home.stack for path, home in zip(layers, homes, strict=True)}
        return OrderedDict(
            (path + "".join(f"[{i}]" for i in index), v[index] if index else v)
            for path, v in found.items()
            for index in np.ndindex(*stacks[path])
        )

    def spread(self, by_path: Mapping[str, Array]) -> PyTree:
        """A tree like params of what each layer has."""
        return jax.tree.map(lambda path: by_path[path], self.layers())


class KeptPairs(Source):
    """Pairs that were kept."""

    def __init__(self, pairs: PyTree, n: int, net: Node | None, ahead: Any = None):
        self.pairs, self.n, self.net, self.ahead = pairs, n, net, ahead

    def ask(self, f: Callable[..., Array], aux: PyTree = None, by_copy: bool = False) -> PyTree:
        def of(pair: Factored, *own: Any) -> Array:
            if by_copy and pair.home.stack:
                return jax.vmap(of)(pair.copies(), *own)
            return f(pair, *own)

        trees = (self.pairs,) if aux is None else (self.pairs, aux)
        return jax.tree.map(of, *trees, is_leaf=is_factored)

    def learns(self) -> PyTree:
        return jax.tree.map(
            lambda pair: not isinstance(pair, Nothing), self.pairs, is_leaf=is_factored
        )

    def copy_axes(self) -> PyTree:
        return jax.tree.map(lambda home: len(home.stack), self.homes())

    def homes(self) -> PyTree:
        return jax.tree.map(lambda pair: pair.home, self.pairs, is_leaf=is_factored)


class SweptPairs(Source):
    """Pairs that are contracted as they are born: every question is a sweep back."""

    def __init__(self, batch: Deferred, ahead: Ahead, n: int):
        self.batch, self.ahead, self.n, self.net = batch, ahead, n, batch.net

    def ask(self, f: Callable[..., Array], aux: PyTree = None, by_copy: bool = False) -> PyTree:
        @functools.partial(jax.jit, inline=True)  # traced once for each shape
        def of(factored: PyTree, own: PyTree) -> PyTree:
            trees = (factored,) if own is None else (factored, own)
            return jax.tree.map(f, *trees, is_leaf=is_factored)

        def collect(factored: PyTree, delta: Any, own: PyTree) -> PyTree:
            return of(factored, own)

        batch, ahead = self.batch, self.ahead
        return backward(batch.net, batch.params, ahead.trace, ahead.delta, collect, None, aux)[1]

    def learns(self) -> PyTree:
        return trainable_mask(self.batch.net, self.batch.params)


class CollectedPairs(Source):
    """Pairs of any program that are contracted as they are born, whenever something is asked."""

    net, ahead = None, None

    def __init__(self, batch: Collecting):
        self.batch, self.n = batch, batch.size

    def ask(self, f: Callable[..., Array], aux: PyTree = None, by_copy: bool = False) -> PyTree:
        return self.batch.collect(f, aux)

    def learns(self) -> PyTree:
        return self.batch.homes()[1]

    def homes(self) -> PyTree:
        return self.batch.homes()[0]


class WrittenOut(KeptPairs):
    """The gradients of another source, written out at once: it is asked once."""

    def __init__(self, source: Source):
        self._learns = source.learns()
        # With the examples last, copies that are asked one after the other come to stand right.
        found = source.ask(lambda pair: jnp.moveaxis(pair.each(), 0, -1))

        def full(g: Array, axes: int) -> Factored:
            place = Place(g.shape[axes:-1], g.dtype, stack=g.shape[:axes])
            return Full(jnp.moveaxis(g, -1, 0), "written out", place)

        pairs = jax.tree.map(full, found, source.copy_axes())
        super().__init__(pairs, source.n, source.net, source.ahead)

    def learns(self) -> PyTree:
        return self._learns


def opened(bp: Pairs) -> Source:
    """The source of what was given, whole."""
    if isinstance(bp, Backprop):
        return KeptPairs(bp.factored, bp.losses.shape[0], bp.net, bp)
    if isinstance(bp, Deferred):
        ahead = sweep_forward(bp.net, bp.loss, bp.params, bp.x, bp.y, bp.key)
        return SweptPairs(bp, ahead, batch_size(bp.x))
    if isinstance(bp, Collecting):
        return CollectedPairs(bp)
    pairs = jax.tree.leaves(bp, is_leaf=is_factored)
    return KeptPairs(bp, pairs[0].size, None)


def split_of(bp: Pairs) -> Any:
    """On a mesh of explicit axes: how its examples are split."""
    if isinstance(bp, Backprop):
        return examples(bp.losses)
    if isinstance(bp, Deferred):
        return examples((bp.x, bp.y))
    return examples(bp.batch if isinstance(bp, Collecting) else bp)


def params_split(bp: Pairs) -> PyTree:
    """The same: how its parameters are, where these are known; pairs do not know."""
    return like(bp.params) if isinstance(bp, Deferred | Collecting) else WHOLE


def like_params(bp: Pairs) -> PyTree:
    """A tree like params of shapes and dtypes."""
    if isinstance(bp, Deferred | Collecting):
        return jax.eval_shape(lambda params: params, bp.params)

    def parameter(pair: Factored) -> jax.ShapeDtypeStruct:
        home = pair.home
        return jax.ShapeDtypeStruct(home.stack + home.shape, home.dtype)

    pairs = bp.factored if isinstance(bp, Backprop) else bp
    return jax.tree.map(parameter, pairs, is_leaf=is_factored)


def check_pairs(bp: Pairs, what: str) -> int:
    """How many examples there are, if questions about one of them have an answer."""
    if isinstance(bp, Backprop | Deferred):
        refuse_coupling(bp.net, what)
        return bp.losses.shape[0] if isinstance(bp, Backprop) else batch_size(bp.x)
    if isinstance(bp, Collecting):
        return bp.size
    pairs = jax.tree.leaves(bp, is_leaf=is_factored)
    if not pairs or not all(map(is_factored, pairs)):
        raise TypeError(
            f"what jbackprop.backprop, capture or per_example.deferred gives is needed, or a tree "
            f"of factored gradients, not {type(bp).__name__}; capture gives (costs, factored)"
        )
    return int(pairs[0].size)


def in_parts(
    bp: Pairs,
    n: int,
    microbatch: int | None,
    question: Callable[[Source, Any], tuple[PyTree, PyTree]],
    parts: PyTree = None,
    join: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> tuple[PyTree, PyTree]:
    """Ask a question of a mini-batch, of `microbatch` examples at a time.

    Args:
        bp: the mini-batch.
        n: its examples.
        microbatch: so many at a time; None for all at once.
        question: (source, part of `parts`) -> what is of each example, and what is of all of them;
            see `scan_examples`.
        parts: arrays (B, ...) that go with the examples.
        join: as in `scan_examples`.
    """
    if microbatch is None or n <= microbatch:
        return question(opened(bp), parts)

    def some(block: Any) -> tuple[PyTree, PyTree]:
        moving, own, at = block
        if isinstance(bp, Deferred):
            key = None if bp.key is None else jax.random.fold_in(bp.key, at[0])
            part: Any = dataclasses.replace(bp, x=moving[0], y=moving[1], key=key)
            return question(opened(part), own)
        if isinstance(bp, Backprop):
            pairs, *ahead = moving
            seen = dataclasses.replace(bp, losses=ahead[0], outputs=ahead[1])
            return question(KeptPairs(pairs, at.shape[0], bp.net, seen), own)
        if isinstance(bp, Collecting):
            return question(opened(bp.replaced(moving)), own)
        return question(KeptPairs(moving, at.shape[0], None), own)

    moving = bp
    if isinstance(bp, Backprop):
        moving = (bp.factored, bp.losses, bp.outputs)
    elif isinstance(bp, Deferred):
        moving = (bp.x, bp.y)
    elif isinstance(bp, Collecting):
        moving = bp.batch
    return scan_examples(some, (moving, parts, jnp.arange(n)), n, microbatch, join)


def check_microbatch(microbatch: Any) -> None:
    """Raise where it is no number of examples."""
    if microbatch is not None:
        size_of(microbatch, "microbatch", otherwise=", or None for all at once")
