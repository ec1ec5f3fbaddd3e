"""Right gradients where gradients are hard to judge: at kinks, at zero, large, small and steep."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from planted import models, nets
from planted import problems as pr
from planted.entries import Right, right
from planted.nets import Problem, Tree, normal

_UNDERFLOW = "the whole leaf underflows to 0 in this dtype"
_ZERO = "the gradient of a whole leaf is zero: any multiple of the right one looks the same"
_ROUNDING = "the function amplifies rounding: this dtype has no digit left"


# Functions that are at, or within a hair's breadth of, a kink.

_RELU = nets.net_problem(
    "relu network", nets.Net(nets.RELU, *nets.SQUARED), (4, 5, 2), (6,), bias=0.0
)
_zero_row = (_RELU.args[0], _RELU.args[1] * np.arange(6)[:, None], _RELU.args[2])
_ABS = pr.elementwise("modulus", jnp.abs, jnp.sign)
_LEAKY = pr.elementwise("leaky", lambda z: jnp.where(z > 0, z, 0.01 * z), nets.step)
_RELUS = pr.elementwise("relu", jax.nn.relu, nets.step)
_some_zeros = np.where(np.arange(40) % 4, normal(51, (40,)), 0.0)
_c = normal(52, (40,))
_ties = np.round(models.POOL.args[0])


def _at_kink(
    name: str, problem: Problem, *args: Any, dtype: str = "float32", **parts: Any
) -> Right:
    """A convention for f' at a kink."""
    candidate = functools.partial(problem.grad, **parts)
    return right("at a kink", name, problem.fun, *args, candidate=candidate, dtype=dtype, kink=True)


def _slope_at_0(value: float) -> Callable[..., Array]:
    """Relu' with this value at 0."""

    def of_z(z: Array) -> Array:
        return jnp.where(z == 0, jnp.full_like(z, value), nets.step(z))

    return lambda z, l=None: of_z(z if l is None else z[l])


def _sign_at_0(value: float) -> Callable[[Array], Array]:
    return lambda z: jnp.where(z == 0, jnp.full_like(z, value), jnp.sign(z))


