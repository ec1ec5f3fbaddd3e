"""What settings must be: sizes, flags, numbers, functions, keys; refused in words that say so."""

from __future__ import annotations

import functools
import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_sizes(of: Any, *names: str, least: int = 1) -> None:
    """Make each field named an int; raise unless it is one of at least `least`."""
    for name in names:
        value = getattr(of, name)
        object.__setattr__(of, name, size_of(value, f"{type(of).__name__}: {name}", least))


def size_of(value: Any, what: str, least: int = 1, otherwise: str = "") -> int:
    """A size as an int, NumPy's integers too; raise unless it is one of at least `least`.

    `otherwise` says in the message what else may be given: that is not looked at here.
    """
    size = None
    if hasattr(value, "__index__") and not isinstance(value, bool):
        try:
            size = operator.index(value)
        except TypeError:  # an array of several, or a tracer
            size = None
    if size is None or size < least:
        raise ValueError(f"{what} must be an int of at least {least}{otherwise}, not {value!r}")
    return size


def shape_of(value: Any, what: str) -> tuple[int, ...]:
    """A shape as ints; raise unless it is a sequence of sizes."""
    sizes = tuple(value) if isinstance(value, tuple | list) else (None,)
    whole = (hasattr(n, "__index__") and not isinstance(n, bool) and n >= 0 for n in sizes)
    if not all(whole):
        raise ValueError(f"{what} must be a tuple of sizes, such as (28, 28, 1), not {value!r}")
    return tuple(operator.index(n) for n in sizes)


def check_flags(of: Any, *names: str) -> None:
    """Raise unless each field named is True or False: text, for one, would count as True."""
    for name in names:
        flag = flag_of(getattr(of, name), f"{type(of).__name__}: {name}")
        object.__setattr__(of, name, flag)


def flag_of(value: Any, what: str) -> bool:
    """A flag; raise unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return bool(value)


def check_numbers(of: Any, *names: str, **bounds: Any) -> None:
    """Make each field named a float; raise unless `number_of` takes it."""
    for name in names:
        number = number_of(getattr(of, name), f"{type(of).__name__}: {name}", **bounds)
        object.__setattr__(of, name, number)


def number_of(
    value: Any,
    what: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    otherwise: str = "",
) -> float:
    """A number as Python's float; raise unless it is real, finite and within bounds.

    Args:
        value: what came.
        what: what it is, for the message.
        least, above: the lower bound, with and without itself.
        most, below: the upper bound, with and without itself.
        otherwise: what else may be given, for the message.

    Raises:
        ValueError: a number out of bounds, or none: text, None, an array of several.
    """
    bounds = (("at least ", least), ("above ", above), ("at most ", most), ("below ", below))
    given = " and ".join(f"{word}{b:g}" for word, b in bounds if math.isfinite(b))
    given = f" of {given}" if given.startswith("at") else f" {given}" if given else ""
    due = f"{what} must be a finite number{given}{otherwise}, not {value!r}"
    number = _real(value)
    if number is None or not (least <= number <= most and above < number < below):
        raise ValueError(due)
    return number


def _real(value: Any) -> float | None:
    """A finite real number as Python's float; None for anything else."""
    number = math.nan
    if isinstance(value, jax.Array | np.ndarray | np.generic) and not isinstance(
        value, jax.core.Tracer
    ):
        real = jnp.issubdtype(value.dtype, np.floating) or jnp.issubdtype(value.dtype, np.integer)
        number = float(value) if value.ndim == 0 and real else math.nan
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = float(value)
    return number if math.isfinite(number) else None


def floating_of(value: Any, what: str) -> Any:
    """A dtype; raise unless it is one of floating-point numbers."""
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f'{what} must be a floating-point dtype, such as "float32", not {value!r}')
    return dtype


def check_functions(of: Any, *names: str) -> None:
    """Raise unless each field named can be called."""
    for name in names:
        function_of(getattr(of, name), f"{type(of).__name__}: {name}")


def function_of(value: Any, what: str) -> Any:
    """A function; raise unless it can be called."""
    if not callable(value):
        raise TypeError(f"{what} must be a function, not {value!r}")
    return value


def check_key(key: Any, what: str = "key", optional: bool = False) -> None:
    """Raise unless it is one of JAX's random keys, of the new kind or the old; or None."""
    if key is None and optional:
        return
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    old = dtype == np.uint32 and shape in ((2,), (4,))
    if not (new or old):
        came = repr(key) if shape is None else f"an array of shape {shape} and dtype {dtype}"
        raise TypeError(f"{what} must be one random key, such as jax.random.key(0), not {came}")


def check_arrays(name: str, tree: Any) -> None:
    """Raise unless it is arrays, or tuples of them, of numbers that are not complex."""
    if isinstance(tree, list) or tree is None:
        several = tree and all(hasattr(part, "dtype") for part in tree)
        raise TypeError(
            f"{name} must be arrays (or tuples of them), not {type(tree).__name__}: "
            f"use np.asarray({name})" + (f", or tuple({name}) of several" if several else "")
        )
    check_leaves(name, tree)


def check_leaves(name: str, tree: Any) -> None:
    """Raise unless all leaves are arrays of numbers that are not complex, or of truth values."""
    if _all_of(tree, _REAL):
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        place = name + jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{place} must be arrays, not {leaf!r}: use np.asarray({place})")
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in _REAL):
            raise TypeError(
                f"{place} must be arrays of real numbers, not of {leaf.dtype}: "
                f"use {place}.astype('float32') if that is what it holds"
            )


_REAL = (jnp.floating, jnp.integer, jnp.bool_, jax.dtypes.extended)


def _all_of(tree: Any, kinds: tuple[Any, ...]) -> bool:
    """Whether all leaves are arrays of these kinds: asked of every layer whenever it is traced."""
    return all(
        (dtype := getattr(leaf, "dtype", None)) is not None and _is_of(dtype, kinds)
        for leaf in jax.tree.leaves(tree)
    )


@functools.lru_cache(maxsize=1024)
def _is_of(dtype: Any, kinds: tuple[Any, ...]) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def real_array(name: str, value: Any) -> jax.Array:
    """An array, also of a list of numbers; raise unless these are real."""
    array = value if hasattr(value, "dtype") else np.asarray(value)
    check_leaves(name, array)
    return jnp.asarray(value)


def check_params(params: Any, name: str = "params") -> None:
    """Raise unless all leaves are floating-point numbers."""
    if _all_of(params, (jnp.floating,)):
        return
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.result_type(type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has the dtype {dtype}: "
                "parameters must be floating-point numbers; make them with init"
            )
