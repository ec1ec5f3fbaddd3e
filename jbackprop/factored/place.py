"""Where a factored gradient belongs: a parameter, and the way from it to the canonical form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Step = tuple[Any, ...]
"""One step of a `Place`: ("transpose", axes), ("reshape", shape), ("flip", axes), or ("slice",
starts, stops) and optionally strides."""

_STEPS: dict[str, Callable[..., Array]] = {
    "transpose": jnp.transpose,
    "reshape": jnp.reshape,
    "slice": lax.slice,
    "flip": lax.rev,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a factored gradient belongs: a parameter, and the way from it to the canonical form.

    Attributes:
        shape: the shape of one copy of the parameter.
        dtype: the parameter's dtype.
        path: the parameter's name in the network, such as ``layers[2].w``; empty while unknown.
        steps: transposes, reshapes, slices and flips that lead from one copy of the parameter to
            the array (G, feature...) whose gradient the kind holds. None at all: a reshape.
        stack: the leading axes along which copies of the parameter are stacked.
    """

    shape: tuple[int, ...]
    dtype: Any
    path: str = ""
    steps: tuple[Step, ...] = ()
    stack: tuple[int, ...] = ()

    def restore(self, canonical: Array) -> Array:
        """Take (stack * G, feature...) back to the parameter's shape.

        The way there is linear and only moves entries, so that the way back is its transpose; a
        part that a slice leaves out is zero.
        """
        if not self.steps and canonical.shape == self.stack + self.shape:
            return canonical
        if not self.steps:
            return canonical.reshape(self.stack + self.shape)
        parameter = jax.ShapeDtypeStruct(self.shape, canonical.dtype)
        shape = jax.eval_shape(self._there, parameter).shape
        copies = math.prod(self.stack)
        back = jax.linear_transpose(self._there, parameter)
        one = jax.vmap(lambda g: back(g.reshape(shape))[0])
        return one(canonical.reshape(copies, -1)).reshape(self.stack + self.shape)

    def canonical(self, parameter: Array, features: tuple[int, ...]) -> Array:
        """Take an array of the parameter's shape to (stack * G, *features)."""
        copies = self.checked(parameter).reshape(math.prod(self.stack), *self.shape)
        return jax.vmap(self._there)(copies).reshape(-1, *features)

    def checked(self, parameter: Array) -> Array:
        """An array, if it has the parameter's shape."""
        if parameter.shape != self.stack + self.shape:
            raise ValueError(
                f"{self.path or 'a parameter'} has the shape {self.stack + self.shape}, but the "
                f"array for it {parameter.shape}"
            )
        return parameter

    def _there(self, parameter: Array) -> Array:
        for name, *arguments in self.steps:
            parameter = _STEPS[name](parameter, *arguments)
        return parameter


def somewhere(steps: tuple[Step, ...]) -> Place | None:
    """A place of which only the steps are known as yet."""
    return Place((), None, steps=steps) if steps else None


def stacked_place(place: Place | None, depth: int) -> Place | None:
    """The place of `depth` copies, if it is known."""
    return place and dataclasses.replace(place, stack=(depth, *place.stack))
