"""Gated units: two branches of one input, multiplied."""

from __future__ import annotations

from jbackprop.compose.fan_out import FanOut
from jbackprop.compose.sequential import Sequential
from jbackprop.layers.activations import Gelu, Sigmoid, Silu
from jbackprop.layers.dense import Dense
from jbackprop.layers.joins import Multiply
from jbackprop.sweep import Node


def glu(p: int, q: int, *, bias: bool = True) -> Sequential:
    """A gated linear unit: y = (x W + b) * sigmoid(x V + c), x (..., p) -> y (..., q).

    Where the gate is open the delta passes a `Dense` alone, and no saturated unit is in its way.

    Args:
        p: the number of inputs.
        q: the number of outputs.
        bias: whether there are b and c.

    Returns:
        Sequential(FanOut(Dense, Sequential(Dense, Sigmoid)), Multiply). Params: ((W, (V, ())), ()).

    Raises:
        ValueError: sizes below 1.

    Source: Dauphin, Fan, Auli and Grangier, Language modeling with gated convolutional networks
    (2016), equation 1.
    """
    return _gated(Sigmoid(), p, q, bias, gate_first=False)


def swiglu(p: int, hidden: int, q: int | None = None, *, bias: bool = False) -> Sequential:
    """A transformer's two-layer unit, gated: y = (silu(x W) * (x V)) W_2.

    It has three matrices in the place of two: for as many parameters as a plain unit of h hidden
    units take hidden = 2 h / 3.

    Args:
        p: the number of inputs.
        hidden: the number of hidden units.
        q: the number of outputs; None for p.
        bias: whether the three `Dense` have one; none in the source.

    Returns:
        Sequential(FanOut(Sequential(Dense, Silu), Dense), Multiply, Dense).

    Raises:
        ValueError: sizes below 1.

    Source: Shazeer, GLU variants improve transformer (2020), equation 6.
    """
    return Sequential(
        *_gated(Silu(), p, hidden, bias).layers, Dense(hidden, p if q is None else q, bias=bias)
    )


def geglu(
    p: int, hidden: int, q: int | None = None, *, bias: bool = False, tanh: bool = False
) -> Sequential:
    """A transformer's two-layer unit, gated: y = (gelu(x W) * (x V)) W_2.

    Args:
        p: the number of inputs.
        hidden: the number of hidden units.
        q: the number of outputs; None for p.
        bias: whether the three `Dense` have one; none in the source.
        tanh: whether gelu is its approximation by tanh.

    Returns:
        Sequential(FanOut(Sequential(Dense, Gelu), Dense), Multiply, Dense).

    Raises:
        ValueError: sizes below 1.

    Source: Shazeer, GLU variants improve transformer (2020), equation 6.
    """
    return Sequential(
        *_gated(Gelu(tanh=tanh), p, hidden, bias).layers,
        Dense(hidden, p if q is None else q, bias=bias),
    )


def _gated(gate: Node, p: int, q: int, bias: bool, gate_first: bool = True) -> Sequential:
    gated, plain = Sequential(Dense(p, q, bias=bias), gate), Dense(p, q, bias=bias)
    branches: tuple[Node, ...] = (gated, plain) if gate_first else (plain, gated)
    return Sequential(FanOut(*branches), Multiply())
