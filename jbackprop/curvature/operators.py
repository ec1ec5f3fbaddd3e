"""Curvature matrices as linear operators of the package lineax, for its solvers."""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from jbackprop.checks import number_of
from jbackprop.curvature.products import ggn_of, hessian_of
from jbackprop.curvature.roots import Roots
from jbackprop.curvature.sweeps import Model, check_model
from jbackprop.factored import PyTree
from jbackprop.losses import Loss


def hessian_operator(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    *,
    damping: float = 0.0,
    key: Array | None = None,
) -> Any:
    """v -> (H + damping I) v as a `lineax.FunctionLinearOperator`; symmetric.

    Args:
        net, loss, params, x, y, key: as in `hessian_product`.
        damping: what is added to the diagonal.

    Returns:
        The operator, over trees like params. `lineax.linear_solve(operator, grads, ...)` takes it.

    Raises:
        ValueError: as `hessian_product`.
        ImportError: lineax is not installed: `pip install 'jbackprop[solvers]'`.
    """
    check_model(net, loss, params, x, y, key)
    damping = _damping(damping)
    return _operator(hessian_of(net, loss, params, x, y, key), params, damping, "symmetric_tag")


def ggn_operator(
    net: Model,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    roots: Roots | None = None,
    *,
    damping: float = 0.0,
    key: Array | None = None,
) -> Any:
    """v -> (G + damping I) v as a `lineax.FunctionLinearOperator`; positive semi-definite.

    Args:
        net, loss, params, x, y: as in `ggn_product`.
        roots: for `fisher_product`'s matrix at these deltas; None for the Gauss-Newton matrix.
        damping: what is added to the diagonal; not negative.
        key: for `MonteCarlo` roots, and for layers that draw.

    Returns:
        The operator, over trees like params.

    Raises:
        ValueError: as `ggn_product`; a negative damping.
        ImportError: lineax is not installed: `pip install 'jbackprop[solvers]'`.
    """
    check_model(net, loss, params, x, y, key, roots)
    damping = _damping(damping, least=0)
    product = ggn_of(net, loss, params, x, y, key, roots)
    return _operator(product, params, damping, "positive_semidefinite_tag")


def _damping(value: Any, **bounds: Any) -> Any:
    """A number; traced, it is taken as it is."""
    return value if isinstance(value, jax.core.Tracer) else number_of(value, "damping", **bounds)


def _operator(product: Any, params: PyTree, damping: Any, tag: str) -> Any:
    try:
        import lineax
    except ImportError as error:
        raise ImportError(
            "linear operators are those of lineax: pip install 'jbackprop[solvers]'"
        ) from error

    def damped(vector: PyTree) -> PyTree:
        return jax.tree.map(lambda h, v: h + damping * v, product(vector), vector)

    like = jax.eval_shape(lambda params: params, params)
    return lineax.FunctionLinearOperator(damped, like, getattr(lineax, tag))
