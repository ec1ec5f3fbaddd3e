"""The truth, to prove the catalogue itself: every entry against finite differences in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from planted.entries import Entry, Planted
from planted.peers import Leaves, flat, on_device, precision


def departure(entry: Entry) -> float:
    """How far the candidate is from finite differences, both in float64, relative to these.

    The largest of all leaves, along the coordinates of a leaf and random directions; for a function
    with several outputs along one random cotangent. Infinite for NaN and for another shape.
    """
    draw = np.random.default_rng(0)
    with precision("float64"):
        f, leaves = flat(entry, on_device(entry, "float64"))
        cotangents = [jnp.asarray(draw.normal(size=y.shape)) for y in jax.eval_shape(f, *leaves)]

        @jax.jit
        def at(*leaves: Any) -> Any:
            return sum(jnp.vdot(c, y) for c, y in zip(cotangents, f(*leaves), strict=True))

        try:
            grads = jax.jit(lambda *leaves: jax.vjp(f, *leaves)[1](tuple(cotangents)))(*leaves)
        except ValueError:  # of a custom_vjp: the wrong shape
            return np.inf
        found = [0.0]
        for i, g in enumerate(grads):
            n = leaves[i].size
            directions = draw.normal(size=(16, n)) if n > 400 else np.eye(n)
            if not getattr(entry, "kink", False):  # there slopes of several kinks do not add up
                directions = np.concatenate([directions, draw.normal(size=(4, n))])
            claims = np.einsum("dn,n->d", directions, np.ravel(g))
            pairs = [_slope(at, leaves, i, *pair) for pair in zip(directions, claims, strict=True)]
            error, size = np.linalg.norm(np.array(pairs).reshape(-1, 2), axis=0)
            found.append(float(error / (size or error or 1)))
    return max(e if e == e else np.inf for e in found)


def _slope(at: Any, leaves: Leaves, i: int, direction: Any, claim: float) -> tuple[float, float]:
    """(error of the claim, slope) along a direction in leaf i, by the step that suits it best.

    A claim between the slopes of the two sides, which differ at a kink, has no error.
    """
    d, here = direction.reshape(leaves[i].shape), at(*leaves)

    def one_sided(h: float) -> float:
        ahead = (at(*leaves[:i], leaves[i] + s * d, *leaves[i + 1 :]) for s in (h / 2, h))
        half, whole = (float(there - here) / s for there, s in zip(ahead, (h / 2, h), strict=True))
        return 2 * half - whole

    errors = []
    for h in (1e-3, 1e-5, 1e-7):
        h *= float(jnp.max(jnp.abs(leaves[i]), initial=0)) or 1
        low, high = sorted((one_sided(h), one_sided(-h)))
        errors.append((max(low - claim, claim - high, 0.0), (low + high) / 2))
    return min(errors)


def is_proved(entry: Entry) -> bool:
    """Whether finite differences call a planted error wrong, and a right gradient right."""
    error = departure(entry)
    if isinstance(entry, Planted):
        return error > 5e-7 if entry.dtype == "float64" else error > 1e-4
    return error < 1e-5 or getattr(entry, "inconclusive", "") != "" or "offset" in entry.name
