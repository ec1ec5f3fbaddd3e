"""One rule alone: its agreement with autodiff of its own forward, and the laws that rules keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.check.arrays import judged
from jbackprop.check.inputs import Inputs, check_options, inner
from jbackprop.check.judge import How, TruthKind
from jbackprop.check.precision import FLOOR64, as_given, cast, exactly, float64, is_float
from jbackprop.check.programs import reached
from jbackprop.check.report import Figures, Report, composed, demand
from jbackprop.checks import (
    check_key,
    check_leaves,
    check_params,
    floating_of,
    shape_of,
    size_of,
)
from jbackprop.factored import PyTree, is_factored
from jbackprop.structure import trainable_mask
from jbackprop.sweep import Layer, Node, Trace, backward, forward, keep, total


def layer(
    layer: Node,
    x_shape: tuple[int, ...] | int | None = None,
    *,
    x: Any = None,
    params: PyTree = None,
    dtype: Any = None,
    batch: int = 3,
    key: Array | None = None,
    truth: TruthKind = "both",
    tolerance: float | None = None,
    directions: int = 2,
    seed: int = 0,
) -> Report:
    """Check one rule alone, a layer's or a composite's.

    Args:
        layer: the layer.
        x_shape: the shape of one example's input; a random mini-batch of it is made.
        x: instead of x_shape, a mini-batch (B, ...), any tree: for integer inputs and the like.
        params: by default fresh ones, from `init`.
        dtype: what the rule computes in where it is compared with autodiff; by default that of the
            parameters, or of x. The laws are tried in float64.
        batch: how many examples to make.
        key: for layers that draw; without one nothing is drawn.
        truth: as in `gradient`.
        tolerance: as in `gradient`, for the comparison with autodiff.
        directions: as in `gradient`.
        seed: of inputs, parameters, deltas and directions.

    Returns:
        A `Report`. "alone": gradients and dC/dx of the cost <delta, y>, for a random delta, against
        autodiff of the layer's own forward. "law", each in float64, relative to the size of what is
        compared: backward is linear in delta (zero, sums, multiples), the adjoint identity
        <J v, u> = <v, J^T u>, `total` and `square_norm` are those of `each`, jit equals eager, vmap
        equals a loop, params are left as they were and are not in the trace, the trace holds
        nothing that backward does not read, and twice gives the same bits.

    Raises:
        TypeError: no layer; neither parameters nor inputs that are floating-point.
        ValueError: neither x_shape nor x, or both; a batch of none.
    """
    check_options(truth, tolerance, directions, seed)
    if not isinstance(layer, Node):
        raise TypeError(f"layer must be a layer or a composite of layers, not {layer!r}")
    if (x is None) == (x_shape is None):
        raise ValueError(
            "give either x_shape, the shape of one example's input, or x, a mini-batch"
        )
    keys = jax.random.split(jax.random.key(seed), 2)
    params = layer.init(keys[0]) if params is None else params
    if x is None:
        batch = size_of(batch, "batch")
        shape = shape_of((x_shape,) if isinstance(x_shape, int) else x_shape, "x_shape")
        x = jax.random.normal(keys[1], (batch, *shape))
    check_params(params)
    check_leaves("x", x)
    check_key(key, optional=True)
    params, x = jax.tree.map(np.asarray, (params, x))
    found = [leaf.dtype for leaf in jax.tree.leaves((params, x)) if is_float(leaf)]
    if not found:
        raise TypeError(f"{layer!r} has no floating-point parameter or input to differentiate by")
    dtype = floating_of(dtype or found[0], "dtype")
    with as_given(dtype):
        rule = _Rule(layer, cast((params, x), dtype), key, seed)
    agreement = rule.agreement(dtype, truth, tolerance, directions, seed)
    with exactly():
        wide = _Rule(layer, cast((params, x), "float64"), key, seed)
        laws = list(wide.laws())
    notes = []
    if layer.couples_examples:
        notes.append("It couples the examples: laws about single examples do not apply.")
    return composed(
        "jb.check.layer", repr(layer), [agreement, composed("", "laws", laws)], notes=notes
    )


def assert_layer(layer_: Node, x_shape: tuple[int, ...] | None = None, **options: Any) -> None:
    """As `layer`; raises AssertionError with the report unless all is right."""
    demand(layer(layer_, x_shape, **options))


class _Rule:
    """A layer at one mini-batch, with two random deltas."""

    def __init__(self, layer: Node, point: Any, key: Any, seed: int) -> None:
        params, x = point
        self.layer, self.params, self.x, self.key = layer, params, x, key
        rng = np.random.default_rng([seed, 2])
        shapes = jax.eval_shape(lambda p, x: forward(layer, p, x, key)[0], params, x)
        self.u, self.v = (
            jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(s.dtype), shapes)
            for _ in range(2)
        )

    def trace(self, params: PyTree, x: Any) -> Trace:
        y, saved = forward(self.layer, params, x, self.key)
        return self.layer.trace(x, y, saved)

    def swept(self, params: PyTree, x: Any, delta: Any, collect: Any = total) -> tuple[Any, PyTree]:
        """(dC/dx, what is collected)."""
        return backward(self.layer, params, self.trace(params, x), delta, collect)

    def agreement(
        self, dtype: Any, truth: TruthKind, tolerance: float | None, directions: int, seed: int
    ) -> Report:
        learn = trainable_mask(self.layer, self.params)
        learning = jax.tree.map(lambda m, leaf: leaf if m else None, learn, self.params)

        def fun(params: PyTree, x: Any) -> Any:
            params = jax.tree.map(lambda m, p, leaf: p if m else leaf, learn, params, self.params)
            return forward(self.layer, params, x, self.key)[0]

        inputs = Inputs(fun, (learning, self.x), (0, 1), False)
        with as_given(dtype):
            delta_x, gradients = jax.jit(self.swept)(self.params, self.x, self.u)
        gradients = jax.tree.map(lambda m, g: g if m else None, learn, gradients)
        candidates = inputs.match((gradients, delta_x))
        u = [float64(leaf) for leaf in jax.tree.leaves(self.u)]

        def scalar(active: list[Any], passive: list[Any]) -> Array:
            return inner(u, jax.tree.leaves(inputs.call(fun, active, passive)))

        scalar = inputs.at_any_precision(scalar)
        how = How(truth, tolerance, directions, seed)
        return judged(inputs, candidates, scalar, scalar, how, "alone")

    def laws(self) -> Iterator[Report]:
        params, x, u, v = self.params, self.x, self.u, self.v
        swept = jax.jit(self.swept)
        of_u, of_v = swept(params, x, u), swept(params, x, v)
        yield from self.linear(swept, of_u, of_v)
        yield self.adjoint(of_u)
        if not self.layer.couples_examples:
            yield from self.each()
            yield self.loop(of_u)
        with jax.disable_jit():
            yield equal("jit equals eager", of_u, self.swept(params, x, u))
        bits = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(of_u)]
        again = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(swept(params, x, u))]
        yield law("deterministic", bits == again, "twice the same call gave two results")
        yield self.untouched()
        yield self.no_params_in_trace()
        if isinstance(self.layer, Layer):
            yield self.lean()

    def linear(self, swept: Any, of_u: Any, of_v: Any) -> Iterator[Report]:
        none = swept(self.params, self.x, jax.tree.map(np.zeros_like, self.u))
        zero = not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(none))
        yield law("linear: a delta of zero gives zero", zero, "backward is not linear in delta")
        mixed = jax.tree.map(lambda a, b: 2 * a - 3 * b, self.u, self.v)
        apart = jax.tree.map(lambda a, b: 2 * a - 3 * b, of_u, of_v)
        found = swept(self.params, self.x, mixed)
        yield equal("linear: sums and multiples", found, apart, norm(of_u) + norm(of_v))

    def adjoint(self, of_u: Any) -> Report:
        rng = np.random.default_rng(0)
        inputs, tree = jax.tree.flatten((self.params, self.x))
        v = [rng.standard_normal(leaf.shape) for leaf in inputs if is_float(leaf)]

        def along(moving: list[Any]) -> Any:
            left = iter(moving)
            leaves = [next(left) if is_float(leaf) else leaf for leaf in inputs]
            params, x = jax.tree.unflatten(tree, leaves)
            return jax.tree.leaves(forward(self.layer, params, x, self.key)[0])

        _, jv = jax.jvp(along, ([leaf for leaf in inputs if is_float(leaf)],), (v,))
        delta_x, gradients = of_u
        back = jax.tree.leaves((gradients, delta_x))
        there = [float64(a) * b for a, b in zip(jv, jax.tree.leaves(self.u), strict=True)]
        here = [float64(a) * b for a, b in zip(back, v, strict=True)]
        left, right = (np.asarray(sum(np.sum(term) for term in terms)) for terms in (here, there))
        size = sum(float(np.sum(np.abs(term))) for term in (*here, *there))
        return equal("adjoint: <J v, u> = <v, J^T u>", left, right, size)

    def each(self) -> Iterator[Report]:
        _, pairs = self.swept(self.params, self.x, self.u, keep)
        pairs = jax.tree.leaves(pairs, is_leaf=is_factored)
        if not pairs:
            return
        each = [float64(pair.each()) for pair in pairs]
        size = sum(norm(np.abs(g).sum(0)) for g in each)
        yield equal(
            "total is the sum of each", [pair.total() for pair in pairs],
            [g.sum(0) for g in each], size,
        )  # fmt: skip
        squares = [np.sum(np.square(g.reshape(len(g), -1)), axis=1) for g in each]
        yield equal("square_norm is that of each", [pair.square_norm() for pair in pairs], squares)

    def loop(self, of_u: Any) -> Report:
        if self.key is not None and self.layer.draws:  # one by one they would draw otherwise
            return law("vmap equals a loop", True, "")
        n = len(jax.tree.leaves(self.x)[0])
        parts = []
        for i in range(n):
            x, u = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (self.x, self.u))
            parts.append(self.swept(self.params, x, u))
        delta_x = jax.tree.map(lambda *d: jnp.concatenate(d), *(p[0] for p in parts))
        gradients = jax.tree.map(lambda *g: sum(g), *(p[1] for p in parts))
        size = norm(of_u) + sum(norm(p[1]) for p in parts)
        return equal("vmap equals a loop", of_u, (delta_x, gradients), size)

    def untouched(self) -> Report:
        before = jax.tree.map(np.array, self.params)
        with jax.disable_jit():
            _, gradients = self.swept(self.params, self.x, self.u)
        same = jax.tree.all(jax.tree.map(np.array_equal, before, self.params))
        if not same:
            return law("params are left as they were", False, "forward or backward changes them")
        mirrored = jax.tree.map(np.shape, gradients) == jax.tree.map(np.shape, before)
        return law(
            "params are left as they were", mirrored, "the gradients do not have their structure"
        )

    def no_params_in_trace(self) -> Report:
        one = self.params, self.x
        closed = jax.make_jaxpr(lambda p, x: forward(self.layer, p, x, self.key)[1])(*one)
        n, m = len(jax.tree.leaves(self.params)), len(closed.jaxpr.invars)
        by_params = reached(closed.jaxpr, [i < n for i in range(m)])
        by_x = reached(closed.jaxpr, [i >= n for i in range(m)])
        hidden = sum(p and not q for p, q in zip(by_params, by_x, strict=True))
        return law(
            "no params in the trace", not hidden,
            f"{hidden} of the saved arrays depend on params alone: backward is given those",
        )  # fmt: skip

    def lean(self) -> Report:
        trace = jax.tree.map(lambda leaf: leaf[0], self.trace(self.params, self.x))
        leaves, tree = jax.tree.flatten(trace)
        u = jax.tree.map(lambda leaf: leaf[0], self.u)
        if not jax.tree.leaves(u):
            return law("nothing is kept that nobody reads", True, "")

        def rule(leaves: list[Any], params: PyTree, u: Any) -> Any:
            assert isinstance(self.layer, Layer)
            return self.layer.backward(params, jax.tree.unflatten(tree, leaves), u)

        try:
            closed = jax.make_jaxpr(rule)(leaves, self.params, u)
        except NameError:  # an axis name: it couples the examples
            return law("nothing is kept that nobody reads", True, "")
        total = len(closed.jaxpr.invars)
        idle = [
            i for i in range(len(leaves))
            if not any(reached(closed.jaxpr, [j == i for j in range(total)]))
        ]  # fmt: skip
        names = ", ".join(
            "trace" + jax.tree_util.keystr(path)
            for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(trace)[0])
            if i in idle
        )
        return law("nothing is kept that nobody reads", not idle, f"backward does not read {names}")


def _alike(a: PyTree, b: PyTree) -> bool:
    return str(jax.tree.structure(a)) == str(jax.tree.structure(b))


def norm(tree: PyTree) -> float:
    """The norm of all entries of a tree."""
    return math.sqrt(sum(float(np.sum(np.square(float64(v)))) for v in jax.tree.leaves(tree)))


def law(name: str, holds: bool, why: str) -> Report:
    """A law that holds or does not."""
    return Report(name, "law", own="right" if holds else "wrong", why="" if holds else why)


def equal(name: str, found: PyTree, due: PyTree, size: float | None = None) -> Report:
    """A law that two trees are equal, up to rounding in float64, relative to the size."""
    if not _alike(found, due):
        return law(name, False, "the results have different structures")
    gaps = jax.tree.map(lambda a, b: float64(a) - float64(b), found, due)
    size = norm(due) if size is None else size
    error = norm(gaps) / size if size else (0.0 if norm(gaps) == 0 else math.inf)
    own: Any = "right" if error <= FLOOR64 else "wrong"
    return Report(name, "law", own=own, figures=Figures(error, FLOOR64))
