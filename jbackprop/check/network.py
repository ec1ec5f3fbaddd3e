"""Every delta and every gradient of a network against the truth, from the output back.

The truth is `jax.grad` in float64 of the network's forward sweep and the loss's value alone,
confirmed by numbers; no backward rule has a part in it. Deltas come from taps: a parameter added
behind every layer. Each rule is then tried once more with the true delta handed in, so that one
wrong rule does not put the ones below it in doubt.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.calls import check_call, coupling_layer
from jbackprop.check import judge
from jbackprop.check.diagnosis import Suspect, diagnose
from jbackprop.check.inputs import check_options
from jbackprop.check.judge import TruthKind
from jbackprop.check.numbers import EXACT, by_numbers, confirm, confirm_together, warn_of
from jbackprop.check.numerical import FIRST, Slope, Slopes
from jbackprop.check.precision import as_given, cast, exactly, float64, is_float
from jbackprop.check.programs import reached
from jbackprop.check.report import Report, composed, demand
from jbackprop.check.swept import (
    by_autodiff,
    by_each_rule,
    by_rule,
    floats,
    inputs_of,
    learns,
    output_of,
    over_copies,
)
from jbackprop.checks import floating_of
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.structure import stack_axes, suffix, trainable_mask, untied, walk
from jbackprop.sweep import Layer, Node, batch_size, forward


def network(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    dtype: Any = None,
    truth: TruthKind = "both",
    tolerance: float | None = None,
    directions: int = 1,
    seed: int = 0,
    key: Array | None = None,
) -> Report:
    """Compare every delta and every gradient of a network with the truth.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: the network's parameters.
        x: the inputs, (B, ...).
        y: the targets.
        dtype: what our rules compute in; by default that of the parameters. The truth is computed
            in float64 from the same numbers, rounded to this dtype.
        truth: "autodiff" is `jax.grad` of the forward sweep and the loss's value in float64; "both"
            has it confirmed by numbers along random directions in every parameter. "numerical"
            judges the gradients by numbers alone, and the deltas (of which there are too many) by
            autodiff.
        tolerance: the relative error in norm that is right; by default as `gradient` has it.
        directions: random directions in each parameter, for numbers.
        seed: of the directions.
        key: for layers that draw; without one nothing is drawn. Such a layer must draw the same in
            every dtype, as `Dropout` does: the truth is computed in float64.

    Returns:
        A `Report`: for the loss its "value" and "delta" as `value_and_delta` has them, and the
        "delta alone" as `delta` has it; then for each layer from the output back, the "delta" (of
        every example's own cost) and its parameters' "gradient" (of the summed cost) as the sweep
        has them, and, with the true delta handed in, the "gradient alone" and "dC/dx alone" of its
        rule. The first layer whose rule alone is wrong is named on top. A parameter that is used
        in two places (`Tied`) is checked in each of them, as if it were two. Layers inside `Frozen`
        have no gradient; the delta and the "dC/dx alone" are theirs as anyone's.

    Raises:
        ValueError: inputs, targets and parameters that do not fit; a layer that couples examples.
        TypeError: as `backprop`.
    """
    check_options(truth, tolerance, directions, seed)
    if dtype is not None:
        floating_of(dtype, "dtype")
    check_call(net, loss, params, x, y, key)
    if batch_size(x) == 0:
        raise ValueError("the batch is empty: there is nothing to compare")
    if net.couples_examples:
        raise ValueError(
            f"{coupling_layer(net)} couples the examples: the delta of one example's own cost is "
            "not defined, so that this check has no truth for it"
        )
    net, params = untied(net, params)
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    moving = [leaf for leaf in jax.tree.leaves(params) or jax.tree.leaves(x) if is_float(leaf)]
    dtype = jnp.dtype(dtype or jnp.result_type(*moving))
    point = cast((params, x, y), dtype)
    with as_given(dtype):
        loss.check(jax.eval_shape(lambda p, x: forward(net, p, x)[0], *point[:2]).shape, y)
    return _Check(net, loss, point, key, dtype, truth, tolerance, directions, seed).report()


def assert_network(net: Node, loss: Loss, params: PyTree, x: Any, y: Any, **options: Any) -> None:
    """As `network`; raises AssertionError with the report unless all is right."""
    demand(network(net, loss, params, x, y, **options))


class _Check:
    """One network at one point.

    What is compared comes in one structure: the loss's delta, and for every layer by path its
    "delta", its "gradient", and the "dC/dx" that its rule makes of the true delta.
    """

    def __init__(
        self, net: Node, loss: Loss, point: Any, key: Any, dtype: Any, truth: TruthKind,
        tolerance: float | None, directions: int, seed: int,
    ) -> None:  # fmt: skip
        self.net, self.loss, self.point, self.dtype = net, loss, point, dtype
        self.key, self.truth, self.tolerance = key, truth, tolerance
        self.directions, self.seed = directions, seed
        self.notes: list[str] = []

    def report(self) -> Report:
        with exactly():
            shapes = jax.eval_shape(
                functools.partial(by_autodiff, self.net, self.loss),
                cast(self.point, "float64"),
                self.key,
            )
        known = judge.truths(
            lambda p: jax.tree.leaves(by_autodiff(self.net, self.loss, p, self.key)),
            self.point,
            [self.dtype],
            self.seed,
        )
        truths = dict(zip(_flat(shapes), known, strict=True))
        true = jax.tree.unflatten(jax.tree.structure(shapes), [t.value for t in known])
        deltas = {path: part["delta"] for path, part in cast(true, self.dtype).items()}
        with as_given(self.dtype):
            together = _flat(by_rule(self.net, self.loss, self.point, self.key))
            alone = _flat(by_each_rule(self.net, self.loss, self.point, self.key, deltas))
        verdicts = {key: self._leaf(key, key[1], c, truths[key]) for key, c in together.items()}
        rules = {
            key: self._leaf(key, f"{key[1]} alone", c, truths[key]) for key, c in alone.items()
        }
        self._settle_unused(rules, alone)
        if self.truth != "autodiff":
            self._by_numbers(verdicts, rules, truths, together, alone)
        self._explain(verdicts, rules, together, alone, true)
        own = [
            leaf for found in (verdicts, rules) for key, leaf in found.items() if key[0] == "loss"
        ]
        parts = [composed("loss", repr(self.loss), own)]
        for path, layer, _ in reversed(list(walk(self.net))):
            own = [leaf for key, leaf in rules.items() if key[0] == path]
            mine = [leaf for key, leaf in verdicts.items() if key[0] == path]
            if mine or own:  # not, where integers are handed on
                parts.append(composed(path, repr(layer), [*mine, *own]))
        return composed("jb.check.network", "", parts, _first(parts), self._told())

    def _leaf(self, key: tuple[str, str, str], kind: str, c: Any, truth: judge.Truth) -> Report:
        return judge.compare(key[0] + key[2], kind, c, truth, self.dtype, self.tolerance)

    def _settle_unused(self, rules: Any, alone: Any) -> None:
        """Zeros are right where a layer leaves a part of its input alone."""
        zeros = [
            key for key, leaf in rules.items()
            if key[1] == "dC/dx" and leaf.verdict == "inconclusive" and not np.any(alone[key])
        ]  # fmt: skip
        if not zeros:
            return
        params, x, _ = self.point
        with as_given(self.dtype):
            inputs = functools.partial(inputs_of, self.net)
            entered, keys, _ = jax.eval_shape(inputs, params, x, self.key)
            for path, layer, own in walk(self.net, params):
                parts = jax.tree_util.tree_flatten_with_path(entered[path])[0]
                names = [suffix(name) for name, _ in parts]
                run = over_copies(functools.partial(output_of, layer), stack_axes(self.net)[path])
                for key in zeros:
                    if key[0] != path:
                        continue
                    jaxpr = jax.make_jaxpr(run)(own, entered[path], keys[path]).jaxpr
                    first = len(jax.tree.leaves(own))
                    at = first + names.index(key[2])
                    if not any(reached(jaxpr, [i == at for i in range(len(jaxpr.invars))])):
                        why = "zero, as it must be: the layer does not depend on it"
                        rules[key] = dataclasses.replace(rules[key], own="right", why=why)

    def _told(self) -> list[str]:
        confirmed = {
            "autodiff": "",
            "both": f", confirmed by numbers along {self.directions} random direction(s) in each "
            "parameter",
            "numerical": " for the deltas, and values alone for the gradients",
        }[self.truth]
        source = f"automatic differentiation of the forward sweep in float64{confirmed}"
        return [f"Computed in {self.dtype}; truth: {source} (seed {self.seed}).", *self.notes]

    def _by_numbers(
        self, verdicts: Any, rules: Any, truths: Any, together: Any, alone: Any
    ) -> None:
        params, x, y = self.point
        leaves, tree = jax.tree.flatten(params)
        learn = jax.tree.leaves(trainable_mask(self.net, params))
        moving = [i for i, learns in enumerate(learn) if learns]
        if not moving:
            return
        numbers = jax.tree.unflatten(tree, list(range(len(leaves))))
        where = {
            key: moving.index(i)
            for key, i in _flat(
                {path: {"gradient": own} for path, _, own in walk(self.net, numbers)}
            ).items()
            if i in moving
        }

        def cost(moved: list[Any], data: Any) -> Array:
            x, y, all_leaves = data
            at = dict(zip(moving, moved, strict=True))
            own = [at.get(i, leaf) for i, leaf in enumerate(all_leaves)]
            return jnp.sum(
                self.loss.value(forward(self.net, jax.tree.unflatten(tree, own), x, self.key)[0], y)
            )

        rng = np.random.default_rng([self.seed, 1])
        wide = [float64(leaves[i]) for i in moving]
        data = cast((x, y, leaves), "float64")
        slopes = Slopes(cost, wide, data)
        confirmed: set[int] = set()
        if self.truth == "both":
            own = {i: truths[key] for key, i in where.items()}
            confirmed = confirm_together(
                [own[i] for i in range(len(wide))], lambda d: slopes.along(d, data),
                self.directions, rng, [self.dtype] * len(wide),
            )  # fmt: skip
        for key, i in where.items():
            if i in confirmed:
                continue

            def probe(d: np.ndarray, first: float = FIRST, i: int = i) -> Slope:
                along = [d if j == i else np.zeros_like(w) for j, w in enumerate(wide)]
                return slopes.along(along, data, first)

            verdict, told = "disagree", ""
            if self.truth == "both":
                verdict, told = confirm(truths[key], probe, self.directions, rng, self.dtype)
            if verdict == "unknown":
                self.notes.append(f"{key[0]}{key[2]}: jax.grad is not confirmed by numbers: {told}")
            if verdict != "disagree":
                continue
            if self.truth == "both":
                self.notes.append("warning: " + warn_of(key[0] + key[2], told))
            for found, candidates in ((verdicts, together), (rules, alone)):
                old, c = found[key], candidates[key]
                limit = old.figures.tolerance if old.figures else 0.0
                exact = np.size(c) <= EXACT
                found[key], _ = by_numbers(
                    old.path, old.kind, c, probe, self.dtype, limit, self.directions, rng, exact
                )

    def _explain(self, verdicts: Any, rules: Any, together: Any, alone: Any, true: Any) -> None:
        """Put a diagnosis to each wrong rule, and a reason to what is wrong because of another."""
        params, x, y = self.point
        if not any(leaf.verdict == "wrong" for leaf in [*verdicts.values(), *rules.values()]):
            return
        with as_given(self.dtype):
            inputs = jax.jit(functools.partial(inputs_of, self.net))
            entered, keys, z = inputs(params, x, self.key)
        sizes = {len(jax.tree.leaves(x)[0]): "the batch size"}
        for n, what in zip(np.shape(z)[:0:-1], ("outputs", "positions"), strict=False):
            sizes.setdefault(int(n), f"the number of {what}")
        sizes = {n: what for n, what in sizes.items() if n > 2}
        key, blame = ("loss", "delta", ""), ""
        for found, candidates in ((verdicts, together), (rules, alone)):
            if found[key].verdict == "wrong":
                suspect = self._suspect(found[key], candidates[key], true["loss"]["delta"], z)
                found[key], = diagnose(
                    [suspect], sizes,
                    lambda active, passive: jnp.sum(self.loss.value(active[0], passive[0])),
                    ([np.asarray(z)], [y]),
                )  # fmt: skip
                blame = "the loss" if found is verdicts else blame
        layers, learning = list(walk(self.net, params)), learns(self.net)
        for path, layer, own in reversed(layers):
            if blame:
                for key, leaf in verdicts.items():
                    if key[0] == path and leaf.verdict == "wrong":
                        verdicts[key] = judge.because(leaf, f"because of {blame}, above")
            mine = [key for key in rules if key[0] == path]
            if any(rules[key].verdict == "wrong" for key in mine):
                parameters = _flat({path: {"gradient": own, "dC/dx": entered[path]}})
                suspects = [
                    self._suspect(rules[key], alone[key], _flat(true)[key], parameters[key])
                    for key in mine
                ]
                neighbours = {
                    f"{other} ({name})": _plain(other)
                    for name, other, theirs in layers
                    if other != layer and not jax.tree.leaves(theirs)
                }
                delta, axes = true[path]["delta"], stack_axes(self.net)[path]
                program, point = self._alone(
                    layer, axes, own, entered[path], keys[path], delta, learning[path]
                )
                found = diagnose(suspects, sizes, program, point, neighbours)
                rules.update(zip(mine, found, strict=True))
                blame = blame or f"{path}, {layer}"
                for key in mine:
                    if (
                        key in verdicts
                        and verdicts[key].verdict == "wrong"
                        and not verdicts[key].why
                    ):
                        verdicts[key] = dataclasses.replace(
                            verdicts[key], diagnosis=rules[key].diagnosis
                        )

    def _suspect(self, leaf: Report, candidate: Any, truth: Any, parameter: Any) -> Suspect:
        return Suspect(
            leaf.path, float64(candidate), float64(truth), leaf, np.asarray(parameter), self.dtype
        )

    def _alone(
        self, layer: Layer, axes: int, own: PyTree, x: Any, keys: Any, delta: Any, learns: bool
    ) -> Any:
        """A program whose gradient by its active arrays is what the layer's rule is to give."""
        inputs, tree = jax.tree.flatten((own, x))
        moving = [i for i, leaf in enumerate(inputs) if is_float(np.asarray(leaf))]
        learning = {"gradient": own} if learns else {}
        labels = list(_flat({"": {**learning, "dC/dx": floats(x, x)}}))
        order = list(_flat({"": {"gradient": own}})) + list(_flat({"": {"dC/dx": floats(x, x)}}))
        back = [order.index(label) for label in labels]  # as `rules` has them
        run = over_copies(functools.partial(output_of, layer), axes)

        def program(active: list[Any], passive: list[Any]) -> Array:
            leaves = list(passive[1])
            for i, j in enumerate(back):
                leaves[moving[j]] = active[i]
            own, x = jax.tree.unflatten(tree, leaves)
            z = jax.tree.leaves(run(own, x, keys))
            return sum(
                (jnp.sum(u * v) for u, v in zip(passive[0], z, strict=True)), start=jnp.zeros(())
            )

        active = [np.asarray(inputs[moving[j]]) for j in back]
        return program, (active, [jax.tree.leaves(delta), list(map(np.asarray, inputs))])


def _first(parts: list[Report]) -> str:
    """The first that is wrong, from the output back."""
    if parts[0].verdict == "wrong":
        what = " and the ".join(
            dict.fromkeys(l.kind.removesuffix(" alone") for l in parts[0].wrong)
        )
        return f"The first that is wrong: the {what} of the loss, {parts[0].kind}."
    for part in parts[1:]:
        if any(leaf.kind.endswith("alone") for leaf in part.wrong):
            return f"The first rule that is wrong, from the output back: {part.path}, {part.kind}."
    for part in parts[1:]:
        if part.wrong:
            return (
                f"Every rule is right by itself, but what reaches {part.path}, {part.kind}, is "
                "wrong: look at the composite that hands it its delta."
            )
    return ""


def _flat(tree: dict[str, Any]) -> dict[tuple[str, str, str], Any]:
    """(path, kind, the rest of the name) -> array."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {(keys[0].key, keys[1].key, suffix(keys[2:])): leaf for keys, leaf in found}


def _plain(layer: Layer) -> Any:
    return functools.partial(output_of, layer, ())
