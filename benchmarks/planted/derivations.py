"""Planted errors in the derivation: the delta rule, its terms, what a function has of its own."""

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
    leaf,
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


_swish = rules.SWISH.made(lambda args, g: (g * jax.nn.sigmoid(args[0]),))
_take = rules.TAKE.made(functools.partial(rules.take_back, repeated="set"))
_tanh = rules.TANH.made(lambda args, t: 1.01 * nets.tanh_slope(args[0]) * t[0])
_softmax = rules.SOFTMAX.made(rules.softmax_diagonal)
_x, _w, _c, _table = nets.normal(41, (6, 4), (4, 3), (6, 3), (5, 3))
_ids = np.array([0, 1, 1, 4, 1, 3], "int32")
_TIED_POOL = dataclasses.replace(
    models.POOL,
    name="max pooling with ties",
    args=(np.round(models.POOL.args[0]), models.POOL.args[1]),
)


def _all_winners(x: Array, c: Array) -> Array:
    windows = jnp.reshape(x, (-1, 4))
    won = windows == jnp.max(windows, axis=1, keepdims=True)
    return jnp.reshape(c[:, None] * won.astype(x.dtype), x.shape)


def _first(windows: Array, axis: int) -> Array:
    return jnp.zeros(windows.shape[:axis], "int32")


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
        "f' at a", nets.TANH_SUM, "1 - z^2", expect="", slope=lambda zs, l: 1 - jnp.square(zs[l])
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
    network("wrong delta", "z for e^z", jb.mlp([4, 5, 2]), rules.PoissonLog()),
    derived("wrong delta", nets.SOFTMAX, "the target forgotten", delta=lambda o, y: o),
    network(
        "wrong delta", "softmax elementwise", jb.Sequential(jb.Dense(4, 3), rules.SoftmaxDiagonal())
    ),
    # Terms.
    derived(
        "regularisation forgotten", nets.DECAY, "", decay=0.0, expect="plus 0.1 times params[0].w"
    ),
    derived(
        "regularisation forgotten",
        nets.DECAY_NET,
        "",
        decay=0.0,
        expect="plus 0.01 times params[0].w",
    ),
    derived(
        "regularisation forgotten",
        nets.DECAY,
        "half of it",
        "float64",
        decay=0.05,
        expect="plus 0.05 times params[0].w",
    ),
    planted(
        "regularisation too much",
        _with_extra(nets.SOFTMAX, 0.1),
        "0.1",
        same,
        expect="minus 0.1 times params[0].w",
    ),
    planted(
        "regularisation too much",
        _with_extra(nets.TANH_NET, 0.01),
        "0.01",
        same,
        expect="minus 0.01 times params[0].w",
    ),
    planted(
        "regularisation too much",
        _with_extra(pr.CONVOLUTION, -0.2),
        "-0.2",
        same,
        expect="plus 0.2 times k",
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
    derived("branch forgotten", models.TIED, "the encoder", encoder=0.0),
    derived("branch forgotten", models.TIED, "the decoder", decoder=0.0),
    derived("branch forgotten", models.RESIDUAL, "the skip", skip=0.0),
    derived("branch forgotten", models.COSINE, "the length", length=0.0),
    derived("branch forgotten", models.GAUSSIAN, "the logarithm", log_term=0.0),
    ruled(
        "branch forgotten",
        rules.PAIR,
        "the second output",
        functools.partial(rules.pair_back, second=0.0),
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
    ),
    elsewhere(
        "example left out", nets.SOFTMAX_SUM, "the last", lambda p, x, y: (p, x[:-1], y[:-1])
    ),
    elsewhere("example left out", nets.TANH_SUM, "the first", lambda p, x, y: (p, x[1:], y[1:])),
    elsewhere(
        "example left out", pr.ATTENTION, "the last position", lambda p, x, c: (p, x[:-1], c[:-1])
    ),
    of_another(pr.ATTENTION, "the weights", _attention_stopped, "all zeros"),
    of_another(models.GAUSSIAN, "the scale", _gaussian_stopped),
    of_another(models.DROPOUT, "the hidden layer", _dropout_stopped, "all zeros"),
    of_another(pr.RECURRENT, "the state", _recurrent_stopped),
    fooled("swish in a network", lambda w, x, c: jnp.sum(c * _swish(x @ w)), _w, _x, _c),
    fooled("rows of a table", lambda w, ids, c: jnp.sum(c * _take(w, ids)), _table, _ids, _c),
    fooled("tanh, 1.01", lambda w, x, c: jnp.sum(c * _tanh(x @ w)), _w, _x, _c),
    fooled("softmax in a layer", lambda w, x, c: jnp.sum(c * _softmax(x @ w)), _w, _x, _c),
    elsewhere("stale", nets.TANH_NET, "parameters of before", lambda p, *r: (scaled(0.9)(p), *r)),
    elsewhere("stale", nets.SOFTMAX, "parameters at the start", lambda p, *r: (scaled(0)(p), *r)),
    elsewhere("stale", models.GAUSSIAN, "another batch", lambda p, y: (p, jnp.roll(y, 1))),
    # What is particular to a function.
    derived("maximum", models.POOL, "the minimum", winner=jnp.argmin),
    derived("maximum", models.POOL, "the first", winner=_first),
    claimed("maximum", _TIED_POOL, "full to all of them", _all_winners),
    derived("clip forgotten", pr.CLIP, "", slope=jnp.ones_like),
    derived("clip forgotten", pr.HUBER, "", slope=same),
    planted(
        "clipped", nets.SOFTMAX_SUM, "entries at 1/2", leaf("", lambda g: jnp.clip(g, -0.5, 0.5))
    ),
    planted(
        "clipped",
        nets.LINEAR,
        "to the norm 1/10",
        lambda t: scaled(0.1)(jax.tree.map(lambda g: g / jnp.linalg.norm(g), t)),
        expect="times",
    ),
    derived("normalisation", pr.LAYER_NORM, "the mean", mean=0.0),
    derived("normalisation", pr.LAYER_NORM, "the variance", variance=0.0),
    derived("normalisation", pr.BATCH_NORM, "both constants", mean=0.0, variance=0.0),
    derived("normalisation", pr.RMS_NORM, "the length", variance=0.0),
    derived("normalisation", pr.BATCH_NORM, "the variance", "float64", variance=0.0),
    ruled("normalisation", rules.RMS, "the length", functools.partial(rules.rms_back, length=0.0)),
    derived("softmax", pr.ATTENTION, "no Jacobian", softmax=lambda a, da: da),
    derived("softmax", pr.ATTENTION, "the diagonal alone", softmax=lambda a, da: a * (1 - a) * da),
    derived(
        "softmax",
        models.LOGSUMEXP,
        "the largest alone",
        share=lambda z: jax.nn.one_hot(jnp.argmax(z, 1), 6, dtype=z.dtype),
    ),
    derived(
        "softmax",
        models.LOGSUMEXP,
        "over the wrong axis",
        share=lambda z: jax.nn.softmax(z, axis=0),
    ),
    ruled("softmax", rules.SOFTMAX, "the diagonal alone", rules.softmax_diagonal),
    ruled("softmax", rules.LOGSUMEXP, "the mean", lambda args, t: jnp.mean(t[0], axis=1)),
    derived("attention", pr.ATTENTION, "no 1 / sqrt d", scale=lambda d: 1.0, expect="times"),
    derived("attention", pr.ATTENTION, "1 / d", scale=lambda d: 1 / d, expect="times"),
    derived("repeated ids", pr.EMBEDDING, "overwritten", repeated="set"),
    ruled(
        "repeated ids",
        rules.TAKE,
        "overwritten",
        functools.partial(rules.take_back, repeated="set"),
    ),
    ruled("time", rules.CUMSUM, "not reversed", lambda args, g: (jnp.cumsum(g),)),
    derived("time", pr.RECURRENT, "truncated by a step", steps=lambda t: t - 1),
    derived("time", pr.RECURRENT, "the last step alone", steps=lambda t: 1),
    derived("dropout mask", models.DROPOUT, "not on the way back", drop=jnp.ones_like),
    derived("dropout mask", models.DROPOUT, "turned round", drop=lambda mask: 1 - mask),
    derived("wrong count", models.MASKED, "all places", count=jnp.size),
    derived("wrong count", models.MASKED, "examples", count=len),
    ruled(
        "cotangent",
        rules.COSTS,
        "ignored",
        functools.partial(rules.costs_back, weight=lambda g: jnp.ones_like(g)[:, None]),
    ),
    ruled("cotangent", rules.SWISH, "squared", lambda args, g: (g * g * pr.swish_slope(args[0]),)),
    ruled(
        "cotangent",
        rules.SCALE,
        "of the scale lost",
        lambda args, g: (g * args[1], jnp.zeros_like(args[1])),
        expect="all zeros",
    ),
    ruled(
        "cotangent",
        rules.POWER,
        "the exponent",
        lambda args, g: (g * args[0] ** 2, None),
        expect="times 3",
    ),
    ruled(
        "cotangent",
        rules.AFFINE_PLAIN,
        "dC/dw doubled",
        functools.partial(rules.affine_back, w=lambda x, g: 2 * x.T @ g),
        expect="times 1/2",
    ),
)
