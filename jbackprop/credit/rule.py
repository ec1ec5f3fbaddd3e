"""What a rule of credit assignment is, and what it carries along."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.calls import check_call, check_loss, check_net
from jbackprop.checks import check_key, check_params
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.gradient import Kept, backprop, collected, deltas, deltas_of
from jbackprop.losses import Loss
from jbackprop.mesh import WHOLE, examples, like, on_mesh, shapes
from jbackprop.objective import value_and_grad
from jbackprop.structure import rebuild
from jbackprop.sweep import Node, batch_size, forward, total

_STREAM = 2**32 - 3  # else feedback would be W where both keys are split off one


@dataclasses.dataclass(frozen=True)
class State:
    """What a rule carries from step to step: a pytree.

    Attributes:
        net: the network, a part of the program.
        rule: the rule, with its loss; a part of the program.
        key: for what the rule draws; `update` moves it on. Without `update` the same is drawn
            again.
        learned: arrays of the rule's own, such as feedback weights.
    """

    net: Node
    rule: Rule
    key: Array
    learned: PyTree = None

    @property
    def loss(self) -> Loss:
        """The rule's."""
        if self.rule.loss is None:
            raise ValueError(f"{type(self.rule).__name__} has no loss: give it loss=")
        return self.rule.loss

    @property
    def drawn(self) -> Array:
        """The key for what this step draws: no other step has it, and no other state."""
        return jax.random.fold_in(self.key, 1)

    def next(self, learned: PyTree = None) -> State:
        """The state of the next step; what is learned stays, if it is not given."""
        key = jax.random.fold_in(self.key, 0)
        return dataclasses.replace(
            self, key=key, learned=self.learned if learned is None else learned
        )


jax.tree_util.register_dataclass(State, ["key", "learned"], ["net", "rule"])


class Info(NamedTuple):
    """What a rule saw on its way to a gradient.

    Attributes:
        loss: the mean over the batch of what the rule reduces, a scalar; for most rules that is the
            loss of the network's outputs.
        outputs: of the network, (B, ...), as `Rule.outputs` has them; None where a rule has them
            only for more work.
        deltas: by path, what the rule takes for dC_n/dz_n of each layer with weights, (B, ...),
            unscaled as in `jbackprop.deltas`; a layer that the rule has none for is missing.
        extra: by name, what else there is to see of the rule, such as how far it converged.
        learned: for `Rule.update`.
    """

    loss: Array
    outputs: Any
    deltas: dict[str, Any]
    extra: dict[str, Array] = {}  # noqa: RUF012, never written to
    learned: PyTree = None


