"""A contest: the same network written in several ways, compared in time, memory and compile time.

Every contestant is a function (params, *data) -> (value, gradients) with its own layout of the
parameters; before anything is measured, its value and its gradients must agree with those of the
first. One contestant is the base ("ours" where it takes part, else "plain"), and every other runs
in turns with it: f g, g f, f g, ... The figures are medians of the ratios of neighbours, because
two separate runs on one machine differ by more than the contestants do.

The temporary memory is what the compiler states. Tracing and compiling have their own columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jbackprop.bench import paired
from jbackprop.table import render


def _same(tree: Any) -> Any:
    return tree


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way of writing the workload.

    Attributes:
        name: which arrangement it is, in words.
        function: (params, *data) -> (value, gradients like params); it is jitted here.
        kind: "ours", "plain", "idiomatic", "tuned", or the name of a peer; see `Workload.goals`.
        pack: from the workload's parameters to this contestant's.
        unpack: from this contestant's gradients to the workload's order.
    """

    name: str
    function: Callable[..., Any]
    kind: str = "tuned"
    pack: Callable[[Any], Any] = _same
    unpack: Callable[[Any], Any] = _same


@dataclasses.dataclass(frozen=True)
class Workload:
    """One problem, and who competes in it.

    Attributes:
        name: what it is, with its sizes.
        data: -> (params, *data); the same for all.
        contestants: -> the contestants, made when the workload's turn comes. The first one is what
            the others must agree with.
        goals: for a kind of contestant, the most of its time and of its memory that ours may take.
        tolerance: for the relative difference of a gradient, leaf by leaf.
    """

    name: str
    data: Callable[[], tuple[Any, ...]]
    contestants: Callable[[], Sequence[Contestant]]
    goals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    tolerance: float = 1e-4


@dataclasses.dataclass(frozen=True)
class Result:
    """One contestant against the base.

    Attributes:
        workload, contestant, kind, base: names.
        milliseconds: median time of one call.
        time: median of the paired ratios, time of the base / its time; None for the base.
        quartiles: of these ratios.
        memory: temporary memory of the base / its own.
        temp_bytes: its temporary memory, as the compiler states it.
        trace, compile: seconds, from nothing; compiling includes lowering.
        difference: the worst relative difference of its gradients, leaf by leaf.
        goal: the most that `time` and `memory` may be, where there is such a goal.
    """

    workload: str
    contestant: str
    kind: str
    base: str
    milliseconds: float
    time: float | None
    quartiles: tuple[float, float] | None
    memory: float | None
    temp_bytes: int
    trace: float
    compile: float
    difference: float
    goal: tuple[float, float] | None

    @property
    def beats_base(self) -> bool:
        """Whether it is both faster and smaller."""
        return bool(self.time and self.memory and self.time > 1 and self.memory > 1)


