"""Transformer blocks and a small language model: the delta rule against autodiff's arrangements."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Workload, peer
from jbackprop.bench.plain.transformer import (
    POLICIES,
    Arrangement,
    Sizes,
    blocks_alone,
    init_blocks,
    init_model,
    model,
)
from jbackprop.bench.suite import flops

SIZES = (
    Sizes(128, 6, 4, 64, 16),
    Sizes(256, 8, 4, 128, 8),
    Sizes(512, 4, 8, 256, 2),
)


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
        "keys first": {"attend": "keys first"},
        "keys first, late division": {"attend": "keys first, late division"},
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
    for pieces, n in (("", 1), (" in 2 pieces", 2), (" in 4 pieces", 4)):
        tuned[f"checkpoint around block, halves{pieces} and gelu, barrier"] = Arrangement(
            ("block", "halves", "gelu"), barrier=True, pieces=n
        )
    return found | {name: ("tuned", how) for name, how in tuned.items()}


NAMES = (
    ("qkv",), ("up",), ("middle",), ("qkv", "up"), ("qkv", "middle"), ("middle", "up"),
    ("qkv", "middle", "up"), ("qkv", "attended", "up"), ("qkv", "attended", "middle", "up"),
    ("attended", "up"), ("attended", "middle", "up"), ("attended",), ("attended", "middle"),
)  # fmt: skip
ARRANGEMENTS = arrangements()
KEPT = (
    "plain scan",
    "checkpoint around a block",
    "plain scan, flat",
    "checkpoint, flat",
    "checkpoint, dots without batch saved",
    "checkpoint, middle saved",
    "checkpoint, attended+middle saved",
    "checkpoint, attended+middle+up saved",
    "checkpoint, qkv+middle+up saved",
    "checkpoint around halves, barrier",
    "checkpoint around halves, barrier, heads first",
    "checkpoint around halves, barrier, keys first",
    "checkpoint around halves, barrier, 2 chunks",
    "checkpoint around halves, barrier, 4 chunks",
    "checkpoint, flat, 2 chunks",
    "checkpoint, flat, 4 chunks",
    "checkpoint around halves in 2 pieces, barrier",
    "checkpoint around halves in 4 pieces, barrier",
    "checkpoint around block, halves and gelu, barrier",
    "checkpoint around block, halves in 4 pieces and gelu, barrier",
)
"""What the default run measures; --all tries more.

Most were on the front of time and memory, or near it, when all were tried at the first size. The
one with keys first, and checkpoints inside checkpoints with gelu, came in later and without that.
"""


def data(sizes: Sizes) -> tuple[Any, ...]:
    """Parameters of the blocks, x and y."""
    key, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    shape = (sizes.batch, sizes.length, sizes.width)
    x, y = jax.random.normal(key_x, shape), jax.random.normal(key_y, shape)
    return init_blocks(key, sizes), x, y


def model_data(sizes: Sizes) -> tuple[Any, ...]:
    """Parameters of the language model, or of the classifier; tokens and targets."""
    key, key_x, key_y = jax.random.split(jax.random.key(0), 3)
    shape = (sizes.batch, sizes.length)
    tokens = jax.random.randint(key_x, shape, 0, sizes.vocab)
    of_each = shape[:1] if sizes.classes else shape
    targets = jax.random.randint(key_y, of_each, 0, sizes.classes or sizes.vocab)
    return init_model(key, sizes), tokens, targets


def _is_dict(tree: Any) -> bool:
    return isinstance(tree, dict)


class Order:
    """From the plain parameters to those of a network of ours, and back for its gradients.

    Both have the same layers in the same order; queries, keys and values may be one Dense or more.
    """

    def __init__(self, net: Any):
        self._net = net

    @functools.cached_property
    def _template(self) -> tuple[list[Any], Any]:
        template = jax.eval_shape(self._net.init, jax.random.key(0))
        return jax.tree.flatten(template, is_leaf=_is_dict)

    def pack(self, p: Any) -> Any:
        """The parameters of the network."""
        leaves, tree = self._template
        blocks, around = (p["blocks"], p) if "blocks" in p else (p, None)
        start = 0 if around is None else 2
        attention = []
        at = 0
        for shape in self._attention(start):
            part = slice(at, at := at + shape["w"].shape[-1])
            attention.append(
                {"w": blocks["qkv"]["w"][..., part], "b": blocks["qkv"]["b"][..., part]}
            )
        found = [
            blocks["norm1"], *attention, blocks["proj"], blocks["norm2"], blocks["up"],
            blocks["down"],
        ]  # fmt: skip
        if around is not None:
            tables = (around["tokens"], around["positions"])
            first = [dict.fromkeys(d, t) for d, t in zip(leaves, tables, strict=False)]
            found = [*first, *found, around["norm"], around["head"]]
        return jax.tree.unflatten(tree, found)

    def unpack(self, g: Any) -> Any:
        """Gradients in the plain order."""
        found = jax.tree.leaves(g, is_leaf=_is_dict)
        start = 2 if "scale" not in found[0] else 0
        n = len(self._attention(start))
        parts = found[start + 1 : start + 1 + n]
        qkv = {name: jnp.concatenate([p[name] for p in parts], axis=-1) for name in ("w", "b")}
        names = ("proj", "norm2", "up", "down")
        rest = dict(zip(names, found[start + 1 + n :], strict=False))
        blocks = {"norm1": found[start], "qkv": qkv} | rest
        if not start:
            return blocks
        tokens, positions = (next(iter(d.values())) for d in found[:2])
        around = {"tokens": tokens, "positions": positions, "norm": found[-2], "head": found[-1]}
        return around | {"blocks": blocks}

    def _attention(self, start: int) -> list[Any]:
        """The Dense layers between the first norm and the attention's last."""
        leaves, _ = self._template
        second = next(i for i in range(start + 1, 99) if "scale" in leaves[i])
        return leaves[start + 1 : second - 1]


