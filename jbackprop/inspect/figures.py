"""The figures of a page, without the page."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import numpy as np

from jbackprop.calls import check_call, coupling_layer
from jbackprop.checks import size_of
from jbackprop.diagnose import first_nonfinite
from jbackprop.factored import PyTree
from jbackprop.inspect.spread import Spread, Tally, norm
from jbackprop.inspect.sweeps import AT_ONCE, Sweeps
from jbackprop.inspect.targets import Outcome, outcome
from jbackprop.losses import Loss
from jbackprop.mesh import shapes
from jbackprop.per_example import deferred, norms
from jbackprop.structure import by_copy, layers_by_copy, walk
from jbackprop.summary import count
from jbackprop.sweep import Node, batch_size, forward

THRESHOLD = 0.05
"""|f'| below it is saturated, as `jbackprop.diagnose.saturation` has it."""


@dataclasses.dataclass(frozen=True)
class Units:
    """Of one elementwise activation, how many units pass (almost) no delta.

    Attributes:
        number: its units: the entries of its output for one example.
        saturated: the share of (example, unit) pairs with |f'(z)| < 0.05.
        off: the share of those with f'(z) = 0.
        dead: the share of units with f'(z) = 0 for every example.
    """

    number: int
    saturated: float
    off: float
    dead: float


@dataclasses.dataclass(frozen=True, eq=False)
class LayerFigures:
    """One layer; in a scanned composite one copy of it.

    Attributes:
        number: its place among all layers, from 1.
        path, layer: where it is, and what, printed.
        parameters: their number.
        shape: of its output for one example, printed.
        activations: how the entries of its output are spread, over all examples.
        deltas: the same of dC_n/dy_n, y being its output: for a layer with weights the delta of
            its net inputs. Unscaled. None where the output is integers.
        delta_norms: |dC_n/dy_n| of every example, (n,).
        units: of an elementwise activation.
    """

    number: int
    path: str
    layer: str
    parameters: int
    shape: str
    activations: Spread
    deltas: Spread | None
    delta_norms: np.ndarray | None
    units: Units | None


