"""Mean costs and metrics over a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.credit import State
from jbackprop.factored import PyTree
from jbackprop.gradient import refuse_coupling
from jbackprop.losses import Loss
from jbackprop.objective import costs
from jbackprop.sweep import Node, forward
from jbackprop.train.checks import check_data

Metric = Callable[[Any, Any], Array]
"""(outputs, targets) -> one number for each example, (B,); see `jbackprop.metrics`."""

_AT_ONCE = 4096  # examples


def measure(metrics: Any, outputs: Any, y: Any) -> Iterator[tuple[str, Array]]:
    """By name, the metrics of every example, (B,)."""
    for name, metric in metrics:
        values = metric(outputs, y)
        if jnp.shape(values) != jax.tree.leaves(y)[0].shape[:1]:
            raise ValueError(
                f"metric {name!r} must give one number for each example, (B,), not the shape "
                f"{jnp.shape(values)}; see jbackprop.metrics"
            )
        yield name, values


def evaluate(
    net: Node,
    loss: Loss,
    params: PyTree,
    data: tuple[Any, Any],
    metrics: Mapping[str, Metric] | None = None,
    *,
    rule_state: State | None = None,
) -> dict[str, float]:
    """The mean cost, and the mean of each metric, over a data set.

    Args:
        net, loss, params: the network.
        data: (x, y), with the examples along the first axis.
        metrics: by name, functions (outputs, targets) -> (B,).
        rule_state: of a rule of `jbackprop.credit`, for outputs as the rule has them.

    Returns:
        {"loss": ..., name: ...}, means over the examples.

    Raises:
        ValueError, TypeError: data or parameters that do not fit; a layer that couples examples.
    """
    refuse_coupling(net, "a cost")
    x, y = check_data("data", net, loss, params, data, rule_state)
    n = len(jax.tree.leaves(y)[0])
    sums: dict[str, float] = {}
    for start in range(0, n, _AT_ONCE):
        part = jax.tree.map(lambda leaf, s=start: leaf[s : s + _AT_ONCE], (x, y))
        found = _evaluate(net, loss, tuple((metrics or {}).items()), params, rule_state, *part)
        for name, total in found.items():
            sums[name] = sums.get(name, 0.0) + float(total)
    return {name: sums[name] / n for name in ("loss", *(metrics or {}))}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(
    net: Node,
    loss: Loss,
    metrics: Any,
    params: PyTree,
    rule_state: State | None,
    x: Any,
    y: Any,
) -> dict[str, Array]:
    if rule_state is not None:
        state = dataclasses.replace(rule_state, net=net)
        outputs = state.rule.outputs(state, params, x)
    elif loss.fuses and not metrics:
        return {"loss": jnp.sum(costs(net, loss, params, x, y))}
    else:
        outputs, _ = forward(net, params, x)
    sums = {"loss": jnp.sum(loss.value(outputs, y))}
    return sums | {name: jnp.sum(values) for name, values in measure(metrics, outputs, y)}
