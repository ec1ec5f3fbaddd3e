"""Regression, where the delta rule is easiest to derive.

Two inputs, a layer of sigmoid units, one linear output y_hat, and the cost C = 1/2 (y_hat - y)^2.
The output is its own net input, so that its delta is the error in prediction:

    delta    = dC/dy_hat = y_hat - y

A hidden unit j reaches the cost through the output alone. With a_j = sigmoid(z_j), whose slope is
a_j (1 - a_j), the chain rule gives

    delta_j  = dC/dz_j = dC/dy_hat * dy_hat/da_j * da_j/dz_j = delta w_j a_j (1 - a_j)

and every weight's gradient is activation times delta: a_j delta for w_j, x_i delta_j for w_ij.

First both formulas are compared with the deltas that `jb.backprop` shows. Then the network learns
two data sets, beside linear least squares: a real one (diabetes: how far the disease has progressed
after a year, from body mass index and blood pressure), so nearly linear that a plane does as well;
and a saddle, y = x_1 x_2 and noise, of which no plane knows anything.

    python examples/regression.py
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from sklearn.datasets import load_diabetes

import jbackprop as jb


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    data = load_diabetes()
    x = data.data[:, [data.feature_names.index("bmi"), data.feature_names.index("bp")]]
    return x, data.target[:, None]


def saddle(n: int = 442) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (n, 2))
    return x, x[:, :1] * x[:, 1:] + 0.05 * rng.normal(size=(n, 1))


def standardised(v: np.ndarray) -> np.ndarray:
    return ((v - v.mean(axis=0)) / v.std(axis=0)).astype("float32")


def split(x: np.ndarray, y: np.ndarray, n_test: int) -> tuple[Any, Any]:
    """Shuffled and standardised: training data and test data."""
    order = np.random.default_rng(0).permutation(len(x))
    x, y = standardised(x)[order], standardised(y)[order]
    return (x[n_test:], y[n_test:]), (x[:n_test], y[:n_test])


def rms(error: Any) -> float:
    """Root mean square; of a standardised target's mean it is 1."""
    return float(np.sqrt(np.mean(np.square(error))))


def least_squares(x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """The best plane through the training data, at x_test."""
    ones, ones_test = np.ones((len(x), 1)), np.ones((len(x_test), 1))
    coefficients, *_ = np.linalg.lstsq(np.hstack([x, ones]), y, rcond=None)
    return np.hstack([x_test, ones_test]) @ coefficients


def compare_deltas(net: jb.Sequential, params: Any, x: Any, y: Any) -> tuple[float, float]:
    """The largest differences between the formulas above and the deltas of `jb.backprop`."""
    bp = jb.backprop(net, jb.SquaredError(), params, x, y)
    hidden, output = jb.deltas(bp).values()

    error = bp.outputs - y
    _, a, _ = jb.activations(net, params, x).values()
    w = params[2]["w"][:, 0]
    by_formula = error * w * a * (1 - a)

    print("The first three examples: the delta of the output is the error in prediction.")
    print(f"  {'y_hat':>9}{'y':>9}{'y_hat - y':>12}{'delta':>12}")
    for n in range(3):
        y_hat, target = bp.outputs[n, 0], y[n, 0]
        print(f"  {y_hat:9.4f}{target:9.4f}{error[n, 0]:12.6f}{output[n, 0]:12.6f}")
    at_output = float(np.max(np.abs(output - error)))
    at_hidden = float(np.max(np.abs(hidden - by_formula)))
    print(f"Largest difference, all {len(x)} examples:")
    print(f"  output  delta   = y_hat - y               {at_output:.1e}")
    print(f"  hidden  delta_j = delta w_j a_j (1 - a_j) {at_hidden:.1e}\n")
    return at_output, at_hidden


def main(hidden: int = 12, epochs: int = 300, n_test: int = 142, seed: int = 0) -> dict[str, Any]:
    """Compare the deltas with their formulas, then fit both data sets; return the figures."""
    net = jb.mlp([2, hidden, 1], activation=jb.Sigmoid())
    loss = jb.SquaredError()
    params = net.init(jax.random.key(seed))
    data = {"diabetes": split(*diabetes(), n_test), "saddle": split(*saddle(), n_test)}

    at_output, at_hidden = compare_deltas(net, params, *data["diabetes"][0])
    found: dict[str, Any] = {"output_delta": at_output, "hidden_delta": at_hidden}

    print("Root mean square error on test data, in standard deviations of the target")
    print(f"  {'':<12}{'before':>10}{'after':>10}{'least squares':>16}")
    for name, ((x, y), (x_test, y_test)) in data.items():
        fit = jb.fit(
            net,
            loss,
            params,
            (x, y),
            optax.adam(0.01),
            epochs=epochs,
            batch_size=32,
            key=jax.random.key(seed),
            progress=False,
        )
        before = rms(jb.predict(net, loss, params, x_test) - y_test)
        after = rms(jb.predict(net, loss, fit.params, x_test) - y_test)
        plane = rms(least_squares(x, y, x_test) - y_test)
        print(f"  {name:<12}{before:10.3f}{after:10.3f}{plane:16.3f}")
        found[name] = {"before": before, "after": after, "least_squares": plane}
    return found


if __name__ == "__main__":
    main()
