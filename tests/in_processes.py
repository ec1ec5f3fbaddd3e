"""One of several processes that train together, or the only one; four devices in all.

    python tests/in_processes.py PROCESS PROCESSES PORT FOLDER [odd]

Prints a line after each epoch, and in the end, as JSON, what has been learnt.
"""

import json
import os
import sys
import time
from pathlib import Path

PROCESS, PROCESSES, PORT = map(int, sys.argv[1:4])
FOLDER = Path(sys.argv[4])
os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={4 // PROCESSES}"

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
if PROCESSES > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"localhost:{PORT}", PROCESSES, PROCESS, heartbeat_timeout_seconds=10
    )

import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

import jbackprop as jb  # noqa: E402

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(90, 4)), RNG.integers(0, 3, 90)
NET, LOSS = jb.mlp([4, 8, 3]), jb.SoftmaxCrossEntropy()


def own_part(epoch):
    """A loader: every process has its part of each batch."""
    order = np.random.default_rng(epoch).permutation(80)
    for start in range(0, 80, 16):
        mine = np.array_split(order[start : start + 16], PROCESSES)[PROCESS]
        yield X[mine], Y[mine]


def noisy_and_free():
    """Its state has a key, and is made from what the parameters are."""
    noise = optax.add_noise(0.01, 0.55, key=jax.random.key(3))
    return optax.chain(noise, optax.contrib.schedule_free_sgd(0.1))


def fit(data, optimizer=None, **options):
    found = jb.fit(
        NET, LOSS, NET.init(jax.random.key(0)), data, optimizer or optax.adam(0.01),
        epochs=5 if optimizer is None else 1,
        key=jax.random.key(PROCESS if "odd" in sys.argv else 1), validation=(X[:30], Y[:30]), progress=False,
        mesh=jax.make_mesh((4,), ("data",)), sharding=jb.sharding.fsdp(smallest=1), **options,
    )  # fmt: skip
    whole = found.params
    if PROCESSES > 1:
        whole = multihost_utils.process_allgather(whole, tiled=True)
    weights = np.concatenate([np.ravel(p) for p in jax.tree.leaves(whole)]).tolist()
    return {"history": found.history, "params": weights, "from": found.resumed_from}


def tell(epoch):
    print(f"epoch {epoch.number}", flush=True)
    if PROCESSES > 1 and epoch.number < 5:
        time.sleep(0.5)  # for whoever wants to kill it


def main():
    kept = {"checkpoints": jb.Checkpoints(FOLDER, every=4), "resume": True} if PROCESSES > 1 else {}
    arrays = fit((X, Y), batch_size=16, callbacks=[tell], **kept)
    odd = fit((X, Y), noisy_and_free(), batch_size=16, callbacks=[lambda epoch: None])
    print(json.dumps({"arrays": arrays, "loader": fit(own_part), "odd": odd}), flush=True)


if __name__ == "__main__":
    main()
