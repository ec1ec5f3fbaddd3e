"""The figures of the page that are drawn (matplotlib, the extra "plots")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jbackprop.diagnose.pictures import figure
from jbackprop.html import BLUE, GREY, ORANGE, SKY, number
from jbackprop.html import figure as drawn
from jbackprop.inspect.figures import Inspection, LayerFigures

_FEW = 9
"""So many layers have their names on the axis; more have numbers."""


def _figure() -> tuple[Any, Any]:
    fig, (axes,) = figure(width=5.7, height=3.1)
    _plain(axes)
    return fig, axes


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9b7b0")
    axes.tick_params(colors="#55554f", labelsize=8.5)
    axes.grid(axis="y", color="#ebe9e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color="#55554f", size=9)
    axes.yaxis.label.set(color="#55554f", size=9)


def _legend(axes: Any, columns: int = 3) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(
        frameon=False, fontsize=8.5, ncols=columns, loc="lower left", bbox_to_anchor=(-0.02, 0.99),
        borderaxespad=0.2, columnspacing=1.2, handlelength=1.6,
    )  # fmt: skip


def _name_layers(axes: Any, layers: Sequence[LayerFigures], what: str) -> None:
    """Names where there is room for them, elsewhere their numbers in the table."""
    n, paths = len(layers), [l.path for l in layers]
    axes.set_xlim(0.4, n + 0.6)
    if n <= _FEW and max(map(len, paths)) <= 10:
        axes.set_xticks(range(1, n + 1), paths)
        axes.set_xlabel(f"{what}, input to output")
    else:
        ticks = np.unique(np.linspace(1, n, min(n, 12)).round().astype(int))
        axes.set_xticks(ticks, [str(layers[i - 1].number) for i in ticks])
        axes.set_xlabel(f"{what}, input to output, by number in the table of layers")


def _log_ticks(axis: Any, least: float, most: float) -> None:
    """Powers of ten, or within less than two decades numbers in full."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if most < 100 * least:
        axis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())


def amount(examples: int) -> str:
    """So many examples, in words."""
    return "1 example" if examples == 1 else f"{examples:,} examples"


def flow(seen: Inspection) -> str:
    """The norm of the delta by layer: the median over the examples, and the quartiles."""
    layers = seen.weighted
    fig, axes = _figure()
    places = np.arange(1, len(layers) + 1)
    now = [l.delta_norms for l in layers if l.delta_norms is not None]
    if seen.before:
        earlier = _quantiles([seen.before[l.path] for l in layers])
        axes.fill_between(places, earlier[0], earlier[2], color=GREY, alpha=0.18, linewidth=0)
        axes.plot(places, earlier[1], color=GREY, linestyle="--", marker="s", markersize=3.5,
                  label="before training")  # fmt: skip
    low, median, high = _quantiles(now)
    axes.fill_between(places, low, high, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(places, median, color=BLUE, marker="o", markersize=4,
              label="after" if seen.before else "median")  # fmt: skip
    if np.isfinite(median).any():
        axes.set_yscale("log")
        least, most = axes.get_ylim()
        wider = max(1.0, math.sqrt(10 * least / most))  # a decade is seen at least
        axes.set_ylim(least / wider, most * wider)
        _log_ticks(axes.yaxis, *axes.get_ylim())
    axes.set_ylabel("norm of the delta of one example")
    _name_layers(axes, layers, "layers with weights")
    if seen.before:
        _legend(axes)
    unseen = sum(bool(np.any(v == 0)) for v in now)
    caption = (
        "How the delta changes on its way from the output (right) to the input (left): the norm of "
        "the gradient of one example's cost with respect to the layer's outputs, its median over "
        f"{amount(seen.examples)} and its quartiles (band)."
    )
    if unseen:
        caption += f" In {unseen} of the layers it is 0 for some; a log axis cannot show zeros."
    return drawn(fig, caption, f"Norm of the delta in {len(layers)} layers, on a log axis")


def _quantiles(norms: Sequence[np.ndarray]) -> np.ndarray:
    """Quartiles by layer, (3, layers); NaN where a log axis has no place for it."""
    found = np.full((3, len(norms)), np.nan)
    for i, v in enumerate(norms):
        own = v[np.isfinite(v)]
        if own.size:
            found[:, i] = np.quantile(own, (0.25, 0.5, 0.75))
    return np.where(found > 0, found, np.nan)


def saturation(seen: Inspection) -> str:
    """Saturated pairs and dead units of every elementwise activation."""
    layers = [l for l in seen.layers if l.units is not None]
    fig, axes = _figure()
    places = np.arange(1, len(layers) + 1)
    units = [l.units for l in layers if l.units is not None]
    axes.bar(places, [100 * u.saturated for u in units], 0.8 if len(units) > 3 else 0.4,
             color=SKY, label="saturated: |f'| < 0.05")  # fmt: skip
    axes.bar(places, [100 * u.dead for u in units], 0.45 if len(units) > 3 else 0.22,
             color=ORANGE, label="dead: f' = 0 for every example")  # fmt: skip
    most = max([100 * u.saturated for u in units] + [100 * u.dead for u in units])
    axes.set_ylim(0, min(max(1.1 * most, 5), 100))
    if most == 0:
        axes.text(0.5, 0.5, "no unit is saturated or dead", transform=axes.transAxes, ha="center",
                  color="#55554f", fontsize=9)  # fmt: skip
    axes.set_ylabel("share in %")
    _name_layers(axes, layers, "layers of units")
    _legend(axes)
    caption = (
        "The share of (example, unit) pairs that pass almost no delta, and of units that pass none "
        "for any example. A unit is one entry of the layer's output. For relu and its like "
        "saturated means off, and half of the pairs being off is usual."
    )
    return drawn(fig, caption, f"Saturated and dead units in {len(layers)} layers")


def sizes(seen: Inspection) -> str:
    """The norms of all examples' gradients, or their costs where there are none."""
    values = seen.costs if seen.norms is None else seen.norms
    what = "cost" if seen.norms is None else "norm of the gradient"
    there = np.isfinite(values)
    own = values[there]
    positive = own[own > 0]
    fig, axes = _figure()
    log = positive.size > 0 and positive.max() > 20 * positive.min()
    shown = there & (values > 0) if log else there
    span = (float(values[shown].min()), float(values[shown].max())) if shown.any() else (0.0, 1.0)
    if log:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, *span)
        bins = np.geomspace(span[0], span[1], 41)
    else:
        bins = np.histogram_bin_edges(values[shown], 40, span)
    wrong = seen.outcome.wrong
    if wrong is not None and 0 < wrong[shown].sum() < shown.sum():
        groups = [values[shown & ~wrong], values[shown & wrong]]
        names = [f"right ({len(groups[0]):,})", f"not right ({len(groups[1]):,})"]
        axes.hist(groups, bins, stacked=True, color=[SKY, ORANGE], label=names)
    else:
        axes.hist(values[shown], bins, color=SKY)
    if own.size:
        median = float(np.median(own))
        if median > 0 or not log:
            axes.axvline(median, color=BLUE, linewidth=1.3, label="median")
        _legend(axes)
    else:
        axes.text(0.5, 0.5, "none is finite", transform=axes.transAxes, ha="center",
                  color="#55554f", fontsize=9)  # fmt: skip
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"{what} of one example{' (log axis)' if log else ''}")
    axes.set_ylabel("examples")
    caption = (
        "The norm of the gradient of one example's own cost with respect to all parameters, "
        "divided by nothing; one for each example."
        if seen.norms is not None
        else "The cost of each example; its gradient by itself is not defined here."
    )
    left_out = [f"{int((~there).sum()):,} not finite"] if not there.all() else []
    if log and (zeros := int((own == 0).sum())):
        left_out.append(f"{zeros:,} exactly 0")
    if left_out:
        caption += f" Not shown: {' and '.join(left_out)}."
    return drawn(fig, caption, f"Histogram of the {what} of {seen.examples} examples")


