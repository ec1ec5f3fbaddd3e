"""The diagonal of the Hessian: exact, by propagating it; and Hutchinson's estimate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from jbackprop.calls import refuse_coupling
from jbackprop.check.programs import reached
from jbackprop.curvature.blocks import eigh
from jbackprop.curvature.products import hessian_of
from jbackprop.curvature.sweeps import Model, check_model, check_number, two_keys
from jbackprop.factored import PyTree, is_factored, scan_examples, wide_dtype
from jbackprop.losses import Loss
from jbackprop.mesh import like, on_mesh
from jbackprop.structure import trainable_mask
from jbackprop.sweep import Composite, Node, backward, batch_size, forward, keep, total


def diag_hessian(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    *,
    key: Array | None = None,
    chunk: int | None = 16,
) -> PyTree:
    """The diagonal of the Hessian of the mean cost, exactly, by propagating Hessians.

    Let delta = B(x, delta_y) be the delta rule of a layer, y = f(x) its forward rule, and H_y the
    Hessian of an example's cost with respect to y. Differentiating the rule along a direction e,
    in which y moves by f'(x) e and delta_y therefore by H_y f'(x) e,

        H_x e = dB/dx e + dB/d(delta_y) H_y f'(x) e

    so that the columns of H_x come from the rule of that layer alone, and the network's second
    derivative is propagated from the last layer to the first like its first. A layer that is linear
    in its parameters has no second derivative of its own there, so that with the eigenvectors of
    H_y = sum_k s_k u_k (outer) u_k, and g_nk = what the delta rule makes of the delta u_k,

        diag(H)_j = 1/B sum_n sum_k s_k (g_nk)_j^2

    Of others (recurrent ones), and of composites that are not a chain of layers, the same
    derivative is taken along each of their parameters in turn: exact as well, but a sweep of that
    composite for every parameter of it.

    H_x is (q, q) for q inputs of the layer, for every example: the way for nets with layers of at
    most some hundreds of units. `estimate_diag_hessian` is for the others.

    Source: Becker and LeCun, Improving the convergence of back-propagation learning with second
    order methods (1989), for diagonals; Mizutani and Dreyfus, Second-order stagewise
    backpropagation for Hessian-matrix analyses (2008), for whole blocks.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: the parameters.
        x, y: the mini-batch, as for `backprop`.
        key: for layers that draw.
        chunk: so many columns at a time; bounds the memory, and changes nothing else.

    Returns:
        A tree like params, in their dtypes; 0 for frozen parameters.

    Raises:
        ValueError: inputs or targets that do not fit; a layer couples the examples.
        TypeError: a net that is a function.
    """
    if not isinstance(net, Node):
        raise TypeError(
            "diag_hessian propagates through the layers of a network of ours, and a function has "
            "none to be seen: use estimate_diag_hessian, or diag_ggn"
        )
    check_model(net, loss, params, x, y, key)
    check_number("chunk", chunk, optional=True)
    refuse_coupling(net, "the Hessian of one example's cost")
    return _exact(net, loss, chunk, params, x, y, key)


@on_mesh(lambda net, loss, chunk, params, *_: like(params))
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _exact(
    net: Node, loss: Loss, chunk: int | None, params: PyTree, x: Any, y: Any, key: Array | None
) -> PyTree:
    own_key, _ = two_keys(net, key)
    z = forward(net, params, x, own_key)[0]

    def delta(z: Array) -> Array:
        return loss.delta(z, y)

    top = _columns(lambda e: jax.jvp(delta, (z,), (e,))[1], z, chunk)
    found = _propagate(net, params, x, own_key, delta(z), top, chunk)[0]
    return jax.tree.map(lambda h, p: (h / batch_size(x)).astype(p.dtype), found, params)


def _propagate(
    node: Node,
    params: PyTree,
    x: Any,
    key: Array | None,
    delta: Any,
    hessian: Array,
    chunk: int | None,
) -> tuple[PyTree, Callable[[], tuple[Any, Array]]]:
    """The diagonals of one node's parameters, summed over examples; and how to go on before it.

    Args:
        node, params, x, key: what is swept.
        delta: of its output y.
        hessian: of every example's cost with respect to y, (B, q, q).
        chunk: columns at a time.

    Returns:
        A tree like params; and a function that gives delta and Hessian of x.
    """

    def before() -> tuple[Any, Array]:
        return _pulled(node, params, x, key, delta, hessian, chunk)

    if isinstance(node, Composite) and node.chains:
        layers, own = list(node.children().values()), node.split(params)
        inputs, keys = [x], node.keys(key)
        for layer, part, k in zip(layers[:-1], own, keys, strict=False):
            inputs.append(forward(layer, part, inputs[-1], k)[0])
        found, last = [], (delta, hessian)
        for i in reversed(range(len(layers))):
            diagonal, back = _propagate(layers[i], own[i], inputs[i], keys[i], *last, chunk)
            found.append(diagonal)
            if any(jax.tree.leaves(part) for part in own[:i]):
                last = back()
        return node.join(found[::-1]), before
    if not jax.tree.leaves(params):
        return params, before
    if isinstance(node, Composite) or not _is_linear(node, params, x, key, delta):
        return _along_each(node, params, x, key, delta, hessian, chunk), before
    return _by_eigenvectors(node, params, x, key, delta, hessian, chunk), before


def _sweep(node: Node, key: Array | None, collect: Any, params: PyTree, x: Any, delta: Any) -> Any:
    y, saved = forward(node, params, x, key)
    return backward(node, params, node.trace(x, y, saved), delta, collect)


def _columns(product: Callable[[Any], Any], like: Any, chunk: int | None) -> Array:
    """The matrix (B, q, p) of a product of every example's matrix with vectors (B, p) like x."""
    leaves, tree = jax.tree.flatten(like)
    sizes = [leaf[0].size for leaf in leaves]
    ends = np.cumsum(sizes)

    def column(unit: Array) -> Array:
        parts = [unit[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        along = [
            jnp.broadcast_to(part.reshape(leaf.shape[1:])[None], leaf.shape).astype(leaf.dtype)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return _rows(product(jax.tree.unflatten(tree, along)))

    eye = jnp.eye(sum(sizes), dtype=leaves[0].dtype)
    return jnp.moveaxis(lax.map(column, eye, batch_size=chunk), 0, 2)


def _rows(tree: Any) -> Array:
    """The leaves of a tree (B, ...) side by side, (B, q)."""
    return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)], 1)


