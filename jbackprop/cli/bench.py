"""jbackprop bench: manual against automatic gradients here, and two such runs compared."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from jbackprop.bench import report
from jbackprop.bench.comparison import compare, table
from jbackprop.bench.declare import one_of_each_kind
from jbackprop.bench.results import Run, joined
from jbackprop.bench.run import SECONDS, run, write
from jbackprop.bench.suite import WORKLOADS
from jbackprop.cli.output import matching, print_json, say_of
from jbackprop.cli.parsed import rate
from jbackprop.table import render

QUICK, USUAL, FULL = range(3)


def add(commands: Any) -> None:
    """Tell the parser of the command."""
    benches = commands.add_parser(
        "bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="how fast, lean and exact: manual against automatic gradients",
        description="Time, memory and compile time of hand-derived gradients beside\n"
        "jax.value_and_grad of the same network in plain JAX, jax.checkpoint, Flax, Equinox and\n"
        "others, and how far each is from float64. All take turns; who is missing is a row that\n"
        "says so.",
        epilog="examples:\n"
        "  jbackprop bench --quick                      under two minutes\n"
        "  jbackprop bench --only lstm --out output/lstm\n"
        "  jbackprop bench --full --peaks --peers peers/bin/python\n"
        "  jbackprop bench compare before.json after.json\n"
        "  jbackprop bench report results.json more.json --out page\n\n"
        "--out gets results.json, report.html and charts as PNG.",
    )
    level = benches.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_true", help="a few workloads, and one contestant of each kind"
    )
    level.add_argument("--full", action="store_true", help="all of them, and how cost grows: hours")
    benches.add_argument("--only", metavar="TEXT", default="", help="workloads that contain TEXT")
    benches.add_argument("--list", action="store_true", help="print the workloads, and stop")
    benches.add_argument(
        "--seconds", type=rate, help="for the samples of each contestant; default: "
        f"{SECONDS[USUAL]}, with --quick {SECONDS[QUICK]}",
    )  # fmt: skip
    benches.add_argument(
        "--out", type=Path, default=Path("output/bench"), metavar="FOLDER",
        help="default: %(default)s/",
    )  # fmt: skip
    benches.add_argument(
        "--peers", metavar="PYTHON", help="the Python that has PyTorch, Opacus, BackPACK and "
        "scikit-learn, which run in a process of their own; default: this one",
    )  # fmt: skip
    benches.add_argument("--no-peers", action="store_true", help="nobody in a process of their own")
    benches.add_argument(
        "--precision", choices=("highest", "default"), default="highest",
        help="of float32 matmuls; default lets accelerators use TF32 or bfloat16",
    )  # fmt: skip
    benches.add_argument(
        "--peaks", action="store_true", help="also start a process for each of the main "
        "contestants, to see how much memory one takes at most",
    )  # fmt: skip
    benches.add_argument("--json", action="store_true", help="print JSON on standard output")
    benches.set_defaults(run=run_bench)
    what = benches.add_subparsers(dest="what", metavar="compare, report")
    both = what.add_parser(
        "compare",
        help="two results.json: what has become faster or slower, beyond the noise",
        description="Compare two runs by their ratios to the unit of the same run. The exit status "
        "is 1 where anything is slower or takes more memory.",
    )
    both.add_argument("a", type=Path, metavar="A.json")
    both.add_argument("b", type=Path, metavar="B.json")
    both.add_argument("--json", action="store_true", help="print JSON on standard output")
    both.set_defaults(run=run_compare)
    pages = what.add_parser(
        "report",
        help="the page and the charts of results.json, or of several together",
        description="Write the page and the charts of runs that were measured before. Of several, "
        "from one machine, a workload that is in more than one counts as in the last.",
    )
    pages.add_argument("runs", type=Path, nargs="+", metavar="RESULTS.json")
    pages.add_argument(
        "--out", type=Path, default=Path("output/bench"), metavar="FOLDER",
        help="default: %(default)s/",
    )  # fmt: skip
    pages.set_defaults(run=run_report)


def run_bench(args: argparse.Namespace) -> int:
    """The command: an exit status, 1 where ours was wrong."""
    level = QUICK if args.quick else FULL if args.full or args.only or args.list else USUAL
    loads = [load for load in WORKLOADS if load.level <= level]
    loads = [loads[i] for i in matching(args.only, [load.name for load in loads], "workload")]
    if args.list:
        columns = ("workload", "question", "in")
        names = ("--quick", "", "--full")
        print(render(columns, [(load.name, load.question, names[load.level]) for load in loads]))
        return 0
    if args.quick:
        loads = [one_of_each_kind(load) for load in loads]
    seconds = args.seconds or SECONDS[QUICK if args.quick else USUAL]
    # starting those outside and compiling there takes longer than all of the quick run
    python = None if args.no_peers or (args.quick and not args.peers) else args.peers
    if python is None and not (args.no_peers or args.quick):
        python = sys.executable
    precision = None if args.precision == "default" else args.precision
    with jax.default_matmul_precision(precision):
        done = run(loads, seconds, args.out, python, args.peaks, say_of(args))
    if args.json:
        print_json(dataclasses.asdict(done))
    else:
        print(render(report.VERDICTS, report.verdict_lines(done)))
        if grown := report.growth_table(done):
            print("\n" + grown)
        print(f"\nresults, charts and the report: {args.out / 'report.html'}")
    wrong = [r for r in done.rows if r.kind in ("ours", "variant", "rule") and r.note]
    for row in wrong:
        print(f"{row.workload}: {row.contestant}: {row.note}", file=sys.stderr)
    return 1 if wrong else 0


def run_compare(args: argparse.Namespace) -> int:
    """The command: an exit status, 1 where B is worse."""
    a, b = Run.load(args.a), Run.load(args.b)
    changes = compare(a, b)
    if args.json:
        print_json([dataclasses.asdict(change) for change in changes])
    else:
        print(table(changes, a, b))
    return 1 if any(change.worse for change in changes) else 0


def run_report(args: argparse.Namespace) -> int:
    """The command."""
    whole = joined([Run.load(path) for path in args.runs])
    args.out.mkdir(parents=True, exist_ok=True)
    whole.save(args.out / "results.json")
    write(whole, args.out)
    print(render(report.VERDICTS, report.verdict_lines(whole)))
    if grown := report.growth_table(whole):
        print("\n" + grown)
    print(f"\nresults, charts and the report: {args.out / 'report.html'}")
    return 0
