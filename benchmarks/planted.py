"""The catalogue of planted errors and of right gradients, as data, to try gradient checkers on.

An entry of kind "gradient" is a function, its args and a candidate: the function of args that is
claimed to be the gradient with respect to args[0]. The others are functions with a rule of their
own (`jax.custom_vjp`, `jax.custom_jvp`) and networks of this library. Arguments are NumPy arrays,
already in the entry's dtype.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import problems as pr
import rules
from jax import Array, lax
from problems import Problem, Tree
from rules import Ruled

import jbackprop as jb


@dataclasses.dataclass(frozen=True)
class Entry:
    """A gradient, or a rule for one, to be judged.

    Attributes:
        kind: what is wrong, or what makes it hard.
        name: of the function, and of the case.
        fun: what `call` says: a function to a scalar; a custom_vjp or custom_jvp; or a network.
        args: of fun; for a network (loss, params, x, y).
        candidate: args -> the gradient with respect to args[0]; only where call is "gradient".
        call: "gradient", "vjp", "jvp" or "network".
        dtype: of the floating-point args.
    """

    kind: str
    name: str
    fun: Any
    args: tuple[Any, ...]
    candidate: Callable[..., Tree] | None = None
    call: str = "gradient"
    dtype: str = "float32"

    @property
    def id(self) -> str:
        """Kind, name and dtype."""
        return f"{self.kind}: {self.name}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Planted(Entry):
    """A wrong one. `expect` is a word that its diagnosis should have; "" where none is due."""

    expect: str = ""


@dataclasses.dataclass(frozen=True)
class Right(Entry):
    """A right one. `inconclusive` says why nobody can tell, "" where one can.

    At a kink (`kink`) any convention between the slopes of the two sides is right.
    """

    inconclusive: str = ""
    kink: bool = False


def cast(tree: Tree, dtype: str) -> Tree:
    """Floating-point leaves to dtype."""

    def one(leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        return leaf.astype(jnp.dtype(dtype)) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


# Changes of a right gradient. A leaf is named by the end of its path: "['w']", "[0]['b']".

Change = Callable[[Tree], Tree]
Part = Callable[[Array], Array]


def scaled(factor: float) -> Change:
    """All of it."""
    return functools.partial(jax.tree.map, times(factor))


def times(factor: float) -> Part:
    """Multiply by factor."""
    return lambda g: factor * g


def leaf(path: str, f: Part) -> Change:
    """f of the leaves of this path; "" is all."""

    def one(where: Any, g: Array) -> Array:
        return f(g) if jax.tree_util.keystr(where).endswith(path) else g

    return functools.partial(jax.tree_util.tree_map_with_path, one)


def taken(target: Any, source: Any) -> Change:
    """The gradient of target is that of source."""

    def change(tree: Any) -> Any:
        changed = copy.copy(tree)
        changed[target] = tree[source]
        return changed

    return change


def exchanged(first: Any, second: Any) -> Change:
    """Two of them in each other's place."""

    def change(tree: Any) -> Any:
        changed = taken(first, second)(tree)
        changed[second] = tree[first]
        return changed

    return change


def entry(index: int, f: Part) -> Part:
    """f of one entry."""
    return lambda g: jnp.reshape(_at(jnp.ravel(g), index, f), g.shape)


def row(index: int, f: Part) -> Part:
    """f of one row."""
    return lambda g: _at(g, index, f)


def column(index: int, f: Part) -> Part:
    """f of one column."""
    return lambda g: _at(g.T, index, f).T


def _at(g: Array, index: int, f: Part) -> Array:
    return g.at[index].set(f(g[index]))


def constant(value: float) -> Part:
    """The value everywhere."""
    return lambda g: jnp.full_like(g, value)


def turned(*axes: int) -> Part:
    """The axes permuted; by default reversed."""
    return lambda g: jnp.transpose(g, axes or None)


def flipped(*axes: int) -> Part:
    """Read backwards along these axes."""
    return lambda g: jnp.flip(g, axes)


# Wrong parts of a derivation.


def again(o: Array, y: Array) -> Array:
    """The delta of a canonical loss times f' = o (1 - o), which is in it already."""
    return (o - y) * o * (1 - o)


