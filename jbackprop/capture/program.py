"""Tracing the cost of one example, and planning what is to be captured of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.capture import uses
from jbackprop.capture.operations import Known
from jbackprop.capture.parts import of_leaf
from jbackprop.capture.plan import Plan, Planner
from jbackprop.capture.uses import Use
from jbackprop.checks import check_leaves
from jbackprop.factored import PyTree


@dataclasses.dataclass
class Program:
    """The cost of one example, traced and planned.

    Attributes:
        params: the parameters' leaves.
        tree: their structure.
        paths: their names.
        batch: the leaves of the mini-batch, (B, ...).
        n: B.
        plan: how it is to be run.
        aux: the structure of what comes with the cost.
    """

    params: list[Array]
    tree: Any
    paths: list[str]
    batch: list[Array]
    n: int
    plan: Plan
    aux: Any

    def of(self, leaf: int) -> list[Use]:
        """The uses of one parameter."""
        return [use for use in self.plan.uses if use.part.leaf == leaf]


def traced(
    cost: Callable[..., Any],
    has_aux: bool,
    params: PyTree,
    batch: Sequence[Any],
    outputs: bool = False,
) -> Program:
    """Trace the cost of one example, and plan it; or, with `outputs`, a model's output array.

    Raises:
        TypeError, ValueError: as `capture`.
    """
    if not callable(cost):
        raise TypeError(f"cost must be a function (params, *example) -> scalar, not {cost!r}")
    named, tree = jax.tree_util.tree_flatten_with_path(params)
    paths = ["params" + jax.tree_util.keystr(path) for path, _ in named]
    leaves = [parameter(path, leaf) for path, (_, leaf) in zip(paths, named, strict=True)]
    moving, batch_tree, n = _examples(batch)
    aux_trees: list[Any] = []

    def flat(leaves: list[Array], moving: list[Array]) -> list[Any]:
        example = jax.tree.unflatten(batch_tree, moving)
        found = cost(jax.tree.unflatten(tree, leaves), *example)
        value, aux = _parted(found, has_aux)
        leaves, aux_tree = jax.tree.flatten(aux)
        aux_trees.append(aux_tree)
        return [_array(value) if outputs else _scalar(value), *leaves]

    one = [_like(v, 1) for v in moving]
    try:
        closed = jax.make_jaxpr(flat)([_like(v) for v in leaves], one)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"cost reduces over an axis of examples ({error}), so that it is not the cost of one "
            "example: what couples the examples, such as a batch norm in training, has no gradient "
            "of one of them. Use its running statistics (inference mode), or another norm"
        ) from error
    except (TypeError, ValueError) as error:
        shapes = ", ".join(f"{v.dtype}{list(v.shape)}" for v in one)
        error.add_note(
            "jbackprop.capture calls cost(params, *example) with one example at a time, without "
            f"the axis of the mini-batch: {shapes}. If the model wants that axis, wrap it: give it "
            "x[None], and take [0] of what it gives"
        )
        raise
    planner = Planner()
    known = [Known((of_leaf(k, v.shape),) if v.size else ()) for k, v in enumerate(leaves)]
    known += [Known(data=True) for _ in moving]
    plan, out = planner.plan(closed.jaxpr, closed.consts, known)
    result = closed.jaxpr.outvars[0]
    plan.last = [planner.add(uses.shift(part, "result"), result) for part in out[0].parts]
    plan.uses = planner.uses
    return Program(leaves, tree, paths, moving, n, plan, aux_trees[-1])


def _like(v: Array, axis: int = 0) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape[axis:], v.dtype, weak_type=getattr(v, "weak_type", False))


def parameter(path: str, leaf: Any) -> Array:
    """A parameter as an array; raises for what is none."""
    if not hasattr(leaf, "dtype") and not isinstance(leaf, float):
        raise TypeError(
            f"{path} is {leaf!r}: parameters must be arrays of floating-point numbers. Keep "
            "what is no array out of params, and close cost over it (Equinox: eqx.partition(model, "
            "eqx.is_inexact_array); Flax: nnx.split(model, nnx.Param, ...))"
        )
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(float)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path} has the dtype {dtype}: parameters must be real floating-point "
            "numbers. Keep counters, keys and the like out of params, and close cost over them, or "
            "give them with the batch"
        )
    array = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
    return array  # type: ignore[return-value]


def _examples(batch: Sequence[Any]) -> tuple[list[Array], Any, int]:
    named, tree = jax.tree_util.tree_flatten_with_path(tuple(batch))
    sizes: dict[str, int] = {}
    arrays: list[Any] = []
    for path, leaf in named:
        name = "batch" + jax.tree_util.keystr(path)
        check_leaves(name, leaf if hasattr(leaf, "dtype") else np.asarray(leaf))
        array = leaf if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else jnp.asarray(leaf)
        if not isinstance(array, jax.Array | jax.ShapeDtypeStruct):
            array = jnp.asarray(array)
        if not array.ndim:
            raise ValueError(
                f"{name} has no axis of examples: what is the same for all of them belongs into "
                "cost (functools.partial, or a closure)"
            )
        sizes[name] = array.shape[0]
        arrays.append(array)
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{name}: {n}" for name, n in sizes.items())
        raise ValueError(
            "the arrays of the batch must have one axis in front for the examples, of one length; "
            f"found {found or 'no arrays'}"
        )
    return arrays, tree, next(iter(sizes.values()))


def _parted(found: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return found, ()
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError("with has_aux, cost must give (cost, aux), a pair")
    return found


def _array(value: Any) -> Array:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.asarray(value)
    what = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else type(value).__name__
    raise TypeError(
        "a model must give one array of floating-point numbers for one example, the loss's input "
        f"z, not {what}"
    )


def _scalar(value: Any) -> Array:
    shape, remedy = None, ""
    if isinstance(value, tuple):
        remedy = "; for (cost, aux) say has_aux=True"
    elif hasattr(value, "shape") or isinstance(value, float | int):
        value = jnp.asarray(value)
        shape = value.shape
        if shape == () and jnp.issubdtype(value.dtype, jnp.floating):
            return value
        if shape == (1,):
            remedy = ": take [0] of what the batched model gives"
    what = type(value).__name__ if shape is None else f"{value.dtype}{list(shape)}"
    raise TypeError(
        "cost must give one floating-point number for one example, not "
        f"{what}{remedy}. A cost of a whole mini-batch is none: examples that meet have no "
        "gradient of their own"
    )
