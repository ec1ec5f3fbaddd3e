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
        x: features, (n, p) float64.
        labels: (n,) int32 from 0, where the targets can be classes; else None.
        classes: the names of the labels; empty without them.
        values: the targets as numbers, (n, q) float64; None where they are words.
    """

    name: str
    x: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    values: np.ndarray | None


def load(source: str, target: str | None = None) -> Dataset:
    """Load one of `SHIPPED`, a `.csv` or an `.npz` file (arrays x and y).

    Targets that are words, or at most 50 whole numbers, can be classes; those that are numbers can
    be real targets too: the loss decides. A CSV's first line is a header if no cell is a number.

    Args:
        source: the name or the path.
        target: for CSV, the name (or number from 0) of the target's column; the last by default.

    Raises:
        FileNotFoundError, ValueError: nothing there, or not a table of numbers; names the place.
        ImportError: scikit-learn is missing for one of its data sets.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be the name of a data set or a path, not {source!r}")
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
        reader = csv.reader(file, delimiter=max(",;\t", key=first_line.count))
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    if len(rows) < 2:
        raise ValueError(f"{path}: a table needs at least two rows, but there are {len(rows)}")
    header = [str(i) for i in range(len(rows[0][1]))]
    if len(header) < 2:
        raise ValueError(
            f"{path}: a table needs features and a target, but there is one column, "
            f"{rows[0][1][0]!r}; columns are separated by commas, semicolons or tabs"
        )
    if not any(_number(cell) is not None for cell in rows[0][1]):
        header = rows.pop(0)[1]
    column = len(header) - 1
    if target is not None:
        numbers = {str(i): i for i in range(len(header))}
        names = numbers | {name: i for i, name in enumerate(header)}
        if target not in names:
            raise ValueError(f"{path}: no column {target!r}; there are {', '.join(header)}")
        column = names[target]
    x, y = [], []
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} cells, but {len(header)} were expected"
            )
        for i, cell in enumerate(row):
            if cell == "" or (i != column and _number(cell) is None):
                raise ValueError(
                    f"{path}, line {line}, column {header[i]!r}: {cell!r} is not a number; fill it "
                    "in first"
                )
        y.append(row[column])
        x.append([float(cell) for i, cell in enumerate(row) if i != column])
    odd = [(line, cell) for (line, _), cell in zip(rows, y, strict=True) if _number(cell) is None]
    if 0 < len(odd) < len(y) / 2:
        raise ValueError(
            f"{path}, line {odd[0][0]}, column {header[column]!r}: {odd[0][1]!r} is not a number, "
            "as most targets are; fill it in or leave that row out"
        )
    return _table(path.name, np.array(x), np.array(y if odd else [float(cell) for cell in y]))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _table(name: str, x: Any, y: Any, classes: Any = ()) -> Dataset:
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype.kind not in "fiub":
        raise ValueError(f"{name}: the features have the dtype {x.dtype}, which is no number")
    if y.dtype.kind not in "fiubU" or y.ndim not in (1, 2):
        raise ValueError(
            f"{name}: the targets have the dtype {y.dtype} and the shape {y.shape}; they must be "
            "numbers or words, (n,) or (n, q)"
        )
    if x.ndim == 0 or len(x) != len(y) or len(x) == 0:
        raise ValueError(f"{name}: x has the shape {x.shape}, but y {y.shape}: one row for each")
    x = x.reshape(len(x), -1).astype(np.float64)
    if not np.isfinite(x).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(x))[0])
        raise ValueError(f"{name}: x[{row}, {column}] is {x[row, column]}; fill it in first")
    words = y.dtype.kind == "U"
    if not words and not np.isfinite(y).all():
        raise ValueError(f"{name}: the targets are not all finite numbers")
    values = None if words else y.reshape(len(y), -1).astype(np.float64)
    found, labels = np.unique(y, return_inverse=True)
    if len(found) < 2:
        raise ValueError(f"{name}: all targets are {found[0]}: there is nothing to learn")
    whole = not words and y.ndim == 1 and bool(np.all(y == np.round(y)))
    if words and (y.ndim > 1 or 2 * len(found) > len(y) > 9):
        raise ValueError(
            f"{name}: the targets are words, {len(found)} different ones in {len(y)} rows; is that "
            "the right column?"
        )
    if not (words or (whole and len(found) <= MOST_CLASSES)):
        return Dataset(name, x, None, (), values)
    names = tuple(classes) if len(classes) == len(found) else tuple(map(_name, found))
    return Dataset(name, x, labels.reshape(-1).astype(np.int32), names, values)


def _name(label: Any) -> str:
    return str(label) if isinstance(label, str) else str(int(label))


def split(n: int, shares: tuple[float, ...], seed: int) -> list[np.ndarray]:
    """Shuffled indices of n rows, in parts: the given shares last, what is left first."""
    order = np.random.default_rng(seed).permutation(n)
    sizes = [round(share * n) for share in shares]
    cuts = np.cumsum([n - sum(sizes), *sizes])[:-1]
    return np.split(order, cuts)
