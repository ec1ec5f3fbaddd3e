"""The networks that questions beyond the gradient are asked of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jbackprop as jb
from jbackprop.bench.declare import same
from jbackprop.bench.plain import conv, perceptron
from jbackprop.bench.plain.transformer import Arrangement, Sizes, model
from jbackprop.bench.suite import convolution, flops
from jbackprop.bench.suite.transformer import Order, model_data

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One network at one batch size.

    Attributes:
        name: "mlp", "cnn", "transformer" or "classifier".
        data: -> params in the layout of `plain`, x, y; made when they are asked for.
        plain: (params, x, y) -> (mean cost, gradient), in plain JAX.
        net: the same network of ours.
        pack, unpack: from the parameters of `plain` to those of `net`, and back for gradients.
        task: what the peers outside call it.
        flops: of a value and gradient, on paper.
    """

    name: str
    data: Callable[[], tuple[Any, ...]]
    plain: Function
    net: Any
    pack: Function
    unpack: Function
    task: str
    flops: float


def mlp(batch: int) -> Problem:
    """784-1024-1024-1024-10, relu."""
    sizes = (784, 1024, 1024, 1024, 10)
    data, plain = functools.partial(perceptron.data, sizes, batch), perceptron.plain("relu")
    net = jb.mlp(sizes, jb.Relu())
    return Problem("mlp", data, plain, net, same, same, "mlp relu", flops.mlp(sizes, batch))


def cnn(batch: int) -> Problem:
    """Images 28x28x1, two stages of 32 and 64 channels, and a Dense."""
    shape, channels = (28, 28, 1), (32, 64)
    data = functools.partial(convolution.data, shape, channels, batch)
    ours, net = convolution.ours(shape, channels)[0], jb.cnn(shape, channels, convolution.CLASSES)
    # pooled by a reshape: reduce_window's gradient takes nearly twice as long on a CPU
    plain = conv.network("reshape")
    counted = flops.cnn(shape, channels, convolution.CLASSES, batch)
    return Problem("cnn", data, plain, net, ours.pack, ours.unpack, "cnn", counted)


def transformer(batch: int) -> Problem:
    """Six blocks of width 128, 4 heads, 64 positions, a vocabulary of 64."""
    sizes = Sizes(128, 6, 4, 64, batch)
    net: Any = jb.transformer(sizes.vocab, sizes.width, sizes.depth, sizes.heads, sizes.length)
    return _of_blocks("transformer", sizes, net)


def classifier(batch: int) -> Problem:
    """The same blocks, and ten classes from the mean over positions."""
    sizes = Sizes(128, 6, 4, 64, batch, classes=10)
    whole: Any = jb.transformer(sizes.vocab, sizes.width, sizes.depth, sizes.heads, sizes.length)
    net = jb.Sequential(
        *whole.layers[:-1], jb.GlobalAveragePool(), jb.Dense(sizes.width, sizes.classes)
    )
    return _of_blocks("classifier", sizes, net)


def _of_blocks(name: str, sizes: Sizes, net: Any) -> Problem:
    """The classes come from one row for each example, the language model's from every position."""
    rows = sizes.batch if sizes.classes else sizes.batch * sizes.length
    outputs = sizes.classes or sizes.vocab
    of = sizes.depth, sizes.batch, sizes.length, sizes.width
    counted = flops.transformer(*of, outputs, rows)
    data, order, plain = (
        functools.partial(model_data, sizes),
        Order(net),
        model(Arrangement(), sizes),
    )
    return Problem(name, data, plain, net, order.pack, order.unpack, name, counted)
