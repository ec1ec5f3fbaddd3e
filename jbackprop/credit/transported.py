"""Rules in which other weights than its own carry the delta through a layer.

The delta rule carries delta^{l+1} back through the transpose of W^{l+1}. Here a matrix B^{l+1} of
the same shape does,

    delta^l = (delta^{l+1} (B^{l+1})^T) * f'(z^l)          dC/dW^l ~ a^{l-1} (outer) delta^l

and the rules differ in what B is and how it learns. For kernels of convolutions, and whatever else
has weights that carry, B stands in for W in the same way; norms, gains, skip connections, pooling
and activations pass deltas as ever. The delta of the last layer, and so the gradient of its
weights, is that of backpropagation.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_numbers, check_sizes
from jbackprop.credit.carriers import (
    as_transport,
    carriers,
    check_single,
    check_untied,
    inputs_of,
    like_fresh,
    map_feedback,
)
from jbackprop.credit.rule import Info, Rule, State, keep, taken_apart
from jbackprop.factored import PyTree
from jbackprop.gradient import sweep
from jbackprop.objective import weighting
from jbackprop.structure import rebuild, stack_axes, trainable_mask, walk
from jbackprop.sweep import Layer, Node, backward, batch_size, forward, total


@dataclasses.dataclass(frozen=True)
class Transported(Rule):
    """A rule whose deltas other weights carry: those that are learned, unless `feedback` is given.

    For a rule of one's own: subclass it and give what differs. As it is, `begin` draws feedback
    weights, `feedback` are these, and `update` leaves them as they are.
    """

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        return self.like_fresh(key, net, params)

    def feedback(self, state: State, params: PyTree) -> PyTree:
        return state.learned

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        net, n = state.net, batch_size(x)
        _, divisor, scale = weighting(net, params, None, n)
        swept = sweep(
            net, state.loss, params, x, y, keep,
            transport=self.transport(state, params), key=key, output_weights=scale,
        )  # fmt: skip
        factor = 1 if scale is None else n
        grads, deltas = taken_apart(net, swept.collected, divisor, factor)
        return grads, Info(jnp.mean(swept.losses), swept.outputs, deltas)

    def transport(self, state: State, params: PyTree) -> PyTree:
        """What `jbackprop.backprop(..., transport=...)` takes."""
        feedback = self.feedback(state, params)
        return None if feedback is None else as_transport(state.net, params, feedback)

    def carriers(self, net: Node, params: PyTree) -> PyTree:
        """The weights that feedback stands in for; None in the place of all other parameters."""
        return carriers(net, params, type(self).__name__)

    def like_fresh(self, key: Array, net: Node, params: PyTree) -> PyTree:
        """Feedback weights, each drawn as the layer's initialiser draws W."""
        return like_fresh(net, key, self.carriers(net, params), type(self).__name__)


@dataclasses.dataclass(frozen=True)
class Backpropagation(Transported):
    """The delta rule itself, as a rule among the others: B = W.

    Source: Rumelhart, Hinton and Williams, Learning representations by back-propagating errors
    (1986).

    Initialisation: nothing to begin with. Assumes: weights W on the way back.
    """

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        return None


@dataclasses.dataclass(frozen=True)
class FeedbackAlignment(Transported):
    """Fixed random weights carry the delta:

        delta^l = (delta^{l+1} (B^{l+1})^T) * f'(z^l),         B constant

    W learns to agree with B, so that the deltas come to lie within 90 degrees of the true ones.

    Source: Lillicrap, Cownden, Tweed and Akerman, Random synaptic feedback weights support error
    backpropagation for deep learning (2016).

    Initialisation: B as the layer's initialiser draws W, independently of it (for `Dense` that of
    Glorot and Bengio), so that deltas have the size that they have in backpropagation.

    Assumes: nothing of the layers but that weights carry their deltas.
    """


