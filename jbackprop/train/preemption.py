"""SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(SystemExit):
    """SIGTERM has come: the step is finished and a checkpoint written; leaves with the status 75.

    75 is what `sysexits.h` calls a temporary failure: start the same again with resume=True.

    Attributes:
        step: up to which the run has come.
    """

    def __init__(self, step: int):
        super().__init__(75)
        self.step = step


class Watch:
    """Notes that SIGTERM has come, while it is entered.

    With several processes JAX's own service sees it, and has all of them stop at the same step.
    In a thread that is not the main one there are no signals to see.

    Args:
        active: False: SIGTERM does what it did before.
    """

    def __init__(self, active: bool):
        self._several = active and jax.process_count() > 1
        alone = active and not self._several
        self._alone = alone and threading.current_thread() is threading.main_thread()
        self._came = False
        self._before: Any = None

    def came(self, step: int) -> bool:
        """Whether to stop after this step; asked once a step by every process."""
        if self._several:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._came

    def __enter__(self) -> Watch:
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._alone:
            before = signal.SIG_DFL if self._before is None else self._before  # None: not Python's
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
