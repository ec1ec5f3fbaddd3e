"""Transformer blocks and a small language model: the delta rule against autodiff's arrangements.

python benchmarks/transformer.py [--seconds S] [--only NAME] [--names PART ...] [--out FILE.json]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from contest import Contestant, Workload, main
from plain import transformer_peers as peers
from plain.transformer import (
    POLICIES,
    Arrangement,
    Sizes,
    blocks_alone,
    init_blocks,
    init_model,
    model,
)

SIZES = (
    Sizes(128, 6, 4, 64, 16),
    Sizes(256, 8, 4, 128, 8),
    Sizes(512, 4, 8, 256, 2),
)
PLAIN_GOALS = ((0.65, 0.15), (0.75, 0.13), (0.95, 0.25))
IDIOMATIC_GOALS = ((0.8, 0.6), (0.8, 0.6), (0.95, 0.7))


BLOCK = ("block",)
QKV_MIDDLE_UP = Arrangement(BLOCK, names=("qkv", "middle", "up"))
HALVES = Arrangement(("halves",), barrier=True)


def arrangements() -> dict[str, tuple[str, Arrangement]]:
    """By name: the kind, and the arrangement."""
    found = {
        "plain scan": ("plain", Arrangement(flat=False)),
        "checkpoint around a block": ("idiomatic", Arrangement(BLOCK, flat=False)),
    }
    tuned = {"plain scan, flat": Arrangement(), "checkpoint, flat": Arrangement(BLOCK)}
    dots = {
        "dots without batch": POLICIES.dots_with_no_batch_dims_saveable,
        "dots": POLICIES.dots_saveable,
    }
    for name, policy in dots.items():
        tuned[f"checkpoint, {name} saved"] = Arrangement(BLOCK, policy)
    for names in NAMES:
        tuned[f"checkpoint, {'+'.join(names)} saved"] = Arrangement(BLOCK, names=names)
    for pieces in ("halves", "parts", "core"):
        tuned[f"checkpoint around {pieces}"] = Arrangement((pieces,))
    for pieces in ("halves", "parts"):
        tuned[f"checkpoint around {pieces}, barrier"] = Arrangement((pieces,), barrier=True)
        tuned[f"checkpoint around block and {pieces}, barrier"] = Arrangement(
            ("block", pieces), barrier=True
        )
    changes: dict[str, dict[str, Any]] = {
        "2 chunks": {"chunks": 2}, "4 chunks": {"chunks": 4},
        "unrolled": {"scanned": False}, "2 blocks a step": {"unroll": 2},
        "fast norm": {"fast_norm": True}, "jax.nn.gelu": {"gelu": "jax.nn.gelu"},
        "heads first": {"attend": "heads first"}, "jax.nn attention": {"attend": "jax.nn"},
        "late division": {"attend": "late division"}, "not flat": {"flat": False},
    }  # fmt: skip
    bases = {
        "plain scan, flat": Arrangement(),
        "checkpoint, flat": Arrangement(BLOCK),
        "checkpoint, qkv+middle+up saved": QKV_MIDDLE_UP,
        "checkpoint around halves, barrier": HALVES,
    }
    for base, how in bases.items():
        for name, change in changes.items():
            tuned[f"{base}, {name}"] = dataclasses.replace(how, **change)
    for n in (2, 4):
        tuned[f"checkpoint around halves in {n} pieces, barrier"] = Arrangement(
            ("halves",), barrier=True, pieces=n
        )
        tuned[f"checkpoint around block, halves in {n} pieces, barrier"] = Arrangement(
            ("block", "halves"), barrier=True, pieces=n
        )
    return found | {name: ("tuned", how) for name, how in tuned.items()}


NAMES = (
    ("qkv",), ("up",), ("middle",), ("qkv", "up"), ("qkv", "middle"), ("middle", "up"),
    ("qkv", "middle", "up"), ("qkv", "attended", "up"), ("qkv", "attended", "middle", "up"),
    ("attended", "up"), ("attended", "middle", "up"), ("attended",), ("attended", "middle"),
)  # fmt: skip
ARRANGEMENTS = arrangements()


def data(sizes: Sizes) -> tuple[Any, ...]:
    """Parameters of the blocks, x and y."""
    key, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    shape = (sizes.batch, sizes.length, sizes.width)
    x, y = jax.random.normal(key_x, shape), jax.random.normal(key_y, shape)
    return init_blocks(key, sizes), x, y


def contestants(sizes: Sizes) -> Sequence[Contestant]:
    """Everybody, for the blocks alone."""
    found = [
        Contestant(name, blocks_alone(how, sizes), kind)
        for name, (kind, how) in ARRANGEMENTS.items()
    ]
    for checkpoint in (False, True):
        how = "checkpoint" if checkpoint else "plain"
        found += [
            Contestant(
                f"Flax nn.scan, {how}", peers.flax(sizes, checkpoint), "flax",
                peers.to_flax(sizes), peers.from_flax(sizes),
            ),
            Contestant(
                f"Equinox scan, {how}", peers.equinox(sizes, checkpoint), "equinox",
                peers.to_equinox(sizes), peers.from_equinox,
            ),
        ]  # fmt: skip
    return found


WORKLOADS = tuple(
    Workload(
        f"blocks, {sizes}", functools.partial(data, sizes), functools.partial(contestants, sizes),
        {"plain": p, "idiomatic": i},
    )
    for sizes, p, i in zip(SIZES, PLAIN_GOALS, IDIOMATIC_GOALS, strict=True)
)  # fmt: skip

if __name__ == "__main__":
    main(WORKLOADS, (), str(__doc__))
