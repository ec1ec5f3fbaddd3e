"""What layers without parameters share."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes and dtypes of one example's input, for a backward that reads nothing else of it.

    They are part of the program, not of the trace: nothing is kept.

    Attributes:
        tree: the structure of the input.
        leaves: its arrays, without their values.
    """

    tree: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]

    @classmethod
    def of(cls, x: Any) -> Shapes:
        """Those of x."""
        leaves, tree = jax.tree.flatten(x)
        shapes = (jax.ShapeDtypeStruct(jnp.shape(v), jnp.result_type(v)) for v in leaves)
        return cls(tree, tuple(shapes))

    @property
    def back(self) -> Any:
        """x's structure, with shapes and dtypes in the place of its arrays."""
        return jax.tree.unflatten(self.tree, self.leaves)
