"""Deep scanned perceptrons: the delta rule against autodiff's scans.

python benchmarks/deep.py [--seconds S] [--only NAME] [--out FILE.json]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from contest import Contestant, Workload, main
from plain import mlp, mlp_peers

import jbackprop as jb

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
) -> Sequence[Contestant]:
    """Everybody."""
    scan = functools.partial(mlp.scanned, activation, before)
    found = [
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
    for n in (2, 4):
        found.append(Contestant(f"plain scan, {n} layers a step", scan(unroll=n)))
        found.append(Contestant(f"checkpoint, {n} layers a step", scan(True, unroll=n)))
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
    for n in (4, 8):
        found.append(
            Contestant(f"checkpoint around {n} layers and each", mlp.grouped(activation, n, before))
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


def peers(activation: str, depth: int, width: int, before: bool) -> list[Contestant]:
    """Flax and Equinox, plainly and checkpointed."""
    found = []
    for checkpoint in (False, True):
        how = "checkpoint" if checkpoint else "plain"
        flax = mlp_peers.flax(activation, width, depth, before, checkpoint)
        equinox = mlp_peers.equinox(activation, before, checkpoint)
        to, back = mlp_peers.to_flax, mlp_peers.from_flax
        found.append(Contestant(f"Flax nn.scan, {how}", flax, "flax", to, back))
        to, back = mlp_peers.to_equinox, mlp_peers.from_equinox
        found.append(Contestant(f"Equinox scan, {how}", equinox, "equinox", to, back))
    return found


def workload(
    activation: str, before: bool, gain: float, goal: tuple[float, float], depth: int = 32
) -> Workload:
    """One network, width 256, batch 256."""
    name = "" if depth == 32 else "compile "
    order = f"({activation}, Dense)" if before else f"(Dense, {activation})"
    make: Callable[[], Sequence[Contestant]] = functools.partial(
        contestants, activation, depth, 256, before
    )
    return Workload(
        f"{name}{depth} x {order}, width 256, batch 256",
        functools.partial(data, depth, 256, 256, gain),
        make,
        {"plain": goal},
    )


WORKLOADS = (
    workload("tanh", False, 1.0, (0.97, 0.4)),
    workload("relu", False, 2**0.5, (1.0, 0.55)),
    workload("gelu", True, 1.5, (0.75, 0.28)),
)
COMPILED = (
    workload("tanh", False, 1.0, (1.0, jnp.inf), depth=128),
    workload("gelu", True, 1.5, (1.0, jnp.inf), depth=128),
)

if __name__ == "__main__":
    main(WORKLOADS, COMPILED, about=str(__doc__))
