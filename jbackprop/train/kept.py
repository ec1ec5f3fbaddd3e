"""What a run keeps of itself in its checkpoints, and how it goes on from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from jbackprop.factored import PyTree
from jbackprop.saved.configuration import configuration
from jbackprop.train.accounting import Privacy
from jbackprop.train.checkpoints import CheckpointError, Checkpoints, Store
from jbackprop.train.checks import Examples
from jbackprop.train.data import Loaded
from jbackprop.train.position import Position
from jbackprop.train.preemption import Preempted
from jbackprop.train.private import Private
from jbackprop.train.run import Run
from jbackprop.train.step import Task
from jbackprop.train.stopping import Keeper


def monitoring(options: Checkpoints, recorded: list[str]) -> Checkpoints:
    """The same, with an entry of the history to tell the best by."""
    usual = "validation_loss" if "validation_loss" in recorded else "loss"
    monitor = options.monitor or usual
    if monitor not in recorded:
        raise ValueError(
            f"Checkpoints: monitor is {monitor!r}, but the history will have {', '.join(recorded)}"
        )
    return dataclasses.replace(options, monitor=monitor)


def configuration_of(
    task: Task,
    data: Examples | Loaded,
    size: int,
    key: Array,
    recorded: list[str],
    private: Private | None,
    privacy: Privacy | None,
) -> dict[str, Any]:
    """What must be the same when a run is resumed, as JSON has it."""
    found: dict[str, Any] = {
        "network": configuration(task.net),
        "loss": configuration(task.loss),
        "rule": configuration(task.rule),
        "optimizer": configuration(task.optimizer),
        "the history": recorded,
        "nonfinite": task.nonfinite,
    }
    if private is not None and privacy is not None:
        found["private"] = repr(private)
        found["noise_multiplier"] = privacy.noise_multiplier  # follows from epsilon and the epochs
    else:  # who knew a private one's key would know the noise
        data_of_key = key if key.dtype == np.uint32 else jax.random.key_data(key)
        found["key"] = hashlib.sha256(np.asarray(data_of_key).tobytes()).hexdigest()[:16]
    if isinstance(data, Examples):
        found["batch_size"] = size
        closed = data.mapped or private is not None  # not read, or nobody's to check a guess by
        found["data"] = [
            f"{leaf.dtype} {leaf.shape}" + ("" if closed else f", CRC {_crc(leaf):08x}")
            for leaf in jax.tree.leaves((data.x, data.y))
        ]
    return found


def check_agreed(about: Mapping[str, Any]) -> None:
    """Raise where other processes train something else: each would wait for the others for ever."""
    if jax.process_count() == 1:
        return
    own = {name: zlib.crc32(json.dumps(value).encode()) for name, value in about.items()}
    all_of_them = multihost_utils.process_allgather(np.array(list(own.values()), np.uint32))
    odd = [name for name, found in zip(own, all_of_them.T, strict=True) if len(set(found)) > 1]
    if odd:
        raise ValueError(
            f"the processes were given different {', '.join(odd)}: all of them must make the same "
            "call (of a loader each has its own part)"
        )


def _crc(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)


class Kept:
    """The checkpoints of a run: what goes into them, and how it comes back."""

    def __init__(self, store: Store, run: Run, keeper: Keeper, history: dict[str, list[float]]):
        self.store, self._run, self._keeper, self._history = store, run, keeper, history

    def save(
        self, epoch: int, values: Mapping[str, float] | None = None, stopped: str = "finished"
    ) -> None:
        """Keep the run as it is, with `epoch` under way, or yet to begin.

        `values` are those of the epoch before, where one has just ended.
        """
        run, keeper = self._run, self._keeper
        trees = {"params": run.params, "state": run.opt_state}
        if keeper.epoch is not None:
            trees["best"] = keeper.params
        record = {
            "epoch": epoch, "at": run.at.to_json(), "history": self._history, "stopped": stopped,
            "best_epoch": keeper.epoch, "best_value": keeper.best,
        }  # fmt: skip
        assert self.store.options.monitor is not None
        value = None if values is None else values[self.store.options.monitor]
        self.store.save(run.at.step, trees, record, value)

    def restore(self, resume: bool, epochs: int) -> tuple[int, str, int | None]:
        """Set the run to the last good checkpoint.

        Returns:
            The epoch to go on with, why training had stopped, and the step; as to begin with where
            there is no checkpoint.
        """
        if not resume:
            if self.store.steps:
                raise CheckpointError(
                    f"{self.store.folder} holds a run up to step {self.store.steps[-1]}: go on "
                    "with resume=True, or begin anew in another folder"
                )
            return 1, "finished", None

        def templates(record: Mapping[str, Any]) -> dict[str, PyTree]:
            trees = {"params": self._run.params, "state": self._run.opt_state}
            return trees if record["best_epoch"] is None else trees | {"best": self._run.params}

        found = self.store.restore(templates)
        if found is None:
            return 1, "finished", None
        trees, record = found
        self._run.go_on(trees["params"], trees["state"], Position.from_json(record["at"]))
        self._keeper.epoch, self._keeper.best = record["best_epoch"], record["best_value"]
        self._keeper.params = trees.get("best", self._keeper.params)
        self._history.update(record["history"])
        begun = record["epoch"] - 1 + bool(self._run.at.index)
        if begun > epochs:
            raise CheckpointError(
                f"the run in {self.store.folder} is in its epoch {begun}: epochs={epochs} is less. "
                "Give as many, or begin anew in another folder"
            )
        return record["epoch"], record["stopped"], self._run.at.step

    def leave(self) -> None:
        """SIGTERM has come, and a checkpoint is begun."""
        self.store.wait()
        raise Preempted(self._run.at.step)

    def close(self) -> None:
        """Raise what went wrong with the last checkpoint; where an error is under way, warn."""
        under_way = sys.exc_info()[0] is not None
        try:
            self.store.close()
        except CheckpointError as error:
            if not under_way:
                raise
            warnings.warn(str(error), stacklevel=2)
