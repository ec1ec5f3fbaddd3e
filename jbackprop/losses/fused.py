"""Softmax cross-entropy together with the last Dense, in blocks: for big vocabularies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_numbers, check_sizes
from jbackprop.factored import wide_dtype
from jbackprop.losses.base import Head, wide
from jbackprop.losses.softmax import SoftmaxCrossEntropy

_SLAB = 1 << 25  # bytes of net inputs at once
_CHUNK = 2048  # classes at once; a CPU's cache holds their deltas
_CHUNK_BYTES = 1 << 27  # and elsewhere, where few big matmuls are faster


@dataclasses.dataclass(frozen=True, repr=False)
class FusedSoftmaxCrossEntropy(SoftmaxCrossEntropy):
    """`SoftmaxCrossEntropy` that `value_and_grad` fuses with the network's last linear map.

    With N positions and V classes, net inputs and their deltas are arrays of N V numbers: for a
    language model by far the largest of all. Nothing needs them whole. With this loss,
    `value_and_grad`, and with it `fit`, cut the network before its last `Dense` (or the head of a
    `Tied`) and go through the positions in blocks. For one position, with the activation h (p,),

        z = h W + b,   z' = cap tanh(z / cap),   C = m logsumexp(z') - t . z',   m = sum_c t_c

    and, as everywhere,

        dC/dz'_c = m softmax(z')_c - t_c                the canonical delta
        delta_c  = dC/dz_c = dC/dz'_c (1 - (z'_c / cap)^2)      tanh' = 1 - tanh^2
        dC/dh    = delta W^T,    dC/dW = h (outer) delta,    dC/db = delta

    For a block, z' is made once, so many classes at a time as the cache holds; of it follow
    logsumexp and the costs. Then, again some classes at a time, delta is made of z', dC/dh and the
    sums dC/dW and dC/db, the latter in place, are made of delta, and delta is forgotten. These are
    the three matmuls that backpropagation has anyway; nothing is computed twice but an exponential.
    No array has N V entries, and no size need divide another: the last block of positions is filled
    up with places that do not count, the last classes are a block of their own.

    All else (`backprop`, `predict`, pairs and norms of single examples, metrics on outputs) takes
    the plain way with all net inputs: the delta of the last layer is (B, ..., V) by its nature.

    The Hessian that products and roots are made of is, with a cap, its Gauss-Newton part: the cap
    counts as the network's last layer, so that with the slope s = dz'/dz it is diag(s) H' diag(s)
    with H' as in `SoftmaxCrossEntropy`, at z'; the term with the cap's second derivative is left
    out.

    Net inputs are computed in float32 at least, also where the parameters are narrower.

    Source: the canonical delta as in `SoftmaxCrossEntropy`. The cap: Gemma Team, Gemma 2: Improving
    open language models at a practical size (2024), section 2. A head in blocks: Wijmans, Huval,
    Hertzberg, Koltun and Kraehenbuehl, Cut your losses in large-vocabulary language models (2024).

    Shapes: z (B, ..., V); y integer labels (B, ...). Costs as those of `SoftmaxCrossEntropy`: the
    mean over an example's positions that are not ignored.

    Attributes:
        label_smoothing, class_weights, ignore_index: as in `SoftmaxCrossEntropy`.
        logit_cap: cap, positive; None for z' = z.
        block: the positions at once, at most; by default so many that block V net inputs are 32
            MiB, at least 256 (or p, if that is fewer) and at most 512.
        vocab_block: the classes at once, at most; by default 2048 on a CPU, else so many that their
            deltas are 128 MiB.

    Raises:
        ValueError: options out of range; labels out of range where they can be seen; in
            `value_and_grad`, a network that does not end in a linear map.
        TypeError: targets that are not integers.
    """

    logit_cap: float | None = None
    block: int | None = None
    vocab_block: int | None = None

    fuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logit_cap is not None:
            check_numbers(self, "logit_cap", above=0)
        check_sizes(self, *(n for n in ("block", "vocab_block") if getattr(self, n) is not None))

    # The plain way, from net inputs.

    def value(self, z: Array, y: Any) -> Array:
        return super().value(self._capped(z), y)

    def delta(self, z: Array, y: Any) -> Array:
        return self.value_and_delta(z, y)[1]

    def value_and_delta(self, z: Array, y: Any) -> tuple[Array, Array]:
        capped = self._capped(z)
        value, delta = super().value_and_delta(capped, y)
        return value, (delta * self._slope(capped)).astype(z.dtype)

    def predict(self, z: Array) -> Array:
        return super().predict(self._capped(z)).astype(z.dtype)

    def hessian_product(self, z: Array, y: Any, v: Array) -> Array:
        capped = self._capped(z)
        slope = self._slope(capped)
        tangent = slope * v.astype(capped.dtype)
        return (slope * super().hessian_product(capped, y, tangent)).astype(z.dtype)

    def hessian_root(self, z: Array, y: Any) -> Array:
        capped = self._capped(z)
        slope = jnp.broadcast_to(self._slope(capped), capped.shape)[None]
        return (slope * super().hessian_root(capped, y)).astype(z.dtype)

    def sampled_root(self, key: Array, z: Array, y: Any) -> Array:
        capped = self._capped(z)
        plain = SoftmaxCrossEntropy(self.label_smoothing, self.class_weights, self.ignore_index)
        return (self._slope(capped) * plain.sampled_root(key, capped, y)).astype(z.dtype)

    def sample(self, key: Array, z: Array) -> Array:
        return super().sample(key, self._capped(z)).astype(z.dtype)

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        if not jnp.issubdtype(jnp.result_type(y), jnp.integer) and jnp.shape(y) == z_shape:
            raise TypeError(
                f"{self}: targets must be integer labels, (B, ...). Distributions over the classes "
                "are as big as the net inputs that it avoids: SoftmaxCrossEntropy takes them"
            )
        super().check(z_shape, y)

    def _capped(self, z: Array) -> Array:
        """z', in float32 at least."""
        z = wide(z)
        return z if self.logit_cap is None else self.logit_cap * jnp.tanh(z / self.logit_cap)

    def _slope(self, capped: Array) -> Array | float:
        """dz'/dz, from z'; 0 where that is NaN, as at positions that are ignored it may be."""
        if self.logit_cap is None:
            return 1.0
        return jnp.where(jnp.isnan(capped), 0, 1 - jnp.square(capped / self.logit_cap))

    # The fused way, from the inputs of the last linear map.

    def head_losses(self, h: Array, w: Array, b: Array | None, y: Array) -> Array:
        """C_n of every example, (B,): h (B, ..., p), w (p, V), b (V,) or None, y (B, ...)."""
        rows = self._rows(h, w, y, None)

        def block(_: None, rows: _Rows) -> tuple[None, Array]:
            return None, self._forward(rows, w, b).cost

        costs = lax.scan(block, None, rows.cut(self._block(w, len(rows.y))))[1]
        return _by_example(costs, y)

    def head(self, h: Array, w: Array, b: Array | None, y: Array, weights: Array) -> Head:
        """Costs, the delta of h, and the weighted sums of the gradients of w and b.

        Args:
            h: the inputs of the last linear map, (B, ..., p).
            w: its weights, (p, V).
            b: its biases, (V,), or None.
            y: integer labels, (B, ...).
            weights: (B,), one for each example. An example of weight 0 is not there.
        """
        (p, classes), rows = w.shape, self._rows(h, w, y, weights)
        size, dtype = self._block(w, len(rows.y)), rows.share.dtype

        def block(sums: Any, rows: _Rows) -> tuple[Any, tuple[Array, Array]]:
            ahead = self._forward(rows, w, b)
            h_weighted = (rows.weight[:, None] * rows.h.astype(dtype)).astype(rows.h.dtype)

            def some(start: Any, size: int, carry: Any) -> Any:
                """The part of `size` classes in all sums."""
                w_grad, b_grad, delta_h = carry
                z, w_part = (_part(v, start, size) for v in (ahead.z, w))
                delta = self._delta_of(z, ahead, rows, start, classes)
                if b_grad is not None:
                    b_grad = _add_at(b_grad, start, _dot(rows.weight[None], delta, 1, 0)[0])
                delta = delta.astype(rows.h.dtype)
                w_grad = _add_at(w_grad, start, _dot(h_weighted, delta, 0, 0))
                delta_h = delta_h + _dot(delta, w_part.astype(delta.dtype), 1, 1)
                return w_grad, b_grad, delta_h

            carry = (*sums, jnp.zeros((len(rows.y), p), dtype))
            *sums, delta_h = _in_parts(some, classes, self._chunk(ahead.z), carry)
            delta_h = (rows.share[:, None] * delta_h).astype(h.dtype)
            return tuple(sums), (ahead.cost, delta_h)

        start = (jnp.zeros((p, classes), dtype), None if b is None else jnp.zeros(classes, dtype))
        (w_grad, b_grad), (costs, delta_h) = lax.scan(block, start, rows.cut(size))
        delta_h = delta_h.reshape(-1, p)[: len(rows.y)].reshape(h.shape)
        return Head(_by_example(costs, y), delta_h, w_grad, b_grad)

    def _rows(self, h: Array, w: Array, y: Array, weights: Array | None) -> _Rows:
        """All positions of the mini-batch."""
        operand, classes = jnp.result_type(h, w), w.shape[1]
        if operand == jnp.float16:  # the delta of a rare class would underflow in it
            operand = jnp.dtype("float32")
        dtype = wide_dtype(operand)
        labels, mass = self.labels(y, classes, dtype)
        share = mass / math.prod(y.shape[1:])
        weight, there = share, share != 0
        if weights is not None:
            column = weights.astype(dtype).reshape((-1,) + (1,) * (y.ndim - 1))
            there &= column != 0
            weight = jnp.where(there, column * share, 0)
            share = jnp.where(there, share, 0)
        h = jnp.where(there[..., None], h, 0).astype(operand)  # not even finite if it is not there
        target = jnp.full(y.shape, 1 - self.label_smoothing, dtype)
        if self.class_weights is not None:
            own = jnp.take(jnp.asarray(self.class_weights, dtype), labels, mode="clip")
            target = target * own
        flat = (v.reshape(-1) for v in (labels.astype(jnp.int32), target, share, weight))
        return _Rows(h.reshape(-1, h.shape[-1]), *flat)

    def _spread_evenly(self, classes: int, dtype: Any) -> Array | None:
        """The part of the target weights that is the same for all positions, (V,)."""
        if not self.label_smoothing:
            return None
        each = jnp.asarray(self.class_weights or (1.0,) * classes, dtype)
        return each * (self.label_smoothing / classes)

    def _forward(self, rows: _Rows, w: Array, b: Array | None) -> _Ahead:
        """One block of positions, as far as its costs."""

        def some(start: Any, size: int, z: Array) -> Array:
            """Net inputs of `size` classes; what is done to all at once takes another array."""
            part = _dot(rows.h, _part(w, start, size).astype(rows.h.dtype), 1, 0)
            if b is not None:
                part = part + _part(b, start, size).astype(part.dtype)[None]
            return lax.dynamic_update_slice_in_dim(z, self._capped(part), start, 1)

        slab = jnp.zeros((len(rows.y), w.shape[1]), rows.share.dtype)
        z = _in_parts(some, w.shape[1], self._chunk(slab), slab)
        own = jnp.take_along_axis(z, rows.y[:, None], axis=1)
        top = jnp.max(z, axis=1, keepdims=True)
        log_sum = jnp.log(jnp.sum(jnp.exp(z - top), axis=1, keepdims=True))
        spread = self._spread_evenly(z.shape[1], z.dtype)
        cost = self._mass(rows, spread) * (log_sum + (top - own))[:, 0]
        if spread is not None:
            apart = jnp.where(spread[None] == 0, 0, spread[None] * (z - own))
            cost = cost - jnp.sum(apart, axis=1)
        return _Ahead(z, top, log_sum, jnp.where(rows.share == 0, 0, rows.share * cost))

    def _mass(self, rows: _Rows, spread: Array | None) -> Array:
        """m, the sum of the target weights of every position."""
        return rows.target if spread is None else rows.target + jnp.sum(spread)

    def _delta_of(self, z: Array, ahead: _Ahead, rows: _Rows, start: Any, classes: int) -> Array:
        """delta of the classes from `start` on, from their z'; without the position's share."""
        spread = self._spread_evenly(classes, z.dtype)
        delta = jnp.exp((z - ahead.top) - ahead.log_sum)  # their sum would lose log_sum
        if self.class_weights is not None:  # without them m = 1
            delta = self._mass(rows, spread)[:, None] * delta
        if spread is not None:
            delta = delta - _part(spread, start, z.shape[1])[None]
        hit = lax.broadcasted_iota(jnp.int32, z.shape, 1) == (rows.y - start)[:, None]
        delta = delta - jnp.where(hit, rows.target[:, None], 0)
        return delta * self._slope(z)

    def _block(self, w: Array, rows: int) -> int:
        """How many positions at once: about the same for every block."""
        p, classes = w.shape
        fitting = _SLAB // (classes * wide_dtype(w.dtype).itemsize)
        most = self.block or min(512, max(fitting, min(p, 256)))
        return -(-rows // max(1, -(-rows // most))) or 1

    def _chunk(self, z: Array) -> int:
        """How many classes at once."""
        if self.vocab_block:
            return self.vocab_block
        if jax.default_backend() == "cpu":
            return _CHUNK
        return max(_CHUNK, _CHUNK_BYTES // (len(z) * z.dtype.itemsize))


class _Rows(NamedTuple):
    """Positions of a mini-batch, or of a block of it, in rows.

    Attributes:
        h: (N, p), 0 where nothing counts.
        y: labels, (N,).
        target: what the label's own class weighs, (N,).
        share: the position's share in its example's cost, (N,): 0 if ignored, NaN for no label.
        weight: the same times the example's weight.
    """

    h: Array
    y: Array
    target: Array
    share: Array
    weight: Array

    def cut(self, size: int) -> _Rows:
        """Blocks of so many, stacked; the last is filled up with places that do not count."""

        def cut(v: Array) -> Array:
            number = -(-len(v) // size)
            filled = jnp.pad(v, [(0, number * size - len(v))] + [(0, 0)] * (v.ndim - 1))
            return filled.reshape(number, size, *v.shape[1:])

        return jax.tree.map(cut, self)


class _Ahead(NamedTuple):
    """A block of positions, forward: z' (N, V), its parts of the costs (N,).

    The logsumexp is in two parts (N, 1): the largest z', and the log of the sum of e^(z' - top).
    """

    z: Array
    top: Array
    log_sum: Array
    cost: Array


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
    """The sum over a's axis i and b's axis j, in float32 at least."""
    a, b = (v.astype(jnp.result_type(a, b)) for v in (a, b))
    return lax.dot_general(
        a, b, (((i,), (j,)), ((), ())), preferred_element_type=wide_dtype(a.dtype)
    )


def _add_at(sums: Array, start: Any, more: Array) -> Array:
    """Add to a part of the last axis, in place where the compiler can."""
    more = _part(sums, start, more.shape[-1]) + more
    return lax.dynamic_update_slice_in_dim(sums, more, start, sums.ndim - 1)


def _part(v: Array, start: Any, size: int) -> Array:
    """A part of the last axis."""
    return lax.dynamic_slice_in_dim(v, start, size, v.ndim - 1)


def _in_parts(f: Callable[[Any, int, Any], Any], total: int, size: int, carry: Any) -> Any:
    """f(start, size, carry) for parts of `total`, the last as big as is left."""
    if size < total:
        number = total // size
        carry = lax.fori_loop(0, number, lambda i, c: f(jnp.int32(i) * size, size, c), carry)
        start = number * size
        return f(start, total - start, carry) if start < total else carry
    return f(0, total, carry)


def _by_example(costs: Array, y: Array) -> Array:
    """The sums over the positions of every example, (B,), of costs in blocks."""
    each = costs.reshape(-1)[: y.size].reshape(len(y), math.prod(y.shape[1:]))
    return jnp.sum(each, axis=1)
