"""Pairs (activation, delta) from any JAX model, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jbackprop.capture import uses
from jbackprop.capture.pairs import pair_of
from jbackprop.capture.plan import Known, Planner
from jbackprop.capture.parts import of_leaf
from jbackprop.capture.run import evaluate


class Capture:
    def __call__(self, cost, has_aux=False):
        def captured(params, *batch):
            leaves, tree = jax.tree.flatten(params)
            paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
            leaves = [jnp.asarray(v) for v in leaves]
            moving, batch_tree = jax.tree.flatten(batch)
            n = moving[0].shape[0]
            shapes = []
            def flat(leaves, moving):
                out = cost(jax.tree.unflatten(tree, leaves), *jax.tree.unflatten(batch_tree, moving))
                value, aux = out if has_aux else (out, ())
                aux, aux_tree = jax.tree.flatten(aux)
                shapes.append(aux_tree)
                return [value, *aux]
            like = lambda v, k: jax.ShapeDtypeStruct(v.shape[k:], v.dtype)
            closed = jax.make_jaxpr(flat)([like(v, 0) for v in leaves], [like(v, 1) for v in moving])
            planner = Planner()
            known = [Known((of_leaf(k, v.shape),)) for k, v in enumerate(leaves)] + [Known((), True) for _ in moving]
            plan, out = planner.plan(closed.jaxpr, closed.consts, known)
            if out[0].parts:
                v = closed.jaxpr.outvars[0]
                plan.last = [planner.add(uses.shift(part, (), "result"), v) for part in out[0].parts]
            plan.uses = planner.uses
            def example(moving):
                sinks = {use.index: tuple(jnp.zeros(tuple(l.length for l in use.part.levels) + s.shape, s.dtype) for s in use.shapes) for use in planner.uses}
                def f(sinks):
                    (value, *aux), seen = evaluate(plan, [*leaves, *moving], sinks)
                    return value, (aux, seen)
                value, back, (aux, seen) = jax.vjp(f, sinks, has_aux=True)
                (made,) = back(jnp.ones((), value.dtype))
                return value, aux, made, seen
            costs, aux, made, seen = jax.vmap(example)(moving)
            pairs = []
            for k, (leaf, path) in enumerate(zip(leaves, paths)):
                own = [use for use in planner.uses if use.part.leaf == k]
                pairs.append(pair_of(own, [made[u.index] for u in own], [seen.get(u.index) for u in own], leaf, path, n))
            return costs, jax.tree.unflatten(tree, pairs)
        return captured

capture = Capture()
