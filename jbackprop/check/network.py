"""Every delta and every gradient of a network against the truth.

The truth is `jax.grad` in float64 of the network's forward sweep and the loss's value alone; no
backward rule has a part in it. Deltas come from taps: a parameter added behind every layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.factored import PyTree, is_factored
from jbackprop.gradient import check_call, coupling_layer, sweep
from jbackprop.losses import Loss
from jbackprop.observe import tapped
from jbackprop.sweep import Node, forward, rebuild, walk
from jbackprop.table import render

FLOAT64_TOLERANCE = 1e-12


@contextlib.contextmanager
def x64() -> Iterator[None]:
    """Float64 inside, whatever the global flag; the flag is as it was afterwards."""
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # where it used to be
    with home.enable_x64(True):
        yield


@dataclasses.dataclass(frozen=True)
class Row:
    """The verdict on one delta or one gradient.

    Attributes:
        path: of the layer (for a delta) or the parameter.
        kind: "delta" or "gradient".
        error: |ours - truth| / |truth|, in the norm of all entries. A gradient whose terms cancel,
            |sum_n g_n| < |sum_n |g_n|| / 1000, is measured against a thousandth of the latter.
        autodiff_error: the same of `jax.grad` in the dtype that was tried.
        tolerance: what error may be: 1e-12 in float64; otherwise twice autodiff's own error plus
            eps * sqrt(the number of terms summed).
    """

    path: str
    kind: str
    error: float
    autodiff_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The verdict on a network, from the output back to the input. Printed, it is a table."""

    rows: tuple[Row, ...]
    dtype: str

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that are wrong, from the output back: the first names the rule to look at."""
        return tuple(row for row in self.rows if not row.ok)

    @property
    def worst(self) -> float:
        """The largest relative error of all."""
        return max((row.error for row in self.rows), key=lambda e: math.inf if e != e else e)

    def __str__(self) -> str:
        rows = (
            (row.path, row.kind, f"{row.error:.1e}", f"{row.autodiff_error:.1e}",
             f"{row.tolerance:.1e}", "right" if row.ok else "WRONG")
            for row in self.rows
        )  # fmt: skip
        columns = ("what", "", ">relative error", ">of jax.grad", ">allowed", "verdict")
        title = f"Hand-derived against jax.grad in float64, computed in {self.dtype}"
        return render(columns, rows, title)


def network(net: Node, loss: Loss, params: PyTree, x: Any, y: Any, dtype: Any = None) -> Agreement:
    """Compare every delta and every gradient of a network with `jax.grad` in float64.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: the network's parameters.
        x: the inputs, (B, ...).
        y: the targets.
        dtype: what our rules compute in; by default that of the parameters. The truth is computed
            from the same numbers, rounded to this dtype.

    Returns:
        An `Agreement`: for each layer, from the output back, the delta (of every example's own
        cost) and then its parameters' gradients (of the summed cost).
    """
    check_call(net, loss, params, x, y)
    if net.couples_examples:
        raise ValueError(
            f"{coupling_layer(net)} couples the examples: the delta of one example's own cost is "
            "not defined, so that this check has no truth for it"
        )
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    dtype = jnp.dtype(dtype or jnp.result_type(*(jax.tree.leaves(params) or jax.tree.leaves(x))))
    params, x, y = (_cast(tree, dtype) for tree in (params, x, y))
    with x64():
        ours = _to64(_by_rule(net, loss, *_device((params, x, y))))
        auto = _to64(_by_autodiff(net, loss, *_device((params, x, y))))
        truth = auto
        if dtype != jnp.float64:
            wide = (_cast(tree, jnp.dtype("float64")) for tree in (params, x, y))
            truth = _to64(_by_autodiff(net, loss, *_device(tuple(wide))))
    terms = max(
        [len(jax.tree.leaves(x)[0]), *(max(w.shape, default=1) for w in jax.tree.leaves(params))]
    )
    allowed = float(jnp.finfo(dtype).eps) * math.sqrt(terms)
    rows: list[Row] = []
    compared = zip(walk(net, ours), walk(net, auto), walk(net, truth), strict=True)
    for (path, _, mine), (_, _, other), (_, _, right) in reversed(list(compared)):
        for kind, i in (("delta", 1), ("gradient", 0)):
            leaves, _ = jax.tree_util.tree_flatten_with_path(right[i])
            sizes = jax.tree.leaves(right[2]) if kind == "gradient" else [0.0] * len(leaves)
            for (where, t), m, o, size in zip(
                leaves, jax.tree.leaves(mine[i]), jax.tree.leaves(other[i]), sizes, strict=True
            ):
                error, its = _relative(m, t, size), _relative(o, t, size)
                tolerance = FLOAT64_TOLERANCE if dtype == jnp.float64 else 2 * its + allowed
                name = ".".join([path, *(str(getattr(k, "key", k)) for k in where)])
                rows.append(Row(name, kind, error, its, tolerance))
    return Agreement(tuple(rows), str(dtype))


def _relative(candidate: np.ndarray, truth: np.ndarray, terms: Any) -> float:
    """Against |truth|; where its terms cancel to less than a thousandth, against that of them."""
    if candidate.shape != truth.shape:
        return math.inf
    error = np.linalg.norm(candidate - truth)
    size = max(np.linalg.norm(truth), 1e-3 * np.linalg.norm(terms))
    return float(error / size) if size else (0.0 if error == 0 else math.inf)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """Floating-point leaves to dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _device(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)


def _to64(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_rule(net: Node, loss: Loss, params: PyTree, x: Any, y: Any) -> PyTree:
    """For every layer (gradients of the summed cost, the deltas of each example), by our rules."""
    taps, both = tapped(net, params, x)

    def collect(factored: PyTree, delta: Any, aux: Any) -> PyTree:
        own, _ = factored
        return jax.tree.map(lambda pair: pair.total(), own, is_leaf=is_factored), delta

    return sweep(taps, loss, both, x, y, collect).collected


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_autodiff(net: Node, loss: Loss, params: PyTree, x: Any, y: Any) -> PyTree:
    """The same by `jax.grad` of forward and the loss's value, and third sum_n |g_n|."""
    taps, both = tapped(net, params, x)

    def cost(both: PyTree, x: Any, y: Any) -> Any:
        return jnp.sum(loss.value(forward(taps, both, x)[0], y))

    def one(sizes: PyTree, example: Any) -> tuple[PyTree, PyTree]:
        g = jax.grad(cost)(both, *jax.tree.map(lambda leaf: leaf[None], example))
        return jax.tree.map(lambda s, v: s + jnp.abs(v).astype(s.dtype), sizes, own(g)), taps_of(g)

    def own(tree: PyTree) -> PyTree:
        return rebuild(net, tree, lambda path, layer, part: (layer, part[0]))[1]

    def taps_of(tree: PyTree) -> dict[str, PyTree]:
        return {path: part[1] for path, _, part in walk(net, tree)}

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, "float64"), params)
    sizes, deltas = jax.lax.scan(one, zeros, (x, y))
    size = {path: part for path, _, part in walk(net, sizes)}
    return rebuild(
        net,
        jax.grad(cost)(both, x, y),
        lambda path, layer, part: (layer, (part[0], deltas[path], size[path])),
    )[1]
