"""Tensor parallelism: which weights of a network are split by columns, and which by rows."""

from __future__ import annotations

import re

from jax.sharding import PartitionSpec

from jbackprop import layers
from jbackprop.calls import check_net
from jbackprop.compose import Checkpoint, FanOut, Frozen, Parallel, Sequential
from jbackprop.layers.weightless import Weightless
from jbackprop.sharding.rules import Axes, Rule, Sharding, check_axes
from jbackprop.sweep import Composite, Node


def tensor_parallel(
    net: Node, axis: str = "model", batch: Axes = "data", fsdp: Axes = None, smallest: int = 4096
) -> Sharding:
    """Rules that split the weights of a network over an axis of the mesh, in pairs.

    Of two `Dense` with nothing between but what works feature by feature or head by head, the first
    is split by its outputs (columns, and its bias), the second by its inputs (rows): what is
    between is split likewise, and only the second one's output is summed over the devices. So are
    the queries, keys and values of attention and its output, the two halves of a transformer's mlp,
    gated units, and two `Conv`, by channels. Tables of embeddings are split by ids, and so is a
    `Dense` with as many outputs: the head of a language model.

    Everything else is whole: a `Dense` or `Conv` without a partner, norms, recurrent layers.

    A size that the axis does not divide is an error of `specs`, which knows the mesh; its message
    has the rule that leaves the parameter whole.

    The queries, keys and values of one `Dense` lie side by side, so that the columns of a device
    are not those of its heads: XLA sends them on.

    Args:
        net: a layer or a composite.
        axis: of the mesh.
        batch: what the examples are split over.
        fsdp: what the parameters are split over in addition.
        smallest: how many entries make a parameter large, for `fsdp`.

    Source: Shoeybi, Patwary, Puri, LeGresley, Casper and Catanzaro, Megatron-LM: training
    multi-billion parameter language models using model parallelism (2019), section 3.
    """
    check_net(net)
    check_axes("tensor_parallel: axis", axis)
    pairs = _Pairs(axis)
    pairs.visit(net, "")
    pairs.close()
    return Sharding(tuple(pairs.rules), batch, fsdp, smallest)


class _Pairs:
    """The rules of `tensor_parallel`, made on a walk through a network.

    `pending` are the layers split by columns since the features were last whole: they need one
    split by rows behind them, or stay whole themselves.
    """

    def __init__(self, axis: str) -> None:
        self.axis = axis
        self.rules: list[Rule] = []
        self.pending: list[tuple[str, Node]] = []
        self.vocabularies: set[int] = set()

    def visit(self, net: Node, path: str) -> None:
        """Go through one layer."""
        if isinstance(net, Sequential | Checkpoint | Frozen):
            for name, child in net.children().items():
                self.visit(child, _join(path, name))
        elif isinstance(net, FanOut | Parallel):
            self._branches(net, path)
        elif isinstance(net, Composite):
            for name, child in net.children().items():
                self.close()
                self.visit(child, _join(path, name))
            self.close()
        elif isinstance(net, layers.Dense) or (isinstance(net, layers.Conv) and net.groups == 1):
            if self.pending:
                self._columns()
                self._rule(path, "w", self.axis, None)
            else:
                self.pending = [(path, net)]
        elif isinstance(net, layers.Embedding):
            self.close()
            self._rule(path, "w", self.axis, None)
            self.vocabularies.add(net.vocab)
        elif not _passes(net):
            self.close()

    def close(self) -> None:
        """The features are whole from here: what waits for rows stays whole, but for a head."""
        self.pending = [
            (path, layer) for path, layer in self.pending
            if isinstance(layer, layers.Dense) and layer.q in self.vocabularies
        ]  # fmt: skip
        self._columns()

    def _branches(self, net: Composite, path: str) -> None:
        """Side by side: what is split in any of them waits for what is behind the join."""
        if isinstance(net, Parallel) and all(map(_passes, net.children().values())):
            return
        self.close()
        waiting = []
        for name, child in net.children().items():
            self.visit(child, _join(path, name))
            waiting += self.pending
            self.pending = []
        self.pending = waiting

    def _columns(self) -> None:
        for path, layer in self.pending:
            self._rule(path, "w", None, self.axis)
            if layer.bias:  # type: ignore[attr-defined]
                self._rule(path, "b", self.axis)
        self.pending = []

    def _rule(self, path: str, leaf: str, *entries: str | None) -> None:
        name = re.escape(f"{path or 'net'}.{leaf}")
        self.rules.append((f"^{name}$", PartitionSpec(*entries)))


def _passes(net: Node) -> bool:
    """Whether it works feature by feature or head by head, as far as splitting them goes."""
    if isinstance(net, layers.Reshape | layers.Softmax | layers.Concatenate):
        return False
    return isinstance(net, Weightless | layers.GroupNorm | layers.InstanceNorm)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
