"""Floating-point operations of one value and gradient, counted on paper.

Matmuls and convolutions only; a multiplication and an addition are two. What is counted is the
plain way: forward once, back once, nothing done again. A test compares with the traced programs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def dense(rows: int, p: int, q: int, first: bool = False) -> float:
    """Forward, the weights' gradient and, unless it is the first layer, the input's delta."""
    return (2 if first else 3) * 2.0 * rows * p * q


def mlp(sizes: Sequence[int], batch: int) -> float:
    """A perceptron whose input needs no gradient."""
    pairs = itertools.pairwise(sizes)
    return sum(dense(batch, p, q, first=l == 0) for l, (p, q) in enumerate(pairs))


def attention(batch: int, length: int, width: int) -> float:
    """Scores and their use, T^2 d each forward, and twice as much back; all heads together."""
    return 3 * 2 * 2.0 * batch * length**2 * width


def blocks(depth: int, batch: int, length: int, width: int) -> float:
    """Transformer blocks: qkv (3), proj (1), up (4) and down (4) times D^2, and the attention."""
    rows = batch * length
    return depth * (12 * dense(rows, width, width) + attention(batch, length, width))


def transformer(depth: int, batch: int, length: int, width: int, outputs: int, rows: int) -> float:
    """Blocks and a head of so many outputs over so many rows."""
    return blocks(depth, batch, length, width) + dense(rows, width, outputs)


def lstm(batch: int, length: int, p: int, q: int) -> float:
    """Four gates: of the input, which needs no delta, and of the state."""
    rows = batch * length
    return dense(rows, p, 4 * q, first=True) + dense(rows, q, 4 * q)


def conv(positions: int, taps: int, c_in: int, c_out: int, first: bool = False) -> float:
    """A convolution of so many taps: a Dense of taps * c_in inputs at every position."""
    return dense(positions, taps * c_in, c_out, first)


def cnn(shape: Sequence[int], channels: Sequence[int], classes: int, batch: int) -> float:
    """Stages of a 3x3 convolution and a pooling of 2x2, and a Dense."""
    high, wide, c = shape
    total = 0.0
    for l, c_out in enumerate(channels):
        total += conv(batch * high * wide, 9, c, c_out, first=l == 0)
        high, wide, c = high // 2, wide // 2, c_out
    return total + dense(batch, high * wide * c, classes)
