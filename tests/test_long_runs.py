"""What long runs must stand: kills, damage, full disks, other meshes, and their own length.

Each is a script beside this file, in a process of its own.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK

pytestmark = pytest.mark.newest
HERE = Path(__file__).parent


def started(script, *args, devices=1):
    flags = f"{QUICK} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, HERE / script, *map(str, args)], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def run(script, *args, devices=1):
    with started(script, *args, devices=devices) as process:
        out, err = process.communicate(timeout=560)
    assert process.returncode == 0, out[-3000:] + err[-6000:]
    return json.loads(out.splitlines()[-1])


def test_a_run_killed_fifty_times_ends_as_the_one_that_never_was(tmp_path):
    found = run("killed.py", tmp_path, 50)  # it asserts that the bits are the same
    assert found["kills"] == 50
    assert found["finished"] >= 1
    assert found["resumed"] >= 40
    assert found["mid_write"] >= 5


def test_a_process_that_is_told_to_end_leaves_with_75_and_goes_on(tmp_path):
    with started("terminated.py", tmp_path / "run") as process:
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=560)
    assert (process.returncode, out) == (75, ""), err[-6000:]
    kept = [int(p.name) for p in (tmp_path / "run").iterdir()]
    assert 0 < max(kept) < 20
    assert run("terminated.py", tmp_path / "run") == run("terminated.py")


def test_damaged_checkpoints_and_a_full_disk(tmp_path):
    found = run("damaged.py", tmp_path)  # it asserts that no numbers are others
    assert found["the one before"] >= 15
    assert found["whole enough"] >= 15


@pytest.mark.parametrize(
    ("parts", "cases"),
    [
        (["plain"], {"8, fsdp", "2x4, tensor", "2x4, both", "8x1, both", "1x8, tensor"}),
        (["others"], {"batch norm", "layers that draw, skipping", "whole batches", "a rule",
                      "private", "transformer", "K-FAC"}),
        (["loaders", "resumed", "within", "refused", "evaluated"],
         {"a loader", "resumed elsewhere", "within a mesh", "folded", "refused",
          "evaluated where they are", "evaluate"}),
    ],
)  # fmt: skip
def test_eight_devices_learn_what_one_learns(parts, cases):
    found = run("trained_on_eight.py", *parts, devices=8)
    assert cases <= set(found)
    assert max(found.values()) < 1e-12, found


def test_memory_stays_and_one_program_is_compiled(tmp_path):
    """benchmarks/results/soak.json has the same of 100,000 steps."""
    found = run("soaked.py", tmp_path, 20_000)
    assert found["compiled"] == 1
    assert found["checkpoints"] == 20
    first, *_, last = found["memory_mb"]
    assert last - first < 2, found
