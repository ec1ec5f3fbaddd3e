"""Norms, gradients, inner products and projections of the gradients of single examples."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import flag_of, real_array, size_of
from jbackprop.factored import Method, PyTree, is_factored, promoted_sum, wide_dtype
from jbackprop.gradient import Backprop
from jbackprop.mesh import on_mesh
from jbackprop.per_example.source import (
    Collecting,
    Deferred,
    KeptPairs,
    Pairs,
    Source,
    check_microbatch,
    check_pairs,
    in_parts,
    like_params,
    opened,
    split_of,
)

_METHODS = get_args(Method)


def check_question(
    bp: Pairs, weights: Any = None, microbatch: Any = None, method: Any = "auto"
) -> tuple[int, Array | None]:
    """The number of examples, and the weights as an array; raises where something does not fit."""
    n = check_pairs(bp, "the gradient of one of them")
    check_microbatch(microbatch)
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, not {method!r}")
    if weights is None:
        return n, None
    weights = real_array("weights", weights)
    if weights.shape != (n,):
        raise ValueError(
            f"weights must have the shape ({n},), one for each example, not {weights.shape}"
        )
    floating = jnp.issubdtype(weights.dtype, jnp.floating)
    return n, weights.astype(wide_dtype(weights.dtype) if floating else jnp.result_type(float))


def summed(found: PyTree, n: int) -> Array:
    """The sum over all parameters and copies of what belongs to the examples: (B,)."""
    leaves = [jnp.sum(v, axis=tuple(range(v.ndim - 1))) for v in jax.tree.leaves(found)]  # (..., n)
    return promoted_sum(leaves) if leaves else jnp.zeros(n)


def along(weights: Array, like: Array) -> Array:
    """Weights (B,) with axes in front of B, as many as `like` has, in its dtype."""
    return weights.reshape((1,) * (like.ndim - 1) + weights.shape).astype(like.dtype)


def times(weights: Array | None, values: Array) -> Array:
    """w_n v_n of values (..., B); 0 where the weight is, whatever the value."""
    if weights is None:
        return values
    own = along(weights, values)
    return jnp.where(own == 0, jnp.zeros((), values.dtype), own * values)


def root(squares: Array, weights: Array | None) -> Array:
    """The norms |w_n g_n| from |g_n|^2 (..., B)."""
    return times(None if weights is None else jnp.abs(weights), jnp.sqrt(squares))


def norms(
    bp: Pairs,
    per_layer: bool = False,
    *,
    weights: Array | None = None,
    method: Method = "auto",
    microbatch: int | None = None,
) -> Any:
    """|g_n|: the Euclidean norm of every example's gradient, without writing the gradients out.

    g_n is the gradient of the example's own, unscaled cost C_n with respect to all parameters that
    learn: nothing is divided by the size of the batch. For a pair (a, delta) over T positions, with
    the weights (i, o),

        |g_n|^2 = |a|^2 |delta|^2                                  T = 1: about i + o products
        |g_n|^2 = sum_ts (a_t . a_s) (delta_t . delta_s)           "gram": T^2 (i + o) products
        |g_n|^2 = |sum_t a_t (outer) delta_t|^2                    "materialise": T i o products

    Where T > 1, the cheaper one is taken for each parameter: "gram" up to about T = i o / (i + o).
    Its Gram matrices are 2 T^2 numbers an example, a gradient written out i o; either is made for a
    few examples at a time. Sums over T come before the square, and a parameter used more than once
    has its cross terms. Frozen parameters have no part.

    Source: Goodfellow, Efficient per-example gradient computations (2015), for T = 1; Li, Tramer,
    Liang and Hashimoto, Large language models can be strong differentially private learners (2022),
    section 4, for "gram"; Bu, Mao and Xu, Scalable and efficient training of large convolutional
    neural networks with differential privacy (2022), for the choice.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        per_layer: the norms of each layer's part of the gradient rather than of all.
        weights: (B,); the norms are then |w_n g_n|, those of the costs w_n C_n. A weight of 0: not
            there, with a norm of 0, even if the example holds NaN. By default ones.
        method: "gram" or "materialise" force the one or the other.
        microbatch: so many examples at a time; bounds the memory, and changes nothing else.

    Returns:
        (B,), in float32 at least. With `per_layer` an `OrderedDict` of such, by path and in forward
        order, of the layers that learn; copies in a scanned stack are told apart, as in `deltas`.
        An example that holds NaN has a norm of NaN, and does nothing to the others'.

    Raises:
        ValueError: a layer couples the examples (the message names it and says what to do); weights
            or options that do not fit.
    """
    n, weights = check_question(bp, weights, microbatch, method)
    per_layer = flag_of(per_layer, "per_layer")
    return _norms(bp, weights, per_layer, method, microbatch, n)


@on_mesh(lambda bp, *_: split_of(bp))
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _norms(
    bp: Pairs, weights: Array | None, per_layer: bool, method: Method, size: int | None, n: int
) -> Any:
    def question(source: Source, weights: Any) -> tuple[Any, Any]:
        found = source.ask(lambda pair: pair.square_norm(method), by_copy=per_layer)
        if not per_layer:
            return root(summed(found, source.n), weights), ()
        layers = source.shown(source.by_layer(found))
        return OrderedDict((path, root(v, weights)) for path, v in layers.items()), ()

    return in_parts(bp, n, size, question, weights)[0]


def gradients(bp: Pairs, *, microbatch: int | None = None) -> PyTree:
    """g_n: the gradient of every example's own, unscaled cost.

    That is B copies of the parameters, and seldom needed: norms, inner products, projections,
    weighted sums and moments are to be had without.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        microbatch: so many examples at a time; bounds what is needed beside the result.

    Returns:
        A tree like params, each leaf (B, *shape), in float32 at least; zeros where it is frozen.

    Raises:
        ValueError: a layer couples the examples.
    """
    n, _ = check_question(bp, None, microbatch)
    return _gradients(bp, microbatch, n)


@on_mesh(lambda bp, *_: split_of(bp))
@functools.partial(jax.jit, static_argnums=(1, 2))
def _gradients(bp: Pairs, size: int | None, n: int) -> PyTree:
    def question(source: Source, _: Any) -> tuple[Any, Any]:
        # With the examples last, copies that are asked one after the other come to stand right.
        found = source.ask(lambda pair: jnp.moveaxis(pair.each(), 0, -1))
        return jax.tree.map(lambda g: jnp.moveaxis(g, -1, 0), found), ()

    return in_parts(bp, n, size, question)[0]


def gradient_chunks(bp: Pairs, size: int) -> Iterator[PyTree]:
    """The same, `size` examples at a time, in order: for what has to see every gradient.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        size: of a chunk; the last may be shorter.

    Returns:
        An iterator over trees like params, each leaf (up to `size`, *shape), in float32 at least.
        From a `Deferred`, each chunk is a sweep of its own.

    Raises:
        ValueError: a layer couples the examples; a size below 1.
    """
    size = size_of(size, "size")
    n, _ = check_question(bp)

    def chunks() -> Iterator[PyTree]:
        for start in range(0, n, size):
            m = min(size, n - start)
            yield _gradients(_sliced(bp, start, m), None, m)

    return chunks()


def _sliced(bp: Pairs, start: int, size: int) -> Pairs:
    def some(v: Array) -> Array:
        return v[start : start + size]

    if isinstance(bp, Deferred):
        key = None if bp.key is None else jax.random.fold_in(bp.key, start)
        x, y = jax.tree.map(some, (bp.x, bp.y))
        return Deferred(bp.params, x, y, key, bp.net, bp.loss)
    if isinstance(bp, Collecting):
        return bp.replaced(jax.tree.map(some, bp.batch))
    return jax.tree.map(some, bp.factored if isinstance(bp, Backprop) else bp)


def gram(bp: Pairs, *, method: Method = "auto", microbatch: int | None = None) -> Array:
    """<g_n, g_m>: the inner products of all examples' gradients, without writing them out.

    With one output and the cost C = z it is the empirical tangent kernel; for other losses that
    kernel with the deltas of the loss on both sides. Unscaled, as in `norms`, whose squares are on
    its diagonal. Of a pair over T positions "gram" takes B T^2 (i + o) products an example, and
    "materialise" B i o, gradients of a few examples at a time being written out.

    Source: Jacot, Gabriel and Hongler, Neural tangent kernel (2018), section 4.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        method: "gram" or "materialise" force the one or the other.
        microbatch: so many rows at a time; only for pairs that were kept.

    Returns:
        (B, B), in float32 at least, symmetric but for rounding.

    Raises:
        ValueError: a layer couples the examples; microbatches of a `Deferred`, whose examples do
            not meet.
    """
    n, _ = check_question(bp, None, microbatch, method)
    if isinstance(bp, Deferred | Collecting):
        if microbatch is not None and microbatch < n:
            raise ValueError(
                "gram compares every example with every other, so that a Deferred cannot be taken "
                "in microbatches: give it what backprop keeps, or leave microbatch out"
            )
        return _gram_deferred(bp, method, n)
    return _gram(bp, None, method, microbatch, n)


def gram_between(
    bp: Pairs, other: Pairs, *, method: Method = "auto", microbatch: int | None = None
) -> Array:
    """<g_n, h_m>: every example's gradient with every one of another mini-batch, (B, B').

    As `gram`; training examples against test examples is what influence is made of (Pruthi, Liu,
    Kale and Sundararajan, Estimating training data influence by tracing gradient descent (2020),
    section 3).

    Args:
        bp: from `backprop`, or a tree of factored gradients.
        other: the same of another mini-batch; of a network with the same parameters' shapes.
        method, microbatch: as in `gram`.

    Raises:
        ValueError: a layer couples the examples; another network's pairs.
        TypeError: a `Deferred`, whose pairs are not kept: they have to meet.
    """
    if isinstance(bp, Deferred | Collecting) or isinstance(other, Deferred | Collecting):
        raise TypeError("gram_between needs the pairs of both: give it what backprop keeps")
    n, _ = check_question(bp, None, microbatch, method)
    check_pairs(other, "the gradient of one of them")
    mine, theirs = ([p.shape for p in jax.tree.leaves(like_params(v))] for v in (bp, other))
    if mine != theirs:
        raise ValueError(
            f"these are pairs of different networks: of parameters {mine} and of {theirs}"
        )
    return _gram(bp, other, method, microbatch, n)


def _pairs(bp: Pairs | Source) -> PyTree:
    source = bp if isinstance(bp, Source) else opened(bp)
    assert isinstance(source, KeptPairs)
    return source.pairs


@on_mesh(lambda bp, *_: split_of(bp))
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _gram(bp: Pairs, other: Pairs | None, method: Method, size: int | None, n: int) -> Array:
    """With itself if `other` is None."""
    whole = bp if other is None else other
    theirs = jax.tree.leaves(_pairs(whole), is_leaf=is_factored)
    others = check_pairs(whole, "the gradient of one of them") if not theirs else 0

    def question(source: Source, _: Any) -> tuple[Any, Any]:
        mine = jax.tree.leaves(_pairs(source), is_leaf=is_factored)
        pairs = zip(mine, theirs, strict=True)
        found = [one.gram(two, method) for one, two in pairs]
        return promoted_sum(found) if found else jnp.zeros((source.n, others)), ()

    return in_parts(bp, n, size, question)[0]


@on_mesh(lambda bp, *_: split_of(bp))
@functools.partial(jax.jit, static_argnums=(1, 2))
def _gram_deferred(bp: Deferred | Collecting, method: Method, n: int) -> Array:
    found = opened(bp).ask(lambda pair: pair.gram(pair, method).reshape(-1))
    return summed(found, n * n).reshape(n, n)


dots = gram
"""Another name of `gram`."""


def project(
    bp: Pairs,
    vectors: PyTree,
    *,
    weights: Array | None = None,
    microbatch: int | None = None,
) -> Array:
    """<g_n, v>: the part of every example's gradient along given directions.

    That is how much the example's own, unscaled cost grows along v. With the gradient of a test
    example for v it is that example's influence (`gram_between` for many). It costs about one
    forward sweep for each direction, and no gradient is written out.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        vectors: a tree like params, for one direction; or each leaf (V, *shape), for V of them.
        weights: (B,), for <w_n g_n, v>; a weight of 0: not there. By default ones.
        microbatch: so many examples at a time; bounds the memory, and changes nothing else.

    Returns:
        (B,), or (B, V); in float32 at least. Frozen parameters have no part.

    Raises:
        ValueError: a layer couples the examples; vectors that are not like params.
    """
    n, weights = check_question(bp, weights, microbatch)
    params = like_params(bp)
    found_tree, due_tree = str(jax.tree.structure(vectors)), str(jax.tree.structure(params))
    if found_tree != due_tree:
        raise ValueError(f"vectors must be a tree like params, {due_tree}, not {found_tree}")
    due = [p.shape for p in jax.tree.leaves(params)]
    found = [jnp.shape(v) for v in jax.tree.leaves(vectors)]
    extra = {len(v) - len(s) for v, s in zip(found, due, strict=True)}
    many = extra == {1} and len({v[0] for v in found}) == 1
    if [v[1:] if many else v for v in found] != due:
        raise ValueError(
            f"vectors must have the parameters' shapes, {due}, or for several directions these "
            f"with one axis in front; not {found}"
        )
    return _project(bp, vectors, weights, many, microbatch, n)


@on_mesh(lambda bp, *_: split_of(bp))
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _project(
    bp: Pairs, vectors: PyTree, weights: Array | None, many: bool, size: int | None, n: int
) -> Array:
    def question(source: Source, weights: Any) -> tuple[Any, Any]:
        def one(vector: PyTree) -> Array:
            found = source.ask(lambda pair, v: pair.project(v), vector)
            return times(weights, summed(found, source.n))

        return jax.vmap(one, out_axes=1)(vectors) if many else one(vectors), ()

    return in_parts(bp, n, size, question, weights)[0]
