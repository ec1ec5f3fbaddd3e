"""Opacus and BackPACK on the networks of `per_example.py`, in units of their own plain gradient.

python per_example_torch.py PROBLEM.npz NETWORK QUANTITY

Prints a line of JSON for each contestant. The arrays of the problem are "x", "y" and, by the path
of the parameter, "params/..." and the answer "wanted/..." ("wanted/" alone, where it is norms). A
parameter is only permuted on its way to PyTorch, so that gradients and variances take the same.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_NORM = 1.0
TOLERANCE = 1e-3
SLOW, VERY_SLOW = 2.0, 20.0  # seconds of a call: then three of them have to do, or one

TRANSFORMERS = {"transformer": 0, "classifier": 10}
"""Their classes."""
Answer = Callable[[], Any]


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


def network(name: str) -> nn.Module:
    """With random parameters."""
    if name in TRANSFORMERS:
        return Transformer(TRANSFORMERS[name])
    if name == "cnn":
        stages: list[nn.Module] = []
        for before, behind in ((1, 32), (32, 64)):
            stages += [nn.Conv2d(before, behind, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 7 * 7, 10))
    layers: list[nn.Module] = []
    for before, behind in ((784, 1024), (1024, 1024), (1024, 1024), (1024, 10)):
        layers += [nn.Linear(before, behind), nn.ReLU()]
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


class Peers:
    """The contestants, each made with a copy of the network of its own."""

    def __init__(self, name: str, params: dict[str, Tensor], x: Tensor, y: Tensor):
        self.name, self.params, self.x, self.y = name, params, x, y

    def _network(self) -> nn.Module:
        net = network(self.name)
        net.load_state_dict(self.params)
        return net

    def plain(self) -> Answer:
        """The gradient of the mean cost."""
        net = self._network()

        def answer() -> None:
            net.zero_grad()
            functional.cross_entropy(*flat(net(self.x), self.y)).backward()

        return answer

    def opacus(self, quantity: str) -> Answer:
        """Gradients of single examples, written out; the clipped sum by its own optimizer."""
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        net = GradSampleModule(self._network())
        optimizer = DPOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.1), noise_multiplier=0.0,
            max_grad_norm=MAX_NORM, expected_batch_size=len(self.x),
        )  # fmt: skip

        def answer() -> Any:
            optimizer.zero_grad()
            functional.cross_entropy(*flat(net(self.x), self.y)).backward()
            named = [(k.removeprefix("_module."), p) for k, p in net.named_parameters()]
            if quantity == "clipped":
                optimizer.clip_and_accumulate()
                return {k: p.summed_grad for k, p in named}
            if quantity == "variance":
                return {k: p.grad_sample.var(dim=0, correction=0) for k, p in named}
            each = [p.grad_sample.flatten(1).norm(dim=1) for _, p in named]
            return torch.stack(each).norm(dim=0)

        return answer

    def ghost(self, quantity: str) -> Answer:
        """Opacus without writing gradients out: ghost clipping."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        if quantity == "variance":
            raise NotImplementedError("norms and clipped sums only")
        net = GradSampleModuleFastGradientClipping(self._network(), max_grad_norm=MAX_NORM)
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(net.parameters(), lr=0.1), noise_multiplier=0.0,
            max_grad_norm=MAX_NORM, expected_batch_size=len(self.x),
        )  # fmt: skip
        loss = DPLossFastGradientClipping(net, optimizer, nn.CrossEntropyLoss())

        def answer() -> Any:
            optimizer.zero_grad()
            z = net(self.x)
            if quantity == "norms":
                functional.cross_entropy(*flat(z, self.y)).backward()
                return net.get_norm_sample()
            loss(*flat(z, self.y), shape=z.shape).backward()  # positions belong to an example
            return {k.removeprefix("_module."): p.grad for k, p in net.named_parameters()}

        return answer

    def backpack(self, quantity: str) -> Answer:
        """Its extension for the quantity; the clipped sum from gradients written out."""
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad, BatchL2Grad, Variance

        net, N = extend(self._network()), len(self.x)
        loss = extend(nn.CrossEntropyLoss())  # of the mean: all gradients are over N
        extension = {"norms": BatchL2Grad, "clipped": BatchGrad, "variance": Variance}[quantity]

        def answer() -> Any:
            net.zero_grad()
            with backpack(extension()):
                loss(*flat(net(self.x), self.y)).backward()
            lacking = [
                type(m).__name__ for m in net.modules() for p in m.parameters(recurse=False)
                if not hasattr(p, extension().savefield)
            ]  # fmt: skip
            if lacking:
                raise NotImplementedError(f"it has nothing for {lacking[0]}")
            named: list[tuple[str, Any]] = list(net.named_parameters())
            if quantity == "norms":
                return N * torch.stack([p.batch_l2 for _, p in named]).sum(0).sqrt()
            if quantity == "variance":
                return {k: N**2 * p.variance for k, p in named}
            each = [p.grad_batch.flatten(1).norm(dim=1) for _, p in named]
            norms = N * torch.stack(each).norm(dim=0)
            factors = N * (MAX_NORM / norms).clamp(max=1)
            return {k: torch.einsum("n,n...->...", factors, p.grad_batch) for k, p in named}

        return answer

    def all(self) -> Iterator[tuple[str, str, Callable[[str], Answer]]]:
        """Name, kind, and what makes the contestant for a quantity."""
        yield "Opacus, GradSampleModule", "opacus", self.opacus
        yield "Opacus, ghost clipping", "opacus", self.ghost
        yield "BackPACK", "backpack", self.backpack


