"""Products of curvature matrices with vectors that look like the parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_leaves
from jbackprop.curvature.roots import Empirical, Exact, Roots
from jbackprop.curvature.sweeps import Model, check_model, outputs_of, two_keys
from jbackprop.factored import PyTree, einsum, weighted
from jbackprop.losses import Canonical, Loss
from jbackprop.mesh import WHOLE, like, on_mesh
from jbackprop.objective import value_and_grad
from jbackprop.structure import trainable_mask
from jbackprop.sweep import Node, backward, batch_size, forward, total

Product = Callable[[PyTree], PyTree]


def hessian_product(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    vector: PyTree,
    *,
    key: Array | None = None,
) -> PyTree:
    """H v, with the Hessian H of the mean cost: the derivative of the gradient along v.

    The hand-written sweeps are differentiated once more, forward, which is Pearlmutter's R-operator
    for every layer at once: about two gradients' work.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (1994).

    Args:
        net: a layer or a composite; or a function (params, one example's x) -> outputs z.
        loss: a `Loss`.
        params: the parameters.
        x, y: the mini-batch, as for `backprop`.
        vector: a tree like params; or several, one behind the other along an axis in front of every
            leaf.
        key: for layers that draw; the draw is part of what is differentiated.

    Returns:
        A tree like the vector. What is frozen counts as constant: 0 there, whatever the vector has.

    Raises:
        ValueError: a vector that is not like params, inputs or targets that do not fit.
    """
    check_model(net, loss, params, x, y, key)
    check_leaves("vector", vector)
    return _product("hessian", net, loss, params, x, y, vector, key)


def ggn_product(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    vector: PyTree,
    *,
    key: Array | None = None,
) -> PyTree:
    """G v, with the Gauss-Newton matrix of the mean cost, G = 1/B sum_n J_n^T H_n J_n.

    J_n v is the derivative of the outputs along v, forward; H_n is the loss's `hessian_product`;
    and J_n^T is the delta rule. G is positive semi-definite where H_n is, as of every loss here.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent
    (2002), section 3.

    Args:
        net, loss, params, x, y, vector, key: as in `hessian_product`; a loss that has a
            `hessian_product`.

    Returns:
        A tree like the vector.

    Raises:
        ValueError: as `hessian_product`.
        NotImplementedError: the loss has no `hessian_product`; the message names it.
    """
    check_model(net, loss, params, x, y, key)
    check_leaves("vector", vector)
    return _product("ggn", net, loss, params, x, y, vector, key)


def ggn_inner(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    vectors: PyTree,
    *,
    key: Array | None = None,
) -> Array:
    """u . G v for every two of some vectors, with the Gauss-Newton matrix of the mean cost.

    1/B sum_n (J_n u) . H_n (J_n v): the derivatives of the outputs along the vectors, forward, are
    all that is needed, and nothing is swept back.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent
    (2002), section 3.

    Args:
        net, loss, params, x, y, key: as in `ggn_product`.
        vectors: a tree like params with an axis of k vectors in front of every leaf.

    Returns:
        (k, k), in float32 at least.

    Raises:
        ValueError, NotImplementedError: as `ggn_product`.
    """
    check_model(net, loss, params, x, y, key)
    check_leaves("vectors", vectors)
    return _inner(net, loss, params, x, y, vectors, key)


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(0, 1))
def _inner(
    net: Model, loss: Loss, params: PyTree, x: Any, y: Any, vectors: PyTree, key: Array | None
) -> Array:
    if not check_vector(jax.tree.structure(params), shapes_of(params), vectors):
        raise ValueError("several vectors are needed, along an axis in front; one is v[None]")
    own_key, _ = two_keys(net, key)

    def ahead(params: PyTree) -> Array:
        return outputs_of(net, params, x, own_key)

    def along(vector: PyTree) -> tuple[Array, Array]:
        z, tangent = jax.jvp(ahead, (params,), (learning(net, params, vector),))
        return tangent, loss.hessian_product(z, y, tangent)

    tangents, curved = (v.reshape(v.shape[0], -1) for v in jax.vmap(along)(vectors))
    return einsum("un,vn->uv", tangents, curved) / batch_size(x)


def fisher_product(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    vector: PyTree,
    roots: Roots = Exact(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
) -> PyTree:
    """F v, with the Fisher matrix of the model that the loss is the log likelihood of.

    F = 1/B sum_n J_n^T E[delta (outer) delta] J_n, over targets that the model itself draws. For
    the canonical losses that is the Gauss-Newton matrix, and `Exact()` gives that; over T positions
    each counts as an observation of its own of weight 1/T, as in the cost. `MonteCarlo(samples)`
    draws targets, J_n^T S_n (S_n . J_n v) for each; `Empirical()` takes the given ones.

    Source: Martens, New insights and perspectives on the natural gradient method (2020), section 5.

    Args:
        net, loss, params, x, y, vector: as in `hessian_product`.
        roots: which deltas.
        key: for `MonteCarlo`, and for layers that draw.

    Returns:
        A tree like the vector.

    Raises:
        ValueError: as `hessian_product`; no key.
        NotImplementedError: but for `Empirical()`, a loss that is not canonical, such as `Huber`;
            the message names it.
    """
    check_model(net, loss, params, x, y, key, roots)
    if not isinstance(roots, Empirical) and not isinstance(loss, Canonical):
        raise NotImplementedError(
            f"{loss} is not of the canonical family, a log likelihood in its natural parameters, "
            "and has no Fisher matrix here: use ggn_product, or Empirical()"
        )
    check_leaves("vector", vector)
    return _product(
        "ggn" if isinstance(roots, Exact) else roots, net, loss, params, x, y, vector, key
    )


@on_mesh(lambda which, net, loss, params, x, y, vector, key: like(vector))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _product(
    which: str | Roots,
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    vector: PyTree,
    key: Array | None,
) -> PyTree:
    several = check_vector(jax.tree.structure(params), shapes_of(params), vector)
    if which == "hessian":
        product = hessian_of(net, loss, params, x, y, key)
    else:
        product = ggn_of(net, loss, params, x, y, key, which if isinstance(which, Roots) else None)
    return jax.vmap(product)(vector) if several else product(vector)


def check_vector(tree: Any, shapes: Sequence[tuple[int, ...]], vector: PyTree) -> bool:
    """Whether it is several vectors like params; raises for what is neither one nor several.

    Args:
        tree, shapes: the structure of params, and the shapes of their leaves.
        vector: what is to be looked at.
    """
    found = jax.tree.structure(vector)
    if found != tree:
        raise ValueError(f"the vector must be a tree like params, {tree}, not {found}")
    due, given = list(shapes), [jnp.shape(leaf) for leaf in jax.tree.leaves(vector)]
    if given == due:
        return False
    if len({shape[:1] for shape in given}) != 1 or [shape[1:] for shape in given] != due:
        raise ValueError(
            f"the vector's leaves have the shapes {given}; they must be those of params, {due}, or "
            "have one axis more in front, of one length: several vectors"
        )
    return True


def shapes_of(tree: PyTree) -> tuple[tuple[int, ...], ...]:
    """The shapes of its leaves."""
    return tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(tree))


def learning(net: Model, params: PyTree, vector: PyTree) -> PyTree:
    """The vector in the dtypes of params, 0 where params are frozen."""
    mask = jax.tree.map(lambda _: True, params)
    if isinstance(net, Node):
        mask = trainable_mask(net, params)
    return jax.tree.map(
        lambda learns, p, v: v.astype(p.dtype) if learns else jnp.zeros_like(p),
        mask,
        params,
        vector,
    )


def hessian_of(
    net: Model, loss: Loss, params: PyTree, x: Any, y: Any, key: Array | None = None
) -> Product:
    """v -> H v, of one vector."""
    if isinstance(net, Node):
        grad = value_and_grad(net, loss)
        gradient = lambda params: grad(params, x, y, key=key)[1]  # noqa: E731
    else:
        gradient = jax.grad(lambda params: jnp.mean(loss.value(outputs_of(net, params, x), y)))

    def product(vector: PyTree) -> PyTree:
        found = jax.jvp(gradient, (params,), (learning(net, params, vector),))[1]
        return learning(net, params, found)

    return product


def ggn_of(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None = None,
    roots: Roots | None = None,
) -> Product:
    """v -> G v, of one vector; of some roots of it alone, if they are given."""
    n = batch_size(x)
    own_key, drawn = two_keys(net, key)

    def in_the_middle(z: Array, tangent: Array) -> Array:
        """H_n J_n v / B."""
        if roots is None:
            return loss.hessian_product(z, y, tangent) / n
        columns = roots.columns(loss, z, y, drawn)(jnp.arange(roots.number(loss, z, y)))

        def one(root: Array) -> Array:
            along = jnp.sum((root * tangent).reshape(n, -1), axis=1)
            return weighted(along / n, root).astype(z.dtype)

        return jnp.sum(jax.vmap(one)(columns), axis=0)

    def product(vector: PyTree) -> PyTree:
        vector = learning(net, params, vector)
        if isinstance(net, Node):

            def ahead(params: PyTree) -> tuple[Array, Any]:
                z, saved = forward(net, params, x, own_key)
                return z, net.trace(x, z, saved)

            z, tangent, trace = jax.jvp(ahead, (params,), (vector,), has_aux=True)
            delta = in_the_middle(z, tangent)
            found = backward(net, params, trace, delta, total)[1]
        else:
            z, back = jax.vjp(lambda params: outputs_of(net, params, x), params)
            tangent = jax.jvp(lambda params: outputs_of(net, params, x), (params,), (vector,))[1]
            (found,) = back(in_the_middle(z, tangent))
        return learning(net, params, found)

    return product