def ours(sizes: Sizes, whole: bool = False) -> list[Contestant]:
    """The delta rule: its default, and what else one may try.

    Args:
        sizes: of the network.
        whole: the language model, not its blocks alone.
    """
    D, H = sizes.width, sizes.heads
    loss = jb.SoftmaxCrossEntropy() if whole else jb.SquaredError()
    net: Any = jb.transformer(sizes.vocab, D, sizes.depth, H, sizes.length)
    nets: dict[str, Any] = {"ours": net}
    if not whole:
        nets["ours"] = net.layers[2]  # the blocks, in the default arrangement
        attention = jb.Sequential(jb.LayerNorm(D), jb.multi_head_attention(D, H, causal=True))
        perceptron = jb.Sequential(
            jb.LayerNorm(D), jb.Dense(D, 4 * D), jb.Gelu(), jb.Dense(4 * D, D)
        )
        kept = jb.Sequential(jb.Skip(attention), jb.Skip(perceptron))
        nets["ours, everything kept"] = jb.Repeat(kept, sizes.depth)
        for keep in (False, True):
            name = f"ours, {'middles' if keep else 'inputs alone'} kept"
            nets[name] = jb.Repeat(jb.transformer_block(D, H, keep_middle=keep), sizes.depth)
    found = []
    for name, net in nets.items():
        order, kind = Order(net), "ours" if name == "ours" else "variant"
        function = jb.value_and_grad(net, loss)
        found.append(Contestant(name, function, kind, order.pack, order.unpack))
    return found


def contestants(sizes: Sizes, names: Sequence[str] = KEPT) -> Sequence[Contestant | Absent]:
    """Everybody, for the blocks alone."""
    found: list[Contestant | Absent] = [*ours(sizes)]
    for name in names:
        kind, how = ARRANGEMENTS[name]
        if max(how.chunks, how.pieces) <= sizes.batch:
            found.append(Contestant(name, blocks_alone(how, sizes), kind))
    found.sort(key=lambda p: p.kind != "plain")  # the reference first
    for checkpoint in (False, True):
        how_ = "checkpoint" if checkpoint else "plain"
        flax = functools.partial(_flax, sizes, checkpoint)
        equinox = functools.partial(_equinox, sizes, checkpoint)
        found.append(peer(f"Flax nn.scan, {how_}", "flax", "flax", flax))
        found.append(peer(f"Equinox scan, {how_}", "equinox", "equinox", equinox))
    return found


def _flax(sizes: Sizes, checkpoint: bool) -> Contestant:
    from jbackprop.bench.plain import transformer_flax as peers

    function = peers.scanned(sizes, checkpoint)
    return Contestant("", function, "", peers.pack(sizes), peers.unpack(sizes))


def _equinox(sizes: Sizes, checkpoint: bool) -> Contestant:
    from jbackprop.bench.plain import transformer_equinox as peers

    function = peers.scanned(sizes, checkpoint)
    return Contestant("", function, "", peers.pack(sizes), peers.unpack)


def modellers(sizes: Sizes) -> Sequence[Contestant]:
    """Everybody, for the language model."""
    found = ours(sizes, whole=True)
    for name in (*FEW, *KEPT[5:10]):
        kind, how = ARRANGEMENTS[name]
        found.append(Contestant(name, model(how, sizes), kind))
    return sorted(found, key=lambda p: p.kind != "plain")


def _blocks(sizes: Sizes, level: int) -> Workload:
    return Workload(
        f"transformer blocks, {sizes}",
        "transformer",
        functools.partial(data, sizes),
        functools.partial(contestants, sizes, KEPT if level else FEW),
        flops=flops.blocks(sizes.depth, sizes.batch, sizes.length, sizes.width),
        level=level,
    )


def _model(sizes: Sizes, level: int) -> Workload:
    return Workload(
        f"transformer, language model, {sizes}",
        "transformer",
        functools.partial(model_data, sizes),
        functools.partial(modellers, sizes),
        flops=flops.transformer(
            sizes.depth, sizes.batch, sizes.length, sizes.width, sizes.vocab,
            sizes.batch * sizes.length,
        ),
        level=level,
    )  # fmt: skip


FEW = KEPT[:4]
"""Of the quick run."""
WORKLOADS = (
    *map(_blocks, SIZES, (0, 2, 2)),
    *map(_model, SIZES, (1, 2, 2)),
)
