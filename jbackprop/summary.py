"""The table of a network's layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jbackprop.calls import check_net
from jbackprop.checks import check_arrays, shape_of
from jbackprop.factored import PyTree
from jbackprop.observe import activations
from jbackprop.structure import copies, suffix, walk
from jbackprop.sweep import Node
from jbackprop.table import render


def count(params: PyTree) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def summary(net: Node, x_shape: tuple[int, ...] | None = None, *, x: Any = None) -> str:
    """The layers of a network as a table: path, layer, shapes of its parameters, their number.

    Args:
        net: a layer or a composite.
        x_shape: the shape of one example's input of floating-point numbers; with it the outputs'
            shapes are shown, and whether the layers fit together is checked.
        x: the same for any other input, such as tokens or a tuple: an example of a mini-batch,
            (B, ...), or its `jax.ShapeDtypeStruct`s.

    Returns:
        The table, to be printed. Nothing is computed: shapes only.

    Raises:
        ValueError: layers that do not fit together, at the place where they do not; both x_shape
            and x.
    """
    if x_shape is not None and x is not None:
        raise ValueError("give x_shape, the shape of one example, or x, a mini-batch: not both")
    check_net(net)
    if x is not None:
        check_arrays("x", x)
    params = jax.eval_shape(net.init, jax.random.key(0))
    shown: dict[str, str] = {}  # by path, its first copy's
    number: dict[str, int] = {}
    for name, path, _ in copies(net):
        shown.setdefault(path, name)
        number[path] = number.get(path, 0) + 1
    outputs = {}
    if x_shape is not None:
        try:
            shape = shape_of(x_shape, "x_shape")
        except (TypeError, ValueError) as error:
            error.add_note("for several inputs, or for tokens, give x=, a mini-batch")
            raise
        x = jax.ShapeDtypeStruct((1, *shape), jnp.result_type(float))
    if x is not None:
        try:
            outputs = jax.eval_shape(functools.partial(activations, net), params, x)
        except TypeError as error:
            if x_shape is not None:
                error.add_note("x_shape stands for floating-point inputs; for tokens give x=tokens")
            raise
    rows = []
    for path, layer, own in walk(net, params):
        named, _ = jax.tree_util.tree_flatten_with_path(own)
        shapes = ", ".join(
            f"{suffix(where).removeprefix('.')} {leaf.shape}" for where, leaf in named
        )
        output = outputs.get(shown[path])
        seen = "" if output is None else _shapes(output)
        times = f" x {number[path]}" if number[path] > 1 else ""
        rows.append((path, repr(layer) + times, seen, shapes, f"{count(own):,}" if named else ""))
    rows.append(("total", "", "", "", f"{count(params):,}"))
    columns = ["layer", "", "output", "parameters", ">number"]
    return render(columns, rows)


def _shapes(output: Any) -> str:
    return ", ".join(str(leaf.shape[1:]) for leaf in jax.tree.leaves(output))
