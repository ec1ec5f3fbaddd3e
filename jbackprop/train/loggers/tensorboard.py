"""Logs for TensorBoard."""

from __future__ import annotations

import os
import socket
import struct
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jbackprop.train.loggers.base import Logger, Row


class TensorBoardLogger(Logger):
    """Log training for TensorBoard, as a callback of `fit`: scalars, by epoch.

    Needs tensorboardX, `pip install 'jbackprop[tensorboard]'`. Each run of the process writes an
    event file of its own; one that replaces epochs tells TensorBoard to forget the earlier ones.
    Files of other writers in the folder are left alone. Values are in float32, as in every event
    file. The time of an epoch that was filled in later is when it was filled in.

        result = jb.fit(..., callbacks=[jb.TensorBoardLogger("runs/first")])

    and then `tensorboard --logdir runs`. For what happens to a log that is there, and when writing
    fails: `jbackprop.train.loggers`.

    Args:
        folder: of the run; made where there is none, in a folder that exists.
        overwrite: whether to replace the log of another run. TensorBoard forgets it; its files
            stay.

    Raises:
        ImportError: tensorboardX is not installed.
        FileExistsError: at the first epoch: the folder has the log of another run.
        OSError: the folder cannot be made, read or written.
        ValueError: a metric is called epoch or time.
    """

    def __init__(self, folder: str | os.PathLike[str], *, overwrite: bool = False):
        self._event, self._open = _tensorboard()
        if Path(folder).exists() and not Path(folder).is_dir():
            raise NotADirectoryError(f"{folder} is a file: TensorBoard needs a folder")
        super().__init__(folder, overwrite=overwrite)
        self._close: Any = lambda: None

    def _read(self) -> list[Row]:
        rows: dict[int, Row] = {}
        for path in sorted(self.path.glob("events.out.tfevents.*.jbackprop")):
            for event in map(self._event.FromString, _records(path.read_bytes())):
                if event.HasField("session_log"):
                    rows = {epoch: row for epoch, row in rows.items() if epoch < event.step}
                elif event.HasField("summary"):
                    values = {value.tag: value.simple_value for value in event.summary.value}
                    rows[event.step] = Row(event.step, None, values)
        return [rows[epoch] for epoch in sorted(rows)]

    def _write(self, rows: Sequence[Row], kept: Sequence[Row] | None) -> None:
        if kept is not None:
            self._begin(rows[0].epoch)
        for row in rows:
            event = self._event(step=row.epoch, wall_time=time.time())
            for name, value in row.values.items():
                event.summary.value.add(tag=name, simple_value=value)
            self._writer.write(event.SerializeToString())
        self._writer.flush()

    def _begin(self, first: int) -> None:
        """A new file; what is in others from the first epoch on, TensorBoard is to forget."""
        self._close()
        stale = any(row.epoch >= first for row in self._read())
        self.path.mkdir(exist_ok=True)
        now = time.time_ns()  # TensorBoard reads by order of names, seconds first
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}.jbackprop"
        self._file = self.path / name
        self._writer = self._open(str(self._file))
        self._close = weakref.finalize(self, self._writer.close)
        head = self._event(wall_time=time.time(), file_version="brain.Event:2")
        self._writer.write(head.SerializeToString())
        if stale:
            forget = self._event(step=first, wall_time=time.time())
            forget.session_log.status = forget.session_log.START
            self._writer.write(forget.SerializeToString())


def _tensorboard() -> tuple[Any, Any]:
    """What an event is, and what writes records.

    `SummaryWriter` writes from a thread: its flush does not wait for what is on the way there, and
    after an error of the disk it waits for ever.
    """
    try:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import RecordWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoardLogger writes with tensorboardX: pip install 'jbackprop[tensorboard]'"
        ) from error
    return Event, RecordWriter


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of a TFRecord file: length (8 bytes), its check (4), data, check (4)."""
    at = 0
    while len(content) >= at + 12:
        (n,) = struct.unpack_from("<Q", content, at)
        if len(content) < at + 16 + n:
            return
        yield content[at + 12 : at + 12 + n]
        at += 16 + n
