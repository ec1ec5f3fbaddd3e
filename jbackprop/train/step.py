"""One step of training, as one program: the gradient, the update, and what is told of both."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jbackprop import credit
from jbackprop.factored import PyTree, weighted, wide_dtype
from jbackprop.losses import Loss
from jbackprop.objective import costs, value_grad_outputs
from jbackprop.per_example.clipping import Scheme
from jbackprop.structure import trainable_mask
from jbackprop.sweep import Node
from jbackprop.train.data import take
from jbackprop.train.evaluation import Metric, measure
from jbackprop.train.placement import Layout

NonFinite = Literal["raise", "skip", "rollback"]
"""What training does about a step whose loss or update is not finite."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is fixed while training, and hashable: the static part of a step.

    `rule` assigns the credit where it is not backpropagation; `scheme` and `microbatch` are of
    private training; `layout` is that of the parameters and the optimizer's state, and `grads`
    that of the parameters alone, on a mesh.
    """

    net: Node
    loss: Loss
    optimizer: optax.GradientTransformation
    metrics: tuple[tuple[str, Metric], ...]
    rule: credit.Rule | None = None
    nonfinite: NonFinite = "raise"
    scheme: Scheme | None = None
    microbatch: int | None = None
    layout: Layout | None = None
    grads: Layout | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.metrics)


def finite(tree: PyTree) -> Array:
    """Whether all is, in a tree of arrays; integers and keys are."""
    leaves = [v for v in jax.tree.leaves(tree) if jnp.issubdtype(v.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in [*leaves, jnp.zeros(())]]))


@functools.partial(jax.jit, static_argnums=0)
def step(
    task: Task,
    params: PyTree,
    opt_state: PyTree,
    x: Any,
    y: Any,
    indices: Any,
    weights: Any,
    key: Array | None,
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """One step: new parameters and state, and the means over the batch of loss and metrics."""
    x, y = take(x, indices), take(y, indices)
    shares = None
    if weights is not None:
        dtype = wide_dtype(jnp.result_type(*jax.tree.leaves(params), jnp.float16))
        shares = weights.astype(dtype) / jnp.sum(weights, dtype=dtype)
    value, grads, outputs = value_grad_outputs(
        task.net, task.loss, params, x, y, shares, key, outputs=bool(task.metrics)
    )
    if task.grads is not None:
        grads = task.grads.hold(grads)

    # For optimizers that search along a line, or ask for the curvature.
    def value_fn(params: PyTree, batch: Any = None, batch_key: Any = None) -> Array:
        return mean(costs(task.net, task.loss, params, x, y, key), shares)  # Optax hands them on

    updates, next_state = optax.with_extra_args_support(task.optimizer).update(
        grads, opt_state, params,
        value=value, grad=grads, value_fn=value_fn, batch=(x, y), batch_key=key,
    )  # fmt: skip
    means = {"loss": value} | {k: mean(v, shares) for k, v in measure(task.metrics, outputs, y)}
    return ended(task, params, opt_state, grads, updates, next_state, means)


def mean(values: Array, shares: Array | None) -> Array:
    """Of one value for each example, (B,); shares (B,) sum to 1."""
    return jnp.mean(values) if shares is None else jnp.sum(weighted(shares, values))


def ended(
    task: Task,
    params: PyTree,
    state: PyTree,
    grads: PyTree,
    updates: PyTree,
    next_state: PyTree,
    means: dict[str, Array],
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """What a step ends with: its update applied, or with "skip", if it is not finite, not.

    What is frozen stays as it is, whatever weight decay would make of it.
    """
    learns = trainable_mask(task.net, params)
    new = optax.apply_updates(params, updates)
    new = jax.tree.map(lambda own, after, before: after if own else before, learns, new, params)
    if task.nonfinite == "skip":
        fine = finite((means["loss"], grads, new))
        new, next_state = jax.tree.map(
            lambda after, before: jnp.where(fine, after, before), (new, next_state), (params, state)
        )
        means = means | {"loss": jnp.where(fine, means["loss"], jnp.nan)}
    if task.layout is not None:
        new, next_state = task.layout.hold((new, next_state))
    return new, next_state, means


def plain_updates(
    task: Task, grads: PyTree, opt_state: PyTree, params: PyTree, why: str, **extra: Any
) -> tuple[PyTree, PyTree]:
    """What an optimizer makes of a gradient that asks for no cost; one that does is refused."""
    try:
        return optax.with_extra_args_support(task.optimizer).update(
            grads, opt_state, params, **extra
        )
    except TypeError as error:
        if "keyword-only" not in str(error):
            raise
        raise TypeError(f"the optimizer asks for the cost, {why}: {error}") from error
