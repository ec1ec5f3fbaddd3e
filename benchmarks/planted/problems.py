"""Functions to be differentiated, each with its gradient derived by hand: all but networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from planted.nets import Problem, Tree, half_square, like, normal, tanh_slope

# Elementwise functions: sum_i c_i f(x_i).


def elementwise(
    name: str,
    f: Callable[[Array], Array],
    slope: Callable[[Array], Array],
    size: tuple[int, ...] = (40,),
    scale: float = 1.0,
) -> Problem:
    """f and f' with weights c of both signs."""

    def fun(x: Array, c: Array) -> Array:
        return jnp.sum(c * f(x))

    def grad(x: Array, c: Array, *, slope: Callable[[Array], Array] = slope) -> Array:
        return c * slope(x)

    x, c = normal(3, size, size)
    return Problem(name, fun, grad, (scale * x, c))


def swish_slope(z: Array) -> Array:
    """s + z s (1 - s)."""
    s = jax.nn.sigmoid(z)
    return s + z * s * (1 - s)


def normal_cdf(z: Array) -> Array:
    """Phi(z)."""
    return 0.5 * (1 + lax.erf(z * math.sqrt(0.5)))


def gelu_slope(z: Array) -> Array:
    """Phi(z) + z phi(z)."""
    return normal_cdf(z) + z * jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def inside(z: Array) -> Array:
    """The derivative of clip(z, -1, 1)."""
    return (jnp.abs(z) < 1).astype(z.dtype)


SWISH = elementwise("swish", jax.nn.silu, swish_slope)
GELU = elementwise("gelu", lambda z: z * normal_cdf(z), gelu_slope)
SOFTPLUS = elementwise("softplus", jax.nn.softplus, jax.nn.sigmoid)
CLIP = elementwise("clip", lambda z: jnp.clip(z, -1, 1), inside)
HUBER = elementwise(
    "huber",
    lambda z: jnp.where(jnp.abs(z) < 1, 0.5 * z * z, jnp.abs(z) - 0.5),
    lambda z: jnp.clip(z, -1, 1),
)
CUBE = elementwise("cube", lambda z: z * z * z, lambda z: 3 * z * z, (4, 5))
SINE = elementwise("sine of 100,000", jnp.sin, jnp.cos, (100_000,))
SINES = elementwise("sine of 100 x 1,000", jnp.sin, jnp.cos, (100, 1000))


# Normalisation: y = g (x - m) / s + b with the statistics over one axis, cost sum (y - t)^2 / 2.


@dataclasses.dataclass(frozen=True)
class Norm:
    """Layer norm over axis 1, batch norm over axis 0; without a mean it is RMS norm."""

    axis: int
    centred: bool = True

    def parts(self, p: Tree) -> tuple[Array, Array]:
        """n = (x - m) / s, and s."""
        x = p["x"]
        mean = jnp.mean(x, axis=self.axis, keepdims=True) if self.centred else jnp.zeros_like(x)
        s = jnp.sqrt(jnp.mean(jnp.square(x - mean), axis=self.axis, keepdims=True) + 1e-3)
        return (x - mean) / s, s

    def __call__(self, p: Tree, t: Array) -> Array:
        n, _ = self.parts(p)
        return half_square(n * like(p["gain"], n) + like(p["shift"], n), t)

    def grad(self, p: Tree, t: Array, *, mean: float = 1.0, variance: float = 1.0) -> Tree:
        """dx = (dn - mean dn - n mean(n dn)) / s; the means are the statistics' derivatives."""
        n, s = self.parts(p)
        d = n * like(p["gain"], n) + like(p["shift"], n) - t
        dn = d * like(p["gain"], n)
        of_mean = jnp.mean(dn, axis=self.axis, keepdims=True) if self.centred else 0.0
        of_variance = n * jnp.mean(n * dn, axis=self.axis, keepdims=True)
        dx = (dn - mean * of_mean - variance * of_variance) / s
        return {"gain": jnp.sum(d * n, axis=0), "shift": jnp.sum(d, axis=0), "x": dx}


