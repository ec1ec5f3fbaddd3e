"""Kronecker-factored curvature: K-FAC, KFLR and E-KFAC."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import flag_of
from jbackprop.curvature.blocks import BlockDiagonal, Diagonal, Eigen, Kronecker, Where, mix
from jbackprop.curvature.diagonals import second_moment, turned_second_moment, with_last
from jbackprop.curvature.products import shapes_of
from jbackprop.curvature.roles import Role, Sharing, planned, roles_of
from jbackprop.curvature.roots import MonteCarlo, Roots
from jbackprop.curvature.sweeps import (
    DELTAS,
    Model,
    by_blocks,
    check_model,
    check_number,
    over_deltas,
    pairs_of,
    portions_of,
)
from jbackprop.factored import (
    Factored,
    Lookup,
    Nothing,
    Place,
    PyTree,
    Shift,
    einsum,
    wide_dtype,
)
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.sweep import Node, batch_size


def kfac(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    roots: Roots = MonteCarlo(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
    sharing: Sharing = "expand",
    joint_bias: bool = True,
    chunk: int | None = None,
) -> BlockDiagonal:
    """Kronecker factors of the Gauss-Newton matrix of the mean cost, layer by layer.

    The block of a matrix W is 1/B sum_nv g_nv (outer) g_nv with g_nv = a_n (outer) S_nv, that is
    1/B sum_nv (a_n a_n^T) (x) (S_nv S_nv^T). K-FAC takes the mean of the product for the product of
    the means, A (x) G with

        A = 1/B sum_n a_n a_n^T        G = 1/B sum_n sum_v S_nv S_nv^T

    which is exact for one example, and wherever S does not depend on the example (a linear network
    with squared error). With `MonteCarlo` roots it is K-FAC, with `Exact` KFLR, with `Empirical`
    the empirical one. Where T positions of an example share the weights, g_nv = sum_t a_t (outer)
    S_vt, and there are two ways:

        "expand"    every position an example: A = 1/(B T) sum_nt a a^T,  G = 1/B sum_nvt S S^T
        "reduce"    as one: with a = 1/T sum_t a_t,  S = sum_t S_t  as above

    "Expand" is exact in linear networks whose positions have costs of their own (language models,
    and the KFC of convolutions, whose inputs are patches), "reduce" where the outputs are averages
    over the positions (a pooled network). Positions without a target count in A like others.

    What is no matrix gets another block: an embedding a diagonal A, which counts its rows; a bias
    by itself its exact block G; scales, other shifts, weights that are used in several ways
    (`Tied`), and factors with a side longer than 8192, their exact diagonal.

    Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature (2015), section 3; Grosse and Martens, A Kronecker-factored approximate Fisher matrix
    for convolution layers (2016), theorem 1; Botev, Ritter and Barber, Practical Gauss-Newton
    optimisation for deep learning (2017), for the exact roots; Eschenhagen, Immer, Turner,
    Schneider and Hennig, Kronecker-factored approximate curvature for modern neural network
    architectures (2023), for "expand" and "reduce".

    Args:
        net: a layer or a composite; or a function (params, one example's x) -> outputs z, such as
            the `apply` of a Flax model.
        loss: a `Loss` that has a `hessian_root`.
        params: the parameters.
        x, y: the mini-batch, as for `backprop`.
        roots: `MonteCarlo(samples)`, `Exact()` or `Empirical()`.
        key: for `MonteCarlo`, and for layers that draw.
        sharing: "expand" or "reduce".
        joint_bias: whether the bias of a matrix is part of its block, as a row for an input of 1:
            in a layer of one matrix and one bias, which is taken to be z = a W + b. Of a function,
            whose biases cannot be told, biases always have their own block.
        chunk: at most so many deltas at a time; bounds the memory, and changes nothing else.

    Returns:
        A `BlockDiagonal` of `Kronecker` and `Diagonal` blocks, in float32 at least.

    Raises:
        ValueError: inputs or targets that do not fit; a layer couples the examples; no key.
        NotImplementedError: the loss has no root; the message names it.
    """
    _check(net, loss, params, x, y, roots, key, sharing, chunk)
    joint_bias = flag_of(joint_bias, "joint_bias")
    return _kfac(net, loss, roots, sharing, joint_bias, chunk, params, x, y, key)


def ekfac(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    roots: Roots = MonteCarlo(),  # noqa: B008, it is immutable
    *,
    key: Array | None = None,
    sharing: Sharing = "expand",
    joint_bias: bool = True,
    chunk: int | None = None,
    basis: BlockDiagonal | None = None,
) -> BlockDiagonal:
    """K-FAC with its eigenvalues corrected: the exact diagonal in the eigenbasis of the factors.

    With A = U diag(alpha) U^T and G = V diag(gamma) V^T, the eigenvalues alpha gamma^T give way to

        1/B sum_n sum_v (U^T g_nv V)^2

    the best that can be done with these eigenvectors, in the Frobenius norm. With `Exact` roots the
    trace is that of the Gauss-Newton matrix.

    Source: George, Laurent, Bouthillier, Ballas and Vincent, Fast approximate natural gradient
    descent in a Kronecker-factored eigenbasis (2018), equation 9.

    Args:
        net, loss, params, x, y, roots, key, sharing, joint_bias, chunk: as in `kfac`, for the
            factors; the eigenvalues come from the same deltas.
        basis: from `kfac(...).decomposed()` or an earlier `ekfac`, to take its eigenvectors; then
            there are no new factors, and sharing and joint_bias are those of the basis.

    Returns:
        A `BlockDiagonal` of `Eigen` and `Diagonal` blocks.

    Raises:
        ValueError, NotImplementedError: as `kfac`; a basis of another network.
    """
    _check(net, loss, params, x, y, roots, key, sharing, chunk)
    joint_bias = flag_of(joint_bias, "joint_bias")
    if basis is None:
        basis = kfac(
            net, loss, params, x, y, roots, key=key, sharing=sharing, joint_bias=joint_bias,
            chunk=chunk,
        )  # fmt: skip
    elif not isinstance(basis, BlockDiagonal):
        raise TypeError(f"basis must be what kfac or ekfac gives, not {type(basis).__name__}")
    else:
        own = {k for block in basis.blocks.values() for k in block.where.leaves}
        pairs = pairs_of(net, params, x)
        learning = {k for k, pair in enumerate(pairs) if not isinstance(pair, Nothing)}
        due = (jax.tree.structure(params), shapes_of(params), learning)
        if (basis.tree, basis.shapes, own) != due:
            raise ValueError("basis is of other parameters: make it by kfac, of this network")
    return _ekfac(net, loss, roots, chunk, basis, params, x, y, key)


def _check(
    net: Any,
    loss: Any,
    params: Any,
    x: Any,
    y: Any,
    roots: Roots,
    key: Any,
    sharing: Any,
    chunk: Any,
) -> None:
    check_model(net, loss, params, x, y, key, roots)
    check_number("chunk", chunk, optional=True)
    if sharing not in get_args(Sharing):
        raise ValueError(f'sharing must be "expand" or "reduce", not {sharing!r}')


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _kfac(
    net: Model,
    loss: Loss,
    roots: Roots,
    sharing: Sharing,
    joint_bias: bool,
    chunk: int | None,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
) -> BlockDiagonal:
    joint_bias, n = joint_bias and isinstance(net, Node), batch_size(x)
    plan = planned(net, params, x, sharing, joint_bias)
    portions = portions_of(net, loss, roots, params, x, y, key, chunk)
    blocks = portions.blocks

    def ask(pairs: Sequence[Factored], aux: Sequence[Any]) -> list[PyTree]:
        roles = roles_of(pairs, sharing, joint_bias)
        return [_factors(*own, sharing, n, blocks) for own in zip(roles, pairs, strict=True)]

    found = over_deltas(net, loss, roots, params, x, y, key, ask, portions=portions)
    tree: Any = jax.tree.structure(params)
    every = tree.flatten_up_to(found)

    def block(role: Role, where: Where) -> Any:
        own = every[where.leaves[0]]
        if role is Role.DIAGONAL:
            return Diagonal(own / n, where)
        g = own.g.reshape(-1, *own.g.shape[-2:])
        if role is Role.BIAS:
            return Kronecker(jnp.ones((g.shape[0], 1), g.dtype), g, where)
        sides = 1 if isinstance(plan.pairs[where.leaves[0]], Lookup) else 2
        return Kronecker(own.a.reshape(-1, *own.a.shape[own.a.ndim - sides :]), g, where)

    found = OrderedDict((name, block(*own)) for name, own in plan.blocks.items())
    return BlockDiagonal(found, tree, shapes_of(params))


class _Factors(NamedTuple):
    """A and G of one parameter; a bias by itself has no A."""

    a: Array | None
    g: Array


def _factors(role: Role, pair: Any, sharing: Sharing, n: int, blocks: int) -> Any:
    """What is collected of one parameter, under the vmap over the deltas of one of some blocks.

    What is divided by is divided by first, its root: the pairs are smaller than the factors. It is
    about some of the n examples.
    """
    if role is Role.IN_MATRIX:
        return ()
    if role is Role.DIAGONAL:
        return second_moment(pair)
    dtype = wide_dtype(pair.delta.dtype)
    counted = 1 if sharing == "reduce" else math.prod(pair.delta.shape[2:-1])
    share = (n * max(counted, 1) * blocks) ** -0.5  # of A: it is found for every block
    pair = pair.with_deltas(lambda d: d.astype(dtype) * n**-0.5)
    if isinstance(pair, Shift | Lookup):
        deltas = pair.delta
        if isinstance(pair, Shift):  # exact: the sum over the positions comes first
            deltas = jnp.sum(deltas, axis=2, keepdims=True)
        every = lax.all_gather(deltas, DELTAS, axis=1)  # (n, v, ...): examples stay where they are
        g = _gram(every.reshape(-1, *deltas.shape[1:]))
        if isinstance(pair, Shift):
            return _Factors(None, g)
        ones = jnp.full((*pair.ids.shape, 1), share**2, dtype)
        place = Place((pair.ids.shape[1], pair.rows, 1), dtype)
        return _Factors(Lookup(pair.ids, ones, pair.rows, place).total()[..., 0], g)

    def some(a: Array, deltas: Array) -> _Factors:
        if sharing == "reduce":
            a = jnp.mean(a, axis=2, keepdims=True)
            deltas = jnp.sum(deltas, axis=3, keepdims=True)
        if role is Role.WITH_BIAS:
            a = with_last(a, share)
        return _Factors(_gram(a), _gram(deltas.reshape(-1, *deltas.shape[2:])))

    pair = dataclasses.replace(pair, a=pair.a.astype(wide_dtype(pair.a.dtype)) * share)
    return by_blocks(pair, some, 0)


def _gram(v: Array) -> Array:
    """sum_nt v (outer) v for each group: (n, G, T, f) -> (G, f, f)."""
    n, groups, t, f = v.shape
    if groups != 1:
        return einsum("ngti,ngtj->gij", v, v)
    return _of_rows(v.reshape(n * t, f))[None]


def _of_rows(v: Array) -> Array:
    """V^T V of rows (n, f); of many and long ones without what is below the diagonal.

    [[L^T L, L^T R], [R^T L, R^T R]] of the left and the right half: the third is the second turned,
    and copying it takes less time than as many products.
    """
    rows, f = v.shape
    if rows < _MANY or f < _LONG:
        return einsum("ni,nj->ij", v, v)
    left, right = v[:, : f // 2], v[:, f // 2 :]
    across = einsum("ni,nj->ij", left, right)
    upper = jnp.concatenate([_of_rows(left), across], axis=1)
    return jnp.concatenate([upper, jnp.concatenate([across.T, _of_rows(right)], axis=1)])


_MANY, _LONG = 384, 192


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _ekfac(
    net: Model,
    loss: Loss,
    roots: Roots,
    chunk: int | None,
    basis: BlockDiagonal,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
) -> BlockDiagonal:
    basis, n = basis.decomposed(), batch_size(x)
    tree: Any = jax.tree.structure(params)
    aux: list[Any] = [()] * tree.num_leaves
    for block in basis.blocks.values():
        if isinstance(block, Eigen):
            stack = block.where.places[0].stack
            u, v = (m if m is None else m.reshape(*stack, -1, *m.shape[1:])
                    for m in (block.u, block.v))  # fmt: skip
            aux[block.where.leaves[0]] = (u, v)

    def ask(pairs: Sequence[Factored], owns: Sequence[Any]) -> list[PyTree]:
        return [turned_second_moment(pair, *own) if own else second_moment(pair)
                for pair, own in zip(pairs, owns, strict=True)]  # fmt: skip

    own = jax.tree.unflatten(tree, aux)
    portions = portions_of(net, loss, roots, params, x, y, key, chunk)
    found = over_deltas(net, loss, roots, params, x, y, key, ask, own, portions)
    every = tree.flatten_up_to(found)
    blocks: OrderedDict[str, Any] = OrderedDict()
    for name, block in basis.blocks.items():
        values = every[block.where.leaves[0]] / n
        blocks[name] = block.with_eigenvalues(values.reshape(block.eigenvalues().shape))
    return BlockDiagonal(blocks, basis.tree, basis.shapes)


def update_average(average: BlockDiagonal, new: BlockDiagonal, decay: Any) -> BlockDiagonal:
    """decay * average + (1 - decay) * new, factor by factor: a running average as explicit state.

    To begin from nothing take `jax.tree.map(jnp.zeros_like, new)`, and divide by 1 - decay^steps;
    to begin from the first, take that.

    Raises:
        ValueError: blocks in eigenbases, as of `ekfac`, whose eigenvectors have no average.
    """
    for name, given in (("average", average), ("new", new)):
        if not isinstance(given, BlockDiagonal):
            raise TypeError(f"{name} must be what kfac gives, not {type(given).__name__}")
    every = (*average.blocks.values(), *new.blocks.values())
    if any(isinstance(block, Eigen) for block in every):
        raise ValueError("eigenvectors have no average: average what kfac gives, then decompose it")
    return jax.tree.map(lambda old, new: mix(old, new, decay), average, new)
