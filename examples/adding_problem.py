"""The adding problem: an LSTM remembers two numbers over a long sequence; its deltas reach them.

Hochreiter and Schmidhuber, Long short-term memory (1997), experiment 4, in its usual form. Every
step brings a random number from [0, 1] and a mark; two steps of the sequence are marked, and the
target, after the last step, is the sum of the two numbers that came with them. Whoever ignores the
input says 1, with a mean squared error of 2/12 = 0.167. To do better, the delta of the output has
to reach the marked steps, up to T steps back. By the delta rule

    plain recurrent layer:   delta_{t-1} = (delta_t W_h^T) * f'(z_{t-1})
    LSTM's cell:             dC/dc_{t-1} = dC/dc_t * f_t + ...

so that in the first W_h^T and f' multiply T times, and in the second only the forget gate does,
which can be open. The picture shows the norm of the delta at every time step, before and after
learning; a pair (activation, delta) of a recurrent weight holds them all:

    jb.backprop(net, loss, params, x, y).factored[0]["b"].delta           (B, 1, T, 4q)

    python examples/adding_problem.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jbackprop as jb

BASELINE = 1 / 6  # the variance of the sum of two numbers from [0, 1]
LOSS = jb.SquaredError()  # |z - y|^2 / 2: twice it is the squared error


def problem(examples: int, steps: int, seed: int) -> tuple[Any, Any]:
    """Sequences (examples, steps, 2) of numbers and marks, and the sums (examples, 1).

    One mark is in each half of the sequence.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.uniform(size=(examples, steps)).astype("float32")
    marks = np.zeros_like(numbers)
    half = steps // 2
    for low, high in ((0, half), (half, steps)):
        marks[np.arange(examples), rng.integers(low, high, examples)] = 1
    return np.stack([numbers, marks], axis=2), np.sum(numbers * marks, axis=1, keepdims=True)


def networks(hidden: int) -> dict[str, jb.Sequential]:
    """The two to compare: both end in a Dense on the last time step."""
    return {
        "LSTM": jb.lstm(2, hidden, 1),
        "plain": jb.Sequential(jb.RNN(2, hidden), jb.Take(-1), jb.Dense(hidden, 1)),
    }


def deltas_in_time(net: jb.Sequential, params: Any, x: Any, y: Any) -> np.ndarray:
    """The mean over the examples of |delta_t|, the delta of the net inputs of step t, (T,)."""
    bp = jb.backprop(net, LOSS, params, x, y)
    delta = bp.factored[0]["b"].delta  # (B, 1, T, features): time is position
    # Over |delta at the output|, so that a small error does not look like a vanishing delta.
    size = np.linalg.norm(bp.outputs - y, axis=1, keepdims=True)
    return np.mean(np.linalg.norm(delta[:, 0], axis=2) / size, axis=0)


def picture(flows: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    fig, axes = jb.diagnose.pictures.figure(columns=len(flows))
    for ax, (when, of) in zip(axes, flows.items(), strict=True):
        for name, norms in of.items():
            ax.semilogy(range(1, len(norms) + 1), norms, label=name)
        ax.set(title=when, xlabel="time step")
    axes[0].set_ylabel("mean norm of delta / delta of the output")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    steps: int = 60,
    hidden: int = 48,
    examples: int = 10_000,
    epochs: int = 20,
    output: str | Path = "output/adding_problem.png",
) -> dict[str, Any]:
    """Train both; print and draw; return squared errors and the norms of the deltas by step."""
    data, test = problem(examples, steps, seed=0), problem(1000, steps, seed=1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(4e-3))
    flows: dict[str, dict[str, np.ndarray]] = {"untrained": {}, "trained": {}}
    errors = {}
    print(f"{steps} steps; squared error of the answer 1: {BASELINE:.4f}")
    for name, net in networks(hidden).items():
        params = net.init(jax.random.key(0))
        flows["untrained"][name] = deltas_in_time(net, params, test[0][:200], test[1][:200])
        fit = jb.fit(
            net, LOSS, params, data, optimizer, epochs=epochs, batch_size=50,
            key=jax.random.key(1), progress=False,
        )  # fmt: skip
        errors[name] = 2 * jb.evaluate(net, LOSS, fit.params, test)["loss"]
        flows["trained"][name] = deltas_in_time(net, fit.params, test[0][:200], test[1][:200])
        print(f"{name:<8}squared error on new sequences {errors[name]:.4f}")
    print("\nNorm of the delta at the first step over that at the last")
    for when, of in flows.items():
        ratios = "   ".join(f"{name} {norms[0] / norms[-1]:.1e}" for name, norms in of.items())
        print(f"{when:<12}{ratios}")
    picture(flows, Path(output))
    print(f"Picture: {output}")
    return {"errors": errors, "flows": flows}


if __name__ == "__main__":
    main()
