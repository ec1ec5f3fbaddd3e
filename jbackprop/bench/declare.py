"""What is measured, as data: a workload, and who competes in it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Function = Callable[..., Any]


def same(tree: Any) -> Any:
    """The tree as it is."""
    return tree


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way of doing the work.

    Attributes:
        name: which arrangement it is, in words.
        function: (params, *data) -> the answer; see `Workload`.
        kind: "plain", "ours", "idiomatic", "tuned", "variant" (of ours), or the name of a peer.
        pack: from the workload's parameters to this contestant's.
        unpack: from this contestant's gradients, or its whole answer where that has no value, to
            the workload's order.
        jit: compile it here, ahead of time. Otherwise it compiles itself, as its users have it, and
            what the compiler would say of it is not known.
        own_truth: its answer is another than everybody's, by definition: it is compared with itself
            in float64.
        drawn: its answer is drawn at random, in each dtype another: there is nothing to compare.
    """

    name: str
    function: Function
    kind: str = "tuned"
    pack: Callable[[Any], Any] = same
    unpack: Callable[[Any], Any] = same
    jit: bool = True
    own_truth: bool = False
    drawn: bool = False


@dataclasses.dataclass(frozen=True)
class Absent:
    """A contestant that is not there: a row that says why."""

    name: str
    kind: str
    note: str


def peer(name: str, kind: str, module: str, make: Callable[[], Contestant]) -> Contestant | Absent:
    """A contestant that needs a package, or the row that says that it is not installed."""
    if importlib.util.find_spec(module) is None:
        return Absent(name, kind, f"not installed: {module}")
    return dataclasses.replace(make(), name=name, kind=kind)


def one_of_each_kind(load: Workload) -> Workload:
    """The same workload with the first contestant of each kind alone."""

    def few() -> list[Contestant | Absent]:
        firsts: dict[str, Contestant | Absent] = {}
        for person in load.contestants():
            firsts.setdefault(person.kind, person)
        return [p for kind, p in firsts.items() if kind != "variant"]

    return dataclasses.replace(load, contestants=few)


@dataclasses.dataclass(frozen=True)
class Outside:
    """Contestants in a process of their own: a script of `jbackprop.bench.peers`, and its task."""

    script: str
    task: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """One problem, and who competes in it.

    Attributes:
        name: what it is, with its sizes; unique in the suite.
        family: the kind of network: "mlp", "deep", "cnn", "transformer", ...
        data: -> (params, *data), in float32; the same for all.
        contestants: -> everybody, made when the workload's turn comes. The first one is the
            reference: its answer in float64 is the truth, and its time the unit unless `unit` says
            otherwise.
        question: what the answer is: "gradient", a quantity, "step" or "epoch".
        unit: what is timed as the unit, where it is not the reference; not in the contest.
        valued: the answer is (value, gradients); otherwise any tree.
        outside: contestants in processes of their own.
        flops: floating-point operations of the unit's matmuls and convolutions, counted on paper: a
            multiplication and an addition are two. 0 where nobody counted.
        level: 0 of the quick run, 1 of the usual, 2 of the full one.
        axis: of a series, its name and this one's size: ("batch", 64).
        theory: of a series, by kind: exponents of time and of temporary memory in that size.
        tolerance: for the relative error of an answer; see `jbackprop.bench.contest.gap`.
    """

    name: str
    family: str
    data: Callable[[], tuple[Any, ...]]
    contestants: Callable[[], Sequence[Contestant | Absent]]
    question: str = "gradient"
    unit: Contestant | None = None
    valued: bool = True
    outside: Sequence[Outside] = ()
    flops: float = 0.0
    level: int = 1
    axis: tuple[str, int] | None = None
    theory: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-4
