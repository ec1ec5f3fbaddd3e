"""Pre-norm transformer blocks, and the language model of them, under autodiff.

The block:  h = x + proj(attention(qkv(norm(x)))),  y = h + down(gelu(up(norm(h)))).

Parameters of the blocks, each with the depth in front: "norm1", "norm2" {"scale", "shift"},
"qkv" (D, 3 D), "proj" (D, D), "up" (D, 4 D), "down" (4 D, D), each {"w", "b"}. The model has
"tokens" (V, D), "positions" (T, D), "blocks", "norm" and "head" besides; its head is of the mean
over the positions where there are classes.

What can be saved by name in a block: qkv, probs is not, attended (before proj), middle (h),
up (before gelu), normed1, normed2, active (behind gelu).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jbackprop.bench.plain.attention import ATTEND
from jbackprop.bench.plain.mlp import ACTIVATIONS

POLICIES = jax.checkpoint_policies


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the blocks: width D, depth, heads, length T, batch B; vocabulary; and classes, or 0."""

    width: int
    depth: int
    heads: int
    length: int
    batch: int
    vocab: int = 64
    classes: int = 0

    def __str__(self) -> str:
        return f"width {self.width}, depth {self.depth}, T {self.length}, batch {self.batch}"


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How the blocks are written.

    Attributes:
        checkpoint: where `jax.checkpoint` stands: any of "block" (around each), "halves" (around
            attention and around the perceptron, with their norms), "parts" (around the pieces of
            a block that end in a matmul), "core" (around attention, norms and gelu alone) and
            "gelu".
        policy: of "block".
        names: what "block" saves.
        barrier: `prevent_cse` of "halves", "parts" and "gelu", which also keeps their redo
            from starting before its delta has come.
        flat: activations (B T, D), so that every matmul is two-dimensional.
        attend: which attention; see `plain.attention`.
        scanned: a `lax.scan` over the blocks, or a Python loop.
        unroll: blocks in one step of the scan.
        chunks: parts of the batch, one after the other, whose gradients are added up.
        pieces: parts of the batch inside each half, one after the other; "halves" only.
        gelu: which; see `plain.mlp`.
        fast_norm: the variance as E[x^2] - E[x]^2.
    """

    checkpoint: tuple[str, ...] = ()
    policy: Any = None
    names: tuple[str, ...] = ()
    barrier: bool = False
    flat: bool = True
    attend: str = "plain"
    scanned: bool = True
    unroll: int = 1
    chunks: int = 1
    pieces: int = 1
    gelu: str = "gelu"
    fast_norm: bool = False


def init_blocks(key: Array, sizes: Sizes) -> Any:
    """Random parameters of all blocks; every leaf differs from what would hide an error."""
    D, n = sizes.width, sizes.depth
    keys = iter(jax.random.split(key, 16))

    def dense(p: int, q: int) -> Any:
        w = jax.random.normal(next(keys), (n, p, q)) * p**-0.5
        return {"w": w, "b": 0.02 * jax.random.normal(next(keys), (n, q))}

    def norm() -> Any:
        scale = 1 + 0.1 * jax.random.normal(next(keys), (n, D))
        return {"scale": scale, "shift": 0.1 * jax.random.normal(next(keys), (n, D))}

    return {
        "norm1": norm(), "qkv": dense(D, 3 * D), "proj": dense(D, D),
        "norm2": norm(), "up": dense(D, 4 * D), "down": dense(4 * D, D),
    }  # fmt: skip


def init_model(key: Array, sizes: Sizes) -> Any:
    """Random parameters of the language model, or of the classifier."""
    keys = jax.random.split(key, 5)
    D, V = sizes.width, sizes.classes or sizes.vocab
    return {
        "tokens": jax.random.normal(keys[0], (sizes.vocab, D)),
        "positions": 0.1 * jax.random.normal(keys[1], (sizes.length, D)),
        "blocks": init_blocks(keys[2], sizes),
        "norm": {"scale": jnp.ones(D), "shift": jnp.zeros(D)},
        "head": {
            "w": jax.random.normal(keys[3], (D, V)) * D**-0.5,
            "b": 0.02 * jax.random.normal(keys[4], (V,)),
        },
    }


def _norm(x: Array, p: Any, fast: bool = False) -> Array:
    mean = x.mean(-1, keepdims=True)
    if fast:
        variance = (x * x).mean(-1, keepdims=True) - mean * mean
    else:
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * p["scale"] + p["shift"]


def _dense(x: Array, p: Any) -> Array:
    return x @ p["w"] + p["b"]


def _around(how: Arrangement, what: str) -> Callable[[Any], Any]:
    """`jax.checkpoint` where the arrangement has it."""
    if what not in how.checkpoint:
        return lambda f: f
    if what == "core":
        return jax.checkpoint
    return functools.partial(jax.checkpoint, prevent_cse=how.barrier)


def block(how: Arrangement, sizes: Sizes, x: Array, p: Any) -> Array:
    """One block, of activations (B, T, D) or (B T, D)."""
    D, H = sizes.width, sizes.heads
    attend, gelu = ATTEND[how.attend], ACTIVATIONS[how.gelu]
    core, part, half = (_around(how, what) for what in ("core", "parts", "halves"))
    active = _around(how, "gelu")(core(gelu))
    norm = core(functools.partial(_norm, fast=how.fast_norm))

    @core
    def attention(qkv: Array) -> Array:
        q, k, v = (a.reshape(-1, sizes.length, H, D // H) for a in jnp.split(qkv, 3, axis=-1))
        return attend(q, k, v).reshape(*qkv.shape[:-1], D)

    @part
    def into(x: Array, p: Any) -> Array:
        return _dense(checkpoint_name(norm(x, p["norm1"]), "normed1"), p["qkv"])

    @part
    def out(qkv: Array, p: Any) -> Array:
        return _dense(checkpoint_name(attention(qkv), "attended"), p["proj"])

    @part
    def up(h: Array, p: Any) -> Array:
        return _dense(checkpoint_name(norm(h, p["norm2"]), "normed2"), p["up"])

    @part
    def down(z: Array, p: Any) -> Array:
        return _dense(checkpoint_name(active(z), "active"), p["down"])

    @half
    def first(x: Array, p: Any) -> Array:
        return x + out(checkpoint_name(into(x, p), "qkv"), p)

    @half
    def second(h: Array, p: Any) -> Array:
        return h + down(checkpoint_name(up(h, p), "up"), p)

    def pieces(f: Callable[..., Array], x: Array) -> Array:
        if how.pieces == 1:
            return f(x, p)
        each = x.reshape(how.pieces, -1, *x.shape[1:])
        return lax.map(lambda x: f(x, p), each).reshape(x.shape)

    return pieces(second, checkpoint_name(pieces(first, x), "middle"))


def blocks(how: Arrangement, sizes: Sizes) -> Callable[..., Array]:
    """(parameters of the blocks, x (B, T, D)) -> (B, T, D)."""
    body: Callable[..., Array] = functools.partial(block, how, sizes)
    if "block" in how.checkpoint:
        policy = POLICIES.save_only_these_names(*how.names) if how.names else how.policy
        body = jax.checkpoint(body, policy=policy, prevent_cse=not how.scanned)

    def run(params: Any, x: Array) -> Array:
        shape = x.shape
        if how.flat:
            x = x.reshape(-1, shape[-1])
        if how.scanned:
            x, _ = lax.scan(lambda x, p: (body(x, p), None), x, params, unroll=how.unroll)
        else:
            for i in range(sizes.depth):
                x = body(x, jax.tree.map(lambda p, i=i: p[i], params))
        return x.reshape(shape)

    return run


def _chunked(both: Callable[..., Any], chunks: int) -> Callable[..., Any]:
    if chunks == 1:
        return both

    def summed(params: Any, *data: Array) -> Any:
        parts = jax.tree.map(lambda d: d.reshape(chunks, -1, *d.shape[1:]), data)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, both(params, *part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.tree.map(lambda t: t / chunks, lax.scan(add, zero, parts)[0])

    return summed


def blocks_alone(how: Arrangement, sizes: Sizes) -> Callable[..., Any]:
    """params, x, y -> (value, grads): squared error, the mean over batch and positions."""
    run = blocks(how, sizes)

    def cost(params: Any, x: Array, y: Array) -> Array:
        return 0.5 * jnp.sum((run(params, x) - y) ** 2) / (y.shape[0] * y.shape[1])

    return _chunked(jax.value_and_grad(cost), how.chunks)


def model(how: Arrangement, sizes: Sizes) -> Callable[..., Any]:
    """params, tokens (B, T), targets (B, T) or (B,) -> (value, grads): the mean cross-entropy."""
    run = blocks(how, sizes)

    def cost(params: Any, tokens: Array, targets: Array) -> Array:
        x = params["tokens"][tokens] + params["positions"]
        x = run(params["blocks"], x)
        x = _norm(x, params["norm"])
        z = _dense(x.mean(axis=1) if sizes.classes else x, params["head"])
        return optax.softmax_cross_entropy_with_integer_labels(z, targets).mean()

    return _chunked(jax.value_and_grad(cost), how.chunks)
