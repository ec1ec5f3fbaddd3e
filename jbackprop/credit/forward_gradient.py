"""Forward gradients: a directional derivative, times its direction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.calls import refuse_coupling
from jbackprop.checks import check_sizes
from jbackprop.credit.carriers import check_untied
from jbackprop.credit.rule import Info, Rule, State, taken_apart
from jbackprop.factored import Full, Nothing, PyTree, is_factored, weighted
from jbackprop.gradient import Kept
from jbackprop.observe import Tapped, tapped
from jbackprop.structure import rebuild, stack_axes, trainable_mask, walk
from jbackprop.sweep import BATCH_AXIS, Layer, Node, Trace, as_told, backward, batch_size, forward


@dataclasses.dataclass(frozen=True, repr=False)
class _Perturbed(Tapped):
    """A layer whose output is moved along a random direction u. Params: (own, how far, seed).

    Its delta is u, whatever comes from above. Every example has a direction of its own.
    """

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        own, far, seed = params
        y, saved = self.inner.forward(own, x, key)
        u = self._direction(seed, far)
        return jax.tree.map(lambda v, t, d: v if t is None else v + t * d, y, far, u), saved

    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        own, far, seed = params
        u = self._direction(seed, far)
        delta_x, factored = as_told(self.inner, own, self.inner.backward(own, trace, u))
        taps = jax.tree.map(lambda d: Full(d, "the delta itself"), u)
        return delta_x, (factored, taps, Nothing(jnp.zeros(0)))

    def _direction(self, seed: Array, far: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
        return direction(jax.random.fold_in(key, lax.axis_index(BATCH_AXIS)), far)


def direction(key: Array, like: Any) -> Any:
    """Normal numbers of mean 0 and variance 1."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [jax.random.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(tree, drawn)


@dataclasses.dataclass(frozen=True)
class ForwardGradient(Rule):
    """The derivative along a random direction, times the direction: no way back at all.

    With `perturb="weights"`, for one direction v of all weights and the mean cost,

        dC/dW ~ (sum_W <dC/dW, v_W>) v_W,         v ~ N(0, I)

    With `perturb="activities"` each example has directions u^l of its own, of the outputs of all
    layers with weights, and its delta is

        delta^l ~ (sum_k <dC/dz^k, u^k>) u^l,     u ~ N(0, I)
        dC/dW^l ~ a^{l-1} (outer) delta^l

    The sum in brackets is one directional derivative, found on the forward sweep. As E[v v^T] = I
    both are the gradient on average. Their variance grows with the number of weights, or of units:
    E|g - dC/dW|^2 = (number + 1) |dC/dW|^2 for weights, of which there are more than units.

    Source: Baydin, Pearlmutter, Syme, Wood and Torr, Gradients without backpropagation (2022),
    definition 1; Ren, Kornblith, Liao and Hinton, Scaling forward gradient with local losses
    (2023), for activities.

    Initialisation: nothing to begin with. Directions are drawn from the state's key: anew after
    each `update`.

    Assumes: with `perturb="activities"`, that nothing couples the examples and no weights are tied.
    A layer's output is what is moved: inside of a recurrent layer, from one position to the one
    before, deltas go back as in backpropagation.

    Attributes:
        perturb: "activities" or "weights".
        draws: directions to take the mean over, one after the other.

    Raises:
        ValueError: settings out of range; a layer that couples the examples; tied
            weights.
    """

    perturb: str = "activities"
    draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "draws")
        if self.perturb not in ("activities", "weights"):
            raise ValueError(
                f"ForwardGradient: perturb must be 'activities' or 'weights', not {self.perturb!r}"
            )

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        if self.perturb == "activities":
            refuse_coupling(net, "the derivative of one of them")
            check_untied(net, "ForwardGradient of activities")
        return None

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        one = self._of_activities if self.perturb == "activities" else self._of_weights
        keys = jax.random.split(state.drawn, self.draws)
        grads, info = one(state, params, x, y, key, keys[0])
        if self.draws == 1:
            return grads, info

        def more(found: PyTree, own: Array) -> tuple[PyTree, None]:
            grads, info = one(state, params, x, y, key, own)
            return jax.tree.map(jnp.add, found, (grads, info.deltas)), None

        sums, _ = lax.scan(more, (grads, info.deltas), keys[1:])
        grads, deltas = jax.tree.map(lambda v: v / self.draws, sums)
        return grads, info._replace(deltas=deltas)

    def _of_weights(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None, own: Array
    ) -> tuple[PyTree, Info]:
        learn = trainable_mask(state.net, params)
        v = jax.tree.map(
            lambda d, on: d if on else jnp.zeros_like(d), direction(own, params), learn
        )

        def cost(params: PyTree) -> tuple[Array, Any]:
            outputs, _ = forward(state.net, params, x, key)
            return jnp.mean(state.loss.value(outputs, y)), outputs

        value, along, outputs = jax.jvp(cost, (params,), (v,), has_aux=True)
        grads = jax.tree.map(lambda d: along.astype(d.dtype) * d, v)
        return grads, Info(value, outputs, {})

    def _of_activities(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None, own: Array
    ) -> tuple[PyTree, Info]:
        net = state.net
        moved, both = tapped(net, params, x, _Perturbed, all_layers=False)
        axes, keys = stack_axes(net), iter(jax.random.split(own, sum(1 for _ in walk(net))))

        def seeded(path: str, layer: Layer, part: PyTree) -> tuple[Node, PyTree]:
            drawn = next(keys)
            if not isinstance(layer, _Perturbed):
                return layer, part
            copies = jax.tree.leaves(part[0])[0].shape[: axes[path]]
            return layer, (*part, jax.random.bits(drawn, (*copies, 2), jnp.uint32))

        both = rebuild(moved, both, seeded)[1]
        parts = walk(moved, both)
        far = {path: own[1] for path, layer, own in parts if isinstance(layer, _Perturbed)}

        def costs(far: dict[str, Any]) -> tuple[Array, Any]:
            def put(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
                return layer, (own[0], far[path], own[2]) if path in far else own

            outputs, saved = forward(moved, rebuild(moved, both, put)[1], x, key)
            return state.loss.value(outputs, y), (outputs, saved)

        ones = jax.tree.map(jnp.ones_like, far)
        losses, along, (outputs, saved) = jax.jvp(costs, (far,), (ones,), has_aux=True)
        trace = moved.trace(x, outputs, saved)

        def collect(factored: PyTree, delta: Any, aux: Any) -> Any:
            pairs, u, _ = factored
            grads = jax.tree.map(lambda p: p.total(along), pairs, is_leaf=is_factored)
            taps = jax.tree.leaves(u, is_leaf=is_factored)
            if any(isinstance(tap, Nothing) for tap in taps):  # frozen
                return grads
            return Kept(
                jax.tree.map(lambda t: weighted(along, t.each()), u, is_leaf=is_factored), grads
            )

        _, kept = backward(moved, both, trace, jnp.zeros_like(outputs), collect)
        grads, deltas = taken_apart(net, kept, batch_size(x))
        return grads, Info(jnp.mean(losses), outputs, deltas)
