"""The page that one looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import jax
import numpy as np

import jbackprop
from jbackprop import html
from jbackprop.diagnose.pictures import figure
from jbackprop.factored import PyTree
from jbackprop.html import Markup, number
from jbackprop.inspect import pictures
from jbackprop.inspect.examples import Showing, gallery, image_shape_of
from jbackprop.inspect.facts import facts
from jbackprop.inspect.figures import Inspection, mean, measure
from jbackprop.inspect.spread import PER_DECADE
from jbackprop.losses import Loss
from jbackprop.sweep import Node, batch_size


def inspect(
    net: Node,
    loss: Loss,
    params: PyTree,
    x: Any,
    y: Any,
    *,
    title: str = "A network, inspected",
    about: str = "",
    before: PyTree = None,
    history: Mapping[str, Sequence[Any]] | None = None,
    raw: Any = None,
    image_shape: Sequence[int] | None = None,
    describe: Callable[[Any], str] | None = None,
    features: Sequence[str] = (),
    classes: Sequence[str] = (),
    units: tuple[Any, Any] | None = None,
    shown: int = 8,
) -> str:
    """A network on some examples, as one self-contained HTML page to look at.

    On it: what the figures say, in words; the norm of the delta by layer; saturated and dead units;
    the norms of the gradients of single examples, and the examples with the largest and the
    smallest, shown; the learning curve; and every layer with how its activations and deltas are
    spread. Costs, deltas and gradients are those of one example's own cost, divided by nothing.

    `jbackprop.inspect.measure` gives the figures alone.

    Args:
        net: a layer or a composite. Where one couples the examples (`BatchNorm`) there are no
            gradients of single examples, which the page says; their costs are there instead.
        loss: a `Loss`.
        params: the network's parameters.
        x: the inputs, (n, ...), of any number: they are swept in chunks.
        y: the targets, as the loss wants them.
        title: of the page.
        about: a line below it: which data, which training.
        before: parameters before training, to compare the deltas with.
        history: by name, one value for each epoch, such as the `.history` of a `Fit`.
        raw: what to show of the examples, (n, ...): by default x; or x before it was standardised.
        image_shape: (H, W), (H, W, 1) or (H, W, 3), where an example of `raw` is a picture; known
            without it where raw is floating-point numbers of such a shape.
        describe: from an example of `raw` (a NumPy array, or a tuple) to a text to show it by.
        features: names of the features, to show examples (p,) by those farthest from their mean.
        classes: names of the classes.
        units: offset and scale of the outputs, (q,) each or one number, for targets that were
            standardised: shown is offset + scale * target.
        shown: so many examples with the largest norms are shown, and as many with the smallest.

    Returns:
        The page, to be written to a file: `pathlib.Path("page.html").write_text(page)`.

    Raises:
        ValueError, TypeError: as `measure`; a history, names or shapes that do not fit.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    figure()  # is matplotlib there?
    whole = None if history is None else pictures.checked_history(history)
    showing = _showing(x, raw, image_shape, describe, features, classes, units)
    seen = measure(net, loss, params, x, y, before=before, shown=shown)
    return page(seen, y, showing, title, about, whole)


