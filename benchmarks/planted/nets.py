"""Functions to be differentiated, each with its gradient derived by hand: networks.

The keyword arguments of a gradient are the parts it is made of. `planted` puts a wrong part in the
place of a right one, which is how wrong gradients come about: all the rest of them is right.

Everything here runs in any floating-point dtype and promotes nothing: the data are NumPy arrays in
float64, to be cast.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Tree = Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function of args, its gradient with respect to args[0] by hand, and the args."""

    name: str
    fun: Callable[..., Any]
    grad: Callable[..., Tree]
    args: tuple[Any, ...]


def normal(seed: int, *shapes: tuple[int, ...], scale: float = 1.0) -> Any:
    """Random arrays of these shapes, or the one."""
    draw = np.random.default_rng(seed)
    arrays = [scale * draw.normal(size=shape) for shape in shapes]
    return arrays[0] if len(arrays) == 1 else arrays


def _hot(seed: int, number: int, classes: int) -> np.ndarray:
    return np.eye(classes)[np.random.default_rng(seed).integers(0, classes, number)]


def like(v: Array, to: Array) -> Array:
    """v over all leading axes of `to`: broadcasting that strict rank promotion allows."""
    return jnp.broadcast_to(v, to.shape)


def rows(x: Array) -> Array:
    """All leading axes as one."""
    return jnp.reshape(x, (-1, x.shape[-1]))


# Networks of dense layers: z = a W + b, a = f(z). One layer is regression.


def half_square(z: Array, y: Array) -> Array:
    """Delta z - y."""
    return 0.5 * jnp.sum(jnp.square(z - y))


def log_loss(z: Array, y: Array) -> Array:
    """Delta sigmoid(z) - y."""
    return jnp.sum(jax.nn.softplus(z) - y * z)


def cross_entropy(z: Array, y: Array) -> Array:
    """Delta softmax(z) - y."""
    return -jnp.sum(y * jax.nn.log_softmax(z))


def identity(z: Array) -> Array:
    """The output of half_square."""
    return z


def tanh_slope(z: Array) -> Array:
    """1 - tanh(z)^2."""
    return 1 - jnp.square(jnp.tanh(z))


def sigmoid_slope(z: Array) -> Array:
    """s (1 - s)."""
    s = jax.nn.sigmoid(z)
    return s * (1 - s)


def step(z: Array) -> Array:
    """Relu' with 0 at 0."""
    return (z > 0).astype(z.dtype)


TANH = (jnp.tanh, tanh_slope)
SIGMOID = (jax.nn.sigmoid, sigmoid_slope)
RELU = (jax.nn.relu, step)


@dataclasses.dataclass(frozen=True)
class Net:
    """cost(z) of the last layer's z over the number of rows (1 if not mean)."""

    activation: tuple[Callable[[Array], Array], Callable[[Array], Array]]
    cost: Callable[[Array, Array], Array]
    output: Callable[[Array], Array]
    mean: bool = True

    def sweep(self, params: Tree, x: Array) -> tuple[list[Array], list[Array]]:
        """Net inputs z, and what came into each layer."""
        zs, inputs = [], [x]
        for p in params:
            z = inputs[-1] @ p["w"]
            zs.append(z + like(p["b"], z))
            inputs.append(self.activation[0](zs[-1]))
        return zs, inputs

    def __call__(self, params: Tree, x: Array, y: Array) -> Array:
        return self.cost(self.sweep(params, x)[0][-1], y) / self.divisor(x)

    def divisor(self, x: Array) -> int:
        """The number of rows."""
        return math.prod(x.shape[:-1]) if self.mean else 1

    def grad(
        self,
        params: Tree,
        x: Array,
        y: Array,
        *,
        delta: Callable[[Array, Array], Array] = lambda o, y: o - y,
        slope: Callable[[Tree, int], Array] | None = None,
        back: Callable[[Array, Array], Array] = lambda delta, w: delta @ w.T,
        outer: Callable[[Array, Array], Array] = lambda a, delta: rows(a).T @ rows(delta),
        bias: Callable[[Array], Array] = lambda delta: jnp.sum(rows(delta), axis=0),
    ) -> Tree:
        """Backpropagation, made of its parts; slope(zs, l) is f' of layer l."""
        slope = slope or (lambda zs, l: self.activation[1](zs[l]))
        zs, inputs = self.sweep(params, x)
        d = delta(self.output(zs[-1]), y) / self.divisor(x)
        grads: list[Tree] = []
        for l in reversed(range(len(params))):
            grads.insert(0, {"b": bias(d), "w": outer(inputs[l], d)})
            if l:
                d = back(d, params[l]["w"]) * slope(zs, l - 1)
        return grads


