"""How the gradients of single examples are spread about their mean."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import flag_of, size_of
from jbackprop.factored import Moments, PyTree, in_shares, widest_dtype
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.per_example.answers import check_question, root, summed, times
from jbackprop.per_example.source import Pairs, Source, in_parts, params_split, split_of


class NoiseScale(NamedTuple):
    """What the noise scale of a gradient is the ratio of: two estimates without a bias.

    The ratio of one mini-batch is noisy, and biased. To follow it through training, average several
    of these (`jax.tree.map`), and ask their mean for `simple`.

    Attributes:
        trace: of tr(Sigma), Sigma being the covariance of the gradients g_n of single examples.
        gradient_square_norm: of |G|^2, G being the expectation of g_n; by chance not positive.
    """

    trace: Array
    gradient_square_norm: Array

    @property
    def simple(self) -> Array:
        """B_simple = tr(Sigma) / |G|^2, in examples; infinite where |G|^2 is not positive."""
        positive = self.gradient_square_norm > 0
        return jnp.where(
            positive, self.trace / jnp.where(positive, self.gradient_square_norm, 1), jnp.inf
        )


def mean(bp: Pairs, *, weights: Array | None = None, microbatch: int | None = None) -> PyTree:
    """The mean gradient of the examples, sum_n w_n g_n / sum_n w_n.

    Unlike `jbackprop.gradient`, weights are divided by their sum, and nothing is rounded to the
    parameters' dtypes.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        weights: (B,), not negative, such as a mask; they need not sum to 1. An example of weight 0
            is not there, even if it holds NaN. By default ones.
        microbatch: so many examples at a time; bounds the memory, and changes nothing else.

    Returns:
        Like params, in float32 at least; NaN if all weights are 0.

    Raises:
        ValueError: an empty batch; weights of another shape, or negative where that can be seen; a
            layer couples the examples.
    """
    n, weights = _check(bp, weights, microbatch)
    return _mean(bp, weights, microbatch, n)


@on_mesh(lambda bp, *_: params_split(bp))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _mean(bp: Pairs, weights: Array | None, size: int | None, n: int) -> PyTree:
    def question(source: Source, weights: Array | None) -> tuple[Any, Any]:
        return (), source.ask(lambda pair: pair.total(weights))

    sums = in_parts(bp, n, size, question, weights)[1]
    return _over(sums, _mass(weights, n))


def second_moment(
    bp: Pairs, *, weights: Array | None = None, microbatch: int | None = None
) -> PyTree:
    """The mean of g_n * g_n, entry by entry: sum_n w_n g_n^2 / sum_n w_n.

    Where an example has one position it is one matmul more, of the squares of activations and
    deltas; else gradients are written out, of a few examples at a time.

    Args, returns, raises: as `mean`.
    """
    n, weights = _check(bp, weights, microbatch)
    return _second_moment(bp, weights, microbatch, n)


@on_mesh(lambda bp, *_: params_split(bp))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _second_moment(bp: Pairs, weights: Array | None, size: int | None, n: int) -> PyTree:
    def question(source: Source, weights: Array | None) -> tuple[Any, Any]:
        return (), source.ask(lambda pair: pair.second_moment(weights))

    sums = in_parts(bp, n, size, question, weights)[1]
    return _over(sums, _mass(weights, n))


def variance(
    bp: Pairs, *, ddof: int = 0, weights: Array | None = None, microbatch: int | None = None
) -> PyTree:
    """The variance of g_n, entry by entry: sum_n w_n (g_n - mean)^2 / (sum_n w_n - ddof).

    About the mean: a difference of moments is taken only where it keeps all but three digits of its
    precision. With microbatches each has a mean of its own, and they are put together without loss.

    Args:
        bp, weights, microbatch: as in `mean`; ddof goes with weights that count examples, as masks
            do.
        ddof: 1 for the unbiased estimate of the variance in the population, 0 for that of these
            examples.

    Returns:
        Like params, in float32 at least; not negative. NaN where the weights sum to no more than
        ddof.

    Raises:
        ValueError: as `mean`; fewer examples than ddof + 1.
    """
    return _moments(bp, ddof, weights, microbatch).variance


def snr(
    bp: Pairs, *, ddof: int = 0, weights: Array | None = None, microbatch: int | None = None
) -> PyTree:
    """The signal-to-noise ratio of the gradient, entry by entry: mean^2 / variance.

    0 where the mean is 0; infinite where the variance alone is.

    Source: Liu, Jiang, Bai, Chen and Wang, Understanding why neural networks generalize well
    through GSNR of parameters (2020), equation 3.

    Args, returns, raises: as `variance`.
    """

    def ratio(m: Array, v: Array) -> Array:
        return jnp.where(m == 0, 0, jnp.square(m) / jnp.where(m == 0, 1, v)).astype(m.dtype)

    found = _moments(bp, ddof, weights, microbatch)
    return jax.tree.map(ratio, found.mean, found.variance)


def _moments(bp: Pairs, ddof: int, weights: Array | None, microbatch: int | None) -> Moments:
    """The variance as `variance` has it."""
    n, weights = _check(bp, weights, microbatch)
    ddof = size_of(ddof, "ddof", least=0)
    if weights is None and n <= ddof:
        raise ValueError(f"a variance with ddof={ddof} needs more than {ddof} examples, not {n}")
    return _jitted_moments(bp, weights, ddof, microbatch, n)


@on_mesh(lambda bp, *_: Moments(WHOLE, params_split(bp), params_split(bp)))
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _jitted_moments(
    bp: Pairs, weights: Array | None, ddof: int, size: int | None, n: int
) -> Moments:
    def question(source: Source, weights: Array | None) -> tuple[Any, Any]:
        found = source.ask(lambda pair: pair.moments(weights))
        tree, leaves = jax.tree.structure(source.learns()), jax.tree.leaves(found)
        mass = in_shares(weights, source.n, _dtype(found))[0]
        return (), Moments(mass, *(jax.tree.unflatten(tree, leaves[i::2]) for i in (0, 1)))

    found = in_parts(bp, n, size, question, weights, Moments.join)[1]
    if weights is not None:  # of nothing there is no mean
        scale = jnp.where(found.mass == 0, jnp.nan, 1).astype(found.mass.dtype)
        found = found._replace(mean=_times(found.mean, scale))
    if weights is not None or ddof:
        left = found.mass - ddof
        scale = jnp.where(left > 0, found.mass / jnp.where(left > 0, left, 1), jnp.nan)
        found = found._replace(variance=_times(found.variance, scale))
    return found


def _dtype(tree: PyTree) -> Any:
    leaves = jax.tree.leaves(tree)
    return widest_dtype([leaf.dtype for leaf in leaves] or [jnp.result_type(float)])


def _times(tree: PyTree, scale: Array) -> PyTree:
    return jax.tree.map(lambda v: v * scale.astype(v.dtype), tree)


def noise_scale(
    bp: Pairs,
    per_layer: bool = False,
    *,
    weights: Array | None = None,
    microbatch: int | None = None,
) -> Any:
    """The simple noise scale tr(Sigma) / |G|^2: about the batch size that is worth its price.

    With mini-batches much smaller than it, twice the batch is nearly twice the progress; with much
    larger ones it is nearly none. Estimated from the norms and the mean of one mini-batch: with
    p_n = w_n / sum w (1/B without weights), S = sum p_n^2, and g the mean gradient,

        E |g|^2 = |G|^2 + S tr(Sigma)          E sum_n p_n |g_n|^2 = |G|^2 + tr(Sigma)

    so that tr(Sigma) = (sum_n p_n |g_n|^2 - |g|^2) / (1 - S), without a bias.

    Source: McCandlish, Kaplan, Amodei and the OpenAI Dota team, An empirical model of large-batch
    training (2018), equation 2.9, and appendix A.1 for the estimates, of which this is the one
    whose small batch is a single example.

    Args:
        bp, weights, microbatch: as in `mean`.
        per_layer: of each layer's part of the gradient rather than of all.

    Returns:
        A `NoiseScale`, NaN where one weight alone is not 0; with `per_layer` an `OrderedDict` of
        them, by path as in `norms`.

    Raises:
        ValueError: as `mean`; fewer than two examples.
    """
    n, weights = _check(bp, weights, microbatch)
    if n < 2:
        raise ValueError(f"a noise scale needs two examples at least, not {n}")
    per_layer = flag_of(per_layer, "per_layer")
    return _noise_scale(bp, weights, per_layer, microbatch, n)


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _noise_scale(
    bp: Pairs, weights: Array | None, per_layer: bool, size: int | None, n: int
) -> Any:
    sources: list[Source] = []

    def question(source: Source, weights: Array | None) -> tuple[Any, Any]:
        sources.append(source)
        squares = source.ask(lambda pair: pair.square_norm(), by_copy=True)
        total = source.ask(lambda pair: pair.total(weights), by_copy=True)
        mine = jax.tree.map(lambda v: jnp.sum(times(weights, v), axis=-1), squares)
        return (), (mine, total)

    squares, sums = in_parts(bp, n, size, question, weights)[1]
    mass = _mass(weights, n)
    share = 1 / n if weights is None else jnp.sum(jnp.square(weights / mass.astype(weights.dtype)))

    def length(s: Array, total: Array) -> Array:
        axes = tuple(range(s.ndim, total.ndim))
        return jnp.sum(jnp.square(total / mass.astype(total.dtype)), axis=axes)

    lengths = jax.tree.map(length, squares, sums)
    each = jax.tree.map(lambda s: s / mass.astype(s.dtype), squares)

    def scale(each: Array, length: Array) -> NoiseScale:
        trace = jnp.maximum((each - length) / jnp.asarray(1 - share, each.dtype), 0)
        return NoiseScale(trace, each - trace)

    if per_layer:
        at = sources[0]
        by_path = (at.shown(at.by_layer(tree)) for tree in (each, lengths))
        parts = zip(*(found.items() for found in by_path), strict=True)
        return OrderedDict((path, scale(e, length)) for (path, e), (_, length) in parts)
    return scale(_whole(each), _whole(lengths))


def cosine_to_mean(
    bp: Pairs, *, weights: Array | None = None, microbatch: int | None = None
) -> Array:
    """cos(g_n, mean): how far every example's gradient points where the batch goes.

    1 where it agrees, -1 where the step will be against it; 0 where either is zero.

    Args:
        bp, weights, microbatch: as in `mean`; the mean is the weighted one.

    Returns:
        (B,), in float32 at least; 0 for an example of weight 0.

    Raises:
        ValueError: as `mean`.
    """
    n, weights = _check(bp, weights, microbatch)
    return _cosine(bp, weights, microbatch, n)


@on_mesh(lambda bp, *_: split_of(bp))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _cosine(bp: Pairs, weights: Array | None, size: int | None, n: int) -> Array:
    middle = _mean(bp, weights, size, n)
    length = jnp.sqrt(_whole(jax.tree.map(jnp.square, middle)))

    def question(source: Source, weights: Array | None) -> tuple[Any, Any]:
        along = summed(source.ask(lambda pair, m: pair.project(m), middle), source.n)
        own = root(summed(source.ask(lambda pair: pair.square_norm()), source.n), None)
        sizes = own * length.astype(own.dtype)
        cosine = jnp.where(sizes == 0, 0, along / jnp.where(sizes == 0, 1, sizes))
        cosine = jnp.clip(cosine, -1, 1)
        return (cosine if weights is None else jnp.where(weights == 0, 0.0, cosine)), ()

    return in_parts(bp, n, size, question, weights)[0]


def _check(bp: Pairs, weights: Any, microbatch: Any) -> tuple[int, Array | None]:
    n, weights = check_question(bp, weights, microbatch)
    if n == 0:
        raise ValueError("the batch is empty: it has no mean gradient")
    if weights is not None and not isinstance(weights, jax.core.Tracer) and jnp.any(weights < 0):
        raise ValueError("the weights of a mean must not be negative")
    return n, weights


def _whole(tree: PyTree) -> Array:
    """The sum of all entries."""
    return summed([jnp.sum(v)[None] for v in jax.tree.leaves(tree)], 1)[0]


def _mass(weights: Array | None, n: int) -> Array:
    return jnp.asarray(n, float) if weights is None else jnp.sum(weights)


def _over(sums: PyTree, mass: Array) -> PyTree:
    return jax.tree.map(lambda v: v / mass.astype(v.dtype), sums)
