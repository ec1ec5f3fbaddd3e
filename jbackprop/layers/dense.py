"""The fully connected layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import initializers

from jbackprop.checks import check_flags, check_functions, check_key, check_sizes
from jbackprop.factored import Outer, PyTree, Shift
from jbackprop.layers.checks import check_floating, check_params
from jbackprop.sweep import Beheaded, Layer, Trace

Init = Callable[[Array, tuple[int, ...], Any], Array]
"""An initialiser (key, shape, dtype) -> array, as in `jax.nn.initializers`."""

_glorot = initializers.glorot_uniform()


def glorot_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Glorot and Bengio (2010), equation 16, as a function that pickles."""
    return _glorot(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Dense(Layer):
    """The net inputs of a fully connected layer.

    Equation, for one example:

        z_o = sum_i x_i w_io + b_o                                  x (..., p) -> z (..., q)

    Derivation. Let delta_o = dC/dz_o. Every x_i reaches the cost through all z_o, so that

        dC/dx_i  = sum_o dC/dz_o dz_o/dx_i = sum_o delta_o w_io,    dC/dx = delta W^T
        dC/dw_io = delta_o dz_o/dw_io      = x_i delta_o,           dC/dW = x (outer) delta
        dC/db_o  = delta_o dz_o/db_o       = delta_o,               dC/db = delta

    Where x has leading axes, they are positions that share the weights, and the last two are sums
    over them: that is what the kinds `Outer` and `Shift` stand for.

    Source: Rumelhart, Hinton and Williams, Learning representations by back-propagating errors,
    Nature 323 (1986), equations 4 to 7.

    Params: ``{"w": (p, q), "b": (q,)}``; without a bias ``{"w": (p, q)}``.

    Attributes:
        p: the number of inputs.
        q: the number of outputs.
        bias: whether there is a b.
        w_init: initialiser of w, by default Glorot and Bengio's (2010) uniform one.
        b_init: initialiser of b, by default zeros.

    Raises:
        ValueError: sizes below 1; inputs or parameters of another shape.
        TypeError: inputs that are not floating-point numbers; a flag that is no bool.
    """

    p: int
    q: int
    bias: bool = True
    w_init: Init = glorot_uniform
    b_init: Init = initializers.zeros

    reads = ("x",)

    def __post_init__(self) -> None:
        check_sizes(self, "p", "q")
        check_flags(self, "bias")
        check_functions(self, "w_init", "b_init")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.p}, {self.q}{'' if self.bias else ', bias=False'})"

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{self}.init: key")
        key_w, key_b = jax.random.split(key)
        dtype = jnp.result_type(float)
        params = {"w": self.w_init(key_w, (self.p, self.q), dtype)}
        if self.bias:
            params["b"] = self.b_init(key_b, (self.q,), dtype)
        return params

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        self._check(params, x)
        z = jnp.dot(x, params["w"])
        if self.bias:
            z = z + (params["b"] if z.ndim == 1 else jnp.broadcast_to(params["b"], z.shape))
        return z, None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, PyTree]:
        x = trace.x
        last = delta.ndim - 1
        if delta.shape[-1:] != (self.q,):
            raise ValueError(f"{self}: delta must end in {self.q} entries, not {delta.shape}")
        delta_x = lax.dot_general(
            delta, params["w"].astype(delta.dtype), (((last,), (1,)), ((), ()))
        )
        factored: dict[str, Any] = {"w": Outer.of(x, delta)}
        if self.bias:
            factored["b"] = Shift.of(delta)
        return delta_x.astype(x.dtype), factored

    def behead(self, params: PyTree) -> Beheaded:
        if type(self).forward is not Dense.forward:  # a subclass may compute something else
            return super().behead(params)

        def rejoin(_: PyTree, w_grad: Array, b_grad: Any) -> PyTree:
            return {"w": w_grad} | ({"b": b_grad} if self.bias else {})

        return Beheaded(None, (), params["w"], params.get("b"), rejoin)

    def _check(self, params: PyTree, x: Array) -> None:
        check_floating(self, x)
        if jnp.ndim(x) == 0 or x.shape[-1] != self.p:
            hint = (
                "; flatten each example first: x.reshape(len(x), -1)"
                if x.size == self.p
                else "; a single example needs a batch axis: x[None]"
                if jnp.ndim(x) == 0
                else ""
            )
            raise ValueError(
                f"{self} needs {self.p} features on the last axis, but one example has the shape "
                f"{x.shape}{hint}"
            )
        check_params(self, params, self._shapes)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (self.p, self.q)} | ({"b": (self.q,)} if self.bias else {})
