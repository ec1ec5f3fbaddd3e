"""Logs to read with anything: CSV and JSON lines."""

from __future__ import annotations

import abc
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence

from jbackprop.train.loggers.base import Logger, Row


class _TextLogger(Logger):
    """One line an epoch. The file is opened, appended to and closed each time."""

    _opening: str  # what every such file begins with

    def _read(self) -> list[Row]:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        opening = self._opening.encode()
        if not content[: len(opening)] == opening[: len(content)]:
            raise FileExistsError(
                f"{self.path} is not a log of {type(self).__name__}: it does not begin with "
                f"{self._opening!r}. Give another path"
            )
        lines = content.split(b"\n")[:-1]  # what comes last is empty, or was cut off by a kill
        ends = [0]
        for line in lines:
            ends.append(ends[-1] + len(line) + 1)
        rows: list[Row] = []
        number = 0
        try:
            for number, row in self._parse([line.decode() for line in lines]):
                if rows and row.epoch <= rows[-1].epoch:
                    raise ValueError(f"epoch {row.epoch} comes after {rows[-1].epoch}")
                rows.append(row._replace(end=ends[number]))
        except (ValueError, TypeError, AttributeError, KeyError, csv.Error) as error:
            raise FileExistsError(
                f"{self.path} is not a log of {type(self).__name__} as it was written: after line "
                f"{number}, {error!r}. Give another path"
            ) from error
        return rows

    def _write(self, rows: Sequence[Row], kept: Sequence[Row] | None) -> None:
        if kept is not None and not kept:
            self._begin(list(rows[0].values))
            self.path.write_bytes((self._head() + "".join(map(self._line, rows))).encode())
            return
        if kept:
            self._begin(list(kept[-1].values))
        with self.path.open("ab") as file:
            if kept:
                file.truncate(kept[-1].end)
            file.write("".join(map(self._line, rows)).encode())

    def _begin(self, names: list[str]) -> None:
        self._names = names

    def _head(self) -> str:
        return ""

    @abc.abstractmethod
    def _parse(self, lines: list[str]) -> Iterator[tuple[int, Row]]:
        """The rows, each with the number of its line, from 1."""

    @abc.abstractmethod
    def _line(self, row: Row) -> str: ...


class CSVLogger(_TextLogger):
    """Log training to a CSV file, as a callback of `fit`.

    The columns are epoch, time (ISO 8601, UTC, when the epoch was over; empty where that is not
    known) and the names of the history. Numbers are exact: they are read back as the same float64.
    NaN and infinities are nan, inf and -inf, as `csv` with `float`, NumPy and pandas read them; a
    cell is empty where the history has no value any more.

        result = jb.fit(..., callbacks=[jb.CSVLogger("log.csv")])
        log = numpy.genfromtxt("log.csv", delimiter=",", names=True)  # or pandas.read_csv
        plt.plot(log["epoch"], log["validation_loss"])

    For what happens to a file that is there, and when writing fails: `jbackprop.train.loggers`.

    Args:
        path: of the file, in a folder that exists.
        overwrite: whether to replace the log of another run.

    Raises:
        FileExistsError: the file is not such a log; or, at the first epoch, of another run.
        OSError: the folder is not there, or the file cannot be read or written.
        ValueError: a metric is called epoch or time.
    """

    _opening = "epoch,time"

    def _head(self) -> str:
        return _csv_line(["epoch", "time", *self._names])

    def _parse(self, lines: list[str]) -> Iterator[tuple[int, Row]]:
        names: list[str] = []
        for number, line in enumerate(lines, 1):
            epoch, time, *cells = next(csv.reader([line]))
            if number == 1:
                names = cells
                continue
            values = {
                name: float(cell) if cell else None for name, cell in zip(names, cells, strict=True)
            }
            yield number, Row(int(epoch), time, values)

    def _line(self, row: Row) -> str:
        values = [row.values.get(name) for name in self._names]
        cells = ["" if value is None else repr(value) for value in values]
        return _csv_line([str(row.epoch), row.time or "", *cells])


def _csv_line(cells: list[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


class JSONLinesLogger(_TextLogger):
    r"""Log training to a file with one JSON object a line, as a callback of `fit`.

    The keys are epoch, time (ISO 8601, UTC, when the epoch was over; null where that is not known)
    and the names of the history. Numbers are exact. JSON has no NaN and no infinities: they are the
    strings "NaN", "Infinity" and "-Infinity", as in the JSON of Protocol Buffers; `float` reads
    them.

        result = jb.fit(..., callbacks=[jb.JSONLinesLogger("log.jsonl")])
        losses = [json.loads(line)["loss"] for line in open("log.jsonl")]

    For what happens to a file that is there, and when writing fails: `jbackprop.train.loggers`.

    Args:
        path: of the file, in a folder that exists.
        overwrite: whether to replace the log of another run.

    Raises:
        FileExistsError: the file is not such a log; or, at the first epoch, of another run.
        OSError: the folder is not there, or the file cannot be read or written.
        ValueError: a metric is called epoch or time.
    """

    _opening = '{"epoch": '

    def _parse(self, lines: list[str]) -> Iterator[tuple[int, Row]]:
        for number, line in enumerate(lines, 1):
            entries = json.loads(line)
            epoch, time = int(entries.pop("epoch")), entries.pop("time")
            yield number, Row(epoch, time, {k: float(value) for k, value in entries.items()})

    def _line(self, row: Row) -> str:
        values = {name: _json_number(value) for name, value in row.values.items()}
        entries = {"epoch": row.epoch, "time": row.time} | values
        return json.dumps(entries, allow_nan=False) + "\n"


def _json_number(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
