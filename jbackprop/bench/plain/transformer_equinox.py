"""The transformer blocks of `plain.transformer` in Equinox."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.bench.plain.mlp import gelu
from jbackprop.bench.plain.transformer import Sizes


class _Equinox(eqx.Module):
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, sizes: Sizes, key: Array):
        D = sizes.width
        self.norm1, self.norm2 = eqx.nn.LayerNorm(D), eqx.nn.LayerNorm(D)
        self.attention = eqx.nn.MultiheadAttention(
            sizes.heads, D, use_query_bias=True, use_key_bias=True, use_value_bias=True,
            use_output_bias=True, key=key,
        )  # fmt: skip
        self.up = eqx.nn.Linear(D, 4 * D, key=key)
        self.down = eqx.nn.Linear(4 * D, D, key=key)

    def __call__(self, x: Array) -> Array:
        a = jax.vmap(self.norm1)(x)
        h = x + self.attention(a, a, a, mask=jnp.tril(jnp.ones((len(x), len(x)), bool)))
        a = jax.vmap(self.up)(jax.vmap(self.norm2)(h))
        return h + jax.vmap(self.down)(gelu(a))


def _stacked(sizes: Sizes) -> Any:
    make = eqx.filter_vmap(lambda key: _Equinox(sizes, key))
    return make(jax.random.split(jax.random.key(0), sizes.depth))


def scanned(sizes: Sizes, checkpoint: bool = False) -> Callable[..., Any]:
    """A scan over stacked blocks, each mapped over the batch as Equinox does it."""
    _, static = eqx.partition(_stacked(sizes), eqx.is_inexact_array)

    def body(x: Array, arrays: Any) -> tuple[Array, None]:
        return jax.vmap(eqx.combine(arrays, static))(x), None

    step = eqx.filter_checkpoint(body, prevent_cse=False) if checkpoint else body

    def cost(params: Any, x: Array, y: Array) -> Array:
        a, _ = lax.scan(step, x, params)
        return 0.5 * jnp.sum((a - y) ** 2) / (y.shape[0] * y.shape[1])

    return jax.value_and_grad(cost)


def _where(m: Any) -> list[Array]:
    a = m.attention
    linears = (a.query_proj, a.key_proj, a.value_proj, a.output_proj, m.up, m.down)
    norms = (m.norm1, m.norm2)
    return [getattr(n, name) for n in (*norms, *linears) for name in ("weight", "bias")]


def pack(sizes: Sizes) -> Callable[[Any], Any]:
    """From the parameters of `plain.transformer`'s blocks; each weight transposed."""

    def pack(p: Any) -> Any:
        arrays, _ = eqx.partition(_stacked(sizes), eqx.is_inexact_array)
        new = [p["norm1"]["scale"], p["norm1"]["shift"], p["norm2"]["scale"], p["norm2"]["shift"]]
        parts = zip(
            jnp.split(p["qkv"]["w"], 3, axis=2), jnp.split(p["qkv"]["b"], 3, axis=1), strict=True
        )
        for w, b in (*parts, *((p[n]["w"], p[n]["b"]) for n in ("proj", "up", "down"))):
            new += [jnp.swapaxes(w, 1, 2), b]
        return eqx.tree_at(_where, arrays, new)

    return pack


def unpack(g: Any) -> Any:
    """The reverse of `pack`."""
    found = _where(g)
    w = [jnp.swapaxes(a, 1, 2) for a in found[4::2]]
    b = found[5::2]
    dense = [{"w": x, "b": y} for x, y in zip(w, b, strict=True)]
    qkv = {name: jnp.concatenate([d[name] for d in dense[:3]], axis=-1) for name in ("w", "b")}
    return {
        "norm1": {"scale": found[0], "shift": found[1]},
        "norm2": {"scale": found[2], "shift": found[3]},
        "qkv": qkv, "proj": dense[3], "up": dense[4], "down": dense[5],
    }  # fmt: skip
