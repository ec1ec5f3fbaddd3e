"""The catalogue of right gradients: by hand, by `jax.grad`, and those that are hard to judge."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jbackprop as jb
from planted import models, nets, rules
from planted import problems as pr
from planted.entries import Right, cast, cast_network, right
from planted.hard import HARD
from planted.nets import Problem, normal
from planted.rules import Ruled


def by_hand(problem: Problem, dtype: str = "float32") -> Right:
    """A derivation."""
    kind = "by hand" if dtype == "float32" else f"by hand in {dtype}"
    return right(
        kind, problem.name, problem.fun, *problem.args, candidate=problem.grad, dtype=dtype
    )


def by_jax(problem: Problem, dtype: str = "float32") -> Right:
    """Automatic."""
    kind = "jax.grad" if dtype == "float32" else f"jax.grad in {dtype}"
    return right(kind, problem.name, problem.fun, *problem.args, dtype=dtype)


def of_rule(ruled: Ruled, dtype: str = "float32") -> Right:
    """A custom_vjp or custom_jvp function with its right rule."""
    call = "jvp" if ruled.forward else "vjp"
    args = cast(ruled.args, dtype)
    return Right(f"custom_{call}", ruled.name, ruled.made(), args, None, call, dtype)


def of_library(
    name: str, fun: Any, *args: Any, dtype: str = "float32", kink: bool = False
) -> Right:
    """The reverse rule of a function of JAX or Optax."""
    return Right("library function", name, fun, cast(args, dtype), None, "vjp", dtype, kink=kink)


def of_network(net: Any, loss: jb.Loss, *lead: int, dtype: str = "float32") -> Right:
    """A network of this library."""
    args = cast_network(rules.batch(net, loss, *lead), dtype)
    name = f"{len(net.layers)} layers, {loss}" + ", positions" * (len(lead) > 1)
    return Right("network", name, net, args, None, "network", dtype)


# Trees, control flow and primitives.


class Pair(NamedTuple):
    """A tree of a class of one's own."""

    first: Any
    second: Any


def _tree_cost(p: Any) -> Array:
    (a, none), pair = p["x"], p["y"]
    assert none is None
    return a * jnp.sum(pair.first[0] * jnp.exp(pair.second))


def _branches(x: Array) -> Array:
    return jnp.sum(lax.cond(x[0] > 0, jnp.sin, jnp.cos, x))


def _sorted(x: Array) -> Array:
    return jnp.sum(jnp.sort(x) * jnp.cos(jnp.arange(x.size).astype(x.dtype)))


def _spectrum(x: Array) -> Array:
    return jnp.sum(jnp.log1p(jnp.square(jnp.abs(jnp.fft.rfft(x)))))


@jax.checkpoint
def _redone(w: Array, x: Array) -> Array:
    return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w))


def _labelled(w: Array, x: Array, labels: Array) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(x @ w, labels))


def _safe_root(x: Array) -> Array:
    positive = jnp.where(x > 0, x, jnp.ones_like(x))
    return jnp.sum(jnp.where(x > 0, jnp.sqrt(positive), jnp.zeros_like(x)))