def dense_params(seed: int, *sizes: int, bias: float = 0.3) -> Tree:
    """Weights of variance 1/p and biases, layer by layer."""
    draw = np.random.default_rng(seed)
    return [
        {"b": bias * draw.normal(size=q), "w": draw.normal(size=(p, q)) / math.sqrt(p)}
        for p, q in itertools.pairwise(sizes)
    ]


def net_problem(
    name: str, net: Net, sizes: tuple[int, ...], lead: tuple[int, ...], bias: float = 0.3
) -> Problem:
    """A network of these sizes at inputs of the shape (*lead, sizes[0])."""
    x = normal(1, (*lead, sizes[0]))
    y = normal(2, (*lead, sizes[-1]))
    if net.cost is cross_entropy:
        y = _hot(2, math.prod(lead), sizes[-1]).reshape(*lead, -1)
    elif net.cost is log_loss:
        y = (y > 0).astype(float)
    return Problem(name, net, net.grad, (dense_params(len(sizes), *sizes, bias=bias), x, y))


SQUARED = (half_square, identity)
_LOG, _CROSS = (log_loss, jax.nn.sigmoid), (cross_entropy, jax.nn.softmax)
LINEAR = net_problem("linear regression", Net(TANH, *SQUARED), (5, 3), (7,))
LOGISTIC = net_problem("logistic regression", Net(TANH, *_LOG), (4, 1), (9,))
SOFTMAX = net_problem("softmax layer", Net(TANH, *_CROSS), (6, 4), (8,))
SOFTMAX_SUM = net_problem("softmax layer, sum", Net(TANH, *_CROSS, mean=False), (6, 4), (8,))
SOFTMAX_SQUARE = net_problem("softmax layer 5x5", Net(TANH, *_CROSS), (5, 5), (8,))
TANH_NET = net_problem("tanh network", Net(TANH, *SQUARED), (5, 6, 6, 6, 2), (10,))
TANH_SUM = net_problem("tanh network, sum", Net(TANH, *_CROSS, mean=False), (4, 5, 5, 3), (10,))
SIGMOID_NET = net_problem("sigmoid network", Net(SIGMOID, *_LOG), (3, 5, 5, 1), (8,))
RELU_NET = net_problem("relu network", Net(RELU, *_CROSS), (6, 8, 8, 3), (12,))
TOKENS = net_problem("dense over positions", Net(TANH, *SQUARED), (4, 5, 3), (3, 6))
DEEP = net_problem("thirty layers", Net(TANH, *_CROSS), (5,) * 31, (6,))
ONE = net_problem("one weight", Net(TANH, *SQUARED), (1, 1), (1,))
WIDE = net_problem("softmax layer 1000x100", Net(TANH, *_CROSS), (1000, 100), (4,))


def with_decay(problem: Problem, strength: float) -> Problem:
    """The same with strength/2 times the squares of all weights, biases left out."""

    def fun(params: Tree, *rest: Any) -> Array:
        return problem.fun(params, *rest) + 0.5 * strength * sum(
            jnp.sum(jnp.square(p["w"])) for p in params
        )

    def grad(params: Tree, *rest: Any, decay: float = strength) -> Tree:
        found = problem.grad(params, *rest)
        return [{"b": g["b"], "w": g["w"] + decay * p["w"]} for g, p in zip(found, params)]  # noqa: B905

    return Problem(f"{problem.name} with weight decay", fun, grad, problem.args)


DECAY = with_decay(SOFTMAX, 0.1)
DECAY_NET = with_decay(TANH_NET, 0.01)

NETS = (
    LINEAR,
    LOGISTIC,
    SOFTMAX,
    SOFTMAX_SUM,
    SOFTMAX_SQUARE,
    TANH_NET,
    TANH_SUM,
    SIGMOID_NET,
    RELU_NET,
    TOKENS,
    DEEP,
    ONE,
    WIDE,
    DECAY,
    DECAY_NET,
)
