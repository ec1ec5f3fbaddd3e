"""The command line: jbackprop demo, train, inspect, check and bench."""

from __future__ import annotations

import argparse
import csv
import sys
import zipfile
from collections.abc import Sequence

import jbackprop
from jbackprop.cli import bench, check, demo, inspect, train

_EXPECTED = (
    ValueError, TypeError, ArithmeticError, OSError, ImportError, EOFError, csv.Error,
    zipfile.BadZipFile,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 where something is wrong, 2 for usage."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except _EXPECTED as error:
        notes = "".join(
            f"\n  {note}" for note in getattr(error, "__notes__", ()) if "JAX" not in note
        )
        print(f"jbackprop {args.command}: {error}{notes}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jbackprop",
        description="Backpropagation with the lid off: hand-derived delta rules for JAX.",
        epilog="Start with: jbackprop demo",
    )
    parser.add_argument("--version", action="version", version=f"jbackprop {jbackprop.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in (demo, train, inspect, check, bench):
        each.add(commands)
    return parser
