"""Tables of numbers for the command line: scikit-learn's own data sets, CSV and NumPy files."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

SHIPPED = ("breast_cancer", "diabetes", "digits", "iris", "wine")
"""The data sets that scikit-learn ships, without a download."""

MOST_CLASSES = 50


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A table.

    Attributes:
        name: of the file or data set.
        x: features, (n, p) float32.
        y: labels (n,) int32 from 0, or real targets (n, q) float32.
        classes: the names of the labels; empty where the targets are real.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]


def load(source: str, target: str | None = None) -> Dataset:
    """Load one of `SHIPPED`, a `.csv` or an `.npz` file (arrays x and y).

    Targets that are words, or at most 50 whole numbers, are classes; others are real.

    Args:
        source: the name or the path.
        target: for CSV, the name (or number from 0) of the target's column; the last by default.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not a table of numbers; names the place.
        ImportError: scikit-learn is missing for one of its data sets.
    """
    if source in SHIPPED:
        return _shipped(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"{source}: there is no such file, and scikit-learn's data sets are "
            f"{', '.join(SHIPPED)}"
        )
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            missing = {"x", "y"} - set(arrays)
            if missing:
                raise ValueError(
                    f"{source} needs the arrays x and y, but has {', '.join(arrays) or 'none'}"
                )
            return _table(path.name, arrays["x"], arrays["y"])
    if path.suffix == ".csv":
        return _csv(path, target)
    raise ValueError(f"{source}: only .csv and .npz files can be read, not {path.suffix!r}")


def _shipped(name: str) -> Dataset:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            f"the data set {name} comes with scikit-learn: pip install 'jbackprop[data]'"
        ) from error
    bunch = getattr(datasets, f"load_{name}")()
    return _table(name, bunch.data, bunch.target, [str(c) for c in bunch.get("target_names", [])])


def _csv(path: Path, target: str | None) -> Dataset:
    with path.open(newline="", encoding="utf-8-sig") as file:
        first_line = file.readline()
        file.seek(0)
        delimiter = max(",;\t", key=first_line.count)
        rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    if len(rows) < 2:
        raise ValueError(f"{path}: a table needs at least two rows, but there are {len(rows)}")
    if len(rows[0]) < 2:
        raise ValueError(
            f"{path}: a table needs features and a target, but there is one column, "
            f"{rows[0][0]!r}; columns are separated by commas, semicolons or tabs"
        )
    header = [str(i) for i in range(len(rows[0]))]
    first = 1
    if not any(_number(cell) is not None for cell in rows[0]):
        header, first = [cell.strip() for cell in rows[0]], 2
        rows = rows[1:]
    column = len(header) - 1
    if target is not None:
        names = {name: i for i, name in enumerate(header)} | {
            str(i): i for i in range(len(header)) if str(i) not in header
        }
        if target not in names:
            raise ValueError(f"{path}: no column {target!r}; there are {', '.join(header)}")
        column = names[target]
    x, y = [], []
    for number, row in enumerate(rows, start=first):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells, but {len(header)} were expected"
            )
        cells = [_number(cell) for cell in row]
        for name, cell, value in zip(header, row, cells, strict=True):
            if value is None and name != header[column]:
                raise ValueError(
                    f"{path}, line {number}, column {name!r}: {cell!r} is not a number; features "
                    "must be numbers"
                )
        y.append(row[column].strip())
        x.append([value for i, value in enumerate(cells) if i != column])
    numbers = [_number(cell) for cell in y]
    words = any(value is None for value in numbers)
    return _table(path.name, np.array(x, dtype=float), np.array(y if words else numbers))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _table(name: str, x: Any, y: Any, classes: Any = ()) -> Dataset:
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "fiub":
        raise ValueError(f"{name}: the features have the dtype {x.dtype}, which is no number")
    x = x.reshape(len(x), -1).astype(np.float32)
    if len(x) != len(y):
        raise ValueError(f"{name}: x has {len(x)} rows, but y {len(y)}")
    if not np.isfinite(x).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(f"{name}: x[{row}, {column}] is {x[row, column]}; fill it in first")
    if y.ndim == 1:
        found, labels = np.unique(y, return_inverse=True)
        whole = y.dtype.kind in "iuUbO" or bool(np.all(y == np.round(y)))
        if y.dtype.kind in "UO" or (whole and len(found) <= MOST_CLASSES):
            if len(found) < 2:
                raise ValueError(f"{name}: all targets are {found[0]}: there is nothing to learn")
            names = tuple(classes) if len(classes) == len(found) else tuple(map(_name, found))
            return Dataset(name, x, labels.astype(np.int32), names)
    if y.dtype.kind not in "fiub" or not np.isfinite(y.astype(float)).all():
        raise ValueError(f"{name}: the targets are not all finite numbers")
    return Dataset(name, x, y.reshape(len(y), -1).astype(np.float32), ())


def _name(label: Any) -> str:
    return f"{label:g}" if isinstance(label, float | np.floating) else str(label)


def split(n: int, shares: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Shuffled indices of n rows, in parts: the given shares last, what is left first."""
    order = np.random.default_rng(seed).permutation(n)
    sizes = [round(share * n) for share in shares]
    cuts = np.cumsum([n - sum(sizes), *sizes])[:-1]
    return np.split(order, cuts)