def built(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, float, float]:
    """The compiled function, and the seconds to trace and to lower and compile it from nothing."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    middle = time.perf_counter()
    compiled = traced.lower().compile()
    return compiled, middle - start, time.perf_counter() - middle


def difference(found: Any, wanted: Any) -> float:
    """The worst relative difference of two trees of arrays, leaf by leaf.

    A leaf is measured by its own norm, but by no less than 1e-3 of the largest leaf's: the
    gradient of an attention key's bias, for one, is zero but for rounding.
    """
    a, b = (jax.tree.map(lambda g: np.asarray(g, np.float64), tree) for tree in (found, wanted))
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    largest = max(np.linalg.norm(w) for _, w in pairs)
    gaps = [np.linalg.norm(f - w) / max(np.linalg.norm(w), 1e-3 * largest) for f, w in pairs]
    return float(np.max(gaps))  # NaN where one is


def temp_bytes(compiled: Any) -> int:
    """The temporary memory of a compiled function; 0 where the compiler does not state it."""
    memory = compiled.memory_analysis()
    return 0 if memory is None else int(memory.temp_size_in_bytes)


def measure(
    load: Workload, seconds: float, rounds: int = 200, names: Sequence[str] = ()
) -> list[Result]:
    """Let the contestants of a workload compete; `names` selects those that contain one of them.

    Raises:
        ArithmeticError: a contestant's value or gradients differ from the first one's.
    """
    params, *data = load.data()
    people = list(load.contestants())
    reference = people[0]
    base = next((p for p in people if p.kind == "ours"), reference)
    if names:
        people = [p for p in people if p in (reference, base) or any(n in p.name for n in names)]
    people.sort(key=lambda p: p is not base)  # the base first: the others run against it
    wanted = jax.jit(reference.function)(reference.pack(params), *data)
    wanted = (wanted[0], reference.unpack(wanted[1]))
    results: list[Result] = []
    first: Any = None
    for person in tqdm(people, desc=load.name, leave=False, disable=not sys.stderr.isatty()):
        args = (person.pack(params), *data)
        compiled, trace, compile_ = built(person.function, args)
        value, grads = compiled(*args)
        gap = max(
            abs(float(value) / float(wanted[0]) - 1), difference(person.unpack(grads), wanted[1])
        )
        if not gap <= load.tolerance:
            raise ArithmeticError(
                f"{load.name}: {person.name} differs from {reference.name} by {gap:.1e}"
            )
        call = _caller(compiled, args)
        memory = temp_bytes(compiled)
        if person is base:
            first = call, memory
            times, ratios = None, None
        else:
            times = paired(first[0], call, rounds, seconds)
            ratios = [a / b for a, b in zip(*times, strict=True)]
        cuts = statistics.quantiles(ratios, n=4) if ratios else None
        results.append(
            Result(
                workload=load.name,
                contestant=person.name,
                kind=person.kind,
                base=base.name,
                milliseconds=1e3 * statistics.median(times[1]) if times else float("nan"),
                time=cuts[1] if cuts else None,
                quartiles=(cuts[0], cuts[2]) if cuts else None,
                memory=first[1] / memory if memory and person is not base else None,
                temp_bytes=memory,
                trace=trace,
                compile=compile_,
                difference=gap,
                goal=load.goals.get(person.kind) if base.kind == "ours" else None,
            )
        )
        if times:  # the base's own time: of its latest neighbour
            results[0] = dataclasses.replace(
                results[0], milliseconds=1e3 * statistics.median(times[0])
            )
    return results


def _caller(compiled: Any, args: Sequence[Any]) -> Callable[[], Any]:
    return lambda: compiled(*args)


def compile_seconds(load: Workload, kinds: Sequence[str], repeats: int = 5) -> list[Result]:
    """Only tracing and compiling, in turns and each time from nothing; the rest is left empty."""
    params, *data = load.data()
    people = [p for p in load.contestants() if p.kind in kinds]
    base = next((p for p in people if p.kind == "ours"), people[0])
    times: dict[str, list[tuple[float, float]]] = {p.name: [] for p in people}
    memory: dict[str, int] = {}
    for i in range(repeats):
        for person in people if i % 2 else reversed(people):
            compiled, *both = built(person.function, (person.pack(params), *data))
            times[person.name].append((both[0], both[1]))
            memory[person.name] = temp_bytes(compiled)
    results = []
    for person in people:
        total = [sum(a) / sum(b) for a, b in zip(times[base.name], times[person.name], strict=True)]
        cuts = statistics.quantiles(total, n=4)
        results.append(
            Result(
                workload=load.name,
                contestant=person.name,
                kind=person.kind,
                base=base.name,
                milliseconds=1e3 * statistics.median(sum(t) for t in times[person.name]),
                time=None if person is base else cuts[1],
                quartiles=None if person is base else (cuts[0], cuts[2]),
                memory=None if person is base else memory[base.name] / memory[person.name],
                temp_bytes=memory[person.name],
                trace=statistics.median(t[0] for t in times[person.name]),
                compile=statistics.median(t[1] for t in times[person.name]),
                difference=0.0,
                goal=load.goals.get(person.kind) if base.kind == "ours" else None,
            )
        )
    return results


def on_front(result: Result, results: Sequence[Result]) -> bool:
    """Whether no other contestant of the workload is both faster and smaller."""

    def of(r: Result) -> tuple[float, float]:
        return r.time or 1.0, 1 / r.temp_bytes if r.temp_bytes else float("inf")

    time_, small = of(result)
    return not any(of(r)[0] > time_ and of(r)[1] > small for r in results)


def table(results: Sequence[Result], title: str = "") -> str:
    """The results of one workload as text; a star marks the front of time and memory."""
    rows = []
    for r in results:
        goal = "" if r.goal is None else " / ".join(f"{g:.2f}" for g in r.goal)
        if r.goal is not None and r.time is not None:
            met = r.time <= r.goal[0] and (r.memory or 0) <= r.goal[1]
            goal += " met" if met else " missed"
        rows.append(
            (
                ("* " if on_front(r, results) else "  ") + r.contestant,
                r.kind,
                f"{r.milliseconds:.2f}",
                f"{r.temp_bytes / 2**20:.2f}",
                "1"
                if r.time is None or r.quartiles is None
                else f"{r.time:.3f} ({r.quartiles[0]:.2f} to {r.quartiles[1]:.2f})",
                "1" if r.memory is None else f"{r.memory:.3f}",
                goal or ("both" if r.beats_base else ""),
                f"{r.trace:.2f}",
                f"{r.compile:.2f}",
                f"{r.difference:.0e}",
            )
        )
    base = results[0].base
    columns = (
        "arrangement", "kind", ">ms", ">temp MiB", f">time: {base} / it", ">memory", "goal",
        ">trace s", ">compile s", ">difference",
    )  # fmt: skip
    return render(columns, rows, title or results[0].workload)


def machine() -> dict[str, object]:
    """What the figures are from."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": str(jax.devices()[0].device_kind),
        "cores": cores if jax.default_backend() == "cpu" else len(jax.devices()),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "dtype": "float32",
    }