def difference(found: Any, wanted: Any) -> float:
    """As `contest.difference`, leaf by leaf; of norms, each for itself."""
    if isinstance(wanted, Tensor):
        found, wanted = dict(enumerate(found)), dict(enumerate(wanted))
    sizes = {k: w.double().norm() for k, w in wanted.items()}
    least = 1e-3 * max(sizes.values())
    gaps = [(found[k] - w).double().norm() / max(sizes[k], least) for k, w in wanted.items()]
    return float(torch.stack(gaps).max())  # NaN where one is


def _timed(f: Answer, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def in_turns(f: Answer, g: Answer, seconds: float) -> list[tuple[float, float]]:
    """Times of one call of f and of g: f g, g f, ..., as `jbackprop.bench.paired` has it."""
    f()
    start, once = time.perf_counter(), _timed(g)
    if once > SLOW:
        return [(_timed(f), _timed(g)) for _ in range(1 if once > VERY_SLOW else 3)]
    calls = max(1, round(0.005 / min(_timed(f), _timed(g))))
    times: list[tuple[float, float]] = []
    while len(times) < 5 or (len(times) < 200 and time.perf_counter() - start < seconds):
        if len(times) % 2:
            times.append((_timed(f, calls), _timed(g, calls)))
        else:
            second, first = _timed(g, calls), _timed(f, calls)
            times.append((first, second))
    return times


def main(
    kind_of_peers: type[Peers] = Peers,
    quantities: tuple[str, ...] = ("norms", "clipped", "variance"),
) -> None:
    """Measure all of them; an answer that is random, or drawn here, has nothing to agree with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem")
    parser.add_argument("network", choices=("mlp", "cnn", *TRANSFORMERS))
    parser.add_argument("quantity", choices=quantities)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gib", type=float, default=20.0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    most = int(options.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    arrays = dict(np.load(options.problem))

    def below(start: str) -> dict[str, Tensor]:
        own = {k.removeprefix(start): v for k, v in arrays.items() if k.startswith(start)}
        return renamed(options.network, own)

    x, y = torch.tensor(arrays["x"]), torch.tensor(arrays["y"]).long()
    if options.network == "cnn":  # a copy: Opacus is wrong, and silent, where channels are last
        x = torch.empty(len(x), 1, 28, 28).copy_(x.movedim(3, 1))
    norms = torch.tensor(arrays["wanted/"]) if options.quantity == "norms" else None
    wanted = below("wanted/") if norms is None else norms
    peers = kind_of_peers(options.network, below("params/"), x, y)
    plain = peers.plain()
    for name, kind, make in peers.all():
        row: dict[str, Any] = {"contestant": name, "kind": kind}
        try:
            answer = make(options.quantity)
            found = answer()
            if len(wanted):
                row["difference"] = difference(found, wanted)
            if not row.get("difference", 0.0) <= TOLERANCE:
                raise ArithmeticError("differs")
            times = in_turns(plain, answer, options.seconds)
        except Exception as error:  # a peer that does not do it, or has no room, or is not there
            row["note"] = (str(error).splitlines() or [type(error).__name__])[0][:48]
        else:
            ratios = [b / a for a, b in times]
            cuts = statistics.quantiles(ratios if len(ratios) > 1 else 2 * ratios, n=4)
            row |= {"time": cuts[1], "quartiles": (cuts[0], cuts[2])}
            row["milliseconds"] = 1e3 * statistics.median(b for _, b in times)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
