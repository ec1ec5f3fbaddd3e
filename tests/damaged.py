"""Checkpoints that are damaged in every way: a resumed run is right, or says why it is not.

    python tests/damaged.py FOLDER

Orbax tells standard error much of what it meets, so that this is a script of its own. Prints how
often which end was met, as JSON; an end that is none of them is an AssertionError.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jbackprop as jb

NET, LOSS, ADAM = jb.mlp([4, 8, 3]), jb.SoftmaxCrossEntropy(), optax.adam(0.01)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(80, 4)).astype("float32"), RNG.integers(0, 3, 80)


def fit(folder=None, epochs=3, **options):
    kept = {} if folder is None else {"checkpoints": jb.Checkpoints(folder, every=4)}
    return jb.fit(
        NET, LOSS, NET.init(jax.random.key(0)), (X, Y), ADAM, epochs=epochs, batch_size=16,
        key=jax.random.key(1), progress=False, **(kept | options),
    )  # fmt: skip


def same(one, two):
    leaves = [jax.tree.leaves((r.params, r.opt_state)) for r in (one, two)]
    return one.history == two.history and all(map(np.array_equal, *leaves))


def damages(step):
    """Names, and functions of a folder that damage its newest checkpoint."""
    rng = random.Random(0)
    for file in sorted(p for p in step.rglob("*") if p.is_file()):
        name, size = file.relative_to(step.parent), file.stat().st_size

        def cut(folder, name=name, left=0):
            os.truncate(folder / name, left)

        bit = rng.randrange(8 * size) if size else 0

        def flip(folder, name=name, bit=bit):
            data = bytearray((folder / name).read_bytes())
            data[bit // 8] ^= 1 << (bit % 8)
            (folder / name).write_bytes(data)

        yield f"{name} empty", cut
        if size:
            yield f"{name} cut", lambda folder, cut=cut, size=size: cut(folder, left=size - 1)
            yield f"{name} flipped", flip
        if size > 3:
            yield f"{name} halved", lambda folder, cut=cut, size=size: cut(folder, left=size // 2)
        yield f"{name} gone", lambda folder, name=name: (folder / name).unlink()

    def empty(folder):
        shutil.rmtree(folder / step.name)
        (folder / step.name).mkdir()

    def a_file(folder):
        shutil.rmtree(folder / step.name)
        (folder / step.name).write_text("mine")

    def stray(folder):
        (folder / "README").write_text("mine")
        (folder / "plots").mkdir()

    def other_record(folder):
        """Still JSON: it was a little better than it was."""
        file = folder / step.name / "record" / "metadata"
        text = file.read_text()
        at = text.index("loss", text.rindex("history"))
        digit = next(i for i in range(at, len(text)) if text[i] == ".") + 3
        file.write_text(text[:digit] + str(9 - int(text[digit])) + text[digit + 1 :])

    yield "an empty step", empty
    yield "a file for a step", a_file
    yield "other record", other_record
    yield "stray files", stray
    yield "other values", lambda folder: other_values(folder / step.name)


def other_values(step):
    """One entry of the arrays is another, in a checkpoint that Orbax finds whole."""
    handler = ocp.PyTreeCheckpointer()
    arrays = handler.restore(step / "arrays")
    arrays["['params'][0]['w']"] = np.array(arrays["['params'][0]['w']"])
    arrays["['params'][0]['w']"][1, 2] += 1e-6
    handler.save(step / "arrays", arrays, force=True)


def main(root):
    never, whole = fit(), root / "whole"
    fit(whole, epochs=2)
    newest = whole / str(max(int(p.name) for p in whole.iterdir()))
    ends = Counter()
    for name, damage in damages(newest):
        folder = root / "damaged"
        shutil.copytree(whole, folder)
        damage(folder)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found = fit(folder, resume=True)
        said = [
            str(w.message) for w in seen if "jbackprop" in w.filename or "damaged" in str(w.message)
        ]
        assert same(found, never), f"{name}: other numbers, from step {found.resumed_from}"
        if found.resumed_from == int(newest.name):
            ends["whole enough"] += 1
        else:
            assert any(f"step {newest.name} in {folder} is damaged" in text for text in said), name
            assert (folder / f"{newest.name}.damaged").exists(), name
            ends["the one before"] += 1
        noticed = found.resumed_from != int(newest.name)
        assert noticed or not name.startswith("other"), f"{name}: not noticed"
        shutil.rmtree(folder)

    for step in list(whole.iterdir()):
        shutil.rmtree(step)
        step.mkdir()
    with pytest.raises(jb.CheckpointError, match="every checkpoint in"):
        fit(whole, resume=True)

    full, soft = root / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(epoch):
        if epoch.number == 2:  # from now on as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, soft[1]))

    with pytest.raises(jb.CheckpointError) as caught:
        fit(full, callbacks=[fill])
    resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    there = sorted(int(p.name) for p in full.iterdir() if p.name.isdigit())
    assert 5 in there, "what was written before is"
    said = str(caught.value)
    assert f"could not be written into {full}: " in said
    remedy = "are there: make room, and start again with resume=True"
    assert said.endswith(f"Those of {', '.join(map(str, there))} {remedy}"), said
    found = fit(full, resume=True)
    assert same(found, never)
    assert found.resumed_from == there[-1]
    print(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
