"""Gauss-Newton steps by conjugate gradients: "Hessian-free" optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jbackprop.calls import check_loss, check_net
from jbackprop.checks import number_of
from jbackprop.curvature.products import ggn_inner, ggn_of
from jbackprop.curvature.sweeps import Model, check_model, check_number
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.mesh import like, on_mesh
from jbackprop.optim.damping import (
    Damping,
    LevenbergMarquardt,
    check_damping,
    check_rate,
    initial,
    next_damping,
)


class HessianFreeState(NamedTuple):
    """The state of `hessian_free`.

    Attributes:
        steps: so far.
        damping: lambda.
        step: the last solution d, like params; the next search begins near it.
    """

    steps: Array
    damping: Array
    step: PyTree


def hessian_free(
    net: Model,
    loss: Loss,
    learning_rate: float | Callable[[Any], Any] = 1.0,
    *,
    damping: Damping = LevenbergMarquardt(),  # noqa: B008, it is immutable
    iterations: int = 50,
    tolerance: float = 1e-4,
    warm_start: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Gauss-Newton steps on the mini-batch, each solved by conjugate gradients.

    d minimises g . d + d . (G + lambda I) d / 2, up to `iterations` of conjugate gradients
    (`jax.scipy.sparse.linalg.cg`), which ask for products with G alone; the search begins at
    warm_start times the last d. For large batches: about two gradients' work each iteration.

    The update needs the mini-batch: `update(grads, state, params, batch=(x, y))`, as
    `jbackprop.fit` calls it; where layers draw, the key of the gradient's draw, as `batch_key`; and
    with `LevenbergMarquardt` also value and value_fn.

    Source: Martens, Deep learning via Hessian-free optimization (2010), section 4.

    Args:
        net: a layer or a composite; or a function (params, one example's x) -> outputs z.
        loss: a `Loss` that has a `hessian_product`.
        learning_rate: what d is multiplied with; a number, or a schedule of the count of steps.
        damping: lambda, a positive number, or `LevenbergMarquardt(...)`.
        iterations: at most so many.
        tolerance: of the residual, relative to |g|, at which the search ends.
        warm_start: from 0 to 1.

    Returns:
        An `optax.GradientTransformationExtraArgs` with the state `HessianFreeState`.

    Raises:
        ValueError: options out of range; all that `jbackprop.curvature.ggn_product` refuses.
        TypeError: an update without params or batch.
    """
    if not callable(net) or isinstance(net, type):
        check_net(net)
    check_loss(loss)
    check_damping(damping)
    check_rate(learning_rate)
    check_number("iterations", iterations)
    warm_start = number_of(warm_start, "warm_start", least=0, most=1)
    tolerance = number_of(tolerance, "tolerance", least=0)

    def init(params: PyTree) -> HessianFreeState:
        step = jax.tree.map(jnp.zeros_like, params)
        return HessianFreeState(jnp.zeros((), jnp.int32), initial(damping), step)

    @on_mesh(lambda grads, *_: like(grads), compiled=False)
    def solve(
        grads: PyTree, state: HessianFreeState, params: PyTree, x: Any, y: Any, key: Any
    ) -> PyTree:
        product = ggn_of(net, loss, params, x, y, key)

        def shifted(v: PyTree) -> PyTree:
            return jax.tree.map(lambda h, v: h + state.damping.astype(v.dtype) * v, product(v), v)

        start = jax.tree.map(lambda v: jnp.asarray(warm_start, v.dtype) * v, state.step)
        down = jax.tree.map(jnp.negative, grads)
        cg = jax.scipy.sparse.linalg.cg
        return cg(shifted, down, start, tol=tolerance, maxiter=iterations)[0]

    def update(
        grads: PyTree,
        state: HessianFreeState,
        params: PyTree | None = None,
        *,
        batch: tuple[Any, Any] | None = None,
        batch_key: Array | None = None,
        value: Array | None = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        **_: Any,
    ) -> tuple[PyTree, HessianFreeState]:
        if params is None or not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise TypeError(
                "hessian_free needs the parameters and the mini-batch: call "
                "update(grads, state, params, batch=(x, y))"
            )
        x, y = batch
        check_model(net, loss, params, x, y)
        solved = solve(grads, state, params, x, y, batch_key)
        rate = learning_rate(state.steps) if callable(learning_rate) else learning_rate
        step = jax.tree.map(lambda v: jnp.asarray(rate, v.dtype) * v, solved)

        def bend() -> Array:
            one = jax.tree.map(lambda v: v[None], step)
            return ggn_inner(net, loss, params, x, y, one, key=batch_key)[0, 0]

        new = next_damping(
            damping, state.damping, state.steps, step, grads, params, bend, value, value_fn
        )
        return step, HessianFreeState(state.steps + 1, new, solved)

    return optax.GradientTransformationExtraArgs(init, update)
