"""How far a rule's gradient, its deltas and its feedback weights are from the true ones."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.calls import check_batch
from jbackprop.checks import check_sizes
from jbackprop.credit.carriers import as_transport, map_feedback
from jbackprop.credit.rule import State, keep
from jbackprop.credit.settling import largest_entry
from jbackprop.credit.transported import Transported
from jbackprop.diagnose.flow import beside, places_of
from jbackprop.diagnose.pictures import figure
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.gradient import deltas_of, sweep
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.structure import by_copy, copies, rebuild, stack_axes, walk
from jbackprop.sweep import Layer, Node
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Angles in degrees, and ratios of Euclidean norms, the rule's over the true one's.

    By path of the layer, first layer first. An angle is NaN where one of the two is 0, a ratio
    where the true one is; of deltas, examples for which it is are left out of the mean. Printed, it
    is a table.

    Attributes:
        gradient: between the rule's gradient and the true one (`Rule.truth`), all parameters of a
            layer together; "all" is the whole gradient.
        gradient_ratio: of these.
        delta: between the rule's delta of an example and the true one, the mean over the batch; the
            rule's is made of its *own* delta from above.
        delta_ratio: of these, the mean over the batch.
        local_delta: the same with the *true* delta from above: the rule's feedback weights carry it
            through the next layer that has some, in forward order and not in another branch, and
            true weights everywhere else. Only of rules that carry deltas from layer to layer
            (`Transported`).
        feedback: between the feedback weights of a layer and its weights.
        feedback_ratio: of these.
    """

    gradient: dict[str, float]
    gradient_ratio: dict[str, float]
    delta: dict[str, float]
    delta_ratio: dict[str, float]
    local_delta: dict[str, float]
    feedback: dict[str, float]
    feedback_ratio: dict[str, float]

    def __str__(self) -> str:
        columns = ("layer", ">gradient", ">ratio", ">delta", ">ratio", ">delta, true one above",
                   ">feedback", ">ratio")  # fmt: skip
        measured = (
            (self.gradient, "{:.1f}°"), (self.gradient_ratio, "{:.3g}"),
            (self.delta, "{:.1f}°"), (self.delta_ratio, "{:.3g}"), (self.local_delta, "{:.1f}°"),
            (self.feedback, "{:.1f}°"), (self.feedback_ratio, "{:.3g}"),
        )  # fmt: skip
        rows = [
            (path, *(form.format(found[path]) if path in found else "" for found, form in measured))
            for path in self.gradient
        ]
        return render(columns, rows)


def alignment(state: State, params: PyTree, x: Any, y: Any, key: Array | None = None) -> Alignment:
    """The angles between what a rule does and what backpropagation does, layer by layer.

    Args:
        state: of the rule, from `Rule.init` or `Rule.update`, or the `rule_state` of a `Fit`.
        params: the network's parameters.
        x, y: a mini-batch.
        key: for layers that draw; the same draw is used for both.

    Returns:
        An `Alignment`. It costs some sweeps, and for `Transported` rules one for each layer.

    Raises:
        ValueError, TypeError: as `Rule.gradient` does.
    """
    if not isinstance(state, State):
        raise TypeError(f"state must be that of a rule, not {type(state).__name__}")
    grads, info = state.rule.gradient(state, params, x, y, key)
    found = _measured(state, params, grads, info.deltas, x, y, key)
    numbers = {
        name: {path: float(v) for path, v in values.items()}
        for name, values in jax.device_get(found).items()
    }
    return Alignment(**{name: _in_order(state, values) for name, values in numbers.items()})


def _in_order(state: State, values: Mapping[str, float]) -> dict[str, float]:
    order = [shown for shown, _, _ in copies(state.net)]
    return {path: values[path] for path in [*order, "all"] if path in values}


