"""The catalogue of planted errors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import nets
import numpy as np
import problems as pr
import rules
from entries import (
    Planted,
    again,
    claimed,
    column,
    constant,
    derived,
    elsewhere,
    entry,
    exchanged,
    flipped,
    fooled,
    leaf,
    network,
    of_another,
    ones,
    planted,
    row,
    ruled,
    same,
    scaled,
    straight,
    taken,
    times,
    turned,
)
from jax import Array, lax
from nets import Problem, Tree

import jbackprop as jb


def _with_extra(problem: Problem, strength: float) -> Problem:
    def grad(params: Tree, *rest: Any) -> Tree:
        return jax.tree.map(lambda g, p: g + strength * p, problem.grad(params, *rest), params)

    return dataclasses.replace(problem, grad=grad)


def _attention_stopped(p: Tree, x: Array, c: Array) -> Array:
    a = lax.stop_gradient(pr.attend(p, x)[-1])
    return jnp.sum(c * (a @ (x @ p["value"])))


def _gaussian_stopped(p: Tree, y: Array) -> Array:
    return pr.GAUSSIAN.fun(p | {"log_scale": lax.stop_gradient(p["log_scale"])}, y) + jnp.mean(
        p["log_scale"]
    )


def _dropout_stopped(p: Tree, *rest: Any) -> Array:
    return pr.DROPOUT.fun(p | {"w": lax.stop_gradient(p["w"])}, *rest)


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
    pr.POOL, name="max pooling with ties", args=(np.round(pr.POOL.args[0]), pr.POOL.args[1])
)


def _all_winners(x: Array, c: Array) -> Array:
    windows = jnp.reshape(x, (-1, 4))
    won = windows == jnp.max(windows, axis=1, keepdims=True)
    return jnp.reshape(c[:, None] * won.astype(x.dtype), x.shape)


def _first(windows: Array, axis: int) -> Array:
    return jnp.zeros(windows.shape[:axis], "int32")


def _dense_net(layer: jb.Layer, size: int = 4, out: int = 2) -> jb.Sequential:
    return jb.Sequential(jb.Dense(3, size), jb.Tanh(), layer, jb.Tanh(), jb.Dense(size, out))


def _activated(slope: Any, f: Any = jnp.tanh, sizes: tuple[int, ...] = (3, 5, 4, 2)) -> Any:
    return jb.mlp(sizes, rules.activation(slope, f))


_DEEP = jb.Sequential(
    *[layer for _ in range(14) for layer in (jb.Dense(4, 4), jb.Tanh())],
    rules.Untransposed(4, 4),
    *[layer for _ in range(14) for layer in (jb.Tanh(), jb.Dense(4, 4))],
)

PLANTED: tuple[Planted, ...] = (
    # Multiples.
    planted("sign", nets.SOFTMAX, "-1", scaled(-1)),
    planted("sign", pr.RECURRENT, "-1", scaled(-1)),
    planted("sign", nets.ONE, "-1", scaled(-1)),
    planted("sign", pr.EMBEDDING, "-1", scaled(-1), "bfloat16"),
    planted("sign", nets.TANH_NET, "of one bias", leaf("[1]['b']", times(-1))),
    planted("sign", pr.LAYER_NORM, "of the gain", leaf("['gain']", times(-1))),
    planted("sign", pr.ATTENTION, "of the key", leaf("['key']", times(-1))),
    ruled("sign", rules.IDENTITY, "gradient reversal", lambda args, g: (-g,)),
    ruled(
        "sign",
        rules.ANGLE,
        "+ for -",
        functools.partial(rules.angle_push, sign=1.0),
        expect="times -1",
    ),
    network("sign", "the delta handed on", _dense_net(rules.Negated(4, 4))),
    planted("constant factor", nets.LINEAR, "2", scaled(2), expect="times 1/2"),
    planted("constant factor", nets.LOGISTIC, "1/2", scaled(0.5), expect="times 2"),
    planted("constant factor", nets.ONE, "2", scaled(2), expect="times 1/2"),
    planted("constant factor", nets.TANH_SUM, "sqrt B", scaled(10**0.5)),
    planted("constant factor", nets.RELU_NET, "1/sqrt B", scaled(12**-0.5)),
    planted("constant factor", pr.CONVOLUTION, "0.9", scaled(0.9)),
    planted("constant factor", pr.SINE, "3", scaled(3), expect="times 1/3"),
    planted("constant factor", nets.TANH_NET, "2", scaled(2), "float64", expect="times 1/2"),
    planted("constant factor", nets.SOFTMAX, "1.25", scaled(1.25), "float16"),
    derived("constant factor", pr.CUBE, "z^2 for 3 z^2", slope=jnp.square, expect="times 3"),
    ruled(
        "constant factor",
        rules.SCALE,
        "2",
        lambda args, g: (2 * g * args[1], jnp.sum(2 * g * args[0])),
        expect="times 1/2",
    ),
    network(
        "constant factor",
        "f' twice",
        _activated(lambda z: 2 * nets.tanh_slope(z)),
        expect="times 1/2",
    ),
    network(
        "constant factor",
        "a bias counted twice",
        _dense_net(rules.BiasTwice(4, 4)),
        expect="times 1/2",
    ),
    network(
        "constant factor",
        "the half of the square",
        jb.mlp([3, 4, 2]),
        rules.SquaredTwice(),
        expect="times 1/2",
    ),
    planted("one leaf scaled", pr.RECURRENT, "u by 2", leaf("['u']", times(2)), expect="times 1/2"),
    planted(
        "one leaf scaled",
        pr.DROPOUT,
        "v by 1/2",
        leaf("['v']", times(0.5)),
        "float64",
        expect="times 2",
    ),
    planted("one leaf scaled", nets.DEEP, "a weight by 1.5", leaf("[15]['w']", times(1.5))),
    planted("sum for mean", nets.SOFTMAX, "B", scaled(8), expect="times 1/8"),
    planted("sum for mean", nets.TOKENS, "positions", scaled(3), expect="times 1/3"),
    planted("sum for mean", pr.GAUSSIAN, "30", scaled(30), expect="times 1/30"),
    planted("sum for mean", pr.EMBEDDING, "length", scaled(4), expect="times 1/4"),
    planted("mean for sum", nets.SOFTMAX_SUM, "1/B", scaled(1 / 8), expect="times 8"),
    planted("mean for sum", nets.TANH_SUM, "1/B", scaled(1 / 10), "bfloat16", expect="times 10"),
    planted(
        "mean for sum", nets.TOKENS, "a bias", leaf("[0]['b']", times(1 / 18)), expect="times 18"
    ),
    network(
        "mean for sum",
        "a bias over positions",
        _dense_net(rules.BiasAveraged(4, 4)),
        lead=(3, 5),
        expect="times 5",
    ),
    planted("one in a thousand", nets.SOFTMAX, "all", scaled(1.001)),
    planted("one in a thousand", pr.SINE, "all", scaled(1.001)),
    planted("one in a thousand", pr.RECURRENT, "all", scaled(0.999)),
    planted("one in a thousand", pr.LAYER_NORM, "the gain", leaf("['gain']", times(1.001))),
    planted("one in a thousand", nets.TANH_NET, "a weight", leaf("[0]['w']", times(1.001))),
    planted("one in a thousand", pr.ATTENTION, "1 in 10^6, all", scaled(1 + 1e-6), "float64"),
    ruled(
        "one in a thousand",
        rules.TANH,
        "f'",
        lambda args, t: 1.001 * nets.tanh_slope(args[0]) * t[0],
    ),
    network("one in a thousand", "f'", _activated(lambda z: 1.001 * nets.tanh_slope(z))),
    planted("one in twenty", nets.SOFTMAX, "all", scaled(1.05), "bfloat16"),
    planted("one in twenty", pr.SINES, "all", scaled(0.95), "bfloat16"),
    planted("one in twenty", nets.TANH_NET, "a weight", leaf("[2]['w']", times(1.05)), "bfloat16"),
    planted("one in twenty", pr.LAYER_NORM, "the shift", leaf("['shift']", times(1.05)), "float16"),
    network(
        "one in twenty", "f'", _activated(lambda z: 1.05 * nets.tanh_slope(z)), dtype="bfloat16"
    ),
    # In the wrong place.
    planted("transposed", nets.SOFTMAX_SQUARE, "square", leaf("['w']", jnp.transpose)),
    planted("transposed", nets.TANH_NET, "a square one", leaf("[1]['w']", jnp.transpose)),
    planted("transposed", pr.RECURRENT, "u", leaf("['u']", jnp.transpose)),
    planted("transposed", nets.SOFTMAX, "of another shape", leaf("['w']", jnp.transpose)),
    planted("transposed", pr.TIED, "of another shape", jnp.transpose),
    derived("transposed", pr.LOG_DETERMINANT, "inverse", turn=same),
    ruled(
        "transposed",
        rules.AFFINE,
        "dC/dw",
        functools.partial(rules.affine_back, w=lambda x, g: (x.T @ g).T),
    ),
    network("transposed", "delta (outer) x", _dense_net(rules.Swapped(4, 4))),
    planted("axes permuted", pr.CONVOLUTION, "in and width", turned(1, 0, 2), expect="(1, 0, 2)"),
    planted(
        "axes permuted", pr.IMAGE, "height and width", turned(1, 0, 2, 3), expect="(1, 0, 2, 3)"
    ),
    planted(
        "axes permuted",
        pr.IMAGE,
        "in and out",
        turned(0, 1, 3, 2),
        "float64",
        expect="(0, 1, 3, 2)",
    ),
    planted("axes permuted", pr.HEADS, "in and head", turned(1, 0, 2), expect="(1, 0, 2)"),
    planted(
        "another leaf's",
        pr.ATTENTION,
        "query and key",
        exchanged("query", "key"),
        expect="gradient of p.query",
    ),
    planted(
        "another leaf's",
        pr.LAYER_NORM,
        "gain and shift",
        exchanged("gain", "shift"),
        expect="gradient of p.shift",
    ),
    planted(
        "another leaf's",
        pr.GATED,
        "gate and value",
        exchanged("gate", "value"),
        expect="gradient of p.value",
    ),
    planted(
        "another leaf's",
        nets.TANH_NET,
        "two layers",
        exchanged(1, 2),
        expect="gradient of params[2].w",
    ),
    planted(
        "another leaf's",
        pr.ATTENTION,
        "value is key",
        taken("value", "key"),
        expect="gradient of p.key",
    ),
    derived("not reduced", nets.SOFTMAX, "bias (B, q)", bias=same),
    derived("not reduced", nets.LINEAR, "bias (B, q)", "float64", bias=same),
    derived("not reduced", nets.TOKENS, "bias (T, q)", bias=lambda d: jnp.sum(d, axis=0)),
    derived("not reduced", nets.TANH_NET, "bias (1, q)", bias=lambda d: jnp.sum(d, axis=0)[None]),
    planted("kernel flipped", pr.CONVOLUTION, "", flipped(0)),
    planted("kernel flipped", pr.IMAGE, "both axes", flipped(0, 1)),
    planted("kernel flipped", pr.IMAGE, "width", flipped(1), "float64"),
    derived("kernel flipped", pr.CONVOLUTION_INPUT, "not turned", turn=same, expect=""),
    # Part of an array.
    planted("zero", nets.SOFTMAX, "bias", leaf("['b']", constant(0))),
    planted("zero", pr.RECURRENT, "u", leaf("['u']", constant(0))),
    planted("zero", pr.ATTENTION, "value", leaf("['value']", constant(0)), "bfloat16"),
    planted("zero", nets.WIDE, "weight", leaf("['w']", constant(0))),
    planted("zero", pr.IMAGE, "all", constant(0)),
    planted("single entry", pr.SINE, "negated", entry(70_000, times(-1))),
    planted("single entry", pr.SINE, "zero", entry(99_999, constant(0))),
    planted("single entry", nets.WIDE, "doubled", leaf("['w']", entry(12_345, times(2)))),
    planted(
        "single entry", nets.TANH_NET, "too large", leaf("[1]['w']", entry(7, lambda g: g + 0.01))
    ),
    planted("single entry", nets.SOFTMAX, "negated", leaf("['b']", entry(0, times(-1))), "float64"),
    planted("one row", pr.SINES, "negated", row(37, times(-1)), expect="index 37 of axis 0"),
    planted(
        "one row",
        nets.SOFTMAX_SQUARE,
        "doubled",
        leaf("['w']", row(0, times(2))),
        expect="index 0 of axis 0",
    ),
    planted("one row", pr.EMBEDDING, "zero", row(1, constant(0)), expect="index 1 of axis 0"),
    planted(
        "one row",
        nets.SOFTMAX_SQUARE,
        "a column",
        leaf("['w']", column(2, constant(0))),
        expect="index 2 of axis 1",
    ),
    planted("one row", pr.HEADS, "a head", row(3, times(-1)), expect="index 3 of axis 0"),
    network("one row", "a unit's delta lost", _dense_net(rules.Silenced(4, 4)), expect="of axis"),
    planted("not finite", nets.SOFTMAX, "a NaN", leaf("['b']", entry(0, constant(np.nan)))),
    planted("not finite", pr.SINE, "a NaN", entry(5, constant(np.nan))),
    planted("not finite", nets.TANH_NET, "all NaN", leaf("[0]['w']", constant(np.nan)), "bfloat16"),
    planted(
        "not finite",
        pr.ATTENTION,
        "inf",
        leaf("['value']", entry(3, constant(np.inf))),
        expect="inf",
    ),
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
    network("f' missing", "all", _activated(jnp.ones_like)),
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
    network("f' at a", "all", _activated(lambda z: nets.tanh_slope(jnp.tanh(z)))),
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
    network("W not transposed", "one layer", _dense_net(rules.Untransposed(4, 4))),
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
    derived("product rule", pr.GATED, "1 - g", gate=lambda v, g: v * g),
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
    network("product rule", "swish", _activated(jax.nn.sigmoid, jax.nn.silu)),
    derived("branch forgotten", pr.TIED, "the encoder", encoder=0.0),
    derived("branch forgotten", pr.TIED, "the decoder", decoder=0.0),
    derived("branch forgotten", pr.RESIDUAL, "the skip", skip=0.0),
    derived("branch forgotten", pr.COSINE, "the length", length=0.0),
    derived("branch forgotten", pr.GAUSSIAN, "the logarithm", log_term=0.0),
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
    of_another(pr.GAUSSIAN, "the scale", _gaussian_stopped),
    of_another(pr.DROPOUT, "the hidden layer", _dropout_stopped, "all zeros"),
    of_another(pr.RECURRENT, "the state", _recurrent_stopped),
    fooled("swish in a network", lambda w, x, c: jnp.sum(c * _swish(x @ w)), _w, _x, _c),
    fooled("rows of a table", lambda w, ids, c: jnp.sum(c * _take(w, ids)), _table, _ids, _c),
    fooled("tanh, 1.01", lambda w, x, c: jnp.sum(c * _tanh(x @ w)), _w, _x, _c),
    fooled("softmax in a layer", lambda w, x, c: jnp.sum(c * _softmax(x @ w)), _w, _x, _c),
    elsewhere(
        "other numbers", nets.TANH_NET, "parameters of before", lambda p, *r: (scaled(0.9)(p), *r)
    ),
    elsewhere(
        "other numbers", nets.SOFTMAX, "parameters at the start", lambda p, *r: (scaled(0)(p), *r)
    ),
    elsewhere("other numbers", pr.GAUSSIAN, "another batch", lambda p, y: (p, jnp.roll(y, 1))),
    # What is particular to a function.
    derived("maximum", pr.POOL, "the minimum", winner=jnp.argmin),
    derived("maximum", pr.POOL, "the first", winner=_first),
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
        pr.LOGSUMEXP,
        "the largest alone",
        share=lambda z: jax.nn.one_hot(jnp.argmax(z, 1), 6, dtype=z.dtype),
    ),
    derived(
        "softmax", pr.LOGSUMEXP, "over the wrong axis", share=lambda z: jax.nn.softmax(z, axis=0)
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
    derived("dropout mask", pr.DROPOUT, "not on the way back", drop=jnp.ones_like),
    derived("dropout mask", pr.DROPOUT, "turned round", drop=lambda mask: 1 - mask),
    derived("wrong count", pr.MASKED, "all places", count=jnp.size),
    derived("wrong count", pr.MASKED, "examples", count=len),
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