def _length(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


def _lasso(w: Array, x: Array, y: Array) -> Array:
    return nets.half_square(x @ w, y) + 0.3 * jnp.sum(jnp.abs(w))


def _lasso_grad(w: Array, x: Array, y: Array) -> Array:
    return x.T @ (x @ w - y) + 0.3 * jnp.sign(w)


def _hinge(w: Array, x: Array) -> Array:
    return jnp.sum(jnp.maximum(0, 1 - x @ w))


_KINKS = (
    *(
        _at_kink(f"relu network, f'(0) = {value}", _RELU, *_zero_row, slope=_slope_at_0(value))
        for value in (0, 0.5, 1)
    ),
    _at_kink("relu network, bfloat16", _RELU, *_zero_row, dtype="bfloat16"),
    _at_kink("relu network, float64", _RELU, *_zero_row, dtype="float64", slope=_slope_at_0(1)),
    *(_at_kink(f"modulus, {v}", _ABS, _some_zeros, _c, slope=_sign_at_0(v)) for v in (-1, 0, 1)),
    _at_kink("modulus of 0 alone", _ABS, np.zeros(1), np.ones(1)),
    _at_kink(
        "leaky, 1",
        _LEAKY,
        _some_zeros,
        _c,
        slope=lambda z: jnp.where(z < 0, 0.01, jnp.ones_like(z)),
    ),
    _at_kink("clip", pr.CLIP, np.round(_some_zeros), _c),
    right(
        "at a kink",
        "lasso at 0",
        _lasso,
        np.zeros(4),
        *normal(53, (9, 4), (9,)),
        candidate=_lasso_grad,
        kink=True,
    ),
    right(
        "at a kink",
        "hinge at 1",
        _hinge,
        np.array([1.0, 0.0]),
        np.array([[1.0, 2.0], [0.5, 1.0], [3.0, 1.0]]),
        kink=True,
    ),
    right(
        "at a kink",
        "largest of ties, shared",
        models.POOL.fun,
        _ties,
        models.POOL.args[1],
        kink=True,
    ),
    _at_kink("largest of ties, the first", models.POOL, _ties, models.POOL.args[1]),
    right(
        "at a kink",
        "length of 0",
        _length,
        np.zeros(3),
        candidate=jnp.zeros_like,
        kink=True,
        inconclusive="nothing but zeros where jax.grad is nan",
    ),
    right("near a kink", "relu at 1e-9", _RELUS.fun, 1e-9 * normal(54, (40,)), _c),
    right("near a kink", "modulus at 1e-6", _ABS.fun, 1e-6 * normal(55, (40,)), _c),
    right(
        "near a kink", "relu at 1e-3", _RELUS.fun, 1e-3 * normal(54, (40,)), _c, dtype="bfloat16"
    ),
)


# Gradients that are zero.


def _with_bias(name: str, problem: Problem, of: str) -> Right:
    """The bias of attention's keys, or of what is then normalised: it changes nothing."""

    def fun(p: Tree, *rest: Any) -> Array:
        inner = dict(p)
        bias = inner.pop("bias")
        if of == "x":
            inner["x"] = p["x"] + jnp.broadcast_to(bias, p["x"].shape)
            return problem.fun(inner, *rest)
        x, c = rest
        q, k, v, _ = pr.attend(inner, x)
        a = jax.nn.softmax(q @ (k + jnp.broadcast_to(bias, k.shape)).T)
        return jnp.sum(c * (a @ v))

    size = problem.args[0][of].shape[1]
    params = problem.args[0] | {"bias": normal(56, (size,))}
    return right("zero by nature", name, fun, params, *problem.args[1:], inconclusive=_ZERO)


def _pairs(p: Tree, x: Array, y: Array) -> Array:
    z = x @ p["w"]
    return nets.half_square(z + nets.like(p["b"], z), y)


_half, _w = normal(57, (4, 3), (3, 2))
_both = np.concatenate([_half, -_half])
_odd = np.sin(_both @ np.ones((3, 2)))
_dead = [p | {"b": p["b"] - 100 * (i == 0)} for i, p in enumerate(nets.RELU_NET.args[0])]
_partly = [
    p | {"b": p["b"] - 100 * (np.arange(len(p["b"])) == i)}
    for i, p in enumerate(nets.RELU_NET.args[0][:2])
]
_partly += nets.RELU_NET.args[0][2:]
_unbiased = [p | {"b": 0 * p["b"]} for p in nets.TANH_NET.args[0]]
_cold = [p | {"w": p["w"] * (i < 3)} for i, p in enumerate(nets.TANH_NET.args[0])]

_ZEROS = (
    right(
        "zero by nature",
        "all units dead",
        nets.RELU_NET.fun,
        _dead,
        *nets.RELU_NET.args[1:],
        inconclusive=_ZERO,
    ),
    right(
        "zero by nature",
        "last weights zero",
        nets.TANH_NET.fun,
        _cold,
        *nets.TANH_NET.args[1:],
        inconclusive=_ZERO,
    ),
    right("zero by nature", "a constant", lambda x: jnp.sum(x) * 0 + 1, _c, inconclusive=_ZERO),
    right(
        "zero by nature",
        "not used",
        lambda p: jnp.sum(p["a"] ** 2),
        {"a": _c, "b": _c},
        inconclusive=_ZERO,
    ),
    right(
        "zero by nature",
        "at a minimum",
        lambda x, y: nets.half_square(x, y),
        _c,
        _c,
        inconclusive=_ZERO,
    ),
    right(
        "zero by nature",
        "pairs x, -x",
        _pairs,
        {"b": np.zeros(2), "w": _w},
        _both,
        _odd,
        inconclusive=_ZERO,
    ),
    right(
        "zero by nature",
        "an empty leaf",
        lambda p: jnp.sum(p["a"]) + jnp.sum(p["b"] ** 2),
        {"a": np.zeros((0, 3)), "b": _c},
    ),
    _with_bias("bias of the keys", pr.ATTENTION, "key"),
    _with_bias("bias before layer norm's mean", pr.BATCH_NORM, "x"),
    right("zero in part", "some units dead", nets.RELU_NET.fun, _partly, *nets.RELU_NET.args[1:]),
    right(
        "zero in part",
        "rows never looked up",
        pr.EMBEDDING.fun,
        *pr.EMBEDDING.args,
        dtype="float64",
    ),
    right("zero in part", "zero biases", nets.TANH_NET.fun, _unbiased, *nets.TANH_NET.args[1:]),
)


# Large, small, steep.


def _scaled(factor: float, offset: float = 0.0) -> Callable[..., Array]:
    return lambda p, x, y: offset + factor * nets.TANH_NET.fun(p, x, y)


def _two_scales(p: Tree) -> Array:
    return jnp.sum(jnp.sin(1e4 * p["small"])) + jnp.sum(1e-4 * jnp.sin(1e-4 * p["large"]))


def _in_order(x: Array, c: Array) -> Array:
    return jnp.sum(c * jnp.square(x[:, None] * jnp.ones((1, c.shape[1]), x.dtype)))


def _in_order_grad(x: Array, c: Array) -> Array:
    """Terms added one by one."""
    return lax.scan(lambda total, c: (total + 2 * c * x, None), jnp.zeros_like(x), c.T)[0]


def _logistic_map(x: Array) -> Array:
    return jnp.sum(lax.fori_loop(0, 30, lambda i, x: 3.9 * x * (1 - x), x))


_hilbert = 1 / (np.arange(5)[:, None] + np.arange(5) + 1)
_params, _x, _y = nets.TANH_NET.args
_steep = [p | {"w": 60 * p["w"]} for p in nets.SOFTMAX.args[0]]
_positive = np.abs(normal(58, (20,))) + 0.1

_SCALES = (
    right(
        "scale",
        "inputs of 10^4",
        nets.LINEAR.fun,
        nets.LINEAR.args[0],
        1e4 * nets.LINEAR.args[1],
        nets.LINEAR.args[2],
    ),
    right(
        "scale", "tanh of 10^4", nets.TANH_NET.fun, _params, 1e4 * _x, _y, inconclusive=_UNDERFLOW
    ),
    right("scale", "sine of 10^4", pr.SINES.fun, 1e4 * normal(59, (50,)), normal(60, (50,))),
    right("scale", "softplus of 10^4", pr.SOFTPLUS.fun, 1e4 * _c, _some_zeros),
    right("scale", "cost of 10^-12", _scaled(1e-12), _params, _x, _y),
    right("scale", "cost of 10^-30", _scaled(1e-30), _params, _x, _y),
    right("scale", "cost of 10^12", _scaled(1e12), _params, _x, _y),
    right("scale", "offset of 10^8", _scaled(1, 1e8), _params, _x, _y),
    right("scale", "offset of 10^8", _scaled(1, 1e8), _params, _x, _y, dtype="float64"),
    right(
        "scale",
        "leaves of 10^-4 and 10^4",
        _two_scales,
        {"large": 1e4 * _c, "small": 1e-4 * _some_zeros},
    ),
    right("scale", "args of 10^-20", lambda x: jnp.sum(jnp.square(1e18 * x)), 1e-20 * _c),
    right(
        "scale", "common offset of 10^4", lambda x: jnp.sum(jnp.square(x - jnp.mean(x))), 1e4 + _c
    ),
    right("steep", "sine of 1000 x", lambda x: jnp.sum(jnp.sin(1000 * x)), _c),
    right("steep", "exponential of 30", lambda x: jnp.sum(jnp.exp(30 * x)), _positive),
    right("steep", "logarithm near 0", lambda x: jnp.sum(jnp.log(x)), 1e-20 * _positive),
    right("steep", "1 / x near 0", lambda x: jnp.sum(1 / x), 1e-3 * _positive),
    right("steep", "power 3.5", lambda x: jnp.sum(x**3.5), _positive),
    right("steep", "tangent near its pole", lambda x: jnp.sum(jnp.tan(x)), 1.5 + 0.01 * _positive),
    right(
        "steep", "bump of width 1e-4", lambda x: jnp.sum(jnp.exp(-jnp.square(1e4 * x))), 1e-4 * _c
    ),
    right(
        "ill-conditioned",
        "logistic map",
        _logistic_map,
        np.array([0.3, 0.7]),
        inconclusive=_ROUNDING,
    ),
    right(
        "ill-conditioned",
        "log determinant",
        models.LOG_DETERMINANT.fun,
        _hilbert,
        inconclusive=_ROUNDING,
    ),
    right(
        "saturated",
        "sigmoid, log loss",
        nets.LOGISTIC.fun,
        nets.LOGISTIC.args[0],
        40 * nets.LOGISTIC.args[1],
        nets.LOGISTIC.args[2],
        inconclusive="sigmoid(z) - 1 cancels in float32",
    ),
    right("saturated", "softmax", nets.SOFTMAX.fun, _steep, *nets.SOFTMAX.args[1:]),
    right(
        "saturated",
        "sigmoid, all units",
        lambda z: jnp.sum(jax.nn.sigmoid(z)),
        90 + _positive,
        inconclusive=_UNDERFLOW,
    ),
    right("saturated", "tanh, some units", lambda z: jnp.sum(jnp.tanh(z)), 30 * _c),
    right(
        "summed in another order",
        "one by one",
        _in_order,
        normal(61, (3,)),
        normal(62, (3, 4000)),
        candidate=_in_order_grad,
    ),
    right(
        "summed in another order",
        "one by one",
        _in_order,
        normal(61, (3,)),
        normal(62, (3, 50)),
        candidate=_in_order_grad,
        dtype="bfloat16",
    ),
    right(
        "summed in another order",
        "in float16",
        nets.SOFTMAX_SUM.fun,
        *nets.SOFTMAX_SUM.args,
        candidate=nets.SOFTMAX_SUM.grad,
        dtype="float16",
    ),
)

HARD: tuple[Right, ...] = (*_KINKS, *_ZEROS, *_SCALES)
