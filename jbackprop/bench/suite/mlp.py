"""Plain perceptrons, from tiny to bound by matmuls, unrolled: where parity is the aim."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import jax

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Outside, Workload, peer
from jbackprop.bench.plain import perceptron
from jbackprop.bench.suite import flops

ACTIVATIONS: dict[str, Any] = {"tanh": jb.Tanh(), "relu": jb.Relu(), "gelu": jb.Gelu()}
LOSS = jb.SoftmaxCrossEntropy()


def named(sizes: Sequence[int]) -> str:
    """Widths, equal ones in a row together: 784-512x2-10."""
    runs = [(width, len(list(same))) for width, same in groupby(sizes)]
    return "-".join(f"{width}x{n}" if n > 1 else str(width) for width, n in runs)


def checkpointed(sizes: Sequence[int], activation: str) -> jb.Sequential:
    """Ours, of every hidden layer its input alone kept."""
    f, last = ACTIVATIONS[activation], len(sizes) - 2
    pairs = enumerate(pairwise(sizes))
    return jb.Sequential(
        *(
            jb.Checkpoint(jb.Sequential(jb.Dense(p, q), f)) if l < last else jb.Dense(p, q)
            for l, (p, q) in pairs
        )
    )


def _folded(params: Any) -> Any:
    """(dense, (), dense) as ((dense, ()), dense)."""
    dense = perceptron.dense_layers(params)
    return (*((p, ()) for p in dense[:-1]), dense[-1])


def _unfolded(grads: Any) -> Any:
    *hidden, last = grads
    return (*(part for pair in hidden for part in pair), last)


def contestants(sizes: Sequence[int], activation: str) -> list[Contestant | Absent]:
    """Everybody."""
    net = jb.mlp(sizes, ACTIVATIONS[activation])
    lean = checkpointed(sizes, activation)

    def flax() -> Contestant:
        function = jax.value_and_grad(perceptron.flax(activation, sizes))
        return Contestant("", function, "", perceptron.to_flax, perceptron.from_flax)

    def equinox() -> Contestant:
        import equinox as eqx

        both = eqx.filter_value_and_grad(perceptron.equinox(activation))
        return Contestant(
            "", lambda *args: both(*args), "", perceptron.to_equinox, perceptron.from_equinox
        )

    return [
        Contestant("jax.value_and_grad", perceptron.plain(activation), "plain"),
        Contestant("ours", jb.value_and_grad(net, LOSS), "ours"),
        Contestant(
            "ours, checkpointed", jb.value_and_grad(lean, LOSS), "variant", _folded, _unfolded
        ),
        Contestant("checkpoint around a layer", perceptron.plain(activation, True), "idiomatic"),
        peer("Flax", "flax", "flax", flax),
        peer("Equinox", "equinox", "equinox", equinox),
    ]


def workload(sizes: Sequence[int], batch: int, activation: str, level: int) -> Workload:
    """One network."""
    return Workload(
        f"mlp, {named(sizes)} {activation}, batch {batch}",
        "mlp",
        functools.partial(perceptron.data, sizes, batch),
        functools.partial(contestants, sizes, activation),
        outside=[Outside("pytorch.py", f"mlp {activation}")],
        flops=flops.mlp(sizes, batch),
        level=level,
    )


WORKLOADS = (
    workload((784, 128, 10), 32, "tanh", 0),
    workload((784, 128, 10), 256, "relu", 2),
    workload((784, 512, 512, 10), 128, "gelu", 0),
    workload((784, *[1024] * 4, 10), 256, "relu", 1),
    workload((784, *[1024] * 4, 10), 1024, "tanh", 2),
    workload((64, *[32] * 30, 10), 64, "tanh", 1),
    workload((64, *[32] * 60, 10), 32, "relu", 2),
)
