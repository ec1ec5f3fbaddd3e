"""From the roots of the loss: products with the blocks of the Gauss-Newton matrix, and its root."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_leaves
from jbackprop.curvature.products import check_vector, learning, shapes_of
from jbackprop.curvature.roots import Exact, Roots
from jbackprop.curvature.sweeps import (
    DELTAS,
    Model,
    check_model,
    check_number,
    over_deltas,
    portions_of,
)
from jbackprop.factored import Factored, PyTree, promoted_sum
from jbackprop.losses import Loss
from jbackprop.mesh import examples, like, on_mesh, stacked
from jbackprop.sweep import batch_size


def ggn_block_product(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    vector: PyTree,
    roots: Roots = Exact(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
    chunk: int | None = None,
) -> PyTree:
    """The block diagonal of the Gauss-Newton matrix of the mean cost, times a vector.

    For the parameters of one layer, with their part v of the vector,

        G_l v = 1/B sum_n sum_v g_nv (g_nv . v)

    where the inner products and the weighted sum are contractions of pairs, in the sweep: no
    gradient of an example is written out. Every copy of a scanned layer is a block of its own.

    Source: Botev, Ritter and Barber, Practical Gauss-Newton optimisation for deep learning (2017),
    section 3, for the blocks.

    Args:
        net, loss, params, x, y, roots, key, chunk: as in `diag_ggn`. Of a function, parameters
            side by side in one dict, tuple or object are taken for a layer.
        vector: a tree like params; or several, with an axis in front of every leaf.

    Returns:
        A tree like the vector.

    Raises:
        ValueError, NotImplementedError: as `diag_ggn`; a vector that is not like params.
    """
    check_model(net, loss, params, x, y, key, roots)
    check_number("chunk", chunk, optional=True)
    check_leaves("vector", vector)
    return _block_product(net, loss, roots, chunk, params, x, y, vector, key)


@on_mesh(lambda net, loss, roots, chunk, params, x, y, vector, key: like(vector))
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _block_product(
    net: Model,
    loss: Loss,
    roots: Roots,
    chunk: int | None,
    params: PyTree,
    x: Any,
    y: Any,
    vector: PyTree,
    key: Array | None,
) -> PyTree:
    def ask(pairs: Sequence[Factored], owns: Sequence[Any]) -> list[Array]:
        along = [pair.project(own) for pair, own in zip(pairs, owns, strict=True)]
        weights = promoted_sum(along)
        return [lax.psum(pair.total(weights), DELTAS) for pair in pairs]

    portions = portions_of(net, loss, roots, params, x, y, key, chunk)

    def product(vector: PyTree) -> PyTree:
        own = learning(net, params, vector)
        found = over_deltas(net, loss, roots, params, x, y, key, ask, own, portions)
        return jax.tree.map(lambda v, p: (v / batch_size(x)).astype(p.dtype), found, params)

    if check_vector(jax.tree.structure(params), shapes_of(params), vector):
        return jax.vmap(product)(vector)
    return product(vector)


def ggn_root(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    roots: Roots = Exact(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
) -> PyTree:
    """R with R^T R = G: a root of the Gauss-Newton matrix of the mean cost, written out.

    Its rows are g_nv / sqrt(B), one for each example and delta: V B rows of as many numbers as
    there are parameters. R R^T, (V B, V B), has the same eigenvalues but for zeros, and is the
    smaller one where there are more parameters than rows.

    Source: Dangel, Kunstner and Hennig, BackPACK: packing more into backprop (2020), appendix A.3.

    Args:
        net, loss, params, x, y, roots, key: as in `diag_ggn`.

    Returns:
        A tree like params whose leaves are (V, B, *shape), in float32 at least.

    Raises:
        ValueError, NotImplementedError: as `diag_ggn`.
    """
    check_model(net, loss, params, x, y, key, roots)
    return _root(net, loss, roots, params, x, y, key)


@on_mesh(lambda net, loss, roots, params, x, *_: stacked(examples(x), 1))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _root(
    net: Model, loss: Loss, roots: Roots, params: PyTree, x: Any, y: Any, key: Array | None
) -> PyTree:
    def ask(pairs: Sequence[Factored], aux: Sequence[Any]) -> list[Array]:
        rows = [lax.all_gather(pair.each(), DELTAS) for pair in pairs]
        return [jnp.moveaxis(v, (0, 1), (-2, -1)) for v in rows]  # behind the axes of copies

    found = over_deltas(net, loss, roots, params, x, y, key, ask)
    return jax.tree.map(lambda v: jnp.moveaxis(v, (-2, -1), (0, 1)) / batch_size(x) ** 0.5, found)
