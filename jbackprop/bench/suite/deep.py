"""Deep scanned perceptrons: the delta rule against autodiff's scans."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Workload, peer
from jbackprop.bench.plain import mlp
from jbackprop.bench.suite import flops

POLICIES = jax.checkpoint_policies


def data(depth: int, width: int, batch: int, gain: float) -> tuple[Any, ...]:
    """params, x, y; weights of the standard deviation gain / sqrt(width)."""
    key_w, key_b, key_x, key_y = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": jax.random.normal(key_w, (depth, width, width)) * gain * width**-0.5,
        "b": 0.1 * jax.random.normal(key_b, (depth, width)),
    }
    x = jax.random.normal(key_x, (batch, width))
    return params, x, jax.random.normal(key_y, (batch, width))


def ours(activation: str, depth: int, width: int, before: bool) -> list[Contestant]:
    """The delta rule. Where the activation comes first, it is done again rather than kept."""
    f = {"tanh": jb.Tanh, "relu": jb.Relu, "gelu": jb.Gelu}[activation]()
    dense = jb.Dense(width, width)
    layer = jb.Sequential(f, dense) if before else jb.Sequential(dense, f)

    def pack(p: Any) -> Any:
        return ((), p) if before else (p, ())

    def unpack(g: Any) -> Any:
        return g[1] if before else g[0]

    again = jb.Checkpoint(jb.Sequential(jb.Checkpoint(f), dense))
    nets = {"ours": jb.Repeat(again if before else layer, depth)}
    if before:
        nets["ours, everything kept"] = jb.Repeat(layer, depth)
    nets["ours, checkpoint_every=4"] = jb.Repeat(layer, depth, checkpoint_every=4)
    found = []
    for name, net in nets.items():
        function = jb.value_and_grad(net, jb.SquaredError())
        kind = "ours" if name == "ours" else "variant"
        found.append(Contestant(name, function, kind, pack, unpack))
    return found


def contestants(
    activation: str, depth: int, width: int, before: bool = False
) -> Sequence[Contestant | Absent]:
    """Everybody."""
    scan = functools.partial(mlp.scanned, activation, before)
    found: list[Contestant | Absent] = [
        Contestant("plain scan", scan(), "plain"),
        *ours(activation, depth, width, before),
        Contestant("checkpoint around a layer", scan(True), "idiomatic"),
    ]
    saved: dict[str, Any] = {
        "dots saved": POLICIES.dots_with_no_batch_dims_saveable,
        "net inputs saved": POLICIES.save_only_these_names("z"),
        "activations saved": POLICIES.save_only_these_names("a"),
    }
    for name, policy in saved.items():
        if name != ("net inputs saved" if before else "activations saved"):
            found.append(Contestant(f"checkpoint, {name}", scan(True, policy)))
    found.append(Contestant("plain scan, 2 layers a step", scan(unroll=2)))
    found.append(Contestant("checkpoint, 2 layers a step", scan(True, unroll=2)))
    if not before:
        split, join = mlp.split_first, mlp.join_first
        found += [
            Contestant(
                "activation first, checkpoint", mlp.shifted(activation), "tuned", split, join
            ),
            Contestant(
                "activation first, plain", mlp.shifted(activation, False), "tuned", split, join
            ),
        ]
    found.append(
        Contestant("checkpoint around 4 layers and each", mlp.grouped(activation, 4, before))
    )
    found += [
        Contestant("unrolled", mlp.unrolled(activation, before), "tuned", mlp.unstack, mlp.stack),
        Contestant(
            "unrolled, checkpoint", mlp.unrolled(activation, before, True), "tuned",
            mlp.unstack, mlp.stack,
        ),
        Contestant("2 chunks of the batch, checkpoint", mlp.chunked(activation, 2, before)),
    ]  # fmt: skip
    if activation == "gelu":
        found.append(Contestant("jax.nn.gelu, plain", mlp.scanned("jax.nn.gelu", before)))
        found.append(
            Contestant("jax.nn.gelu, checkpoint", mlp.scanned("jax.nn.gelu", before, True))
        )
    if activation == "relu":
        found.append(Contestant("jnp.maximum, plain", mlp.scanned("jnp.maximum", before)))
    return found + peers(activation, depth, width, before)


def peers(activation: str, depth: int, width: int, before: bool) -> list[Contestant | Absent]:
    """Flax and Equinox, plainly and checkpointed."""

    def flax(checkpoint: bool) -> Contestant:
        from jbackprop.bench.plain import mlp_flax as peers

        function = peers.scanned(activation, width, depth, before, checkpoint)
        return Contestant("", function, "", peers.pack, peers.unpack)

    def equinox(checkpoint: bool) -> Contestant:
        from jbackprop.bench.plain import mlp_equinox as peers

        function = peers.scanned(activation, before, checkpoint)
        return Contestant("", function, "", peers.pack, peers.unpack)

    found: list[Contestant | Absent] = []
    for checkpoint in (False, True):
        how = "checkpoint" if checkpoint else "plain"
        make = functools.partial(flax, checkpoint)
        found.append(peer(f"Flax nn.scan, {how}", "flax", "flax", make))
        make = functools.partial(equinox, checkpoint)
        found.append(peer(f"Equinox scan, {how}", "equinox", "equinox", make))
    return found


def workload(activation: str, before: bool, gain: float, level: int) -> Workload:
    """One network, 32 layers, width 256, batch 256."""
    order = f"({activation}, Dense)" if before else f"(Dense, {activation})"
    return Workload(
        f"deep, 32 x {order}, width 256, batch 256",
        "deep",
        functools.partial(data, 32, 256, 256, gain),
        functools.partial(contestants, activation, 32, 256, before),
        flops=32 * flops.dense(256, 256, 256),
        level=level,
    )


WORKLOADS = (
    workload("tanh", False, 1.0, 0),
    workload("relu", False, 2**0.5, 2),
    workload("gelu", True, 1.5, 1),
)
