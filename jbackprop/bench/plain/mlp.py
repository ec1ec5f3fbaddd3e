"""Deep multilayer perceptrons, all layers of one width, under autodiff.

Parameters: {"w": (depth, width, width), "b": (depth, width)}, the layers stacked.
Cost: the mean over the batch of |a - y|^2 / 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

Function = Callable[..., Any]


def gelu(z: Array) -> Array:
    """z Phi(z) by erf: XLA compiles it to faster code than `jax.nn.gelu`, which takes erfc."""
    return 0.5 * z * (1 + lax.erf(z * 0.5**0.5))


def exact_gelu(z: Array) -> Array:
    """The same function as `jax.nn` has it."""
    return jax.nn.gelu(z, approximate=False)


ACTIVATIONS: dict[str, Function] = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "jnp.maximum": lambda z: jnp.maximum(z, 0),
    "gelu": gelu,
    "jax.nn.gelu": exact_gelu,
}


def _dense(x: Array, p: Any) -> Array:
    return x @ p["w"] + p["b"]


def _error(a: Array, y: Array) -> Array:
    return 0.5 * jnp.sum((a - y) ** 2) / a.shape[0]


def _body(activation: str, before: bool, name: bool = False) -> Function:
    """One layer, with its activation behind or before Dense: (a, params) -> (a, None)."""
    f = ACTIVATIONS[activation]

    def behind(a: Array, p: Any) -> tuple[Array, None]:
        z = _dense(a, p)
        return f(checkpoint_name(z, "z") if name else z), None

    def ahead(z: Array, p: Any) -> tuple[Array, None]:
        a = f(z)
        return _dense(checkpoint_name(a, "a") if name else a, p), None

    return ahead if before else behind


def scanned(
    activation: str,
    before: bool = False,
    checkpoint: bool = False,
    policy: Any = None,
    unroll: int = 1,
) -> Function:
    """A `lax.scan` over the layers, plainly or with `jax.checkpoint` around one layer."""
    body = _body(activation, before, name=policy is not None)
    if checkpoint:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)

    def cost(params: Any, x: Array, y: Array) -> Array:
        return _error(lax.scan(body, x, params, unroll=unroll)[0], y)

    return jax.value_and_grad(cost)


def shifted(activation: str, checkpoint: bool = True, policy: Any = None) -> Function:
    """(Dense, f) n times as Dense, (f, Dense) n - 1 times, f.

    The activation comes first in the checkpointed body, so that only net inputs are kept, and the
    matmul of the redo is dead code. Parameters: {"first": of one layer, "rest": stacked}.
    """
    f = ACTIVATIONS[activation]
    body = _body(activation, before=True, name=policy is not None)
    if checkpoint:
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)

    def cost(params: Any, x: Array, y: Array) -> Array:
        z = lax.scan(body, _dense(x, params["first"]), params["rest"])[0]
        return _error(f(z), y)

    return jax.value_and_grad(cost)


def split_first(params: Any) -> Any:
    """The parameters that `shifted` takes."""
    first = jax.tree.map(lambda p: p[0], params)
    return {"first": first, "rest": jax.tree.map(lambda p: p[1:], params)}


def join_first(grads: Any) -> Any:
    """The reverse of `split_first`."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), grads["first"], grads["rest"])


def grouped(activation: str, size: int, before: bool = False, inner: bool = True) -> Function:
    """A scan over groups of layers, each group checkpointed: square-root checkpointing."""
    body = _body(activation, before)
    if inner:
        body = jax.checkpoint(body, prevent_cse=False)

    def group(a: Array, p: Any) -> tuple[Array, None]:
        return lax.scan(body, a, p)[0], None

    outer = jax.checkpoint(group, prevent_cse=False)

    def cost(params: Any, x: Array, y: Array) -> Array:
        groups = jax.tree.map(lambda p: p.reshape(-1, size, *p.shape[1:]), params)
        return _error(lax.scan(outer, x, groups)[0], y)

    return jax.value_and_grad(cost)


def unrolled(activation: str, before: bool = False, checkpoint: bool = False) -> Function:
    """A Python loop over the layers. Parameters: a tuple with those of each layer."""
    body = _body(activation, before)
    if checkpoint:
        body = jax.checkpoint(body)

    def cost(params: Any, x: Array, y: Array) -> Array:
        for p in params:
            x, _ = body(x, p)
        return _error(x, y)

    return jax.value_and_grad(cost)


def unstack(params: Any) -> Any:
    """The parameters that `unrolled` takes."""
    depth = len(jax.tree.leaves(params)[0])
    return tuple(jax.tree.map(lambda p, i=i: p[i], params) for i in range(depth))


def stack(grads: Any) -> Any:
    """The reverse of `unstack`."""
    return jax.tree.map(lambda *g: jnp.stack(g), *grads)


def chunked(
    activation: str, chunks: int, before: bool = False, checkpoint: bool = True
) -> Function:
    """Parts of the batch one after the other, their gradients added up."""
    whole = scanned(activation, before, checkpoint)

    def both(params: Any, x: Array, y: Array) -> Any:
        parts = jax.tree.map(lambda d: d.reshape(chunks, -1, *d.shape[1:]), (x, y))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, whole(params, *part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.tree.map(lambda t: t / chunks, lax.scan(add, zero, parts)[0])

    return both
