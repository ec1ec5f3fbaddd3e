"""A network whose embedding is its output layer as well."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_key
from jbackprop.compose.checks import check_layers
from jbackprop.compose.sequential import Sequential
from jbackprop.factored import Outer, PyTree, Sum, is_factored
from jbackprop.layers.checks import check_floating
from jbackprop.sweep import (
    Beheaded,
    Collect,
    Composite,
    Layer,
    Node,
    Trace,
    backward,
    forward,
    inside,
    keep,
    keys_for,
)


@dataclasses.dataclass(frozen=True)
class Tied(Composite):
    """Embedding, body, and the embedding once more: the net inputs of an output for every id.

    Equation, for one example with ids i_t and the embedding's table E:

        y_t = E_{i_t},      h = body(y),      z_tv = sum_i h_ti E_vi
                                                      x (T,) -> y, h (T, width) -> z (T, vocab)

    so that the score of a word is the product of the body's output with that word's vector.

    Derivation. With delta = dC/dz, the last step is a `Dense` with the weights E^T:

        dC/dh = delta E,        dC/dE = delta^T (outer) h    by that way

    dC/dh goes back through the body and is dC/dy at its input. E reaches the cost in two ways, and
    its gradient is the sum of what comes by both (`Sum`, with the products of the two in every
    norm):

        dC/dE = sum_t e_{i_t} (outer) dC/dy_t  +  (sum_t h_t (outer) delta_t)^T

    The first is of the kind `Lookup`, the second an `Outer` with a transpose between it and E.

    Both are collected together, as the gradient of the embedding. A transport for E carries the
    delta through the last step. With `FusedSoftmaxCrossEntropy` the net inputs are never whole.

    Source: Press and Wolf, Using the output embedding to improve language models (2017), section 3;
    Inan, Khosravi and Socher, Tying word vectors and word classifiers (2017), section 3.

    Params: a tuple (the embedding's, the body's).

    Attributes:
        embedding: an `Embedding`, or another layer whose first parameter is E, (vocab, width). No
            composite: `Frozen(Tied(...))` has it frozen.
        body: from (T, width) to (T, width).

    Raises:
        ValueError: a body that does not give vectors of the embedding's width.
        TypeError: an embedding or a body that is no layer, or an embedding inside a composite.
    """

    embedding: Layer
    body: Node

    ties: ClassVar[tuple[str, ...]] = ("embedding",)

    def __post_init__(self) -> None:
        if not isinstance(self.embedding, Layer):
            hint = "; wrap the Tied" if isinstance(self.embedding, Composite) else ""
            raise TypeError(
                "Tied needs an Embedding first: embedding must be a layer, not "
                f"{self.embedding!r}{hint}"
            )
        check_layers(self, body=self.body)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.embedding}, {self.body})"

    @functools.cached_property
    def reads(self) -> tuple[str, ...]:
        return ("x",) if "x" in self.embedding.reads else ()

    def init(self, key: Array) -> PyTree:
        check_key(key, f"{type(self).__name__}.init: key")
        keys = jax.random.split(key)
        return self.embedding.init(keys[0]), self.body.init(keys[1])

    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        own, own_body = self.split(params)
        keys = keys_for((self.embedding, self.body), key)
        with inside("embedding", self.embedding):
            y, saved = forward(self.embedding, own, x, keys[0])
        with inside("body", self.body):
            h, saved_body = forward(self.body, own_body, y, keys[1])
        z, _ = forward(_HEAD, _table(own), h)
        kept = y if "y" in self.embedding.reads or "x" in self.body.reads else None
        return z, (kept, h, saved, saved_body)

    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        (own, own_body), (aux_own, aux_body) = self.split(params), self.split(aux)
        carry, carry_body = self.split(transport)
        y, h, saved, saved_body = trace.saved
        way = None if carry is None else _table(carry)
        delta, out = backward(_HEAD, _table(own), Trace(h, None, None), delta, keep, way)

        def both(factored: PyTree, delta: Any, aux: Any) -> PyTree:
            (first, *others), tree = jax.tree.flatten(factored, is_leaf=is_factored)
            joint = Sum((first, out["w"]), first.home)
            return collect(jax.tree.unflatten(tree, (joint, *others)), delta, aux)

        with inside("body", self.body):
            at = self.body.trace(y, h, saved_body)
            delta, found_body = backward(
                self.body, own_body, at, delta, collect, carry_body, aux_body
            )
        with inside("embedding", self.embedding):
            at = self.embedding.trace(trace.x, y, saved)
            delta, found = backward(self.embedding, own, at, delta, both, carry, aux_own)
        return delta, (found, found_body)

    def behead(self, params: PyTree) -> Beheaded:
        if type(self).forward is not Tied.forward:  # a subclass may compute something else
            return super().behead(params)
        own, own_body = self.split(params)

        def rejoin(grads: PyTree, w_grad: Array, _: Any) -> PyTree:
            (first, *others), tree = jax.tree.flatten(grads[0])
            return jax.tree.unflatten(tree, (first + w_grad.T, *others)), grads[1]

        body = Sequential(self.embedding, self.body)
        return Beheaded(body, (own, own_body), _table(own)["w"].T, None, rejoin)

    def untied(self, params: PyTree) -> tuple[Node, PyTree]:
        own, own_body = self.split(params)
        return _Untied(self.embedding, self.body, _HEAD), (own, own_body, _table(own))


def _table(params: PyTree) -> dict[str, Array]:
    """What the head takes of the embedding's parameters, also where the embedding is wrapped."""
    return {"w": jax.tree.leaves(params)[0]}


@dataclasses.dataclass(frozen=True)
class _Head(Layer):
    """z = h E^T, for one example: see `Tied`. Params: ``{"w": (vocab, width)}``."""

    reads: ClassVar[tuple[str, ...]] = ("x",)

    def __repr__(self) -> str:
        return "the head of Tied"

    def init(self, key: Array) -> PyTree:
        raise NotImplementedError("the head of Tied takes the embedding's parameters")

    def forward(self, params: PyTree, x: Array, key: Array | None = None) -> tuple[Array, None]:
        check_floating(self, x)
        w = params["w"]
        if jnp.ndim(x) < 1 or jnp.ndim(w) != 2 or x.shape[-1] != w.shape[1]:
            raise ValueError(
                f"Tied: the body gives {jnp.shape(x)} for an example, but the embedding's table is "
                f"{jnp.shape(w)}: the body's outputs need the embedding's width"
            )
        return lax.dot_general(x, w.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ()))), None

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Array, PyTree]:
        delta_x = jnp.dot(delta, params["w"].astype(delta.dtype))
        pair = Outer.of(trace.x, delta, (("transpose", (1, 0)),))
        return delta_x.astype(trace.x.dtype), {"w": pair}


class _Untied(Sequential):
    """A `Tied` whose head has a table of its own, with the paths of the `Tied`."""

    def children(self) -> dict[str, Node]:
        return dict(zip(("embedding", "body", "head"), self.layers, strict=True))


_HEAD = _Head()
