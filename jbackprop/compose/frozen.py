"""Layers that do not learn."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.compose.checks import check_layers
from jbackprop.factored import Nothing, PyTree, is_factored
from jbackprop.sweep import Beheaded, Collect, Composite, Node, Trace, backward, forward, inside


@dataclasses.dataclass(frozen=True)
class Frozen(Composite):
    """The layer inside, without gradients of its own; the delta passes through it as ever.

    Its gradients are zeros (of the kind `Nothing`), so that no question about the gradient counts
    it; `jax.grad` of the forward sweep gives zeros, too. `fit` leaves its parameters as they are.
    In a loop of one's own weight decay would still change them: hand `trainable_mask` to
    `optax.masked`.

    Params: those of the layer inside.

    Attributes:
        layer: a layer or a composite.

    Raises:
        TypeError: something that is no layer.
    """

    layer: Node

    learns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_layers(self, layer=self.layer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layer})"

    @property
    def reads(self) -> tuple[str, ...]:
        return self.layer.reads

    @property
    def inverts(self) -> bool:  # type: ignore[override]
        return self.layer.inverts

    def init(self, key: Array) -> PyTree:
        return self.layer.init(key)

    def invert(self, params: PyTree, y: Any, saved: Any) -> Any:
        return self.layer.invert(params, y, saved)

    def behead(self, params: PyTree) -> Beheaded:
        with inside("layer", self.layer):
            found = self.layer.behead(params)
        body = None if found.body is None else Frozen(found.body)
        return found._replace(body=body, rejoin=lambda *_: jax.tree.map(jnp.zeros_like, params))

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        with inside("layer", self.layer):
            return forward(self.layer, lax.stop_gradient(params), x, key)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        def nothing(factored: PyTree, delta: Any, aux: Any) -> PyTree:
            none = jax.tree.map(Nothing.like, factored, is_leaf=is_factored)
            return collect(none, delta, aux)

        with inside("layer", self.layer):
            return backward(self.layer, params, trace, delta, nothing, transport, aux)
