"""The transformer blocks of `plain.transformer` in Flax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.bench.plain.mlp import gelu
from jbackprop.bench.plain.transformer import Sizes


class _Block(nn.Module):
    sizes: Sizes

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        D = self.sizes.width
        a = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        attention = nn.MultiHeadDotProductAttention(self.sizes.heads, name="attention")
        h = x + attention(a, mask=mask)
        a = nn.Dense(4 * D, name="up")(nn.LayerNorm(epsilon=1e-5, name="norm2")(h))
        return h + nn.Dense(D, name="down")(gelu(a)), None


def scanned(sizes: Sizes, checkpoint: bool = False) -> Callable[..., Any]:
    """`nn.scan` over the blocks, or over `nn.remat` of a block."""
    layer = nn.remat(_Block, prevent_cse=False) if checkpoint else _Block
    stack = nn.scan(
        layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=sizes.depth
    )(sizes)

    def cost(params: Any, x: Array, y: Array) -> Array:
        a, _ = stack.apply({"params": params}, x, None)
        return 0.5 * jnp.sum((a - y) ** 2) / (y.shape[0] * y.shape[1])

    return jax.value_and_grad(cost)


def pack(sizes: Sizes) -> Callable[[Any], Any]:
    """From the parameters of `plain.transformer`'s blocks."""
    n, D, H = sizes.depth, sizes.width, sizes.heads

    def norm(p: Any) -> Any:
        return {"scale": p["scale"], "bias": p["shift"]}

    def dense(p: Any) -> Any:
        return {"kernel": p["w"], "bias": p["b"]}

    def pack(p: Any) -> Any:
        w = p["qkv"]["w"].reshape(n, D, 3, H, D // H)
        b = p["qkv"]["b"].reshape(n, 3, H, D // H)
        attention: dict[str, Any] = {
            name: {"kernel": w[:, :, i], "bias": b[:, i]}
            for i, name in enumerate(("query", "key", "value"))
        }
        out = p["proj"]["w"].reshape(n, H, D // H, D)
        attention["out"] = {"kernel": out, "bias": p["proj"]["b"]}
        return {
            "norm1": norm(p["norm1"]), "norm2": norm(p["norm2"]), "attention": attention,
            "up": dense(p["up"]), "down": dense(p["down"]),
        }  # fmt: skip

    return pack


def unpack(sizes: Sizes) -> Callable[[Any], Any]:
    """The reverse of `pack`."""
    n, D = sizes.depth, sizes.width

    def norm(g: Any) -> Any:
        return {"scale": g["scale"], "shift": g["bias"]}

    def dense(g: Any) -> Any:
        return {"w": g["kernel"], "b": g["bias"]}

    def unpack(g: Any) -> Any:
        a = g["attention"]
        parts = [a[name] for name in ("query", "key", "value")]
        qkv = {
            "w": jnp.concatenate([p["kernel"].reshape(n, D, D) for p in parts], axis=-1),
            "b": jnp.concatenate([p["bias"].reshape(n, D) for p in parts], axis=-1),
        }
        proj = {"w": a["out"]["kernel"].reshape(n, D, D), "b": a["out"]["bias"]}
        return {
            "norm1": norm(g["norm1"]), "norm2": norm(g["norm2"]), "qkv": qkv, "proj": proj,
            "up": dense(g["up"]), "down": dense(g["down"]),
        }  # fmt: skip

    return unpack
