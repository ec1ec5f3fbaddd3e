"""PyTorch, Opacus and BackPACK: `python pytorch.py PROBLEM.npz TASK QUESTION`."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from networks import TRANSFORMERS, network, renamed
from serve import Answer, below, error_of, serve, told
from torch import Tensor, nn
from torch.nn import functional

MAX_NORM = 1.0
RATE = 1e-3  # of Adam, whose other numbers are the same in PyTorch and Optax


def flat(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets of every position, which is what the loss takes."""
    return z.flatten(0, -2), y.flatten()


class Peers:
    """The contestants, each made with a copy of the network of its own."""

    def __init__(self, task: str, arrays: dict[str, Any]):
        own = below(arrays, "params/")
        self._task, self._shapes = task, own
        self._params = renamed(task.split()[0], own)
        self.x, self.y = torch.tensor(arrays["x"]), torch.tensor(arrays["y"]).long()
        if task == "cnn":  # a copy: Opacus is wrong, and silent, where channels are last
            self.x = torch.empty(len(self.x), 1, 28, 28).copy_(self.x.movedim(3, 1))

    def _network(self) -> nn.Module:
        net = network(self._task, self._shapes)
        net.load_state_dict(self._params)
        return net

    def _cost(self, net: Any) -> Tensor:
        return functional.cross_entropy(*flat(net(self.x), self.y))

    def gradient(self, compiled: bool) -> Answer:
        """The value and the gradient of the mean cost."""
        net = self._network()
        run: Any = torch.compile(net) if compiled else net

        def answer() -> Any:
            net.zero_grad()
            value = self._cost(run)
            value.backward()
            return value, {k: p.grad for k, p in net.named_parameters()}

        return answer

    def step(self, compiled: bool) -> Answer:
        """Steps of Adam; the first one is compared."""
        net = self._network()
        run: Any = torch.compile(net) if compiled else net
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)

        def answer() -> Any:
            optimizer.zero_grad()
            value = self._cost(run)
            value.backward()
            optimizer.step()
            return value, dict(net.named_parameters())

        return answer

    def opacus(self, question: str) -> Answer:
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
            self._cost(net).backward()
            named = [(k.removeprefix("_module."), p) for k, p in net.named_parameters()]
            if question == "clipped sum":
                optimizer.clip_and_accumulate()
                return {k: p.summed_grad for k, p in named}
            if question == "variance":
                return {k: p.grad_sample.var(dim=0, correction=0) for k, p in named}
            each = [p.grad_sample.flatten(1).norm(dim=1) for _, p in named]
            return torch.stack(each).norm(dim=0)

        return answer

    def ghost(self, question: str) -> Answer:
        """Opacus without writing gradients out: ghost clipping."""
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        if question == "variance":
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
            if question == "norms":
                functional.cross_entropy(*flat(z, self.y)).backward()
                return net.get_norm_sample()
            loss(*flat(z, self.y), shape=z.shape).backward()  # positions belong to an example
            return {k.removeprefix("_module."): p.grad for k, p in net.named_parameters()}

        return answer

    def backpack(self, question: str) -> Answer:
        """Its extension for the quantity; the clipped sum from gradients written out."""
        from backpack import backpack, extend, extensions

        if question.endswith("product"):
            return self._product(question)
        net, N = extend(self._network()), len(self.x)
        loss = extend(nn.CrossEntropyLoss())  # of the mean: all gradients are over N
        extension: Any = {
            "norms": extensions.BatchL2Grad, "clipped sum": extensions.BatchGrad,
            "variance": extensions.Variance, "diagonal, one sample": extensions.DiagGGNMC,
            "exact diagonal": extensions.DiagGGNExact, "Kronecker factors": extensions.KFAC,
        }[question]  # fmt: skip

        def answer() -> Any:
            net.zero_grad()
            with backpack(extension()):
                self._backward(loss, net)
            lacking = [
                type(m).__name__ for m in net.modules() for p in m.parameters(recurse=False)
                if not hasattr(p, extension().savefield)
            ]  # fmt: skip
            if lacking:
                raise NotImplementedError(f"it has nothing for {lacking[0]}")
            named: list[tuple[str, Any]] = list(net.named_parameters())
            if question == "norms":
                return N * torch.stack([p.batch_l2 for _, p in named]).sum(0).sqrt()
            if question == "variance":
                return {k: N**2 * p.variance for k, p in named}
            if question != "clipped sum":
                return {k: getattr(p, extension().savefield) for k, p in named}
            each = [p.grad_batch.flatten(1).norm(dim=1) for _, p in named]
            norms = N * torch.stack(each).norm(dim=0)
            factors = N * (MAX_NORM / norms).clamp(max=1)
            return {k: torch.einsum("n,n...->...", factors, p.grad_batch) for k, p in named}

        return answer

    def _backward(self, loss: Any, net: Any) -> None:
        loss(*flat(net(self.x), self.y)).backward()

    def _product(self, question: str) -> Answer:
        """A product with a vector, the graph built anew each time: autodiff twice."""
        from backpack.hessianfree.ggnvp import ggn_vector_product
        from backpack.hessianfree.hvp import hessian_vector_product
        from torch.nn.attention import SDPBackend, sdpa_kernel

        net, loss = self._network(), nn.CrossEntropyLoss()
        params = list(net.parameters())
        vector = [torch.randn_like(p) for p in params]

        def answer() -> Any:
            with sdpa_kernel(SDPBackend.MATH):  # no other attention has a second derivative
                z, y = flat(net(self.x), self.y)
            value = loss(z, y)
            if question == "Hessian product":
                return hessian_vector_product(value, params, vector)
            return ggn_vector_product(value, z, net, vector)

        return answer

    def all(self, question: str) -> Iterator[tuple[str, str, Callable[[], Answer]]]:
        """Name, kind, and what makes the contestant."""
        if question in ("gradient", "step"):
            make = self.gradient if question == "gradient" else self.step
            yield "PyTorch, eager", "torch", functools.partial(make, False)
            yield "torch.compile", "torch.compile", functools.partial(make, True)
            return
        yield "PyTorch, eager gradient", "gradient", functools.partial(self.gradient, False)
        if question in ("norms", "clipped sum", "variance"):
            name = "Opacus, GradSampleModule"
            yield name, "opacus", functools.partial(self.opacus, question)
            yield "Opacus, ghost clipping", "opacus", functools.partial(self.ghost, question)
        yield "BackPACK", "backpack", functools.partial(self.backpack, question)


