"""The three modes of gradient descent: batch, stochastic and mini-batch.

One network, one start, one learning rate, equally many epochs; only the number of examples that
share a step differs. Every step follows the mean gradient of its batch,

    w := w - alpha/B sum_n dC_n/dw,

so that an epoch over N examples takes one step with B = N, N steps with B = 1, and N/B in between.
By epoch the small batches are far ahead. By step the curves almost continue each other: with equal
alpha a step that has seen 32 examples leads as far as one that has seen all of them, and one that
has seen a single one nearly as far. What large batches have for it is a gradient with less noise,
and so the choice of a larger alpha; here B = N still learns with 1, while B = 1 fails at 0.2.

    python examples/three_modes.py
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import jbackprop as jb

MODES = {"batch": None, "mini-batch": 32, "stochastic": 1}


def digits(n_test: int = 397, seed: int = 0) -> tuple[Any, Any]:
    """1797 real handwritten digits of 8 x 8 pixels, shuffled: training and test data."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order]
    return (x[n_test:], y[n_test:]), (x[:n_test], y[:n_test])


def picture(losses: dict[str, list[float]], steps: dict[str, int], path: Path) -> None:
    fig, (by_epoch, by_step) = jb.diagnose.pictures.figure(columns=2)
    for mode, loss in losses.items():
        epochs = np.arange(len(loss)) + 0.5  # an epoch's mean loss belongs to its middle
        by_epoch.semilogy(epochs, loss, label=mode)
        by_step.loglog(epochs * steps[mode] / len(loss), loss, marker=".", label=mode)
    by_epoch.set(xlabel="epoch", ylabel="mean loss while learning")
    by_step.set(xlabel="step")
    by_epoch.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    epochs: int = 20,
    hidden: int = 32,
    alpha: float = 0.05,
    examples: int | None = None,
    output: str | Path = "output/three_modes.png",
) -> dict[str, Any]:
    """Train in each mode; print a table, draw the losses, and return the table by mode."""
    (x, y), test = digits()
    x, y = x[:examples], y[:examples]
    net = jb.mlp([64, hidden, 10], activation=jb.Tanh())
    loss = jb.SoftmaxCrossEntropy()
    params = net.init(jax.random.key(0))

    print(f"{len(x)} digits, {epochs} epochs, alpha = {alpha}; seconds include compiling")
    print(f"{'':<12}{'B':>6}{'steps':>8}{'loss':>10}{'test accuracy':>16}{'seconds':>10}")
    found: dict[str, Any] = {}
    losses = {}
    for mode, batch_size in MODES.items():
        start = time.perf_counter()
        fit = jb.fit(
            net,
            loss,
            params,
            (x, y),
            optax.sgd(alpha),
            epochs=epochs,
            batch_size=batch_size,
            key=jax.random.key(1),
            progress=False,
        )
        seconds = time.perf_counter() - start
        size = batch_size or len(x)
        steps = epochs * math.ceil(len(x) / size)
        final = jb.evaluate(net, loss, fit.params, (x, y))["loss"]
        accuracy = jb.evaluate(net, loss, fit.params, test, {"accuracy": jb.metrics.accuracy})
        found[mode] = {"steps": steps, "loss": final, "accuracy": accuracy["accuracy"]}
        losses[mode] = fit.history["loss"]
        print(
            f"{mode:<12}{size:6}{steps:8}{final:10.4f}{accuracy['accuracy']:16.1%}{seconds:10.1f}"
        )

    picture(losses, {mode: row["steps"] for mode, row in found.items()}, Path(output))
    print(f"Picture: {output}")
    return found


if __name__ == "__main__":
    main()
