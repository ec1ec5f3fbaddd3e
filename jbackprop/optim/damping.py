"""Damping: how far the quadratic model of the cost is trusted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from jbackprop.checks import check_numbers, check_sizes, number_of
from jbackprop.factored import PyTree, wide_dtype, widest_dtype
from jbackprop.mesh import WHOLE, on_mesh


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping that follows how well the quadratic model foretold the last step.

    Every so many steps, with the step d, the model M(d) = g . d + d . (G + lambda I) d / 2 and

        rho = (C(theta + d) - C(theta)) / M(d)

    lambda is multiplied by factor^every where rho > 3/4, and divided by it where rho < 1/4 (or is
    not finite); it stays where M(d) is hardly more than the rounding of C, so that rho says
    nothing. It costs two forward sweeps at most.

    Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
    curvature (2015), section 6.5.

    Attributes:
        initial: lambda to begin with.
        every: how often, in steps.
        factor: between 0 and 1.
        least, most: where lambda ends.

    Raises:
        ValueError: settings out of range, or an initial lambda beyond `least` or `most`.
    """

    initial: float = 1.0
    every: int = 5
    factor: float = 0.95
    least: float = 1e-8
    most: float = 1e8

    def __post_init__(self) -> None:
        check_numbers(self, "initial", "least", "most", above=0)
        check_numbers(self, "factor", above=0, below=1)
        check_sizes(self, "every")
        if not 0 < self.least <= self.initial <= self.most < math.inf:
            raise ValueError(
                f"LevenbergMarquardt: 0 < least <= initial <= most is needed, not {self.least}, "
                f"{self.initial}, {self.most}"
            )

    def adapted(self, damping: Array, ratio: Array) -> Array:
        """lambda after a look at rho."""
        step = jnp.asarray(self.factor**self.every, damping.dtype)
        up = ~(ratio >= 0.25)  # also where it is NaN
        new = jnp.where(ratio > 0.75, damping * step, jnp.where(up, damping / step, damping))
        return jnp.clip(new, self.least, self.most)


Damping = float | LevenbergMarquardt


def check_damping(damping: Any) -> None:
    """Raise unless it is a positive number or a rule."""
    if not isinstance(damping, LevenbergMarquardt):
        number_of(damping, "damping", above=0, otherwise=", or LevenbergMarquardt(...)")


def check_rate(rate: Any, optional: bool = False) -> None:
    """Raise unless it is a positive number, a schedule, or (where it is optional) None."""
    if not (callable(rate) or (optional and rate is None)):
        number_of(rate, "learning_rate", above=0, otherwise=", or a schedule")


def initial(damping: Damping) -> Array:
    """lambda to begin with."""
    first = damping.initial if isinstance(damping, LevenbergMarquardt) else damping
    return jnp.asarray(first, float)


def next_damping(
    rule: Damping,
    damping: Array,
    steps: Array,
    step: PyTree,
    grads: PyTree,
    params: PyTree,
    bend: Callable[[], Array],
    value: Array | None,
    value_fn: Callable[[PyTree], Array] | None,
) -> Array:
    """lambda for the next step; `bend` gives step . G step."""
    if not isinstance(rule, LevenbergMarquardt):
        return damping
    if value is None or value_fn is None:
        raise TypeError(
            "LevenbergMarquardt compares costs: give update(..., value=cost, value_fn=f) with f a "
            "function of params, as jbackprop.fit does; or take a fixed damping"
        )
    rule_, value_, value_fn_ = rule, value, value_fn

    def look() -> Array:
        found = value_fn_(optax.apply_updates(params, step)) - value_
        model = inner(grads, step) + damped(bend(), step, step, damping) / 2
        rounding = 8 * jnp.finfo(value_.dtype).eps * jnp.abs(value_)
        new = rule_.adapted(damping, found.astype(damping.dtype) / model.astype(damping.dtype))
        return jnp.where(jnp.abs(model) <= rounding.astype(model.dtype), damping, new)

    return lax.cond(steps % rule.every == rule.every - 1, look, lambda: damping)


@on_mesh(lambda *_: WHOLE)
def inner(one: PyTree, other: PyTree) -> Array:
    """The inner product of two trees, in float32 at least."""
    left, right = jax.tree.leaves(one), jax.tree.leaves(other)
    dtype = wide_dtype(widest_dtype([v.dtype for v in (*left, *right)]))
    pairs = zip(left, right, strict=True)
    return jnp.sum(jnp.stack([jnp.vdot(u.astype(dtype), v.astype(dtype)) for u, v in pairs]))


def damped(curved: Array, one: PyTree, other: PyTree, damping: Array) -> Array:
    """one . (G + lambda I) other, from one . G other."""
    return curved + damping.astype(curved.dtype) * inner(one, other).astype(curved.dtype)