_m, _c, _half = normal(63, (4, 4), (40,), (4, 3))
_labels = np.array([0, 1, 3, 3], "int32")
_some_zeros = np.where(np.arange(40) % 4, normal(51, (40,)), 0.0)
_OTHERS = (
    right("trees and control flow", "a number", lambda x: x * jnp.sin(x), np.array(0.7)),
    right(
        "trees and control flow",
        "tuple, None, a class",
        _tree_cost,
        {"x": (np.array(0.5), None), "y": Pair([_c], _c)},
    ),
    right("trees and control flow", "cond", _branches, _c),
    right("trees and control flow", "sort", _sorted, _c),
    right("trees and control flow", "Fourier transform", _spectrum, _c),
    right("trees and control flow", "checkpoint", _redone, _m, _half @ normal(64, (3, 4))),
    right("trees and control flow", "integer labels", _labelled, _m, _m, _labels),
    right("trees and control flow", "where twice", _safe_root, _c),
    right("trees and control flow", "vmap", lambda x: jnp.sum(jax.vmap(_spectrum)(x)), _m),
    right(
        "trees and control flow",
        "largest three",
        lambda x: jnp.sum(jnp.square(lax.top_k(x, 3)[0])),
        _c,
    ),
    right(
        "trees and control flow", "cumulative product", lambda x: jnp.sum(jnp.cumprod(x)), _c[:6]
    ),
    right("trees and control flow", "linear", lambda x, c: jnp.dot(x, c), _c, _some_zeros),
    right(
        "trees and control flow", "straight line", lambda x: 3 * jnp.sum(x), _c, dtype="bfloat16"
    ),
    right(
        "trees and control flow",
        "batch of 1",
        nets.RELU_NET.fun,
        nets.RELU_NET.args[0],
        *(v[:1] for v in nets.RELU_NET.args[1:]),
    ),
)

_LIBRARY = (
    of_library("relu", jax.nn.relu, _m),
    of_library("relu with zeros", jax.nn.relu, _some_zeros, kink=True),
    of_library("softplus", jax.nn.softplus, 10 * _m),
    of_library("gelu", jax.nn.gelu, _m),
    of_library("gelu", jax.nn.gelu, _m, dtype="bfloat16"),
    of_library("logsumexp", jax.nn.logsumexp, 30 * _m),
    of_library("standardize", jax.nn.standardize, _m),
    of_library("cross-entropy", optax.softmax_cross_entropy_with_integer_labels, _m, _labels),
    of_library(
        "sigmoid cross-entropy", optax.sigmoid_binary_cross_entropy, _m, nets.sigmoid_slope(_m)
    ),
    of_library("huber", lambda x, y: optax.huber_loss(x, y), _m, _m.T),
    of_library("cosine", lambda x, y: optax.cosine_similarity(x, y), _m, _m.T),
    of_library("solve", jnp.linalg.solve, _m + 3 * np.eye(4), _m),
    of_library("eigenvalues", jnp.linalg.eigvalsh, _m + _m.T, dtype="float64"),
)

_HALVES = (
    nets.SOFTMAX,
    nets.TANH_NET,
    pr.LAYER_NORM,
    pr.EMBEDDING,
    pr.SINES,
    nets.RELU_NET,
    nets.DECAY,
)

_ALL = (*nets.NETS, *pr.PROBLEMS, *models.MODELS)

RIGHT: tuple[Right, ...] = (
    *map(by_hand, _ALL),
    *map(by_jax, _ALL),
    *(by_hand(problem, "float64") for problem in _ALL[::3]),
    *(by_hand(problem, "bfloat16") for problem in _HALVES),
    *(by_jax(problem, "bfloat16") for problem in _HALVES[:3]),
    *(by_hand(problem, "float16") for problem in _HALVES[:4]),
    *HARD,
    *_OTHERS,
    *map(of_rule, rules.RULES),
    of_rule(rules.RMS, "bfloat16"),
    of_rule(rules.SOFTMAX, "float64"),
    *_LIBRARY,
    of_network(jb.mlp([3, 4, 2]), jb.SquaredError(), 5),
    of_network(jb.mlp([3, 4, 2], jb.Relu()), jb.SoftmaxCrossEntropy(), 5),
    of_network(jb.mlp([3, 4, 4, 2], jb.Gelu()), jb.SigmoidCrossEntropy(), 5, dtype="float64"),
    of_network(jb.mlp([3, 4, 4, 2]), jb.Huber(0.5), 5, dtype="bfloat16"),
    of_network(jb.mlp([3, 4, 2]), jb.PoissonNLL(), 5, dtype="float16"),
    of_network(jb.mlp([3] + [4] * 29 + [2]), jb.SoftmaxCrossEntropy(), 5),
    of_network(jb.mlp([3, 4, 2]), jb.SquaredError(), 2, 3),
)