@on_mesh(lambda *_: WHOLE)
@jax.jit
def _measured(
    state: State,
    params: PyTree,
    grads: PyTree,
    deltas: Mapping[str, Any],
    x: Any,
    y: Any,
    key: Array | None,
) -> dict[str, dict[str, Array]]:
    rule = state.rule
    truth = rule.truth(state, params, x, y, key)
    own, true = _by_layer(state, grads), _by_layer(state, truth)
    gradient = {path: angle(own[path], true[path]) for path in own}
    ratio = {path: _ratio(own[path], true[path]) for path in own}
    whole = [jnp.concatenate(list(vectors.values())) for vectors in (own, true)]
    true_deltas = rule.true_deltas(state, params, x, y, key)
    both = [path for path in deltas if path in true_deltas]
    feedback = rule.feedback(state, params)
    weights: dict[str, tuple[Array, Array]] = {}
    if feedback is not None:
        theirs = _by_layer(state, map_feedback(lambda b, w: w, feedback, params))
        weights = {path: (b, theirs[path]) for path, b in _by_layer(state, feedback).items()}
    return {
        "gradient": gradient | {"all": angle(*whole)},
        "gradient_ratio": ratio | {"all": _ratio(*whole)},
        "delta": {path: _mean_angle(deltas[path], true_deltas[path]) for path in both},
        "delta_ratio": {path: _mean_ratio(deltas[path], true_deltas[path]) for path in both},
        "local_delta": _local(state, params, x, y, key, true_deltas),
        "feedback": {path: angle(*pair) for path, pair in weights.items()},
        "feedback_ratio": {path: _ratio(*pair) for path, pair in weights.items()},
    }


def angle(u: Array, v: Array) -> Array:
    """Between vectors along the last axis, in degrees, exact also near 0 and 180; NaN for a 0.

    Source: Kahan, How futile are mindless assessments of roundoff in floating-point computation?
    (2006), section 12.
    """
    u, v = (w / _norm(w)[..., None] for w in map(_scaled, (u, v)))
    apart, along = _norm(u - v), _norm(u + v)
    return jnp.degrees(2 * jnp.arctan2(apart, along))


def _scaled(u: Array) -> Array:
    """Over its largest entry, so that squares do not underflow."""
    return u / largest_entry(u)


def _norm(u: Array) -> Array:
    return jnp.linalg.norm(u, axis=-1)


def _ratio(u: Array, v: Array) -> Array:
    size = largest_entry(v)
    true = _norm(v / size)
    return jnp.where(true > 0, _norm(u / size) / true, jnp.nan)


def _rows(delta: Any) -> Array:
    """One vector for each example: (B, numbers)."""
    leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(delta)]
    wide = [leaf.astype(wide_dtype(leaf.dtype)) for leaf in leaves]
    return jnp.concatenate(wide, axis=1)


def _mean_angle(u: Any, v: Any) -> Array:
    return jnp.nanmean(angle(_rows(u), _rows(v)))


def _mean_ratio(u: Any, v: Any) -> Array:
    return jnp.nanmean(_ratio(_rows(u), _rows(v)))


def _by_layer(state: State, tree: PyTree) -> OrderedDict[str, Array]:
    """All that a layer has in one vector, by path; copies apart."""
    axes, found = stack_axes(state.net), {}
    for path, _, own in walk(state.net, tree):
        leaves = [leaf.astype(wide_dtype(leaf.dtype)) for leaf in jax.tree.leaves(own)]
        if leaves:
            stack = leaves[0].shape[: axes[path]]
            found[path] = jnp.concatenate([v.reshape(*stack, -1) for v in leaves], axis=-1)
    return by_copy(state.net, found)


