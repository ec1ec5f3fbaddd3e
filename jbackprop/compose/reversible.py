"""Reversible pairs of layers, whose input is recovered from their output."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_key
from jbackprop.compose.checks import check_layers
from jbackprop.factored import PyTree
from jbackprop.sweep import Collect, Composite, Node, Trace, backward, forward, inside, keys_for


@dataclasses.dataclass(frozen=True)
class Reversible(Composite):
    """Additive coupling: the input is in two halves, and each shifted by the other.

        y_1 = x_1 + f(x_2)        y_2 = x_2 + g(y_1)

    It undoes itself without inverting f or g, so that nothing at all need be kept but the output:

        x_2 = y_2 - g(y_1)        x_1 = y_1 - f(x_2)

    Derivation. y_1 reaches the cost by itself and through y_2, x_2 by itself and through y_1:

        dC/dx_1 = delta_1 + (dg/dy_1)^T delta_2 =: e        dC/dx_2 = delta_2 + (df/dx_2)^T e

    The forward sweeps of f and g that recover x are those that their rules read. Recovering rounds:
    the gradients of a deep stack of copies agree with autodiff's to about 1e-5 of their size in
    float32 (1e-12 in float64 as long as f and g do not blow up), not to the last digit.

    Source: Gomez, Ren, Urtasun and Grosse, The reversible residual network (2017), equations 6 to 8
    and algorithm 1; Dinh, Krueger and Bengio, NICE (2014), section 3.2.

    Params: a tuple (f's, g's).

    Attributes:
        f: from the second half to a shift of the first.
        g: from the new first half to a shift of the second.

    Shapes: x (..., 2 h), halves along the last axis; or a tuple of two arrays, and y one, too.

    Raises:
        ValueError: an odd number of features; f or g that do not keep the shape of a half.
        TypeError: f or g that is no layer.
    """

    f: Node
    g: Node

    reads: ClassVar[tuple[str, ...]] = ("y",)
    inverts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_layers(self, f=self.f, g=self.g)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.f}, {self.g})"

    def opened(self) -> Composite:
        return _Open(self.f, self.g)

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{type(self).__name__}.init: key")
        keys = jax.random.split(key)
        return self.f.init(keys[0]), self.g.init(keys[1])

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        y, _ = self._coupled(params, x, key)
        return y, key if self.draws else None

    def invert(self, params: PyTree, y: Any, saved: Any) -> Any:
        return _whole(self._recovered(params, y, saved)[0], y)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        _, (f_trace, g_trace) = self._recovered(params, trace.y, trace.saved)
        delta_1, delta_2 = _halves(delta)
        own, transports, auxes = (self.split(tree) for tree in (params, transport, aux))
        with inside("g", self.g):
            way, in_g = backward(self.g, own[1], g_trace, delta_2, collect, transports[1], auxes[1])
        e = jax.tree.map(jnp.add, delta_1, way)
        with inside("f", self.f):
            way, in_f = backward(self.f, own[0], f_trace, e, collect, transports[0], auxes[0])
        return _whole((e, jax.tree.map(jnp.add, delta_2, way)), delta), (in_f, in_g)

    def _coupled(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        """y, and what f and g saved."""
        (x_1, x_2), keys = _halves(x), keys_for((self.f, self.g), key)
        in_f, in_g = self.split(params)
        with inside("f", self.f):
            shift, f_saved = forward(self.f, in_f, x_2, keys[0])
            y_1 = _shifted(jnp.add, x_1, shift)
        with inside("g", self.g):
            shift, g_saved = forward(self.g, in_g, y_1, keys[1])
            y_2 = _shifted(jnp.add, x_2, shift)
        return _whole((y_1, y_2), x), (f_saved, g_saved)

    def _recovered(self, params: PyTree, y: Any, key: Array | None) -> tuple[Any, Any]:
        """(x_1, x_2), and the traces of f and g."""
        (y_1, y_2), keys = _halves(y), keys_for((self.f, self.g), key)
        in_f, in_g = self.split(params)
        g_out, g_saved = forward(self.g, in_g, y_1, keys[1])
        x_2 = _shifted(jnp.subtract, y_2, g_out)
        f_out, f_saved = forward(self.f, in_f, x_2, keys[0])
        x_1 = _shifted(jnp.subtract, y_1, f_out)
        traces = self.f.trace(x_2, f_out, f_saved), self.g.trace(y_1, g_out, g_saved)
        return (x_1, x_2), traces


class _Open(Reversible):
    """A coupling that keeps what f and g save, for looking in."""

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        return self._coupled(params, x, key)

    def backward(self, *_: Any) -> tuple[Any, PyTree]:
        raise NotImplementedError("opened for the forward sweep only")


def _halves(x: Any) -> tuple[Any, Any]:
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ValueError(f"Reversible needs two halves, not a tuple of {len(x)}")
        return x
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(
            f"Reversible needs an even number of features on the last axis, not {x.shape} (B, ...)"
        )
    return tuple(jnp.split(x, 2, axis=-1))  # type: ignore[return-value]


def _whole(halves: tuple[Any, Any], like: Any) -> Any:
    return halves if isinstance(like, tuple) else jnp.concatenate(halves, axis=-1)


def _shifted(add: Any, x: Any, shift: Any) -> Any:
    if jax.tree.map(jnp.shape, x) != jax.tree.map(jnp.shape, shift):
        raise ValueError(
            f"Reversible: from a half of shape {jax.tree.map(jnp.shape, x)} (B, ...) comes "
            f"{jax.tree.map(jnp.shape, shift)}: f and g must keep the shape"
        )
    return jax.tree.map(add, x, shift)
