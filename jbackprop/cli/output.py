"""What every command says to programs, and what it may be told of names."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from typing import Any


def say_of(args: argparse.Namespace) -> Callable[..., None]:
    """print, or with --json nothing: standard output is then for the program that reads it."""
    return (lambda *_, **__: None) if args.json else print


def print_json(value: Any) -> None:
    """Print a value; for programs that read it."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    """The same with null for what JSON has no word for: NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def matching(only: str, names: Sequence[str], what: str) -> list[int]:
    """Which names contain the text of --only; raise where none does."""
    chosen = [i for i, name in enumerate(names) if only.lower() in name.lower()]
    if not chosen:
        few = "; ".join(sorted(names, key=len)[:10])
        raise ValueError(
            f"--only {only}: no {what} contains that; among the {len(names)} there are {few}"
        )
    return chosen