@dataclasses.dataclass(frozen=True)
class Rule(abc.ABC):
    """A way to assign credit: from a mini-batch to what is used in place of its mean gradient.

    A frozen dataclass of a rule's settings; what it learns is in a `State`:

        state = rule.init(key, net, params)
        grads, info = rule.gradient(state, params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)       # of Optax
        updates, state = rule.update(state, params, updates, info)
        params = optax.apply_updates(params, updates)

    - all of it pure, and usable under `jax.jit`; or `jbackprop.fit(..., rule=rule)`.

    For a rule of one's own: subclass `Transported` where other weights carry the deltas, else this.

    Attributes:
        loss: the cost of the network's outputs; `jbackprop.fit` gives its own.
    """

    loss: Loss | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.loss is not None:
            check_loss(self.loss, f"{type(self).__name__}: loss")

    def init(self, key: Array, net: Node, params: PyTree, x: Any = None) -> State:
        """The state to begin with.

        Args:
            key: draws what the rule draws, here and in every step. Nothing of it is what a network
                draws from the same key, or from one split off it.
            net: a layer or a composite.
            params: its parameters.
            x: inputs (B, ...), or their shapes: for rules that need the sizes of activations, where
                these do not follow from the parameters, as behind a convolution.

        Raises:
            ValueError: a layer that the rule is not defined for, by name; no loss; no weights.
        """
        check_net(net)
        check_params(params)
        check_key(key)
        if self.loss is None:
            name = type(self).__name__
            raise ValueError(f"{name} has no loss: {name}(loss=jbackprop.SoftmaxCrossEntropy())")
        if not jax.tree.leaves(params):
            raise ValueError(
                f"{net} has no weights, or these are not its: it needs params from its init"
            )
        due = jax.eval_shape(net.init, jax.random.key(0))
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (due, params)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"these are not the parameters of {net}: it needs shapes {shapes[0]}, not "
                f"{shapes[1]}; make them with init, or pass those that belong to this network"
            )
        own, kept = jax.random.split(jax.random.fold_in(key, _STREAM))
        return State(net, self, kept, self.begin(own, net, params, x))

    def gradient(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> tuple[PyTree, Info]:
        """What the rule has for the gradient of the mean cost, and what it saw.

        Args:
            state: from `init` or `update`.
            params: the network's parameters.
            x: the inputs, (B, ...).
            y: the targets, as the loss wants them.
            key: for layers that draw, such as dropout; None draws nothing.

        Returns:
            A tree like params, in their dtypes, divided by B where the mean gradient is; and an
            `Info`.

        Raises:
            ValueError, TypeError: as `jbackprop.backprop` does; an empty batch.
        """
        if not isinstance(state, State):
            raise TypeError(f"state must be what init gives, not {type(state).__name__}")
        if self not in (state.rule, dataclasses.replace(state.rule, loss=None)):
            raise ValueError(f"the state is one of {state.rule}, not of {self}: it has its init")
        check_call(state.net, state.loss, params, x, y, key)
        if batch_size(x) == 0:
            raise ValueError("the batch is empty: its mean gradient is not defined")
        self.check(state.net, state.loss, params, x, y)
        return _gradient(state, params, x, y, key)

    def update(
        self, state: State, params: PyTree, updates: PyTree, info: Info
    ) -> tuple[PyTree, State]:
        """What to add to params, and the next state.

        Args:
            state: the state that `gradient` had.
            params: the parameters that `gradient` had.
            updates: from the optimizer.
            info: from `gradient`.
        """
        return updates, state.next()

    def outputs(self, state: State, params: PyTree, x: Any) -> Any:
        """What the rule takes for the network's outputs, (B, ...): by default, those."""
        return forward(state.net, params, x)[0]

    def truth(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> PyTree:
        """The gradient that the rule stands for: by default that of the mean cost, by backprop."""
        return value_and_grad(state.net, state.loss)(params, x, y, key=key)[1]

    def true_deltas(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> dict[str, Any]:
        """Those that go with `truth`, by path; {} where the rule's stand for something else."""
        return deltas(backprop(state.net, state.loss, params, x, y, key=key))

    def feedback(self, state: State, params: PyTree) -> PyTree:
        """The weights that carry credit back, in the places and shapes of those they stand for.

        A tree like params, with None in the place of what has none; None if the rule has none.
        """
        return None

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        """What is learned, to begin with; here a rule refuses what it is not defined for."""
        return None

    def check(self, net: Node, loss: Loss, params: PyTree, x: Any, y: Any) -> None:
        """Raise where examples or targets do not fit."""
        loss.check(_shape_of_outputs.eval_shape(net, *shapes((params, x))).shape, y)

    @abc.abstractmethod
    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        """`gradient`, of what has been checked; under `jax.jit`."""


def _split(state: State, params: PyTree, x: Any, *_: Any) -> tuple[PyTree, Any]:
    """On a mesh of explicit axes; what a rule has found besides is whole."""
    split = examples(x)
    return like(params), Info(WHOLE, split, split, WHOLE, WHOLE)


@on_mesh(_split)
@jax.jit
def _gradient(
    state: State, params: PyTree, x: Any, y: Any, key: Array | None
) -> tuple[PyTree, Info]:
    grads, info = state.rule.sweep(state, params, x, y, key)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), info


@functools.partial(jax.jit, static_argnums=0)
def _shape_of_outputs(net: Node, params: PyTree, x: Any) -> Any:
    return forward(net, params, x)[0]


def keep(factored: PyTree, delta: Any, aux: Any) -> Kept:
    """Collect the gradient, and the delta."""
    return Kept(delta, total(factored, delta, aux))


def taken_apart(
    net: Node, tree: PyTree, divisor: int = 1, factor: int = 1
) -> tuple[PyTree, OrderedDict[str, Any]]:
    """What `keep` has collected: the gradients, a tree like params, and the deltas by path.

    Args:
        net: the network.
        tree: what was collected.
        divisor: of the gradients, which are sums over the batch.
        factor: of the deltas, where they were swept as those of the mean cost.
    """
    grads = rebuild(net, tree, lambda path, layer, own: (layer, collected(own)))[1]
    deltas = deltas_of(net, tree)
    if divisor != 1:
        grads = jax.tree.map(lambda g: g / divisor, grads)
    if factor != 1:
        deltas = jax.tree.map(lambda d: d * factor, deltas)
    return grads, deltas


def widened(tree: PyTree) -> PyTree:
    """Floating-point arrays in float32 at least: for what settles, or subtracts what is near."""

    def of(v: Any) -> Any:
        v = jnp.asarray(v)
        return v.astype(wide_dtype(v.dtype)) if jnp.issubdtype(v.dtype, jnp.floating) else v

    return jax.tree.map(of, tree)
