"""Two real processes: one process's result, whatever happens to them on the way."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK

pytestmark = pytest.mark.newest
HERE = Path(__file__).parent


class Life:
    """A process of tests/in_processes.py, and what it has printed."""

    def __init__(self, folder, process, processes, port, *odd):
        self.out = folder / f"out{process}"
        script = [HERE / "in_processes.py", process, processes, port, folder / "kept", *odd]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, script)], stdout=out, stderr=subprocess.STDOUT,
                env=os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"},
            )  # fmt: skip

    def wait(self, text, seconds=120):
        end = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert time.monotonic() < end, self.out.read_text()[-3000:]
            assert self.process.poll() is None, self.out.read_text()[-3000:]
            time.sleep(0.05)

    def end(self, seconds=120):
        return self.process.wait(seconds), self.out.read_text()

    def found(self):
        code, said = self.end()
        assert code == 0, said[-3000:]
        return json.loads(re.findall(r"^\{.*\}$", said, re.MULTILINE)[-1])


def two(folder, *odd):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [Life(folder, i, 2, port, *odd) for i in range(2)]


def test_processes_that_make_different_calls_are_told(tmp_path):
    for life in two(tmp_path, "odd"):
        code, said = life.end()
        assert code != 0
        assert "the processes were given different key: all of them must make the same call" in said


def test_two_processes_killed_and_terminated_give_the_result_of_one(tmp_path):
    alone = Life(tmp_path, 0, 1, 0).found()

    first, second = two(tmp_path)
    second.wait("epoch 2")
    second.process.kill()
    killed = time.monotonic()
    assert second.end()[0] == -signal.SIGKILL
    code, said = first.end(60)
    assert time.monotonic() - killed < 60
    assert code != 0
    assert re.search("another (task|process) (has )?died|stopped sending heartbeats", said)

    first, second = two(tmp_path)
    first.wait("epoch 4")
    second.process.send_signal(signal.SIGTERM)  # one of them: both stop at the same step
    ends = [life.end() for life in (first, second)]
    assert [code for code, _ in ends] == [75, 75], ends

    ours = [life.found() for life in two(tmp_path)]
    assert ours[0]["arrays"] == ours[1]["arrays"]
    assert ours[0]["arrays"]["from"] >= 18  # of 30
    for kind in ("arrays", "loader", "odd"):
        for name in ("loss", "validation_loss"):
            one, many = (v[kind]["history"][name] for v in (alone, ours[0]))
            np.testing.assert_allclose(many, one, rtol=1e-12)
        one, many = (np.array(v[kind]["params"]) for v in (alone, ours[0]))
        assert np.linalg.norm(many - one) < 1e-12 * np.linalg.norm(one)
