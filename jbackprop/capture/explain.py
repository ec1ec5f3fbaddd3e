"""What became of each parameter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from jbackprop.capture.contraction import birthplace, mini_batch
from jbackprop.capture.pairs import pair_of
from jbackprop.capture.program import Program
from jbackprop.capture.uses import Use
from jbackprop.factored import Factored, Full, Nothing, Patches, Scale, Shift, Sum
from jbackprop.table import render


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of one parameter.

    Attributes:
        path: its name.
        shape: its shape.
        kind: of its factored gradient; parts of a `Sum` joined by " + ".
        operations: those that used it.
        uses: how many of the program's operations used it.
        groups: how many slices of it have weights of their own: scanned copies, heads, groups of
            a convolution.
        positions: at how many places of one example each was used: tokens, pixels, turns of a scan.
        numbers: how many numbers its pair takes for one example.
        entries: how many numbers it has itself.
        dense: whether its gradient is written out for each example, and it is no vector.
        at_birth: whether `collect` asks for it where the pairs are born, in a scan.
        why: if it has no pair at some use, why, and what that costs; if it is not used, that.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    operations: tuple[str, ...]
    uses: int
    groups: int
    positions: int
    numbers: int
    entries: int
    dense: bool
    at_birth: bool
    why: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A row for each parameter; prints as a table, less what is empty in every row of it.

    *kept/example* is how many numbers a pair takes for one example, *entries* how many the
    parameter has; *dense* is said of what is as large as a gradient of each example, *in scan* of
    what `collect` contracts there.

    Attributes:
        rows: in the order of the leaves of params.
        examples: B.
    """

    rows: tuple[Row, ...]
    examples: int

    @property
    def fallbacks(self) -> tuple[Row, ...]:
        """The parameters whose gradients are written out somewhere, for want of a rule."""
        return tuple(row for row in self.rows if "Full" in row.kind)

    def __str__(self) -> str:
        columns = (
            "parameter", "shape", "kind", ">uses", ">groups", ">positions", ">kept/example",
            ">entries", "dense", "in scan", "why no pair",
        )  # fmt: skip
        marks = {True: "yes", False: "-"}
        rows = [
            (
                row.path, "x".join(map(str, row.shape)) or "()", row.kind, str(row.uses),
                str(row.groups), str(row.positions), f"{row.numbers:,}", f"{row.entries:,}",
                marks[row.dense], marks[row.at_birth], row.why,
            )
            for row in self.rows
        ]  # fmt: skip
        shown = [k for k in range(len(columns)) if any(row[k] not in ("", "-") for row in rows)]
        table = [[row[k] for k in shown] for row in rows]
        return render([columns[k] for k in shown], table)


def explanation(program: Program) -> Explanation:
    """The rows of a planned program."""
    every = range(len(program.params))
    return Explanation(tuple(_row(program, k) for k in every), program.n)


def _row(program: Program, leaf: int) -> Row:
    found, like, path = program.of(leaf), program.params[leaf], program.paths[leaf]
    n, entries = program.n, math.prod(like.shape)

    def pair(made: Any) -> Factored:
        return pair_of(found, made, like, path, n)

    shapes: Factored = jax.eval_shape(pair, [mini_batch(use, n) for use in found])
    parts = shapes.parts if isinstance(shapes, Sum) else (shapes,)
    numbers = sum(math.prod(v.shape[1:]) for v in jax.tree.leaves(shapes))
    sizes = [_sizes(part) for part in parts]
    return Row(
        path=path,
        shape=tuple(like.shape),
        kind=" + ".join(type(part).__name__ for part in parts),
        operations=tuple(use.operation for use in found),
        uses=len(found),
        groups=max(groups for groups, _ in sizes),
        positions=sum(positions for _, positions in sizes),
        numbers=numbers,
        entries=entries,
        dense=any(map(_dense, parts)),
        at_birth=bool(birthplace(found)),
        why=_why(found, entries, n),
    )


def _sizes(pair: Factored) -> tuple[int, int]:
    """Groups and positions."""
    if isinstance(pair, Nothing):
        return 0, 0
    if isinstance(pair, Full):
        return 1, 1
    delta = pair.delta.shape  # type: ignore[attr-defined]
    if isinstance(pair, Patches):
        return delta[1] * pair.geometry.groups, math.prod(delta[2:-1])
    return delta[1], delta[2]


def _dense(pair: Factored) -> bool:
    if isinstance(pair, Nothing):
        return False
    vector = sum(n != 1 for n in pair.home.shape) < 2
    alone = isinstance(pair, Shift | Scale) and _sizes(pair)[1] == 1  # one position: as large
    return not vector and (isinstance(pair, Full) or alone)


def _why(found: list[Use], entries: int, n: int) -> str:
    if not found:
        return "it is not used: its gradient is 0"
    reasons = list(dict.fromkeys(use.why for use in found if use.kind == "Full"))
    if not reasons:
        return ""
    return f"{'; '.join(reasons)}: {n} gradients of {entries:,} numbers"
