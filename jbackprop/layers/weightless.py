"""What layers without parameters share."""

from __future__ import annotations

from typing import Any, ClassVar

from jax import Array

from jbackprop.factored import PyTree
from jbackprop.layers.checks import check_array, check_floating, check_no_params
from jbackprop.sweep import Layer


class Weightless(Layer):
    """A layer without parameters: init gives ().

    Attributes:
        moves: whether it only moves entries, and so takes integers too (which have no delta).
    """

    moves: ClassVar[bool] = False

    def init(self, key: Array) -> tuple[()]:
        return ()

    def _check(self, params: PyTree, x: Any) -> None:
        check_no_params(self, params)
        (check_array if self.moves else check_floating)(self, x)
