"""The other end of `jbackprop.bench.outside`: contestants that are called when it is their turn."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Answer = Callable[[], Any]


def told() -> tuple[dict[str, Any], Any]:
    """The arrays of the problem, and what stands on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("problem")
    parser.add_argument("task")
    parser.add_argument("question")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gib", type=float, default=1.0)
    options = parser.parse_args()
    most = int(options.gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return dict(np.load(options.problem)), options


def below(arrays: dict[str, Any], name: str) -> dict[str, Any]:
    """The arrays of a tree, by their paths in it."""
    return {k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)}


def error_of(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """As `jbackprop.bench.contest.gap` has it."""
    a, b = ([np.asarray(v, np.float64) for v in each] for each in (found, wanted))
    if len(b) == 1 and b[0].ndim == 1:
        a, b = list(a[0]), list(b[0])
    sizes = [float(np.linalg.norm(w)) for w in b]
    floor = 1e-3 * max(sizes)
    gaps = [np.linalg.norm(v - w) / max(s, floor) for v, w, s in zip(a, b, sizes, strict=True)]
    return float(np.max(gaps))


def serve(
    people: Iterable[tuple[str, str, Callable[[], Answer]]], compare: Callable[[Any], float | None]
) -> None:
    """Build everybody, say what came of it, and then do as asked.

    Args:
        people: name, kind, and what makes the answering function.
        compare: from an answer to its relative error; None where there is nothing to compare with.
    """
    ready: dict[str, Answer] = {}
    for name, kind, make in people:
        row: dict[str, Any] = {"contestant": name, "kind": kind}
        try:
            answer = make()
            start = time.perf_counter()
            found = answer()
            row["first"] = time.perf_counter() - start
            row["error"] = compare(found)
            answer()
            ready[name] = answer
        except Exception as error:  # a peer that does not do it, or has no room, or is not there
            row["note"] = (str(error).splitlines() or [type(error).__name__])[0][:60]
        print(json.dumps(row), flush=True)
    print("ready", flush=True)
    for line in sys.stdin:
        name, calls = line.rstrip("\n").split("\t")
        start = time.perf_counter()
        for _ in range(int(calls)):
            ready[name]()
        print(time.perf_counter() - start, flush=True)
