"""Many copies of one layer, scanned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_key, check_sizes
from jbackprop.compose.checks import check_layers
from jbackprop.factored import PyTree, is_factored
from jbackprop.sweep import Collect, Composite, Node, Trace, backward, forward, inside


@dataclasses.dataclass(frozen=True)
class Repeat(Composite):
    """n copies of a layer, one after the other, each with parameters of its own.

    Forward a^l = f(a^{l-1}; w^l), backward delta^{l-1} = (df/da^{l-1})^T delta^l, as in a
    `Sequential` of n equal layers; but as one `lax.scan` forward and one in reverse back, so that
    it is traced and compiled once, whatever n is.

    Of every copy the input is kept, where it is read, and what the layer saves. Its output is the
    next copy's input, so that it is carried along on the way back and not kept. A layer that
    inverts, such as `Reversible`, keeps no inputs at all: they are recovered from the last output.
    `Repeat(Checkpoint(layer), n)` keeps the inputs and nothing else.

    What `collect` gives for a copy is stacked: it gets the copies' axis in front. Factored
    gradients move it into their groups, so that they answer for all copies together.

    With `checkpoint_every=k` only the input of every k-th copy is kept; on the way back k copies
    are done again at a time. n / k inputs and k copies' traces are alive at most: at k near the
    square root of n, memory grows with the square root of the depth for one forward more. k need
    not divide n; the segment that is shorter is the first.

    Source: Chen, Xu, Zhang and Guestrin, Training deep nets with sublinear memory cost (2016),
    section 4.1, for `checkpoint_every`.

    Params: those of the layer with an axis of n in front of every array.

    Attributes:
        layer: a layer or a composite whose output has the shape and dtype of its input.
        n: the number of copies.
        checkpoint_every: k; None keeps every copy's trace.

    Raises:
        ValueError: fewer than one copy, or k below 1; a layer that changes the shape or dtype;
            params with another number of copies.
        TypeError: something that is no layer.
    """

    layer: Node
    n: int
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        check_layers(self, layer=self.layer)
        check_sizes(self, "n", *["checkpoint_every"] * (self.checkpoint_every is not None))

    def __repr__(self) -> str:
        every = f", checkpoint_every={self.checkpoint_every}" if self.checkpoint_every else ""
        return f"{type(self).__name__}({self.layer}, {self.n}{every})"

    @property
    def copies(self) -> int:
        return self.n

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        if self._every is None:
            return ("y",) if self._reads_y else ()
        return ("x",) if self.n % self._every else ()

    @property
    def inverts(self) -> bool:  # type: ignore[override]
        return self.layer.inverts

    @property
    def _every(self) -> int | None:
        """The length of a segment; None where the traces, or at least nothing else, are kept."""
        if self.checkpoint_every is None or self.layer.inverts:
            return None
        return min(self.checkpoint_every, self.n)

    @property
    def _reads_y(self) -> bool:
        return "y" in self.layer.reads or self.layer.inverts

    def opened(self) -> Composite:
        return dataclasses.replace(self, checkpoint_every=None)

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{type(self).__name__}.init: key")
        return jax.vmap(self.layer.init)(jax.random.split(key, self.n))

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        self._check(params)
        keys, every = self._keys(key), self._every
        if every is None:
            return self._run(self.n, params, x, keys, keep=True)
        rest, whole = self._segments((params, keys), every)
        if rest is not None:
            x, _ = self._run(self.n % every, rest[0], x, rest[1], keep=False)

        def segment(x: Any, part: Any) -> tuple[Any, Any]:
            return self._run(every, part[0], x, part[1], keep=False)[0], x

        y, starts = lax.scan(segment, x, whole, length=self.n // every)
        return y, (starts, key if self.layer.draws else None)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        trees, every = (params, transport, aux), self._every
        self._check(transport, "transport")
        self._check(aux, "aux")
        if every is None:
            delta, found = self._back(self.n, trees, trace.saved, trace.y, delta, collect)
            return delta, _stacked(found)
        starts, key = trace.saved
        rest, whole = self._segments((trees, self._keys(key)), every)

        def again(n: int, trees: Any, keys: Any, x: Any, delta: Any) -> tuple[Any, Any]:
            """One segment: its forward sweep with traces, and its way back."""
            y, kept = self._run(n, trees[0], x, keys, keep=True)
            return self._back(n, trees, kept, y, delta, collect)

        def segment(delta: Any, part: Any) -> tuple[Any, Any]:
            (trees, keys), x = part
            return again(every, trees, keys, x, delta)

        delta, found = lax.scan(segment, delta, (whole, starts), reverse=True)
        found = jax.tree.map(lambda v: v.reshape(v.shape[0] * v.shape[1], *v.shape[2:]), found)
        if rest is not None:
            delta, x = lax.optimization_barrier((delta, trace.x))  # or nothing would be done again
            delta, first = again(self.n % every, rest[0], rest[1], x, delta)
            found = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, found)
        return delta, _stacked(found)

    def invert(self, params: PyTree, y: Any, saved: Any) -> Any:
        def body(y: Any, copy: Any) -> tuple[Any, None]:
            own, kept = copy
            return self.layer.invert(own, y, kept), None

        return lax.scan(body, y, (params, saved[1]), self.n, reverse=True)[0]

    def _run(self, n: int, params: PyTree, x: Any, keys: Any, keep: bool) -> tuple[Any, Any]:
        """n copies forward: the last output; the inputs and what was saved, if they are kept."""
        inputs = keep and not self.layer.inverts and bool(self.layer.reads)

        def body(x: Any, copy: Any) -> tuple[Any, Any]:
            own, key = copy
            with inside("layer", self.layer):
                y, saved = forward(self.layer, own, x, key)
            self._check_same(x, y)
            return y, ((x if inputs else None), saved) if keep else None

        return lax.scan(body, x, (params, keys), n)

    def _back(
        self, n: int, trees: Any, kept: Any, y: Any, delta: Any, collect: Collect
    ) -> tuple[Any, PyTree]:
        """n copies back: dC/dx, and what was collected."""

        def body(carry: Any, copy: Any) -> tuple[Any, Any]:
            delta, y = carry
            (own, transport, aux), (x, saved) = copy
            if self.layer.inverts:
                x = self.layer.invert(own, y, saved)
            with inside("layer", self.layer):
                trace = self.layer.trace(x, y, saved)
                delta, found = backward(self.layer, own, trace, delta, collect, transport, aux)
            return (delta, x if self._reads_y else None), found

        y = y if self._reads_y else None
        (delta, _), found = lax.scan(body, (delta, y), (trees, kept), n, reverse=True)
        return delta, found

    def _keys(self, key: Array | None) -> Array | None:
        return jax.random.split(key, self.n) if key is not None and self.layer.draws else None

    def _segments(self, tree: Any, every: int) -> tuple[Any, Any]:
        """The first, shorter segment (None if there is none), and the others, stacked."""
        rest = self.n % every
        whole = jax.tree.map(lambda v: v[rest:].reshape(self.n // every, every, *v.shape[1:]), tree)
        return (jax.tree.map(lambda v: v[:rest], tree) if rest else None), whole

    def _check(self, tree: PyTree, what: str = "parameter") -> None:
        found = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
        if found - {(self.n,)}:
            raise ValueError(
                f"{self}: every {what} needs an axis of {self.n} copies in front, but "
                f"these have "
                f"{', '.join(str(list(f)) for f in found)}; make them with init"
            )

    def _check_same(self, x: Any, y: Any) -> None:
        ins, outs = (jax.tree.map(lambda v: (v.shape, str(v.dtype)), tree) for tree in (x, y))
        if ins != outs:
            raise ValueError(
                f"{type(self).__name__}: the layer gives {outs} for {ins}; each copy feeds the "
                "next, so that the shape and the dtype must stay"
            )


def _stacked(found: PyTree) -> PyTree:
    """The copies' axis of factored gradients moved into their groups."""
    return jax.tree.map(lambda v: v.stacked() if is_factored(v) else v, found, is_leaf=is_factored)
