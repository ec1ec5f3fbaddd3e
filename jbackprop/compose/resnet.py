"""The residual network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jbackprop.checks import size_of
from jbackprop.compose.checks import check_activation, check_shape, check_widths
from jbackprop.compose.sequential import Sequential
from jbackprop.compose.skip import Skip
from jbackprop.layers import Conv, Dense, GlobalAveragePool, GroupNorm, Relu
from jbackprop.layers.convolution import he_normal
from jbackprop.sweep import Node


def resnet(
    shape: Sequence[int],
    channels: Sequence[int],
    blocks: int | Sequence[int],
    classes: int,
    groups: int = 8,
    activation: Node | None = None,
) -> Sequential:
    """A residual network with pre-activation and group norm.

    Every block adds to what comes in what two convolutions of 3 make of it, each behind a norm and
    an activation: x + Conv(act(norm(Conv(act(norm(x)))))). From one stage to the next the first
    block halves the size and changes the channels, and so does, with a convolution of 1, its
    shortcut. The norm is one over groups of channels, not over the batch: no example depends on
    another, so that every per-example question has an answer.

    He, Zhang, Ren and Sun, Identity mappings in deep residual networks (2016), figure 1 b; the norm
    of Wu and He, Group normalization (2018).

    Args:
        shape: of one example: (height, width, channels), or (length, channels) for sequences.
        channels: of each stage.
        blocks: in each stage; one number for all of them, or one for each.
        classes: the number of outputs: net inputs, which is what the canonical losses take.
        groups: of channels that are normalised together; where they do not divide the channels of
            a stage, the largest number that divides both.
        activation: behind every norm. Relu by default.

    Returns:
        Sequential(Conv, Skip(...), ..., GroupNorm, activation, GlobalAveragePool, Dense).

    Raises:
        ValueError: a shape without spatial axes, sizes below 1, blocks for other stages.
        TypeError: an activation that is a class and not a layer.

    Example:
        >>> net = resnet(shape=(32, 32, 3), channels=(16, 32, 64), blocks=3, classes=10)
    """
    *size, width = check_shape("resnet", shape)
    stages = check_widths("resnet", "channels", channels)
    each = (blocks,) * len(stages) if isinstance(blocks, int | np.integer) else blocks
    number = check_widths("resnet", "blocks", each)
    (most,) = check_widths("resnet", "groups", (groups,))
    if len(number) != len(stages):
        raise ValueError(
            f"resnet: {len(stages)} stages (channels {stages}) but blocks for {len(number)}: give "
            "one number for all stages, or one for each"
        )
    classes = size_of(classes, "resnet: classes")
    act = check_activation("resnet", activation, Relu())
    axes = len(size)

    def norm(width: int) -> list[Node]:
        return [GroupNorm(math.gcd(most, width), width), act]

    def conv(p: int, q: int, stride: int = 1) -> Conv:
        return Conv(p, q, (3,) * axes, stride, bias=False, w_init=he_normal)

    layers: list[Node] = [conv(width, stages[0])]
    width = stages[0]
    for l, wider in enumerate(stages):
        for i in range(number[l]):
            stride = 2 if l and not i else 1
            branch = Sequential(
                *norm(width), conv(width, wider, stride), *norm(wider), conv(wider, wider)
            )
            shortcut = None
            if stride > 1 or width != wider:
                shortcut = Conv(width, wider, (1,) * axes, stride, bias=False, w_init=he_normal)
            layers.append(Skip(branch, shortcut))
            width = wider
    return Sequential(*layers, *norm(width), GlobalAveragePool(), Dense(width, classes))
