"""Derivatives from values alone: the complex step, and Ridders' extrapolation with its error.

Along a direction d, of a function f of one point, as h goes to 0:

    Im f(x + i h d) / h             the complex step: no subtraction, so h may be 1e-30, and the
                                    slope is as exact as f; for functions that are analytic
    (f(x + h d) - f(x - h d)) / 2h  central differences at steps that shrink by a constant factor,
                                    extrapolated to h = 0 in a tableau whose entries of smallest
                                    disagreement are taken, their disagreement being the error

Sources: Squire and Trapp, Using complex variables to estimate derivatives of real functions, SIAM
Review 40 (1998); Ridders, Accurate computation of F'(x) and F'(x) F''(x), Advances in Engineering
Software 4 (1982), section 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.check.precision import coarsest_within, compiled, exactly, norm, subprograms

FIRST, FACTOR, LEVELS, ORDERS = 0.1, 2.5, 16, 4
"""The first step, relative to the point; by how much steps shrink; how many; extrapolations."""
FINER = 1e-4
"""The first step where the slope is asked for again, because autodiff has another."""

_EPS, _TINY = float(np.finfo(np.float64).eps), float(np.finfo(np.float64).tiny)
_COMPLEX_STEP = 1e-30
_SAFE = 2.0  # an error estimate is an estimate


class Slope(NamedTuple):
    """A directional derivative, known to within `error`; at a kink, the slopes on both sides.

    Below `floor` a slope is nothing: the function would not change by a unit in its last place, or
    by less than can be represented, if its arguments were doubled.
    """

    value: float
    error: float
    low: float
    high: float
    method: str
    floor: float = 0.0

    @property
    def kinked(self) -> bool:
        return self.high > self.low

    def distance(self, value: float) -> float:
        """From a candidate's slope to the nearest that is right; at a kink any in between is."""
        return max(self.low - value, value - self.high, 0.0) if value == value else np.inf


class Slopes:
    """Directional derivatives of a scalar function of a list of float64 arrays, at one point.

    Args:
        f: (point, data) -> scalar.
        point: the arrays.
        data: an example of what else f takes, which is not differentiated.
    """

    def __init__(
        self, f: Callable[[list[Array], Any], Array], point: list[np.ndarray], data: Any = ()
    ) -> None:
        self.point = point

        def along(x: list[Array], d: list[Array], data: Any, steps: Array) -> Array:
            def at(h: Array) -> Array:
                return f([p + h * q for p, q in zip(x, d, strict=True)], data)

            return jax.lax.map(at, steps)

        def complex_step(x: list[Array], d: list[Array], data: Any) -> Array:
            moved = [jax.lax.complex(p, _COMPLEX_STEP * q) for p, q in zip(x, d, strict=True)]
            return jnp.imag(f(moved, data)) / _COMPLEX_STEP

        self._along, self._complex = compiled(along), compiled(complex_step)
        with exactly():
            self._analytic = _is_analytic(f, point, data)
            self._eps = _eps_of(f, point, data)

    def along(self, direction: list[np.ndarray], data: Any = (), first: float = FIRST) -> Slope:
        """The slope of f along a direction that has a part in each of the arrays."""
        units = [
            size(p[q != 0]) / size(q) for p, q in zip(self.point, direction, strict=True) if q.any()
        ]
        unit = min(units, default=1.0)
        h = unit * first / FACTOR ** np.arange(LEVELS)
        steps = np.concatenate([h, -h, [0.0]])
        with exactly():
            values = np.asarray(self._along(self.point, direction, data, steps))
        if not np.isfinite(values[-1]):
            return Slope(math.nan, math.inf, math.nan, math.nan, "none: the function is not finite")
        slope = ridders(h, values[:LEVELS], values[LEVELS:-1], float(values[-1]), self._eps)
        least = max(self._eps * abs(float(values[-1])), _TINY)
        slope = slope._replace(floor=4 * least / unit)
        if not self._analytic or slope.kinked:
            return slope
        with exactly():
            exact = float(self._complex(self.point, direction, data))
        # Trusted only where differences of real values say the same.
        if not abs(exact - slope.value) <= slope.error + 1e-6 * abs(slope.value):
            return slope
        return Slope(exact, 64 * _EPS * abs(exact), exact, exact, "complex step", slope.floor)


def size(array: np.ndarray, zero: float = 1.0) -> float:
    """The root mean square of the entries that are not zero; `zero` if all are."""
    entries = array[array != 0]
    return norm(entries) / math.sqrt(entries.size) if entries.size else zero


