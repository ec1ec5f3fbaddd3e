"""The table of docs/scaling.md: what a step of a transformer sends, holds and takes, on paper.

Nothing is run: `python benchmarks/scaling.py` prints the formulas' values. The links, the
accelerators and how many tokens each of them gets are assumptions.
"""

from __future__ import annotations

import dataclasses

import jax

import jbackprop as jb
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class Net:
    """The numbers of a transformer that matter here: parameters, blocks, width, positions."""

    parameters: int
    depth: int
    width: int
    length: int


@dataclasses.dataclass(frozen=True)
class Machine:
    """An accelerator: operations a second, bytes a second over its link, near and far."""

    flops: float = 4e14
    near: float = 3e11
    far: float = 5e10
    near_devices: int = 8
    number: int = 4  # bytes of a number of parameters, gradient and optimizer
    activation: int = 2  # bytes of a number of activations


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on one of the accelerators: bytes over its link, seconds, bytes it holds."""

    sent: float
    sending: float
    computing: float
    needed: float
    held: float


REDO = 1  # forward sweeps that checkpoints do again


def operations(net: Net, tokens: float) -> float:
    """Of a step: forward 2 a parameter and token, and attention's own; back twice that; redone."""
    forward = 2 * net.parameters + 4 * net.depth * net.length * net.width
    return (3 + REDO) * forward * tokens


def data_parallel(net: Net, machine: Machine, n: int, tokens: int) -> Step:
    """2 (N - 1)/N b P bytes: a ring's all-reduce of the gradient."""
    link = machine.near if n <= machine.near_devices else machine.far
    sent = 2 * (n - 1) / n * machine.number * net.parameters
    needed = 2 * (n - 1) / n * machine.number * machine.flops / ((4 + 2 * REDO) * link)
    held = 4 * machine.number * net.parameters + kept(net, machine, tokens)
    computing = operations(net, tokens) / machine.flops
    return Step(sent, sent / link, computing, needed, held)


def fsdp(net: Net, machine: Machine, n: int, tokens: int, tensor: int = 1) -> Step:
    """3 (N - 1)/N b P bytes: parameters gathered twice, the gradient summed and scattered once.

    With `tensor` M: M accelerators near one another share the weights; over the N/M of them that
    are left each has P/M. The M take M times as many tokens together, and sum activations 4 times
    a block.
    """
    m, groups = tensor, n // tensor
    link = machine.near if n <= machine.near_devices and m == 1 else machine.far
    split = 3 * (groups - 1) / groups * machine.number * net.parameters / m
    sums = 5 * net.depth * 2 * (m - 1) / m * m * tokens * net.width * machine.activation
    needed = (groups - 1) / groups * machine.number * machine.flops / (2 * link) / m
    held = 4 * machine.number * net.parameters / n + kept(net, machine, m * tokens)
    computing = operations(net, tokens) / machine.flops
    return Step(split + sums, split / link + sums / machine.near, computing, needed, held)


def kept(net: Net, machine: Machine, tokens: int) -> float:
    """The inputs of all blocks, which are what a transformer of this library keeps."""
    return net.depth * tokens * net.width * machine.activation


def example() -> Net:
    """A transformer with about 7e9 parameters, counted."""
    net = jb.transformer(50_304, 4096, 32, 32, 2048)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    return Net(sum(leaf.size for leaf in jax.tree.leaves(shapes)), 32, 4096, 2048)


def table(tokens: int = 8192) -> str:
    """The table, for 8, 64 and 4096 accelerators."""
    net, machine, rows = example(), Machine(), []
    for n in (8, 64, 4096):
        ways = {"data parallel": data_parallel(net, machine, n, tokens)}
        ways["FSDP"] = fsdp(net, machine, n, tokens)
        if n > 8:
            ways["FSDP x 8 tensor"] = fsdp(net, machine, n, tokens, tensor=8)
        for way, step in ways.items():
            rows.append(
                (str(n), way, f"{step.sent / 1e9:.1f}", f"{step.sending:.2f}",
                 f"{step.computing:.2f}", f"{step.needed:,.0f}", f"{step.held / 1e9:.1f}")
            )  # fmt: skip
    columns = [">accelerators", "way", ">GB sent", ">s sending", ">s computing", ">tokens to hide",
               ">GB held"]  # fmt: skip
    return render(columns, rows)


if __name__ == "__main__":
    print(table())
