"""The arguments of a function, parted: to differentiate by, other arrays, and the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.check.precision import as_jax, coarsest, is_float
from jbackprop.check.programs import at_any_precision
from jbackprop.checks import flag_of, function_of, number_of
from jbackprop.factored import PyTree
from jbackprop.structure import suffix


class Inputs:
    """A function's arguments, parted: to differentiate by, other arrays, and the rest."""

    def __init__(
        self, fun: Callable[..., Any], args: tuple[Any, ...], argnums: tuple[int, ...], single: bool
    ) -> None:
        function_of(fun, "fun")
        for n in argnums:
            if not -len(args) <= n < len(args):
                raise ValueError(f"argnums {n}: {name_of(fun)} was given {len(args)} arguments")
        self.argnums, self.single = tuple(n % len(args) for n in argnums), single
        if len(set(self.argnums)) < len(argnums):
            raise ValueError(f"argnums {argnums}: each argument can be given once")
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
            raise TypeError(
                f"the check of {name_of(fun)} is called inside jit, vmap or grad, where its "
                "arguments have no values: call it outside"
            )
        self.labels = labels = _labels(fun, len(args))
        found, self._tree = jax.tree_util.tree_flatten_with_path(args)
        self._leaves: list[Any] = [
            leaf if isinstance(leaf, float) and path[0].idx not in self.argnums else as_array(leaf)
            for path, leaf in found
        ]  # a Python number that is not differentiated may have to stay one
        self._paths = [path for path, _ in found]
        self._chosen, self._others = [], []
        for i, (path, leaf) in enumerate(zip(self._paths, self._leaves, strict=True)):
            name = labels[path[0].idx] + suffix(path[1:])
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                raise TypeError(f"{name} is complex: only real arguments can be checked")
            if is_float(leaf) and path[0].idx in self.argnums:
                self._chosen.append(i)
            elif hasattr(leaf, "dtype"):
                self._others.append(i)
        self.names = [
            labels[p[0].idx] + suffix(p[1:]) for p in map(self._paths.__getitem__, self._chosen)
        ]
        self.active = [self._leaves[i] for i in self._chosen]
        self.passive = [self._leaves[i] for i in self._others]
        if not self.active:
            raise TypeError(
                f"there is no floating-point array to differentiate {name_of(fun)} by in the "
                f"arguments {', '.join(labels[n] for n in self.argnums)} (classes that hold arrays "
                "must be registered as pytrees)"
            )
        self.dtypes = [v.dtype for v in (*self.active, *self.passive) if is_float(v)]

    def call(self, fun: Callable[..., Any], active: Sequence[Any], passive: Sequence[Any]) -> Any:
        leaves = list(self._leaves)
        for at, values in ((self._chosen, active), (self._others, passive)):
            for i, v in zip(at, values, strict=True):
                leaves[i] = v
        return fun(*jax.tree.unflatten(self._tree, leaves))

    def call_shape(self, fun: Callable[..., Any]) -> Any:
        try:
            return jax.eval_shape(lambda a, p: self.call(fun, a, p), self.active, self.passive)
        except jax.errors.ConcretizationTypeError:
            return self.call(fun, *as_jax((self.active, self.passive)))

    def at_any_precision(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """A function that computes in float64 what f(active, passive) does in the dtypes given."""
        return at_any_precision(f, self.active, self.passive, coarsest(self.dtypes))

    def sizes(self) -> dict[int, str]:
        """The lengths of axes by number, with what they are the length of; for naming factors."""
        shaped = [
            (i in self._chosen, np.shape(leaf), self.labels[path[0].idx] + suffix(path[1:]))
            for i, (path, leaf) in enumerate(zip(self._paths, self._leaves, strict=True))
            if hasattr(leaf, "shape")
        ]
        # Batches come first: axis 0 of what is not differentiated by.
        axes = sorted(
            (chosen, axis, n, f"the length of axis {axis} of {name}")
            for chosen, shape, name in shaped
            for axis, n in enumerate(shape)
            if n > 2
        )
        found: dict[int, str] = {}
        for _, _, n, label in axes:
            found.setdefault(int(n), label)
        return found

    def match(self, candidate: PyTree) -> list[np.ndarray]:
        """The candidate's arrays, one for each active leaf."""
        parts = (candidate,) if self.single else candidate
        if not isinstance(parts, tuple | list) or len(parts) != len(self.argnums):
            raise ValueError(
                f"candidate must be a tuple of {len(self.argnums)} gradients, one for each of "
                f"argnums {self.argnums}"
            )
        given = {}
        for number, part in zip(self.argnums, parts, strict=True):
            own = [self._paths[i] for i in self._chosen if self._paths[i][0].idx == number]
            if isinstance(part, list | float | int) and [len(path) for path in own] == [1]:
                part = np.asarray(part, float)
            for path, leaf in jax.tree_util.tree_flatten_with_path(part)[0]:
                given[(number, tuple(path))] = leaf
        found = []
        for i, name in zip(self._chosen, self.names, strict=True):
            path = self._paths[i]
            leaf = given.pop((path[0].idx, tuple(path[1:])), None)
            if leaf is None:
                raise ValueError(
                    f"candidate has no gradient for {name}: it must have the structure of the "
                    "argument, with an array for every floating-point leaf (zeros, if that is it)"
                )
            array = np.asarray(leaf)
            if not jnp.issubdtype(array.dtype, jnp.floating):
                if not np.issubdtype(array.dtype, np.integer) and array.dtype != object:
                    raise TypeError(f"candidate for {name} has the dtype {array.dtype}")
                raise TypeError(f"candidate for {name} must be floating-point, not {array.dtype}")
            found.append(array)
        others = {(p[0].idx, tuple(p[1:])) for p in self._paths}
        extra = [key for key in given if key not in others]
        if extra:
            raise ValueError(
                f"candidate has gradients for what is not in the argument: "
                f"{', '.join(suffix(path) or 'the whole' for _, path in extra)}"
            )
        return found


def as_array(leaf: Any) -> Any:
    """Concrete numbers, Python's floats too, as NumPy's; PRNG keys and the rest as they are."""
    if isinstance(leaf, float | np.floating):
        return np.asarray(leaf, getattr(leaf, "dtype", jnp.result_type(float)))
    if isinstance(leaf, jax.Array) and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(leaf)
    return leaf


def _labels(fun: Callable[..., Any], n: int) -> list[str]:
    """The names of a function's first n arguments."""
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [named[i] if i < len(named) else f"args[{i}]" for i in range(n)]


def name_of(fun: Callable[..., Any]) -> str:
    """What a function is called."""
    inner = getattr(fun, "func", fun)  # of a partial
    name = getattr(inner, "__qualname__", getattr(inner, "__name__", type(inner).__name__))
    return str(name).rpartition("<locals>.")[2]


def all_of(primals: tuple[Any, ...]) -> tuple[int, ...]:
    """The numbers of the arguments that have floating-point arrays; or numbers, if none has."""
    for found in (is_float, lambda leaf: is_float(as_array(leaf))):
        numbers = [i for i, p in enumerate(primals) if any(map(found, jax.tree.leaves(p)))]
        if numbers:
            return tuple(numbers)
    return ()


def outputs_of(out: Any) -> list[Any]:
    """The floating-point leaves of what a function returns."""
    leaves = [jnp.asarray(v) for v in jax.tree.leaves(out)]
    return [v for v in leaves if jnp.issubdtype(v.dtype, jnp.inexact)]


def inner(weights: Sequence[Any], values: Sequence[Array]) -> Array:
    """<weights, values> over all arrays; nothing is conjugated where values are complex."""
    start = jnp.zeros((), values[0].dtype)
    terms = zip(weights, values, strict=True)
    present = [(w, v) for w, v in terms if isinstance(w, jax.core.Tracer) or np.any(w)]
    return sum((jnp.sum(jnp.asarray(w).astype(v.dtype) * v) for w, v in present), start=start)


def output_names(out: Any) -> list[str]:
    """The names of the floating-point leaves of what a function returns."""
    found = jax.tree_util.tree_flatten_with_path(out)[0]
    if any(jnp.issubdtype(jnp.result_type(v), jnp.complexfloating) for _, v in found):
        raise TypeError("the function returns complex numbers: only real ones can be checked")
    return [
        "output" + suffix(path)
        for path, v in found
        if jnp.issubdtype(jnp.result_type(v), jnp.floating)
    ]


def check_options(
    truth: str, tolerance: float | None, directions: int, seed: int, exact: bool | None = None
) -> None:
    """Raise for options that mean nothing."""
    if exact is not None:
        flag_of(exact, "exact, if it is given,")
    if tolerance is not None:
        number_of(tolerance, "tolerance", above=0)
    for name, value in (("directions", directions), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, not {value!r}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if truth not in ("autodiff", "numerical", "both"):
        raise ValueError(f"truth must be 'autodiff', 'numerical' or 'both', not {truth!r}")
    if directions < 1:
        raise ValueError(f"directions must be at least 1, not {directions}")


def check_scalar(fun: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise unless a function returns one real number."""
    inputs = Inputs(fun, args, all_of(args), False)
    out = inputs.call_shape(fun)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or jnp.shape(leaves[0]) != ():
        shapes = jax.tree.map(jnp.shape, out)
        raise ValueError(
            f"{name_of(fun)} must return one scalar, not {shapes}: sum it, or take jb.check.vjp"
        )
    dtype = jnp.result_type(leaves[0])
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name_of(fun)} must return a real floating-point scalar, not {dtype}")
