"""One LSTM, 64 steps, width 128: the delta rule against autodiff's scans."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Workload, peer
from jbackprop.bench.plain import lstm
from jbackprop.bench.suite import flops

POLICIES = jax.checkpoint_policies


def data(batch: int, steps: int = 64, width: int = 128) -> tuple[Any, ...]:
    """params, x, y."""
    key_p, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    x, y = (jax.random.normal(key, (batch, steps, width)) for key in (key_x, key_y))
    return jb.LSTM(width, width).init(key_p), x, y


def contestants(width: int = 128) -> Sequence[Contestant | Absent]:
    """Everybody."""
    ours = jb.value_and_grad(jb.LSTM(width, width), jb.SquaredError())
    saved = {
        "dots saved": POLICIES.dots_with_no_batch_dims_saveable,
        "net inputs saved": POLICIES.save_only_these_names("z"),
        "net inputs and cells saved": POLICIES.save_only_these_names("z", "c"),
    }
    scan = lstm.scanned
    return [
        Contestant("plain scan", scan(), "plain"),
        Contestant("ours", ours, "ours"),
        Contestant("plain scan, bias inside", scan(bias_inside=True), "plain"),
        *(Contestant(f"plain scan, {n} steps a turn", scan(n), "tuned") for n in (2, 4)),
        Contestant("input matmul inside", scan(whole=True), "tuned"),
        Contestant("checkpoint around a step", scan(checkpoint=True), "idiomatic"),
        *(
            Contestant(f"checkpoint, {name}", scan(checkpoint=True, policy=policy), "tuned")
            for name, policy in saved.items()
        ),
        *(Contestant(f"checkpoint around {n} steps", scan(blocks=n), "tuned") for n in (8, 16)),
        Contestant(
            "checkpoint around 8 steps and each", scan(checkpoint=True, blocks=8), "tuned"
        ),
        peer("Flax nn.RNN(OptimizedLSTMCell)", "flax", "flax", functools.partial(_flax, width)),
    ]  # fmt: skip


def _flax(width: int) -> Contestant:
    return Contestant("", lstm.flax(width), "", lstm.to_flax, lstm.from_flax)


WORKLOADS = tuple(
    Workload(
        f"LSTM, 64 steps, width 128, batch {batch}",
        "lstm",
        functools.partial(data, batch),
        contestants,
        flops=flops.lstm(batch, 64, 128, 128),
        level=0 if batch == 32 else 2,
    )
    for batch in (32, 128)
)
