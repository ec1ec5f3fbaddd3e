"""Every public rule with sizes to try: the table that all properties are tested from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop import layers, losses
from jbackprop.compose import Sequential, mlp
from jbackprop.losses import Loss
from jbackprop.sweep import Node, forward


def _cubic(z: Array) -> Array:
    return z * z * z


def _cubic_slope(z: Array) -> Array:
    return 3 * z * z


def _bilinear(params: Any, x: Array) -> Array:
    return jnp.tanh(x @ params["u"]) * (x @ params["v"])


def _bilinear_params(key: Array) -> Any:
    u, v = jax.random.normal(key, (2, 6, 4))
    return {"u": u, "v": v}


LAYERS: tuple[tuple[Node, tuple[int, ...]], ...] = (
    (layers.Dense(6, 4), (6,)),
    (layers.Dense(6, 4, bias=False), (6,)),
    (layers.Dense(1, 1), (1,)),
    (layers.Dense(6, 4), (3, 6)),
    (layers.Dense(5, 2), (2, 3, 5)),
    (layers.Identity(), (5,)),
    (layers.Sigmoid(), (5,)),
    (layers.Tanh(), (5,)),
    (layers.Relu(), (5,)),
    (layers.LeakyRelu(), (5,)),
    (layers.LeakyRelu(0.3), (5,)),
    (layers.Elu(), (5,)),
    (layers.Elu(0.5), (5,)),
    (layers.Selu(), (5,)),
    (layers.Celu(), (5,)),
    (layers.Celu(0.7), (5,)),
    (layers.Softplus(), (5,)),
    (layers.Softsign(), (5,)),
    (layers.Silu(), (5,)),
    (layers.Gelu(), (5,)),
    (layers.Gelu(tanh=True), (5,)),
    (layers.Mish(), (5,)),
    (layers.HardTanh(), (5,)),
    (layers.Softmax(), (5,)),
    (layers.Softmax(), (2, 3)),
    (layers.Activation(_cubic, _cubic_slope), (5,)),
    (layers.Autodiff(_bilinear, _bilinear_params), (6,)),
    (Sequential(layers.Dense(6, 3), layers.Sigmoid(), layers.Dense(3, 2)), (6,)),
    (Sequential(layers.Tanh(), Sequential(layers.Dense(4, 3), layers.Gelu())), (4,)),
    (mlp([6, 5, 4, 3], [layers.Relu(), layers.Selu()], layers.Softmax()), (6,)),
)
"""A layer or composite, and the shape of one example's input."""

Targets = Callable[[Array, tuple[int, ...]], Array]


def _real(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape)


def _probabilities(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape)


def _bits(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.bernoulli(key, shape=shape).astype(float)


def _counts(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.poisson(key, 2.0, shape).astype(float)


def _labels(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.randint(key, shape[:-1], 0, shape[-1])


def _distributions(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.nn.softmax(jax.random.normal(key, shape), axis=-1)


_WEIGHTS = (0.5, 1.0, 2.0)

LOSSES: tuple[tuple[Loss, Targets, Node | None], ...] = (
    (losses.SquaredError(), _real, None),
    (losses.SigmoidCrossEntropy(), _bits, None),
    (losses.SigmoidCrossEntropy(), _probabilities, None),
    (losses.SoftmaxCrossEntropy(), _labels, None),
    (losses.SoftmaxCrossEntropy(), _distributions, None),
    (losses.SoftmaxCrossEntropy(label_smoothing=0.1), _labels, None),
    (losses.SoftmaxCrossEntropy(class_weights=_WEIGHTS), _labels, None),
    (losses.SoftmaxCrossEntropy(class_weights=_WEIGHTS), _distributions, None),
    (losses.SoftmaxCrossEntropy(ignore_index=1), _labels, None),
    (
        losses.SoftmaxCrossEntropy(label_smoothing=0.2, class_weights=_WEIGHTS, ignore_index=0),
        _labels,
        None,
    ),
    (losses.PoissonNLL(), _counts, None),
    (losses.Huber(), _real, None),
    (losses.Huber(0.3), _real, None),
    (losses.CrossEntropy(), _distributions, layers.Softmax()),
    (losses.SquaredError(), _bits, layers.Sigmoid()),
)
"""A loss for three outputs, its targets (key, shape of the outputs), and the layer it needs."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and a mini-batch that try one rule."""

    name: str
    net: Node
    loss: Loss
    params: Any
    x: Array
    y: Array


def cases(batch: int = 7) -> list[Case]:
    """One case for every rule: the layer alone under squared error, the loss behind an MLP."""
    found = []
    for i, (layer, shape) in enumerate(LAYERS):
        keys = jax.random.split(jax.random.key(i), 3)
        params = layer.init(keys[0])
        x = jax.random.normal(keys[1], (batch, *shape))
        outputs = jax.eval_shape(lambda p, x, net=layer: _outputs(net, p, x), params, x)
        y = jax.random.normal(keys[2], outputs.shape)
        found.append(Case(f"{layer} on {shape}", layer, losses.SquaredError(), params, x, y))
    for i, (loss, targets, output) in enumerate(LOSSES):
        keys = jax.random.split(jax.random.key(100 + i), 3)
        net = mlp([4, 5, 3], layers.Tanh(), output)
        x = jax.random.normal(keys[1], (batch, 4))
        name = f"{loss}, {targets.__name__[1:]}" + (f" behind {output}" if output else "")
        found.append(Case(name, net, loss, net.init(keys[0]), x, targets(keys[2], (batch, 3))))
    return found


def _outputs(net: Node, params: Any, x: Array) -> Any:
    return forward(net, params, x)[0]
