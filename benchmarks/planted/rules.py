"""Functions with derivative rules of their own, right ones and the parts to make them wrong.

`jax.custom_vjp` and `jax.custom_jvp` functions with several outputs, integer arguments and None;
layers and losses of this library whose rule has been tampered with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jbackprop as jb
from planted.nets import normal, rows, tanh_slope
from planted.problems import swish_slope

Rule = Callable[..., Any]


def with_vjp(f: Rule, back: Rule) -> Any:
    """f with the reverse rule back(args, cotangent) -> a cotangent for every argument."""
    rule = jax.custom_vjp(f)
    rule.defvjp(lambda *args: (f(*args), args), back)
    return rule


def with_jvp(f: Rule, push: Rule) -> Any:
    """f with the forward rule push(args, tangents) -> the tangent of the output."""
    rule = jax.custom_jvp(f)
    rule.defjvp(lambda args, tangents: (f(*args), push(args, tangents)))
    return rule


@dataclasses.dataclass(frozen=True)
class Ruled:
    """A function and its right rule: for `with_vjp`, or for `with_jvp` if forward."""

    name: str
    f: Rule
    rule: Rule
    args: tuple[Any, ...]
    forward: bool = False

    def made(self, rule: Rule | None = None) -> Any:
        """The function with this rule, by default the right one."""
        return (with_jvp if self.forward else with_vjp)(self.f, rule or self.rule)


# Reverse rules.


def _affine(x: Array, w: Array, b: Array | None) -> Array:
    z = x @ w
    return z if b is None else z + jnp.broadcast_to(b, z.shape)


def affine_back(
    args: Any,
    g: Array,
    x: Rule = lambda g, w: g @ w.T,
    w: Rule = lambda x, g: x.T @ g,
) -> Any:
    """dC/dx, dC/dw, and dC/db where there is a b."""
    b = None if args[2] is None else jnp.sum(g, axis=0)
    return x(g, args[1]), w(args[0], g), b


def take_back(args: Any, g: Array, repeated: str = "add") -> Any:
    """Rows go back to where their ids point; ids are integers and have no derivative."""
    table, ids = args
    return getattr(jnp.zeros_like(table).at[ids], repeated)(g), None


def _costs(z: Array, labels: Array) -> Array:
    return jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]


def costs_back(args: Any, g: Array, weight: Rule = lambda g: g[:, None]) -> Any:
    """Softmax minus target, by the cotangent of each example's cost."""
    z, labels = args
    return weight(g) * (jax.nn.softmax(z) - jax.nn.one_hot(labels, z.shape[1], dtype=z.dtype)), None


def _softmax_back(args: Any, g: Array) -> Any:
    a = jax.nn.softmax(args[0])
    return (a * (g - jnp.sum(a * g, axis=1, keepdims=True)),)


def softmax_diagonal(args: Any, g: Array) -> Any:
    """As if softmax were elementwise."""
    a = jax.nn.softmax(args[0])
    return (a * (1 - a) * g,)


def _rms(x: Array, gain: Array) -> Array:
    return (
        x
        / jnp.sqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True))
        * jnp.broadcast_to(gain, x.shape)
    )


def rms_back(args: Any, g: Array, length: float = 1.0) -> Any:
    """Through the length as well."""
    x, gain = args
    s = jnp.sqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True))
    d = g * jnp.broadcast_to(gain, x.shape)
    through = length * x * jnp.mean(x * d, axis=1, keepdims=True) / (s * s)
    return (d - through) / s, jnp.sum(g * x / s, axis=0)


def pair_back(args: Any, g: Any, second: float = 1.0) -> Any:
    """Of (sin x, cos x)."""
    return (g["sin"] * jnp.cos(args[0]) - second * g["more"][0] * jnp.sin(args[0]),)


_labels = np.array([0, 2, 3, 1, 1], "int32")
_ids = np.array([4, 0, 4, 4, 1, 0], "int32")
_x, _w, _b, _square, _z = normal(31, (6, 4), (4, 3), (3,), (4, 4), (5, 4))

