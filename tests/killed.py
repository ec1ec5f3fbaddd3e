"""A training run, killed at random instants and resumed each time, beside one that never was.

    python tests/killed.py FOLDER KILLS

Everything is imported once; each life of the run is a fork, which starts JAX anew. A life is killed
(SIGKILL) a random moment after a random one of its batches was read, so that it is hit between
steps and in the middle of writing a checkpoint however busy the machine is; some after a random
time from their birth. When a life comes to the end of the
run, what it has learnt must be, bit by bit, what the run that was never killed has, and the next
run begins in another folder. Prints what happened as JSON.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint  # noqa: F401, before the forks

import jbackprop as jb

NET = jb.Sequential(jb.Dense(4, 16), jb.Tanh(), jb.Dropout(0.3), jb.Dense(16, 3))
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(90, 4)).astype("float32"), RNG.integers(0, 3, 90)


def life(folder, read=lambda: None):
    """The run, from its beginning or from where it was killed; a digest of all that comes of it."""
    loss = jb.SoftmaxCrossEntropy()
    kept = {}
    if folder is not None:
        log = jb.CSVLogger(folder.with_suffix(".csv"))
        kept = {"checkpoints": jb.Checkpoints(folder, every=3, keep=2), "callbacks": [log]}
    fit = jb.fit(
        NET, loss, NET.init(jax.random.key(0)), batches(read), optax.adam(0.01), epochs=5,
        key=jax.random.key(1), validation=(X[:20], Y[:20]), progress=False,
        early_stopping=jb.EarlyStopping(patience=99), resume=folder is not None, **kept,
    )  # fmt: skip
    leaves = jax.tree.leaves((fit.params, fit.opt_state))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    return {"digest": digest, "history": fit.history, "best": fit.best_epoch}


def batches(read):
    """A loader of 9 batches an epoch, in an order of its own for each."""

    def epoch(number):
        order = np.random.default_rng(number).permutation(90)
        for start in range(0, 90, 10):
            read()
            yield X[order[start : start + 10]], Y[order[start : start + 10]]

    return epoch


def forked(work):
    """Run `work` in a fork; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def main(folder, kills):
    warnings.simplefilter("ignore")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    rng = random.Random(0)
    truth = folder / "truth.json"
    _, status = os.waitpid(forked(lambda: truth.write_text(json.dumps(life(None)))), 0)
    assert status == 0
    expected = json.loads(truth.read_text())
    done, resumed, finished, mid_write = 0, 0, 0, 0
    run = 0
    while done < kills or finished == 0:
        here, answer = folder / f"run{run}", folder / f"answer{run}.json"
        ready, begun = os.pipe()

        def work(here=here, answer=answer, begun=begun):
            found = life(here, lambda: os.write(begun, b"x"))
            answer.write_text(json.dumps(found))

        had = any(p.name.isdigit() for p in here.iterdir()) if here.exists() else False
        child = forked(work)
        os.close(begun)
        if done < kills:
            if rng.random() < 0.1:
                time.sleep(rng.uniform(0, 0.6))
            else:
                for _ in range(rng.randrange(6, 20)):  # five are read ahead; at the end: nothing
                    os.read(ready, 1)
                time.sleep(rng.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        os.close(ready)
        _, status = os.waitpid(child, 0)
        resumed += had
        if os.WIFSIGNALED(status):
            done += 1
            mid_write += any("tmp" in p.name for p in here.iterdir()) if here.exists() else 0
            continue
        assert os.WEXITSTATUS(status) == 0, f"life {done} of run {run} failed"
        found = json.loads(answer.read_text())
        assert found == expected, f"run {run} differs:\n{found}\n{expected}"
        finished += 1
        run += 1
    print(
        json.dumps(
            {"kills": done, "resumed": resumed, "finished": finished, "mid_write": mid_write}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