def _like(rows: Array, tree: Any) -> Any:
    """Rows (B, q) as a tree like another."""
    leaves, form = jax.tree.flatten(tree)
    ends = np.cumsum([leaf[0].size for leaf in leaves])
    parts = zip(jnp.split(rows, ends[:-1], axis=1), leaves, strict=True)
    return jax.tree.unflatten(form, [v.reshape(w.shape).astype(w.dtype) for v, w in parts])


def _floating(tree: Any) -> list[Array]:
    """The leaves that have deltas."""
    return [v for v in jax.tree.leaves(tree) if jnp.issubdtype(v.dtype, jnp.floating)]


def _moved(hessian: Array, along: Sequence[Array], delta: Any) -> Any:
    """H_y times the leaves of a direction: how delta moves, in its structure."""
    return _like(jnp.einsum("nij,nj->ni", hessian, _rows(along)), delta)


def _pulled(
    node: Node,
    params: PyTree,
    x: Any,
    key: Array | None,
    delta: Any,
    hessian: Array,
    chunk: int | None,
) -> tuple[Any, Array]:
    """Delta and Hessian of x, from those of y."""
    leaves, tree = jax.tree.flatten(x)

    def whole(moving: Sequence[Array]) -> Any:
        left = iter(moving)
        return jax.tree.unflatten(
            tree, [next(left) if jnp.issubdtype(v.dtype, jnp.floating) else v for v in leaves]
        )

    def ahead(moving: Sequence[Array]) -> list[Array]:
        return _floating(forward(node, params, whole(moving), key)[0])

    def rule(moving: Sequence[Array], delta: Any) -> Any:
        return _sweep(node, key, lambda *_: (), params, whole(moving), delta)[0]

    moving = _floating(x)

    def product(along: Sequence[Array]) -> Any:
        moved = _moved(hessian, jax.jvp(ahead, (moving,), (along,))[1], delta)
        return jax.jvp(rule, (moving, delta), (along, moved))[1]

    return rule(moving, delta), _columns(product, moving, chunk)


def _is_linear(node: Node, params: PyTree, x: Any, key: Array | None, delta: Any) -> bool:
    """Whether y is linear in the parameters: their pairs do not depend on them."""

    def arrays(params: PyTree) -> Any:
        return jax.tree.leaves(_sweep(node, key, keep, params, x, delta)[1])

    closed = jax.make_jaxpr(arrays)(params)
    return not any(reached(closed.jaxpr, [True] * len(closed.jaxpr.invars)))


