"""The plain convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

from jbackprop.checks import size_of
from jbackprop.compose.checks import check_activation, check_shape, check_widths
from jbackprop.compose.sequential import Sequential
from jbackprop.layers import Conv, Dense, Flatten, MaxPool, Relu
from jbackprop.layers.convolution import he_normal
from jbackprop.sweep import Node


def cnn(
    shape: Sequence[int],
    channels: Sequence[int],
    classes: int,
    kernel: int = 3,
    pool: int = 2,
    hidden: Sequence[int] = (),
    activation: Node | None = None,
) -> Sequential:
    """A convolutional network: convolution, activation and pooling, stage by stage, then Dense.

    In the manner of LeCun, Bottou, Bengio and Haffner (1998), LeNet-5. Every stage keeps the size,
    with its padding, and the pooling divides it. The weights start as He et al. (2015) have it.

    Args:
        shape: of one example: (height, width, channels), or (length, channels) for sequences.
        channels: what each stage gives; as many stages.
        classes: the number of outputs: net inputs, which is what the canonical losses take.
        kernel: the size of all kernels, along every axis.
        pool: the size of the windows of the max-pooling.
        hidden: the widths of Dense layers before the last one.
        activation: behind each convolution and each hidden Dense. Relu by default.

    Returns:
        Sequential(Conv, activation, MaxPool, ..., Flatten, [Dense, activation, ...] Dense).

    Raises:
        ValueError: a shape without spatial axes, no stages, or more of them than the size can be
            divided by `pool`.
        TypeError: an activation that is a class and not a layer.

    Example:
        >>> net = cnn(shape=(28, 28, 1), channels=(16, 32), classes=10)
    """
    *size, width = check_shape("cnn", shape)
    stages = check_widths("cnn", "channels", channels)
    act = check_activation("cnn", activation, Relu())
    kernel, pool, classes = (
        size_of(value, f"cnn: {name}")
        for name, value in (("kernel", kernel), ("pool", pool), ("classes", classes))
    )
    layers: list[Node] = []
    for l, wider in enumerate(stages):
        if min(size) < pool:
            raise ValueError(
                f"cnn of shape {tuple(shape)}: {len(stages)} stages are too many for windows of "
                f"{pool}: before stage {l + 1} the size is {tuple(size)}; give at most {l} channels"
            )
        axes = len(size)
        conv = Conv(width, wider, (kernel,) * axes, w_init=he_normal)
        layers += [conv, act, MaxPool((pool,) * axes)]
        size, width = [n // pool for n in size], wider
    for n in size:
        width *= n
    layers.append(Flatten())
    for wider in check_widths("cnn", "hidden", hidden, least=0):
        layers += [Dense(width, wider, w_init=he_normal), act]
        width = wider
    return Sequential(*layers, Dense(width, classes))