def _local(
    state: State,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
    truth: Mapping[str, Any],
) -> dict[str, Array]:
    """The angle of each delta where feedback weights carry it through the next layer alone."""
    feedback = state.rule.feedback(state, params) if isinstance(state.rule, Transported) else None
    if feedback is None:
        return {}
    net = state.net
    stacks = {
        path: jax.tree.leaves(own)[0].shape[: stack_axes(net)[path]]
        for path, _, own in walk(net, feedback)
        if jax.tree.leaves(own)
    }
    places = [(shown, path, at) for shown, path, at in copies(net) if path in stacks]
    if not places:
        return {}
    masks = {path: np.zeros((len(places), *stack), bool) for path, stack in stacks.items()}
    for i, (_, path, at) in enumerate(places):
        masks[path][(i, *at)] = True
    order = [shown for shown, _, _ in copies(net)]

    own = {path: part for path, _, part in walk(net, params)}

    def angles(masks: Mapping[str, Array]) -> dict[str, Array]:
        def mixed(path: str, layer: Layer, b: PyTree) -> tuple[Node, PyTree]:
            def choose(b: Array, w: Array) -> Array:
                axes = tuple(range(masks[path].ndim, b.ndim))
                return jnp.where(jnp.expand_dims(masks[path], axes), b, w)

            return layer, map_feedback(choose, b, own[path])

        transport = as_transport(net, params, rebuild(net, feedback, mixed)[1])
        swept = sweep(net, state.loss, params, x, y, keep, transport=transport, key=key)
        deltas = deltas_of(net, swept.collected)
        return {path: _mean_angle(deltas[path], truth[path]) for path in truth}

    found = lax.map(angles, {path: jnp.asarray(mask) for path, mask in masks.items()})
    angles_of, ways = {}, places_of(net)
    for path in truth:
        behind = [
            i
            for i, (shown, _, _) in enumerate(places)
            if order.index(shown) > order.index(path) and not beside(ways[path], ways[shown])
        ]
        if behind:
            angles_of[path] = found[path][behind[0]]
    return angles_of


class Recorder:
    """Records the alignment through training: a callback for `jbackprop.fit`.

        record = jb.credit.Recorder(x[:500], y[:500])
        jb.fit(..., rule=rule, callbacks=[record])
        record.plot().savefig("alignment.png")

    Args:
        x, y: a mini-batch to look at; x is taken in the dtype of the parameters, as `fit` does.
        every: so many epochs.

    Raises:
        ValueError: every below 1; x and y of other lengths; called without a rule.

    Attributes:
        epochs: the epochs it looked at.
        alignments: of these.
    """

    def __init__(self, x: Any, y: Any, every: int = 1):
        check_batch(x, y)
        self.x, self.y, self.every = x, y, every
        check_sizes(self, "every")
        self.epochs: list[int] = []
        self.alignments: list[Alignment] = []

    def __call__(self, epoch: Any) -> None:
        """Look at the state after an epoch."""
        if not isinstance(getattr(epoch, "rule_state", None), State):
            raise ValueError("a Recorder needs a rule to look at: jb.fit(..., rule=rule)")
        if epoch.number % self.every:
            return
        dtype = jnp.result_type(*jax.tree.leaves(epoch.params))
        x = jax.tree.map(
            lambda v: jnp.asarray(
                v, dtype if jnp.issubdtype(jnp.result_type(v), jnp.floating) else None
            ),
            self.x,
        )
        self.alignments.append(alignment(epoch.rule_state, epoch.params, x, self.y))
        self.epochs.append(epoch.number)

    def plot(self) -> Any:
        """Picture the angles by epoch, a line for each layer.

        Returns:
            A matplotlib figure of three: of gradients, of deltas, of feedback weights; what the
            rule has none of is left empty.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: nothing has been recorded yet.
        """
        if not self.alignments:
            raise ValueError("nothing has been recorded: give the Recorder to fit's callbacks")
        fig, axes = figure(3, 4.4)
        for ax, name in zip(axes, ("gradient", "delta", "feedback"), strict=True):
            for path in getattr(self.alignments[0], name):
                angles = [getattr(found, name)[path] for found in self.alignments]
                if not np.isnan(angles).all():
                    ax.plot(self.epochs, angles, marker="o", markersize=3, label=path)
            ax.axhline(90, color="gray", linewidth=0.8, linestyle=":")
            ax.set_title(f"{name}s" if name != "feedback" else "feedback weights")
            ax.set_xlabel("epoch")
            ax.set_ylim(bottom=0)
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize="x-small")
        axes[0].set_ylabel("angle to the true one (degrees)")
        return fig
