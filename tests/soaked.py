"""A long training run in miniature: prints, as JSON, what it costs a quarter at a time.

Beyond 10,000 steps no checkpoints are written: Orbax keeps some memory with each.

python tests/soaked.py FOLDER STEPS
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
from jbackprop.train import run


def resident():
    """Bytes of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main(folder, steps):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 4)).astype("float32"), rng.integers(0, 2, 400)
    net = jb.Sequential(jb.Dense(4, 8), jb.Tanh(), jb.Dropout(0.1), jb.Dense(8, 2))
    epochs, seen, traces = steps // 100, [], run._step._cache_size()
    fit = jb.fit(
        net, jb.SoftmaxCrossEntropy(), net.init(jax.random.key(0)), (x, y), optax.adam(1e-3),
        epochs=epochs, batch_size=4, key=jax.random.key(1), progress=False,
        checkpoints=jb.Checkpoints(folder / "kept", every=10**9) if epochs <= 100 else None,
        callbacks=[lambda epoch: seen.append((time.perf_counter(), resident()))],
    )  # fmt: skip
    quarters = [seen[i * epochs // 4 : (i + 1) * epochs // 4] for i in range(4)]
    print(
        json.dumps(
            {
                "steps": steps,
                "compiled": run._step._cache_size() - traces,
                "memory_mb": [
                    round(statistics.median(m for _, m in q) / 2**20, 1) for q in quarters
                ],
                "microseconds_a_step": [
                    round(1e4 * statistics.median(np.diff([t for t, _ in q])), 1) for q in quarters
                ],
                "loss": fit.history["loss"][-1],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
