"""Layers side by side."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.compose.variadic import Variadic
from jbackprop.factored import PyTree
from jbackprop.sweep import Collect, Trace, backward, forward, inside, keys_for


class _SideBySide(Variadic):
    """The y is a tuple with the output of every branch."""

    @abc.abstractmethod
    def _inputs(self, x: Any) -> tuple[Any, ...]:
        """The input of each branch."""

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        read = [name for layer in self.layers for name in layer.reads]
        return tuple(name for name in ("x", "y") if name in read)

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        xs, own, keys = self._inputs(x), self.split(params), keys_for(self.layers, key)
        ys, saved = [], []
        for i, layer in enumerate(self.layers):
            with inside(f"layers[{i}]", layer):
                y, kept = forward(layer, own[i], xs[i], keys[i])
            ys.append(y)
            saved.append(kept)
        return tuple(ys), tuple(saved)

    def _back(
        self, params: PyTree, trace: Trace, delta: Any, collect: Collect, transport: PyTree,
        aux: PyTree,
    ) -> tuple[list[Any], PyTree]:  # fmt: skip
        """dC/dx of every branch, and what was collected."""
        number = len(self.layers)
        if not isinstance(delta, tuple) or len(delta) != number:
            raise ValueError(
                f"{type(self).__name__} of {number} branches gives a tuple of {number} outputs, so "
                f"that its delta is one, too, not {jax.tree.map(jnp.shape, delta)}; put a join "
                "(Add, Multiply, Concatenate, ...) behind it to make one array"
            )
        xs = (None,) * number if trace.x is None else self._inputs(trace.x)
        ys = (None,) * number if trace.y is None else trace.y
        own, transports, auxes = (self.split(tree) for tree in (params, transport, aux))
        deltas_x: list[Any] = []
        collected: list[PyTree] = []
        for i, layer in enumerate(self.layers):
            if delta[i] is None and not jax.tree.leaves(own[i]):  # an output of integers
                deltas_x.append(None)
                collected.append(own[i])
                continue
            with inside(f"layers[{i}]", layer):
                delta_x, found = backward(
                    layer, own[i], layer.trace(xs[i], ys[i], trace.saved[i]), delta[i], collect,
                    transports[i], auxes[i],
                )  # fmt: skip
            deltas_x.append(delta_x)
            collected.append(found)
        return deltas_x, tuple(collected)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class FanOut(_SideBySide):
    """One input for several branches: y = (f_1(x), f_2(x), ...), a tuple.

    Derivation. x reaches the cost through every branch, so that its delta is the sum of theirs:

        dC/dx = sum_i (df_i/dx)^T delta_i

    A join behind it makes one array of the tuple: `Add`, `Multiply`, `Concatenate`, `Maximum`. A
    gated unit is `Sequential(FanOut(Dense(p, q), Sequential(Dense(p, q), Sigmoid())), Multiply())`.

    Params: a tuple with the parameters of each branch.

    Raises:
        ValueError: no branches; params of another network.
        TypeError: something among the branches that is no layer.
    """

    def _inputs(self, x: Any) -> tuple[Any, ...]:
        return (x,) * len(self.layers)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        deltas_x, collected = self._back(params, trace, delta, collect, transport, aux)
        ways = [way for way in deltas_x if way is not None]
        delta_x = jax.tree.map(lambda *d: functools.reduce(jnp.add, d), *ways) if ways else None
        return delta_x, collected


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Parallel(_SideBySide):
    """A layer for each part of the input: y = (f_1(x_1), f_2(x_2), ...), both tuples.

    Derivation. x_i reaches the cost through y_i alone: dC/dx_i = (df_i/dx_i)^T delta_i.

    Params: a tuple with the parameters of each layer.

    Raises:
        ValueError: no layers; an input that is not a tuple of as many parts; params of another
            network.
        TypeError: something among the layers that is no layer.
    """

    def _inputs(self, x: Any) -> tuple[Any, ...]:
        number = len(self.layers)
        if not isinstance(x, tuple) or len(x) != number:
            raise ValueError(
                f"Parallel of {number} layers needs a tuple of {number} inputs, not "
                f"{jax.tree.map(jnp.shape, x)}; to hand one input to all of them use FanOut"
            )
        return x

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        deltas_x, collected = self._back(params, trace, delta, collect, transport, aux)
        return tuple(deltas_x), collected
