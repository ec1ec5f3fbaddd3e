"""The networks of the suite in PyTorch.

A parameter is only permuted on its way there, so that gradients and variances take the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

TRANSFORMERS = {"transformer": 0, "classifier": 10}
"""Their classes."""
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm; of layers that the peers know."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        parts = self.qkv(self.norm1(x)).reshape(B, T, 3, self.heads, D // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        a = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = x + self.proj(a.transpose(1, 2).reshape(B, T, D))
        return h + self.down(functional.gelu(self.up(self.norm2(h))))


class Transformer(nn.Module):
    """The language model; positions are an embedding, as the peers know no bare parameter.

    With classes, its head is of the mean over the positions.
    """

    def __init__(self, classes: int = 0):
        super().__init__()
        width, depth, heads, T, V = 128, 6, 4, 64, 64
        self.classes = classes
        self.tokens, self.positions = nn.Embedding(V, width), nn.Embedding(T, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes or V)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1]).repeat(len(x), 1)
        h = self.norm(self.blocks(self.tokens(x) + self.positions(steps)))
        return self.head(h.mean(dim=1) if self.classes else h)


def network(task: str, params: dict[str, Any]) -> nn.Module:
    """With random parameters. A task is "cnn", a transformer, or such as "mlp relu"."""
    if task in TRANSFORMERS:
        return Transformer(TRANSFORMERS[task])
    if task == "cnn":
        stages: list[nn.Module] = []
        for before, behind in ((1, 32), (32, 64)):
            stages += [nn.Conv2d(before, behind, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 7 * 7, 10))
    layers: list[nn.Module] = []
    for path in sorted((p for p in params if p.endswith("/w")), key=lambda p: int(p.split("/")[0])):
        layers += [nn.Linear(*params[path].shape), ACTIVATIONS[task.split()[1]]()]
    return nn.Sequential(*layers[:-1])


def renamed(name: str, arrays: dict[str, Any]) -> dict[str, Tensor]:
    """From the parameters' paths and layouts in `plain` to those of `network`."""
    found = {}
    names = {"w": "weight", "b": "bias", "scale": "weight", "shift": "bias"}
    for path, value in arrays.items():
        *place, leaf = path.split("/")
        if name in TRANSFORMERS and not place:  # a table
            place, leaf = [leaf], "scale"
        if name == "cnn" and place[0] == "stages":
            place = [str(3 * int(place[1]))]
        elif name == "cnn":
            place = ["7"]
            if leaf == "w":  # its rows: height, width, channels
                value = np.moveaxis(value.reshape(7, 7, 64, 10), 2, 0).reshape(-1, 10)
        parts = {".".join(place): value}
        if place[0] == "blocks":
            parts = {f"blocks.{i}.{place[1]}": v for i, v in enumerate(value)}
        for key, v in parts.items():
            if leaf == "w":
                v = v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T
            found[f"{key}.{names[leaf]}"] = torch.tensor(v)
    return found


def flat(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets of every position, which is what the loss takes."""
    return z.flatten(0, -2), y.flatten()
