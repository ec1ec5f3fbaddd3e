"""Saturated and dead units."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.calls import check_inputs
from jbackprop.checks import number_of
from jbackprop.factored import PyTree
from jbackprop.layers import Elementwise, Identity
from jbackprop.mesh import on_mesh
from jbackprop.observe import Observed, Seen, seen, seen_split
from jbackprop.structure import by_copy, layers_by_copy, walk
from jbackprop.sweep import Layer, Node, Trace
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class Saturation:
    """Of one layer of units: how many of them pass (almost) no delta.

    Attributes:
        path: the layer.
        layer: its configuration, printed.
        saturated: the share of (example, unit) pairs with |f'(z)| below the threshold.
        dead: the share of units with f'(z) = 0 for every example of the batch.
        units: the number of units.
    """

    path: str
    layer: str
    saturated: float
    dead: float
    units: int


class SaturationTable(tuple[Saturation, ...]):
    """One `Saturation` for each layer of units. Printed, it is a table."""

    def __str__(self) -> str:
        rows = [
            (s.path, s.layer, str(s.units), f"{s.saturated:.1%}", f"{s.dead:.1%}") for s in self
        ]
        return render(("layer", "", ">units", ">saturated", ">dead"), rows)


def saturation(net: Node, params: PyTree, x: Any, threshold: float = 0.05) -> SaturationTable:
    """Saturated and dead units of every elementwise activation.

    Args:
        net: a layer or a composite.
        params: its parameters.
        x: a mini-batch, (B, ...).
        threshold: |f'| below it counts as saturated.

    Returns:
        A `Saturation` for each layer of elementwise units but `Identity`, first layer first.

    Raises:
        ValueError: a threshold that is not positive.
    """
    check_inputs(net, params, x)
    threshold = number_of(threshold, "threshold", above=0)
    slopes = _slopes(net, params, x)
    names = {path: repr(layer) for path, layer in layers_by_copy(net).items()}
    found = []
    for path, slope in by_copy(net, slopes).items():
        slope = jnp.abs(slope).reshape(slope.shape[0], -1)
        found.append(
            Saturation(
                path,
                names[path],
                float(jnp.mean(slope < threshold)),
                float(jnp.mean(jnp.all(slope == 0, axis=0))),
                slope.shape[1],
            )
        )
    return SaturationTable(found)


def _split(net: Node, params: PyTree, x: Any) -> dict[str, Any]:
    every = seen_split(net, params, x)
    return {path: every[path] for path, layer, _ in walk(net) if has_slope(layer)}


@on_mesh(_split)
@functools.partial(jax.jit, static_argnums=0)
def _slopes(net: Node, params: PyTree, x: Any) -> dict[str, Array]:
    """f' of every unit: the rule's own product with a delta of ones."""

    def sloped(layer: Layer, path: str) -> Node:
        return _Sloped(layer, path) if has_slope(layer) else layer

    return seen(net, params, x, sloped)


def has_slope(layer: Layer) -> bool:
    """Whether it is one of units, of which f' is of interest."""
    return isinstance(layer, Elementwise) and not isinstance(layer, Identity)


def slope_of(layer: Layer, params: PyTree, trace: Trace) -> Array:
    """f'(z) of every unit for one example: the rule's own product with a delta of ones."""
    return layer.backward(params, trace, jnp.ones_like(trace.y))[0]


@dataclasses.dataclass(frozen=True, repr=False)
class _Sloped(Observed):
    """A layer that saves its slope, for the forward sweep only."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        y, saved = self.inner.forward(params, x, key)
        return y, Seen(slope_of(self.inner, params, Trace(x, y, saved)), self.path)
