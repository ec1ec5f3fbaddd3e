"""The main job: learn handwritten digits by the delta rule, with the proof beside it."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jbackprop import check, datasets, diagnose, metrics
from jbackprop.bench.contest import measure
from jbackprop.bench.report import timetable
from jbackprop.bench.results import ratios
from jbackprop.bench.suite.mlp import workload
from jbackprop.compose import mlp
from jbackprop.diagnose.pictures import figure
from jbackprop.gradient import backprop
from jbackprop.layers import Gelu
from jbackprop.losses import SoftmaxCrossEntropy
from jbackprop.objective import predict
from jbackprop.summary import summary
from jbackprop.table import render
from jbackprop.train import Fit, evaluate, fit

SIZES = (64, 256, 128, 10)
BATCH = 32


def run(epochs: int, seed: int, output: Path, show: Any = print, quick: bool = False) -> dict:
    """Train on scikit-learn's digits, prove the gradients, measure, and draw a picture.

    Args:
        epochs: how often to go through the training data.
        seed: of the split, the initial weights and the order of the data.
        output: folder for `digits.png`; made if need be.
        show: where text goes.
        quick: measure for a moment only.

    Returns:
        The figures, as JSON could have them; "ok" says whether all gradients were right.
    """
    data = datasets.load("digits")
    parts = datasets.split(len(data.x), (0.1, 0.2), seed)
    x, y = (data.x / 16).astype(np.float32), data.labels
    assert y is not None
    train, validation, test = ((x[i], y[i]) for i in parts)
    net, loss = mlp(SIZES, Gelu()), SoftmaxCrossEntropy(label_smoothing=0.1)
    params = net.init(jax.random.key(seed))
    show(f"{len(data.x)} handwritten digits, 8 x 8 pixels: {len(train[0])} to train on, ", end="")
    show(f"{len(validation[0])} to validate, {len(test[0])} to test.\n")
    show(summary(net, (64,)))

    show("\nThe proof: every delta and every gradient against jax.grad in float64.\n")
    agreement = {
        dtype: check.network(net, loss, params, train[0][:128], train[1][:128], dtype)
        for dtype in ("float64", "float32")
    }
    for verdict in agreement.values():
        show(verdict, end="\n\n")

    show(f"Training: mini-batches of {BATCH}, Adam with a cosine schedule, label smoothing 0.1.")
    steps = epochs * math.ceil(len(train[0]) / BATCH)
    start = time.perf_counter()
    learnt = fit(
        net,
        loss,
        params,
        train,
        optax.adam(optax.cosine_decay_schedule(3e-3, steps)),
        epochs=epochs,
        batch_size=BATCH,
        key=jax.random.key(seed + 1),
        validation=validation,
        metrics={"accuracy": metrics.accuracy},
    )
    seconds = time.perf_counter() - start
    found = evaluate(net, loss, learnt.params, test, {"accuracy": metrics.accuracy})
    history = {name: values[-1] for name, values in learnt.history.items()}
    show(
        f"{len(learnt.history['loss'])} epochs in {seconds:.1f} s: training accuracy "
        f"{history['accuracy']:.1%}, validation {history['validation_accuracy']:.1%}, "
        f"test {found['accuracy']:.1%}.\n"
    )

    bp = backprop(net, loss, params, train[0][:512], train[1][:512])
    before = diagnose.delta_norms(bp)
    bp = backprop(net, loss, learnt.params, train[0][:512], train[1][:512])
    after = diagnose.delta_norms(bp)
    show("The norm of the delta, layer by layer (mean over 512 examples).\n")
    rows = [(p, f"{before.norms[p]:.2e}", f"{after.norms[p]:.2e}") for p in before.norms]
    show(render(("layer", ">before training", ">after"), rows))

    show("\nTime and memory of one gradient, jitted: by hand against jax.value_and_grad.\n")
    load = workload(SIZES, BATCH, "gelu", 0)
    both = [who for who in load.contestants() if who.kind in ("plain", "ours")]
    load = dataclasses.replace(load, contestants=lambda: both)
    contest = measure(load, seconds=0.5 if quick else 4.0)
    ours, cuts = next(
        (row, ratio)
        for row, ratio in zip(contest, ratios(contest), strict=True)
        if row.kind == "ours"
    )
    assert cuts is not None
    show(timetable(contest))

    picture = output / "digits.png"
    draw(picture, learnt, before, after, *_shown(net, loss, learnt, test))
    show(f"\nThe picture is in {picture}.")
    ok = all(verdict.ok for verdict in agreement.values())
    return {
        "ok": ok,
        "worst_relative_error": {name: verdict.worst_error for name, verdict in agreement.items()},
        "test_accuracy": found["accuracy"],
        "last_epoch": history,
        "training_seconds": seconds,
        "delta_norms": {"before": before.norms, "after": after.norms},
        "manual_over_automatic": {
            "time": cuts[1],
            "quartiles": [cuts[0], cuts[2]],
            "temp_memory": (ours.temp or 0) / (contest[0].temp or 1),
        },
        "picture": str(picture),
    }


def _shown(net: Any, loss: Any, learnt: Fit, test: tuple[np.ndarray, np.ndarray]) -> Any:
    """Twelve test digits, the mistakes first: images, labels, predicted labels and certainty."""
    p = np.asarray(predict(net, loss, learnt.params, test[0]))
    order = np.argsort(p.argmax(1) == test[1], kind="stable")[:12]
    return test[0][order], test[1][order], p[order]


def draw(
    path: Path, learnt: Fit, before: Any, after: Any, x: np.ndarray, y: np.ndarray, p: np.ndarray
) -> None:
    """The learning curve, the delta norms, and some test digits with their predictions."""
    fig, axes = figure(3, width=4.6, height=3.8)
    history = learnt.history
    numbers = range(1, len(history["loss"]) + 1)
    axes[0].semilogy(numbers, history["loss"], label="training")
    axes[0].semilogy(numbers, history["validation_loss"], label="validation")
    axes[0].set(
        xlabel="epoch", ylabel="mean cross-entropy, smoothed labels", title="Learning curve"
    )
    axes[0].legend()
    diagnose.pictures.plot_flow(axes[1], {"before training": before, "after": after})
    axes[1].set_title("Deltas on their way back")
    axes[1].set_xticks(range(1, len(before.norms) + 1))
    axes[2].set_title("Test digits (mistakes first)")
    axes[2].axis("off")
    for i in range(len(x)):
        small = axes[2].inset_axes(((i % 4) * 0.25, 0.70 - (i // 4) * 0.34, 0.24, 0.24))
        small.imshow(x[i].reshape(8, 8), cmap="gray_r")
        small.set(xticks=[], yticks=[])
        guess = int(p[i].argmax())
        small.set_title(
            f"{guess} ({p[i, guess]:.0%})" + ("" if guess == y[i] else f", is {y[i]}"),
            fontsize=7,
            color="black" if guess == y[i] else "tab:red",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