def _by_eigenvectors(
    node: Node,
    params: PyTree,
    x: Any,
    key: Array | None,
    delta: Any,
    hessian: Array,
    chunk: int | None,
) -> PyTree:
    hessian = hessian.astype(wide_dtype(hessian.dtype))
    values, vectors = eigh((hessian + jnp.matrix_transpose(hessian)) / 2)
    roots = jnp.moveaxis(jnp.sqrt(jnp.abs(values))[:, None] * vectors, 2, 0)
    y, saved = forward(node, params, x, key)
    trace = node.trace(x, y, saved)

    def one(k: tuple[Array, Array]) -> PyTree:
        root, signs = k
        pairs = backward(node, params, trace, _like(root, delta), keep)[1]
        return jax.tree.map(lambda pair: pair.second_moment(signs), pairs, is_leaf=is_factored)

    signs = jnp.moveaxis(jnp.sign(values), 1, 0)
    found = lax.map(one, (roots, signs), batch_size=chunk)
    return jax.tree.map(lambda v: jnp.sum(v, axis=0), found)


def _along_each(
    node: Node,
    params: PyTree,
    x: Any,
    key: Array | None,
    delta: Any,
    hessian: Array,
    chunk: int | None,
) -> PyTree:
    """d/d(theta_j) of the gradient's entry j, along one parameter after the other."""
    flat, unflatten = ravel_pytree(params)

    def ahead(params: PyTree) -> list[Array]:
        return _floating(forward(node, params, x, key)[0])

    def gradient(params: PyTree, delta: Any) -> PyTree:
        return _sweep(node, key, total, params, x, delta)[1]

    def entry(j: Array) -> Array:
        along = unflatten(jax.nn.one_hot(j, flat.size, dtype=flat.dtype))
        moved = _moved(hessian, jax.jvp(ahead, (params,), (along,))[1], delta)
        found = jax.jvp(gradient, (params, delta), (along, moved))[1]
        return ravel_pytree(found)[0][j].astype(flat.dtype)

    learns = trainable_mask(node, params)
    found = unflatten(lax.map(entry, jnp.arange(flat.size), batch_size=chunk))
    return jax.tree.map(lambda v, own: v if own else jnp.zeros_like(v), found, learns)


def estimate_diag_hessian(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    samples: int = 16,
    *,
    key: Array,
    chunk: int | None = 4,
) -> PyTree:
    """Hutchinson's estimate of the diagonal of the Hessian of the mean cost, without bias.

    The mean of v * (H v) over vectors v of random signs: of v_j v_k the mean is 0 unless j = k. The
    variance of an entry is the sum of the squares of the others in its row, over `samples`.

    Source: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix (2007).

    Args:
        net, loss, params, x, y: as in `hessian_product`.
        samples: how many vectors; each costs a product.
        key: for the vectors, and for layers that draw.
        chunk: so many vectors at a time; bounds the memory, and changes nothing else.

    Returns:
        A tree like params; 0 for frozen parameters.

    Raises:
        ValueError: as `hessian_product`.
    """
    found = estimated(net, loss, samples, chunk, params, x, y, key)
    return jax.tree.map(lambda h, p: h.astype(p.dtype), found, params)


def estimated(
    net: Model,
    loss: Loss,
    samples: Any,
    chunk: Any,
    params: PyTree,
    x: Any,
    y: Any,
    key: Any,
) -> PyTree:
    """The same in float32 at least; checked."""
    check_model(net, loss, params, x, y, key, draws=True)
    check_number("samples", samples)
    check_number("chunk", chunk, optional=True)
    return _estimated(net, loss, samples, min(chunk or samples, samples), params, x, y, key)


@on_mesh(lambda net, loss, samples, chunk, params, *_: like(params))
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _estimated(
    net: Model, loss: Loss, samples: int, chunk: int, params: PyTree, x: Any, y: Any, key: Array
) -> PyTree:
    own_key, drawn = two_keys(net, key)
    product = hessian_of(net, loss, params, x, y, own_key)
    assert drawn is not None

    def one(key: Array) -> PyTree:
        signs = _random_signs(key, params)
        return jax.tree.map(lambda v, h: (v * h).astype(wide_dtype(v.dtype)), signs, product(signs))

    def some(keys: Array) -> tuple[PyTree, PyTree]:
        return (), jax.tree.map(lambda v: jnp.sum(v, axis=0), jax.vmap(one)(keys))

    _, found = scan_examples(some, jax.random.split(drawn, samples), samples, chunk)
    return jax.tree.map(lambda v: v / samples, found)


def _random_signs(key: Array, params: PyTree) -> PyTree:
    """+1 or -1 for every parameter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [jax.random.rademacher(k, p.shape, p.dtype) for k, p in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(tree, drawn)
