"""Charts of a run: ratios with their spread, how cost grows, and a roofline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jbackprop.bench.contest import Row
from jbackprop.bench.results import Run, best, growth, ratios
from jbackprop.diagnose.pictures import figure

KINDS = {
    "ours": ("ours", "#0072b2", "o"),
    "plain": ("plain autodiff", "#333333", "|"),
    "idiomatic": ("jax.checkpoint", "#e69f00", "s"),
    "tuned": ("best tuned autodiff", "#d55e00", "D"),
    "flax": ("Flax", "#009e73", "^"),
    "equinox": ("Equinox", "#56b4e9", "v"),
    "torch": ("PyTorch, eager", "#cc79a7", "x"),
    "torch.compile": ("torch.compile", "#cc79a7", "+"),
    "vmap(grad)": ("vmap(grad)", "#999999", "P"),
    "jax_privacy": ("JAX Privacy", "#a6761d", "X"),
    "opacus": ("Opacus", "#7570b3", "*"),
    "backpack": ("BackPACK", "#66a61e", "<"),
    "autodiff": ("jvp of grad", "#999999", "P"),
    "rule": ("a rule of credit", "#0072b2", "o"),
    "custom_vjp": ("a custom rule", "#999999", "P"),
    "scikit-learn": ("scikit-learn", "#a6761d", "X"),
}
"""For each kind of contestant its name, its colour (told apart by all eyes) and its mark."""


def charts(run: Run) -> Iterator[tuple[str, Any, str]]:
    """(name, figure, what is seen) of all charts that these rows give."""
    questions = list(dict.fromkeys(r.question for r in run.rows if r.axis is None))
    for question in questions:
        rows = [r for r in run.rows if r.question == question and r.axis is None]
        if any(r.samples and not r.unit for r in rows):
            seen = (
                f"{question}: time of one call over that of the unit (the vertical line), the "
                "fastest of each kind; medians of paired ratios, and quartiles"
            )
            yield f"ratios-{question.replace(' ', '-').replace(',', '')}", ratio_bars(rows), seen
    if any(r.axis for r in run.rows):
        seen = "time of one call, and its temporary memory, against one size; dashed: theory"
        yield "scaling", scaling(run.rows), seen
    if any(r.flops and r.samples for r in run.rows):
        seen = (
            "FLOP/s on paper over FLOPs per byte of arguments, outputs and twice the temporary "
            "memory; the roof is what this machine was measured to do. What an answer computes "
            "twice, or beside its matmuls, counts as time alone. Where arrays fit in the caches, a "
            "point can lie above the slope"
        )
        yield "roofline", roofline(run), seen


def ratio_bars(rows: Sequence[Row]) -> Any:
    """One line for each workload, one mark for each kind."""
    loads = list(dict.fromkeys(r.workload for r in rows if r.samples))
    by_row = dict(zip(rows, ratios(rows), strict=True))
    fig, (ax,) = figure(1, 9.5, 1.3 + 0.42 * len(loads))
    used = [k for k in KINDS if any(r.kind == k and r.samples for r in rows)]
    for k, kind in enumerate(used):
        label, colour, mark = KINDS[kind]
        for i, load in enumerate(loads):
            own = best([r for r in rows if r.workload == load and not r.unit], [kind])
            cuts = by_row.get(own) if own else None
            if cuts is None:
                continue
            at = i + 0.6 * ((k + 0.5) / len(used) - 0.5)
            ax.plot([cuts[0], cuts[2]], [at, at], color=colour, linewidth=1.6, zorder=2)
            ax.plot(cuts[1], at, mark, color=colour, markersize=6, label=label, zorder=3)
    ax.axvline(1, color="#333333", linewidth=1, zorder=1)
    ax.set_xscale("log")
    _plain_ticks(ax.xaxis, [c[1] for r, c in by_row.items() if c and r.samples])
    ax.set_yticks(range(len(loads)), loads, fontsize=8)
    ax.set_ylim(len(loads) - 0.5, -0.5)
    for i in range(1, len(loads)):
        ax.axhline(i - 0.5, color="#dddddd", linewidth=0.6, zorder=0)
    ax.set_xlabel("time / unit (less is better)")
    _legend(fig, ax)
    return fig


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Numbers as one writes them, few enough to be read."""
    low, high = min([*values, 0.8]), max([*values, 1.25])
    marks = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200]
    if high / low > 30:
        marks = [m for m in marks if m not in (0.3, 0.7, 1.5, 3)]
    marks = [m for m in marks if low / 1.3 <= m <= high * 1.3]
    axis.set_ticks(marks, [f"{m:g}" for m in marks])
    axis.set_ticks([], minor=True)


