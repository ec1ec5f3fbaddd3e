"""Planted errors in the derivation: the delta rule, terms and paths, other data."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jbackprop as jb
from planted import models, nets, rules
from planted import problems as pr
from planted.entries import (
    Planted,
    again,
    claimed,
    derived,
    elsewhere,
    fooled,
    network,
    of_another,
    ones,
    planted,
    ruled,
    same,
    scaled,
    straight,
)
from planted.nets import Problem, Tree


def _with_extra(problem: Problem, strength: float) -> Problem:
    def grad(params: Tree, *rest: Any) -> Tree:
        return jax.tree.map(lambda g, p: g + strength * p, problem.grad(params, *rest), params)

    return dataclasses.replace(problem, grad=grad)


def _attention_stopped(p: Tree, x: Array, c: Array) -> Array:
    a = lax.stop_gradient(pr.attend(p, x)[-1])
    return jnp.sum(c * (a @ (x @ p["value"])))


def _gaussian_stopped(p: Tree, y: Array) -> Array:
    return models.GAUSSIAN.fun(p | {"log_scale": lax.stop_gradient(p["log_scale"])}, y) + jnp.mean(
        p["log_scale"]
    )


def _dropout_stopped(p: Tree, *rest: Any) -> Array:
    return models.DROPOUT.fun(p | {"w": lax.stop_gradient(p["w"])}, *rest)


def _recurrent_stopped(p: Tree, x: Array, c: Array) -> Array:
    h = jnp.zeros_like(c)
    for x_t in x:
        z = x_t @ p["w"] + lax.stop_gradient(h) @ p["u"]
        h = jnp.tanh(z + nets.like(p["b"], z))
    return jnp.sum(c * h)


def _noisy(*args: Any) -> Tree:
    keys = iter(jax.random.split(jax.random.key(0)))
    return jax.tree.map(
        lambda g: g * (1 + 0.01 * jax.random.normal(next(keys), g.shape, g.dtype)),
        nets.SOFTMAX.grad(*args),
    )


_swish = rules.SWISH.made(lambda args, g: (g * jax.nn.sigmoid(args[0]),))
_take = rules.TAKE.made(functools.partial(rules.take_back, repeated="set"))
_tanh = rules.TANH.made(lambda args, t: 1.01 * nets.tanh_slope(args[0]) * t[0])
_softmax = rules.SOFTMAX.made(rules.softmax_diagonal)
_x, _w, _c, _table = nets.normal(41, (6, 4), (4, 3), (6, 3), (5, 3))
_ids = np.array([0, 1, 1, 4, 1, 3], "int32")


_DEEP = jb.Sequential(
    *[layer for _ in range(14) for layer in (jb.Dense(4, 4), jb.Tanh())],
    rules.Untransposed(4, 4),
    *[layer for _ in range(14) for layer in (jb.Tanh(), jb.Dense(4, 4))],
)

WRONG_DERIVATIONS: tuple[Planted, ...] = (
    # The delta rule.
    derived("f' missing", nets.TANH_NET, "", slope=ones),
    derived("f' missing", nets.SIGMOID_NET, "", slope=ones),
    derived("f' missing", nets.RELU_NET, "", slope=ones),
    derived(
        "f' missing",
        nets.TANH_SUM,
        "in one layer",
        slope=lambda zs, l: ones(zs, l) if l else nets.tanh_slope(zs[0]),
    ),
    network("f' missing", "all", rules.activated(jnp.ones_like)),
    derived("f' at a", nets.TANH_NET, "", slope=lambda zs, l: nets.tanh_slope(jnp.tanh(zs[l]))),
    derived(
        "f' at a",
        nets.SIGMOID_NET,
        "",
        slope=lambda zs, l: nets.sigmoid_slope(jax.nn.sigmoid(zs[l])),
    ),
    derived(
        "f' at a",
        nets.TANH_SUM,
        "1 - z^2",
        slope=lambda zs, l: 1 - jnp.square(zs[l]),
        expect="1 - a^2",
    ),
    network("f' at a", "all", rules.activated(lambda z: nets.tanh_slope(jnp.tanh(z)))),
    derived(
        "f' of the neighbour",
        nets.TANH_NET,
        "",
        slope=lambda zs, l: nets.tanh_slope(zs[(l + 1) % 3]),
    ),
    derived(
        "f' of the neighbour", nets.TANH_SUM, "", slope=lambda zs, l: nets.tanh_slope(zs[1 - l])
    ),
    derived(
        "f' of the neighbour",
        nets.SIGMOID_NET,
        "",
        "float64",
        slope=lambda zs, l: nets.sigmoid_slope(zs[1 - l]),
    ),
    derived("W not transposed", nets.TANH_NET, "", back=straight),
    derived("W not transposed", nets.SIGMOID_NET, "", back=straight),
    derived("W not transposed", nets.DEEP, "", back=straight),
    derived("W not transposed", pr.RECURRENT, "u", back=same),
    ruled(
        "W not transposed",
        rules.AFFINE_SQUARE,
        "dC/dx",
        functools.partial(rules.affine_back, x=jnp.matmul),
    ),
    network("W not transposed", "one layer", rules.within(rules.Untransposed(4, 4))),
    network("W not transposed", "one of 29 layers", _DEEP),
    derived("delta times f' again", nets.SOFTMAX, "", delta=again),
    derived("delta times f' again", nets.RELU_NET, "", delta=again),
    derived("delta times f' again", nets.LOGISTIC, "", delta=again),
    derived("delta times f' again", nets.SIGMOID_NET, "", delta=again),
    derived("delta times f' again", nets.WIDE, "", "bfloat16", delta=again),
    network("delta times f' again", "softmax", jb.mlp([4, 5, 3]), rules.SoftmaxAgain()),
    network("delta times f' again", "sigmoid", jb.mlp([4, 5, 2]), rules.SigmoidAgain()),
    network("wrong delta", "z for e^z", jb.mlp([4, 5, 2]), rules.PoissonLog(), expect="exp"),
    derived(
        "wrong delta",
        nets.SOFTMAX,
        "the target forgotten",
        delta=lambda o, y: o,
        expect="the first operand of sub",
    ),
    network(
        "wrong delta",
        "softmax elementwise",
        jb.Sequential(jb.Dense(4, 3), rules.SoftmaxDiagonal()),
        expect="the diagonal",
    ),
    # Terms.
    derived(
        "regularisation forgotten",
        nets.DECAY,
        "",
        decay=0.0,
        expect="plus 0.1 times the parameter: a regularisation term is missing",
    ),
    derived(
        "regularisation forgotten",
        nets.DECAY_NET,
        "",
        decay=0.0,
        expect="plus 0.01 times the parameter: a regularisation term is missing",
    ),
    derived(
        "regularisation forgotten",
        nets.DECAY,
        "half of it",
        "float64",
        decay=0.05,
        expect="plus 0.05 times the parameter: a regularisation term is missing",
    ),
    planted(
        "regularisation too much",
        _with_extra(nets.SOFTMAX, 0.1),
        "0.1",
        same,
        expect="minus 0.1 times the parameter",
    ),
    planted(
        "regularisation too much",
        _with_extra(nets.TANH_NET, 0.01),
        "0.01",
        same,
        expect="minus 0.01 times the parameter",
    ),
    planted(
        "regularisation too much",
        _with_extra(pr.CONVOLUTION, -0.2),
        "-0.2",
        same,
        expect="plus 0.2 times the parameter",
    ),
    derived("product rule", pr.SWISH, "sigmoid(z)", slope=jax.nn.sigmoid),
    derived("product rule", pr.GELU, "Phi(z)", slope=pr.normal_cdf),
    derived("product rule", models.GATED, "1 - g", gate=lambda v, g: v * g),
    ruled(
        "product rule", rules.SWISH, "sigmoid(z)", lambda args, g: (g * jax.nn.sigmoid(args[0]),)
    ),
    ruled(
        "product rule",
        rules.PRODUCT,
        "x dy",
        functools.partial(rules.product_push, second=0.0),
        expect="all zeros",
    ),
    network("product rule", "swish", rules.activated(jax.nn.sigmoid, jax.nn.silu)),
    derived(
        "branch forgotten", models.TIED, "the encoder", encoder=0.0, expect="goes through tanh"
    ),
    derived("branch forgotten", models.TIED, "the decoder", decoder=0.0, expect="is missing"),
    derived("branch forgotten", models.RESIDUAL, "the skip", skip=0.0, expect="operand of add"),
    derived(
        "branch forgotten", models.COSINE, "the length", length=0.0, expect="goes through sqrt"
    ),
    derived(
        "branch forgotten",
        models.GAUSSIAN,
        "the logarithm",
        log_term=0.0,
        expect="the second operand of add",
    ),
    ruled(
        "branch forgotten",
        rules.PAIR,
        "the second output",
        functools.partial(rules.pair_back, second=0.0),
        expect="goes through cos",
    ),
    ruled(
        "branch forgotten",
        rules.SOLVE,
        "the matrix",
        functools.partial(rules.solve_push, matrix=0.0),
        expect="all zeros",
    ),
    ruled(
        "branch forgotten",
        rules.CIRCLE,
        "cosine for both",
        lambda args, t: (jnp.cos(args[0]) * t[0],) * 2,
        expect="it is the gradient of output[1]",
    ),
    elsewhere(
        "example left out", nets.SOFTMAX_SUM, "the last", lambda p, x, y: (p, x[:-1], y[:-1])
    ),
    elsewhere("example left out", nets.TANH_SUM, "the first", lambda p, x, y: (p, x[1:], y[1:])),
    elsewhere(
        "example left out", pr.ATTENTION, "the last position", lambda p, x, c: (p, x[:-1], c[:-1])
    ),
    of_another(pr.ATTENTION, "the weights", _attention_stopped, "all zeros"),
    of_another(models.GAUSSIAN, "the scale", _gaussian_stopped, "goes through exp"),
    of_another(models.DROPOUT, "the hidden layer", _dropout_stopped, "all zeros"),
    of_another(pr.RECURRENT, "the state", _recurrent_stopped, "is missing"),
    fooled("swish in a network", lambda w, x, c: jnp.sum(c * _swish(x @ w)), _w, _x, _c),
    fooled("rows of a table", lambda w, ids, c: jnp.sum(c * _take(w, ids)), _table, _ids, _c),
    fooled("tanh, 1.01", lambda w, x, c: jnp.sum(c * _tanh(x @ w)), _w, _x, _c),
    fooled("softmax in a layer", lambda w, x, c: jnp.sum(c * _softmax(x @ w)), _w, _x, _c),
    elsewhere("stale", nets.TANH_NET, "parameters of before", lambda p, *r: (scaled(0.9)(p), *r)),
    elsewhere("stale", nets.SOFTMAX, "parameters at the start", lambda p, *r: (scaled(0)(p), *r)),
    elsewhere("stale", models.GAUSSIAN, "another batch", lambda p, y: (p, jnp.roll(y, 1))),
    claimed("noise", nets.SOFTMAX, "1 in 100 on every entry", _noisy),
)
