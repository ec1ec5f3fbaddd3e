"""Where the first NaN or infinity came up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jbackprop.calls import check_call
from jbackprop.factored import PyTree
from jbackprop.gradient import backprop, deltas, gradient
from jbackprop.losses import Loss
from jbackprop.observe import activations
from jbackprop.structure import by_copy, layers_by_copy, walk
from jbackprop.sweep import Node


def first_nonfinite(
    net: Node, loss: Loss, params: PyTree, x: Any, y: Any, key: Any = None
) -> str | None:
    """Name the place where a mini-batch first is not finite, in the order of computation.

    Args:
        net, loss, params, x, y, key: as `jbackprop.backprop` takes them.

    Returns:
        The place: an input, a parameter, the output of a layer, the cost, the delta of a layer, or
        the gradient of a parameter. None if all is finite.

    Raises:
        ValueError, TypeError: as `jbackprop.backprop`.
    """
    check_call(net, loss, params, x, y, key)
    if not _finite(x):
        return "the inputs x"
    named = layers_by_copy(net)
    for path, own in _parts(net, params):
        if not _finite(own):
            return f"the parameters of {path} ({named[path]})"
    for path, a in activations(net, params, x, key).items():
        if not _finite(a):
            return f"the output of {path} ({named[path]})"
    bp = backprop(net, loss, params, x, y, key=key)
    if not _finite(bp.losses):
        return f"the cost ({loss}), while the network's outputs are finite"
    for path, delta in reversed(deltas(bp).items()):
        if not _finite(delta):
            return f"the delta of {path} ({named[path]}), while all outputs are finite"
    for path, own in _parts(net, gradient(bp)):
        if not _finite(own):
            return f"the gradient of {path} ({named[path]}), while all deltas are finite"
    return None


def _parts(net: Node, tree: PyTree) -> Iterator[tuple[str, PyTree]]:
    """Every layer's part of a tree like params, the copies of scanned composites one by one."""
    yield from by_copy(net, {path: own for path, _, own in walk(net, tree)}).items()


def _finite(tree: PyTree) -> bool:
    leaves = (leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
