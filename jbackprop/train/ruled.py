"""Training by another rule than backpropagation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.credit import State
from jbackprop.factored import PyTree
from jbackprop.structure import walk
from jbackprop.train.checks import Examples
from jbackprop.train.data import Batch, Loaded, take
from jbackprop.train.evaluation import measure
from jbackprop.train.run import Run
from jbackprop.train.step import Task, ended, plain_updates

_STREAM = 2**32 - 2  # apart from those of `Run` and of private training


class RuledRun(Run):
    """The same, by a rule of `jbackprop.credit`. Its state goes with the optimizer's, in a pair."""

    def _prepared(self, task: Task) -> Task:
        assert task.rule is not None
        if task.rule.loss not in (None, task.loss):
            raise ValueError(
                f"fit has the loss {task.loss}, but the rule {task.rule.loss}: give one of them"
            )
        if isinstance(self._data, Loaded):
            raise ValueError(
                "a rule is made for the shapes of the examples: give data as (x, y), arrays or "
                "memory maps, not as a loader"
            )
        return dataclasses.replace(task, rule=dataclasses.replace(task.rule, loss=task.loss))

    def _begin(self) -> PyTree:
        assert self._task.rule is not None
        assert isinstance(self._data, Examples)
        cast = self._data.needs.cast
        x = jax.tree.map(
            lambda v: jax.ShapeDtypeStruct((1, *v.shape[1:]), cast(v.dtype)), self._data.x
        )
        key = jax.random.fold_in(self._key, _STREAM)
        rule, net = self._task.rule, self._task.net
        state = self._place.state(self.params, lambda params: rule.init(key, net, params, x))
        return super()._begin(), state

    def _asks_for_batch(self) -> bool:
        return True  # a rule knows no weights

    def states(self) -> tuple[PyTree, State]:
        return self.opt_state

    def _beyond(self, params: PyTree, opt_state: PyTree, x: Any, y: Any, key: Any) -> str:
        state = opt_state[1]
        grads, _ = state.rule.gradient(state, params, x, y, key)
        for path, layer, own in walk(state.net, grads):
            if not all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(own)):
                return (
                    f"what {type(state.rule).__name__} has for the gradient of {path} ({layer}); "
                    "the true one is finite"
                )
        return super()._beyond(params, opt_state, x, y, key)

    def _advance(self, params: PyTree, opt_state: PyTree, batch: Batch) -> tuple[Any, Any, Any]:
        args = batch.x, batch.y, batch.indices, self._draw()
        return _step(self._task, params, *opt_state, *args)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    task: Task,
    params: PyTree,
    opt_state: PyTree,
    rule_state: State,
    x: Any,
    y: Any,
    indices: Any,
    key: Array | None,
) -> tuple[PyTree, tuple[PyTree, State], dict[str, Array]]:
    rule = rule_state.rule
    x, y = take(x, indices), take(y, indices)
    grads, info = rule.gradient(rule_state, params, x, y, key)
    if task.grads is not None:
        grads = task.grads.hold(grads)
    updates, next_opt = plain_updates(
        task, grads, opt_state, params, "of which a rule's direction need not be a descent",
        value=info.loss,
    )  # fmt: skip
    updates, next_rule = rule.update(rule_state, params, updates, info)
    outputs = info.outputs
    if task.metrics and outputs is None:
        outputs = rule.outputs(rule_state, params, x)
    means = {"loss": info.loss} | {k: jnp.mean(v) for k, v in measure(task.metrics, outputs, y)}
    told = {name: v for name, v in info.extra.items() if jnp.ndim(v) == 0 and name not in means}
    means |= {name: v.astype(info.loss.dtype) for name, v in told.items()}
    before, after = (opt_state, rule_state), (next_opt, next_rule)
    return ended(task, params, before, grads, updates, after, means)