def _legend(fig: Any, ax: Any) -> None:
    handles, labels = ax.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    fig.legend(
        once.values(), once.keys(), loc="outside lower center", ncols=min(6, len(once)),
        fontsize=8, frameon=False,
    )  # fmt: skip


def scaling(rows: Sequence[Row]) -> Any:
    """A column for each series: time above, temporary memory below."""
    axes_of = list(dict.fromkeys(r.axis[0] for r in rows if r.axis))
    fig, grid = figure(len(axes_of), 3.1, 2.9, rows=2)
    grown = {(g.axis, g.kind, g.what): g for g in growth(rows)}
    quantities: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("time", "milliseconds", lambda r: r.seconds and 1e3 * r.seconds),
        ("memory", "temporary MiB", lambda r: r.temp and r.temp / 2**20),
    )
    for j, axis in enumerate(axes_of):
        for i, (what, unit, value) in enumerate(quantities):
            ax = grid[i * len(axes_of) + j]
            for kind in ("plain", "idiomatic", "ours"):
                label, colour, mark = KINDS[kind]
                points = [
                    (r.axis[1], value(r))
                    for r in rows
                    if r.axis and r.axis[0] == axis and r.kind == kind and r.seconds
                ]
                points = sorted(p for p in points if p[1])
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                found = grown.get((axis, kind, what))
                ax.loglog(x, y, color=colour, marker=mark, markersize=4, label=label)
                if found and found.theory is not None:
                    x = found.sizes
                    line = [y[-1] * (v / x[-1]) ** found.theory for v in x]
                    ax.loglog(x, line, "--", color=colour, linewidth=0.9, alpha=0.6)
            ax.grid(True, color="#eeeeee")
            ax.set_xlabel(axis)
            if j == 0:
                ax.set_ylabel(unit)
    _legend(fig, grid[0])
    return fig


def roofline(run: Run) -> Any:
    """Ours and the unit of every workload whose work was counted."""
    fig, (ax,) = figure(1, 7.5, 4.6)
    matmul, stream = run.ceilings["matmul_flops"], run.ceilings["stream_bytes"]
    for kind in ("plain", "ours"):
        label, colour, _ = KINDS[kind]
        for row in run.rows:
            seconds, total = row.seconds, row.total
            if not (row.kind == kind and row.flops and seconds and total and row.temp is not None):
                continue
            if row.question not in ("gradient", "step"):
                continue
            moved = total + row.temp  # what is temporary is written, and read
            style = "o" if kind == "ours" else "x"
            ax.loglog(
                row.flops / moved, row.flops / seconds / 1e9, style, color=colour, label=label,
                markersize=5, alpha=0.8,
            )  # fmt: skip
    left, right = ax.get_xlim()
    x = [left, matmul / stream, max(right, 2 * matmul / stream)]
    ax.loglog(x, [min(matmul, v * stream) / 1e9 for v in x], color="#333333", linewidth=1.2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    ax.set_xlabel("FLOPs on paper / byte")
    ax.set_ylabel("GFLOP/s")
    ax.grid(True, color="#eeeeee")
    _legend(fig, ax)
    return fig
