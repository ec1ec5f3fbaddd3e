"""A recurrent layer in both directions."""

from __future__ import annotations

import dataclasses

from jbackprop.checks import flag_of
from jbackprop.compose.fan_out import FanOut
from jbackprop.compose.sequential import Sequential
from jbackprop.layers.joins import Concatenate
from jbackprop.layers.parts import Take
from jbackprop.layers.recurrent import Recurrent


def bidirectional(layer: Recurrent, last: bool = False) -> Sequential:
    """A recurrent layer and its twin that runs the other way, their outputs side by side.

    y_t = (h_t of the layer, h_t of the twin): what was before step t, and what is behind it
    (Schuster and Paliwal, Bidirectional recurrent neural networks, 1997).

    Args:
        layer: `RNN`, `LSTM` or `GRU`; the twin has parameters of its own.
        last: hand out one (2q,) in place of (T, 2q): the state in which each direction *ends*,
            which for the one that runs backwards is that of the first step. (Its state of the last
            step has seen only one step.)

    Returns:
        `Sequential(FanOut(layer, twin), Concatenate())`.

    Raises:
        TypeError: a layer of another kind.
        ValueError: a layer that is handed states: each direction has its own.
    """
    if not isinstance(layer, Recurrent):
        raise TypeError(
            f"bidirectional: layer must be a recurrent layer such as LSTM(p, q), not {layer!r}"
        )
    flag_of(last, "bidirectional: last")
    if layer.states:
        raise ValueError(
            f"bidirectional cannot hand its two layers one state: leave states out of {layer}, or "
            "put two layers side by side with Parallel"
        )
    pair = layer, dataclasses.replace(layer, reverse=not layer.reverse)
    if not last:
        return Sequential(FanOut(*pair), Concatenate())
    ends = (Sequential(way, Take(0 if way.reverse else -1)) for way in pair)
    return Sequential(FanOut(*ends), Concatenate())
