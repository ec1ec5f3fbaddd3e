"""Dtypes: a float64 context, casts, and how much rounding a program may have."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.factored import PyTree, wide_dtype

FLOOR64 = 1e-12
"""The least tolerance: the truth is computed in float64, and has rounding errors of its own."""


@contextlib.contextmanager
def x64() -> Iterator[None]:
    """Float64 inside, whatever the global flag; the flag is as it was afterwards."""
    home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # where it used to be
    with home.enable_x64(True):
        yield


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Where truth is computed: float64, and constants in other dtypes may be promoted to it."""
    with as_given(jnp.float64):
        yield


@contextlib.contextmanager
def as_given(dtype: Any) -> Iterator[None]:
    """Where something is computed in its own dtype; no matmul in less (TF32) than it says."""
    with contextlib.ExitStack() as stack:
        if dtype == jnp.float64:
            stack.enter_context(x64())
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.default_matmul_precision("highest"))
        stack.enter_context(jax.debug_nans(False))  # near an edge a probe may well meet one
        yield


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    """f under jit; or as it is, where Python's own control flow in it looks at values."""
    fast = jax.jit(f)

    def call(*args: Any) -> Any:
        try:
            return fast(*args)
        except jax.errors.ConcretizationTypeError:
            with jax.disable_jit():  # lax.map and the like as Python loops, too
                return f(*as_jax(args))

    return call


def as_jax(tree: PyTree) -> PyTree:
    """NumPy's arrays as JAX's: what a function is given that is not traced."""
    return jax.tree.map(lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, tree)


def is_float(leaf: Any) -> bool:
    """Whether a leaf, traced or not, is an array or number of a real floating-point dtype."""
    if callable(leaf):  # as jnp.float32, which has a dtype
        return False
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Concrete floating-point leaves to dtype, whatever the flags; the others as they are."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda v: np.asarray(v).astype(dtype) if is_float(v) else v, tree)


def float64(leaf: Any) -> np.ndarray:
    """A concrete array as NumPy's float64."""
    return np.asarray(leaf).astype(np.float64)


def coarsest(dtypes: list[Any]) -> Any:
    """The dtype of the largest unit roundoff."""
    return max(map(jnp.dtype, dtypes), key=lambda dtype: float(jnp.finfo(dtype).eps))


def coarsest_within(jaxpr: Any, moving: Sequence[bool]) -> Any:
    """The coarsest floating-point dtype that a program computes in, from the inputs that move.

    Float64 at best.
    """
    found = [jnp.dtype("float64")]
    depends = {v for v, moves in zip(jaxpr.invars, moving, strict=True) if moves}
    for eqn in jaxpr.eqns:
        flags = [not hasattr(v, "val") and v in depends for v in eqn.invars]
        if not any(flags):
            continue
        depends.update(eqn.outvars)
        dtypes = (getattr(v.aval, "dtype", None) for v in eqn.outvars)
        found += [d for d in dtypes if d is not None and jnp.issubdtype(d, jnp.floating)]
        for inner in subprograms(eqn):
            n = len(inner.invars)
            found.append(coarsest_within(inner, flags if len(flags) == n else [True] * n))
    return coarsest(found)


def norm(array: Any) -> float:
    """The norm of all entries, however large or small they are."""
    v = np.abs(np.asarray(array, np.float64))
    most = float(np.max(v, initial=0.0))
    return most * float(np.linalg.norm(v / most)) if 0 < most < math.inf else most


def roundoff(dtype: Any) -> float:
    """The unit roundoff: half of eps."""
    return float(jnp.finfo(dtype).eps) / 2


def ulps(candidate: float, truth: float, dtype: Any) -> float:
    """|candidate - truth| in units in the last place of the truth; NaN where that is 0."""
    if truth == 0:
        return 0.0 if candidate == 0 else math.nan
    info = jnp.finfo(dtype)
    least = float(info.tiny) * float(info.eps)
    unit = max(math.ldexp(float(info.eps), math.frexp(truth)[1] - 1), least)
    return abs(candidate - truth) / unit


_MOVES = frozenset({
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "gather",
    "concatenate", "pad", "rev", "copy", "copy_p", "stop_gradient", "select_n", "neg",
    "convert_element_type", "expand_dims", "split", "iota", "eq", "lt", "gt", "ge", "le",
    "ne", "and", "or", "not", "sign", "max", "min", "reduce_max", "reduce_min", "argmax",
    "argmin", "sharding_constraint", "optimization_barrier", "real", "imag", "clamp", "floor",
    "ceil", "round", "abs", "device_put", "pvary",
})  # fmt: skip


class Chain(NamedTuple):
    """What leads to an array: operations that round one after the other, terms summed, dtype.

    The dtype is the coarsest that any of the operations computes in.
    """

    rounds: int
    terms: int
    dtype: Any