SWISH = Ruled("swish", jax.nn.silu, lambda args, g: (g * swish_slope(args[0]),), (_z,))
PAIR = Ruled(
    "sine and cosine",
    lambda x: {"sin": jnp.sin(x), "more": (jnp.cos(x), None)},
    pair_back,
    (_x,),
)
TAKE = Ruled("rows of a table", lambda table, ids: table[ids], take_back, (_z, _ids))
AFFINE = Ruled("dense", _affine, affine_back, (_x, _square, _b[[0, 1, 2, 0]]))
AFFINE_PLAIN = Ruled("dense without bias", _affine, affine_back, (_x, _w, None))
AFFINE_SQUARE = Ruled("dense 4x4 on 4", _affine, affine_back, (_x[:4], _square, None))
COSTS = Ruled("cross-entropy of labels", _costs, costs_back, (_z, _labels))
SOFTMAX = Ruled("softmax", lambda z: jax.nn.softmax(z), _softmax_back, (_z,))
RMS = Ruled("rms norm", _rms, rms_back, (_x, 1 + 0.3 * _square[0]))
SCALE = Ruled(
    "scaled",
    lambda x, s: x * s,
    lambda args, g: (g * args[1], jnp.sum(g * args[0])),
    (_x, np.array(0.7)),
)
IDENTITY = Ruled("identity", lambda x: x, lambda args, g: (g,), (_x,))
POWER = Ruled(
    "power",
    lambda x, n: jnp.exp(n.astype(x.dtype) * jnp.log(x)),
    lambda args, g: (g * args[1].astype(g.dtype) * args[0] ** 2, None),
    (np.abs(_x) + 0.5, np.array(3, "int32")),
)
CUMSUM = Ruled(
    "cumulative sum",
    lambda x: jnp.cumsum(x),
    lambda args, g: (jnp.cumsum(g[::-1])[::-1],),
    (_z[:, 0],),
)


# Forward rules.


def product_push(args: Any, tangents: Any, first: float = 1.0, second: float = 1.0) -> Array:
    """Both terms."""
    (x, y), (tx, ty) = args, tangents
    return first * tx * y + second * x * ty


def _logsumexp_push(args: Any, tangents: Any) -> Array:
    return jnp.sum(jax.nn.softmax(args[0]) * tangents[0], axis=1)


def angle_push(args: Any, tangents: Any, sign: float = -1.0) -> Array:
    """(x dy - y dx) / (x^2 + y^2)."""
    (y, x), (ty, tx) = args, tangents
    return (x * ty + sign * y * tx) / (x * x + y * y)


def solve_push(args: Any, tangents: Any, matrix: float = 1.0) -> Array:
    """From A x = b: dx = A^-1 (db - dA x)."""
    (a, b), (ta, tb) = args, tangents
    return jnp.linalg.solve(a, tb - matrix * (ta @ jnp.linalg.solve(a, b)))


TANH = Ruled("tanh", jnp.tanh, lambda args, t: tanh_slope(args[0]) * t[0], (_z,), forward=True)
PRODUCT = Ruled("product", lambda x, y: x * y, product_push, (_x, _x[::-1] + 1), forward=True)
LOGSUMEXP = Ruled(
    "logsumexp", lambda z: jax.nn.logsumexp(z, axis=1), _logsumexp_push, (_z,), forward=True
)
ANGLE = Ruled("angle", jnp.arctan2, angle_push, (_x, _x[::-1] + 3), forward=True)
SOLVE = Ruled(
    "solution of a linear system", jnp.linalg.solve, solve_push,
    (_square + 3 * np.eye(4), _x[:4, :2]), forward=True,
)  # fmt: skip
CIRCLE = Ruled(
    "cosine and sine",
    lambda x: (jnp.cos(x), jnp.sin(x)),
    lambda args, t: (-jnp.sin(args[0]) * t[0], jnp.cos(args[0]) * t[0]),
    (_x,),
    forward=True,
)