DRAWN = ("Hessian product", "Gauss-Newton product", "diagonal, one sample", "Kronecker factors")
"""Answers that are random, or of a vector that is drawn here: nothing to compare with."""


def main() -> None:
    """Serve."""
    warnings.simplefilter("ignore")
    arrays, options = told()
    torch.set_num_threads(options.threads)
    peers = Peers(options.task, arrays)
    name = options.task.split()[0]
    wanted = below(arrays, "wanted/")
    value = arrays.get("value/")
    named = {"": torch.tensor(wanted[""])} if "" in wanted else renamed(name, wanted)

    def compare(found: Any) -> float | None:
        if isinstance(found, tuple) and options.question in ("gradient", "step"):
            own = abs(float(found[0].detach()) / float(value) - 1) if value is not None else 0.0
            return max(own, trees(found[1]))
        if isinstance(found, tuple) or options.question in DRAWN or not wanted:
            return None  # a plain gradient beside a quantity
        return trees({"": found} if isinstance(found, Tensor) else found)

    def trees(found: dict[str, Tensor]) -> float:
        pairs = [(found[k].detach().numpy(), named[k].numpy()) for k in named]
        return error_of(*zip(*pairs, strict=True))

    assert name in ("mlp", "cnn", *TRANSFORMERS)
    serve(peers.all(options.question), compare)


if __name__ == "__main__":
    main()
