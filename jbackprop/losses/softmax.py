"""Softmax cross-entropy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.checks import check_numbers, number_of
from jbackprop.losses.base import check_range, is_concrete, unit_vectors
from jbackprop.losses.canonical import Canonical


class _Targets(NamedTuple):
    """Labels of one class each, or weights t over all classes; and their mass, the sum of t."""

    labels: Array | None
    t: Any
    mass: Array


@dataclasses.dataclass(frozen=True)
class SoftmaxCrossEntropy(Canonical):
    """C = -sum_c t_c log softmax(z)_c, from net inputs: log softmax(z)_c = z_c - logsumexp(z).

    The categorical distribution with A(z) = logsumexp(z), whose gradient is softmax(z). With the
    target weights t of total mass m = sum_c t_c (1 unless there are class weights), C =
    m logsumexp(z) - t . z, so that the delta is m softmax(z) - t: for plain labels, o - y.

    With p = softmax(z), dp_c/dz_j = p_c ([c = j] - p_j): the Hessian is m (diag(p) - p p^T), and
    its product with v is m p * (v - p . v). It is m times the covariance of one-hot rows e_c drawn
    with the probabilities p_c, so that sqrt(m) (p - e_c) for a drawn c is a root on average. Its
    rank is q - 1, and its Cholesky root has as many columns, each a class against those after it:
    with t_c = sum_{j > c} p_j,

        S_c = sqrt(m p_c t_c / t_{c-1}) (e_c - sum_{j > c} p_j / t_c e_j),    c < q - 1

    (Tanabe and Sagae, An exact Cholesky decomposition and the generalized inverse of the variance-
    covariance matrix of the multinomial distribution, 1992).

    Targets: t = w * ((1 - s) y + s / q), with class weights w and label smoothing s (Szegedy et
    al., Rethinking the Inception architecture, 2016, section 7) over q classes.

    Shapes: z (B, ..., q); y either integer labels (B, ...), or distributions over the classes
    (B, ..., q) of floating-point numbers. Over T positions an example's cost is the mean over
    those that are not ignored; class weights are not part of that divisor. All ignored: 0.

    A label out of range raises where its value can be seen, and costs NaN where it cannot, under
    jit; it never counts silently.

    Attributes:
        label_smoothing: s, from 0 to 1.
        class_weights: w, one positive number or 0 for each class.
        ignore_index: the label that marks a place without a target; integer labels only.

    Raises:
        ValueError: options out of range; targets of another shape; labels out of range, where they
            can be seen.
        TypeError: labels that are no integers; ignore_index with distributions.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_numbers(self, "label_smoothing", least=0, most=1)
        if self.ignore_index is not None:
            if isinstance(self.ignore_index, bool) or not hasattr(self.ignore_index, "__index__"):
                raise TypeError(f"{name}: ignore_index must be an int, not {self.ignore_index!r}")
            object.__setattr__(self, "ignore_index", self.ignore_index.__index__())
        if self.class_weights is not None:
            if isinstance(self.class_weights, Mapping | str) or not isinstance(
                self.class_weights, Iterable
            ):
                raise TypeError(
                    f"{name}: class_weights must be a sequence with one number for each class, in "
                    f"their order, not {self.class_weights!r}"
                )
            weights = tuple(
                number_of(w, f"{name}: class_weights[{c}]", least=0)
                for c, w in enumerate(self.class_weights)
            )
            if not weights:
                raise ValueError(f"{name}: class_weights is empty: it needs one for each class")
            object.__setattr__(self, "class_weights", weights)

    def __repr__(self) -> str:
        options = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        shown = (f"{f.name}={getattr(self, f.name)}" for f in options)
        return f"{type(self).__name__}({', '.join(shown)})"

    def cost(self, z: Array, y: _Targets) -> Array:
        log_p = jax.nn.log_softmax(z, axis=-1)
        if y.labels is None:
            return -jnp.sum(jnp.where(y.t == 0, 0, y.t * log_p), axis=-1)
        picked = jnp.take_along_axis(log_p, y.labels[..., None], axis=-1, mode="clip")[..., 0]
        if self.ignore_index is None and self.class_weights is None:
            return -y.mass * picked
        return jnp.where(y.mass == 0, 0, -y.mass * picked)

    def mean(self, z: Array) -> Array:
        return jax.nn.softmax(z, axis=-1)

    def variance_product(self, z: Array, v: Array) -> Array:
        p = self.mean(z)
        return p * (v - jnp.sum(p * v, axis=-1, keepdims=True))

    def variance_root(self, z: Array) -> Array:
        p = self.mean(z)
        if p.shape[-1] == 1:
            return jnp.zeros_like(p)[None]
        tails = jnp.moveaxis(lax.cumsum(p, p.ndim - 1, reverse=True), -1, 0)[..., None]
        before, after = tails[:-1], tails[1:]
        there = after > 0  # all that is after may underflow
        share = after / jnp.where(there, before, 1)
        square = jnp.moveaxis(p, -1, 0)[:-1, ..., None] * share
        size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        units = unit_vectors(z)
        behind = jnp.cumsum(units, axis=-1) - units
        return size * (units[:-1] - behind[:-1] * p[None] / jnp.where(there, after, 1))

    def sample(self, key: Array, z: Array) -> Array:
        """One-hot rows (B, ..., q) of drawn classes."""
        labels = jax.random.categorical(key, z, axis=-1)
        return jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)

    def _counted(self, values: Array, z: Array, y: Any, root: bool) -> Array:
        mass = self.targets(z, y).mass[..., None]
        count = super()._counted(jnp.sqrt(mass) if root else mass, z, y, root)
        count = count.reshape((1,) * (values.ndim - z.ndim) + count.shape)
        return jnp.where(count == 0, 0, count * values)

    def error(self, z: Array, y: _Targets) -> Array:
        mass = y.mass[..., None]
        if y.labels is None:
            error = mass * self.mean(z) - y.t
        else:
            # p - one-hot by a scatter: a fused comparison is 10 % of a small network's step slower.
            # Row by row under `vmap`: rows that are spread over devices stay where they are.
            rows = self.mean(z).reshape(-1, z.shape[-1])
            less = jax.vmap(lambda p, y: p.at[y].add(-1, mode="drop", unique_indices=True))
            error = mass * less(rows, y.labels.reshape(-1)).reshape(z.shape)
        if self.ignore_index is None and self.class_weights is None:
            return error
        return jnp.where(mass == 0, 0, error)  # nothing is expected there, not even finite z

    def targets(self, z: Array, y: Any) -> _Targets:
        """The target weights; over T positions times T / (number of places that count)."""
        self.check(z.shape, y)
        y, classes = jnp.asarray(y), z.shape[-1]
        w = jnp.asarray(self.class_weights or (1.0,) * classes, z.dtype)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            return self._spread(y.astype(z.dtype), w)
        y, mass = self.labels(y, classes, z.dtype)
        if self.label_smoothing:
            hot = jax.nn.one_hot(y, classes, dtype=z.dtype)
            return self._spread(hot, w, mass)
        if self.class_weights is not None:
            mass = mass * jnp.take(w, y, mode="clip")
        return _Targets(y, None, mass)

    def labels(self, y: Array, classes: int, dtype: Any) -> tuple[Array, Array]:
        """Integer labels, and what each counts: T / (number of places that count), or 0 or NaN."""
        if y.dtype.itemsize < 4:  # an int8 cannot count 300 classes
            y = y.astype(jnp.int32)
        # A label out of range weighs NaN: it must not pass for a place without a target.
        mass = jnp.where((y >= 0) & (y < classes), jnp.ones((), dtype), jnp.nan)
        if self.ignore_index is not None:
            counted = y != self.ignore_index
            positions = math.prod(y.shape[1:])
            number = jnp.sum(counted.reshape(len(y), positions), axis=1).astype(dtype)
            scale = (positions / jnp.maximum(number, 1)).reshape((-1,) + (1,) * (y.ndim - 1))
            mass = jnp.where(counted, mass * scale, 0)
        return y, mass

    def _spread(self, y: Array, w: Array, mass: Array | None = None) -> _Targets:
        """The weights of targets that are spread over the classes."""
        t = (1 - self.label_smoothing) * y + self.label_smoothing / y.shape[-1]
        t = t * jnp.broadcast_to(w, t.shape)
        if mass is not None:
            t = jnp.where(mass[..., None] == 0, 0, t * mass[..., None])
        return _Targets(None, t, jnp.sum(t, axis=-1))

    def check(self, z_shape: tuple[int, ...], y: Any) -> None:
        if len(z_shape) < 2:
            raise ValueError(f"{self} needs outputs (B, ..., classes), not {z_shape}")
        y_shape, classes = tuple(jnp.shape(y)), z_shape[-1]
        if self.class_weights is not None and len(self.class_weights) != classes:
            raise ValueError(
                f"{len(self.class_weights)} class_weights for {classes} outputs of the network"
            )
        integer = jnp.issubdtype(jnp.result_type(y), jnp.integer)
        if integer and y_shape == z_shape[:-1]:
            self._check_labels(y, classes)
        elif integer:
            raise ValueError(
                f"{self}: integer labels need the shape {z_shape[:-1]} beside outputs "
                f"{z_shape}, not {y_shape}; one-hot rows must be floating-point numbers"
            )
        elif y_shape == z_shape[:-1]:
            raise TypeError(
                f"{self}: labels must be integers, not {jnp.result_type(y)}: use y.astype('int32')"
            )
        elif y_shape != z_shape:
            raise ValueError(
                f"{self}: targets have the shape {y_shape}, but outputs {z_shape} need integer "
                f"labels {z_shape[:-1]} or distributions {z_shape}"
            )
        elif self.ignore_index is not None:
            raise TypeError(f"{self}: ignore_index needs integer labels, not distributions")
        else:
            check_range(self, y, 0, np.inf, "a distribution has no negative entries")

    def _check_labels(self, y: Any, classes: int) -> None:
        if not is_concrete(y):
            return
        labels = np.asarray(y)
        wrong = (labels < 0) | (labels >= classes)
        if self.ignore_index is not None:
            wrong &= labels != self.ignore_index
        if wrong.any():
            at = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
            place = ", ".join(map(str, at))
            hint = "; two classes need two outputs, or SigmoidCrossEntropy one and y[..., None]"
            raise ValueError(
                f"labels must be from 0 to {classes - 1}, one for each output of the network, but "
                f"y[{place}] is {labels[at]}; {int(wrong.sum())} of {labels.size} are out of range"
                + (hint if classes == 1 else "")
            )
