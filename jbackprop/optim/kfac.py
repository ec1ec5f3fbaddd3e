"""K-FAC: the natural gradient, Kronecker-factored, as an Optax gradient transformation."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jbackprop import curvature
from jbackprop.checks import check_key, check_params, flag_of, number_of
from jbackprop.curvature.blocks import BlockDiagonal, mix
from jbackprop.curvature.roles import Sharing
from jbackprop.curvature.roots import MonteCarlo, Roots
from jbackprop.curvature.sweeps import Model, check_number
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.optim.damping import (
    Damping,
    LevenbergMarquardt,
    check_damping,
    check_rate,
    damped,
    initial,
    inner,
    next_damping,
)

Rate = float | Callable[[Any], Any]


class KfacState(NamedTuple):
    """The state of `kfac`.

    Attributes:
        steps: so far.
        key: of the next step.
        factors: the running average.
        basis: the same in its eigenbasis, as of the last inversion.
        damping: lambda.
        step: the last step, like params.
    """

    steps: Array
    key: Array
    factors: BlockDiagonal
    basis: BlockDiagonal
    damping: Array
    step: PyTree


def kfac(
    net: Model,
    loss: Loss,
    example: tuple[Any, Any],
    learning_rate: Rate | None = None,
    *,
    key: Array,
    damping: Damping = LevenbergMarquardt(),  # noqa: B008, it is immutable
    momentum: float | None = None,
    decay: float = 0.95,
    factors_every: int = 1,
    invert_every: int = 10,
    norm_constraint: float | None = None,
    roots: Roots = MonteCarlo(),  # noqa: B008, it is immutable
    sharing: Sharing = "expand",
    joint_bias: bool = True,
    corrected: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent with Kronecker factors of the curvature.

    In every step, with the gradient g of the mini-batch's mean cost, running averages of the
    factors (`jbackprop.curvature.kfac`), and the damping lambda,

        p = (A (x) G + lambda I)^-1 g                     in the factors' eigenbasis: exactly
        p = p min(1, sqrt(norm_constraint / (learning_rate^2 p . g)))       "KL clip"
        d = momentum * (the last d) - learning_rate * p

    Without a learning rate, rate and momentum are those that minimise the quadratic model
    M(d) = g . d + d . (F + lambda I) d / 2 over both, with F the Gauss-Newton matrix itself (by
    `jbackprop.curvature.ggn_inner`). What the model does not see, the noise of small mini-batches
    above all, is for the damping: with a small one that is fixed, small batches may diverge.

    The update needs the mini-batch: `update(grads, state, params, batch=(x, y))`, as
    `jbackprop.fit` calls it; and where layers draw, the key of the gradient's draw, as `batch_key`,
    so that the curvature is that of the same network. In `optax.chain` it belongs last: what it
    gives is the step.

    Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature (2015), algorithm 2, sections 5 (averages), 6.4 and 7 (rate and momentum); the damping
    in the eigenbasis, and `corrected`, George, Laurent, Bouthillier, Ballas and Vincent, Fast
    approximate natural gradient descent in a Kronecker-factored eigenbasis (2018); the norm
    constraint, Ba, Grosse and Martens, Distributed second-order optimization using Kronecker-
    factored approximations (2017), section 5.

    Args:
        net: a layer or a composite; or a function (params, one example's x) -> outputs z.
        loss: a `Loss` that has a `hessian_root`.
        example: a mini-batch (x, y) of any size; only its shapes are used.
        learning_rate: a number, a schedule of the count of steps, or None.
        key: for random targets, and for layers that draw where no `batch_key` is given.
        damping: lambda, a positive number, or `LevenbergMarquardt(...)`, for which update needs
            value and value_fn too.
        momentum: at least 0 and below 1, by default 0.9; with no learning rate it is found.
        decay: of the averages: min(1 - 1/t, decay) at their update t.
        factors_every: how often the factors are updated, in steps.
        invert_every: how often their eigenvectors are found anew.
        norm_constraint: positive, or None; with a learning rate only.
        roots, sharing, joint_bias: as in `jbackprop.curvature.kfac`.
        corrected: whether eigenvalues are a running average of those of
            `jbackprop.curvature.ekfac`, begun anew at every inversion with those of the factors.

    Returns:
        An `optax.GradientTransformationExtraArgs` with the state `KfacState`.

    Raises:
        ValueError: options out of range; all that `jbackprop.curvature.kfac` refuses.
        TypeError: an update without params or batch.
    """
    check_damping(damping)
    check_key(key)
    for name, flag in (("joint_bias", joint_bias), ("corrected", corrected)):
        flag_of(flag, name)
    for name, number in (("factors_every", factors_every), ("invert_every", invert_every)):
        check_number(name, number)
    for name, share in (("decay", decay), ("momentum", momentum)):
        if share is not None:
            number_of(share, name, least=0, below=1)
    if norm_constraint is not None:
        norm_constraint = number_of(norm_constraint, "norm_constraint", above=0)
    if learning_rate is None and not (norm_constraint is momentum is None):
        raise ValueError("norm_constraint and momentum go with a given learning rate: give one")
    check_rate(learning_rate, optional=True)
    if not (isinstance(example, tuple | list) and len(example) == 2):
        raise TypeError("example must be a mini-batch (x, y), of which only shapes are used")

    def factors_of(params: PyTree, x: Any, y: Any, key: Array) -> BlockDiagonal:
        return curvature.kfac(
            net, loss, params, x, y, roots, key=key, sharing=sharing, joint_bias=joint_bias
        )

    def init(params: PyTree) -> KfacState:
        check_params(params)
        shapes = jax.eval_shape(factors_of, params, *example, key)
        factors = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        basis = jax.tree.map(
            lambda v: jnp.zeros(v.shape, v.dtype),
            jax.eval_shape(lambda factors: factors.decomposed(), factors),
        )
        step = jax.tree.map(jnp.zeros_like, params)
        return KfacState(jnp.zeros((), jnp.int32), key, factors, basis, initial(damping), step)

    def update(
        grads: PyTree,
        state: KfacState,
        params: PyTree | None = None,
        *,
        batch: tuple[Any, Any] | None = None,
        batch_key: Array | None = None,
        value: Array | None = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        **_: Any,
    ) -> tuple[PyTree, KfacState]:
        if params is None or not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise TypeError(
                "K-FAC needs the parameters and the mini-batch: call "
                "update(grads, state, params, batch=(x, y))"
            )
        x, y = batch
        steps, own, drawn = state.steps, *jax.random.split(state.key)
        drawn = drawn if batch_key is None else batch_key
        number = (steps // factors_every).astype(float)
        share = jnp.minimum(number / (number + 1), decay)
        updates = steps % factors_every == 0

        def averaged() -> BlockDiagonal:
            return curvature.update_average(state.factors, factors_of(params, x, y, drawn), share)

        def mixed(basis: BlockDiagonal) -> BlockDiagonal:
            new = curvature.ekfac(net, loss, params, x, y, roots, key=drawn, basis=basis)
            pairs = ((name, block, new.blocks[name]) for name, block in basis.blocks.items())
            blocks = OrderedDict(
                (name, old.with_eigenvalues(mix(old.eigenvalues(), block.eigenvalues(), share)))
                for name, old, block in pairs
            )
            return dataclasses.replace(basis, blocks=blocks)

        factors = lax.cond(updates, averaged, lambda: state.factors)
        basis = lax.cond(steps % invert_every == 0, factors.decomposed, lambda: state.basis)
        if corrected:
            basis = lax.cond(updates, mixed, lambda basis: basis, basis)
        natural = basis.solve(grads, state.damping)

        def bends(*vectors: PyTree) -> Array:
            several = jax.tree.map(lambda *v: jnp.stack(v), *vectors)
            return curvature.ggn_inner(net, loss, params, x, y, several, key=drawn)

        if learning_rate is None:
            step, bend = _minimising(grads, natural, state, bends)
        else:
            rate = learning_rate(steps) if callable(learning_rate) else learning_rate
            kept = 0.9 if momentum is None else momentum
            step, bend = _given(grads, natural, state, rate, kept, norm_constraint), None
        new = next_damping(
            damping, state.damping, steps, step, grads, params,
            lambda: bends(step)[0, 0] if bend is None else bend, value, value_fn,
        )  # fmt: skip
        return step, KfacState(steps + 1, own, factors, basis, new, step)

    return optax.GradientTransformationExtraArgs(init, update)


def _given(
    grads: PyTree,
    natural: PyTree,
    state: KfacState,
    rate: Any,
    momentum: float,
    norm_constraint: float | None,
) -> PyTree:
    """momentum * (the last step) - rate * natural, constrained."""
    if norm_constraint is not None:
        square = rate**2 * inner(natural, grads)  # of a positive definite matrix: not negative
        rate = rate * jnp.minimum(1, jnp.sqrt(norm_constraint / jnp.maximum(square, 1e-30)))
    return jax.tree.map(
        lambda last, p: jnp.asarray(momentum, p.dtype) * last - jnp.asarray(rate, p.dtype) * p,
        state.step,
        natural,
    )


def _minimising(
    grads: PyTree, natural: PyTree, state: KfacState, bends: Callable[..., Array]
) -> tuple[PyTree, Array]:
    """The best step d in the plane of -natural and the last step, by the model; and d . G d."""
    down, last, damping = jax.tree.map(jnp.negative, natural), state.step, state.damping
    g = bends(down, last)
    aa, ab = damped(g[0, 0], down, down, damping), damped(g[0, 1], down, last, damping)
    bb = damped(g[1, 1], last, last, damping)
    ga, gb = (inner(grads, v).astype(g.dtype) for v in (down, last))
    determinant = aa * bb - ab * ab
    together = determinant > 1e-6 * aa * bb  # else they are nearly one direction, or one is 0
    safe = jnp.where(together, determinant, 1)
    alone = -ga / jnp.where(aa > 0, aa, 1)
    alpha = jnp.where(together, (-ga * bb + gb * ab) / safe, alone)
    mu = jnp.where(together, (-gb * aa + ga * ab) / safe, 0)
    step = jax.tree.map(
        lambda v, last: alpha.astype(v.dtype) * v + mu.astype(v.dtype) * last, down, last
    )
    both = jnp.stack([alpha, mu])
    return step, both @ g @ both
