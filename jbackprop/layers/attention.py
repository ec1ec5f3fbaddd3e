"""Scaled dot-product attention, in blocks of queries."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.checks import check_flags, check_numbers, check_sizes
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers.checks import check_floating, check_no_params, shown
from jbackprop.layers.weightless import Weightless
from jbackprop.sweep import Trace

WHOLE, PART = 256, 64
"""Without a block given: as many queries are worked on at once, and if there are more, so many."""

GROUPS = 4
"""How many loops a causal layer is parted into: each reads the keys up to its last query only."""


@dataclasses.dataclass(frozen=True)
class Attention(Weightless):
    """Scaled dot-product attention: every query gets a mean of the values, weighted by its keys.

    Equation, for one example and one head, with queries q_t (t = 1..T), keys k_s and values v_s
    (s = 1..S), and r running over the s that t may attend to:

        z_ts = scale q_t . k_s                                    scores
        p_ts = e^{z_ts} / sum_r e^{z_tr},  0 where t may not attend to s
        y_t  = sum_s p_ts v_s

    x is a tuple (q, k, v) or (q, k, v, mask), nested in any way that keeps this order, of arrays

        q (T, heads d)   k (S, kv_heads d)   v (S, kv_heads d_v)   ->   y (T, heads d_v)
        mask (S,) or (T, S), bool: True where the key is there (for this query), False for padding

    in which the heads lie side by side on the last axis. Query head h reads key and value head
    h // (heads / kv_heads). t may attend to s where the mask is True and, if causal, s <= t. For a
    query that may attend to nothing y_t = 0, and it has no part in any gradient.

    Derivation. Let delta_t = dC/dy_t. v_s reaches the cost through all y_t, with the factors p_ts,

        dC/dv_s  = sum_t p_ts delta_t

    and so do the probabilities of one t, through y_t:

        g_ts     = dC/dp_ts = delta_t . v_s

    The row t of p is a softmax, dp_tr/dz_ts = p_tr ([r = s] - p_ts), and its delta rule is

        e_ts     = dC/dz_ts = sum_r g_tr p_tr ([r = s] - p_ts) = p_ts (g_ts - sum_r p_tr g_tr)

    A score is linear in its query and in its key:

        dC/dq_t  = scale sum_s e_ts k_s
        dC/dk_s  = scale sum_t e_ts q_t

    Query heads that share a key head are more queries of that head: the sums over t run over them.
    A constant added to all scores of a query changes nothing, sum_s e_ts = 0: so a bias on all keys
    has no gradient.

    The mean of g_ts in that bracket is one number for each query, and there without any p:

        sum_r p_tr g_tr = delta_t . sum_r p_tr v_r = delta_t . y_t

    What is kept is the largest score m_t and n_t = sum_r e^{z_tr - m_t}, two more numbers for each
    query and head; their logsumexp, m_t + log n_t, would lose n_t beside a large m_t. The way back
    makes p_ts = e^{z_ts - m_t} / n_t again. Both ways run over blocks of queries, so that with T >
    block there is never an array of T x S numbers. They hold scores as (S, queries): in this form
    every product runs along contiguous memory.

    A mask keeps a value out by the factor 0: where padding holds NaN, so does y.

    Source: Vaswani et al., Attention is all you need (2017), equation 1; in blocks: Rabe and
    Staats, Self-attention does not need O(n^2) memory (2021), and Dao et al., FlashAttention
    (2022), section 3.1 and appendix B.2; groups of heads: Ainslie et al., GQA (2023).

    Attributes:
        heads: the number of query heads.
        kv_heads: the number of key and value heads, a divisor of `heads`; None for as many.
        causal: whether a query attends to its own position and those before it only.
        block: how many queries are worked on at a time; it need not divide T. None for all of them
            up to 256, and 64 at a time where there are more.
        scale: the factor of the scores; None for 1 / sqrt(d).

    Raises:
        ValueError: sizes below 1; kv_heads that does not divide heads; a scale that is no positive
            number; inputs that do not fit; as many queries as not keys, where causal.
        TypeError: queries, keys or values that are not floating-point numbers of one dtype; a mask
            that is not bool; a flag that is none.
    """

    heads: int
    kv_heads: int | None = None
    causal: bool = False
    block: int | None = None
    scale: float | None = None

    reads: ClassVar[tuple[str, ...]] = ("x", "y")

    def __post_init__(self) -> None:
        given = (name for name in ("kv_heads", "block") if getattr(self, name) is not None)
        check_sizes(self, "heads", *given)
        check_flags(self, "causal")
        if self.heads % (self.kv_heads or 1):
            raise ValueError(
                f"Attention: {self.kv_heads} key and value heads cannot be shared by {self.heads} "
                "query heads evenly; kv_heads must divide heads"
            )
        if self.scale is not None:
            check_numbers(self, "scale", above=0)

    def __repr__(self) -> str:
        return shown(self, "heads")

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Array, Any]:
        check_no_params(self, params)
        it = self._heads(x)
        v = it.v.transpose(0, 2, 1)

        def block(at: Any, size: int, end: int, done: tuple[()]) -> tuple[tuple[()], Any]:
            z = it.scores(_part(it.q, at, size, 2), at, end)
            top = lax.stop_gradient(jnp.max(z, axis=1, keepdims=True))
            if it.mask is not None:  # a row of -inf alone
                top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
            e = jnp.exp(z - top)
            n = jnp.sum(e, axis=1, keepdims=True)
            if it.mask is not None:
                n = jnp.where(n == 0, jnp.ones_like(n), n)
            y = _dot(v[:, :, :end], 2, e.astype(v.dtype), 1) / n
            return done, (it.rows(y.astype(v.dtype), size), it.rows(top, size), it.rows(n, size))

        _, (y, *l) = self._over_blocks(it, block, ())
        return y, tuple(l)

    def backward(self, params: PyTree, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        it = self._heads(trace.x)
        heads, groups, T, d = it.q.shape
        wide = wide_dtype(it.q.dtype)
        # float16 has no room for the small deltas of scores of long sequences
        dtype = wide if it.k.dtype == jnp.float16 else it.k.dtype
        mean = delta.astype(wide) * trace.y.astype(wide)
        mean = jnp.sum(mean.reshape(T, heads, groups, -1), axis=3).transpose(1, 2, 0)
        top, n = (l.reshape(T, heads, groups).transpose(1, 2, 0) for l in trace.saved)
        delta = delta.reshape(T, heads, groups, -1).transpose(1, 2, 0, 3)
        k = it.k.transpose(0, 2, 1)

        def block(at: Any, size: int, end: int, done: tuple[Array, Array]) -> tuple[Any, Array]:
            q, d = _part(it.q, at, size, 2), _flat(_part(delta, at, size, 2))
            z = it.scores(q, at, end)
            own = (_part(l, at, size, 2).reshape(heads, 1, -1) for l in (top, n))
            p = jnp.exp(z - next(own)) / next(own)
            g = _dot(it.v[:, :end], 2, d, 2) - _part(mean, at, size, 2).reshape(heads, 1, -1)
            e = (p * g).astype(dtype)
            dk = done[0] + _dot(e, 2, _flat(q).astype(dtype), 1)
            dv = done[1] + _dot(p.astype(k.dtype), 2, d, 1)
            return (dk, dv), it.rows(_dot(k[:, :, :end].astype(dtype), 2, e, 1), size)

        zeros = tuple(jnp.zeros(a.shape, wide) for a in (it.k, it.v))
        (dk, dv), dq = self._over_blocks(it, block, zeros)
        deltas = (
            it.scale * dq,
            (it.scale * dk).transpose(1, 0, 2).reshape(-1, heads * d),
            dv.transpose(1, 0, 2).reshape(len(dv[0]), -1),
        )
        own = [delta.astype(k.dtype) for delta in deltas]
        none = [None] * (it.mask is not None)
        return jax.tree.unflatten(jax.tree.structure(trace.x), own + none), ()

    def _over_blocks(self, it: _Heads, block: Callable[..., Any], done: Any) -> Any:
        """The sums over all blocks of queries, and what the blocks give, one below the other.

        block(first query, how many, keys that they may need, sums so far) -> (sums, its own). From
        the last block to the first: where causal, the keys at the end are done with soon, and the
        sums (key heads, S, ...) get shorter.
        """
        T, S = it.q.shape[2], it.k.shape[1]
        block_size = self.block or (T if T <= WHOLE else PART)
        ends: list[Any] = []
        found: list[Any] = []
        for start, count, size in reversed(_runs(T, block_size, GROUPS if self.causal else 1)):
            end = start + count * size if self.causal else S
            if found and self.causal:
                ends.append(jax.tree.map(lambda a, end=end: a[:, end:], done))
                done = jax.tree.map(lambda a, end=end: a[:, :end], done)
            if count == 1:
                done, own = block(start, size, end, done)
            else:
                first = jnp.arange(start, start + count * size, size, dtype=jnp.int32)
                of_run = functools.partial(_swapped, block, size, end)
                done, own = lax.scan(of_run, done, first)
                own = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), own)
            found.append(own)
        return _join(1, [*ends, done]), _join(0, found)

    def _heads(self, x: Any) -> _Heads:
        """The checked input, heads in front."""
        arrays = jax.tree.leaves(x)
        if not isinstance(x, tuple) or len(arrays) not in (3, 4):
            raise ValueError(
                f"{self} needs a tuple (q, k, v) or (q, k, v, mask), not "
                f"{jax.tree.map(jnp.shape, x)}"
            )
        q, k, v = arrays[:3]
        mask = arrays[3] if len(arrays) == 4 else None
        for array in (q, k, v):
            check_floating(self, array)
        if not q.dtype == k.dtype == v.dtype:
            raise TypeError(f"{self} needs one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
        if mask is not None and mask.dtype != jnp.bool_:
            raise TypeError(f"{self} needs a mask of bool, not {mask.dtype}: use mask.astype(bool)")
        kv_heads = self.kv_heads or self.heads
        if (
            [q.ndim, k.ndim, v.ndim] != [2, 2, 2]
            or 0 in q.shape + k.shape + v.shape
            or q.shape[1] % self.heads
            or k.shape[1] != q.shape[1] // self.heads * kv_heads
            or v.shape[1] % kv_heads
            or len(k) != len(v)
            or (self.causal and len(q) != len(k))
            or (mask is not None and mask.shape not in ((len(k),), (len(q), len(k))))
        ):
            T = "S" if self.causal else "T"
            raise ValueError(
                f"{self} needs q ({T}, {self.heads} d), k (S, {kv_heads} d), v (S, {kv_heads} d_v) "
                f"and, if there is one, a mask (S,) or ({T}, S), none of them empty, but one "
                f"example has the shapes {', '.join(str(a.shape) for a in arrays)}"
            )
        d = q.shape[1] // self.heads
        return _Heads(
            q.reshape(len(q), kv_heads, -1, d).transpose(1, 2, 0, 3),
            k.reshape(len(k), kv_heads, d).transpose(1, 0, 2),
            v.reshape(len(v), kv_heads, -1).transpose(1, 0, 2),
            mask,
            self.causal,
            d**-0.5 if self.scale is None else self.scale,
        )


class _Heads(NamedTuple):
    """One example, heads first: q (key heads, groups, T, d), k (key heads, S, d), v (.., S, d_v).

    The groups are the query heads that share a key head.
    """

    q: Array
    k: Array
    v: Array
    mask: Array | None
    causal: bool
    scale: float

    def scores(self, q: Array, at: Any, end: int) -> Array:
        """Scores of queries from `at` on with the keys before `end`: (key heads, end, queries)."""
        z = self.scale * _dot(self.k[:, :end], 2, _flat(q), 2)
        heads, groups, size, _ = q.shape
        may = None
        if self.causal:
            s = lax.broadcasted_iota(jnp.int32, (end, size), 0)
            may = s <= at + lax.broadcasted_iota(jnp.int32, (end, size), 1)
        if self.mask is not None:
            mask = self.mask[..., :end]
            mask = _part(mask, at, size, 0).T if mask.ndim == 2 else mask[:, None]
            may = mask if may is None else may & jnp.broadcast_to(mask, may.shape)
        if may is None:
            return z
        z = z.reshape(heads, end, groups, size)
        z = jnp.where(jnp.broadcast_to(may[None, :, None], z.shape), z, jnp.full_like(z, -jnp.inf))
        return z.reshape(heads, end, groups * size)

    def rows(self, a: Array, size: int) -> Array:
        """(key heads, features, groups size) -> (size, heads features): as y and q have it."""
        heads, groups = self.q.shape[:2]
        return a.reshape(heads, -1, groups, size).transpose(3, 0, 2, 1).reshape(size, -1)


def _dot(a: Array, i: int, b: Array, j: int) -> Array:
    """The product of every head: the sum over the axis i of a and j of b, in float32 at least."""
    return lax.dot_general(
        a, b, (((i,), (j,)), ((0,), (0,))), preferred_element_type=wide_dtype(a.dtype)
    )


def _flat(a: Array) -> Array:
    """(key heads, groups, queries, d) -> (key heads, groups queries, d)."""
    return a.reshape(len(a), -1, a.shape[-1])


def _part(a: Array, at: Any, size: int, axis: int) -> Array:
    return a if a.shape[axis] == size else lax.dynamic_slice_in_dim(a, at, size, axis)


def _swapped(block: Callable[..., Any], size: int, end: int, done: Any, at: Array) -> Any:
    return block(at, size, end, done)


def _join(axis: int, parts: list[Any]) -> Any:
    """Trees of arrays as one, the last of them first."""
    return jax.tree.map(lambda *a: jnp.concatenate(a[::-1], axis) if a[1:] else a[0], *parts)


def _runs(n: int, block: int, groups: int) -> list[tuple[int, int, int]]:
    """The blocks of n positions as (start, how many, size): loops of equal blocks, and the rest.

    A loop has two blocks or more where there are so many: blocks that no loop keeps apart the
    compiler runs side by side, and their arrays are all there at once.
    """
    full, rest = divmod(n, block)
    loops = max(1, min(groups, full // 2))
    ends = [full * i // loops for i in range(loops + 1)]
    runs = [(a * block, b - a, block) for a, b in itertools.pairwise(ends) if b > a]
    return runs + [(full * block, 1, rest)] * (rest > 0)
