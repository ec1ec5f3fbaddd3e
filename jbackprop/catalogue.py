"""Every public rule with sizes to try: the table that all properties are tested from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop import check, layers, losses
from jbackprop.compose import Sequential, mlp
from jbackprop.losses import Loss
from jbackprop.sweep import Layer, Node, Trace, forward


def _cubic(z: Array) -> Array:
    return z * z * z


def _cubic_slope(z: Array) -> Array:
    return 3 * z * z


def _bilinear(params: Any, x: Array) -> Array:
    return jnp.tanh(x @ params["u"]) * (x @ params["v"])


def _bilinear_params(key: Array) -> Any:
    u, v = jax.random.normal(key, (2, 6, 4))
    return {"u": u, "v": v}


Inputs = tuple[int, ...] | Callable[[Array, int], Any]

LAYERS: tuple[tuple[Node, Inputs], ...] = (
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
"""A layer or composite, and the shape of one example's input; or (key, batch) -> a mini-batch."""

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
    """One rule, and a network and a mini-batch that try it. Arrays are made when they are asked for.

    Attributes:
        name: of the rule and what it is tried on.
        rule: the layer, the composite or the loss that is tried.
        net: the layer or the composite, with one array as its output; behind a loss, an MLP.
        loss: the loss, for which the net's outputs are net inputs.
        inputs: as in `LAYERS`.
        targets: as in `LOSSES`; None for random numbers of the outputs' shape.
        seed: of parameters, inputs and targets.
        batch: how many examples.
    """

    name: str
    rule: Node | Loss
    net: Node
    loss: Loss
    inputs: Inputs
    targets: Targets | None
    seed: int
    batch: int

    @functools.cached_property
    def params(self) -> Any:
        """The parameters of the net."""
        return self.net.init(jax.random.key(self.seed))

    @functools.cached_property
    def x(self) -> Any:
        """The mini-batch."""
        if callable(self.inputs):
            return self.inputs(jax.random.key(self.seed + 1), self.batch)
        return _normal(self.seed + 1, (self.batch, *self.inputs))

    @functools.cached_property
    def y(self) -> Any:
        """The targets."""
        shape = jax.eval_shape(functools.partial(_outputs, self.net), self.params, self.x).shape
        if self.targets is None:
            return _normal(self.seed + 2, shape)
        return self.targets(jax.random.key(self.seed + 2), shape)

    @property
    def key(self) -> Array | None:
        """The key for what draws; None where nothing does."""
        return jax.random.key(self.seed + 3) if self.net.draws else None

    def check(self, dtype: Any = None, truth: Any = "both") -> check.Report:
        """`check.network`; `check.layer` for what has no deltas of single examples."""
        if self.net.couples_examples:
            return check.layer(self.net, x=self.x, params=self.params, dtype=dtype, truth=truth)
        return check.network(self.net, self.loss, self.params, self.x, self.y, dtype, truth)


def cases(batch: int = 7) -> list[Case]:
    """One case for every rule: the layer alone under squared error, the loss behind an MLP."""
    found = []
    for i, (layer, inputs) in enumerate(LAYERS):
        x = _shapes(inputs, batch)
        name = f"{layer} on {_described(x)}"
        net = layer if _gives_an_array(layer, x) else Sequential(layer, _Line())
        found.append(Case(name, layer, net, losses.SquaredError(), inputs, None, 10 * i, batch))
    for i, (loss, targets, output) in enumerate(LOSSES):
        net = mlp([4, 5, 3], layers.Tanh(), output)
        name = f"{loss}, {targets.__name__[1:]}" + (f" behind {output}" if output else "")
        found.append(Case(name, loss, net, loss, (4,), targets, 10 * i + 5, batch))
    return found


@dataclasses.dataclass(frozen=True)
class _Line(Layer):
    """A tree of arrays as one line of numbers, so that a cost can be put behind it."""

    def init(self, key: Array) -> tuple[()]:
        return ()

    def forward(self, params: Any, x: Any, key: Array | None = None) -> tuple[Array, Any]:
        leaves, tree = jax.tree.flatten(x)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        return jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), _Form(tree, shapes)

    def backward(self, params: Any, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        form, parts, start = trace.saved, [], 0
        for shape, dtype in form.shapes:
            size = int(np.prod(shape))
            parts.append(delta[start : start + size].reshape(shape).astype(dtype))
            start += size
        return jax.tree.unflatten(form.tree, parts), ()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Form:
    tree: Any
    shapes: Any


def _shapes(inputs: Inputs, batch: int) -> Any:
    """The shapes of a mini-batch."""
    if callable(inputs):
        return jax.eval_shape(lambda key: inputs(key, batch), jax.random.key(0))
    return jax.ShapeDtypeStruct((batch, *inputs), jnp.result_type(float))


def _described(x: Any) -> str:
    """The shapes of one example, with the dtypes that are no float."""
    if isinstance(x, tuple):
        return ", ".join(map(_described, x))
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return f"{x.shape[1:]}" if floating else f"{x.dtype}{list(x.shape[1:])}"


def _gives_an_array(layer: Node, x: Any) -> bool:
    params = jax.eval_shape(layer.init, jax.random.key(0))
    y = jax.eval_shape(functools.partial(_outputs, layer), params, x)
    return isinstance(y, jax.ShapeDtypeStruct)


def _normal(seed: int, shape: tuple[int, ...]) -> Array:
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.result_type(float))


def _outputs(net: Node, params: Any, x: Any) -> Any:
    return forward(net, params, x)[0]
