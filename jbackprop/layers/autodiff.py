"""A layer whose rule nobody has derived yet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from jax import Array

from jbackprop.checks import check_functions
from jbackprop.factored import Full, PyTree
from jbackprop.sweep import Layer, Trace


def _no_params(key: Array) -> tuple[()]:
    return ()


@dataclasses.dataclass(frozen=True)
class Autodiff(Layer):
    """Any function of one example as a layer, its rule taken from `jax.vjp`.

    The fallback: the gradient of a parameter is of the kind `Full`, a copy of the parameter for
    every example. The forward pass is computed again on the way back. A transport is refused,
    since a general function does not tell the weights that carry the delta from those it reads.

    Attributes:
        apply: (params, x) -> y for one example, floating-point x and y.
        init_params: key -> params; none by default.

    Raises:
        TypeError: what is no function.
        ValueError: a transport for it.
    """

    apply: Callable[[PyTree, Any], Any]
    init_params: Callable[[Array], PyTree] = _no_params

    reads: ClassVar[tuple[str, ...]] = ("x",)
    takes_transport: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_functions(self, "apply", "init_params")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({getattr(self.apply, '__name__', self.apply)})"

    def init(self, key: Array) -> PyTree:
        return self.init_params(key)

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, None]:
        return self.apply(params, x), None

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        _, back = jax.vjp(self.apply, params, trace.x)
        grads, delta_x = back(delta)
        why = f"{self}: no factored rule, taken from jax.vjp"
        return delta_x, jax.tree.map(lambda g: Full(g, why), grads)
