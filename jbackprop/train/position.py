"""How far a training run has come."""

from __future__ import annotations

import base64
import dataclasses
from typing import Any


@dataclasses.dataclass
class Position:
    """How far a run has come, as JSON has it.

    Attributes:
        step: steps done, over all epochs.
        index: batches done of the epoch that is under way.
        sums: of that epoch's losses and metrics, over the examples seen in it.
        seen: so many examples.
        lost: so many of that epoch's steps were thrown away.
        lost_before: and of the epochs before.
        in_a_row: how often that happened since it last went well.
        loader: the state of the loader behind the last batch.
    """

    step: int = 0
    index: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    seen: int = 0
    lost: int = 0
    lost_before: int = 0
    in_a_row: int = 0
    loader: Any = None

    def copy(self) -> Position:
        """The same, which does not move."""
        return dataclasses.replace(self, sums=dict(self.sums))

    def to_json(self) -> dict[str, Any]:
        found = dataclasses.asdict(self)
        if isinstance(self.loader, bytes):
            found["loader"] = {"bytes": base64.b64encode(self.loader).decode()}
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Position:
        at = cls(**found)
        if isinstance(at.loader, dict) and set(at.loader) == {"bytes"}:
            at.loader = base64.b64decode(at.loader["bytes"])
        return at

    def next_epoch(self) -> None:
        self.lost_before += self.lost
        self.index, self.sums, self.seen, self.lost, self.loader = 0, {}, 0, 0, None
