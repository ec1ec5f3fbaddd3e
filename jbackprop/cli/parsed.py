"""What stands on the command line, as values; raise what argparse makes a usage error of."""

from __future__ import annotations

import argparse

from jbackprop import datasets


def add_data(parser: argparse.ArgumentParser) -> None:
    """The table of numbers that a command is about."""
    parser.add_argument(
        "data",
        help="a .csv file (features and one target column), an .npz file (arrays x and y), or one "
        f"of scikit-learn's: {', '.join(datasets.SHIPPED)}",
    )
    parser.add_argument("--target", help="CSV: the target's column, by name or number; the last")


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def rate(text: str) -> float:
    """A positive number."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, not {text}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    """Widths, such as 128,64; "none" for none."""
    return () if text == "none" else tuple(positive(part) for part in text.split(","))


def batch(text: str) -> int | None:
    """A number of examples, or None for "all"."""
    return None if text == "all" else positive(text)


def shares(text: str) -> tuple[float, ...]:
    """Two shares that leave something."""
    values = tuple(float(part) for part in text.split(","))
    if len(values) != 2 or not all(0 < v < 1 for v in values) or sum(values) >= 1:
        raise argparse.ArgumentTypeError("must be two shares, such as 0.1,0.2")
    return values
