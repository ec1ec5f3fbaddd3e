"""Functions to be differentiated, each with its gradient derived by hand: all but networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from nets import Problem, Tree, half_square, like, normal, tanh_slope

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


# Sums of which some terms are left out.


def masked_mean(z: Array, y: Array, mask: Array) -> Array:
    """The mean of (z - y)^2 / 2 over the places that are not masked."""
    return 0.5 * jnp.sum(mask * jnp.square(z - y)) / jnp.sum(mask)


def masked_mean_grad(
    z: Array, y: Array, mask: Array, *, count: Callable[[Array], Any] = jnp.sum
) -> Array:
    """Over the number of places that count."""
    return mask * (z - y) / count(mask)


def dropout(p: Tree, x: Array, mask: Array, c: Array) -> Array:
    """A hidden layer of which a fixed mask drops half."""
    return jnp.sum(c * ((jnp.tanh(x @ p["w"]) * mask * 2) @ p["v"]))


def dropout_grad(
    p: Tree, x: Array, mask: Array, c: Array, *, drop: Callable[[Array], Array] = lambda mask: mask
) -> Tree:
    """The delta passes the mask on its way back."""
    z = x @ p["w"]
    delta = (c @ p["v"].T) * 2 * drop(mask) * tanh_slope(z)
    return {"v": (jnp.tanh(z) * mask * 2).T @ c, "w": x.T @ delta}


_mask = (normal(12, (6, 7)) > 0.2).astype(float)
MASKED = Problem("masked mean", masked_mean, masked_mean_grad, (*normal(13, (6, 7), (6, 7)), _mask))
_v, _w = normal(14, (7, 2), (3, 7))
_x, _c = normal(15, (6, 3), (6, 2))
DROPOUT = Problem("dropout", dropout, dropout_grad, ({"v": _v, "w": _w}, _x, _mask, _c))


# What else there is.


def _logsumexp(z: Array, c: Array) -> Array:
    return jnp.sum(c * jax.nn.logsumexp(z, axis=1))


def _logsumexp_grad(z: Array, c: Array, *, share: Callable[[Array], Array] = jax.nn.softmax) -> Any:
    return c[:, None] * share(z)


LOGSUMEXP = Problem("logsumexp", _logsumexp, _logsumexp_grad, tuple(normal(16, (5, 6), (5,))))


def _pool(x: Array, c: Array) -> Array:
    return jnp.sum(c * jnp.max(jnp.reshape(x, (-1, 4)), axis=1))


def _pool_grad(x: Array, c: Array, *, winner: Callable[..., Array] = jnp.argmax) -> Array:
    won = jax.nn.one_hot(winner(jnp.reshape(x, (-1, 4)), axis=1), 4, dtype=x.dtype)
    return jnp.reshape(c[:, None] * won, x.shape)


POOL = Problem("max pooling", _pool, _pool_grad, tuple(normal(17, (6, 8), (12,))))


def _log_determinant(a: Array) -> Array:
    return jnp.linalg.slogdet(a)[1]


LOG_DETERMINANT = Problem(
    "log determinant",
    _log_determinant,
    lambda a, *, turn=jnp.transpose: turn(jnp.linalg.inv(a)),
    (3 * np.eye(5) + normal(18, (5, 5)),),
)


def _heads_cost(w: Array, x: Array, y: Array) -> Array:
    return half_square(jnp.einsum("bp,hpd->bhd", x, w), y)


def _heads_grad(w: Array, x: Array, y: Array) -> Array:
    return jnp.einsum("bp,bhd->hpd", x, jnp.einsum("bp,hpd->bhd", x, w) - y)


HEADS = Problem("heads", _heads_cost, _heads_grad, tuple(normal(19, (4, 4, 4), (5, 4), (5, 4, 4))))


def _gated(p: Tree, c: Array) -> Array:
    return jnp.sum(c * p["value"] * jax.nn.sigmoid(p["gate"]))


def _gated_grad(
    p: Tree, c: Array, *, gate: Callable[..., Array] = lambda v, g: v * g * (1 - g)
) -> Any:
    g = jax.nn.sigmoid(p["gate"])
    return {"gate": c * gate(p["value"], g), "value": c * g}


_gate, _value, _c = normal(20, (4, 6), (4, 6), (4, 6))
GATED = Problem("gated unit", _gated, _gated_grad, ({"gate": _gate, "value": _value}, _c))


def _gaussian(p: Tree, y: Array) -> Array:
    e = (y - p["mean"]) * jnp.exp(-p["log_scale"])
    return jnp.mean(0.5 * e * e + p["log_scale"])


def _gaussian_grad(p: Tree, y: Array, *, log_term: float = 1.0) -> Any:
    s = jnp.exp(-p["log_scale"])
    e = (y - p["mean"]) * s
    return {"log_scale": (log_term - e * e) / y.size, "mean": -e * s / y.size}


_mean, _log_scale, _y = normal(21, (30,), (30,), (30,))
GAUSSIAN = Problem(
    "gaussian likelihood",
    _gaussian,
    _gaussian_grad,
    ({"log_scale": 0.3 * _log_scale, "mean": _mean}, _y),
)


def _tied(w: Array, x: Array) -> Array:
    return half_square(jnp.tanh(x @ w) @ w.T, x)


def _tied_grad(w: Array, x: Array, *, encoder: float = 1.0, decoder: float = 1.0) -> Array:
    z = x @ w
    delta = jnp.tanh(z) @ w.T - x
    return decoder * (delta.T @ jnp.tanh(z)) + encoder * (x.T @ ((delta @ w) * tanh_slope(z)))


TIED = Problem(
    "autoencoder with tied weights", _tied, _tied_grad, tuple(normal(22, (5, 3), (6, 5), scale=0.7))
)


def _residual(ws: Tree, x: Array, c: Array) -> Array:
    for w in ws:
        x = x + jnp.tanh(x @ w)
    return jnp.sum(c * x)


def _residual_grad(ws: Tree, x: Array, c: Array, *, skip: float = 1.0) -> Tree:
    inputs = [x]
    for w in ws:
        inputs.append(inputs[-1] + jnp.tanh(inputs[-1] @ w))
    grads: list[Array] = []
    for w, a in zip(reversed(ws), reversed(inputs[:-1]), strict=True):
        d = c * tanh_slope(a @ w)
        grads.insert(0, a.T @ d)
        c = skip * c + d @ w.T
    return grads


_ws = list(normal(23, *[(4, 4)] * 3, scale=0.5))
RESIDUAL = Problem(
    "residual network", _residual, _residual_grad, (_ws, *normal(24, (6, 4), (6, 4)))
)


def _cosine(v: Array, u: Array) -> Array:
    return jnp.dot(u, v) / jnp.sqrt(jnp.dot(v, v))


def _cosine_grad(v: Array, u: Array, *, length: float = 1.0) -> Array:
    n = jnp.sqrt(jnp.dot(v, v))
    return (u - length * v * jnp.dot(u, v) / (n * n)) / n


COSINE = Problem("cosine similarity", _cosine, _cosine_grad, tuple(normal(25, (12,), (12,))))

PROBLEMS = (
    SWISH,
    GELU,
    SOFTPLUS,
    CLIP,
    HUBER,
    CUBE,
    SINE,
    SINES,
    LAYER_NORM,
    BATCH_NORM,
    RMS_NORM,
    ATTENTION,
    CONVOLUTION,
    CONVOLUTION_INPUT,
    IMAGE,
    RECURRENT,
    EMBEDDING,
    MASKED,
    DROPOUT,
    LOGSUMEXP,
    POOL,
    LOG_DETERMINANT,
    HEADS,
    GATED,
    GAUSSIAN,
    TIED,
    RESIDUAL,
    COSINE,
)
