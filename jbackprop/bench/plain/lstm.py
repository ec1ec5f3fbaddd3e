"""One LSTM under autodiff, as a good engineer writes it.

Parameters: {"w_x": (p, 4q), "w_h": (q, 4q), "b": (4q,)}, gates in the order i, f, g, o.
Cost: the mean over the batch and over time of |h - y|^2 / 2.

The input matmul is hoisted out of the loop, the four gates are one matmul, time comes first inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

Function = Callable[..., Any]


def _error(h: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((h - y) ** 2) / (h.shape[0] * h.shape[1])


def _gates(state: tuple[Array, Array], z: Array) -> tuple[tuple[Array, Array], Array]:
    _, c = state
    i, f, g, o = jnp.split(checkpoint_name(z, "z"), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(checkpoint_name(c, "c"))
    return (h, c), h


def scanned(
    unroll: int = 1,
    checkpoint: bool = False,
    policy: Any = None,
    bias_inside: bool = False,
    blocks: int = 0,
    whole: bool = False,
) -> Function:
    """A `lax.scan` over time.

    Args:
        unroll: steps in one turn of the loop.
        checkpoint: put `jax.checkpoint` around a step.
        policy: what that saves.
        bias_inside: add the bias inside the loop, not to all of x W_x before it.
        blocks: put a second checkpoint around so many steps: square-root checkpointing.
        whole: no hoisting: (x_t, h) times both weights inside the loop.
    """

    def cost(params: Any, x: Array, y: Array) -> Array:
        n, steps, p = x.shape
        q = params["w_h"].shape[0]
        xs = jnp.swapaxes(x, 0, 1)

        def step(state: Any, z: Array) -> Any:
            if whole:
                return _gates(state, z @ params["w_x"] + state[0] @ params["w_h"] + params["b"])
            z = z + state[0] @ params["w_h"]
            return _gates(state, z + params["b"] if bias_inside else z)

        if not whole:
            z = xs.reshape(-1, p) @ params["w_x"]
            xs = (z if bias_inside else z + params["b"]).reshape(steps, n, 4 * q)
        body = jax.checkpoint(step, policy=policy, prevent_cse=False) if checkpoint else step
        zero = (jnp.zeros((n, q)), jnp.zeros((n, q)))
        if blocks:
            inner = jax.checkpoint(lambda s, z: lax.scan(body, s, z), prevent_cse=False)
            _, h = lax.scan(inner, zero, xs.reshape(-1, blocks, *xs.shape[1:]))
            h = h.reshape(steps, n, q)
        else:
            _, h = lax.scan(body, zero, xs, unroll=unroll)
        return _error(jnp.swapaxes(h, 0, 1), y)

    return jax.value_and_grad(cost)


def flax(width: int) -> Function:
    """Flax's `nn.RNN` of its `OptimizedLSTMCell`."""
    import flax.linen as nn

    model = nn.RNN(nn.OptimizedLSTMCell(width))

    def cost(params: Any, x: Array, y: Array) -> Array:
        h: Any = model.apply({"params": {"cell": params}}, x)
        return _error(h, y)

    return jax.value_and_grad(cost)


def to_flax(params: Any) -> Any:
    """The parameters as Flax's cell names them."""
    found: dict[str, Any] = {}
    gates = (jnp.split(params[k], 4, -1) for k in ("w_x", "w_h", "b"))
    for letter, *parts in zip("ifgo", *gates, strict=True):
        w_x, w_h, b = parts
        found |= {f"i{letter}": {"kernel": w_x}, f"h{letter}": {"kernel": w_h, "bias": b}}
    return found


def from_flax(grads: Any) -> Any:
    """The reverse of `to_flax`."""
    parts = {
        "w_x": [grads[f"i{g}"]["kernel"] for g in "ifgo"],
        "w_h": [grads[f"h{g}"]["kernel"] for g in "ifgo"],
        "b": [grads[f"h{g}"]["bias"] for g in "ifgo"],
    }
    return {name: jnp.concatenate(blocks, axis=-1) for name, blocks in parts.items()}