def save(path: str, results: Sequence[Any]) -> None:
    """Write results with the machine that they are from; workloads measured earlier stay."""
    file = Path(path)
    new = {r.workload for r in results}
    old = json.loads(file.read_text())["results"] if file.exists() else []
    kept = [r for r in old if r["workload"] not in new]
    saved = machine() | {"results": kept + [dataclasses.asdict(r) for r in results]}
    file.write_text(json.dumps(saved, indent=1) + "\n")


def main(
    loads: Sequence[Workload],
    compiled: Sequence[Workload] = (),
    wide: Sequence[Workload] = (),
    about: str = "",
) -> None:
    """The command line: measure, print a table for each workload, and save on request.

    Args:
        loads: compared in time and memory.
        compiled: compared in the time to trace and compile.
        wide: what --all measures instead, with more contestants.
        about: the description for --help.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each contestant")
    parser.add_argument("--rounds", type=int, default=200, help="at most, for each contestant")
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    parser.add_argument("--names", nargs="*", default=(), help="contestants that contain one")
    parser.add_argument("--repeats", type=int, default=5, help="of tracing and compiling")
    parser.add_argument("--all", action="store_true", help="every arrangement that was tried")
    parser.add_argument("--out", help="a .json file for the results")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for load in wide if options.all and wide else (*loads, *compiled):
        if options.only not in load.name:
            continue
        if load in compiled:
            kinds = ("ours", "plain", "idiomatic")
            results = compile_seconds(load, kinds, options.repeats)
        else:
            results = measure(load, options.seconds, options.rounds, options.names)
        print("\n" + table(results), flush=True)
        if options.out:
            save(options.out, results)