def _norm_problem(name: str, norm: Norm) -> Problem:
    gain, shift, x, t = normal(4, (8,), (8,), (6, 8), (6, 8))
    return Problem(name, norm, norm.grad, ({"gain": 1 + 0.3 * gain, "shift": shift, "x": x}, t))


LAYER_NORM = _norm_problem("layer norm", Norm(1))
BATCH_NORM = _norm_problem("batch norm", Norm(0))
RMS_NORM = _norm_problem("rms norm", Norm(1, centred=False))


# Attention of one head: o = softmax(q k^T / sqrt d) v, cost sum_t c o.


def attend(p: Tree, x: Array) -> tuple[Array, Array, Array, Array]:
    """Query, key, value, weights."""
    q, k, v = (x @ p[name] for name in ("query", "key", "value"))
    return q, k, v, jax.nn.softmax(q @ k.T / math.sqrt(k.shape[1]))


def attention(p: Tree, x: Array, c: Array) -> Array:
    """The cost."""
    *_, v, a = attend(p, x)
    return jnp.sum(c * (a @ v))


def attention_grad(
    p: Tree,
    x: Array,
    c: Array,
    *,
    softmax: Callable[[Array, Array], Array] = lambda a, da: (
        a * (da - jnp.sum(a * da, axis=1, keepdims=True))
    ),
    scale: Callable[[int], float] = lambda d: 1 / math.sqrt(d),
) -> Tree:
    """ds = (da through the softmax) / sqrt d; dq = ds k, dk = ds^T q."""
    q, k, v, a = attend(p, x)
    ds = softmax(a, c @ v.T) * scale(k.shape[1])
    return {"key": x.T @ (ds.T @ q), "query": x.T @ (ds @ k), "value": x.T @ (a.T @ c)}


_heads = dict(zip(("key", "query", "value"), normal(5, *[(6, 6)] * 3, scale=0.5), strict=True))
ATTENTION = Problem("attention", attention, attention_grad, (_heads, *normal(6, (5, 6), (5, 6))))


# Convolution: y_bto = sum_si x_b,t+s,i k_sio, cost sum c tanh(y).


def _windows(x: Array, width: int) -> Array:
    """(B, T, i) -> (B, T - width + 1, width, i)."""
    return jnp.stack([x[:, s : x.shape[1] - width + 1 + s] for s in range(width)], axis=2)


def convolution(k: Array, x: Array, c: Array) -> Array:
    """The cost as a function of the kernel."""
    return jnp.sum(c * jnp.tanh(jnp.einsum("btsi,sio->bto", _windows(x, k.shape[0]), k)))


def convolution_grad(k: Array, x: Array, c: Array) -> Array:
    """dk_sio = sum_bt x_b,t+s,i delta_bto."""
    w = _windows(x, k.shape[0])
    return jnp.einsum("btsi,bto->sio", w, c * tanh_slope(jnp.einsum("btsi,sio->bto", w, k)))


def convolution_input_grad(
    x: Array, k: Array, c: Array, *, turn: Callable[[Array], Array] = lambda k: k[::-1]
) -> Array:
    """dx is the delta, padded, convolved with the kernel turned round."""
    n = k.shape[0]
    delta = c * tanh_slope(jnp.einsum("btsi,sio->bto", _windows(x, n), k))
    padded = jnp.pad(delta, ((0, 0), (n - 1, n - 1), (0, 0)))
    return jnp.einsum("btso,sio->bti", _windows(padded, n), turn(k))


_kernel, _signal, _c = normal(7, (3, 3, 3), (4, 9, 3), (4, 7, 3))
CONVOLUTION = Problem("convolution", convolution, convolution_grad, (_kernel, _signal, _c))
CONVOLUTION_INPUT = Problem(
    "convolution, its input",
    lambda x, k, c: convolution(k, x, c),
    convolution_input_grad,
    (_signal, _kernel, _c),
)


def image_convolution(k: Array, x: Array, c: Array) -> Array:
    """Two axes: x (B, H, W, i), k (s, t, i, o), cost sum c y^2 / 2."""
    return 0.5 * jnp.sum(c * jnp.square(jnp.einsum("bhwsti,stio->bhwo", _patches(x, k), k)))


