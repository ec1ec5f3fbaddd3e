"""A run in words: tables of text, and one self-contained HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from jbackprop import html
from jbackprop.bench.charts import charts
from jbackprop.bench.contest import Row
from jbackprop.bench.results import Growth, Run, best, growth, ratios
from jbackprop.table import render

COLUMNS = (
    "contestant", ">ms", ">time / unit", ">temp", ">total", ">peak", ">GFLOP/s", ">matmul",
    ">stream", ">trace", ">lower", ">compile", ">first", ">error", "",
)  # fmt: skip

EXPLAINED = (
    "Times are medians of samples that all contestants gave in turns. time / unit: the median of "
    "the ratios within a round, and its quartiles; the unit has 1. temp, total (with arguments and "
    "outputs): MiB, as the compiler states them; peak: MiB that a process of its own took at most, "
    "on a CPU with Python and JAX in it. GFLOP/s: work counted on paper for the plain way "
    "(matmuls and convolutions) over the time; matmul: the share of the FLOP/s that a matmul was "
    "measured to do here; stream: the share of the measured bandwidth, if arguments, outputs and "
    "twice the temporary memory go through it once (what stays in the caches can pass 100 %). "
    "trace, lower, compile, first (the first call; where one compiles itself, with that): seconds. "
    "error: the largest relative error, leaf by leaf, against plain autodiff in float64; of "
    "rules with an answer of their own, against themselves in float64."
)


def cells(row: Row, ratio: tuple[float, float, float] | None, run: Run) -> tuple[str, ...]:
    """One row of the table."""
    note = row.note
    if not note and row.unit:
        note = "unit"
    seconds = row.seconds
    rate = row.flops / seconds if row.flops and seconds else None
    moved = None if row.total is None or row.temp is None else row.total + row.temp
    stream = moved / seconds / run.ceilings["stream_bytes"] if moved and seconds else None
    spread = ""
    if ratio is not None and not row.unit:
        spread = f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
    return (
        row.contestant,
        _number(seconds and 1e3 * seconds),
        spread,
        _mib(row.temp),
        _mib(row.total),
        _mib(row.peak),
        "" if rate is None else f"{rate / 1e9:.1f}",
        "" if rate is None else f"{rate / run.ceilings['matmul_flops']:.0%}",
        "" if stream is None else f"{stream:.0%}",
        *(_number(v) for v in (row.trace, row.lower, row.compile, row.first)),
        _error(row),
        note,
    )


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return ""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 3)}f}"


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.0e}"


def _mib(value: int | None) -> str:
    return "" if value is None else _number(value / 2**20)


def by_workload(run: Run) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Each workload with its rows."""
    loads: dict[str, list[tuple[str, ...]]] = {}
    for row, ratio in zip(run.rows, ratios(run.rows), strict=True):
        loads.setdefault(row.workload, []).append(cells(row, ratio, run))
    yield from loads.items()


def table(run: Run) -> str:
    """All workloads as text."""
    return "\n\n".join(render(COLUMNS, rows, title=load) for load, rows in by_workload(run))


def timetable(rows: Sequence[Row]) -> str:
    """Of one workload what does not depend on the ceilings of the machine, as text."""
    columns = ("", ">ms", ">time / unit", ">temp", ">trace", ">compile", ">error", "")
    found = []
    for row, ratio in zip(rows, ratios(rows), strict=True):
        spread = "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
        found.append(
            (
                row.contestant, _number(row.seconds and 1e3 * row.seconds), spread, _mib(row.temp),
                _number(row.trace), _number(row.compile), _error(row), row.note,
            )
        )  # fmt: skip
    return render(columns, found)


def machine_line(run: Run) -> str:
    """Where the figures are from, in a line."""
    m, c = run.machine, run.ceilings
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    where = f"{m['device']} ({m['processor']}, {m['cores']} cores)" if m["platform"] == "cpu" else (
        f"{m['devices']} x {m['device']}"
    )  # fmt: skip
    flags = f"; XLA_FLAGS {m['xla_flags']}" if m["xla_flags"] else ""
    return (
        f"{where}; matmul {c['matmul_flops'] / 1e9:.0f} GFLOP/s, stream "
        f"{c['stream_bytes'] / 1e9:.1f} GB/s; {versions}; float32, matmul precision "
        f"{m['matmul_precision']}{flags}; commit {m['commit'] or '?'}, {m['date']}"
    )


