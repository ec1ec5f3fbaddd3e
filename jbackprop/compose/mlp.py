"""The multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from jbackprop.compose.checks import check_activation, check_widths
from jbackprop.compose.sequential import Sequential
from jbackprop.layers import Dense, Tanh
from jbackprop.sweep import Node


def mlp(
    sizes: Sequence[int],
    activation: Node | Sequence[Node] | None = None,
    output: Node | None = None,
) -> Sequential:
    """A multilayer perceptron: Dense layers with activations between them.

    Args:
        sizes: the widths, from the number of inputs to the number of outputs; at least two.
        activation: of the hidden layers: one for all, or one for each. Tanh by default.
        output: a layer after the last Dense. None by default: the outputs are net inputs, which is
            what the canonical losses take.

    Returns:
        Sequential(Dense, activation, ..., Dense[, output]).

    Raises:
        ValueError: fewer than two sizes, or as many activations as there are not hidden layers.
    """
    sizes = check_widths("mlp", "sizes", sizes, least=0)
    if len(sizes) < 2:
        raise ValueError(
            f"mlp needs at least two sizes, inputs and outputs, such as [64, 10]; got {list(sizes)}"
        )
    hidden = len(sizes) - 2
    activation = Tanh() if activation is None else activation
    if not isinstance(activation, Node | Sequence) or isinstance(activation, str):
        check_activation("mlp", activation, Tanh())
    check_activation("mlp", output, Tanh(), "output")
    each = [activation] * hidden if isinstance(activation, Node) else list(activation)
    for one in each:
        check_activation("mlp", one, Tanh())
    if len(each) != hidden:
        raise ValueError(
            f"mlp of sizes {list(sizes)} has {hidden} hidden layers but {len(each)} activations "
            "came; give one for each, or a single one for all"
        )
    layers: list[Node] = []
    for l in range(hidden + 1):
        layers.append(Dense(sizes[l], sizes[l + 1]))
        if l < hidden:
            layers.append(each[l])
    return Sequential(*layers, *([] if output is None else [output]))
