"""A GPT-style transformer."""

from __future__ import annotations

from jbackprop.checks import flag_of, number_of, size_of
from jbackprop.compose.checkpoint import Checkpoint
from jbackprop.compose.checks import check_activation
from jbackprop.compose.multi_head import multi_head_attention
from jbackprop.compose.repeat import Repeat
from jbackprop.compose.sequential import Sequential
from jbackprop.compose.skip import Skip
from jbackprop.compose.tied import Tied
from jbackprop.layers import Dense, Dropout, Embedding, Gelu, LayerNorm, Positions
from jbackprop.sweep import Node

FEW = 4
"""As many blocks keep their middles too: little memory for so few, and a tenth less time."""


def transformer_block(
    width: int,
    heads: int,
    *,
    hidden: int | None = None,
    kv_heads: int | None = None,
    causal: bool = True,
    rotary: bool = False,
    activation: Node | None = None,
    dropout: float = 0.0,
    keep_middle: bool = False,
) -> Checkpoint | Sequential:
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    As lean as it can be. Inside a `Repeat` its input is all that is kept of it; on the way back one
    half at a time is done again, and in the second half the activation by itself once more, so that
    of the four arrays of (positions, hidden) that its rule could read two are there at a time.

    With `keep_middle` the input of the second half is kept too, and attention done again once, not
    twice. In stacks of few blocks that is the better bargain.

    Args:
        width: features of x (T, width).
        heads: heads of the attention; divides width.
        hidden: units of the mlp; by default 4 width.
        kv_heads, causal, rotary: as `multi_head_attention` takes them.
        activation: of the mlp; by default Gelu().
        dropout: rate behind the attention and behind the mlp.
        keep_middle: whether x + attention(norm(x)) is kept.

    Raises:
        ValueError: sizes below 1, or heads that do not divide width.
        TypeError: an activation that is no layer.

    Source: Radford et al., Language models are unsupervised multitask learners (2019), section 2.3;
    Xiong et al., On layer normalization in the transformer architecture (2020), figure 1 (b).
    """
    width = size_of(width, "transformer_block: width")
    hidden = 4 * width if hidden is None else size_of(hidden, "transformer_block: hidden")
    dropout = number_of(dropout, "transformer_block: dropout", least=0, below=1)
    flag_of(keep_middle, "transformer_block: keep_middle")
    activation = check_activation("transformer_block", activation, Gelu())
    drop = (Dropout(dropout),) if dropout else ()
    attention = multi_head_attention(width, heads, kv_heads=kv_heads, causal=causal, rotary=rotary)
    first = Sequential(LayerNorm(width), attention, *drop)
    second = Sequential(
        LayerNorm(width),
        Dense(width, hidden),
        Checkpoint(activation),
        Dense(hidden, width),
        *drop,
    )
    halves = Sequential(Checkpoint(Skip(first)), Checkpoint(Skip(second)))
    return halves if keep_middle else Checkpoint(halves)


def transformer(
    vocab: int,
    width: int,
    depth: int,
    heads: int,
    length: int,
    *,
    hidden: int | None = None,
    kv_heads: int | None = None,
    causal: bool = True,
    rotary: bool = False,
    activation: Node | None = None,
    dropout: float = 0.0,
    tied: bool = False,
) -> Sequential | Tied:
    """A GPT-style language model: pre-norm blocks, scanned, between an embedding and a head.

    Tokens (B, T) of integers below `vocab` in; net inputs (B, T, vocab) out, for
    `SoftmaxCrossEntropy` with targets (B, T): an example's cost is the mean over its positions. For
    a big vocabulary take `FusedSoftmaxCrossEntropy`: it never makes a (B, T, vocab) array.

    Of every block the input is kept, and nothing else; where there are at most 4, their middles
    too. See `transformer_block`.

    Args:
        vocab: how many tokens there are.
        width: features of every position.
        depth: the number of blocks.
        heads: heads of each attention; divides width.
        length: the longest sequence that there is a position for; rotary ones have no limit.
        hidden: units of each block's mlp; by default 4 width.
        kv_heads: heads of keys and values, if fewer than heads.
        causal: whether a position attends to itself and those before it only.
        rotary: whether queries and keys are turned by their positions; learned positions are left
            out then.
        activation: of the mlps; by default Gelu().
        dropout: rate behind each attention and each mlp; needs a key= to draw from.
        tied: whether the head is the embedding's table, transposed (a `Tied` net), rather than a
            Dense of its own.

    Returns:
        Sequential(Embedding, Positions, Repeat(block, depth), LayerNorm, Dense); where tied, a
        `Tied` of the first and of what is between.

    Raises:
        ValueError: sizes below 1, or heads that do not divide width. Where it runs: a sequence
            longer than `length`.
        TypeError: an activation that is no layer.
    """
    learned = Positions(length, width)  # also where they are left out: it checks the sizes
    vocab, depth = size_of(vocab, "transformer: vocab"), size_of(depth, "transformer: depth")
    for option, value in (("rotary", rotary), ("tied", tied)):
        flag_of(value, f"transformer: {option}")
    block = transformer_block(
        width, heads, hidden=hidden, kv_heads=kv_heads, causal=causal, rotary=rotary,
        activation=activation, dropout=dropout, keep_middle=depth <= FEW,
    )  # fmt: skip
    positions = () if rotary else (learned,)
    embedding = Embedding(vocab, width)
    body = (*positions, Repeat(block, depth), LayerNorm(width))
    if tied:
        return Tied(embedding, Sequential(*body))
    return Sequential(embedding, *body, Dense(width, vocab))
