"""Peers that cannot share a process with JAX: each script of `peers/` is asked over a pipe.

The arrays of the problem go there in a file. The script answers with a line of JSON for each of its
contestants, then waits for `name<TAB>calls` and answers with the seconds that these took, so that
it takes its turn in the rounds like everybody else. While it waits it uses no processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbackprop.bench.declare import Outside, Workload
from jbackprop.bench.machine import cores, room

_FOLDER = Path(__file__).parent / "peers"


class Process:
    """A running script, a context manager.

    Attributes:
        entered: for each contestant the fields of a `Row`; with a note if it cannot run.
    """

    def __init__(self, python: str, outside: Outside, load: Workload, truth: Any, inputs: Any):
        self._outside = outside
        self.entered: list[dict[str, Any]] = []
        self._folder = tempfile.TemporaryDirectory()
        file = Path(self._folder.name) / "problem.npz"
        params, *data = inputs
        value, rest = ((), ()) if truth is None else truth
        named = {"params": params, "wanted": rest, "value": value}
        arrays = dict(zip(("x", "y"), map(np.asarray, data), strict=False))
        for name, tree in named.items():
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                key = jax.tree_util.keystr(path, simple=True, separator="/")
                arrays[f"{name}/{key}"] = np.asarray(leaf)
        np.savez(file, **arrays)  # type: ignore[arg-type]
        command = [
            python, _FOLDER / outside.script, file, outside.task, load.question,
            f"--threads={cores()}", f"--gib={room() / 2**30}",
        ]  # fmt: skip
        # threads that wait by spinning, as is the default, suffer most where others compute too
        self._said = (Path(self._folder.name) / "stderr").open("w+")
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._said, text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"},
        )  # fmt: skip

    def __enter__(self) -> Process:
        while (line := self._line()) and line != "ready":
            if line.startswith("{"):  # what else a peer prints is not for us
                self.entered.append(json.loads(line))
        if not line:
            self._process.wait()
            self._said.seek(0)
            said = self._said.read().splitlines() or ["ended without a word"]
            name = self._outside.script.removesuffix(".py")
            note = said[-1].removeprefix("ModuleNotFoundError: ")[:60]
            self.entered.append({"contestant": name, "kind": name, "note": note})
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
        self._folder.cleanup()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def runner(self, contestant: str) -> Callable[[int], float]:
        """A function from a number of calls to the seconds that they took."""

        def run(calls: int) -> float:
            assert self._process.stdin is not None
            self._process.stdin.write(f"{contestant}\t{calls}\n")
            self._process.stdin.flush()
            return float(self._line())

        return run