def ridders(
    h: np.ndarray, plus: np.ndarray, minus: np.ndarray, middle: float, eps: float = _EPS
) -> Slope:
    """The slope at 0 from the values at steps +h and -h (falling by FACTOR) and at 0.

    The values are taken to be rounded to eps, relative to their size.
    """
    method = "differences"
    with np.errstate(all="ignore"):
        central = (plus - minus) / (2 * h)
        noise = 4 * eps * np.maximum(np.abs(plus), np.abs(minus)) / h
        best, best_error, column = np.nan, np.inf, central
        for j in range(1, ORDERS + 1):
            power = FACTOR ** (2 * j)
            finer = (power * column[1:] - column[:-1]) / (power - 1)
            error = np.maximum(np.abs(finer - column[1:]), np.abs(finer - column[:-1])) + noise[j:]
            error = np.where(np.isfinite(error), error, np.inf)
            k = int(np.argmin(error))
            # A function that is erratic looks tame at large steps: finer ones must say the same.
            erratic = np.abs(central[k + j :] - finer[k]) - 16 * noise[k + j :]
            found = max(float(error[k]), float(np.nanmax(erratic, initial=0.0)))
            if found < best_error:
                best, best_error = float(finer[k]), found
            column = finer
        bend = (plus - 2 * middle + minus) / h  # at a kink, the jump of the slope; else O(h)
        clear = 20 * noise
        most = np.max(np.abs(bend), initial=0.0, where=np.isfinite(bend))
        known = np.flatnonzero(np.isfinite(bend) & (clear < 0.05 * most))
        if len(known) > 4:
            last = bend[known[-5:]]  # a smooth bend shrinks with h, noise grows: a kink stays
            if np.ptp(last) < 0.2 * abs(last[-1]) and abs(last[-1]) > 2 * clear[known[-1]]:
                k = known[-1]
                low, high = sorted(
                    (float((plus[k] - middle) / h[k]), float((middle - minus[k]) / h[k]))
                )
                error = float(abs(last[-1] - last[-2]) + noise[k] + 1e-6 * abs(last[-1]))
                return Slope((low + high) / 2, error, low, high, "one-sided")
    return Slope(best, _SAFE * best_error, best, best, method)


_ANALYTIC = frozenset({
    "add", "add_any", "sub", "mul", "div", "neg", "exp", "exp2", "log", "log1p", "expm1",
    "sin", "cos", "tan", "tanh", "sinh", "cosh", "asinh", "acosh", "atanh", "asin", "acos",
    "atan", "logistic", "integer_pow", "square", "sqrt", "rsqrt", "dot_general",
    "conv_general_dilated", "reduce_sum", "cumsum", "broadcast_in_dim", "reshape",
    "transpose", "squeeze", "slice", "dynamic_slice", "gather", "concatenate", "pad", "rev",
    "copy", "convert_element_type", "expand_dims", "split", "iota", "scan", "pjit", "jit",
    "closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat",
    "checkpoint", "remat2", "dynamic_update_slice", "mul_add", "select_and_gather_add",
})  # fmt: skip
"""Primitives that carry x + i h d through to first order. No abs, max, comparison or select."""


def _is_analytic(f: Callable[..., Array], point: list[np.ndarray], data: Any) -> bool:
    """Whether f, at complex numbers, is made of analytic operations only."""
    try:
        moved = [jax.ShapeDtypeStruct(p.shape, "complex128") for p in point]
        with warnings.catch_warnings():  # of casts from complex to real
            warnings.simplefilter("ignore")
            closed = jax.make_jaxpr(f)(moved, data)
    except Exception:  # whatever f may raise when it does not take complex numbers
        return False
    complex_out = jnp.issubdtype(closed.out_avals[0].dtype, jnp.complexfloating)
    return complex_out and _all_analytic(closed.jaxpr)


def _eps_of(f: Callable[..., Array], point: list[np.ndarray], data: Any) -> float:
    """The eps of the coarsest dtype within f."""
    try:
        closed = jax.make_jaxpr(f)(point, data)
    except jax.errors.ConcretizationTypeError:
        return _EPS
    moving = [i < len(point) for i in range(len(closed.jaxpr.invars))]
    return float(jnp.finfo(coarsest_within(closed.jaxpr, moving)).eps)


def _all_analytic(jaxpr: Any) -> bool:
    for eqn in jaxpr.eqns:
        depends = any(
            jnp.issubdtype(getattr(v.aval, "dtype", np.int32), jnp.complexfloating)
            for v in eqn.invars
        )
        if not depends:
            continue
        if eqn.primitive.name not in _ANALYTIC or not all(
            jnp.issubdtype(v.aval.dtype, jnp.complexfloating) for v in eqn.outvars
        ):
            return False
        if not all(map(_all_analytic, subprograms(eqn))):
            return False
    return True
