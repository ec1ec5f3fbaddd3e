"""Clipped gradients with noise: differentially private ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_key, number_of
from jbackprop.factored import Method, PyTree
from jbackprop.per_example.answers import check_question
from jbackprop.per_example.clipping import Scheme, check_bounds, check_positive, clipped_sums
from jbackprop.per_example.source import Deferred, Pairs, like_params, opened
from jbackprop.structure import trainable_mask


class Noisy(NamedTuple):
    """A private gradient. Only `gradient` is; `norms` and `clipped_fraction` are of the data.

    Attributes:
        gradient: (the sum of clipped gradients + noise) / divisor, like params.
        norms, clipped_fraction: as in `Clipped`.
        sensitivity: by how much, in Euclidean norm, the sum can change when one example is added to
            the mini-batch or taken away. () float.
        noise_std: the standard deviation of the noise on each entry of the sum (before it is
            divided): noise_multiplier * sensitivity. () float.
    """

    gradient: PyTree
    norms: Array
    clipped_fraction: Array
    sensitivity: Array
    noise_std: Array


def noisy_gradient(
    key: Array,
    bp: Pairs,
    max_norm: Any,
    noise_multiplier: Any,
    scheme: Scheme = "flat",
    *,
    divisor: Any = 1,
    weights: Array | None = None,
    method: Method = "auto",
    microbatch: int | None = None,
) -> Noisy:
    """A differentially private gradient: clipped gradients, summed, with Gaussian noise.

        (sum_n clip(g_n) + N(0, (noise_multiplier * sensitivity)^2 I)) / divisor

    The sensitivity is what one example can contribute at most: `max_norm`, or the root of the sum
    of the layers' squares where they are given one by one. It is meant for neighbours that differ
    by one example's being there or not; where one is replaced by another it is twice that. Noise
    is added in float32 at least, to parameters that learn, and rounded to their dtype last.

    What (epsilon, delta) many such steps amount to depends on how the mini-batches were drawn:
    `jbackprop.fit(..., private=...)` does that, and asks `dp_accounting`. JAX's generator is no
    cryptographic one, and nothing is done here against attacks on the rounding of floats.

    Source: Abadi et al. (2016), algorithm 1, where the divisor is the expected size of the batch.

    Args:
        key: of the noise; a new one for each step.
        bp, max_norm, scheme, weights, method, microbatch: as in `clipped_gradient`.
        noise_multiplier: the noise's standard deviation over the sensitivity; 0 for none.
        divisor: what the sum is divided by, after the noise: the size that was expected of the
            mini-batch, never the one that it happens to have.

    Returns:
        A `Noisy`: (gradient, norms, clipped_fraction, sensitivity, noise_std).

    Raises:
        ValueError: as `clipped_gradient`; a negative noise_multiplier; a divisor that is not
            positive.
    """
    n, weights = check_question(bp, weights, microbatch, method)
    max_norm = check_bounds(max_norm, scheme)
    check_key(key)
    if not isinstance(noise_multiplier, jax.core.Tracer):
        number_of(noise_multiplier, "noise_multiplier", least=0)
    check_positive("divisor", divisor)
    sums, found = clipped_sums(bp, max_norm, weights, scheme, method, microbatch, n)
    sensitivity = sensitivity_of(max_norm)
    std = jnp.asarray(noise_multiplier, float) * sensitivity
    gradient = noised(key, sums, learning(bp), std, divisor, like_params(bp))
    return Noisy(gradient, found.norms, found.clipped_fraction, sensitivity, std)


def noised(
    key: Array, sums: PyTree, learns: PyTree, std: Any, divisor: Any, params: PyTree
) -> PyTree:
    """(sums + noise) / divisor in the dtypes of params; frozen parameters stay at 0."""
    leaves, tree = jax.tree.flatten(sums)
    keys = jax.random.split(key, max(len(leaves), 1))

    def one(key: Array, g: Array, own: bool, like: Any) -> Array:
        if not own:
            return jnp.zeros(g.shape, like.dtype)
        noise = jax.random.normal(key, g.shape, g.dtype)
        return ((g + jnp.asarray(std, g.dtype) * noise) / jnp.asarray(divisor, g.dtype)).astype(
            like.dtype
        )

    others = (jax.tree.leaves(other) for other in (learns, params))
    return jax.tree.unflatten(tree, map(one, keys, leaves, *others))


def sensitivity_of(max_norm: Any) -> Array:
    """What one example can contribute at most, in Euclidean norm."""
    if isinstance(max_norm, Mapping):
        return jnp.sqrt(sum(jnp.square(jnp.asarray(v, float)) for v in max_norm.values()))
    return jnp.asarray(max_norm, float)


def learning(bp: Pairs) -> PyTree:
    """A tree like params: whether a parameter is not frozen."""
    return trainable_mask(bp.net, bp.params) if isinstance(bp, Deferred) else opened(bp).learns()
