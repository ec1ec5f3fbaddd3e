"""The weights of a network that carry deltas, and feedback weights in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import function_of
from jbackprop.factored import PyTree
from jbackprop.mesh import shapes
from jbackprop.observe import Observed, Seen, seen
from jbackprop.structure import rebuild, stack_axes, walk
from jbackprop.sweep import Composite, Layer, Node


def map_feedback(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """`jax.tree.map` over feedback weights: None, where a parameter has none, stays None.

    Args:
        f: of one array of each tree.
        tree: of feedback weights.
        rest: trees like params, or like `tree`.
    """
    function_of(f, "f")
    return jax.tree.map(
        lambda v, *others: None if v is None else f(v, *others),
        tree,
        *rest,
        is_leaf=lambda v: v is None,
    )


def carriers(net: Node, params: PyTree, rule: str, *, unread: bool = False) -> PyTree:
    """A tree like params: the weights that carry deltas, and None in the place of all else.

    These are matrices and kernels: parameters of two axes and more, not counting the copies of a
    scanned composite, of layers that say that they are (`Layer.carries`), and tables that are tied
    to an output layer. What a norm or a gain multiplies by is none of them: deltas pass through it
    as in backpropagation. So it is with the first layer's weights, if `unread` is not set and it
    has one alone: nothing before it learns, and nobody reads what it would carry.

    Raises:
        ValueError: a layer whose delta only its own weights can carry.
    """
    axes, tied = stack_axes(net), set(_tied(net))
    first: set[str] = set() if unread else _first(net)[0]

    def of(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
        none = jax.tree.map(lambda _: None, own)
        if not layer.carries and path not in tied:
            return layer, none
        kept = jax.tree.map(lambda w: w if jnp.ndim(w) - axes[path] > 1 else None, own)
        if jax.tree.leaves(kept) and not layer.takes_transport:
            raise ValueError(
                f"{rule} is not defined for {path}, {layer}: its rule does not tell the weights "
                "that carry the delta from those it reads. Derive a rule for it, as a Layer"
            )
        return layer, none if path in first and len(jax.tree.leaves(kept)) == 1 else kept

    return rebuild(net, params, of)[1]


def _tied(node: Node, path: str = "") -> Iterator[str]:
    """The paths of layers whose weights are used in another place too."""
    if not isinstance(node, Composite):
        return
    for name, child in node.children().items():
        own = f"{path}.{name}" if path else name
        yield from [own] if name in node.ties else _tied(child, own)


def check_untied(net: Node, rule: str) -> None:
    """Raise where weights are used in two places."""
    for path in _tied(net):
        raise ValueError(
            f"{rule} is not defined for {path}: its weights are tied to those of an output layer. "
            "FeedbackAlignment, SignSymmetry and KolenPollack are"
        )


def _first(node: Node, path: str = "", learns: bool = True) -> tuple[set[str], bool]:
    """The layers with weights before which nothing learns; and whether one that learns is found."""
    learns = learns and node.learns
    if isinstance(node, Layer):
        weights = bool(jax.tree.leaves(jax.eval_shape(node.init, jax.random.key(0))))
        return ({path or "net"} if weights else set()), weights and learns
    assert isinstance(node, Composite)
    children = node.children()
    if node.copies is not None or not (node.chains or len(children) == 1):
        return set(), True
    found: set[str] = set()
    for name, child in children.items():
        more, there = _first(child, f"{path}.{name}" if path else name, learns)
        found |= more
        if there:
            return found, True
    return found, False


def check_single(net: Node, kept: PyTree, rule: str) -> None:
    """Raise where a layer has several weights that carry: what is between them cannot be seen."""
    for path, layer, own in walk(net, kept):
        if len(jax.tree.leaves(own)) > 1:
            raise ValueError(
                f"{rule} is not defined for {path}, {layer}: it carries deltas by several weights "
                "inside. FeedbackAlignment, SignSymmetry and KolenPollack are"
            )


@dataclasses.dataclass(frozen=True, repr=False)
class _Fed(Observed):
    """A layer that saves its input, for the forward sweep only."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        return self.inner.forward(params, x, key)[0], Seen(x, self.path)


def inputs_of(net: Node, params: PyTree, x: Any) -> dict[str, Any]:
    """By path, the shapes of every layer's input, (B, ...); (copies, B, ...) in stacks."""
    return jax.eval_shape(lambda params, x: seen(net, params, x, _Fed), *shapes((params, x)))


def example_of(net: Node, params: PyTree, rule: str) -> Any:
    """The shape of a mini-batch for a network whose first weights are a matrix: as wide as that.

    Raises:
        ValueError: the network does not take it.
    """
    weights = [w for w in jax.tree.leaves(params) if jnp.ndim(w) == 2]
    x = jax.ShapeDtypeStruct((1, weights[0].shape[0]), weights[0].dtype) if weights else None
    try:
        inputs_of(net, params, x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{rule}: the sizes of this network's activations do not follow from its parameters: "
            "give init inputs, or their shapes, as x: rule.init(key, net, params, x)"
        ) from error
    return x


def like_fresh(net: Node, key: Array, tree: PyTree, rule: str) -> PyTree:
    """Weights drawn as those of the network were, where the tree has some; None elsewhere.

    Raises:
        ValueError: an initialiser that does not draw, so that feedback would be the weights, or
            zeros. (Under `jax.jit`, where no values are seen, that is not found out.)
    """
    drawn, again = (
        map_feedback(lambda w, b: b.astype(w.dtype), tree, net.init(k))
        for k in (key, jax.random.fold_in(key, 1))
    )
    other = {path: own for path, _, own in walk(net, again)}
    for path, layer, own in walk(net, drawn):
        for b, c in zip(*map(jax.tree.leaves, (own, other[path])), strict=True):
            if not isinstance(b, jax.core.Tracer) and b.size and bool(jnp.all(b == c)):
                raise ValueError(
                    f"{rule}: the initialiser of {path}, {layer}, gives the same weights for every "
                    "key, and feedback weights must differ from W; give the layer a w_init that "
                    "draws"
                )
    return drawn


def as_transport(net: Node, params: PyTree, feedback: PyTree) -> PyTree:
    """A `transport` for the sweep: the feedback weights, and the true ones where there are none."""
    parts = {path: own for path, _, own in walk(net, feedback)}

    def of(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
        if not jax.tree.leaves(parts[path]):
            return layer, None
        both = jax.tree.map(
            lambda b, w: w if b is None else b, parts[path], own, is_leaf=lambda v: v is None
        )
        return layer, both

    return rebuild(net, params, of)[1]