def verdict_lines(run: Run) -> list[tuple[str, ...]]:
    """For each workload ours over the unit, and over the best of the others, in time and memory."""
    found: list[tuple[str, ...]] = []
    by_row = dict(zip(run.rows, ratios(run.rows), strict=True))
    for load, rows in _grouped(r for r in run.rows if r.axis is None).items():
        ours = best(rows, ["ours"])
        if ours is None:
            continue
        others = [r for r in rows if r.kind not in NOT_OTHERS and not r.unit]
        rival = best(others, list({r.kind for r in others}))
        unit = next((r for r in rows if r.unit), None)
        ratio, against = by_row[ours], by_row.get(rival) if rival else None
        quick = "" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
        beside = ""
        if rival is not None and against is not None:
            beside = f"{rival.contestant}: {against[1]:.2f}"
        memory = ours.temp / unit.temp if unit and ours.temp is not None and unit.temp else None
        lean = "" if memory is None else f"{memory:.2f}"
        found.append((load, ours.contestant, quick, lean, beside, _word(ratio)))
    return found


NOT_OTHERS = ("ours", "variant", "rule", "gradient")
"""What is ours, and what is a peer's own plain gradient where more was asked."""

VERDICTS = ("workload", "ours", ">time / unit", ">temp / unit", "fastest of the others", "")


def _word(ratio: tuple[float, float, float] | None) -> str:
    """Whether ours is faster than the unit, by quartiles."""
    if ratio is None:
        return ""
    low, middle, high = ratio
    if high < 1 and middle < 0.97:
        return "faster"
    if low > 1 and middle > 1.03:
        return "slower"
    return "equal" if 0.95 < middle < 1.05 else "within noise"


def _grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    loads: dict[str, list[Row]] = {}
    for row in rows:
        loads.setdefault(row.workload, []).append(row)
    return loads


def _growth_rows(found: Sequence[Growth]) -> list[tuple[str, ...]]:
    return [
        (
            g.axis, g.contestant, g.what,
            f"{g.exponent:.2f}" + ("" if math.isnan(g.deviation) else f" ± {g.deviation:.2f}"),
            "" if g.theory is None else f"{g.theory:g}",
            f"{g.sizes[0]:,} to {g.sizes[-1]:,}",
        )
        for g in found
    ]  # fmt: skip


GROWTH = ("series", "contestant", "what", ">exponent", ">theory", ">over sizes")


def growth_table(run: Run) -> str:
    """How cost grows, as text; "" without a series."""
    found = growth(run.rows)
    return render(GROWTH, _growth_rows(found), title="How cost grows") if found else ""


def page(run: Run) -> str:
    """The HTML page: verdicts, charts, how cost grows, every table."""
    parts = [html.paragraph(machine_line(run))]
    failed = [r for r in run.rows if r.note]
    told = (
        f"{len(run.rows) - len(failed)} contestants measured on {len(_grouped(run.rows))} workloads"
    )
    if failed:
        told += f"; {len(failed)} not, and their rows say why"
    parts.append(html.paragraph(told + "."))
    parts.append(html.heading("Ours, in units of the plain way"))
    parts.append(html.table(VERDICTS, verdict_lines(run)))
    for name, fig, seen in charts(run):
        parts.append(html.figure(fig, seen[0].upper() + seen[1:] + ".", name))
    found = growth(run.rows)
    if found:
        parts.append(html.heading("How cost grows"))
        parts.append(
            html.table(
                GROWTH, _growth_rows(found),
                "Slope of log cost against log size over the larger half of the sizes, and its "
                "standard error. Theory is of the limit.",
            )
        )  # fmt: skip
    parts.append(html.heading("All figures"))
    parts.append(html.paragraph(EXPLAINED))
    for load, rows in by_workload(run):
        parts.append(html.details(load, html.table(COLUMNS, rows)))
    return html.page("jbackprop bench: manual against automatic gradients", *parts)
