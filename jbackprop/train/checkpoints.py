"""Checkpoints of a training run, through Orbax: written so that a kill at any instant loses none.

Every checkpoint holds arrays, and a record: a text that says what they are, where in the run they
are from, and the fingerprint of each. Orbax writes both into a folder of another name, in the
background, and renames it when all is there. What has been damaged since is known by its
fingerprints, which are those of the arrays on the devices; the one before it is taken then.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jbackprop.checks import check_flags, size_of
from jbackprop.factored import PyTree
from jbackprop.saved.configuration import difference
from jbackprop.train.fingerprints import described, flat, unflat

_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint cannot be written, cannot be read, or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where, and how often, `jbackprop.fit` keeps itself.

    Needs `pip install 'jbackprop[checkpoints]'`. A checkpoint is written at the end of every epoch
    and, if asked, every few steps. It holds the parameters, the states of the optimizer and of the
    rule, the best parameters of early stopping, the history, the position in the data, and what
    the run was configured as.

    Attributes:
        folder: where to; on several hosts one that all of them see. One run has one folder.
        every: steps between checkpoints in the middle of an epoch; None: none there.
        keep: how many of the last ones to keep. The best is kept besides.
        monitor: the entry of the history by which the best is told, among those at the end of an
            epoch; None: "validation_loss", without validation data "loss".
        higher_is_better: whether that should grow, as an accuracy.

    Raises:
        ValueError: `every` or `keep` below 1.
    """

    folder: str | Path
    every: int | None = None
    keep: int = 3
    monitor: str | None = None
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        if self.every is not None:
            size_of(self.every, "Checkpoints: every", otherwise=", or None for the ends of epochs")
        size_of(self.keep, "Checkpoints: keep")
        check_flags(self, "higher_is_better")
        if not isinstance(self.folder, str | Path):
            raise TypeError(f"Checkpoints: folder must be a path, not {self.folder!r}")


class _DamagedError(Exception):
    """What is there is not what was written."""


@contextlib.contextmanager
def _what_orbax_makes_of_rubbish() -> Iterator[None]:
    try:
        yield
    except _DamagedError:
        raise
    except Exception as error:  # of any kind, from any depth
        said = str(error).splitlines()
        raise _DamagedError(said[0] if said else repr(error)) from error