def ones(zs: Any, l: int = 0) -> Array:
    """No f' at all."""
    return jnp.ones_like(zs[l] if isinstance(zs, list) else zs)


def same(v: Any) -> Any:
    """What is not turned, not transposed, not looked at."""
    return v


def straight(delta: Array, w: Array) -> Array:
    """By W where W^T is due and the shapes do not tell."""
    return delta @ (w if w.shape[0] == w.shape[1] else w.T)


# Builders of entries. What a diagnosis should say follows from the kind, unless it is given.

WORD = {
    "sign": "sign",
    "constant factor": "times",
    "one leaf scaled": "times",
    "sum for mean": "times",
    "mean for sum": "times",
    "transposed": "transpose",
    "axes permuted": "axes",
    "not reduced": "sum",
    "regularisation forgotten": "parameter",
    "regularisation too much": "parameter",
    "zero": "zero",
    "single entry": "entr",
    "one row": "row",
    "kernel flipped": "flip",
    "one in a thousand": "times",
    "one in twenty": "times",
    "not finite": "nan",
    "rule inside": "rule",
}


def _expected(kind: str, expect: str | None) -> str:
    return WORD.get(kind, "") if expect is None else expect


def planted(
    kind: str,
    problem: Problem,
    note: str,
    change: Change,
    dtype: str = "float32",
    expect: str | None = None,
) -> Planted:
    """A right gradient, changed."""

    def candidate(*args: Any) -> Tree:
        return change(problem.grad(*args))

    return _entry(kind, problem, note, candidate, dtype, expect)


def derived(
    kind: str,
    problem: Problem,
    note: str,
    dtype: str = "float32",
    expect: str | None = None,
    **parts: Any,
) -> Planted:
    """A derivation with a wrong part in it."""
    return _entry(kind, problem, note, functools.partial(problem.grad, **parts), dtype, expect)


def elsewhere(kind: str, problem: Problem, note: str, move: Callable[..., Any]) -> Planted:
    """The right gradient at other args."""

    def candidate(*args: Any) -> Tree:
        return problem.grad(*move(*args))

    return _entry(kind, problem, note, candidate)


def of_another(problem: Problem, note: str, fun: Any, expect: str = "") -> Planted:
    """`jax.grad` of another function, with a stop_gradient that should not be there."""
    return _entry("stop_gradient", problem, note, jax.grad(fun), expect=expect)


def _entry(
    kind: str,
    problem: Problem,
    note: str,
    candidate: Callable[..., Tree],
    dtype: str = "float32",
    expect: str | None = None,
) -> Planted:
    name, args = f"{problem.name}: {note}", cast(problem.args, dtype)
    expect = _expected(kind, expect)
    return Planted(kind, name, problem.fun, args, candidate, dtype=dtype, expect=expect)


def fooled(name: str, fun: Any, *args: Any) -> Planted:
    """A function with a wrong rule inside, and `jax.grad` of it, which believes the rule."""
    word = _expected("rule inside", None)
    return Planted("rule inside", name, fun, cast(args, "float32"), jax.grad(fun), expect=word)


def ruled(
    kind: str,
    ruled: Ruled,
    note: str,
    rule: Any,
    dtype: str = "float32",
    expect: str | None = None,
) -> Planted:
    """A custom_vjp or custom_jvp function with this wrong rule."""
    call = "jvp" if ruled.forward else "vjp"
    name, args = f"{call} of {ruled.name}: {note}", cast(ruled.args, dtype)
    fun = ruled.made(rule)
    expect = _expected(kind, expect)
    return Planted(kind, name, fun, args, None, call, dtype, expect=expect)


def network(
    kind: str,
    note: str,
    net: jb.Layer | jb.Sequential,
    loss: jb.Loss | None = None,
    lead: tuple[int, ...] = (6,),
    dtype: str = "float32",
    expect: str | None = None,
) -> Planted:
    """A network of this library with a wrong layer or loss."""
    args = cast_network(rules.batch(net, loss or jb.SquaredError(), *lead), dtype)
    expect = _expected(kind, expect)
    return Planted(kind, f"network: {note}", net, args, None, "network", dtype, expect=expect)