@dataclasses.dataclass(frozen=True, eq=False)
class Inspection:
    """What there is to see of a network on some examples.

    Attributes:
        net, loss: what they are.
        parameters: their number.
        examples: their number, n.
        layers: every copy of every layer in forward order.
        costs: C_n, (n,).
        norms: |g_n| of every example, (n,): the gradient of its own cost with respect to all
            parameters that learn, divided by nothing. None where a layer couples the examples.
        coupled: that layer; "" without one.
        outcome: what the network makes of the targets.
        before: by path, |delta_n| of the layers with weights before training, (n,) each.
        nonfinite: where NaN or infinity first came up; None if all is finite.
        largest, smallest: rows of the largest norms (of the largest costs where there are no
            norms), the largest first, and of the smallest, the smallest first. Those that are not
            finite are among the largest.
        outputs: by row, the network's outputs for these.
        chunks: the number of examples that were swept together.
    """

    net: Node
    loss: Loss
    parameters: int
    examples: int
    layers: tuple[LayerFigures, ...]
    costs: np.ndarray
    norms: np.ndarray | None
    coupled: str
    outcome: Outcome
    before: dict[str, np.ndarray]
    nonfinite: str | None
    largest: np.ndarray
    smallest: np.ndarray
    outputs: dict[int, np.ndarray]
    chunks: tuple[int, ...]

    @property
    def weighted(self) -> tuple[LayerFigures, ...]:
        """The layers with weights that have a delta."""
        return tuple(l for l in self.layers if l.parameters and l.delta_norms is not None)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON could have it, but for histograms and what is of each example."""
        layers = []
        for l in self.layers:
            spreads = {"activations": l.activations, "deltas": l.deltas}
            plain = ("count", "nonfinite", "zeros", "mean", "std", "least", "most")
            layers.append(
                {"path": l.path, "layer": l.layer, "parameters": l.parameters}
                | {
                    name: None if s is None else {key: getattr(s, key) for key in plain}
                    for name, s in spreads.items()
                }
                | {"delta_norm": None if l.delta_norms is None else quartiles(l.delta_norms)}
                | {"units": None if l.units is None else dataclasses.asdict(l.units)}
            )
        return {
            "examples": self.examples,
            "parameters": self.parameters,
            "loss": mean(self.costs),
            self.outcome.name: self.outcome.mean,
            "norms": None if self.norms is None else quartiles(self.norms),
            "coupled": self.coupled or None,
            "nonfinite": self.nonfinite,
            "largest": [int(i) for i in self.largest],
            "smallest": [int(i) for i in self.smallest],
            "delta_norms_before": {path: quartiles(v) for path, v in self.before.items()},
            "layers": layers,
        }


def mean(values: np.ndarray) -> float:
    """The mean of the finite ones; NaN if there is none."""
    own = values[np.isfinite(values)]
    return float(own.mean()) if own.size else float("nan")


def quartiles(values: np.ndarray) -> dict[str, float]:
    """Extremes and quartiles of the finite ones; NaN if there is none."""
    own = values[np.isfinite(values)]
    names = ("least", "lower_quartile", "median", "upper_quartile", "most")
    found = np.quantile(own, (0, 0.25, 0.5, 0.75, 1)) if own.size else np.full(5, np.nan)
    return dict(zip(names, map(float, found), strict=True))


def measure(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    *,
    before: PyTree = None,
    shown: int = 8,
    at_once: int = AT_ONCE,
) -> Inspection:
    """Sweep all examples through a network, and count what there is to see.

    Layers that draw random numbers draw none. The examples are swept in chunks, so that the memory
    does not grow with their number. A layer that couples them (`BatchNorm`) does so in each chunk
    by itself; then there are no gradients of single examples.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: the network's parameters.
        x: the inputs, (n, ...).
        y: the targets, as the loss wants them.
        before: parameters before training, to compare the deltas with.
        shown: how many examples of the largest norms are of interest, and of the smallest.
        at_once: so many activations in memory at a time, about.

    Raises:
        ValueError: no examples; inputs, targets or parameters that do not fit.
        TypeError: as `jbackprop.backprop`.
    """
    check_call(net, loss, params, x, y)
    shown = size_of(shown, "shown", least=0)
    at_once = size_of(at_once, "at_once")
    n = batch_size(x)
    if n == 0:
        raise ValueError("there are no examples to inspect: x is empty")
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    z = jax.eval_shape(lambda p, x: forward(net, p, x)[0], *shapes((params, x)))
    loss.check(z.shape, y)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return _measured(net, loss, params, x, y, before, shown, at_once)


def _measured(
    net: Node, loss: Loss, params: PyTree, x: Any, y: Any, before: PyTree, shown: int, at_once: int
) -> Inspection:
    sweeps = Sweeps(net, loss, params, x, y, at_once)
    seen = {path: _Seen() for path in layers_by_copy(net)}
    costs, outcomes = [], []
    for chunk in sweeps.chunks():
        for path, look in chunk.looks.items():
            seen[path].add(look, chunk.deltas.get(path))
        costs.append(np.asarray(chunk.costs, np.float64))
        own = jax.tree.map(lambda v, rows=chunk.rows: v[rows], y)
        outcomes.append(outcome(loss, chunk.outputs, own))
    for chunk in sweeps.chunks(back=False):
        for path, look in chunk.looks.items():
            seen[path].activations.recount(look.y)
    names = {path: repr(layer) for path, layer in layers_by_copy(net).items()}
    sizes = by_copy(net, {path: own for path, _, own in walk(net, params)})
    layers = tuple(
        seen[path].figures(i, path, names[path], count(sizes[path]))
        for i, path in enumerate(names, start=1)
    )
    earlier: dict[str, list[np.ndarray]] = {}
    if before is not None:
        weighted = [l.path for l in layers if l.parameters and l.delta_norms is not None]
        for chunk in sweeps.chunks(jax.tree.map(np.asarray, before)):
            for path in weighted:
                earlier.setdefault(path, []).append(norm(chunk.deltas[path]))
    cost, size, coupled = np.concatenate(costs), None, ""
    if net.couples_examples:
        coupled = coupling_layer(net)
    else:
        pairs = deferred(net, loss, params, x, y)
        size = np.asarray(norms(pairs, microbatch=sweeps.sizes[0]), np.float64)
    largest, smallest = extremes(cost if size is None else size, shown)
    rows = np.concatenate([largest, smallest])
    outputs = sweeps.outputs(rows) if rows.size else ()
    return Inspection(
        net,
        loss,
        count(params),
        sweeps.n,
        layers,
        cost,
        size,
        coupled,
        Outcome.joined(outcomes),
        {path: np.concatenate(parts) for path, parts in earlier.items()},
        _where(net, loss, params, x, y, layers, cost if size is None else cost + size),
        largest,
        smallest,
        dict(zip(map(int, rows), outputs, strict=True)),
        tuple(sweeps.sizes),
    )


def extremes(values: np.ndarray, shown: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the largest, the largest first, and of the smallest, the smallest first.

    None is in both. What is not finite counts as the largest; of equals the first comes first.
    """
    size = np.where(np.isfinite(values), values, np.inf)
    order = np.argsort(-size, kind="stable")
    most = min(shown, -(-len(values) // 2))
    least = min(shown, len(values) - most)
    return order[:most], order[len(order) - least :][::-1]


def _where(
    net: Node, loss: Loss, params: PyTree, x: Any, y: Any, layers: Any, values: np.ndarray
) -> str | None:
    """Where the first example that is not finite began to be so."""
    odd = np.flatnonzero(~np.isfinite(values))
    spreads = [s for l in layers for s in (l.activations, l.deltas) if s is not None]
    if not odd.size and not any(s.nonfinite for s in spreads):
        return None
    rows = odd[:1] if odd.size else np.arange(len(values))
    if net.couples_examples:
        rows = np.arange(len(values))
    part = jax.tree.map(lambda v: v[rows], (x, y))
    found = first_nonfinite(net, loss, params, *part)
    if found is None:
        return "the gradient of an example, while all that leads to it is finite"
    return f"{found}, example {odd[0]}" if 0 < odd.size < len(values) else found


class _Seen:
    """One layer, as the chunks come."""

    def __init__(self) -> None:
        self.activations, self.deltas = Tally(), Tally()
        self._shape = ""
        self._norms: list[np.ndarray] = []
        self._pairs = self._saturated = self._off = 0
        self._dead: np.ndarray | None = None

    def add(self, look: Any, delta: Any) -> None:
        shapes = [" x ".join(map(str, v.shape[1:])) or "1" for v in jax.tree.leaves(look.y)]
        same = len(shapes) > 1 and len(set(shapes)) == 1
        self._shape = f"{len(shapes)} of {shapes[0]}" if same else ", ".join(shapes)
        self.activations.add(look.y)
        if jax.tree.leaves(delta):
            self.deltas.add(delta, decades=True)
            self._norms.append(norm(delta))
        if look.slope is not None:
            slope = np.abs(np.asarray(look.slope, np.float64))
            slope = slope.reshape(len(slope), -1)
            self._pairs += slope.size
            self._saturated += int((slope < THRESHOLD).sum())
            self._off += int((slope == 0).sum())
            dead = (slope == 0).all(axis=0)
            self._dead = dead if self._dead is None else self._dead & dead

    def figures(self, number: int, path: str, layer: str, parameters: int) -> LayerFigures:
        units = None
        if self._dead is not None and self._pairs:
            shares = self._saturated / self._pairs, self._off / self._pairs
            units = Units(self._dead.size, *shares, float(self._dead.mean()))
        return LayerFigures(
            number,
            path,
            layer,
            parameters,
            self._shape,
            self.activations.spread(),
            self.deltas.spread(decades=True) if self._norms else None,
            np.concatenate(self._norms) if self._norms else None,
            units,
        )
