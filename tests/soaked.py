"""A long training run in miniature: prints, as JSON, what it costs a quarter at a time.

Memory is that at the end of each quarter; the time of a step has its share of the checkpoints.

    python tests/soaked.py FOLDER STEPS [bare]

With `bare` there are no checkpoints: Orbax keeps some memory with each.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

import jbackprop as jb
from jbackprop.train.step import step

EPOCHS = 20  # and as many checkpoints


def resident():
    """Bytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main(folder, steps, bare=False):
    rng = np.random.default_rng(0)
    n = 4 * steps // EPOCHS
    x, y = rng.normal(size=(n, 4)).astype("float32"), rng.integers(0, 2, n)
    net = jb.Sequential(jb.Dense(4, 8), jb.Tanh(), jb.Dropout(0.1), jb.Dense(8, 2))
    seen, traces = [(time.perf_counter(), 0)], step._cache_size()
    fit = jb.fit(
        net, jb.SoftmaxCrossEntropy(), net.init(jax.random.key(0)), (x, y), optax.adam(1e-3),
        epochs=EPOCHS, batch_size=4, key=jax.random.key(1), progress=False,
        checkpoints=None if bare else jb.Checkpoints(folder / "kept", keep=EPOCHS),
        callbacks=[
            jb.CSVLogger(folder / "log.csv"),
            lambda epoch: seen.append((time.perf_counter(), resident())),
        ],
    )  # fmt: skip
    took = 1e6 * np.diff([at for at, _ in seen]) / (steps // EPOCHS)
    print(
        json.dumps(
            {
                "steps": steps,
                "checkpoints": 0 if bare else len(list((folder / "kept").iterdir())),
                "compiled": step._cache_size() - traces,
                "memory_mb": [round(seen[q * EPOCHS // 4][1] / 2**20, 1) for q in range(1, 5)],
                "microseconds_a_step": [
                    round(statistics.median(quarter), 1) for quarter in np.split(took, 4)
                ],
                "loss": fit.history["loss"][-1],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "bare" in sys.argv)
