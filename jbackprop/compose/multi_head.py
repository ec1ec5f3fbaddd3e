"""Multi-head attention, of a sequence to itself and to another."""

from __future__ import annotations

from typing import Any

from jbackprop.checks import flag_of, number_of, size_of
from jbackprop.compose.fan_out import FanOut, Parallel
from jbackprop.compose.sequential import Sequential
from jbackprop.layers.activations import Identity
from jbackprop.layers.attention import Attention
from jbackprop.layers.dense import Dense
from jbackprop.layers.dropout import Dropout
from jbackprop.layers.parts import Select, Split
from jbackprop.layers.rotary import Rotary
from jbackprop.sweep import Node


def multi_head_attention(
    width: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    causal: bool = False,
    rotary: bool = False,
    masked: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    block: int | None = None,
) -> Sequential:
    """Attention of a sequence to itself: x (B, T, width) -> y (B, T, width).

        q, k, v = split(x W + b),   y = attention(q, k, v) W_o + b_o

    One `Dense` makes the queries, keys and values of all heads, in this order side by side.

        jb.multi_head_attention(128, 4, causal=True)    # as in a GPT: applied to x
        jb.multi_head_attention(128, 4, masked=True)    # sequences with padding: to (x, mask)

    The mask is (B, T) of bool, True where there is a token. It keeps all from attending to padding;
    what comes out at the padding itself is for the loss to weigh with 0.

    Args:
        width: features of a position, in and out; a multiple of `heads`.
        heads: the number of query heads, each of width / heads features.
        kv_heads: the number of key and value heads, a divisor of `heads`; None for as many.
        causal: whether a position attends only to itself and to those before it.
        rotary: whether queries and keys turn by their positions; see `Rotary`.
        masked: whether the input is a tuple (x, mask).
        bias: whether the two `Dense` have one. That of the keys has no effect; its gradient is 0.
        dropout: the rate of a `Dropout` of y. The probabilities are not dropped.
        block: how many queries are worked on at a time; see `Attention`.

    Returns:
        Sequential(Dense, Split[, Parallel(Rotary, Rotary, Identity)], Attention, Dense[, Dropout]);
        masked: the parts before `Attention` inside a `FanOut`, beside the mask.

    Raises:
        ValueError: sizes below 1; heads that do not divide width, or kv_heads that do not divide
            heads; an odd number of features for each head with rotary; a dropout not in [0, 1).

    Source: Vaswani et al., Attention is all you need (2017), section 3.2.2.
    """
    sizes = _sizes("multi_head_attention", width, heads, kv_heads)
    for option, value in (("rotary", rotary), ("masked", masked)):
        flag_of(value, f"multi_head_attention: {option}")
    layers: list[Node] = [Dense(width, sum(sizes), bias=bias), Split(*sizes)]
    if rotary:
        if sizes[0] // heads % 2:
            raise ValueError(
                f"multi_head_attention: heads of {sizes[0] // heads} features cannot turn by their "
                f"positions, which takes pairs; make the width a multiple of {2 * heads}"
            )
        layers.append(Parallel(Rotary(heads), Rotary(kv_heads or heads), Identity()))
    if masked:
        layers = [FanOut(Sequential(Select(0), *layers), Select(1))]
    attention = Attention(heads, kv_heads, causal=causal, block=block)
    return Sequential(*layers, attention, *_out("multi_head_attention", width, bias, dropout))


def cross_attention(
    width: int,
    heads: int,
    kv_heads: int | None = None,
    *,
    memory: int | None = None,
    masked: bool = False,
    bias: bool = True,
    dropout: float = 0.0,
    block: int | None = None,
) -> Sequential:
    """Attention of a sequence to another: of x (B, T, width) to memory (B, S, features).

        q = x W_q + b_q,   k, v = split(memory W + b),   y = attention(q, k, v) W_o + b_o

    The input is the tuple (x, memory), y is (B, T, width): a decoder's look at what the encoder
    gave. Inside a larger network a `FanOut` makes the tuple:

        look = jb.Sequential(jb.FanOut(decoder, encoder), jb.cross_attention(128, 4))

    where decoder and encoder take the same input, such as a tuple of which each has its `Select`.

    Args:
        width: features of a position of x, and of what comes out; a multiple of `heads`.
        heads: the number of query heads, each of width / heads features.
        kv_heads: the number of key and value heads, a divisor of `heads`; None for as many.
        memory: features of a position of the memory; None for `width`.
        masked: whether the input is (x, memory, mask), the mask (B, S) of bool, True where the
            memory is not padding.
        bias: whether the three `Dense` have one.
        dropout: the rate of a `Dropout` of y.
        block: how many queries are worked on at a time; see `Attention`.

    Returns:
        Sequential(FanOut(queries, keys and values[, mask]), Attention, Dense[, Dropout]).

    Raises:
        ValueError: sizes below 1; heads that do not divide width, or kv_heads that do not divide
            heads; a dropout not in [0, 1).

    Source: Vaswani et al., Attention is all you need (2017), section 3.2.3.
    """
    _, *sizes = _sizes("cross_attention", width, heads, kv_heads)
    features = width if memory is None else size_of(memory, "cross_attention: memory")
    flag_of(masked, "cross_attention: masked")
    branches: list[Node] = [
        Sequential(Select(0), Dense(width, width, bias=bias)),
        Sequential(Select(1), Dense(features, sum(sizes), bias=bias), Split(*sizes)),
    ]
    if masked:
        branches.append(Select(2))
    attention = Attention(heads, kv_heads, block=block)
    return Sequential(FanOut(*branches), attention, *_out("cross_attention", width, bias, dropout))


def _sizes(name: str, width: Any, heads: Any, kv_heads: Any) -> tuple[int, int, int]:
    """Features of the queries, the keys and the values of all heads."""
    own = Attention(
        size_of(heads, f"{name}: heads"),
        None if kv_heads is None else size_of(kv_heads, f"{name}: kv_heads"),
    )
    width = size_of(width, f"{name}: width")
    if width % own.heads:
        raise ValueError(
            f"{name}: a width of {width} cannot be shared by {heads} heads evenly; heads must "
            "divide width"
        )
    keys = width // own.heads * (own.kv_heads or own.heads)
    return width, keys, keys


def _out(name: str, width: int, bias: bool, dropout: float) -> list[Node]:
    end: list[Node] = [Dense(width, width, bias=bias)]
    dropout = number_of(dropout, f"{name}: dropout", least=0, below=1)
    return end + ([Dropout(dropout)] if dropout else [])