def learning_curve(history: Mapping[str, Sequence[Any]]) -> str:
    """The loss, and beside it whatever else there is, epoch by epoch.

    Args:
        history: what `checked_history` gives.
    """
    n = len(history["epoch"])
    pairs = [name for name in history if name != "epoch" and not name.startswith("validation_")]
    fig, both = figure(2 if len(pairs) > 1 else 1, width=5.7 / min(2, len(pairs)), height=3.1)
    epochs = history["epoch"]
    for axes, names in zip(both, (pairs[:1], pairs[1:]), strict=False):
        _plain(axes)
        drawn_values = []
        for name in names:
            for key, colour, style, word in (
                (name, BLUE, "-", "training"), (f"validation_{name}", ORANGE, "--", "validation"),
            ):  # fmt: skip
                if key in history:
                    label = word if len(names) == 1 else f"{name.replace('_', ' ')}, {word}"
                    values = np.array(history[key], np.float64)
                    drawn_values.append(values[np.isfinite(values)])
                    axes.plot(epochs, values, color=colour, linestyle=style, label=label,
                              marker="o" if n < 8 else None, markersize=3.5)  # fmt: skip
        every = np.concatenate(drawn_values)
        if every.size and every.min() > 0 and every.max() > 5 * every.min():
            axes.set_yscale("log")
            _log_ticks(axes.yaxis, *axes.get_ylim())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("epoch")
        axes.set_ylabel(", ".join(names).replace("_", " ") if len(names) < 4 else "metrics")
        _legend(axes, 2 if len(names) == 1 else 1)
    caption = f"Means over the examples, epoch by epoch; {n:,} epochs."
    return drawn(fig, caption, f"Learning curve of {n} epochs")


def checked_history(history: Any) -> dict[str, list[float]]:
    """A history as `fit` and its logs have it, with an "epoch"; the entries that are whole.

    Raises:
        TypeError: no mapping of names to numbers.
        ValueError: no epochs, or no "loss".
    """
    if not isinstance(history, Mapping):
        raise TypeError(
            "history must be a dict of lists by name, as the .history of a Fit, not "
            f"{type(history).__name__}"
        )
    found = {}
    for name, values in history.items():
        if name == "time":
            continue
        try:
            found[str(name)] = [float("nan") if v is None else float(v) for v in values]
        except (TypeError, ValueError):
            raise TypeError(
                f"history[{name!r}] must be a list of numbers, one for each epoch"
            ) from None
    if not found.get("loss"):
        raise ValueError('history needs a list "loss" with a value for each epoch')
    n = len(found["loss"])
    found = {name: values for name, values in found.items() if len(values) == n}
    first = found.pop("epoch", [float(i) for i in range(1, n + 1)])
    loss = {"loss": found.pop("loss")}
    return {"epoch": first} | loss | found
