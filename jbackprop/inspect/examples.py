"""Single examples as one can look at them: pictures, tokens, or the features that stand out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop.checks import shape_of
from jbackprop.html import Markup, cards, image, number
from jbackprop.inspect.figures import Inspection
from jbackprop.inspect.targets import CLASSES, classes_of
from jbackprop.losses import SigmoidCrossEntropy

MOST = 5
"""So many features or outputs of an example are shown."""


@dataclasses.dataclass(frozen=True, eq=False)
class Showing:
    """How to show examples.

    Attributes:
        raw: what there is to show, (n, ...); the inputs, or these before they were standardised.
        image_shape: (H, W), (H, W, 1) or (H, W, 3) of one example; None for no pictures.
        describe: from one example of raw to a text; None for the default.
        features: names of the features; () for none.
        classes: names of the classes; () for none.
        units: the targets' offset and scale, (q,) each: shown is offset + scale * target.
        numbers: (n,), what the examples are called; None for their own numbers, from 0.
    """

    raw: Any
    image_shape: tuple[int, ...] | None
    describe: Callable[[Any], str] | None
    features: tuple[str, ...]
    classes: tuple[str, ...]
    units: tuple[Any, Any] | None
    numbers: Any = None


def image_shape_of(raw: Any, given: Any) -> tuple[int, ...] | None:
    """The shape of the pictures that examples are; None if they are none.

    Raises:
        ValueError: a shape that is none of a picture, or has another number of entries.
    """
    leaves = jax.tree.leaves(raw)
    if given is None:
        if len(leaves) != 1 or not np.issubdtype(leaves[0].dtype, np.floating):
            return None
        shape = leaves[0].shape[1:]
        pictures = len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3))
        return shape if pictures and min(shape[:2]) > 1 and max(shape[:2]) <= 256 else None
    shape = shape_of(given, "image_shape")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[-1] not in (1, 3)) or 0 in shape:
        raise ValueError(
            f"image_shape must be (height, width), or with 1 or 3 channels behind, not {shape}"
        )
    size = sum(int(np.prod(leaf.shape[1:], dtype=int)) for leaf in leaves)
    if len(leaves) != 1 or int(np.prod(shape)) != size:
        raise ValueError(
            f"image_shape {shape} has {int(np.prod(shape))} entries, but an example has {size}"
        )
    return shape


def gallery(seen: Inspection, y: Any, showing: Showing, rows: Sequence[int]) -> str:
    """Cards of some examples, in their order."""
    values = seen.costs if seen.norms is None else seen.norms
    finite = np.where(np.isfinite(values), values, 0)
    scale = finite.max(initial=0) or 1  # squares of tiny norms would be 0
    total = float(np.square(finite / scale).sum()) or 1.0
    wrong = seen.outcome.wrong
    shown = _Shown(showing, np.concatenate([seen.largest, seen.smallest]))
    items = []
    for row in map(int, rows):
        called = row if showing.numbers is None else int(showing.numbers[row])
        lines = [f"<small>example {called:,}</small>", _verdict(seen, y, showing, row)]
        if seen.norms is not None:
            share = (finite[row] / scale) ** 2 / total
            of_all = f"{100 * share:.2g} %" if share >= 1e-4 else "&lt; 0.01 %"
            lines.append(f"norm {number(seen.norms[row])}")
            if np.isfinite(values[row]):
                lines.append(f"<small>share {of_all}</small>")
        lines.append(f"<small>cost {number(seen.costs[row])}</small>")
        odd = not np.isfinite(values[row]) or (wrong is not None and bool(wrong[row]))
        items.append((shown.of(row), Markup("".join(_lines(lines))), odd))
    return cards(items, text=showing.image_shape is None)


def _lines(lines: Sequence[str]) -> list[str]:
    return [line if line.startswith("<small>") else f"<div>{line}</div>" for line in lines]


def _verdict(seen: Inspection, y: Any, showing: Showing, row: int) -> str:
    """Target and prediction of one example, as HTML."""
    z, loss = seen.outputs[row], seen.loss
    target = np.asarray(jax.tree.leaves(y)[0][row])
    p = np.asarray(loss.predict(jnp.asarray(z)[None]))[0]
    if isinstance(loss, CLASSES) and z.ndim == 1:
        label, guess = int(classes_of(z, target)), int(np.argmax(p))
        if label == getattr(loss, "ignore_index", None):
            return f"no target, {_taken(showing, guess, p[guess])}"
        return _judged(showing, label, guess, p[guess])
    if isinstance(loss, SigmoidCrossEntropy) and z.shape == (1,):
        guess = int(p[0] > 0.5)
        return _judged(showing, int(target[0] > 0.5), guess, p[0] if guess else 1 - p[0])
    if seen.outcome.name == "accuracy":
        places = int(np.prod(z.shape[:-1])) if isinstance(loss, CLASSES) else z.size
        return f"{seen.outcome.values[row]:.0%} of {places:,} right"
    if showing.units is not None:
        offset, factor = showing.units
        target, p = offset + factor * target, offset + factor * p
    return f"{_few(target)}, predicted {_few(p)}"


def _judged(showing: Showing, label: int, guess: int, p: float) -> str:
    if label == guess and np.isfinite(p):
        return f"{_class(showing, label)} ({p:.0%})"
    return f"<span class=strong>is {_class(showing, label)}</span>, {_taken(showing, guess, p)}"


def _taken(showing: Showing, guess: int, p: float) -> str:
    if not np.isfinite(p):
        return "outputs not finite"
    return f"taken for {_class(showing, guess)} ({p:.0%})"


def _class(showing: Showing, label: int) -> str:
    named = 0 <= label < len(showing.classes)
    return escape(showing.classes[label]) if named else str(label)


def _few(values: Any) -> str:
    flat = np.asarray(values).ravel()
    few = ", ".join(number(float(v)) for v in flat[:MOST])
    return few + (f", ... ({flat.size:,})" if flat.size > MOST else "")


class _Shown:
    """The examples themselves; pictures share their grey scale."""

    def __init__(self, showing: Showing, rows: np.ndarray):
        self.showing = showing
        self.low, self.high = 0.0, 1.0
        leaves = jax.tree.leaves(showing.raw)
        if showing.image_shape is not None and len(rows):
            some = np.asarray(leaves[0][rows], np.float64)
            some = some[np.isfinite(some)]
            if some.size:
                self.low, self.high = float(some.min()), float(some.max())
        flat = len(leaves) == 1 and leaves[0].ndim == 2 and leaves[0].dtype.kind == "f"
        self.mean = self.std = None
        if flat:
            all_of_them = np.asarray(leaves[0], np.float64)
            self.mean, self.std = np.nanmean(all_of_them, 0), np.nanstd(all_of_them, 0)

    def of(self, row: int) -> str:
        """One of them, as HTML."""
        own = jax.tree.map(lambda v: np.asarray(v[row]), self.showing.raw)
        if self.showing.describe is not None:
            return _text(str(self.showing.describe(own)))
        if self.showing.image_shape is not None:
            array = own.reshape(self.showing.image_shape)
            return image(array, f"example {row}", self.low, self.high)
        leaves = jax.tree.leaves(own)
        if self.mean is not None:
            return self._features(np.asarray(leaves[0], np.float64))
        return _text("\n".join(_array(leaf) for leaf in leaves))

    def _features(self, v: np.ndarray) -> Markup:
        """The features that are farthest from their mean, in standard deviations."""
        assert self.mean is not None
        assert self.std is not None
        away = (v - self.mean) / np.where(self.std > 0, self.std, 1)
        order = np.argsort(-np.where(np.isfinite(away), np.abs(away), np.inf), kind="stable")
        names = self.showing.features or tuple(f"x[{i}]" for i in range(len(v)))
        lines = (
            f"{escape(names[i])} = {number(v[i])}<b>{away[i]:+.1f} sd</b>" for i in order[:MOST]
        )
        return Markup(f"<pre>{'<br>'.join(lines)}</pre>")


def _array(v: np.ndarray) -> str:
    if v.dtype.kind in "iub":
        flat = v.ravel()
        return " ".join(map(str, flat[:40])) + (" ..." if flat.size > 40 else "")
    if v.size <= MOST:
        return _few(v)
    least, middle, most = (number(float(f(v))) for f in (np.min, np.mean, np.max))
    return f"{' x '.join(map(str, v.shape))}: from {least} to {most}, mean {middle}"


def _text(text: str) -> Markup:
    return Markup(f"<pre>{escape(text)}</pre>")