def _showing(
    x: Any, raw: Any, image_shape: Any, describe: Any, features: Any, classes: Any, units: Any
) -> Showing:
    n = batch_size(x)
    raw = jax.tree.map(np.asarray, x if raw is None else raw)
    if batch_size(raw) != n:
        raise ValueError(f"raw has {batch_size(raw)} examples, but x has {n}")
    for name, value in (("features", features), ("classes", classes)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of names, not the text {value!r}")
    features, classes = tuple(map(str, features)), tuple(map(str, classes))
    leaves = jax.tree.leaves(raw)
    if features and (len(leaves) != 1 or leaves[0].shape[1:] != (len(features),)):
        raise ValueError(
            f"there are {len(features)} names of features, but an example has the shape "
            f"{', '.join(str(leaf.shape[1:]) for leaf in leaves)}"
        )
    if describe is not None and not callable(describe):
        raise TypeError(f"describe must be a function, not {describe!r}")
    shape = None if describe is not None else image_shape_of(raw, image_shape)
    return Showing(raw, shape, describe, features, classes, units)


def page(
    seen: Inspection,
    y: Any,
    showing: Showing,
    title: str,
    about: str,
    history: Mapping[str, Sequence[Any]] | None,
) -> str:
    """The page of what was measured."""
    lines = facts(seen, history)
    parts = [_head(seen, showing, about), html.facts(lines)]
    flow = saturation = curve = ""
    if seen.weighted:
        flow = html.heading("Flow of the delta") + pictures.flow(seen)
    if any(l.units for l in seen.layers):
        saturation = html.heading("Saturation") + pictures.saturation(seen)
    sizes = html.heading("Gradients of single examples" if seen.norms is not None else "Costs")
    sizes += pictures.sizes(seen)
    if history is not None:
        curve = html.heading("Learning curve") + pictures.learning_curve(history)
    parts.append(html.pair(*filter(None, (flow, saturation, sizes, curve))))
    parts += _extremes(seen, y, showing)
    parts += [html.heading("Layers"), _layers(seen)]
    parts.append(f"<footer>jbackprop {jbackprop.__version__}, JAX {jax.__version__}</footer>")
    return html.page(title, *parts)


def _head(seen: Inspection, showing: Showing, about: str) -> str:
    tiles = [
        (
            "parameters",
            f"{seen.parameters:,}",
            f"in {sum(bool(l.parameters) for l in seen.layers)} layers",
        ),
        ("examples", f"{seen.examples:,}", "looked at"),
        ("mean cost", number(mean(seen.costs)), _short(repr(seen.loss)) + _of_finite(seen.costs)),
    ]
    if seen.outcome.name == "accuracy":
        share = seen.outcome.mean
        exact = "NaN" if np.isnan(share) else f"{share:.1%}"
        wrong = seen.outcome.wrong
        note = "of all labels or positions" if wrong is None else f"{int(wrong.sum()):,} not right"
        tiles.append(("accuracy", exact, note))
    elif seen.outcome.name:
        tiles.append(_error(seen, showing))
    if seen.norms is not None:
        own = seen.norms[np.isfinite(seen.norms)]
        median = float(np.median(own)) if own.size else float("nan")
        note = "median over the examples" + _of_finite(seen.norms)
        tiles.append(("gradient norm", number(median), note))
    return (html.lead(about) if about else "") + html.tiles(tiles)


def _of_finite(values: np.ndarray) -> str:
    there = int(np.isfinite(values).sum())
    return "" if there == len(values) else f", {there:,} of {len(values):,} being finite"


def _error(seen: Inspection, showing: Showing) -> tuple[str, str, str]:
    """The mean absolute error, in the targets' own units where there is one scale for all."""
    if showing.units is None:
        return "absolute error", number(seen.outcome.mean), "mean over the examples"
    scale = np.unique(np.asarray(showing.units[1], np.float64))
    if scale.size > 1:
        return "absolute error", number(seen.outcome.mean), "mean, of standardised targets"
    return "absolute error", number(seen.outcome.mean * float(scale[0])), "in the targets' units"


def _short(text: str, most: int = 44) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _extremes(seen: Inspection, y: Any, showing: Showing) -> list[str]:
    if not seen.largest.size:
        return []
    what = "gradients" if seen.norms is not None else "costs"
    wrong = seen.outcome.wrong
    marked = " What is not right is marked in orange." if wrong is not None else ""
    said = (
        "Of each example what it is, or what it was taken for and with which probability"
        if seen.outcome.name == "accuracy" and seen.outcome.labels is not None
        else "Of each example its target and the prediction"
    )
    if seen.norms is not None:
        said += "; the norm of its gradient; the share of that in the sum of all squared norms"
    said += "; and its cost."
    if showing.image_shape is None and showing.describe is None:
        said += " Features: those farthest from their mean, in standard deviations (sd)."
    parts = [html.heading(f"Examples with the largest {what}")]
    parts.append(html.note(said + marked))
    parts.append(gallery(seen, y, showing, list(seen.largest)))
    if seen.smallest.size:
        parts.append(html.heading(f"Examples with the smallest {what}"))
        parts.append(gallery(seen, y, showing, list(seen.smallest)))
    return parts


def _layers(seen: Inspection) -> str:
    """Every layer, how its activations and deltas are spread."""
    first, bins = _decades(seen)
    low, high = (f"{10.0 ** (at / PER_DECADE):.0e}" for at in (first, first + bins))
    axis = f"<small>{low} to {high}, log axis</small>" if bins else ""
    columns = (
        ">", "layer", ">parameters", ">output", "activations", ">mean", ">sd", ">zero",
        Markup(f"size of deltas<br>{axis}"), ">mean", ">sd", ">zero", ">saturated", ">dead",
    )  # fmt: skip
    rows = []
    for l in seen.layers:
        path = escape(l.path).replace(".", ".<wbr>")
        name = Markup(f"<div class=name>{escape(_short(l.layer))}<br><small>{path}</small></div>")
        a, d = l.activations, l.deltas
        ends = f"{number(a.least)} to {number(a.most)}"
        drawn = html.bars(a.counts, f"{l.path}, activations: {ends}")
        row: list[str] = [
            str(l.number), name, f"{l.parameters:,}" if l.parameters else "", l.shape,
            Markup(f"{drawn}<small>{escape(ends)}</small>"), *_moments(a),
        ]  # fmt: skip
        if d is None:
            row += ["", "", "", ""]
        else:
            start = round(float(d.edges[0]) * PER_DECADE) - first if len(d.counts) else 0
            counts = d.counts[max(-start, 0) :]
            row += [
                html.bars(counts, f"{l.path}, size of the deltas: {low} to {high}",
                          start=max(start, 0), of=bins, size=(110, 26), colour=html.GREEN),
                *_moments(d),
            ]  # fmt: skip
        units = l.units
        row += ["", ""] if units is None else [f"{units.saturated:.1%}", f"{units.dead:.1%}"]
        rows.append(row)
    notes = [
        "Histograms are of all entries for all examples, but for those that are exactly 0, whose "
        "share is beside them; bars are as high as the root of what they count. The deltas are "
        "gradients of one example's own cost with respect to the layer's outputs; the axis of "
        "their size is the same for all layers (at most 1 % of a layer's are smaller still). "
        "Saturated: |f'| < 0.05. Dead: f' = 0 for every example."
    ]
    if seen.net.draws:
        notes.append("Nothing was drawn at random: dropout lets everything pass.")
    if seen.coupled and len(seen.chunks) > 1:
        notes.append(
            f"The examples came in chunks of {seen.chunks[0]:,}, each with its own statistics."
        )
    return html.note(" ".join(notes)) + html.table(columns, rows, middle=True)


def _moments(spread: Any) -> list[str]:
    zero = "" if not spread.zeros > 0 else f"{spread.zeros:.1%}"
    odd = f"{spread.nonfinite:,} not finite" if spread.nonfinite else ""
    return [
        number(spread.mean),
        number(spread.std),
        Markup(f"{zero} <b>{odd}</b>") if odd else zero,
    ]


def _decades(seen: Inspection) -> tuple[int, int]:
    """The axis of the sizes of deltas: its first bin, and how many.

    Of each layer the lowest 1 % may be outside.
    """
    ends = []
    for l in seen.layers:
        if l.deltas is None or not len(l.deltas.counts):
            continue
        first = round(float(l.deltas.edges[0]) * PER_DECADE)
        share = np.cumsum(l.deltas.counts) / l.deltas.counts.sum()
        ends.append((first + int(np.searchsorted(share, 0.01)), first + len(share)))
    if not ends:
        return 0, 0
    low, high = min(e[0] for e in ends), max(e[1] for e in ends)
    return low, high - low
