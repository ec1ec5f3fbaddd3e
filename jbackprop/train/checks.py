"""What training refuses before it begins."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.credit import Rule, State
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.sweep import Node, batch_size, forward


def check_data(
    name: str, net: Node, loss: Loss, params: PyTree, data: Any, rule: Rule | State | None = None
) -> tuple[Any, Any]:
    """Data as arrays in the dtype of the parameters, or an error that says what does not fit.

    A rule that is to learn from it, or has learned and gives the outputs, says that itself.
    """
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(f"{name} must be a pair (x, y) of arrays, not {type(data).__name__}")
    leaves = jax.tree.leaves(params)
    dtype = jnp.result_type(*leaves) if leaves else jnp.result_type(float)
    x, y = (
        np.asarray(part) if isinstance(part, list) else jax.tree.map(np.asarray, part)
        for part in data
    )
    n = batch_size(x)
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(y)}
    if lengths != {n}:
        raise ValueError(f"{name}: x has {n} examples, but y has {' and '.join(map(str, lengths))}")
    if n == 0:
        raise ValueError(f"{name} is empty: there is no example in it")
    for part, tree in (("x", x), ("y", y)):
        for leaf in jax.tree.leaves(tree):
            _check_finite(name, part, leaf)
    x = jax.tree.map(lambda leaf: _to(name, leaf, dtype), x)
    if isinstance(rule, Rule):
        rule.check(net, loss, params, x, y)
    elif rule is not None:
        loss.check(jax.eval_shape(rule.rule.outputs, rule, params, x).shape, y)
    else:
        outputs = jax.eval_shape(lambda p, x: forward(net, p, x)[0], params, x)
        loss.check(outputs.shape, y)
    return x, y


def check_batch_size(batch_size: int | None, n: int) -> int:
    """The size of a batch, all n for None."""
    if batch_size is None:
        return n
    if not hasattr(batch_size, "__index__") or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1, or None for the whole data at once; got {batch_size!r}"
        )
    if batch_size > n:
        raise ValueError(
            f"batch_size is {batch_size}, but there are only {n} training examples; "
            "None takes them all at once"
        )
    return operator.index(batch_size)


def _check_finite(name: str, part: str, values: np.ndarray) -> None:
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        if values.dtype.kind not in "iub":
            raise TypeError(f"{name}: {part} has the dtype {values.dtype}, which is no number")
        return
    bad = ~np.isfinite(values.astype(np.float32) if values.dtype.itemsize < 4 else values)
    if bad.any():
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        raise ValueError(
            f"{name}: {part}{list(at)} is {values[at]}; {int(bad.sum())} of {bad.size} values are "
            "not finite. Fill them in or leave those examples out"
        )


def _to(name: str, leaf: np.ndarray, dtype: Any) -> np.ndarray:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    largest, value = float(jnp.finfo(dtype).max), float(np.max(np.abs(leaf), initial=0))
    if value > largest:
        raise ValueError(f"{name}: x has the value {value:.3g}, too large for {dtype} parameters")
    return leaf.astype(dtype)
