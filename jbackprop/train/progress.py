"""How training shows its progress: a bar where someone watches, lines where a log is written."""

from __future__ import annotations

import math
import sys
import time

from tqdm.auto import tqdm


def _someone_watches() -> bool:
    notebook = "ipykernel" in sys.modules
    return notebook or sys.stderr.isatty()


class Progress:
    """Shows the epochs on stderr.

    Args:
        epochs: how many there will be.
        show: True or False; None shows a bar in a terminal or notebook, and at most about twenty
            lines where the output goes to a file.
        done: so many were done before.
    """

    def __init__(self, epochs: int, show: bool | None, done: int = 0):
        watched = _someone_watches()
        self._epochs = epochs
        self._start = time.perf_counter()
        self._every = math.ceil(epochs / 20)
        self._lines = show is not False and not watched
        off = show is False or self._lines
        self._bar = tqdm(total=epochs, initial=done, unit="epoch", disable=off)

    def epoch(self, number: int, values: dict[str, float]) -> None:
        """One more epoch is done."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
        self._bar.update()
        if self._lines and (number % self._every == 0 or number in (1, self._epochs)):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            seconds = time.perf_counter() - self._start
            print(f"epoch {number}/{self._epochs} ({seconds:.1f} s): {shown}", file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