class Store:
    """The folder of a run's checkpoints.

    Args:
        options: of the user.
        configuration: what must be the same when the run goes on, by name, as JSON has it.
    """

    def __init__(self, options: Checkpoints, configuration: Mapping[str, Any]):
        self.options, self._configuration = options, dict(configuration)
        self.folder = Path(options.folder).absolute()
        self._orbax = _orbax()
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is a file: checkpoints need a folder")
        self._manager = self._open()

    def _open(self) -> Any:
        policies = self._orbax.checkpoint_managers.preservation_policy
        monitor = self.options.monitor or "loss"
        sign = 1.0 if self.options.higher_is_better else -1.0
        kept = policies.AnyPreservationPolicy(
            [
                policies.LatestN(operator.index(self.options.keep)),
                policies.BestN(
                    get_metric_fn=lambda found: sign * found.get(monitor, -sign * math.inf), n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )  # fmt: skip
        options = self._orbax.CheckpointManagerOptions(
            preservation_policy=kept, cleanup_tmp_directories=True, create=True
        )
        try:
            return self._orbax.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be made or read: {error}") from error

    @property
    def steps(self) -> list[int]:
        """Of which there are checkpoints."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, trees: Mapping[str, PyTree], record: Mapping[str, Any], value: float | None
    ) -> None:
        """Begin to write a checkpoint; what went wrong with the one before is raised here.

        Args:
            step: so many are done.
            trees: of arrays, by name.
            record: what else there is, as JSON has it.
            value: by which the best one is told; None: this one is not asked.
        """
        if step in self._manager.all_steps():
            return
        arrays, monitor = flat(trees), self.options.monitor or "loss"
        signed = _signed(
            {
                "format": _FORMAT, "step": step, "configuration": self._configuration,
                "arrays": described(arrays), "record": dict(record),
            }
        )  # fmt: skip
        ocp = self._orbax
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.PyTreeSave(arrays or {"none": jnp.zeros(1)}),
                    record=ocp.args.JsonSave(signed),
                ),
                metrics=None if value is None or math.isnan(value) else {monitor: value},
                force=True,
            )
        except Exception as error:
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Until all that was begun is written."""
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """When all is written; what went wrong with the last one is raised here."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> CheckpointError:
        left = ", ".join(map(str, self.steps)) or "no step"
        return CheckpointError(
            f"a checkpoint could not be written into {self.folder}: {error}. Those of {left} are "
            "there: make room, and start again with resume=True"
        )

    def restore(
        self, templates: Callable[[Mapping[str, Any]], Mapping[str, PyTree]]
    ) -> tuple[dict[str, PyTree], dict[str, Any]] | None:
        """The last checkpoint that is whole: trees of arrays in their places, and the record.

        Args:
            templates: from the record to trees like those that were saved, in their places.

        Returns:
            None where there is no checkpoint.

        Raises:
            CheckpointError: all there are are damaged, or they are of another run.
        """
        odd = (p for p in self.folder.iterdir() if p.name.isdigit() and not p.is_dir())
        damaged = {int(p.name): "it is a file, and no folder" for p in odd}  # Orbax passes it over
        for step in reversed(self.steps):
            try:
                found = self._read(step, templates)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                self._put_aside(bad, why, step)
            if damaged:
                self._manager.close()
                self._manager = self._open()
            return found
        if damaged:
            reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({reasons}). Restore the folder "
                "from a copy, or begin anew in another one"
            )
        return None

    def _read(self, step: int, templates: Callable[[Mapping[str, Any]], Any]) -> Any:
        ocp = self._orbax
        with _what_orbax_makes_of_rubbish():
            signed = _opened(self._orbax_reads(step, record=ocp.args.JsonRestore()))
        if signed["format"] > _FORMAT:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.folder} has the format "
                f"{signed['format']}, this jbackprop reads up to {_FORMAT}: upgrade it"
            )
        self._check_configuration(signed["configuration"])
        trees = templates(signed["record"])
        wanted = flat(trees)
        self._check_arrays(signed["arrays"], wanted)
        shapes = jax.tree.map(_shape, wanted)
        arrays: dict[str, Any] = {}
        if shapes:
            restore = ocp.args.PyTreeRestore(
                shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
            )
            with _what_orbax_makes_of_rubbish():
                arrays = self._orbax_reads(step, arrays=restore)
        for path, found in described(arrays).items():
            if found != signed["arrays"][path]:
                raise _DamagedError(f"the values of {path} are not those that were saved")
        return unflat(trees, arrays), signed["record"]

    def _orbax_reads(self, step: int, **item: Any) -> Any:
        (name,) = item
        return self._manager.restore(step, args=self._orbax.args.Composite(**item))[name]

    def _check_configuration(self, theirs: Mapping[str, Any]) -> None:
        for name, mine in self._configuration.items():
            found = difference(theirs.get(name), mine, ("there", "here"), name)
            if found is not None:
                raise CheckpointError(
                    f"{self.folder} has another run: {found}. Go on with the same, or begin anew "
                    "in another folder"
                )

    def _check_arrays(self, theirs: Mapping[str, Any], wanted: Mapping[str, Array]) -> None:
        for path in sorted(theirs.keys() | wanted.keys()):
            mine = wanted.get(path)
            now = None if mine is None else [list(mine.shape), str(mine.dtype)]
            then = theirs[path][:2] if path in theirs else None
            if now != then:
                raise CheckpointError(
                    f"the run in {self.folder} has {path} {_said(then)}, this one {_said(now)}: "
                    "the network or the optimizer is another. Go on with the same, or begin anew "
                    "in another folder"
                )

    def _put_aside(self, step: int, why: str, good: int) -> None:
        warnings.warn(
            f"the checkpoint of step {step} in {self.folder} is damaged ({why}); going on from "
            f"that of step {good}. It is kept as {step}.damaged",
            stacklevel=4,
        )
        if jax.process_index() == 0:
            free = next(
                name
                for i in range(len(list(self.folder.iterdir())) + 1)
                if not (name := self.folder / f"{step}.damaged{i or ''}").exists()
            )
            (self.folder / str(step)).rename(free)


def _shape(leaf: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as one text, with its digest."""
    try:
        text = json.dumps(record)
    except TypeError as error:
        raise CheckpointError(
            f"the state of the loader must be bytes, or what JSON can say: {error}"
        ) from error
    return {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _opened(signed: Mapping[str, Any]) -> dict[str, Any]:
    """The record, if its text is what it was."""
    text = signed["text"]
    if hashlib.sha256(text.encode()).hexdigest() != signed["sha256"]:
        raise _DamagedError("its record is not as it was saved")
    return json.loads(text)


def _said(found: Any) -> str:
    return "not at all" if found is None else f"of shape {tuple(found[0])} and dtype {found[1]}"


@functools.cache
def _orbax() -> Any:
    try:
        import orbax.checkpoint
        import orbax.checkpoint.checkpoint_managers
    except ImportError as error:
        raise ImportError(
            "checkpoints are written by Orbax: pip install 'jbackprop[checkpoints]'"
        ) from error
    return orbax.checkpoint
