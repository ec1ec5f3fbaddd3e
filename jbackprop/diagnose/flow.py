"""The size of the delta, layer by layer."""

from __future__ import annotations

import dataclasses
import itertools

import jax.numpy as jnp
from jax import Array

from jbackprop.factored import wide_dtype
from jbackprop.gradient import Backprop, deltas
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class DeltaFlow:
    """How the delta shrinks or grows on its way back. Printed, it is a table.

    Attributes:
        norms: by path, first layer first: the mean over the batch of |delta_n|, the Euclidean norm
            of the unscaled delta of one example.
        ratios: by path: the norm here over that of the next layer towards the output. Below 1 the
            delta vanishes on its way to the input, above 1 it explodes. The last layer has none.
    """

    norms: dict[str, float]
    ratios: dict[str, float]

    def __str__(self) -> str:
        rows = [
            (path, f"{norm:.3e}", f"{self.ratios[path]:.3f}" if path in self.ratios else "")
            for path, norm in self.norms.items()
        ]
        return render(("layer", ">|delta|", ">over the next layer's"), rows)


def delta_norms(bp: Backprop) -> DeltaFlow:
    """The norm of the delta of every layer that has weights, and its ratio from layer to layer.

    Args:
        bp: from `jbackprop.backprop`.
    """
    norms = {path: float(jnp.mean(_norm(delta))) for path, delta in deltas(bp).items()}
    paths = list(norms)
    ratios = {
        path: norms[path] / norms[following] if norms[following] else float("nan")
        for path, following in itertools.pairwise(paths)
    }
    return DeltaFlow(norms, ratios)


def _norm(delta: Array) -> Array:
    """|delta_n|, of entries divided by the largest first: squares of vanishing ones underflow."""
    flat = delta.reshape(delta.shape[0], -1)
    flat = flat.astype(wide_dtype(flat.dtype))
    largest = jnp.max(jnp.abs(flat), axis=1, keepdims=True)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale[:, 0] * jnp.linalg.norm(flat / scale, axis=1)
