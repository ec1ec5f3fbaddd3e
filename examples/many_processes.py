"""Training in several processes, each with devices of its own and its own share of every batch.

On one machine, two processes that talk over the loopback interface:

    python examples/many_processes.py

On a cluster, the same script once in every process, with the address of process 0:

    python examples/many_processes.py --coordinator 10.0.0.1:1234 --processes 16 --process 3

(On a cluster that JAX knows, such as one with Slurm or on TPUs, `jax.distributed.initialize()`
finds all three by itself.)

Every process makes the same calls. The digits lie in memory-mapped files, which all of them see,
and each reads the rows of its own devices; their order depends on the key alone, so that any number
of processes learns the same. Parameters and Adam's moments are split over all devices (FSDP).
Checkpoints are written every few steps: kill a process, and the others end with an error within
half a minute; start all again, and training goes on where it was.
"""

import argparse
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import jbackprop as jb


def data(folder):
    """Memory maps of the training digits and the others, written by whoever comes first."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    arrays = {
        "x": (digits.data[order] / 16).astype("float32"), "y": digits.target[order].astype("int32"),
    }  # fmt: skip
    maps = []
    for name, values in arrays.items():
        path = folder / f"{name}.npy"
        if not path.exists():
            own = folder / f"{name}.{os.getpid()}.npy"
            np.save(own, values)
            own.replace(path)
        maps.append(np.load(path, mmap_mode="r"))
    return tuple(m[:1440] for m in maps), tuple(m[1440:] for m in maps)


def train(folder, epochs):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    net, loss = jb.mlp([64, 128, 64, 10], jb.Gelu()), jb.SoftmaxCrossEntropy()
    first = jax.process_index() == 0
    training, test = data(folder)

    def tell(epoch):
        if first:
            loss, right = (
                epoch.history[f"validation_{name}"][-1] for name in ("loss", "accuracy")
            )  # fmt: skip
            print(f"epoch {epoch.number}: test loss {loss:.4f}, {right:.1%} right", flush=True)

    fit = jb.fit(
        net, loss, net.init(jax.random.key(0)), training, optax.adam(2e-3), epochs=epochs,
        batch_size=96, key=jax.random.key(1), validation=test,
        metrics={"accuracy": jb.metrics.accuracy}, callbacks=[tell], progress=False,
        mesh=mesh, sharding=jb.sharding.fsdp("data"),
        checkpoints=jb.Checkpoints(folder / "checkpoints", every=5), resume=True,
    )  # fmt: skip
    w = fit.params[0]["w"]
    if first:
        begun = (
            "from the beginning" if fit.resumed_from is None else f"from step {fit.resumed_from}"
        )
        print(
            f"{jax.process_count()} processes, {jax.device_count()} devices, {begun}; of the first "
            f"weights {w.shape} each device has {w.addressable_shards[0].data.shape}"
        )


def launch(args):
    """Two processes of this script, on a free port; if one fails, the other ends by itself."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    own = ["--folder", str(args.folder), "--epochs", str(args.epochs), "--coordinator", address]
    lives = [
        subprocess.Popen([sys.executable, __file__, *own, "--processes", "2", "--process", str(i)])
        for i in range(2)
    ]
    return max(abs(life.wait()) for life in lives)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("output/many_processes"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--coordinator", help="address:port of process 0; none: two processes here")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.coordinator is None:
        sys.exit(launch(args))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=20
    )  # fmt: skip
    train(args.folder, args.epochs)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
