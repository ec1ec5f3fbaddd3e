"""Gradient checkers on planted errors and on right gradients: `python benchmarks/checker.py`.

Ours beside `jax.test_util.check_grads`, `chex.assert_numerical_grads` and torch's `gradcheck`, each
with its defaults (`planted/peers.py` says how). `--peers none` leaves them out; `--prove` tries no
checker, but the catalogue: every entry against finite differences in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from planted import PLANTED, RIGHT, Entry, Planted
from planted.peers import PEERS, on_device, peer, precision
from planted.proof import is_proved
from tqdm import tqdm

import jbackprop as jb

GROUPS = {
    "a constant factor": (
        "sign", "constant factor", "one leaf scaled", "sum for mean", "mean for sum",
        "wrong count", "clipped",
    ),
    "1 part in 1,000 (float32)": ("one in a thousand",),
    "1 part in 20 (16 bits)": ("one in twenty",),
    "transposed, axes permuted, flipped": ("transposed", "axes permuted", "kernel flipped"),
    "another leaf's gradient": ("another leaf's",),
    "a bias not reduced": ("not reduced",),
    "zero, NaN, infinite": ("zero", "not finite"),
    "single entries, rows": ("single entry", "one row"),
    "f' missing, at a, of the neighbour": ("f' missing", "f' at a", "f' of the neighbour"),
    "W not transposed on the way back": ("W not transposed",),
    "output delta": ("delta times f' again", "wrong delta"),
    "regularisation": ("regularisation forgotten", "regularisation too much"),
    "a path or a term forgotten": ("product rule", "branch forgotten", "stop_gradient", "time"),
    "the derivative of one operation": (
        "maximum", "clip forgotten", "normalisation", "softmax", "attention", "repeated ids",
        "dropout mask", "cotangent",
    ),
    "a wrong rule inside": ("rule inside",),
    "stale, other data, noise": ("stale", "example left out", "noise"),
}  # fmt: skip
"""The rows of the table of planted errors, and the kinds in each."""


def report(entry: Entry) -> Any:
    """What ours says."""
    check: Any = jb.check
    with precision(entry.dtype), warnings.catch_warnings():
        warnings.simplefilter("ignore", jb.check.TruthWarning)
        args = on_device(entry)
        if entry.call != "gradient":
            return getattr(check, entry.call)(entry.fun, *args)
        assert entry.candidate is not None
        return check.gradient(entry.fun, *args, candidate=jax.jit(entry.candidate)(*args))


def diagnosed(entry: Planted, report: Any) -> bool:
    """Whether a diagnosis says what is expected; never where nothing is."""
    expected = entry.expect.lower()
    return bool(expected) and any(expected in leaf.diagnosis.lower() for leaf in report.failures)


@dataclasses.dataclass(frozen=True)
class Result:
    """What all said of one entry."""

    id: str
    kind: str
    planted: bool
    ours: str
    expect: str = ""
    diagnosed: bool = False
    diagnosis: str = ""
    peers: dict[str, str] = dataclasses.field(default_factory=dict)


def judge(
    entry: Entry, peers: Sequence[str], known: dict[str, str], seconds: dict[str, float]
) -> Result:
    """Try on one entry ours and the peers that are not known; add the seconds that each takes."""

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = call()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return found

    found = timed("ours", functools.partial(report, entry))
    words = dict.fromkeys(leaf.diagnosis for leaf in found.failures if leaf.diagnosis)
    others = {
        name: known.get(name) or timed(name, functools.partial(peer, name, entry)) for name in peers
    }
    result = Result(entry.id, entry.kind, isinstance(entry, Planted), found.verdict, peers=others)
    jax.clear_caches()  # hundreds of compiled programs would fill the memory
    if not isinstance(entry, Planted):
        return result
    told = diagnosed(entry, found)
    return dataclasses.replace(
        result, expect=entry.expect, diagnosed=told, diagnosis="; ".join(words)
    )


def summary(results: Sequence[Result]) -> str:
    """Two tables in Markdown: wrong gradients caught, of every kind; false alarms."""
    names = list(results[0].peers)
    wrong = [r for r in results if r.planted]
    right = [r for r in results if not r.planted]

    def caught(rows: Sequence[Result]) -> tuple[Any, ...]:
        due = [r for r in rows if r.expect]
        told = f"{sum(r.diagnosed for r in due)}/{len(due)}" if due else ""
        found = sum(r.ours == "wrong" for r in rows)
        return len(rows), found, told, *(_caught(rows, name) for name in names)

    def alarms(rows: Sequence[Result]) -> tuple[Any, ...]:
        said = [sum(r.ours == verdict for r in rows) for verdict in ("wrong", "inconclusive")]
        return len(rows), *said, *(_caught(rows, name) for name in names)

    kinds = {kind: group for group, kinds in GROUPS.items() for kind in kinds}
    head = "planted error", "n", "ours", "diagnosed", *names
    table = _markdown(head, wrong, lambda r: kinds[r.kind], caught)
    head = "right gradient: false alarms", "n", "ours", "inconclusive", *names
    return f"{table}\n\n{_markdown(head, right, lambda r: r.kind, alarms)}"


def _caught(rows: Sequence[Result], name: str) -> str:
    """Caught, of those that it could be called on."""
    called = [r.peers[name] for r in rows if r.peers[name] in ("caught", "passed")]
    if not called:
        return "n/a"
    return f"{called.count('caught')}" + (f"/{len(called)}" if len(called) < len(rows) else "")


def _markdown(
    head: Sequence[str],
    results: Sequence[Result],
    group: Callable[[Result], str],
    cells: Callable[[Sequence[Result]], Sequence[Any]],
) -> str:
    """A line for every group, and one for all."""
    names = dict.fromkeys(map(group, results))
    rows = [(name, *cells([r for r in results if group(r) == name])) for name in names]
    lines = [head, ("---", *["--:"] * (len(head) - 1)), *rows, ("all", *cells(results))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> dict[str, str]:
    """What it ran on."""
    device = f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"
    if jax.default_backend() != "cpu":
        device = str(jax.devices()[0].device_kind)
    found = {"device": device, "python": platform.python_version()}
    for package in ("jax", "numpy", "chex", "torch"):
        if importlib.util.find_spec(package):
            found[package] = importlib.import_module(package).__version__
    return found


def save(path: Path, results: Sequence[Result], seconds: dict[str, float]) -> None:
    """As JSON, one result a line."""
    told = machine() | {"seconds": {name: round(value) for name, value in seconds.items()}}
    lines = ",\n".join(json.dumps(dataclasses.asdict(result)) for result in results)
    path.write_text(f'{json.dumps(told)[:-1]}, "results": [\n{lines}\n]}}\n')


def main() -> None:
    """Run the catalogue and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", default=",".join(PEERS), help="a,b,... or none")
    parser.add_argument("--only", default="", help="entries whose id has this text")
    parser.add_argument("--prove", action="store_true", help="only prove the catalogue itself")
    parser.add_argument("--keep", type=Path, help="saved before: what peers said is taken from it")
    parser.add_argument("--out", type=Path, help="save all that was said, as JSON")
    options = parser.parse_args()
    peers = [] if options.peers == "none" else options.peers.split(",")
    entries: list[Entry] = [e for e in (*PLANTED, *RIGHT) if options.only in e.id]
    bar = tqdm(entries, unit="gradient", disable=not sys.stderr.isatty())
    if options.prove:
        unproved = [entry.id for entry in bar if not is_proved(entry)]
        sys.exit("\n".join(["not what the catalogue says:", *unproved]) if unproved else None)
    kept = json.loads(options.keep.read_text()) if options.keep else {"results": []}
    known = {r["id"]: r["peers"] for r in kept["results"]}
    seconds = kept.get("seconds", {}) | {"ours": 0.0}
    results = [judge(entry, peers, known.get(entry.id, {}), seconds) for entry in bar]
    for r in results:
        undiagnosed = r.planted and r.expect and not r.diagnosed
        if r.planted != (r.ours == "wrong") or undiagnosed:
            print(f"{r.id}: {r.ours}; due: {r.expect or '-'}; said: {r.diagnosis or '-'}")
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + "\n")
    print(summary(results))
    if options.out:
        save(options.out, results, seconds)


if __name__ == "__main__":
    main()
