"""How cost grows: series in one size, everything else as it is, with what theory says of them.

The exponents are of the limit of large sizes: small ones are bound by what a call costs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jbackprop as jb
from jbackprop.bench.declare import Contestant, Workload
from jbackprop.bench.plain import attention as plain_attention
from jbackprop.bench.plain import head, mlp, perceptron
from jbackprop.bench.suite import attention, deep, flops
from jbackprop.bench.suite import head as heads

BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
DEPTHS = (1, 4, 16, 64, 256)
WIDTHS = (16, 64, 256, 1024, 4096)
LENGTHS = (128, 512, 2048, 4096, 8192)
VOCABULARIES = (1024, 4096, 16384, 65536)

LINEAR = {"plain": (1.0, 1.0), "ours": (1.0, 1.0), "idiomatic": (1.0, 1.0)}


def _perceptrons(sizes: Sequence[int]) -> list[Contestant]:
    net = jb.mlp(sizes, jb.Relu())
    return [
        Contestant("jax.value_and_grad", perceptron.plain("relu"), "plain"),
        Contestant("ours", jb.value_and_grad(net, jb.SoftmaxCrossEntropy()), "ours"),
        Contestant("checkpoint around a layer", perceptron.plain("relu", True), "idiomatic"),
    ]


def _perceptron(axis: str, size: int, sizes: Sequence[int], batch: int) -> Workload:
    # the gradients of the weights are outputs; what is temporary are activations
    quadratic = dict.fromkeys(LINEAR, (2.0, 1.0))
    return Workload(
        f"scaling in {axis}, {size}",
        "scaling",
        functools.partial(perceptron.data, sizes, batch),
        functools.partial(_perceptrons, sizes),
        flops=flops.mlp(sizes, batch),
        level=2,
        axis=(axis, size),
        theory=quadratic if axis == "width" else LINEAR,
        tolerance=1e-3,
    )


def _stacks(depth: int) -> list[Contestant]:
    ours = deep.ours("tanh", depth, 64, False)[:1]
    return [
        Contestant("plain scan", mlp.scanned("tanh"), "plain"),
        *ours,
        Contestant("checkpoint around a layer", mlp.scanned("tanh", checkpoint=True), "idiomatic"),
    ]


def _stack(depth: int) -> Workload:
    return Workload(
        f"scaling in depth, {depth}",
        "scaling",
        functools.partial(deep.data, depth, 64, 256, 1.0),
        functools.partial(_stacks, depth),
        flops=depth * flops.dense(256, 64, 64),
        level=2,
        axis=("depth", depth),
        theory=LINEAR,
        tolerance=1e-2,  # of 256 layers: what they make of a rounding
    )


def _attentions(length: int) -> list[Contestant]:
    plain = attention.theirs(functools.partial(plain_attention.plain, causal=True))
    few = attention.theirs(plain_attention.blocked(max(length // 16, 32), True))
    return [
        Contestant("checkpointed blocks", few, "idiomatic"),  # the truth of 8,192 fits
        Contestant("plain", plain, "plain"),
        attention.ours(4, True),
    ]


def _attention(length: int) -> Workload:
    return Workload(
        f"scaling in length, {length}",
        "scaling",
        functools.partial(attention.data, length, 4, 64),
        functools.partial(_attentions, length),
        flops=flops.attention(1, length, 256),
        level=2,
        axis=("length", length),
        # blocks of T/16 queries see T keys; ours takes blocks of a size that does not grow
        theory={"plain": (2.0, 2.0), "ours": (2.0, 1.0), "idiomatic": (2.0, 2.0)},
        tolerance=1e-3,
    )


def _heads(vocab: int) -> list[Contestant]:
    return [
        Contestant("optax loss", head.whole(), "plain"),
        *heads.ours(),
        Contestant("checkpoint, blocks of 64", head.blocks(64), "idiomatic"),
    ]


def _head(vocab: int) -> Workload:
    return Workload(
        f"scaling in vocabulary, {vocab}",
        "scaling",
        functools.partial(heads.data, 512, 128, vocab),
        functools.partial(_heads, vocab),
        flops=flops.dense(512, 128, vocab),
        level=2,
        axis=("vocabulary", vocab),
        theory=LINEAR | {"ours": (1.0, 0.0)},  # in blocks of so many numbers
    )


WORKLOADS = (
    *(_perceptron("batch", n, (784, 256, 256, 10), n) for n in BATCHES),
    *map(_stack, DEPTHS),
    *(_perceptron("width", n, (n, n, n, n), 128) for n in WIDTHS),
    *map(_attention, LENGTHS),
    *map(_head, VOCABULARIES),
)
