"""Diagonals of curvature matrices, from the pairs of several deltas."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import flag_of
from jbackprop.curvature.roots import Empirical, Exact, Roots
from jbackprop.curvature.sweeps import (
    DELTAS,
    Model,
    by_blocks,
    canonical_home,
    check_model,
    check_number,
    linear_in_deltas,
    over_deltas,
    portions_of,
)
from jbackprop.factored import (
    Factored,
    Lookup,
    Outer,
    Patches,
    Place,
    PyTree,
    Scale,
    Shift,
    einsum,
    wide_dtype,
    wide_square,
)
from jbackprop.losses import Loss
from jbackprop.mesh import examples, like, on_mesh
from jbackprop.sweep import batch_size


def diag_ggn(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    roots: Roots = Exact(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
    per_example: bool = False,
    chunk: int | None = None,
) -> PyTree:
    """The diagonal of the Gauss-Newton matrix of the mean cost.

        diag(G)_j = 1/B sum_n sum_v (g_nv)_j^2,    g_nv = J_n^T S_nv

    For a pair (a, S_v) with one position this is (a * a)^T (sum_v S_v * S_v) / B: the deltas are
    squared and added up first, and one product of matrices is left, however many there are. Over
    several positions the sum over these comes before the square, so that the gradients g_nv are
    written out, a few at a time. For the cost of all columns of the loss's root in the sweep (of q
    classes q - 1, for each position), `Exact` is exact.

    Source: Dangel, Kunstner and Hennig, BackPACK: packing more into backprop (2020), equation 19.

    Args:
        net: a layer or a composite; or a function (params, one example's x) -> outputs z, such as
            the `apply` of a Flax model.
        loss: a `Loss` that has a `hessian_root`.
        params: the parameters.
        x, y: the mini-batch, as for `backprop`.
        roots: `Exact()`, `MonteCarlo(samples)` or `Empirical()`.
        key: for `MonteCarlo`, and for layers that draw.
        per_example: the diagonal of each example's own J_n^T H_n J_n instead, not divided by B.
        chunk: at most so many deltas at a time; bounds the memory, and changes nothing else. By
            default all deltas of as many examples as make sense for a cache, but of at least eight.

    Returns:
        A tree like params, in float32 at least; 0 for frozen parameters. With `per_example` its
        leaves are (B, *shape).

    Raises:
        ValueError: inputs or targets that do not fit; a layer couples the examples; no key.
        NotImplementedError: the loss has no root; the message names it.
    """
    check_model(net, loss, params, x, y, key, roots)
    check_number("chunk", chunk, optional=True)
    per_example = flag_of(per_example, "per_example")
    return _diagonal(net, loss, roots, per_example, chunk, params, x, y, key)


def diag_fisher(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    *,
    key: Array | None = None,
    per_example: bool = False,
) -> PyTree:
    """The diagonal of the empirical Fisher matrix: 1/B sum_n g_n * g_n of the given targets.

    `diag_ggn` with the one root `Empirical()`, which see. For the Fisher matrix at targets from the
    model take `diag_ggn`: for the canonical losses that is the same matrix.

    Args:
        net, loss, params, x, y, per_example: as in `diag_ggn`.
        key: for layers that draw.

    Returns:
        As `diag_ggn`.
    """
    return diag_ggn(net, loss, params, x, y, Empirical(), key=key, per_example=per_example)


def _split_of_diagonal(
    net: Model, loss: Loss, roots: Roots, per_example: bool, chunk: Any, params: PyTree, x: Any,
    *_: Any,
) -> PyTree:  # fmt: skip
    return examples(x) if per_example else like(params)


@on_mesh(_split_of_diagonal)
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _diagonal(
    net: Model,
    loss: Loss,
    roots: Roots,
    per_example: bool,
    chunk: int | None,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
) -> PyTree:
    question = squares_of_each if per_example else second_moment

    def ask(pairs: Sequence[Factored], aux: Sequence[Any]) -> list[Array]:
        return [question(pair) for pair in pairs]

    portions = portions_of(net, loss, roots, params, x, y, key, chunk, per_example)
    found = over_deltas(net, loss, roots, params, x, y, key, ask, portions=portions)
    if per_example:
        return jax.tree.map(lambda v: jnp.moveaxis(v, -1, 0), found)
    return jax.tree.map(lambda v: v / batch_size(x), found)


def second_moment(pair: Factored) -> Array:
    """sum_v sum_n g_nv * g_nv in the parameter's shape; asked under the vmap over deltas."""
    one = _rooted(pair)
    if one is not None:
        return one.second_moment()
    if isinstance(pair, Outer | Patches):
        return _written_out(pair)
    if isinstance(pair, Shift | Scale):
        return lax.psum(pair.second_moment(), DELTAS)
    return _one_by_one(pair, lambda pair: pair.second_moment())


def squares_of_each(pair: Factored) -> Array:
    """sum_v g_nv * g_nv of every example, with these last: (*shape, B)."""
    one = _rooted(pair)
    if one is not None:
        return jnp.moveaxis(jnp.square(one.each()), 0, -1)
    each = _one_by_one(pair, lambda pair: jnp.square(pair.each()))
    return jnp.moveaxis(each, 0, -1)


def _rooted(pair: Factored) -> Factored | None:
    """One pair whose squared gradients are the sums over v, where there is one.

    With one position g_nv = a_n (outer) S_nv, whose squares are a_n^2 (outer) S_nv^2: so that the
    root of sum_v S_nv^2 will do for a delta.
    """
    if not isinstance(pair, Outer | Shift | Scale | Lookup) or pair.delta.shape[2] != 1:
        return None

    def root(delta: Array) -> Array:  # with a derivative where it is 0
        square = lax.psum(wide_square(delta), DELTAS)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    pair = pair.with_deltas(root)
    if isinstance(pair, Outer):  # the kinds want both of one dtype
        return dataclasses.replace(pair, a=pair.a.astype(pair.delta.dtype))
    return pair


def _written_out(pair: Outer | Patches) -> Array:
    """sum_nv (sum_t a_nt (outer) S_nvt)^2."""
    if lax.axis_size(DELTAS) == 1:
        return lax.psum(pair.second_moment(), DELTAS)
    entries = math.prod(pair.home.shape) * lax.axis_size(DELTAS)
    return canonical_home(pair).restore(by_blocks(pair, _squares, entries))


def _squares(a: Array, deltas: Array) -> Array:
    """The same of a (n, G, T, i) and S (n, v, G, T, o): (G, i, o)."""
    if a.shape[2] == 1:
        squares = jnp.sum(wide_square(deltas[:, :, :, 0]), axis=1)
        return einsum("ngi,ngo->gio", wide_square(a[:, :, 0]), squares)
    return jnp.sum(jnp.square(einsum("ngti,nvgto->ngivo", a, deltas)), axis=(0, 3))


def with_last(a: Array, value: float) -> Array:
    """a (..., i) with a further input that is always the same."""
    return jnp.concatenate([a, jnp.full((*a.shape[:-1], 1), value, a.dtype)], axis=-1)


def turned_second_moment(pair: Any, u: Array | None, v: Array) -> Array:
    """sum_nv (U^T g_nv V)^2, (G, i, o); u (G, i, i), with one row more for a bias, v (G, o, o)."""
    dtype, groups = wide_dtype(v.dtype), v.shape[0]

    def turn(deltas: Array) -> Array:
        return einsum("ngto,gop->ngtp", deltas.astype(dtype), v)

    if u is None:
        rows = (pair.rows,) if isinstance(pair, Lookup) else ()
        place = Place((groups, *rows, v.shape[-1]), dtype)
        return second_moment(dataclasses.replace(pair.with_deltas(turn), place=place))

    def some(a: Array, deltas: Array) -> Array:
        a = with_last(a, 1) if a.shape[-1] < u.shape[-1] else a
        a = einsum("ngti,gij->ngtj", a.astype(dtype), u)
        return _squares(a, jax.vmap(turn, 1, 1)(deltas))

    several = pair.delta.shape[2:-1] != (1,)
    entries = groups * u.shape[-1] * v.shape[-1] * lax.axis_size(DELTAS) if several else 0
    return by_blocks(pair, some, entries)


def _one_by_one(pair: Factored, f: Callable[[Any], Array]) -> Array:
    """sum_v f(pair_v), for one delta at a time."""
    several = [lax.all_gather(delta, DELTAS) for delta in linear_in_deltas(pair)]
    if not several:
        return f(pair)

    def of(deltas: Sequence[Array]) -> Array:
        left = iter(deltas)
        return f(pair.with_deltas(lambda _: next(left)))

    nothing = jax.eval_shape(of, [v[0] for v in several])

    def step(so_far: Array, deltas: Sequence[Array]) -> tuple[Array, None]:
        return so_far + of(deltas), None

    return lax.scan(step, jnp.zeros(nothing.shape, nothing.dtype), several)[0]
