"""The workloads of the suite, a file for each family."""

from jbackprop.bench.declare import Workload
from jbackprop.bench.suite import (
    attention,
    capture,
    convolution,
    credit,
    curvature,
    deep,
    head,
    lstm,
    mlp,
    per_example,
    resnet,
    scaling,
    training,
    transformer,
)

WORKLOADS: tuple[Workload, ...] = tuple(
    load
    for module in (
        mlp, deep, convolution, resnet, transformer, lstm, head, attention, training, per_example,
        curvature, credit, capture, scaling,
    )
    for load in module.WORKLOADS
)  # fmt: skip
"""In the order in which they are measured."""
