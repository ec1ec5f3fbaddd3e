"""Doing the forward sweep again rather than keeping what it makes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.compose.checks import check_layers
from jbackprop.factored import PyTree
from jbackprop.sweep import Collect, Composite, Node, Trace, backward, forward, inside


@dataclasses.dataclass(frozen=True)
class Checkpoint(Composite):
    """The layer inside, of which only the input is kept (and the output, if it is read).

    Inside a `Repeat` that is what is kept; in a chain that is not scanned the compiler may put off
    gradients of weights, and then keeps longer what they are made of.

    Nothing changes in the numbers. On the way back the forward sweep is done again from x, and what
    it makes is gone when the layer is done. What of it backward does not read is never computed
    again: of `Checkpoint(Sequential(Gelu(), Dense(p, q)))` only the gelu is, since Dense does not
    read its own output.

    Source: Griewank and Walther, Algorithm 799: revolve (2000); Chen, Xu, Zhang and Guestrin,
    Training deep nets with sublinear memory cost (2016), section 3.

    Params: those of the layer inside.

    Attributes:
        layer: a layer or a composite.

    Raises:
        TypeError: something that is no layer.
    """

    layer: Node

    chains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_layers(self, layer=self.layer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layer})"

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return ("x", "y") if "y" in self.layer.reads else ("x",)

    def keys(self, key: Array | None) -> list[Array | None]:
        return [key if self.layer.draws else None]

    def opened(self) -> Composite:
        return _Open(self.layer)

    def init(self, key: Array) -> PyTree:
        return self.layer.init(key)

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        with inside("layer", self.layer):
            y, _ = forward(self.layer, params, x, key)
        return y, key if self.layer.draws else None

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        x, delta = after(trace.x, delta)
        with inside("layer", self.layer):
            y, saved = forward(self.layer, params, x, trace.saved)
            y = trace.y if "y" in self.layer.reads else y
            return backward(
                self.layer, params, self.layer.trace(x, y, saved), delta, collect, transport, aux
            )


def after(x: Any, delta: Any) -> tuple[Any, Any]:
    """x and delta as they are, but x not before delta is there.

    Without the barrier the compiler would find that it has all that is to be done again already,
    and keep it. On the CPU it drops barriers before it schedules, and might then do the work again
    early: so x is made to depend on delta, in a way that is always true and never known to be.
    Every entry depends on that in its own place where there is one, or else on its own example's
    first: where they are spread over devices, nothing is sent for it. Where several deltas are
    swept at once (under `jax.vmap`), on the first of them: the work is done once.
    """
    x, delta = lax.optimization_barrier((x, delta))
    first = next((d for d in jax.tree.leaves(delta) if d.size), None)
    if first is None:
        return x, delta

    def once_there(v: Array) -> Array:
        at = first if first.shape == v.shape else first[:, *(0,) * (first.ndim - 1)]
        there = _always(lax.stop_gradient(at))
        there = there.reshape(there.shape + (1,) * (v.ndim - there.ndim))
        return jnp.where(there, v, jnp.zeros_like(v))

    return jax.tree.map(once_there, x), delta


@jax.custom_batching.custom_vmap
def _always(numbers: Array) -> Array:
    """True, once the numbers are known."""
    return (lax.bitcast_convert_type(numbers, f"int{8 * numbers.dtype.itemsize}") | 1) != 0


@_always.def_vmap
def _of_the_first(size: int, batched: Any, numbers: Array) -> tuple[Array, bool]:
    return _always(numbers[0]), False


class _Open(Checkpoint):
    """A checkpoint that keeps all, and so does nothing again."""

    @property
    def reads(self) -> tuple[str, ...]:
        return self.layer.reads

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        with inside("layer", self.layer):
            return forward(self.layer, params, x, key)

    def backward(self, params: PyTree, *args: Any) -> tuple[Any, PyTree]:
        with inside("layer", self.layer):
            return backward(self.layer, params, *args)
