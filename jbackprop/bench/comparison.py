"""Two runs of the suite: what has become faster, slower, larger, or cannot be told from noise."""

from __future__ import annotations

import dataclasses
import math

from jbackprop.bench.contest import Row, paired
from jbackprop.bench.results import Run, interval, unit_of
from jbackprop.table import render

FLOOR = 0.05
"""Smaller changes of a ratio are not called changes: two runs of one program differ by as much."""
MEMORY = 0.01
"""The same for memory, which the compiler states exactly."""


@dataclasses.dataclass(frozen=True)
class Change:
    """One contestant in two runs, A and B.

    Attributes:
        workload, contestant: names.
        before, after: the median of its time over the unit's of the same run.
        change: after / before; with `low` and `high`, an interval of 95 %.
        memory: temporary memory of B over A's; None where not known.
        verdict: "faster", "slower", "the same", "cannot tell", "only in A" or "only in B"; or of
            memory "smaller" and "larger".
    """

    workload: str
    contestant: str
    verdict: str
    before: float | None = None
    after: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    memory: float | None = None

    @property
    def worse(self) -> bool:
        """Slower or larger."""
        return "slower" in self.verdict or "larger" in self.verdict


def compare(a: Run, b: Run) -> list[Change]:
    """What has changed from run A to run B, for everybody but the units.

    Times are compared as ratios to the unit of their own run, paired round by round, so that the
    speed of the machine on the day cancels. The verdict is "faster" or "slower" where the interval
    of the change excludes what is within `FLOOR` of 1; "the same" where the whole interval is
    within it; otherwise "cannot tell".
    """
    before = {(r.workload, r.contestant): r for r in a.rows}
    after = {(r.workload, r.contestant): r for r in b.rows}
    found = []
    for key in [*before, *(k for k in after if k not in before)]:
        old, new = before.get(key), after.get(key)
        if old is None or new is None or not old.samples or not new.samples:
            if (old and old.samples) or (new and new.samples):
                found.append(Change(*key, "only in A" if old and old.samples else "only in B"))
        elif not old.unit:
            found.append(_changed(old, new, a, b))
    return found


def _changed(old: Row, new: Row, a: Run, b: Run) -> Change:
    units = unit_of(a.rows, old.workload), unit_of(b.rows, new.workload)
    memory = new.temp / old.temp if new.temp and old.temp else None
    words = []
    if memory is not None and abs(memory - 1) > MEMORY:
        words.append("larger" if memory > 1 else "smaller")
    if units[0] is None or units[1] is None:
        words.insert(0, "cannot tell")
        return Change(old.workload, old.contestant, ", ".join(words), memory=memory)
    first, second = paired(old, units[0]), paired(new, units[1])
    if min(len(first), len(second)) < 3:
        words.insert(0, "cannot tell")
        return Change(old.workload, old.contestant, ", ".join(words), memory=memory)
    low_a, before, high_a = map(math.log, interval(first))
    low_b, after, high_b = map(math.log, interval(second))
    middle = after - before
    # the two runs are independent: their half-widths add as squares
    down = math.hypot(after - low_b, high_a - before)
    up = math.hypot(high_b - after, before - low_a)
    change, low, high = (math.exp(v) for v in (middle, middle - down, middle + up))
    few = min(len(first), len(second)) < 6  # of so few, an interval is not to be trusted
    if few:
        verdict = "cannot tell"
    elif low > 1 + FLOOR:
        verdict = "slower"
    elif high < 1 / (1 + FLOOR):
        verdict = "faster"
    elif low >= 1 / (1 + FLOOR) and high <= 1 + FLOOR:
        verdict = "the same"
    else:
        verdict = "cannot tell"
    words.insert(0, verdict)
    return Change(
        old.workload, old.contestant, ", ".join(words), math.exp(before), math.exp(after),
        change, low, high, memory,
    )  # fmt: skip


def table(changes: list[Change], a: Run, b: Run) -> str:
    """As text, what changed first, with a line for what differs between the machines."""
    order = ("slower", "larger", "faster", "smaller", "only", "cannot", "the same")

    def rank(change: Change) -> int:
        return next((i for i, word in enumerate(order) if word in change.verdict), len(order))

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    rows = [
        (
            c.workload, c.contestant, number(c.before), number(c.after),
            "" if c.change is None else f"{c.change:.3f} ({c.low:.3f} to {c.high:.3f})",
            number(c.memory), c.verdict,
        )
        for c in sorted(changes, key=rank)
    ]  # fmt: skip
    columns = ("workload", "contestant", ">A", ">B", ">B / A (95 %)", ">memory", "verdict")
    lines = [render(columns, rows), "", summary(changes)]
    keys = ("device", "processor", "cores", "versions", "xla_flags", "matmul_precision")
    other = [k for k in keys if a.machine.get(k) != b.machine.get(k)]
    if other:
        lines.append(f"The two are not from the same machine: they differ in {', '.join(other)}.")
    return "\n".join(lines)


def summary(changes: list[Change]) -> str:
    """How many of each verdict, in a sentence."""
    counts: dict[str, int] = {}
    for change in changes:
        for word in change.verdict.split(", "):
            counts[word] = counts.get(word, 0) + 1
    told = ", ".join(f"{n} {word}" for word, n in counts.items()) or "nothing in common"
    return f"{told}. Times are over the unit of the same run; A and B are these ratios."
