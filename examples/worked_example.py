"""Backpropagation, every number of it: one example, one step of gradient descent.

Two inputs, two hidden layers of two units, one output, all sigmoid, no biases; the cost is log
loss. Each net input z, activation a, delta and gradient is computed twice: by hand, with the
formula written out in NumPy, and by jbackprop. Watch the deltas shrink on their way to the input:
that is the vanishing gradient in small.

    python examples/worked_example.py
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

import jbackprop as jb

x = np.array([1.0, 0.0])
y = np.array([1.0])

# Unit by column: w[i, o] leads from unit i of the layer below to unit o of the layer above.
w1 = np.array([[-1.0, 0.4], [0.7, -0.7]]).T
w2 = np.array([[0.2, 0.5], [1.0, 0.2]]).T
w3 = np.array([[0.8, 0.4]]).T


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def forward_by_hand(w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> dict[str, Any]:
    z1 = x @ w1
    a1 = sigmoid(z1)
    z2 = a1 @ w2
    a2 = sigmoid(z2)
    z3 = a2 @ w3
    a3 = sigmoid(z3)
    C = -np.sum(y * np.log(a3) + (1 - y) * np.log(1 - a3))
    return {"z1": z1, "a1": a1, "z2": z2, "a2": a2, "z3": z3, "a3": a3, "C": C}


def backward_by_hand(a1: np.ndarray, a2: np.ndarray, a3: np.ndarray) -> dict[str, Any]:
    delta3 = a3 - y  # log loss behind a sigmoid: the error in prediction
    delta2 = (delta3 @ w3.T) * a2 * (1 - a2)  # the delta rule, with f'(z) = a (1 - a)
    delta1 = (delta2 @ w2.T) * a1 * (1 - a1)
    deltas = {"delta3": delta3, "delta2": delta2, "delta1": delta1}
    gradients = {
        "dw3": np.outer(a2, delta3),  # activation times delta
        "dw2": np.outer(a1, delta2),
        "dw1": np.outer(x, delta1),
    }
    return deltas | gradients


def by_hand(alpha: float) -> dict[str, Any]:
    before = forward_by_hand(w1, w2, w3)
    back = backward_by_hand(before["a1"], before["a2"], before["a3"])
    new = {
        "new w1": w1 - alpha * back["dw1"],
        "new w2": w2 - alpha * back["dw2"],
        "new w3": w3 - alpha * back["dw3"],
    }
    after = forward_by_hand(*new.values())
    return before | back | new | {"new a3": after["a3"], "new C": after["C"]}


def by_jbackprop(alpha: float) -> dict[str, Any]:
    net = jb.Sequential(
        jb.Dense(2, 2, bias=False),
        jb.Sigmoid(),
        jb.Dense(2, 2, bias=False),
        jb.Sigmoid(),
        jb.Dense(2, 1, bias=False),
    )
    loss = jb.SigmoidCrossEntropy()  # takes z3; the last sigmoid is its prediction
    params = ({"w": jnp.asarray(w1)}, (), {"w": jnp.asarray(w2)}, (), {"w": jnp.asarray(w3)})
    batch = jnp.asarray(x)[None], jnp.asarray(y)[None]  # of one example

    z1, a1, z2, a2, z3 = jb.activations(net, params, batch[0]).values()
    bp = jb.backprop(net, loss, params, *batch)
    delta1, delta2, delta3 = jb.deltas(bp).values()
    dw1, _, dw2, _, dw3 = (g["w"] if g else () for g in jb.gradient(bp))

    new1, new2, new3 = w1 - alpha * dw1, w2 - alpha * dw2, w3 - alpha * dw3
    new = ({"w": new1}, (), {"w": new2}, (), {"w": new3})
    after = jb.backprop(net, loss, new, *batch)

    every_example = {
        "z1": z1, "a1": a1, "z2": z2, "a2": a2, "z3": z3, "a3": loss.predict(bp.outputs),
        "C": bp.losses, "delta3": delta3, "delta2": delta2, "delta1": delta1,
        "new a3": loss.predict(after.outputs), "new C": after.losses,
    }  # fmt: skip
    the_only = {name: values[0] for name, values in every_example.items()}
    weights = {"dw3": dw3, "dw2": dw2, "dw1": dw1, "new w1": new1, "new w2": new2, "new w3": new3}
    return {name: np.asarray(value) for name, value in (the_only | weights).items()}


STEPS = {
    "Forward": {
        "z1": "x w1",
        "a1": "sigmoid(z1)",
        "z2": "a1 w2",
        "a2": "sigmoid(z2)",
        "z3": "a2 w3",
        "a3": "sigmoid(z3), the output",
        "C": "-y log a3 - (1 - y) log(1 - a3)",
    },
    "Backward": {
        "delta3": "a3 - y",
        "delta2": "(delta3 w3^T) * a2 (1 - a2)",
        "delta1": "(delta2 w2^T) * a1 (1 - a1)",
    },
    "Gradient": {
        "dw3": "a2 (outer) delta3",
        "dw2": "a1 (outer) delta2",
        "dw1": "x (outer) delta1",
    },
    "One step": {
        "new w1": "w1 - alpha dw1",
        "new w2": "w2 - alpha dw2",
        "new w3": "w3 - alpha dw3",
        "new a3": "the output with the new weights",
        "new C": "its cost",
    },
}


def rows(value: Any) -> list[str]:
    """A number, a vector, or a matrix row by row, to four decimals."""
    rounded = np.round(np.atleast_2d(value), 4) + 0.0  # so that no zero is printed as -0
    return ["  ".join(f"{v:8.4f}" for v in row) for row in rounded]


def main(alpha: float = 0.5) -> dict[str, Any]:
    """Compute every number twice, print both, and return those of jbackprop."""
    hand, ours = by_hand(alpha), by_jbackprop(alpha)

    print(f"x = (1, 0), y = 1, alpha = {alpha}; weights in columns, one for each unit above")
    for title, formulas in STEPS.items():
        print(f"\n{title:<46}{'by hand':<22}jbackprop")
        for name, formula in formulas.items():
            left = f"  {name:<6} = {formula}"
            for of_hand, of_ours in zip(rows(hand[name]), rows(ours[name]), strict=True):
                print(f"{left:<44}{of_hand:<22}{of_ours}")
                left = ""

    difference = max(float(np.max(np.abs(hand[name] - ours[name]))) for name in hand)
    print(f"\nOutput {ours['a3'][0]:.4f} -> {ours['new a3'][0]:.4f}: nearer to y = 1.")
    print(f"The largest difference between the two columns: {difference:.1e} (float32).")
    return ours | {"difference": difference}


if __name__ == "__main__":
    main()
