"""What the catalogue is made of: entries, changes of a right gradient, and builders of entries.

An entry of the call "gradient" is a function, its args and a candidate: the function of args that
is claimed to be the gradient with respect to args[0]. The others are functions with a rule of their
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
from jax import Array

import jbackprop as jb
from planted import rules
from planted.nets import Problem, Tree
from planted.rules import Ruled


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
    "sign": "times -1",
    "constant factor": "times",
    "one leaf scaled": "times",
    "sum for mean": "times",
    "mean for sum": "times",
    "one in a thousand": "times 0.999001",
    "one in twenty": "times 0.95",
    "transposed": "transposed",
    "axes permuted": "axes in the order",
    "another leaf's": "gradient of",
    "not reduced": "summed over axis 0",
    "kernel flipped": "flipped along ax",
    "zero": "all zeros",
    "single entry": "1 entry of",
    "not finite": "nan",
    "f' missing": "f' is missing",
    "f' at a": "f' is taken at the output",
    "f' of the neighbour": "f' is that of the next layer",
    "W not transposed": "not transposed",
    "delta times f' again": "multiplied by f' again",
    "product rule": "is missing",
    "example left out": "example",
    "rule inside": "a custom rule inside the function is wrong",
}
"""A repair names what makes the wrong one right: half of it, where it is twice the truth."""


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

    return claimed(kind, problem, note, candidate, dtype, expect)


def derived(
    kind: str,
    problem: Problem,
    note: str,
    dtype: str = "float32",
    expect: str | None = None,
    **parts: Any,
) -> Planted:
    """A derivation with a wrong part in it."""
    return claimed(kind, problem, note, functools.partial(problem.grad, **parts), dtype, expect)


def elsewhere(kind: str, problem: Problem, note: str, move: Callable[..., Any]) -> Planted:
    """The right gradient at other args."""

    def candidate(*args: Any) -> Tree:
        return problem.grad(*move(*args))

    return claimed(kind, problem, note, candidate)


def of_another(problem: Problem, note: str, fun: Any, expect: str = "") -> Planted:
    """`jax.grad` of another function, with a stop_gradient that should not be there."""
    return claimed("stop_gradient", problem, note, jax.grad(fun), expect=expect)


def claimed(
    kind: str,
    problem: Problem,
    note: str,
    candidate: Callable[..., Tree],
    dtype: str = "float32",
    expect: str | None = None,
) -> Planted:
    """This candidate for the gradient of the problem."""
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


def right(
    kind: str,
    name: str,
    fun: Callable[..., Any],
    *args: Any,
    candidate: Callable[..., Tree] | None = None,
    dtype: str = "float32",
    inconclusive: str = "",
    kink: bool = False,
) -> Right:
    """A function and its gradient, by default that of jax.grad."""
    found, values = candidate or jax.grad(fun), cast(args, dtype)
    return Right(kind, name, fun, values, found, dtype=dtype, inconclusive=inconclusive, kink=kink)
