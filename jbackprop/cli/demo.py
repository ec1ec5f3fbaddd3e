"""jbackprop demo: the main job."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jbackprop.cli.output import print_json, say_of
from jbackprop.cli.parsed import positive


def add(commands: Any) -> None:
    """Tell the parser of the command."""
    demo = commands.add_parser(
        "demo",
        help="learn handwritten digits, with the proof beside it",
        description="Train on the digits that scikit-learn ships; print the agreement with "
        "jax.grad, the accuracy, the deltas, and time and memory; save a picture.",
    )
    demo.add_argument("--epochs", type=positive, default=40, help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    demo.add_argument(
        "--out", type=Path, default=Path("output"), metavar="FOLDER",
        help="where the picture goes; default: %(default)s/",
    )  # fmt: skip
    demo.add_argument("--quick", action="store_true", help="run the benchmark for a moment only")
    demo.set_defaults(run=run_demo)
    demo.add_argument("--json", action="store_true", help="print JSON on standard output")


def run_demo(args: argparse.Namespace) -> int:
    """The command: an exit status, 1 if a gradient is wrong."""
    from jbackprop import demo

    found = demo.run(args.epochs, args.seed, args.out, say_of(args), args.quick)
    if args.json:
        print_json(found)
    return 0 if found["ok"] else 1
