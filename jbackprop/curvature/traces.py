"""Traces, of the whole matrix and layer by layer."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import flag_of
from jbackprop.curvature.hessian import estimated
from jbackprop.curvature.roots import Exact, Roots
from jbackprop.curvature.sweeps import (
    DELTAS,
    Model,
    check_model,
    check_number,
    layers_of,
    over_deltas,
    pairs_of,
    portions_of,
)
from jbackprop.factored import Factored, PyTree
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.sweep import batch_size


def trace_ggn(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    roots: Roots = Exact(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
    per_layer: bool = False,
    chunk: int | None = None,
) -> Any:
    """The trace of the Gauss-Newton matrix of the mean cost, from norms alone.

    tr G = 1/B sum_n sum_v |g_nv|^2: the squared norms of the gradients at the deltas S_v, found as
    `per_example.norms` finds them, without writing any gradient out.

    Args:
        net, loss, params, x, y, roots, key, chunk: as in `diag_ggn`.
        per_layer: the traces of the layers' diagonal blocks instead.

    Returns:
        (), in float32 at least; with `per_layer` an `OrderedDict` of such by the layer's name, the
        copies of a scanned layer together.

    Raises:
        ValueError, NotImplementedError: as `diag_ggn`.
    """
    check_model(net, loss, params, x, y, key, roots)
    check_number("chunk", chunk, optional=True)
    flag_of(per_layer, "per_layer")
    found = _traces(net, loss, roots, chunk, params, x, y, key)
    return _by_layer(net, params, x, found, per_layer)


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _traces(
    net: Model,
    loss: Loss,
    roots: Roots,
    chunk: int | None,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
) -> list[Array]:
    def ask(pairs: Sequence[Factored], aux: Sequence[Any]) -> list[Array]:
        return [lax.psum(jnp.sum(pair.square_norm()), DELTAS) for pair in pairs]

    portions = portions_of(net, loss, roots, params, x, y, key, chunk)
    found = over_deltas(net, loss, roots, params, x, y, key, ask, portions=portions)
    return [jnp.sum(v) / batch_size(x) for v in jax.tree.leaves(found)]


def trace_hessian(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    samples: int = 16,
    *,
    key: Array,
    per_layer: bool = False,
    chunk: int | None = 4,
) -> Any:
    """Hutchinson's estimate of the trace of the Hessian of the mean cost, without bias.

    The mean of v . (H v) over vectors of random signs: the sum of `estimate_diag_hessian`. Its
    variance is twice the sum of the squares of what is off the diagonal, over `samples`. (The exact
    trace is the sum of `diag_hessian`.)

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines (1989).

    Args:
        net, loss, params, x, y: as in `hessian_product`.
        samples: how many vectors; each costs a product.
        key: for the vectors, and for layers that draw.
        per_layer: the traces of the layers' diagonal blocks instead.
        chunk: so many vectors at a time; bounds the memory, and changes nothing else.

    Returns:
        As `trace_ggn`.

    Raises:
        ValueError: as `hessian_product`.
    """
    flag_of(per_layer, "per_layer")
    found = estimated(net, loss, samples, chunk, params, x, y, key)
    return _by_layer(net, params, x, [jnp.sum(v) for v in jax.tree.leaves(found)], per_layer)


def _by_layer(
    net: Model, params: PyTree, x: Any, found: Sequence[Array], per_layer: bool
) -> Array | OrderedDict[str, Array]:
    if not per_layer:
        return jnp.sum(jnp.stack(found)) if found else jnp.zeros(())
    groups = layers_of(net, params, pairs_of(net, params, x))
    return OrderedDict((g.name, jnp.sum(jnp.stack([found[k] for k in g.leaves]))) for g in groups)
