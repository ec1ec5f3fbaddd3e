"""Forward and back through a network in chunks of examples, every layer in sight."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from jbackprop.diagnose.units import has_slope, slope_of
from jbackprop.factored import PyTree
from jbackprop.gradient import backprop, deltas
from jbackprop.losses import Loss
from jbackprop.mesh import shapes
from jbackprop.observe import Observed, Seen, tapped
from jbackprop.structure import by_copy, opened, rebuild
from jbackprop.sweep import Node, Trace, batch_size, forward

AT_ONCE = 2**22
"""So many activations are in memory at a time, about: 16 MB of float32."""


class Look(NamedTuple):
    """What a layer has shown on the way forward.

    Attributes:
        y: its output, (B, ...).
        slope: f'(z) of every unit, (B, ...), of an elementwise activation other than `Identity`.
    """

    y: Any
    slope: Any


@dataclasses.dataclass(frozen=True, repr=False)
class _Watched(Observed):
    """A layer that saves its `Look`."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, saved = self.inner.forward(params, x, key)
        slope = None
        if has_slope(self.inner):
            slope = slope_of(self.inner, params, Trace(x, y, saved))
        return y, Seen(Look(y, slope), self.path)


@functools.partial(jax.jit, static_argnums=0)
def _ahead(net: Node, params: PyTree, x: Any) -> tuple[Any, dict[str, Look]]:
    """Outputs, and every layer's look by path; of copies stacked."""
    watched, _ = rebuild(opened(net), params, lambda path, layer, own: (_Watched(layer, path), own))
    outputs, saved = forward(watched, params, x)
    leaves = jax.tree.leaves(saved, is_leaf=lambda node: isinstance(node, Seen))
    return outputs, {leaf.path: leaf.y for leaf in leaves if isinstance(leaf, Seen)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _back(net: Node, loss: Loss, params: PyTree, x: Any, y: Any) -> tuple[Array, dict[str, Any]]:
    """Costs, and dC_n/dy_n of every layer, by path of each copy: the gradient of a tap is it."""
    both = tapped(net, params, x)
    bp = backprop(both[0], loss, both[1], x, y)
    return bp.losses, dict(deltas(bp))


class Chunk(NamedTuple):
    """Some examples, swept.

    Attributes:
        rows: which they are, (m,).
        outputs: of the network, (m, ...), NumPy.
        looks: by path of each copy in forward order.
        costs: C_n, (m,); None where only the way forward was asked for.
        deltas: by path of each copy.
    """

    rows: np.ndarray
    outputs: Any
    looks: dict[str, Look]
    costs: np.ndarray | None
    deltas: dict[str, Any]


class Sweeps:
    """The examples in chunks, as many at a time as `AT_ONCE` allows.

    Where no layer couples the examples, all chunks have one shape, so that nothing is compiled
    twice: the last is filled up with its last example, and cut again.

    Attributes:
        n: the number of examples.
        sizes: of the chunks.
    """

    def __init__(self, net: Node, loss: Loss, params: PyTree, x: Any, y: Any, at_once: int):
        self.net, self.loss, self.params, self.x, self.y = net, loss, params, x, y
        self.n = batch_size(x)
        like = shapes((params, jax.tree.map(lambda v: v[:1], x)))
        seen = jax.eval_shape(functools.partial(_ahead, net), *like)
        each = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(seen))
        number = math.ceil(self.n / max(1, at_once // max(each, 1)))
        self._parts = np.array_split(np.arange(self.n), min(number, self.n))
        self.sizes = [len(part) for part in self._parts]
        self._only: Chunk | None = None

    def chunks(self, params: PyTree = None, back: bool = True) -> Iterator[Chunk]:
        """Sweep all examples, with other parameters if they are given.

        Args:
            params: by default those of the network.
            back: whether the way back is of interest too.
        """
        if params is None and self._only is not None:
            yield self._only
            return
        for part in self._parts:
            chunk = self._swept(self.params if params is None else params, part, back)
            if params is None and back and len(self._parts) == 1:
                self._only = chunk
            yield chunk

    def _swept(self, params: PyTree, part: np.ndarray, back: bool) -> Chunk:
        size = len(part) if self.net.couples_examples else self.sizes[0]
        rows = part[np.minimum(np.arange(size), len(part) - 1)]
        x, y = jax.tree.map(lambda v: v[rows], (self.x, self.y))
        outputs, looks = _ahead(self.net, params, x)
        looks = by_copy(self.net, looks)
        costs, found = _back(self.net, self.loss, params, x, y) if back else (None, {})
        cut = jax.tree.map(lambda v: np.asarray(v)[: len(part)], (outputs, looks, costs, found))
        return Chunk(part, *cut)

    def outputs(self, rows: np.ndarray) -> Any:
        """The network's outputs for some of the examples, in their order: (len(rows), ...)."""
        found: dict[int, Any] = {}
        if self._only is not None:
            return jax.tree.map(lambda v: v[rows], self._only.outputs)
        for part in self._parts:
            wanted = np.intersect1d(part, rows)
            if wanted.size:
                outputs = self._swept(self.params, part, False).outputs
                found |= {row: outputs[row - part[0]] for row in wanted}
        return np.stack([found[row] for row in rows])
