"""A mini-batch of which something is asked before its pairs are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jbackprop.capture.pairs import home_of
from jbackprop.capture.program import Program, traced
from jbackprop.capture.sweep import run
from jbackprop.factored import PyTree


@dataclasses.dataclass(frozen=True)
class DeferredCapture:
    """A mini-batch whose pairs are contracted as they are born, whenever something is asked.

    Made by `capture.deferred`. A pytree, to be passed through `jax.jit`.
    """

    params: PyTree
    batch: tuple[Any, ...]
    cost: Callable[..., Any]
    has_aux: bool
    size: int

    def _program(self) -> Program:
        return traced(self.cost, self.has_aux, self.params, self.batch)

    def collect(self, f: Callable[..., Any], aux: PyTree = None) -> PyTree:
        """f(pair, its part of aux) of each copy of every parameter, stacked in front."""
        program = self._program()
        return jax.tree.unflatten(program.tree, run(program, f, aux)[2])

    def homes(self) -> tuple[PyTree, PyTree]:
        """Trees like params: the `Place` of each pair, and whether there is a pair at all."""
        program = self._program()
        found = [program.of(k) for k in range(len(program.params))]
        homes = map(home_of, found, program.params, program.paths)
        return (
            jax.tree.unflatten(program.tree, homes),
            jax.tree.unflatten(program.tree, map(bool, found)),
        )

    def replaced(self, batch: tuple[Any, ...]) -> DeferredCapture:
        """The same with other examples."""
        n = jax.tree.leaves(batch)[0].shape[0]
        return dataclasses.replace(self, batch=batch, size=n)


jax.tree_util.register_dataclass(DeferredCapture, ["params", "batch"], ["cost", "has_aux", "size"])
