"""Every public rule with sizes to try: the table that all properties are tested from."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop import check, layers, losses
from jbackprop.compose import (
    Checkpoint,
    FanOut,
    Frozen,
    Parallel,
    Repeat,
    Reversible,
    Sequential,
    Skip,
    Tied,
    bidirectional,
    cnn,
    cross_attention,
    geglu,
    glu,
    lstm,
    mlp,
    multi_head_attention,
    resnet,
    swiglu,
    transformer,
)
from jbackprop.layers.weightless import Shapes, Weightless
from jbackprop.losses import Loss
from jbackprop.sweep import Node, Trace, forward


def _cubic(z: Array) -> Array:
    return z * z * z


def _cubic_slope(z: Array) -> Array:
    return 3 * z * z


def _bilinear(params: Any, x: Array) -> Array:
    return jnp.tanh(x @ params["u"]) * (x @ params["v"])


def _bilinear_params(key: Array) -> Any:
    u, v = 0.3 * jax.random.normal(key, (2, 6, 4))  # far from where tanh saturates
    return {"u": u, "v": v}


def _several(*given: Any) -> Any:
    """Arrays of these shapes for each example; the last two arguments are (key, batch)."""
    *shapes, key, batch = given
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, (batch, *s)) for k, s in zip(keys, shapes, strict=True))


def _ids(key: Array, batch: int) -> Array:
    return jax.random.randint(key, (batch, 6), 0, 5)


def _one_id(key: Array, batch: int) -> Array:
    return jax.random.randint(key, (batch,), 0, 4)


def _ids_and_numbers(key: Array, batch: int) -> Any:
    return _ids(key, batch), jax.random.normal(key, (batch, 2))


def _sequence_and_states(key: Array, batch: int) -> Any:
    x, h, c = (jax.random.normal(k, (batch, *s)) for k, s in
               zip(jax.random.split(key, 3), ((4, 3), (2,), (2,)), strict=True))  # fmt: skip
    return x, (h, c)


_gelu_dense = Sequential(layers.Gelu(), layers.Dense(3, 3))
_tanh_dense = Sequential(layers.Tanh(), layers.Dense(2, 2))


def _to_attend(shapes: Any, mask: tuple[int, ...], key: Array, batch: int) -> Any:
    """Arrays of these shapes and a mask, which leaves the first example without anything."""
    arrays = _several(*shapes, key, batch)
    there = jax.random.bernoulli(key, 0.6, (batch, *mask)).at[0].set(False)
    return *arrays, there


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
    (layers.RNN(3, 2), (4, 3)),
    (layers.RNN(2, 3, reverse=True, activation=layers.Gelu()), (3, 2)),
    (layers.LSTM(3, 4), (5, 3)),
    (layers.LSTM(1, 1, reverse=True, truncate=9), (2, 1)),
    (layers.LSTM(3, 2, states=True), _sequence_and_states),
    (layers.GRU(3, 2, reverse=True), (4, 3)),
    (bidirectional(layers.RNN(3, 2)), (3, 3)),
    (lstm(None, 3, 2, bidirectional=True, vocab=5), _ids),
    (layers.LayerNorm(5), (5,)),
    (layers.LayerNorm(4, scale=False, shift=False), (3, 4)),
    (layers.RMSNorm(5), (2, 5)),
    (layers.RMSNorm(4, epsilon=0.1, shift=True), (4,)),
    (layers.GroupNorm(2, 6), (3, 2, 6)),
    (layers.GroupNorm(1, 4, shift=False), (4,)),
    (layers.InstanceNorm(3), (4, 3)),
    (layers.BatchNorm(5), (5,)),
    (layers.BatchNorm(3, scale=False), (2, 2, 3)),
    (layers.Gain(5), (5,)),
    (layers.Gain(4, 0.1), (3, 4)),
    (layers.Affine(4), (3, 4)),
    (layers.Times(-0.5), (3,)),
    (layers.Add(), functools.partial(_several, (3,), (3,))),
    (layers.Multiply(), functools.partial(_several, (2, 3), (2, 3))),
    (layers.Multiply(), functools.partial(_several, (3,), (3,), (3,), (3,))),
    (layers.Concatenate(), functools.partial(_several, (2, 3), (2, 1))),
    (layers.Maximum(), functools.partial(_several, (3,), (3,), (3,))),
    (layers.Split(1, 3), (2, 4)),
    (layers.Select(1), _ids_and_numbers),
    (layers.Take(), (3, 2)),
    (layers.Take(0), (3, 2, 2)),
    (layers.Dropout(0.4), (5,)),
    (layers.Dropout(0), (5,)),
    (layers.Embedding(5, 3), _ids),
    (layers.Embedding(4, 2), _one_id),
    (layers.Positions(4, 3), (4, 3)),
    (layers.Positions(5, 2), (3, 2)),
    (layers.Conv(3, 2, (3, 2)), (4, 3, 3)),
    (layers.Conv(2, 4, (3,), stride=2, padding="VALID", dilation=2, groups=2), (9, 2)),
    (layers.Conv(3, 3, (2, 3), stride=(2, 1), padding=((2, 0), (0, 1)), groups=3), (4, 4, 3)),
    (layers.Conv(1, 2, (1, 1, 2), bias=False), (2, 1, 2, 1)),
    (layers.ConvTranspose(3, 2, (3, 2), stride=2), (2, 3, 3)),
    (layers.ConvTranspose(4, 2, (2,), stride=3, padding="VALID", groups=2), (3, 4)),
    (layers.MaxPool((2, 2)), (5, 4, 2)),
    (layers.MaxPool((3,), stride=2, padding="SAME"), (6, 2)),
    (layers.Attention(2), functools.partial(_several, (3, 6), (4, 6), (4, 4))),
    (
        layers.Attention(4, 2, causal=True, block=2),
        functools.partial(_several, (5, 8), (5, 4), (5, 4)),
    ),
    (layers.Attention(1, scale=0.7), functools.partial(_several, *[(1, 1)] * 3)),
    (
        layers.Attention(2, 1, block=2),
        functools.partial(_to_attend, ((3, 4), (4, 2), (4, 3)), (4,)),
    ),
    (
        layers.Attention(2, causal=True, block=1),
        functools.partial(_to_attend, ((5, 4), (5, 4), (5, 2)), (5, 5)),
    ),
    (layers.Rotary(2), (4, 8)),
    (layers.Rotary(1, base=10.0, interleaved=True), (3, 6)),
    (multi_head_attention(4, 2, causal=True, rotary=True), (3, 4)),
    (
        multi_head_attention(4, 2, 1, masked=True),
        functools.partial(_to_attend, ((3, 4),), (3,)),
    ),
    (cross_attention(4, 2, memory=3), functools.partial(_several, (2, 4), (3, 3))),
    (
        cross_attention(2, 1, masked=True, bias=False),
        functools.partial(_to_attend, ((2, 2), (3, 2)), (3,)),
    ),
    (glu(3, 2), (3,)),
    (swiglu(3, 4), (2, 3)),
    (geglu(3, 4, 2, bias=True), (3,)),
    (layers.AveragePool((2, 2)), (5, 4, 2)),
    (layers.AveragePool((3, 2), stride=(2, 1), padding="SAME"), (4, 3, 2)),
    (layers.GlobalAveragePool(), (3, 2, 4)),
    (layers.GlobalMaxPool(), (3, 2, 4)),
    (layers.Flatten(), (3, 2)),
    (layers.Reshape((2, -1)), (4, 3)),
    (layers.Upsample(2), (2, 3, 2)),
    (layers.Upsample((3, 1)), (2, 2, 2)),
    (Tied(layers.Embedding(5, 3), Sequential(layers.Dense(3, 2), layers.Dense(2, 3))), _ids),
    (Sequential(layers.Dense(6, 3), layers.Sigmoid(), layers.Dense(3, 2)), (6,)),
    (Sequential(layers.Tanh(), Sequential(layers.Dense(4, 3), layers.Gelu())), (4,)),
    (Skip(Sequential(layers.Dense(3, 3), layers.Tanh())), (3,)),
    (Skip(layers.Sigmoid(), layers.Dense(3, 3)), (2, 3)),
    (
        Sequential(
            FanOut(layers.Dense(3, 2), layers.Tanh(), layers.Dense(3, 2)),
            Parallel(layers.Sigmoid(), layers.Dense(3, 2), layers.Tanh()),
            layers.Multiply(),
        ),
        (3,),
    ),
    (Checkpoint(Sequential(layers.Gelu(), layers.Dense(3, 2), layers.Tanh())), (3,)),
    (Repeat(Sequential(layers.Dense(3, 3), layers.Tanh()), 4), (3,)),
    (Repeat(Skip(Checkpoint(_gelu_dense)), 5, checkpoint_every=2), (2, 3)),
    (Repeat(Repeat(_gelu_dense, 2), 2, checkpoint_every=1), (3,)),
    (Reversible(_gelu_dense, layers.Tanh()), (6,)),
    (Repeat(Reversible(layers.Dense(2, 2), _tanh_dense), 3), (4,)),
    (Sequential(layers.Dense(3, 2), Frozen(Sequential(layers.Tanh(), layers.Dense(2, 2)))), (3,)),
    (transformer(5, 4, 5, heads=2, length=6, kv_heads=1, hidden=3), _ids),
    (transformer(5, 4, 1, heads=2, length=6, hidden=3, rotary=True, tied=True), _ids),
    (cnn((5, 6, 1), (2, 3), 3, hidden=(4,), activation=layers.Tanh()), (5, 6, 1)),
    (resnet((4, 1), (2, 4), 1, 3, groups=2, activation=layers.Tanh()), (4, 1)),
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
    (losses.FusedSoftmaxCrossEntropy(), _labels, None),
    (
        losses.FusedSoftmaxCrossEntropy(
            0.2, _WEIGHTS, ignore_index=1, logit_cap=1.5, block=3, vocab_block=2
        ),
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
    """One rule, and a network and a mini-batch that try it. Arrays are made when asked for.

    Attributes:
        name: of the rule and what it is tried on.
        rule: the layer, the composite or the loss that is tried.
        net: the layer or the composite, with one array as its output; behind a loss, an MLP.
        loss: the loss, for which the net's outputs are net inputs.
        inputs: as in `LAYERS`.
        targets: as in `LOSSES`; None for random numbers of the outputs' shape.
        batch: how many examples.
    """

    name: str
    rule: Node | Loss
    net: Node
    loss: Loss
    inputs: Inputs
    targets: Targets | None
    batch: int

    @property
    def seed(self) -> int:
        """Its own, wherever it stands in the table."""
        return zlib.crc32(self.name.encode())

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
    for layer, inputs in LAYERS:
        x = _shapes(inputs, batch)
        name = f"{layer} on {_described(x)}"
        net = layer if _gives_an_array(layer, x) else Sequential(layer, _Line())
        if " at 0x" in name:
            raise ValueError(
                f"{name} is called otherwise in every process: give {type(layer).__name__} a "
                "__repr__ without addresses, as `shown` of layers/checks.py does"
            )
        found.append(Case(name, layer, net, losses.SquaredError(), inputs, None, batch))
    for loss, targets, output in LOSSES:
        net = mlp([4, 5, 3], layers.Tanh(), output)
        name = f"{loss}, {targets.__name__[1:]}" + (f" behind {output}" if output else "")
        found.append(Case(name, loss, net, loss, (4,), targets, batch))
    return found


@dataclasses.dataclass(frozen=True)
class _Line(Weightless):
    """A tree of arrays as one line of numbers, so that a cost can be put behind it."""

    def forward(self, params: Any, x: Any, key: Array | None = None) -> tuple[Array, Any]:
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(x)]), Shapes.of(x)

    def backward(self, params: Any, trace: Trace, delta: Array) -> tuple[Any, tuple[()]]:
        parts, start = [], 0
        for leaf in trace.saved.leaves:
            parts.append(delta[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            start += leaf.size
        return jax.tree.unflatten(trace.saved.tree, parts), ()


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
