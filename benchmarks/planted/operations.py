"""Planted errors in the derivative of one operation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from planted import models, nets, rules
from planted import problems as pr
from planted.entries import (
    Planted,
    claimed,
    derived,
    leaf,
    planted,
    ruled,
    same,
    scaled,
)

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


WRONG_OPERATIONS: tuple[Planted, ...] = (
    derived("maximum", models.POOL, "the minimum", winner=jnp.argmin, expect="minimum"),
    derived("maximum", models.POOL, "the first", winner=_first, expect="the first of each"),
    claimed("maximum", _TIED_POOL, "full to all of them", _all_winners, expect="a tie"),
    derived("clip forgotten", pr.CLIP, "", slope=jnp.ones_like, expect="clip"),
    derived("clip forgotten", pr.HUBER, "", slope=same, expect="clip"),
    planted(
        "clipped",
        nets.SOFTMAX_SUM,
        "entries at 1/2",
        leaf("", lambda g: jnp.clip(g, -0.5, 0.5)),
        expect="clipped",
    ),
    planted(
        "clipped",
        nets.LINEAR,
        "to the norm 1/10",
        lambda t: scaled(0.1)(jax.tree.map(lambda g: g / jnp.linalg.norm(g), t)),
        expect="times",
    ),
    derived(
        "normalisation", pr.LAYER_NORM, "the mean", mean=0.0, expect="the second operand of sub"
    ),
    derived(
        "normalisation",
        pr.LAYER_NORM,
        "the variance",
        variance=0.0,
        expect="the part that goes through",
    ),
    derived(
        "normalisation",
        pr.BATCH_NORM,
        "both constants",
        mean=0.0,
        variance=0.0,
        expect="mean and variance",
    ),
    derived(
        "normalisation",
        pr.RMS_NORM,
        "the length",
        variance=0.0,
        expect="the part that goes through",
    ),
    derived(
        "normalisation",
        pr.BATCH_NORM,
        "the variance",
        "float64",
        variance=0.0,
        expect="the part that goes through",
    ),
    ruled(
        "normalisation",
        rules.RMS,
        "the length",
        functools.partial(rules.rms_back, length=0.0),
        expect="the part that goes through",
    ),
    derived("softmax", pr.ATTENTION, "no Jacobian", softmax=lambda a, da: da, expect="softmax"),
    derived(
        "softmax",
        pr.ATTENTION,
        "the diagonal alone",
        softmax=lambda a, da: a * (1 - a) * da,
        expect="the diagonal",
    ),
    derived(
        "softmax",
        models.LOGSUMEXP,
        "the largest alone",
        share=lambda z: jax.nn.one_hot(jnp.argmax(z, 1), 6, dtype=z.dtype),
        expect="the largest",
    ),
    derived(
        "softmax",
        models.LOGSUMEXP,
        "over the wrong axis",
        share=lambda z: jax.nn.softmax(z, axis=0),
        expect="over axis",
    ),
    ruled(
        "softmax",
        rules.SOFTMAX,
        "the diagonal alone",
        rules.softmax_diagonal,
        expect="the diagonal",
    ),
    ruled(
        "softmax",
        rules.LOGSUMEXP,
        "the mean",
        lambda args, t: jnp.mean(t[0], axis=1),
        expect="a mean",
    ),
    derived(
        "attention", pr.ATTENTION, "no 1 / sqrt d", scale=lambda d: 1.0, expect="times 1/sqrt(6)"
    ),
    derived("attention", pr.ATTENTION, "1 / d", scale=lambda d: 1 / d, expect="times sqrt(6)"),
    derived("repeated ids", pr.EMBEDDING, "overwritten", repeated="set", expect="repeated"),
    ruled(
        "repeated ids",
        rules.TAKE,
        "overwritten",
        functools.partial(rules.take_back, repeated="set"),
        expect="repeated",
    ),
    ruled(
        "time", rules.CUMSUM, "not reversed", lambda args, g: (jnp.cumsum(g),), expect="reversed"
    ),
    derived("time", pr.RECURRENT, "truncated by a step", steps=lambda t: t - 1, expect="truncated"),
    derived("time", pr.RECURRENT, "the last step alone", steps=lambda t: 1, expect="truncated"),
    derived(
        "dropout mask", models.DROPOUT, "not on the way back", drop=jnp.ones_like, expect="mask"
    ),
    derived(
        "dropout mask", models.DROPOUT, "turned round", drop=lambda mask: 1 - mask, expect="mask"
    ),
    derived("wrong count", models.MASKED, "all places", count=jnp.size, expect="times 2.8"),
    derived("wrong count", models.MASKED, "examples", count=len, expect="times 0.4"),
    ruled(
        "cotangent",
        rules.COSTS,
        "ignored",
        functools.partial(rules.costs_back, weight=lambda g: jnp.ones_like(g)[:, None]),
        expect="the cotangent is",
    ),
    ruled(
        "cotangent",
        rules.SWISH,
        "squared",
        lambda args, g: (g * g * pr.swish_slope(args[0]),),
        expect="the cotangent is",
    ),
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
