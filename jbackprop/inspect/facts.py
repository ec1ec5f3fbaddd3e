"""What the figures say, in words: one line for each thing that a person would want to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jbackprop.html import number
from jbackprop.inspect.figures import Inspection, LayerFigures, mean
from jbackprop.losses import SoftmaxCrossEntropy

Kind = Literal["bad", "look", "plain"]

FOLD = 3.0
"""By less the size of a delta has not changed."""
ENOUGH = 20
"""With fewer examples nothing is said of units that are dead for all of them."""


class Fact(NamedTuple):
    """One line.

    Attributes:
        kind: "bad" is broken, "look" is worth a look, "plain" is how it is.
        text: the line.
    """

    kind: Kind
    text: str


def facts(seen: Inspection, history: Mapping[str, Sequence[float]] | None = None) -> list[Fact]:
    """The facts that the figures support; what is broken first.

    Args:
        seen: from `measure`.
        history: by name, one value for each epoch.
    """
    makers: tuple[Callable[[Inspection], Iterator[Fact]], ...] = (
        _nonfinite, _guessing, _flow, _silent, _units, _norms, _mistakes,
    )  # fmt: skip
    found = [fact for make in makers for fact in make(seen)]
    found += _learning(history or {})
    order: dict[str, int] = {"bad": 0, "look": 1, "plain": 2}
    return sorted(found, key=lambda fact: order[fact.kind])


def _nonfinite(seen: Inspection) -> Iterator[Fact]:
    if seen.nonfinite is None:
        return
    yield Fact("bad", f"Not all is finite. NaN or infinity is first in {seen.nonfinite}.")
    sizes = seen.costs if seen.norms is None else seen.norms + seen.costs
    odd = np.flatnonzero(~np.isfinite(sizes))
    if odd.size:
        few = ", ".join(map(str, odd[:5])) + (", ..." if odd.size > 5 else "")
        who = f"{odd.size:,} of {seen.examples:,} examples {'has' if odd.size == 1 else 'have'}"
        yield Fact(
            "bad",
            f"{who} a cost or a gradient that is not finite: {few}. All means, quartiles and "
            "histograms here are of what is finite.",
        )


def _guessing(seen: Inspection) -> Iterator[Fact]:
    """A loss no lower than that of who knows how frequent the classes are."""
    labels = seen.outcome.labels
    if labels is None or type(seen.loss) is not SoftmaxCrossEntropy or seen.loss.class_weights:
        return
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    entropy, cost = float(-(share * np.log(share)).sum()), mean(seen.costs)
    if len(share) > 1 and cost >= 0.98 * entropy and not seen.loss.label_smoothing:
        yield Fact(
            "look",
            f"The mean cost {number(cost)} is {'more than' if cost > 1.02 * entropy else 'about'} "
            f"what it costs to know no more than how frequent the classes are, {number(entropy)}.",
        )


def _medians(seen: Inspection) -> list[tuple[LayerFigures, float]]:
    found = []
    for layer in seen.weighted:
        assert layer.delta_norms is not None
        own = layer.delta_norms[np.isfinite(layer.delta_norms)]
        if own.size:
            found.append((layer, float(np.median(own))))
    return found


def _flow(seen: Inspection) -> Iterator[Fact]:
    layers = _medians(seen)
    if len(layers) < 2:
        return
    (first, small), (last, large) = layers[0], layers[-1]
    way = f"on the way back from the last layer with weights ({last.path}) to the first "
    way += f"({first.path})"
    if large == 0 or small == 0:
        return  # that is for `_silent`
    ratio = small / large
    sizes = f"median norm {number(large)} at the last, {number(small)} at the first"
    if ratio < 1 / FOLD:
        fold = f"{number(1 / ratio)}-fold"
        yield Fact("look" if ratio < 0.01 else "plain", f"Deltas shrink {fold} {way}: {sizes}.")
    elif ratio > FOLD:
        kind: Kind = "look" if ratio > 100 else "plain"
        yield Fact(kind, f"Deltas grow {number(ratio)}-fold {way}: {sizes}.")
    else:
        yield Fact("plain", f"Deltas keep their size, within a factor of {FOLD:g}, {way}: {sizes}.")
    earlier = {path: np.median(v[np.isfinite(v)]) for path, v in seen.before.items()}
    there, here = earlier.get(last.path, 0), earlier.get(first.path, 0)
    if there > 0 and here > 0 and max(ratio, here / there) > FOLD * min(ratio, here / there):
        yield Fact(
            "plain",
            f"Before training the first layer's delta had {number(here / there)} times the norm of "
            f"the last layer's; now it has {number(ratio)} times.",
        )


def _silent(seen: Inspection) -> Iterator[Fact]:
    silent = [layer.path for layer, size in _medians(seen) if size == 0]
    if silent:
        few = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
        yield Fact("look", f"The delta is exactly 0 for half of the examples or more in {few}.")


def _units(seen: Inspection) -> Iterator[Fact]:
    own = [(l, l.units) for l in seen.layers if l.units is not None]
    if not own:
        return
    dead = [(l, u) for l, u in own if u.dead > 0]
    if dead and seen.examples >= ENOUGH:
        layer, units = max(dead, key=lambda pair: pair[1].dead)
        others = {1: "", 2: " So are some of one other layer."}.get(
            len(dead), f" So are some of {len(dead) - 1} other layers."
        )
        yield Fact(
            "look" if units.dead > 0.05 else "plain",
            f"{units.dead:.1%} of the {units.number:,} units of {layer.path} ({layer.layer}) are "
            f"dead: f' is 0 for every example, so that no delta passes.{others}",
        )
    layer, units = max(own, key=lambda pair: pair[1].saturated - pair[1].off)
    if units.saturated - units.off > 0.25:
        yield Fact(
            "look",
            f"{units.saturated:.0%} of {layer.path} ({layer.layer}) is saturated: |f'| < 0.05.",
        )
    layer, units = max(own, key=lambda pair: pair[1].off)
    if units.off > 0.9:
        yield Fact(
            "look", f"{layer.path} ({layer.layer}) is off (f' = 0) in {units.off:.1%} of all cases."
        )


def _norms(seen: Inspection) -> Iterator[Fact]:
    if seen.norms is None:
        yield Fact(
            "plain",
            f"{seen.coupled} couples the examples: there is no gradient of a single one, and the "
            "deltas before it are those of the summed cost of each chunk.",
        )
        return
    own = np.sort(seen.norms[np.isfinite(seen.norms)])[::-1]
    if own.size < ENOUGH:
        return
    total, median = float(np.square(own).sum()), float(np.median(own))
    if total == 0:
        yield Fact("look", "The gradient of every example is exactly 0.")
        return
    few = max(1, round(0.01 * own.size))
    share = float(np.square(own[:few]).sum()) / total
    which = f"The {few:,} largest gradients ({few / own.size:.1%} of the examples)"
    if few == 1:
        which = f"The largest gradient (1 of {own.size:,} examples)"
    times = f", and are {number(own[few - 1] / median)} times the median or more" if median else ""
    if few == 1 and median:
        times = f", and is {number(own[0] / median)} times the median"
    hold = "holds" if few == 1 else "hold"
    yield Fact(
        "look" if share > 20 * few / own.size else "plain",
        f"{which} {hold} {share:.0%} of the total squared norm{times}.",
    )


def _mistakes(seen: Inspection) -> Iterator[Fact]:
    wrong = seen.outcome.wrong
    if wrong is None or seen.norms is None or not seen.largest.size or not wrong.any():
        return
    all_of_them = float(wrong.mean())
    among = int(wrong[seen.largest].sum())
    shown = len(seen.largest)
    which = f"{among} of the {shown} largest gradients are"
    if among == shown > 1:
        which = f"All {shown} largest gradients are"
    if all_of_them < 0.1 and among > 2 * all_of_them * shown:
        yield Fact(
            "plain",
            f"{which} of mistakes, though only {int(wrong.sum()):,} of all {len(wrong):,} examples "
            f"({all_of_them:.1%}) are mistakes: are their labels right?",
        )


def _learning(history: Mapping[str, Sequence[Any]]) -> Iterator[Fact]:
    watched = next((name for name in ("validation_loss", "loss") if history.get(name)), None)
    if watched is None:
        return
    values = np.array([np.nan if v is None else v for v in history[watched]], np.float64)
    if len(values) < 2 or not np.isfinite(values).any():
        return
    best, what = int(np.nanargmin(values)), watched.replace("_", " ")
    last = values[-1]
    if not np.isfinite(last):
        yield Fact("bad", f"The {what} of the last epoch is {last}.")
    elif best < len(values) - 1 and last > 1.05 * values[best] > 0:
        yield Fact(
            "look",
            f"The {what} was lowest at epoch {best + 1} of {len(values)}, {number(values[best])}; "
            f"it has since risen to {number(last)}.",
        )
    else:
        yield Fact(
            "plain",
            f"The {what} fell from {number(values[0])} to {number(last)} in {len(values)} epochs."
            if last < values[0]
            else f"The {what} did not fall: {number(values[0])} at first, {number(last)} at last.",
        )