def rounding(fun: Callable[..., Any], *args: Any) -> list[Chain]:
    """For each output of fun the longest chains that lead to it.

    Args:
        fun: traced, not run.
        args: arrays, or shapes.

    Returns:
        The number of operations that round one after the other, the sum of the lengths of the
        reductions among them, and the coarsest dtype that they compute in.
    """
    closed = jax.make_jaxpr(fun)(*args)
    ends = _chains(closed.jaxpr, [(0, 0, 0.0)] * len(closed.jaxpr.invars))
    return [
        Chain(rounds, terms, coarsest([v.aval.dtype, *(d for d in _DTYPES if roundoff(d) == unit)]))
        for v, (rounds, terms, unit) in zip(closed.jaxpr.outvars, ends, strict=True)
    ]


def allowed(chain: Chain, dtype: Any) -> float:
    """The relative error that so much rounding may leave: random in sign, so that roots add.

    8 u sqrt(roundings) + u' sqrt(terms), where u' is of float32 at least, in which sums are kept.
    An elementary function may be off by several units in float32 and float64, hence the 8; in
    half precision it is rounded from float32, and 1 is enough.
    """
    rounds, terms, dtype = chain.rounds, chain.terms, coarsest([dtype, chain.dtype])
    units = 8 if roundoff(dtype) <= roundoff("float32") else 1
    found = units * roundoff(dtype) * math.sqrt(rounds + 1)
    found += roundoff(wide_dtype(jnp.dtype(dtype))) * math.sqrt(terms)
    return max(found, FLOOR64)


_DTYPES = ("float64", "float32", "bfloat16", "float16")
_End = tuple[Any, ...]  # rounds, terms, unit roundoff


def _chains(jaxpr: Any, given: list[_End]) -> list[_End]:
    at: dict[Any, _End] = dict(zip(jaxpr.invars, given, strict=True))

    def of(v: Any) -> _End:
        return (0, 0, 0.0) if hasattr(v, "val") else at.get(v, (0, 0, 0.0))

    for eqn in jaxpr.eqns:
        before = [of(v) for v in eqn.invars]
        rounds, terms, unit = (max((b[i] for b in before), default=0) for i in range(3))
        inner = subprograms(eqn)
        if inner:
            start = (
                before if len(inner[0].invars) == len(before) else
                [(rounds, terms, unit)] * len(inner[0].invars)
            )  # fmt: skip
            ends = _chains(inner[0], start) or [(rounds, terms, unit)]
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            most = [max(end[i] for end in ends) for i in range(3)]
            whole = (
                rounds + times * max(most[0] - rounds, 0), terms + times * max(most[1] - terms, 0),
                most[2],
            )  # fmt: skip
            same = times == 1 and len(ends) == len(eqn.outvars)
            after = ends if same else [whole] * len(eqn.outvars)
        else:
            own, step = _unit(eqn), int(eqn.primitive.name not in _MOVES)
            after = [(rounds + step, terms + _summed(eqn), max(unit, own))] * len(eqn.outvars)
        at |= dict(zip(eqn.outvars, after, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _unit(eqn: Any) -> float:
    """The unit roundoff of what an operation computes in; 0 if it only moves numbers."""
    units = [
        max((roundoff(v.aval.dtype) for v in found if is_float(v.aval)), default=0.0)
        for found in (eqn.outvars, eqn.invars)
    ]
    if eqn.primitive.name == "convert_element_type":
        return units[0] if units[0] > units[1] > 0 else 0.0
    return 0.0 if eqn.primitive.name in _MOVES else units[0]


def subprograms(eqn: Any) -> list[Any]:
    """The programs (jaxprs) that an operation calls: a scan's body, what a jit holds, ..."""
    values = [
        item
        for value in eqn.params.values()
        for item in (value if isinstance(value, tuple | list) else (value,))
    ]
    found = (getattr(item, "jaxpr", item) for item in values)
    return [item for item in found if hasattr(item, "eqns")]


def _summed(eqn: Any) -> int:
    """How many terms an operation adds up to one number."""
    name, size = eqn.primitive.name, [math.prod(getattr(v.aval, "shape", ())) for v in eqn.invars]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return size[1] // max(kernel[eqn.params["dimension_numbers"].rhs_spec[0]], 1)
    if name in ("reduce_sum", "reduce_prod", "add_any") or name.startswith("cum"):
        out = math.prod(eqn.outvars[0].aval.shape)
        return size[0] // max(out, 1) if not name.startswith("cum") else max(
            eqn.invars[0].aval.shape, default=1
        )  # fmt: skip
    if name.startswith("scatter"):
        return max(1, size[-1] // max(size[0], 1))
    return 0
