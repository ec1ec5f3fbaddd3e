"""Layers one after the other."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

from jax import Array

from jbackprop.compose.variadic import Variadic
from jbackprop.factored import PyTree
from jbackprop.sweep import Beheaded, Collect, Trace, backward, forward, inside


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Sequential(Variadic):
    """A chain: each layer's output is the next one's input.

    Forward a^l = f_l(a^{l-1}), backward delta^{l-1} = (df_l/da^{l-1})^T delta^l, layer by layer.
    Every boundary between two layers is stored once, and only where one of the two reads it.

    Params: a tuple with the parameters of each layer, () for a layer that has none.

    Raises:
        ValueError: no layers; params of another network.
        TypeError: something among the layers that is not one.
    """

    chains: ClassVar[bool] = True

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        first = ("x",) if "x" in self.layers[0].reads else ()
        return first + (("y",) if "y" in self.layers[-1].reads else ())

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        own = self.split(params)
        keys = self.keys(key)
        boundaries, saved = [], []
        for i, layer in enumerate(self.layers):
            with inside(f"layers[{i}]", layer):
                x, kept = forward(layer, own[i], x, keys[i])
            boundaries.append(x if self._kept(i) else None)
            saved.append(kept)
        return x, (tuple(boundaries), tuple(saved))

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        boundaries, saved = trace.saved
        ends = (trace.x, *boundaries[:-1], trace.y)
        own, transports, auxes = (self.split(tree) for tree in (params, transport, aux))
        collected: list[PyTree] = []
        for i in reversed(range(len(self.layers))):
            layer = self.layers[i]
            x = ends[i] if "x" in layer.reads else None
            y = ends[i + 1] if "y" in layer.reads else None
            with inside(f"layers[{i}]", layer):
                delta, found = backward(
                    layer,
                    own[i],
                    Trace(x, y, saved[i]),
                    delta,
                    collect,
                    transports[i],
                    auxes[i],
                )
            collected.append(found)
        return delta, tuple(reversed(collected))

    def behead(self, params: PyTree) -> Beheaded:
        if type(self).forward is not Sequential.forward:  # a subclass may compute something else
            return super().behead(params)
        *first, last = self.layers
        *own, own_last = self.split(params)
        with inside(f"layers[{len(first)}]", last):
            body, body_params, w, b, rejoin_last = last.behead(own_last)
        if body is not None:
            first.append(body)
            own.append(body_params)
        if not first:
            return Beheaded(None, (), w, b, lambda _, *head: (rejoin_last((), *head),))

        def rejoin(grads: PyTree, w_grad: Array, b_grad: Any) -> PyTree:
            before, after = (grads, ()) if body is None else (grads[:-1], grads[-1])
            return (*before, rejoin_last(after, w_grad, b_grad))

        return Beheaded(Sequential(*first), tuple(own), w, b, rejoin)

    def _kept(self, i: int) -> bool:
        """Whether the boundary behind layer i is stored here; the ends are the caller's."""
        if i + 1 == len(self.layers):
            return False
        return "y" in self.layers[i].reads or "x" in self.layers[i + 1].reads
