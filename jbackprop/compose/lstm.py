"""A ready recurrent network."""

from __future__ import annotations

from jbackprop.checks import flag_of, size_of
from jbackprop.compose.bidirectional import bidirectional as both_ways
from jbackprop.compose.sequential import Sequential
from jbackprop.layers.dense import Dense
from jbackprop.layers.embedding import Embedding
from jbackprop.layers.lstm import LSTM
from jbackprop.layers.parts import Take
from jbackprop.sweep import Node


def lstm(
    inputs: int | None = None,
    hidden: int = 128,
    outputs: int = 1,
    *,
    depth: int = 1,
    bidirectional: bool = False,
    last: bool = True,
    vocab: int | None = None,
    truncate: int | None = None,
) -> Sequential:
    """Stacked LSTMs, and a `Dense` on the last time step or on every one.

    Args:
        inputs: the number of inputs of each step: x (B, T, inputs). With `vocab` the width of the
            embedding, by default `hidden`.
        hidden: the number of hidden units of each LSTM; of each direction, if bidirectional.
        outputs: the number of outputs, net inputs for the loss.
        depth: how many LSTMs are stacked.
        bidirectional: whether each of them runs in both directions.
        last: one output for a sequence, y (B, outputs), from the state in which the last LSTM ends,
            each direction at its own end; else one for every step, y (B, T, outputs).
        vocab: the number of tokens, if x is integers (B, T): an `Embedding` comes first.
        truncate: after how many steps backpropagation through time is cut; see `LSTM`.

    Returns:
        `Sequential(LSTM, ..., Take(-1), Dense)`.

    Raises:
        ValueError: sizes below 1; neither inputs nor vocab.
    """
    if inputs is None and vocab is None:
        raise ValueError(
            "lstm: give inputs, the number of inputs of each step; or vocab, the number of tokens, "
            "if x is integers"
        )
    depth, hidden = size_of(depth, "lstm: depth"), size_of(hidden, "lstm: hidden")
    for option, value in (("bidirectional", bidirectional), ("last", last)):
        flag_of(value, f"lstm: {option}")
    p = hidden if inputs is None else inputs
    layers: list[Node] = [] if vocab is None else [Embedding(vocab, p)]
    width = 2 * hidden if bidirectional else hidden
    for i in range(depth):
        layer, ends = LSTM(p, hidden, truncate=truncate), last and i == depth - 1
        if bidirectional:
            layers.append(both_ways(layer, last=ends))
        else:
            layers += [layer, Take(-1)] if ends else [layer]
        p = width
    return Sequential(*layers, Dense(width, outputs))
