"""What every log does: know which epochs it has, write those it lacks, refuse another run's."""

from __future__ import annotations

import abc
import ctypes
import datetime
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jbackprop.checks import flag_of
from jbackprop.train.fit import Epoch


class Row(NamedTuple):
    """An epoch in a log; a value is None where the history had none any more."""

    epoch: int
    time: str | None
    values: Mapping[str, float | None]
    end: int = 0  # the place in the file behind it


class Logger(abc.ABC):
    """A callback of `fit`; see `jbackprop.train.loggers` for what it promises."""

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False):
        self.path = self._file = Path(path)
        self._overwrite = flag_of(overwrite, f"{type(self).__name__}: overwrite")
        self._number: int | None = None  # the last epoch seen
        self._complete = False  # whether the rows up to it are in the file
        if jax.process_index() == 0:
            folder = self.path.absolute().parent
            if not folder.is_dir():
                raise FileNotFoundError(f"there is no folder {folder} to write {self.path} in")
            if not os.access(self.path if self.path.exists() else folder, os.W_OK):
                raise PermissionError(f"{self.path} cannot be written")
            self._read()

    def __call__(self, epoch: Epoch) -> None:
        """Log the epoch, and whatever is missing before it."""
        if jax.process_index() != 0:
            return
        begun = self._number is not None and epoch.number == self._number + 1
        history = _complete_entries(epoch.history)
        try:
            if begun and self._complete and self._file.exists():
                kept, first = None, epoch.number
            else:
                kept = self._kept(epoch.number, history)
                first = max(_first(epoch.number, history), kept[-1].epoch + 1 if kept else 1)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            self._write(list(_rows(first, epoch.number, history, now)), kept)
            self._complete = True
        except OSError as error:
            self._complete = False
            if error.errno and error.filename is None:  # as that of a full disk
                error.filename = str(self._file)
            if not begun:
                raise
            warnings.warn(
                f"epoch {epoch.number} is not in the log yet, training goes on: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._number = epoch.number

    def _kept(self, number: int, history: Mapping[str, list[float]]) -> list[Row]:
        """The rows before this epoch, if they are of this run."""
        there = self._read()
        kept = [row for row in there if row.epoch < number]
        why = None
        if [row.epoch for row in there] == [number] and _alike(there[0], history):
            return []  # killed behind this very row, and going on from before it
        if there and not kept:
            why = f"has epochs {there[0].epoch} to {there[-1].epoch}, and training is at {number}"
        elif kept and set(kept[-1].values) != set(history):
            why = f"has {', '.join(kept[-1].values)}, and this run {', '.join(history)}"
        elif kept and kept[-1].epoch >= (first := _first(number, history)):
            for name, logged in kept[-1].values.items():
                value = history[name][kept[-1].epoch - first]
                if logged is not None and not _same(logged, value):
                    why = f"has {name} {logged} at epoch {kept[-1].epoch}, and this run {value}"
        if why is None:
            return kept
        if self._overwrite:
            return []
        raise FileExistsError(
            f"{self.path} is the log of another run: it {why}. Give another path, go on with that "
            "run, or replace its log by overwrite=True"
        )

    @abc.abstractmethod
    def _read(self) -> list[Row]:
        """The rows that are there, none if there is no file.

        Raises:
            FileExistsError: there is something else.
        """

    @abc.abstractmethod
    def _write(self, rows: Sequence[Row], kept: Sequence[Row] | None) -> None:
        """Write rows after those kept, in place of all others; for None, after what is there."""


def _complete_entries(history: Mapping[str, list[float]]) -> dict[str, list[float]]:
    for name in ("epoch", "time"):
        if name in history:
            raise ValueError(f"a metric cannot be called {name!r}: in a log that is another column")
    n = max(map(len, history.values()))
    complete = {name: values for name, values in history.items() if len(values) == n}
    if odd := sorted(set(history) - set(complete)):
        warnings.warn(
            f"not logged, for want of a value for every epoch: {', '.join(odd)}",
            RuntimeWarning,
            stacklevel=3,
        )
    return complete


def _first(number: int, history: Mapping[str, list[float]]) -> int:
    """The epoch that the history begins with."""
    return number - len(next(iter(history.values()))) + 1


def _rows(first: int, number: int, history: Mapping[str, list[float]], now: str) -> Iterator[Row]:
    for epoch in range(first, number + 1):
        values = {name: float(of[epoch - number - 1]) for name, of in history.items()}
        yield Row(epoch, now if epoch == number else None, values)


def _alike(row: Row, history: Mapping[str, list[float]]) -> bool:
    """Whether a row has the last values of the history."""
    if set(row.values) != set(history):
        return False
    return all(v is not None and _same(v, history[name][-1]) for name, v in row.values.items())


def _same(logged: float, value: float) -> bool:
    """In float32, as numbers are in an event file, and may be in a checkpoint."""
    a, b = (ctypes.c_float(number).value for number in (logged, value))
    return a == b or (math.isnan(a) and math.isnan(b))