@dataclasses.dataclass(frozen=True)
class SignSymmetry(Transported):
    """Weights with the signs of W, and magnitudes of their own, carry the delta:

        delta^l = (delta^{l+1} (B^{l+1})^T) * f'(z^l),         B = M * sign(W)

    with sign(0) = 0 and, by `magnitudes`,

        "uniform"  M = c, one number for each layer
        "batch"    M drawn anew for every step
        "fixed"    M drawn once

    Source: Liao, Leibo and Poggio, How important is weight symmetry in backpropagation? (2016):
    uSF, brSF and frSF. Magnitudes are in the scale of the layer's initialiser here, rather than 1
    or uniform on (0, 1), so that deltas have the size that they have in backpropagation.

    Initialisation: fixed M are the absolute values of weights drawn as the layer's initialiser
    draws W; c is the root of their mean square; for each batch M is uniform on (0, sqrt(3) c), of
    that mean square too, and the magnitudes of any two weights are independent (of four they need
    not be: p + q numbers are drawn for p x q weights).

    Assumes: that signs are transported, though magnitudes are not.

    Attributes:
        magnitudes: "uniform", "batch" or "fixed".

    Raises:
        ValueError: other magnitudes.
    """

    magnitudes: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.magnitudes not in ("uniform", "batch", "fixed"):
            raise ValueError(
                "SignSymmetry: magnitudes must be 'uniform', 'batch' or 'fixed', not "
                f"{self.magnitudes!r}"
            )

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        drawn = map_feedback(jnp.abs, self.like_fresh(key, net, params))
        if self.magnitudes == "fixed":
            return drawn
        axes = stack_axes(net)

        def size(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
            def root(m: Array) -> Array:
                each = tuple(range(axes[path], m.ndim))
                return jnp.sqrt(jnp.mean(jnp.square(m), axis=each, keepdims=True))

            return layer, map_feedback(root, own)

        return rebuild(net, drawn, size)[1]

    def feedback(self, state: State, params: PyTree) -> PyTree:
        if self.magnitudes == "batch":
            weights = jax.tree.leaves(map_feedback(lambda _, w: w, state.learned, params))
            drawn = iter(_pairwise_uniform(state.drawn, [w.shape for w in weights]))

        def signed(m: Array, w: Array) -> Array:
            if self.magnitudes == "batch":
                m = m * (3**0.5 * next(drawn)).astype(m.dtype)
            return m * jnp.sign(w)

        return map_feedback(signed, state.learned, params)


def _pairwise_uniform(key: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    """Arrays of float32 numbers uniform on (0, 1), any two of which are independent.

    M_ij = r_i + s_j mod 1, for uniform r and s: of a p x q matrix p + q numbers are drawn, not pq.
    Variances and covariances of what is linear in M are those of independent numbers.
    """
    sizes = [n for shape in shapes for n in (math.prod(shape[:-1]), shape[-1])]
    drawn = jax.random.bits(key, (sum(sizes),), jnp.uint32)
    parts = iter(jnp.split(drawn, list(itertools.accumulate(sizes))[:-1]))

    def of(shape: tuple[int, ...]) -> Array:
        sums = next(parts)[:, None] + next(parts)[None]  # of integers: mod 2^32
        numbers = (sums >> 8).astype(jnp.int32).astype(jnp.float32)
        return ((numbers + 0.5) / 2**24).reshape(shape)

    return [of(shape) for shape in shapes]


@dataclasses.dataclass(frozen=True)
class KolenPollack(Transported):
    """Feedback weights learn by the same changes as the weights do, and both decay:

        delta^l = (delta^{l+1} (B^{l+1})^T) * f'(z^l)
        W <- W + u - decay W,        B <- B + u - decay B,        u the optimizer's update of W

    so that W - B shrinks by 1 - decay in every step, whatever u is: after t steps it is
    (1 - decay)^t of what it was, and the deltas are those of backpropagation. (Up to the rounding
    of W and B: in half precision the difference shrinks more slowly.)

    Source: Kolen and Pollack, Backpropagation without weight transport (1994); Akrout, Wilson,
    Humphreys, Lillicrap and Tweed, Deep learning without weight transport (2019), section 4.

    Initialisation: B as the layer's initialiser draws W, independently of it.

    Assumes: that both synapses can see the same product a (outer) delta. The decay is one of this
    rule's own, of the weights that have feedback and in every step; it is not scaled by a learning
    rate, and comes on top of any decay of the optimizer's. Frozen weights, and the feedback beside
    them, do not decay.

    Attributes:
        decay: of weights and feedback weights, from 0 to below 1; at 0 they never meet.

    Raises:
        ValueError: a decay out of range, or too small for the dtype of the parameters.
    """

    decay: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "decay", least=0, below=1)

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        for w in jax.tree.leaves(params):
            if 0 < self.decay < jnp.finfo(w.dtype).eps:
                raise ValueError(
                    f"KolenPollack: a decay of {self.decay} is lost in {w.dtype} parameters; take "
                    f"more than {float(jnp.finfo(w.dtype).eps):.1g}, or keep them in float32"
                )
        return super().begin(key, net, params, x)

    def update(
        self, state: State, params: PyTree, updates: PyTree, info: Info
    ) -> tuple[PyTree, State]:
        learn = trainable_mask(state.net, params)

        learned = map_feedback(
            lambda b, u, on: b + u - self.decay * b if on else b, state.learned, updates, learn
        )
        updates = jax.tree.map(
            lambda b, u, w, on: u if b is None or not on else u - self.decay * w,
            state.learned, updates, params, learn, is_leaf=lambda v: v is None,
        )  # fmt: skip
        return updates, state.next(learned)


@dataclasses.dataclass(frozen=True)
class WeightMirror(Transported):
    """Feedback weights learn from noise that is sent through the layer:

        delta^l = (delta^{l+1} (B^{l+1})^T) * f'(z^l)
        z = xi W + b,   B <- (1 - decay) B + rate <xi (outer) (z - <z>)>,         xi ~ N(0, 1)

    where < > is the mean over `samples` draws of the noise. As <xi (outer) xi> is I on average, the
    last term is W: with decay = rate, B is a running mean of estimates of W. `gradient` sends the
    noise, and `update` learns from it.

    For a convolution the term is its own gradient, of the pair (xi, z - <z>), each entry over the
    number of positions at which it is used.

    Source: Akrout, Wilson, Humphreys, Lillicrap and Tweed, Deep learning without weight transport
    (2019), section 3.

    Initialisation: B as the layer's initialiser draws W, independently of it.

    Assumes: that a layer can be shown noise by itself, and its output be seen before the
    activation; so not of layers with several weights inside, such as `LSTM`. The noise is
    independent of all data.

    Attributes:
        rate: of the mirror, above 0 and at most 1.
        decay: of the feedback weights, from 0 to 1; None: the rate.
        samples: draws of the noise for each step, at least 2.

    Raises:
        ValueError: settings out of range.
    """

    rate: float = 0.01
    decay: float | None = None
    samples: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "rate", above=0, most=1)
        if self.decay is not None:
            check_numbers(self, "decay", least=0, most=1)
        check_sizes(self, "samples", least=2)

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        check_untied(net, type(self).__name__)
        check_single(net, self.carriers(net, params), type(self).__name__)
        return super().begin(key, net, params, x)

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        grads, info = super().sweep(state, params, x, y, key)
        return grads, info._replace(learned=self._mirror(state, params, x))

    def update(
        self, state: State, params: PyTree, updates: PyTree, info: Info
    ) -> tuple[PyTree, State]:
        decay = self.rate if self.decay is None else self.decay
        learned = map_feedback(
            lambda b, m: ((1 - decay) * b.astype(m.dtype) + self.rate * m).astype(b.dtype),
            state.learned,
            info.learned,
        )
        return updates, state.next(learned)

    def _mirror(self, state: State, params: PyTree, x: Any) -> PyTree:
        """<xi (outer) (z - <z>)> of every layer that has feedback."""
        net, shapes = state.net, inputs_of(state.net, params, x)
        axes, parts = stack_axes(net), {path: own for path, _, own in walk(net, state.learned)}
        keys = iter(jax.random.split(state.drawn, len(parts)))

        def of(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
            key = next(keys)
            if not jax.tree.leaves(parts[path]):
                return layer, parts[path]
            shape, dtype = shapes[path].shape[axes[path] + 1 :], shapes[path].dtype

            def mirror(key: Array, own: PyTree) -> PyTree:
                noise = jax.random.normal(key, (self.samples, *shape), dtype)
                z, saved = forward(layer, own, noise)
                z = z - jnp.mean(z, axis=0, keepdims=True)

                _, found = backward(layer, own, layer.trace(noise, z, saved), z, total)
                one, (y, saved) = noise[:1], forward(layer, own, noise[:1])
                one, y = jnp.ones_like(one), jnp.ones_like(y)
                _, used = backward(layer, own, layer.trace(one, y, saved), y, total)
                return jax.tree.map(
                    lambda m, u: m / (self.samples * jnp.maximum(u, 1)), found, used
                )

            copies = jax.tree.leaves(own)[0].shape[: axes[path]]
            for _ in copies:
                mirror = jax.vmap(mirror)
            found = mirror(jax.random.split(key, copies) if copies else key, own)
            return layer, map_feedback(lambda _, m: m, parts[path], found)

        return rebuild(net, params, of)[1]