def cast_network(args: tuple[Any, ...], dtype: str) -> tuple[Any, ...]:
    """(loss, params, x, y) in dtype."""
    return args[0], *cast(args[1:], dtype)


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
        h = jnp.tanh(z + pr.like(p["b"], z))
    return jnp.sum(c * h)


_swish = rules.SWISH.made(lambda args, g: (g * jax.nn.sigmoid(args[0]),))
_take = rules.TAKE.made(functools.partial(rules.take_back, repeated="set"))
_tanh = rules.TANH.made(lambda args, t: 1.01 * pr.tanh_slope(args[0]) * t[0])
_softmax = rules.SOFTMAX.made(rules.softmax_diagonal)
_x, _w, _c, _table = pr.normal(41, (6, 4), (4, 3), (6, 3), (5, 3))
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
    planted("sign", pr.SOFTMAX, "-1", scaled(-1)),
    planted("sign", pr.RECURRENT, "-1", scaled(-1)),
    planted("sign", pr.ONE, "-1", scaled(-1)),
    planted("sign", pr.EMBEDDING, "-1", scaled(-1), "bfloat16"),
    planted("sign", pr.TANH_NET, "of one bias", leaf("[1]['b']", times(-1))),
    planted("sign", pr.LAYER_NORM, "of the gain", leaf("['gain']", times(-1))),
    planted("sign", pr.ATTENTION, "of the key", leaf("['key']", times(-1))),
    ruled("sign", rules.IDENTITY, "gradient reversal", lambda args, g: (-g,)),
    ruled("sign", rules.ANGLE, "+ for -", functools.partial(rules.angle_push, sign=1.0), expect=""),
    network("sign", "the delta handed on", _dense_net(rules.Negated(4, 4))),
    planted("constant factor", pr.LINEAR, "2", scaled(2)),
    planted("constant factor", pr.LOGISTIC, "1/2", scaled(0.5)),
    planted("constant factor", pr.ONE, "2", scaled(2)),
    planted("constant factor", pr.TANH_SUM, "sqrt B", scaled(10**0.5)),
    planted("constant factor", pr.RELU_NET, "1/sqrt B", scaled(12**-0.5)),
    planted("constant factor", pr.CONVOLUTION, "0.9", scaled(0.9)),
    planted("constant factor", pr.SINE, "3", scaled(3)),
    planted("constant factor", pr.TANH_NET, "2", scaled(2), "float64"),
    planted("constant factor", pr.SOFTMAX, "1.25", scaled(1.25), "float16"),
    derived("constant factor", pr.CUBE, "z^2 for 3 z^2", slope=jnp.square),
    ruled("constant factor", rules.SCALE, "2", lambda args, g: (2 * g * args[1], jnp.sum(2 * g * args[0]))),
    network("constant factor", "f' twice", _activated(lambda z: 2 * pr.tanh_slope(z))),
    network("constant factor", "a bias counted twice", _dense_net(rules.BiasTwice(4, 4))),
    network("constant factor", "the half of the square", jb.mlp([3, 4, 2]), rules.SquaredTwice()),
    planted("one leaf scaled", pr.RECURRENT, "u by 2", leaf("['u']", times(2))),
    planted("one leaf scaled", pr.DROPOUT, "v by 1/2", leaf("['v']", times(0.5)), "float64"),
    planted("one leaf scaled", pr.DEEP, "a weight by 1.5", leaf("[15]['w']", times(1.5))),
    planted("sum for mean", pr.SOFTMAX, "B", scaled(8)),
    planted("sum for mean", pr.TOKENS, "positions", scaled(3)),
    planted("sum for mean", pr.GAUSSIAN, "30", scaled(30)),
    planted("sum for mean", pr.EMBEDDING, "length", scaled(4)),
    planted("mean for sum", pr.SOFTMAX_SUM, "1/B", scaled(1 / 8)),
    planted("mean for sum", pr.TANH_SUM, "1/B", scaled(1 / 10), "bfloat16"),
    planted("mean for sum", pr.TOKENS, "a bias", leaf("[0]['b']", times(1 / 18))),
    network("mean for sum", "a bias over positions", _dense_net(rules.BiasAveraged(4, 4)), lead=(3, 5)),
    planted("one in a thousand", pr.SOFTMAX, "all", scaled(1.001)),
    planted("one in a thousand", pr.SINE, "all", scaled(1.001)),
    planted("one in a thousand", pr.RECURRENT, "all", scaled(0.999)),
    planted("one in a thousand", pr.LAYER_NORM, "the gain", leaf("['gain']", times(1.001))),
    planted("one in a thousand", pr.TANH_NET, "a weight", leaf("[0]['w']", times(1.001))),
    planted("one in a thousand", pr.ATTENTION, "1 in 10^6, all", scaled(1 + 1e-6), "float64"),
    ruled("one in a thousand", rules.TANH, "f'", lambda args, t: 1.001 * pr.tanh_slope(args[0]) * t[0]),
    network("one in a thousand", "f'", _activated(lambda z: 1.001 * pr.tanh_slope(z))),
    planted("one in twenty", pr.SOFTMAX, "all", scaled(1.05), "bfloat16"),
    planted("one in twenty", pr.SINES, "all", scaled(0.95), "bfloat16"),
    planted("one in twenty", pr.TANH_NET, "a weight", leaf("[2]['w']", times(1.05)), "bfloat16"),
    planted("one in twenty", pr.LAYER_NORM, "the shift", leaf("['shift']", times(1.05)), "float16"),
    network("one in twenty", "f'", _activated(lambda z: 1.05 * pr.tanh_slope(z)), dtype="bfloat16"),
    # In the wrong place.
    planted("transposed", pr.SOFTMAX_SQUARE, "square", leaf("['w']", jnp.transpose)),
    planted("transposed", pr.TANH_NET, "a square one", leaf("[1]['w']", jnp.transpose)),
    planted("transposed", pr.RECURRENT, "u", leaf("['u']", jnp.transpose)),
    planted("transposed", pr.SOFTMAX, "of another shape", leaf("['w']", jnp.transpose)),
    planted("transposed", pr.TIED, "of another shape", jnp.transpose),
    derived("transposed", pr.LOG_DETERMINANT, "inverse", turn=same),
    ruled("transposed", rules.AFFINE, "dC/dw", functools.partial(rules.affine_back, w=lambda x, g: (x.T @ g).T)),
    network("transposed", "delta (outer) x", _dense_net(rules.Swapped(4, 4))),
    planted("axes permuted", pr.CONVOLUTION, "in and width", turned(1, 0, 2)),
    planted("axes permuted", pr.IMAGE, "height and width", turned(1, 0, 2, 3)),
    planted("axes permuted", pr.IMAGE, "in and out", turned(0, 1, 3, 2), "float64"),
    planted("axes permuted", pr.HEADS, "in and head", turned(1, 0, 2)),
    planted("another leaf's", pr.ATTENTION, "query and key", exchanged("query", "key"), expect="key"),
    planted("another leaf's", pr.LAYER_NORM, "gain and shift", exchanged("gain", "shift"), expect="gain"),
    planted("another leaf's", pr.GATED, "gate and value", exchanged("gate", "value"), expect="gate"),
    planted("another leaf's", pr.TANH_NET, "two layers", exchanged(1, 2), expect="2"),
    planted("another leaf's", pr.ATTENTION, "value is key", taken("value", "key"), expect="key"),
    derived("not reduced", pr.SOFTMAX, "bias (B, q)", bias=same),
    derived("not reduced", pr.LINEAR, "bias (B, q)", "float64", bias=same),
    derived("not reduced", pr.TOKENS, "bias (T, q)", bias=lambda d: jnp.sum(d, axis=0)),
    derived("not reduced", pr.TANH_NET, "bias (1, q)", bias=lambda d: jnp.sum(d, axis=0)[None], expect=""),
    planted("kernel flipped", pr.CONVOLUTION, "", flipped(0)),
    planted("kernel flipped", pr.IMAGE, "both axes", flipped(0, 1)),
    planted("kernel flipped", pr.IMAGE, "width", flipped(1), "float64"),
    derived("kernel flipped", pr.CONVOLUTION_INPUT, "not turned", turn=same, expect=""),
    # Part of an array.
    planted("zero", pr.SOFTMAX, "bias", leaf("['b']", constant(0))),
    planted("zero", pr.RECURRENT, "u", leaf("['u']", constant(0))),
    planted("zero", pr.ATTENTION, "value", leaf("['value']", constant(0)), "bfloat16"),
    planted("zero", pr.WIDE, "weight", leaf("['w']", constant(0))),
    planted("zero", pr.IMAGE, "all", constant(0)),
    planted("single entry", pr.SINE, "negated", entry(70_000, times(-1))),
    planted("single entry", pr.SINE, "zero", entry(99_999, constant(0))),
    planted("single entry", pr.WIDE, "doubled", leaf("['w']", entry(12_345, times(2)))),
    planted("single entry", pr.TANH_NET, "too large", leaf("[1]['w']", entry(7, lambda g: g + 0.01))),
    planted("single entry", pr.SOFTMAX, "negated", leaf("['b']", entry(0, times(-1))), "float64"),
    planted("one row", pr.SINES, "negated", row(37, times(-1))),
    planted("one row", pr.SOFTMAX_SQUARE, "doubled", leaf("['w']", row(0, times(2)))),
    planted("one row", pr.EMBEDDING, "zero", row(1, constant(0))),
    planted("one row", pr.SOFTMAX_SQUARE, "a column", leaf("['w']", column(2, constant(0))), expect="column"),
    planted("one row", pr.HEADS, "a head", row(3, times(-1)), expect=""),
    network("one row", "a unit's delta lost", _dense_net(rules.Silenced(4, 4)), expect=""),
    planted("not finite", pr.SOFTMAX, "a NaN", leaf("['b']", entry(0, constant(np.nan)))),
    planted("not finite", pr.SINE, "a NaN", entry(5, constant(np.nan))),
    planted("not finite", pr.TANH_NET, "all NaN", leaf("[0]['w']", constant(np.nan)), "bfloat16"),
    planted("not finite", pr.ATTENTION, "inf", leaf("['value']", entry(3, constant(np.inf))), expect="inf"),
    # The delta rule.
    derived("f' missing", pr.TANH_NET, "", slope=ones),
    derived("f' missing", pr.SIGMOID_NET, "", slope=ones),
    derived("f' missing", pr.RELU_NET, "", slope=ones),
    derived("f' missing", pr.TANH_SUM, "in one layer", slope=lambda zs, l: ones(zs, l) if l else pr.tanh_slope(zs[0])),
    network("f' missing", "all", _activated(jnp.ones_like), expect="f'"),
    derived("f' at a", pr.TANH_NET, "", slope=lambda zs, l: pr.tanh_slope(jnp.tanh(zs[l]))),
    derived("f' at a", pr.SIGMOID_NET, "", slope=lambda zs, l: pr.sigmoid_slope(jax.nn.sigmoid(zs[l]))),
    derived("f' at a", pr.TANH_SUM, "1 - z^2", slope=lambda zs, l: 1 - jnp.square(zs[l])),
    network("f' at a", "all", _activated(lambda z: pr.tanh_slope(jnp.tanh(z))), expect="f'"),
    derived("f' of the neighbour", pr.TANH_NET, "", slope=lambda zs, l: pr.tanh_slope(zs[(l + 1) % 3])),
    derived("f' of the neighbour", pr.TANH_SUM, "", slope=lambda zs, l: pr.tanh_slope(zs[1 - l])),
    derived("f' of the neighbour", pr.SIGMOID_NET, "", "float64", slope=lambda zs, l: pr.sigmoid_slope(zs[1 - l])),
    derived("W not transposed", pr.TANH_NET, "", back=straight),
    derived("W not transposed", pr.SIGMOID_NET, "", back=straight),
    derived("W not transposed", pr.DEEP, "", back=straight),
    derived("W not transposed", pr.RECURRENT, "u", back=same),
    ruled("W not transposed", rules.AFFINE_SQUARE, "dC/dx", functools.partial(rules.affine_back, x=jnp.matmul)),
    network("W not transposed", "one layer", _dense_net(rules.Untransposed(4, 4)), expect="transpose"),
    network("W not transposed", "one of 29 layers", _DEEP, expect="transpose"),
    derived("delta times f' again", pr.SOFTMAX, "", delta=again),
    derived("delta times f' again", pr.RELU_NET, "", delta=again),
    derived("delta times f' again", pr.LOGISTIC, "", delta=again),
    derived("delta times f' again", pr.SIGMOID_NET, "", delta=again),
    derived("delta times f' again", pr.WIDE, "", "bfloat16", delta=again),
    network("delta times f' again", "softmax", jb.mlp([4, 5, 3]), rules.SoftmaxAgain(), expect="f'"),
    network("delta times f' again", "sigmoid", jb.mlp([4, 5, 2]), rules.SigmoidAgain(), expect="f'"),
    network("wrong delta", "z for e^z", jb.mlp([4, 5, 2]), rules.PoissonLog()),
    derived("wrong delta", pr.SOFTMAX, "the target forgotten", delta=lambda o, y: o),
    network("wrong delta", "softmax elementwise", jb.Sequential(jb.Dense(4, 3), rules.SoftmaxDiagonal())),
    # Terms.
    derived("regularisation forgotten", pr.DECAY, "", decay=0.0),
    derived("regularisation forgotten", pr.DECAY_NET, "", decay=0.0),
    derived("regularisation forgotten", pr.DECAY, "half of it", "float64", decay=0.05),
    planted("regularisation too much", _with_extra(pr.SOFTMAX, 0.1), "0.1", same),
    planted("regularisation too much", _with_extra(pr.TANH_NET, 0.01), "0.01", same),
    planted("regularisation too much", _with_extra(pr.CONVOLUTION, -0.2), "-0.2", same),
    derived("product rule", pr.SWISH, "sigmoid(z)", slope=jax.nn.sigmoid),
    derived("product rule", pr.GELU, "Phi(z)", slope=pr.normal_cdf),
    derived("product rule", pr.GATED, "1 - g", gate=lambda v, g: v * g),
    ruled("product rule", rules.SWISH, "sigmoid(z)", lambda args, g: (g * jax.nn.sigmoid(args[0]),)),
    ruled("product rule", rules.PRODUCT, "x dy", functools.partial(rules.product_push, second=0.0)),
    network("product rule", "swish", _activated(jax.nn.sigmoid, jax.nn.silu), expect="f'"),
    derived("branch forgotten", pr.TIED, "the encoder", encoder=0.0),
    derived("branch forgotten", pr.TIED, "the decoder", decoder=0.0),
    derived("branch forgotten", pr.RESIDUAL, "the skip", skip=0.0),
    derived("branch forgotten", pr.COSINE, "the length", length=0.0),
    derived("branch forgotten", pr.GAUSSIAN, "the logarithm", log_term=0.0),
    ruled("branch forgotten", rules.PAIR, "the second output", functools.partial(rules.pair_back, second=0.0)),
    ruled("branch forgotten", rules.SOLVE, "the matrix", functools.partial(rules.solve_push, matrix=0.0), expect="zero"),
    ruled("branch forgotten", rules.CIRCLE, "cosine for both", lambda args, t: (jnp.cos(args[0]) * t[0],) * 2),
    elsewhere("example left out", pr.SOFTMAX_SUM, "the last", lambda p, x, y: (p, x[:-1], y[:-1])),
    elsewhere("example left out", pr.TANH_SUM, "the first", lambda p, x, y: (p, x[1:], y[1:])),
    elsewhere("example left out", pr.ATTENTION, "the last position", lambda p, x, c: (p, x[:-1], c[:-1])),
    of_another(pr.ATTENTION, "the weights", _attention_stopped, "zero"),
    of_another(pr.GAUSSIAN, "the scale", _gaussian_stopped),
    of_another(pr.DROPOUT, "the hidden layer", _dropout_stopped, "zero"),
    of_another(pr.RECURRENT, "the state", _recurrent_stopped),
    fooled("swish in a network", lambda w, x, c: jnp.sum(c * _swish(x @ w)), _w, _x, _c),
    fooled("rows of a table", lambda w, ids, c: jnp.sum(c * _take(w, ids)), _table, _ids, _c),
    fooled("tanh, 1.01", lambda w, x, c: jnp.sum(c * _tanh(x @ w)), _w, _x, _c),
    fooled("softmax in a layer", lambda w, x, c: jnp.sum(c * _softmax(x @ w)), _w, _x, _c),
    elsewhere("other numbers", pr.TANH_NET, "parameters of before", lambda p, *r: (scaled(0.9)(p), *r)),
    elsewhere("other numbers", pr.SOFTMAX, "parameters at the start", lambda p, *r: (scaled(0)(p), *r)),
    elsewhere("other numbers", pr.GAUSSIAN, "another batch", lambda p, y: (p, jnp.roll(y, 1))),
    # What is particular to a function.
    derived("maximum", pr.POOL, "the minimum", winner=jnp.argmin),
    derived("maximum", pr.POOL, "the first", winner=_first),
    _entry("maximum", _TIED_POOL, "full to all of them", _all_winners),
    derived("clip forgotten", pr.CLIP, "", slope=jnp.ones_like),
    derived("clip forgotten", pr.HUBER, "", slope=same),
    planted("clipped", pr.SOFTMAX_SUM, "entries at 1/2", leaf("", lambda g: jnp.clip(g, -0.5, 0.5))),
    planted("clipped", pr.LINEAR, "to the norm 1/10", lambda t: scaled(0.1)(jax.tree.map(lambda g: g / jnp.linalg.norm(g), t)), expect="times"),
    derived("normalisation", pr.LAYER_NORM, "the mean", mean=0.0),
    derived("normalisation", pr.LAYER_NORM, "the variance", variance=0.0),
    derived("normalisation", pr.BATCH_NORM, "both constants", mean=0.0, variance=0.0),
    derived("normalisation", pr.RMS_NORM, "the length", variance=0.0),
    derived("normalisation", pr.BATCH_NORM, "the variance", "float64", variance=0.0),
    ruled("normalisation", rules.RMS, "the length", functools.partial(rules.rms_back, length=0.0)),
    derived("softmax", pr.ATTENTION, "no Jacobian", softmax=lambda a, da: da),
    derived("softmax", pr.ATTENTION, "the diagonal alone", softmax=lambda a, da: a * (1 - a) * da),
    derived("softmax", pr.LOGSUMEXP, "the largest alone", share=lambda z: jax.nn.one_hot(jnp.argmax(z, 1), 6, dtype=z.dtype)),
    derived("softmax", pr.LOGSUMEXP, "over the wrong axis", share=lambda z: jax.nn.softmax(z, axis=0)),
    ruled("softmax", rules.SOFTMAX, "the diagonal alone", rules.softmax_diagonal),
    ruled("softmax", rules.LOGSUMEXP, "the mean", lambda args, t: jnp.mean(t[0], axis=1)),
    derived("attention", pr.ATTENTION, "no 1 / sqrt d", scale=lambda d: 1.0, expect="times"),
    derived("attention", pr.ATTENTION, "1 / d", scale=lambda d: 1 / d, expect="times"),
    derived("repeated ids", pr.EMBEDDING, "overwritten", repeated="set"),
    ruled("repeated ids", rules.TAKE, "overwritten", functools.partial(rules.take_back, repeated="set")),
    ruled("time", rules.CUMSUM, "not reversed", lambda args, g: (jnp.cumsum(g),)),
    derived("time", pr.RECURRENT, "truncated by a step", steps=lambda t: t - 1),
    derived("time", pr.RECURRENT, "the last step alone", steps=lambda t: 1),
    derived("dropout mask", pr.DROPOUT, "not on the way back", drop=jnp.ones_like),
    derived("dropout mask", pr.DROPOUT, "turned round", drop=lambda mask: 1 - mask),
    derived("wrong count", pr.MASKED, "all places", count=jnp.size, expect="times"),
    derived("wrong count", pr.MASKED, "examples", count=len, expect="times"),
    ruled("cotangent", rules.COSTS, "ignored", functools.partial(rules.costs_back, weight=lambda g: jnp.ones_like(g)[:, None])),
    ruled("cotangent", rules.SWISH, "squared", lambda args, g: (g * g * pr.swish_slope(args[0]),)),
    ruled("cotangent", rules.SCALE, "of the scale lost", lambda args, g: (g * args[1], jnp.zeros_like(args[1])), expect="zero"),
    ruled("cotangent", rules.POWER, "the exponent", lambda args, g: (g * args[0] ** 2, None), expect="times"),
    ruled("cotangent", rules.AFFINE_PLAIN, "dC/dw doubled", functools.partial(rules.affine_back, w=lambda x, g: 2 * x.T @ g), expect="times"),
)
