"""Running the suite: one workload after the other, with everything kept as soon as it is known."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jbackprop import html
from jbackprop.bench import report
from jbackprop.bench.charts import charts
from jbackprop.bench.contest import Row, measure
from jbackprop.bench.declare import Workload
from jbackprop.bench.machine import ceilings, describe
from jbackprop.bench.results import Run

SECONDS = (0.4, 2.0, 2.0)
"""For the samples of each contestant, by level."""


def run(
    loads: Sequence[Workload],
    seconds: float,
    folder: Path | None = None,
    python: str | None = None,
    peaks: bool = False,
    show: Callable[[str], None] = print,
) -> Run:
    """Measure workloads, and write results.json, report.html and charts as PNG.

    The results are written anew after every workload, so that a run that is stopped has them. The
    machine's ceilings are measured before and after, and the higher ones count.

    Args:
        loads: what to measure, in order.
        seconds: for the samples of one contestant, about.
        folder: where the files go; made if need be. None for no files.
        python: which Python has PyTorch, scikit-learn and so on; None for none of them.
        peaks: look at the peaks of processes, which takes some seconds for each contestant.
        show: where the tables go.

    Returns:
        The run.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    look = min(2.0, 2 * seconds)
    begun = Run(describe(), ceilings(look))
    show(report.machine_line(begun) + "\n")
    start = time.perf_counter()
    bar = tqdm(loads, unit="workload", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    for load in bar:
        try:
            rows = measure(load, seconds, python, peaks, functools.partial(_tell, bar, load.name))
        except Exception as error:  # such as a peer that dies: the other workloads go on
            note = f"{type(error).__name__}: {error}"[:60]
            rows = [Row(load.name, load.family, load.question, "everybody", "", note=note)]
        begun = dataclasses.replace(begun, rows=(*begun.rows, *rows))
        alone = dataclasses.replace(begun, rows=tuple(rows))
        with tqdm.external_write_mode():
            show(report.table(alone) + "\n")
        if folder is not None:
            begun.save(folder / "results.json")
    again = ceilings(look)
    best = {name: max(value, again[name]) for name, value in begun.ceilings.items()}
    machine = begun.machine | {"seconds": round(time.perf_counter() - start)}
    done = Run(machine, best, begun.rows)
    if folder is not None:
        done.save(folder / "results.json")
        write(done, folder)
    return done


def _tell(bar: Any, load: str, who: str) -> None:
    bar.set_postfix_str(f"{load}: {who}"[:60])


def write(run: Run, folder: Path) -> None:
    """The report and the charts of a run, in a folder."""
    html.write(folder / "report.html", report.page(run))
    for name, fig, _ in charts(run):
        fig.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
