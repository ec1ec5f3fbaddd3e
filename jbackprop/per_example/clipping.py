"""Weighted sums of the gradients of single examples, and sums of clipped ones."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.factored import Method, PyTree
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.per_example.answers import check_question, root, summed, times
from jbackprop.per_example.source import (
    Pairs,
    Source,
    WrittenOut,
    in_parts,
    like_params,
    params_split,
    split_of,
)

Scheme = Literal["flat", "per_layer", "automatic"] | Callable[[Array], Array]
"""How gradients are clipped; a callable makes the factor of one gradient of its norm."""

_SCHEMES = ("flat", "per_layer", "automatic")
_STABILITY = 0.01  # the gamma of automatic clipping


class Clipped(NamedTuple):
    """A sum of clipped gradients.

    Attributes:
        gradient: sum_n of the clipped gradients; the sum, divided by nothing. In the shapes and
            dtypes of params.
        norms: |w_n g_n| before clipping, (B,), of the whole gradient in every scheme.
        clipped_fraction: the share of examples (of weight other than 0) whose gradient, or in
            "per_layer" any layer's part of it, was longer than its bound. () float.
    """

    gradient: PyTree
    norms: Array
    clipped_fraction: Array


def weighted_gradient(bp: Pairs, weights: Array, *, microbatch: int | None = None) -> PyTree:
    """sum_n weights_n g_n: what clipping, importance sampling and masks are made of.

    One matmul for each pair, as for the gradient: sum_n w_n g_n = sum_n a_n (outer) w_n delta_n, by
    which the gradients of single examples are never written out (Bu, Wang, Zha and Karypis,
    Differentially private optimization on large model at small cost (2023), section 2.3).

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        weights: (B,), of any sign; they need not sum to anything. An example of weight 0 is not
            there, even if it holds NaN.
        microbatch: so many examples at a time; bounds the memory, and changes nothing else.

    Returns:
        Like params, in their shapes and dtypes; zeros where it is frozen.

    Raises:
        ValueError: weights of another shape; a layer couples the examples.
    """
    n, checked = check_question(bp, weights, microbatch)
    if checked is None:
        raise ValueError("weights must be an array (B,), one for each example, not None")
    return _weighted(bp, checked, microbatch, n)


@on_mesh(lambda bp, *_: params_split(bp))
@functools.partial(jax.jit, static_argnums=(2, 3))
def _weighted(bp: Pairs, weights: Array, size: int | None, n: int) -> PyTree:
    def question(source: Source, weights: Array) -> tuple[Any, Any]:
        return (), source.ask(lambda pair: pair.total(weights))

    sums = in_parts(bp, n, size, question, weights)[1]
    return jax.tree.map(lambda g, p: g.astype(p.dtype), sums, like_params(bp))


def clipped_gradient(
    bp: Pairs,
    max_norm: Any,
    scheme: Scheme = "flat",
    *,
    weights: Array | None = None,
    method: Method = "auto",
    microbatch: int | None = None,
) -> Clipped:
    """The sum of the examples' gradients, each of them clipped: at about the price of one gradient.

    With g_n the gradient of the example's own, unscaled cost (with weights, of w_n C_n) and C the
    `max_norm`, the sum is sum_n f_n g_n with

        f_n = min(1, C / |g_n|)             "flat"
        f_n = C / (|g_n| + 0.01)            "automatic": all get about the length C
        f_nl = min(1, C_l / |g_nl|)         "per_layer": of each layer l that learns, its part
        f_n = f(|g_n|), but |f_n| |g_n| at most C         a callable

    C_l is C / sqrt(the number of layers), so that no example contributes more than C in any scheme;
    or what `max_norm` gives for the layer by its path. The factors are smaller by a few roundings,
    so that it holds of the computed sum as well, in every dtype (16 bits are rounded towards 0). An
    example whose norm is not finite cannot be bounded: it is left out, and `norms` shows it. The
    bound is as exact as the norms: where the parts of a tied weight's gradient cancel to a few
    roundings, or matmuls are done in TF32, they are less so.

    Source: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar and Zhang, Deep learning with
    differential privacy (2016), algorithm 1; Bu, Wang, Zha and Karypis, Automatic clipping (2023),
    equation 3.1, with their 0.01; McMahan, Andrew, Erlingsson, Chien, Mironov, Papernot and
    Kairouz, A general approach to adding differential privacy to iterative training procedures
    (2018), section 2.1, for layers of equal bounds.

    Args:
        bp: from `backprop`, `capture` or `deferred`.
        max_norm: C, positive; in "per_layer" also a mapping from the paths that
            `norms(per_layer=True)` has to each layer's bound.
        scheme: "flat", "per_layer", "automatic", or a function from one norm to one factor.
        weights: (B,); they multiply the costs, before anything is clipped. 0: not there, even if
            the example holds NaN. By default ones.
        method: how norms are found; see `norms`. "materialise" with a microbatch writes the
            gradients of so many examples out, once for their norms and their sum.
        microbatch: so many examples at a time; bounds the memory, and changes nothing else.

    Returns:
        A `Clipped`: (gradient, norms, clipped_fraction).

    Raises:
        ValueError: a layer couples the examples; a max_norm that is not positive, or lacks a layer;
            an unknown scheme.
    """
    n, weights = check_question(bp, weights, microbatch, method)
    max_norm = check_bounds(max_norm, scheme)
    sums, found = clipped_sums(bp, max_norm, weights, scheme, method, microbatch, n)
    gradient = jax.tree.map(_towards_zero, sums, like_params(bp))
    return Clipped(gradient, found.norms, found.clipped_fraction)


class Bounded(NamedTuple):
    """What is found on the way to a clipped sum; losses and outputs where they are known."""

    norms: Array
    clipped_fraction: Array
    losses: Any
    outputs: Any


def _split_of_sums(bp: Pairs, *_: Any) -> tuple[PyTree, Any]:
    split = split_of(bp)
    return params_split(bp), Bounded(split, WHOLE, split, split)


@on_mesh(_split_of_sums)
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def clipped_sums(
    bp: Pairs,
    max_norm: Any,
    weights: Array | None,
    scheme: Scheme,
    method: Method,
    size: int | None,
    n: int,
) -> tuple[PyTree, Bounded]:
    """The clipped sum, in float32 at least, and what is known besides."""

    def question(source: Source, weights: Array | None) -> tuple[Any, Any]:
        by_layer = scheme == "per_layer"
        if method == "materialise" and size is not None:
            source = WrittenOut(source)
        squares = source.ask(lambda pair: pair.square_norm(method), by_copy=by_layer)
        norms = root(summed(squares, source.n), weights)
        if by_layer:
            parts = OrderedDict(
                (path, root(v, weights)) for path, v in source.by_layer(squares).items()
            )
            bounds = _layer_bounds(source, parts, max_norm)
            over = functools.reduce(
                jnp.logical_or,
                [
                    jnp.any(~(v <= bounds[path].astype(v.dtype)), axis=tuple(range(v.ndim - 1)))
                    for path, v in parts.items()
                ],
                jnp.zeros(source.n, bool),
            )
            factors = {path: _share(_cap(v, bounds[path]), weights) for path, v in parts.items()}
            total = source.ask(
                lambda pair, own: pair.total(own), source.spread(factors), by_copy=True
            )
        else:
            over = ~(norms <= jnp.asarray(max_norm, norms.dtype))
            own = _share(_factors(norms, max_norm, scheme), weights)
            total = source.ask(lambda pair: pair.total(own))
        ahead = source.ahead
        seen = (None, None) if ahead is None else (ahead.losses, ahead.outputs)
        return (norms, over, *seen), total

    (norms, over, losses, outputs), sums = in_parts(bp, n, size, question, weights)
    there = jnp.ones(n, bool) if weights is None else weights != 0
    share = jnp.sum(over & there).astype(norms.dtype) / jnp.maximum(jnp.sum(there), 1).astype(
        norms.dtype
    )
    return sums, Bounded(norms, share, losses, outputs)


def _share(factors: Array, weights: Array | None) -> Array:
    """The factors times the weights; 0 where the factor is, whatever the weight."""
    found = times(weights, factors)
    return jnp.where(factors == 0, jnp.zeros((), found.dtype), found)


def _cap(norms: Array, bound: Any) -> Array:
    """min(1, bound / norms) less a few roundings; 0 where the norm is not finite."""
    bound = jnp.asarray(bound, norms.dtype) * (1 - 32 * jnp.finfo(norms.dtype).eps)
    capped = jnp.where(norms > bound, bound / jnp.where(norms > bound, norms, 1), 1)
    return jnp.where(jnp.isfinite(norms), capped, 0).astype(norms.dtype)


def _factors(norms: Array, max_norm: Any, scheme: Scheme) -> Array:
    """f_n, for schemes that look at the whole gradient."""
    cap = _cap(norms, max_norm)
    if scheme == "flat":
        return cap
    if scheme == "automatic":
        factors = jnp.asarray(max_norm, norms.dtype) / (norms + _STABILITY)
        within = (1 - 32 * jnp.finfo(norms.dtype).eps) * factors
        return jnp.where(jnp.isfinite(norms), within, 0).astype(norms.dtype)
    assert callable(scheme)
    factors = jnp.asarray(jax.vmap(scheme)(norms))  # one by one: no example sees another's
    if factors.shape != norms.shape:
        raise ValueError(
            f"a clipping scheme makes one factor of one norm, not the shape {factors.shape[1:]}"
        )
    # A factor above 1 may be within the bound, but not where the norm is next to nothing: its
    # square may have vanished in rounding.
    info = jnp.finfo(norms.dtype)
    bound = jnp.asarray(max_norm, norms.dtype) * (1 - 32 * info.eps)
    long = norms > 1024 * float(info.tiny) ** 0.5
    most = jnp.where(long, bound / jnp.where(long, norms, 1), 1)
    most = jnp.where(cap == 0, 0, most).astype(norms.dtype)
    factors = jnp.where(jnp.isfinite(factors), factors, 0).astype(norms.dtype)
    return jnp.clip(factors, -most, most)


def _layer_bounds(source: Source, parts: Any, max_norm: Any) -> dict[str, Array]:
    """C_l of every layer by path, with the axes of its copies and one for the examples."""
    shapes = {path: v.shape[:-1] for path, v in parts.items()}
    names = {  # of the copies of each layer, in the order of its axes; none if it is frozen
        path: list(source.shown({path: jnp.zeros(shape)})) for path, shape in shapes.items()
    }
    every = {name for own in names.values() for name in own}
    if isinstance(max_norm, Mapping):
        missing, odd = sorted(every - set(max_norm)), sorted(set(max_norm) - every)
        if missing or odd:
            raise ValueError(
                f"max_norm needs a bound for every layer that learns; missing: "
                f"{', '.join(missing) or 'none'}; not a layer: {', '.join(odd) or 'none'}"
            )

    def bound(path: str) -> Array:
        shape = (*shapes[path], 1)
        if not isinstance(max_norm, Mapping) or not names[path]:
            each = 1.0 if isinstance(max_norm, Mapping) else max_norm
            return jnp.full(shape, jnp.asarray(each) / math.sqrt(max(len(every), 1)))
        own = [jnp.asarray(max_norm[name], float) for name in names[path]]
        return jnp.stack(own).reshape(shape)

    return {path: bound(path) for path in shapes}


def _towards_zero(g: Array, like: Any) -> Array:
    """A sum in the dtype of its parameter; no entry grows by the rounding."""
    found = g.astype(like.dtype)
    if jnp.finfo(like.dtype).bits >= jnp.finfo(g.dtype).bits:
        return found
    grown = jnp.abs(found.astype(g.dtype)) > jnp.abs(g)
    return jnp.where(grown, jnp.nextafter(found, jnp.zeros((), like.dtype)), found)


def check_bounds(max_norm: Any, scheme: Any) -> Any:
    """The bound or bounds; raises where gradients cannot be clipped so."""
    if scheme not in _SCHEMES and not callable(scheme):
        raise ValueError(
            f"scheme must be one of {', '.join(map(repr, _SCHEMES))}, or a function of the norms, "
            f"not {scheme!r}"
        )
    if isinstance(max_norm, Mapping):
        if scheme != "per_layer":
            raise ValueError('a max_norm for each layer needs scheme="per_layer"')
        for path, bound in max_norm.items():
            check_positive(f"max_norm[{path!r}]", bound)
        return dict(max_norm)
    check_positive("max_norm", max_norm)
    return max_norm


def check_positive(name: str, value: Any) -> None:
    """Raise unless it is one positive, finite number; traced, it is taken as it is."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be one number, not of shape {jnp.shape(value)}")
    if not isinstance(value, jax.core.Tracer) and not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")
