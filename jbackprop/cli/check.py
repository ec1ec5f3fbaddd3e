"""jbackprop check: every rule of the library, or a check of the user's."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from tqdm import tqdm

from jbackprop import catalogue
from jbackprop.check import Report
from jbackprop.cli.output import matching, print_json
from jbackprop.table import render


def add(commands: Any) -> None:
    """Tell the parser of the command."""
    checks = commands.add_parser(
        "check",
        help="prove every rule against jax.grad (minutes), or run a check of yours",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Compare every delta and gradient of every layer and loss with jax.grad in\n"
        "float64; or run a check of your own. The exit status is 1 unless all is right.",
        epilog="a check of your own, in mine.py:\n\n"
        "  def swish():\n"
        "      return jb.check.vjp(my_swish, jnp.linspace(-3, 3, 20))\n\n"
        "  jbackprop check mine:swish\n",
    )
    checks.add_argument(
        "target", nargs="?", metavar="MODULE:FUNCTION",
        help="a function without arguments that returns a Report of jb.check, or a list of them",
    )  # fmt: skip
    checks.add_argument("--only", metavar="TEXT", default="", help="rules whose name contains TEXT")
    checks.set_defaults(run=run_check)
    checks.add_argument("--json", action="store_true", help="print JSON on standard output")


def run_check(args: argparse.Namespace) -> int:
    """The command: an exit status, 1 if anything is wrong."""
    return _check_rules(args) if args.target is None else _check_target(args)


def _check_target(args: argparse.Namespace) -> int:
    """Run one check: a function that returns a report, or several."""
    module, _, name = args.target.rpartition(":")
    if not module or not name:
        raise ValueError(f"{args.target}: give module:function, or file.py:function")
    if args.only:
        raise ValueError("--only chooses among the rules of the library: leave it out")
    found = _module(module)
    if not hasattr(found, name):
        raise ValueError(f"there is no {name} in {module}")
    run = getattr(found, name)
    try:
        result = run() if callable(run) else run
    except AssertionError as error:  # of an asserting twin
        print(error, file=sys.stderr)
        return 1
    reports = list(result) if isinstance(result, list | tuple) else [result]
    if not reports or not all(isinstance(report, Report) for report in reports):
        raise TypeError(
            f"{args.target} must return a Report of jb.check, or a list of them, not {result!r}; "
            "the asserting twins return nothing: call the check itself"
        )
    if args.json:
        shown = [report.as_dict() for report in reports]
        print_json({"ok": all(report.ok for report in reports), "reports": shown})
    else:
        print("\n\n".join(map(str, reports)))
    return 0 if all(report.ok for report in reports) else 1


def _module(name: str) -> ModuleType:
    is_file = name.endswith(".py")
    sys.path.insert(0, str(Path(name).resolve().parent if is_file else Path.cwd()))  # as python has
    if not is_file:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _compiled_quickly() -> Iterator[None]:
    """Nearly all of the time is XLA's, and what it compiles here runs once."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


@_compiled_quickly()
def _check_rules(args: argparse.Namespace) -> int:
    cases = catalogue.cases()
    rows, found = [], []
    chosen = matching(args.only, [case.name for case in cases], "rule")
    for i in tqdm(chosen, unit="rule", leave=False, disable=args.json or not sys.stderr.isatty()):
        case = cases[i]  # in float64 the truth is confirmed by numbers, which serves both
        verdicts = {"float64": case.check("float64"), "float32": case.check("float32", "autodiff")}
        ok = all(verdict.ok for verdict in verdicts.values())
        worst = {dtype: verdict.worst_error for dtype, verdict in verdicts.items()}
        found.append({"rule": case.name, "ok": ok, "worst_relative_error": worst})
        rows.append((case.name, *(f"{e:.1e}" for e in worst.values()), "right" if ok else "WRONG"))
    wrong = sum(not row["ok"] for row in found)
    if args.json:
        print_json({"ok": not wrong, "rules": found})
    else:
        print("Worst relative error of all deltas and gradients, against jax.grad in float64\n")
        print(render(("rule", ">in float64", ">in float32", "verdict"), rows))
        print(f"\n{len(found) - wrong} of {len(found)} rules are right")
    return 1 if wrong else 0
