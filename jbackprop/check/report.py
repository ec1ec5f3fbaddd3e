"""What a check has found: a tree of verdicts. Printed, it is a table one can read."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from jbackprop.table import render

Verdict = Literal["right", "inconclusive", "wrong"]
_ORDER: tuple[Verdict, ...] = ("right", "inconclusive", "wrong")


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them; of none at all it is "inconclusive": nothing has been compared."""
    return max(verdicts, key=_ORDER.index, default="inconclusive")


@dataclasses.dataclass(frozen=True)
class Figures:
    """How a candidate compares with the truth.

    Attributes:
        error: |candidate - truth| / size, norms over all entries. The size is |truth|, or what
            cancels in it where that is far more (`cancels`).
        tolerance: what error may be.
        cosine: of the angle between the two; NaN where one is zero.
        ratio: |candidate| / |truth|; NaN where both are zero.
        index: where the worst entry is; None where the truth is known along directions only.
        candidate: the candidate's value there.
        truth: the true value there.
        ulps: their distance there, in units in the last place of the truth in the candidate's
            dtype.
        kinks: how many entries lie within rounding of a kink; they are judged one-sidedly.
        cancels: whether the truth is zero by nature, and judged against the size of what cancels.
    """

    error: float
    tolerance: float
    cosine: float = math.nan
    ratio: float = math.nan
    index: tuple[int, ...] | None = None
    candidate: float = math.nan
    truth: float = math.nan
    ulps: float = math.nan
    kinks: int = 0
    cancels: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdict on one array or one property (a leaf), or on all its parts together.

    Attributes:
        path: what it is about, such as ``layers[2].w``; of the whole, the call.
        kind: what of it: "gradient", "delta", "rule alone", ...; of the whole, what it is about.
        parts: the reports it is made of; none for a leaf.
        own: a leaf's verdict.
        why: in words, why a leaf is not right, or what has to be known of it although it is.
        diagnosis: what would make a wrong leaf right; empty where nothing explains the error.
        figures: the numbers of a leaf, where it has them.
        notes: how the check was made: truth, dtype, directions, seed, warnings.
    """

    path: str
    kind: str = ""
    parts: tuple[Report, ...] = ()
    own: Verdict = "right"
    why: str = ""
    diagnosis: str = ""
    figures: Figures | None = None
    notes: tuple[str, ...] = ()
    _composed: bool = dataclasses.field(default=False, repr=False)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all leaves; "inconclusive" if there is no leaf."""
        if self.parts or self._composed:
            return worst(part.verdict for part in self.parts)
        return self.own

    @property
    def ok(self) -> bool:
        """Whether all is right."""
        return self.verdict == "right"

    def __bool__(self) -> bool:
        return self.ok  # `assert check(...)` must not pass because an object is true

    @property
    def leaves(self) -> tuple[Report, ...]:
        """All verdicts on single arrays and properties, in the order of the table."""
        return tuple(self._walk())

    @property
    def failures(self) -> tuple[Report, ...]:
        """The leaves that are not right: wrong or inconclusive, in the order of the table."""
        return tuple(leaf for leaf in self._walk() if leaf.verdict != "right")

    @property
    def wrong(self) -> tuple[Report, ...]:
        """The leaves that are wrong."""
        return tuple(leaf for leaf in self._walk() if leaf.verdict == "wrong")

    @property
    def worst_error(self) -> float:
        """The largest relative error of all leaves; NaN counts as the largest."""
        errors = [leaf.figures.error for leaf in self._walk() if leaf.figures]
        return max(errors, key=lambda e: math.inf if e != e else e, default=math.nan)

    def _walk(self) -> Iterator[Report]:
        if not self.parts and not self._composed:
            yield self
        for part in self.parts:
            yield from part._walk()

    def to_json(self, indent: int | None = 2) -> str:
        """The whole tree as JSON; NaN and infinity are null."""
        return json.dumps(self.as_dict(), indent=indent, allow_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dicts and lists, without what is empty."""
        tree: dict[str, Any] = {"path": self.path, "kind": self.kind, "verdict": self.verdict}
        tree |= {name: value for name in ("why", "diagnosis") if (value := getattr(self, name))}
        if self.figures:
            tree["figures"] = {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in dataclasses.asdict(self.figures).items()
            }
        if self.notes:
            tree["notes"] = list(self.notes)
        if self.parts:
            tree["parts"] = [part.as_dict() for part in self.parts]
        return tree

    def __str__(self) -> str:
        leaves = self.leaves
        counted = {v: sum(leaf.verdict == v for leaf in leaves) for v in reversed(_ORDER)}
        counts = ", ".join(f"{n} {v}" for v, n in counted.items() if n) or "nothing to compare"
        head = " ".join(filter(None, (self.path, self.kind)))
        lines = [f"{head}: {self.verdict.upper() if not self.ok else 'right'} ({counts})"]
        lines += _wrapped(self.why) if self.why else []
        columns = (
            "what", "", "verdict", ">relative error", ">allowed", ">cosine", ">ratio",
            "worst entry", ">ulps",
        )  # fmt: skip
        lines += ["", render(columns, map(_row, leaves))] if leaves else []
        told = [leaf for leaf in leaves if leaf.why or leaf.diagnosis]
        lines += [""] * bool(told)
        lines += [line for leaf in told for words in _told(leaf) for line in _wrapped(words)]
        notes = [note for report in self._all() for note in report.notes]
        lines += [""] * bool(notes)
        lines += [line for note in dict.fromkeys(notes) for line in _wrapped(note)]
        return "\n".join(lines)

    def _all(self) -> Iterator[Report]:
        yield self
        for part in self.parts:
            yield from part._all()


def notes_of(parts: Iterable[Report]) -> list[str]:
    """The notes of some parts, each once."""
    return list(dict.fromkeys(note for part in parts for note in part.notes))


def composed(
    path: str, kind: str, parts: Iterable[Report], why: str = "", notes: Iterable[str] = ()
) -> Report:
    """A report of parts."""
    return Report(path, kind, tuple(parts), why=why, notes=tuple(notes), _composed=True)


def demand(report: Report) -> None:
    """Raise AssertionError with the report as its message, unless all is right."""
    if not report.ok:
        raise AssertionError(f"\n{report}")


def _wrapped(words: str) -> list[str]:
    return textwrap.wrap(words, 100, subsequent_indent="  ", break_long_words=False)


def _row(leaf: Report) -> tuple[str, ...]:
    shown = leaf.verdict if leaf.ok else leaf.verdict.upper()
    f = leaf.figures
    if f is None:
        return (leaf.path, leaf.kind, shown, "", "", "", "", "", "")
    entry = ""
    if f.index is not None and not f.error <= 0:
        entry = f"{list(f.index) if f.index else ''} {f.candidate:.6g} for {f.truth:.6g}".strip()
    return (
        leaf.path, leaf.kind, shown, f"{f.error:.1e}", f"{f.tolerance:.1e}",
        _blank(f.cosine, ".6f"), _blank(f.ratio, ".6g"), entry, _blank(f.ulps, ".3g"),
    )  # fmt: skip


def _blank(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _told(leaf: Report) -> Iterator[str]:
    name = " ".join(filter(None, (leaf.path, leaf.kind)))
    if leaf.why:
        yield f"{name}: {leaf.verdict}: {leaf.why}"
    if leaf.diagnosis.startswith("yours"):
        yield f"{name}: wrong, and here is one that would be right: {leaf.diagnosis}"
    elif leaf.diagnosis:
        yield f"{name}: wrong: {leaf.diagnosis}"