RULES = (
    SWISH, PAIR, TAKE, AFFINE, AFFINE_PLAIN, AFFINE_SQUARE, COSTS, SOFTMAX, RMS, SCALE, IDENTITY,
    POWER, CUMSUM, TANH, PRODUCT, LOGSUMEXP, ANGLE, SOLVE, CIRCLE,
)  # fmt: skip


# Layers and losses of this library with a wrong rule.


class Untransposed(jb.Dense):
    """Carries delta by W."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        _, pairs = super().backward(params, trace, delta)
        return delta @ params["w"], pairs


class BiasTwice(jb.Dense):
    """Counts the bias twice."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"b": jb.Shift.of(2 * delta)}


class BiasAveraged(jb.Dense):
    """Averages the bias over the positions."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"b": jb.Shift.of(rows(delta) / rows(delta).shape[0])}


class Swapped(jb.Dense):
    """Takes delta (outer) x for x (outer) delta."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"w": jb.Outer.of(delta, trace.x)}


class Negated(jb.Dense):
    """Hands on the delta with the wrong sign."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        delta_x, pairs = super().backward(params, trace, delta)
        return -delta_x, pairs


class Silenced(jb.Dense):
    """Hands on nothing of its first unit's delta."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        delta_x, pairs = super().backward(params, trace, delta)
        first, _ = super().backward(params, trace, delta.at[..., 1:].set(0))
        return delta_x - first, pairs


class SoftmaxDiagonal(jb.Softmax):
    """Multiplies by a (1 - a) as if softmax were elementwise."""

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        return delta * trace.y * (1 - trace.y), ()


class SoftmaxAgain(jb.SoftmaxCrossEntropy):
    """Multiplies o - y by o (1 - o) again."""

    def error(self, z: Any, y: Any) -> Any:
        o = self.mean(z)
        return super().error(z, y) * o * (1 - o)


class SigmoidAgain(jb.SigmoidCrossEntropy):
    """Multiplies o - y by o (1 - o) again."""

    def error(self, z: Any, y: Any) -> Any:
        o = self.mean(z)
        return super().error(z, y) * o * (1 - o)


class SquaredTwice(jb.SquaredError):
    """Forgets the 1/2 of the cost."""

    def error(self, z: Any, y: Any) -> Any:
        return 2 * super().error(z, y)


class PoissonLog(jb.PoissonNLL):
    """Takes z for the rate e^z."""

    def error(self, z: Any, y: Any) -> Any:
        return z - y


def within(layer: jb.Layer) -> jb.Sequential:
    """A network of 3 to 2 units with this layer, from 4 to 4, in the middle."""
    return jb.Sequential(jb.Dense(3, 4), jb.Tanh(), layer, jb.Tanh(), jb.Dense(4, 2))


def activated(slope: Rule, f: Rule = jnp.tanh) -> jb.Sequential:
    """A network whose activations are a user's, with this derivative."""
    return jb.mlp((3, 5, 4, 2), jb.Activation(f, slope))


def batch(net: Any, loss: Any, *lead: int, seed: int = 0) -> tuple[Any, ...]:
    """(loss, params, x, y) for a network, in float64: weights of variance 1/p, normal data."""
    draw = np.random.default_rng(seed)

    def weight(leaf: Any) -> np.ndarray:
        size = math.sqrt(leaf.shape[0]) if len(leaf.shape) > 1 else 3.0
        return draw.normal(size=leaf.shape) / size

    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = jax.tree.map(weight, shapes)
    weights = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    x, y = draw.normal(size=(*lead, weights[0][0])), draw.normal(size=(*lead, weights[-1][1]))
    if isinstance(loss, jb.SoftmaxCrossEntropy):
        return loss, params, x, np.argmax(y, axis=-1).astype("int32")
    if isinstance(loss, jb.SigmoidCrossEntropy):
        y = (y > 0).astype(float)
    return loss, params, x, np.abs(y) if isinstance(loss, jb.PoissonNLL) else y
