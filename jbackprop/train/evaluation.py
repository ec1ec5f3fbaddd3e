"""Mean costs and metrics over a data set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jbackprop.calls import refuse_coupling
from jbackprop.credit import State
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.objective import costs
from jbackprop.sharding import Sharding
from jbackprop.sweep import Node, forward
from jbackprop.train.checks import Examples, Fitting, check_metrics
from jbackprop.train.data import Loaded, Order, Picked, Streamed, examples_of
from jbackprop.train.placement import Placement

Metric = Callable[[Any, Any], Array]
"""(outputs, targets) -> one number for each example, (B,); see `jbackprop.metrics`."""

_AT_ONCE = 4096  # examples


def measure(metrics: Any, outputs: Any, y: Any) -> Iterator[tuple[str, Array]]:
    """By name, the metrics of every example, (B,)."""
    for name, metric in metrics:
        values = jnp.asarray(metric(outputs, y))
        if jnp.shape(values) != jax.tree.leaves(y)[0].shape[:1]:
            raise ValueError(
                f"metric {name!r} must give one number for each example, (B,), not the shape "
                f"{jnp.shape(values)}; see jbackprop.metrics"
            )
        if jnp.issubdtype(values.dtype, jnp.complexfloating):
            raise TypeError(f"metric {name!r} must give real numbers, not {values.dtype}")
        whole = not jnp.issubdtype(values.dtype, jnp.floating)  # a truth value is 0 or 1
        yield name, values.astype(jnp.float32 if whole else wide_dtype(values.dtype))


def evaluate(
    net: Node,
    loss: Loss,
    params: PyTree,
    data: Any,
    metrics: Mapping[str, Metric] | None = None,
    *,
    rule_state: State | None = None,
    mesh: Mesh | None = None,
    sharding: Sharding | None = None,
) -> dict[str, float]:
    """The mean cost, and the mean of each metric, over a data set.

    Args:
        net, loss, params: the network.
        data: (x, y), with the examples along the first axis, arrays or memory maps; or an iterable
            of such batches. As `fit` takes them.
        metrics: by name, functions (outputs, targets) -> (B,).
        rule_state: of a rule of `jbackprop.credit`, for outputs as the rule has them.
        mesh, sharding: the devices to evaluate on; as `fit` takes them.

    Returns:
        {"loss": ..., name: ...}, means over the examples.

    Raises:
        ValueError, TypeError: data or parameters that do not fit; a layer that couples examples.
    """
    if not isinstance(rule_state, State | None):
        raise TypeError(f"rule_state must be a state of a rule of jbackprop, not {rule_state!r}")
    needs = Fitting(net, loss, params, rule_state)
    refuse_coupling(net, "a cost")
    named = check_metrics(metrics)
    place = Placement(net, params, mesh, sharding)
    found = examples_of("data", needs, data, place)
    if mesh is not None:
        params = place.params(params)
    with place.entered():
        return evaluated(net, loss, params, found, named, rule_state, place)


def evaluated(
    net: Node,
    loss: Loss,
    params: PyTree,
    data: Examples | Loaded,
    metrics: tuple[tuple[str, Metric], ...],
    rule_state: State | None,
    place: Placement,
) -> dict[str, float]:
    """The same, of what has been checked, with parameters in their places."""
    sums: dict[str, float] = {}
    n = 0
    feed = data if isinstance(data, Loaded) else Streamed(data, in_parts(data.n), place, True)
    for batch in feed.batches(1):
        n += batch.size
        found = _evaluate(net, loss, metrics, params, rule_state, batch.x, batch.y, batch.weights)
        for name, total in found.items():
            sums[name] = sums.get(name, 0.0) + float(total)
    return {name: sums[name] / n for name in ("loss", *dict(metrics))}


def in_parts(n: int) -> Order:
    """The examples in their own order, some at a time."""

    def order(epoch: int) -> Iterator[Picked]:
        for start in range(0, n, _AT_ONCE):
            yield Picked(np.arange(start, min(start + _AT_ONCE, n)))

    return order


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _evaluate(
    net: Node,
    loss: Loss,
    metrics: Any,
    params: PyTree,
    rule_state: State | None,
    x: Any,
    y: Any,
    weights: Array | None,
) -> dict[str, Array]:
    outputs = None
    if rule_state is not None:
        state = dataclasses.replace(rule_state, net=net)
        outputs = state.rule.outputs(state, params, x)
    elif not loss.fuses or metrics:
        outputs, _ = forward(net, params, x)
    losses = costs(net, loss, params, x, y) if outputs is None else loss.value(outputs, y)
    values = {"loss": losses} | dict(measure(metrics, outputs, y))
    if weights is not None:
        values = {k: jnp.where(weights == 0, 0, v) for k, v in values.items()}
    return {name: jnp.sum(v) for name, v in values.items()}
