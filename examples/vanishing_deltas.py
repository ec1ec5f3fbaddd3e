"""Vanishing deltas: how far back does a delta reach, through sigmoid and through relu?

The delta rule multiplies at every layer,

    delta^l = (delta^{l+1} (W^{l+1})^T) * f'(z^l),

so that over many layers the factors decide. The slope of a sigmoid is at most 1/4. With Glorot and
Bengio's initialisation (2010), where W^T keeps the size of a delta, every sigmoid layer leaves
about a quarter of it. The slope of a relu is 0 or 1, about half of each; He's initialisation (He et
al., 2015) makes up for the half with weights larger by a factor of sqrt(2), and the delta keeps its
size.

The networks are untrained: this is what the first step of learning meets.

    python examples/vanishing_deltas.py
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from sklearn.datasets import load_digits

import jbackprop as jb

glorot = jax.nn.initializers.glorot_uniform()
he = jax.nn.initializers.he_normal()
KINDS = {"sigmoid": (jb.Sigmoid(), glorot), "relu": (jb.Relu(), he)}


def network(depth: int, width: int, activation: jb.Layer, w_init: Any) -> jb.Sequential:
    """64 inputs, `depth` layers with weights, 10 outputs; all hidden layers equally wide."""
    sizes = [64, *[width] * (depth - 1), 10]
    layers: list[jb.Layer] = []
    for p, q in itertools.pairwise(sizes):
        layers += [jb.Dense(p, q, w_init=w_init), activation]
    return jb.Sequential(*layers[:-1])  # the outputs are net inputs of the softmax


def delta_flow(net: jb.Sequential, examples: int, key: jax.Array) -> jb.diagnose.DeltaFlow:
    """The norm of the delta at every layer of the untrained network, on real digits."""
    x, y = load_digits(return_X_y=True)
    x, y = (x[:examples] / 16).astype("float32"), y[:examples]
    bp = jb.backprop(net, jb.SoftmaxCrossEntropy(), net.init(key), x, y)
    return jb.diagnose.delta_norms(bp)


def main(
    depths: Sequence[int] = (2, 5, 10, 20, 30),
    width: int = 64,
    examples: int = 256,
    output: str | Path = "output/vanishing_deltas.png",
) -> dict[str, Any]:
    """Measure every depth and activation; print, draw and return first over last delta norm."""
    fig, axes = jb.diagnose.pictures.figure(columns=len(KINDS))
    print("Mean norm of the delta at the first layer and at the last, untrained")
    print(f"{'':<10}{'layers':>8}{'first':>12}{'last':>12}{'first/last':>14}{'per layer':>12}")
    ratios: dict[str, dict[int, float]] = {}
    for (name, (activation, w_init)), ax in zip(KINDS.items(), axes, strict=True):
        flows = {}
        ratios[name] = {}
        for depth in depths:
            net = network(depth, width, activation, w_init)
            flows[f"{depth} layers"] = flow = delta_flow(net, examples, jax.random.key(depth))
            norms = list(flow.norms.values())
            ratio = ratios[name][depth] = norms[0] / norms[-1]
            each = ratio ** (1 / (depth - 1))
            print(f"{name:<10}{depth:8}{norms[0]:12.2e}{norms[-1]:12.2e}{ratio:14.2e}{each:12.3f}")
        jb.diagnose.pictures.plot_flow(ax, flows)
        ax.set_title(name)

    axes[1].sharey(axes[0])
    axes[1].set_ylabel("")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(output)
    print(f"Picture: {output}")
    return ratios


if __name__ == "__main__":
    main()