def image_convolution_grad(k: Array, x: Array, c: Array) -> Array:
    """dk = sum of patch (outer) c y."""
    patches = _patches(x, k)
    y = jnp.einsum("bhwsti,stio->bhwo", patches, k)
    return jnp.einsum("bhwsti,bhwo->stio", patches, c * y)


def _patches(x: Array, k: Array) -> Array:
    n, (h, w) = k.shape[0], (x.shape[1] - k.shape[0] + 1, x.shape[2] - k.shape[1] + 1)
    tall = [[x[:, s : s + h, t : t + w] for t in range(k.shape[1])] for s in range(n)]
    return jnp.stack([jnp.stack(line, axis=3) for line in tall], axis=3)


IMAGE = Problem(
    "convolution of images",
    image_convolution,
    image_convolution_grad,
    tuple(normal(8, (3, 3, 2, 2), (2, 5, 6, 2), (2, 3, 4, 2))),
)


# A recurrent network: h_t = tanh(x_t W + h_{t-1} U + b), cost sum c h_T.


def recurrent(p: Tree, x: Array, c: Array) -> Array:
    """x (T, B, p), by a scan."""

    def tick(h: Array, x: Array) -> tuple[Array, None]:
        z = x @ p["w"] + h @ p["u"]
        return jnp.tanh(z + like(p["b"], z)), None

    return jnp.sum(c * lax.scan(tick, jnp.zeros_like(c), x)[0])


def recurrent_grad(
    p: Tree,
    x: Array,
    c: Array,
    *,
    steps: Callable[[int], int] = lambda t: t,
    back: Callable[[Array], Array] = lambda u: u.T,
) -> Tree:
    """Backpropagation through time over the last steps(T) of the T steps."""
    states = [jnp.zeros_like(c)]
    for x_t in x:
        z = x_t @ p["w"] + states[-1] @ p["u"]
        states.append(jnp.tanh(z + like(p["b"], z)))
    g, dh = jax.tree.map(jnp.zeros_like, p), c
    for t in reversed(range(len(x) - steps(len(x)), len(x))):
        d = dh * (1 - jnp.square(states[t + 1]))
        new = {"b": jnp.sum(d, axis=0), "u": states[t].T @ d, "w": x[t].T @ d}
        g, dh = jax.tree.map(jnp.add, g, new), d @ back(p["u"])
    return g


_u, _w, _b = normal(9, (4, 4), (3, 4), (4,), scale=0.6)
RECURRENT = Problem(
    "recurrent network",
    recurrent,
    recurrent_grad,
    ({"b": _b, "u": _u, "w": _w}, *normal(10, (6, 5, 3), (5, 4))),
)


# An embedding with repeated ids: cost sum_b |mean_t E[id_bt] - y_b|^2 / 2.


def embedding(table: Array, ids: Array, y: Array) -> Array:
    """The cost."""
    return half_square(jnp.mean(table[ids], axis=1), y)


def embedding_grad(table: Array, ids: Array, y: Array, *, repeated: str = "add") -> Array:
    """Rows of the delta added where their ids point."""
    delta = (jnp.mean(table[ids], axis=1) - y) / ids.shape[1]
    each = jnp.broadcast_to(delta[:, None], (*ids.shape, table.shape[1]))
    return getattr(jnp.zeros_like(table).at[ids], repeated)(each)


_ids = np.array([[0, 3, 3, 1], [5, 0, 0, 2], [1, 1, 1, 1]], "int32")
_table, _y = normal(11, (7, 3), (3, 3))
EMBEDDING = Problem("embedding", embedding, embedding_grad, (_table, _ids, _y))


PROBLEMS = (
    SWISH, GELU, SOFTPLUS, CLIP, HUBER, CUBE, SINE, SINES, LAYER_NORM, BATCH_NORM, RMS_NORM,
    ATTENTION, CONVOLUTION, CONVOLUTION_INPUT, IMAGE, RECURRENT, EMBEDDING,
)  # fmt: skip
