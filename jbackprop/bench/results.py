"""Results as files, and what is worked out of them: ratios, their spread, what theory would say."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jbackprop.bench.contest import Row, paired, quartiles
from jbackprop.files import replacing

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """What one call of the suite has measured.

    Attributes:
        machine: as `jbackprop.bench.machine.describe` has it.
        ceilings: as `jbackprop.bench.machine.ceilings` has them.
        rows: in the order of the suite.
    """

    machine: dict[str, Any]
    ceilings: dict[str, float]
    rows: tuple[Row, ...] = ()

    def save(self, path: Path) -> None:
        """Write it as JSON; the file is replaced whole or not at all."""
        rows = []
        for row, ratio in zip(self.rows, ratios(self.rows), strict=True):
            fields = {k: v for k, v in dataclasses.asdict(row).items() if v not in (None, "", ())}
            fields["samples"] = [None if s is None else float(f"{s:.4g}") for s in row.samples]
            if ratio is not None:
                fields["ratio"] = [round(v, 4) for v in ratio]
            rows.append({k: _plain(v) for k, v in fields.items()})
        told = {"format": FORMAT, "machine": self.machine, "ceilings": self.ceilings, "rows": rows}
        lines = json.dumps(told, indent=1, allow_nan=False)
        with replacing(path) as file:
            file.write((_short(lines) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read it again.

        Raises:
            ValueError: not a file of this suite.
        """
        try:
            told = json.loads(path.read_text())
            if told["format"] != FORMAT:
                raise ValueError(
                    f"{path} is of format {told['format']}, not {FORMAT}: measure anew"
                )
            known = {field.name for field in dataclasses.fields(Row)}
            rows = tuple(
                Row(**{k: _tuple(v) for k, v in row.items() if k in known}) for row in told["rows"]
            )
            return cls(told["machine"], told["ceilings"], rows)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a file that jbackprop bench has written") from error


def joined(runs: Sequence[Run]) -> Run:
    """Several runs of one machine as one: the machine's state of the first, the best ceilings.

    Raises:
        ValueError: they are not from the same machine.
    """
    first = runs[0]
    for run in runs[1:]:
        for key in ("device", "processor", "cores", "versions", "xla_flags"):
            if run.machine.get(key) != first.machine.get(key):
                raise ValueError(
                    f"the runs are not from one machine: they differ in {key}, "
                    f"{first.machine.get(key)} and {run.machine.get(key)}"
                )
    by_workload: dict[str, list[Row]] = {}
    for run in runs:
        own: dict[str, list[Row]] = {}
        for row in run.rows:
            own.setdefault(row.workload, []).append(row)
        by_workload |= own
    ceilings = {name: max(run.ceilings[name] for run in runs) for name in first.ceilings}
    return Run(first.machine, ceilings, tuple(row for rows in by_workload.values() for row in rows))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else 1e300
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _short(text: str) -> str:
    """Lists of numbers on one line."""
    out: list[str] = []
    open_ = False
    for line in text.splitlines():
        if open_:
            out[-1] += line.strip() + ("" if line.strip() == "]" else " ")
        else:
            out.append(line)
        open_ = (open_ or line.endswith("[")) and not line.strip().startswith("]")
        if line.endswith('"rows": ['):
            open_ = False
    return "\n".join(out)


def unit_of(rows: Iterable[Row], workload: str) -> Row | None:
    """The row that the ratios of a workload are to, if it was measured."""
    return next((r for r in rows if r.workload == workload and r.unit and r.samples), None)


def ratios(rows: Sequence[Row]) -> list[tuple[float, float, float] | None]:
    """For each row its time over the unit's: quartiles of the paired ratios, low to high."""
    units = {r.workload: r for r in rows if r.unit and r.samples}
    return [quartiles(paired(r, units[r.workload])) if r.workload in units else None for r in rows]


def best(rows: Iterable[Row], kinds: Sequence[str]) -> Row | None:
    """The fastest of these kinds."""
    measured = [r for r in rows if r.kind in kinds and r.seconds is not None]
    return min(measured, key=lambda r: r.seconds or math.inf, default=None)


@dataclasses.dataclass(frozen=True)
class Growth:
    """How the cost of one contestant grows in one size, in the limit of large sizes.

    Attributes:
        axis, contestant, kind: names.
        what: "time" or "memory" (temporary).
        exponent: the slope of log cost against log size over the larger half of the sizes.
        deviation: the standard error of that slope; NaN of two sizes.
        theory: the exponent that theory has; None where nobody said.
        sizes: that the slope is over.
    """

    axis: str
    contestant: str
    kind: str
    what: str
    exponent: float
    deviation: float
    theory: float | None
    sizes: tuple[int, ...]


def growth(rows: Sequence[Row]) -> list[Growth]:
    """An exponent for each contestant of each series, of time and of temporary memory."""
    found = []
    series: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.axis is not None and row.seconds is not None:
            series.setdefault((row.axis[0], row.kind), []).append(row)
    for (axis, kind), points in series.items():
        points.sort(key=lambda r: r.axis[1] if r.axis else 0)
        half = points[-max(3, math.ceil(len(points) / 2)) :]
        for i, what in enumerate(("time", "memory")):
            costs = [r.seconds if what == "time" else r.temp for r in half]
            pairs = [(r.axis[1], c) for r, c in zip(half, costs, strict=True) if r.axis and c]
            if len(pairs) < 2:
                continue
            slope, deviation = _slope([p[0] for p in pairs], [p[1] for p in pairs])
            theory = half[-1].theory
            found.append(
                Growth(
                    axis, half[-1].contestant, kind, what, slope, deviation,
                    None if theory is None else theory[i], tuple(p[0] for p in pairs),
                )
            )  # fmt: skip
    return found


def _slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    dx = x - x.mean()
    slope = float(dx @ y / (dx @ dx))
    if len(x) < 3:
        return slope, math.nan
    rest = y - y.mean() - slope * dx
    return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / (dx @ dx)))


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The median and its 95 % interval, by the bootstrap; of three values or more."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), (draws, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), statistics.median(values), float(high)
