"""scikit-learn's MLPClassifier for an epoch: `python scikit_learn.py PROBLEM.npz TASK QUESTION`.

The task says the activation, the learning rate, the momentum and the batch: "tanh 0.1 0.9 32". The
examples come in order, as to everybody.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import sklearn.neural_network
from serve import Answer, below, error_of, serve, told


def epoch(arrays: dict[str, Any], task: str) -> Answer:
    """One epoch from the parameters of the problem, by `fit` with a warm start."""
    activation, rate, momentum, batch = task.split()
    params = below(arrays, "params/")
    layers = sorted({int(k.split("/")[0]) for k in params})
    w, b = ([params[f"{l}/{name}"] for l in layers] for name in "wb")
    x, y = arrays["x"], arrays["y"]
    net: Any = sklearn.neural_network.MLPClassifier(
        tuple(len(each) for each in b[:-1]), activation=activation, solver="sgd", alpha=0.0,
        batch_size=int(batch), learning_rate_init=float(rate), momentum=float(momentum),
        nesterovs_momentum=False, max_iter=1, shuffle=False, warm_start=True,
    )  # fmt: skip
    net.fit(x, y)  # shapes and classes; the parameters are set below

    def answer() -> Any:
        net.coefs_, net.intercepts_ = [a.copy() for a in w], [a.copy() for a in b]
        net.fit(x, y)
        return [a for pair in zip(net.intercepts_, net.coefs_, strict=True) for a in pair]

    return answer


def main() -> None:
    """Serve."""
    warnings.simplefilter("ignore")
    arrays, options = told()
    wanted = below(arrays, "wanted/")
    named = [wanted[k] for k in sorted(wanted, key=lambda k: (int(k.split("/")[0]), k))]
    name = "scikit-learn MLPClassifier"
    serve(
        [(name, "scikit-learn", lambda: epoch(arrays, options.task))],
        lambda found: error_of(found, named) if named else None,
    )


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
