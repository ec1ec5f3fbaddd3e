"""What layers refuse, in words that name the fix. Shared by all that have sizes and parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jbackprop.checks import check_params as check_floating_params
from jbackprop.factored import PyTree
from jbackprop.sweep import Layer


def shown(layer: Any, *always: str) -> str:
    """The `repr` of a layer: the values of the fields named, and other options if not default."""
    first = [repr(getattr(layer, name)) for name in always]
    options = (f for f in dataclasses.fields(layer) if f.name not in always)
    changed = (f for f in options if getattr(layer, f.name) != f.default)
    rest = [f"{f.name}={getattr(layer, f.name)!r}" for f in changed]
    return f"{type(layer).__name__}({', '.join(first + rest)})"


def check_array(layer: Layer, x: Any) -> None:
    """Raise unless one example is one array."""
    if not hasattr(x, "dtype"):
        raise TypeError(
            f"{layer} needs one array for an example, not a {type(x).__name__}; behind a FanOut a "
            "join (Add, Multiply, Concatenate, ...) makes one"
        )


def check_floating(layer: Layer, x: Any) -> None:
    """Raise unless one example is an array of floating-point numbers."""
    check_array(layer, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{layer} needs floating-point inputs, not {x.dtype}: use x.astype('float32')"
        )


def check_features(layer: Layer, x: Any, features: int, axes: int = 1) -> None:
    """Raise unless one example has `features` on its last axis, and at least so many axes."""
    check_floating(layer, x)
    if jnp.ndim(x) < axes or x.shape[-1] != features:
        hint = ""
        if jnp.ndim(x) < axes:
            hint = "; a single example needs a batch axis: x[None]"
        elif features in x.shape:
            hint = f"; are they on axis {x.shape.index(features) + 1} of x? Then move them: "
            hint += f"jnp.moveaxis(x, {x.shape.index(features) + 1}, -1)"
        elif features == 1:
            hint = "; is there a single one, without an axis? Then give it one: x[..., None]"
        raise ValueError(
            f"{layer} needs {features} features on the last axis, but one example has the shape "
            f"{x.shape}{hint}"
        )


def check_no_params(layer: Layer, params: PyTree) -> None:
    """Raise unless there are no parameters."""
    if jax.tree.leaves(params):
        raise ValueError(
            f"{layer} has no parameters, so its place in params must be (), but these came: "
            f"{jax.tree.map(jnp.shape, params)}; are they another network's?"
        )


def check_params(layer: Layer, params: PyTree, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise unless params are arrays of these shapes by name; () where there are none."""
    check_floating_params(params)
    found, due = _shapes(params), shapes or ()
    if found != due:
        raise ValueError(
            f"these are not the parameters of {layer}: it needs shapes {due}, not {found}; "
            "make them with init, or pass those that belong to this network"
        )


def _shapes(params: PyTree) -> PyTree:
    if isinstance(params, dict):  # nearly always, and quickly: it is asked whenever one traces
        return {name: jnp.shape(value) for name, value in params.items()}
    return jax.tree.map(jnp.shape, params)
