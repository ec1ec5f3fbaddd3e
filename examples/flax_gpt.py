"""The gradient noise scale of a character GPT in plain Flax, tracked in every step of training.

The model knows nothing of jbackprop: its own attention, blocks that `nn.scan` repeats and that
`nn.remat` does again on the way back, a head that is the embedding's table. `jb.capture` finds the
pairs (activation, delta) of every window of text in its cost, and they give a step all it needs:
the mean gradient, and the two estimates that the noise scale B_simple = tr(Sigma) / |G|^2 is the
ratio of. Both are noisy, and are averaged over some steps before their ratio is taken. B_simple is,
about, the number of windows up to which twice the mini-batch is worth its price.

In 400 steps the loss falls from 3.84 (mean of the first 40) to 2.31, and the noise scale rises from
4 windows to 34 by step 80, to 126 by step 360, and 764 in the last 40. That would call for larger
and larger mini-batches. But most of it is the decay of the learning rate: on a calmer way down
|G|^2 gets small. At a constant rate, `main(decay=False)`, it stays between 26 and 41 from step 80
on, while the loss falls to 2.18. So a noise scale belongs to the learning rate it was found at. The
last figures are also the least sure: |G|^2 is then the small difference of two larger numbers.

Source: McCandlish, Kaplan, Amodei and the OpenAI Dota team, An empirical model of large-batch
training (2018), section 2.2. The text is that of `char_gpt.py`.

    python examples/flax_gpt.py
"""

from __future__ import annotations

import pydoc_data.topics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

import jbackprop as jb
from jbackprop.table import render


class Attention(nn.Module):
    """Every character looks back at those before it."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        length, width = x.shape[-2:]
        qkv = nn.DenseGeneral((3, self.heads, width // self.heads), use_bias=False)(x)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(width / self.heads)
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        return nn.DenseGeneral(width, axis=(-2, -1))(mixed)


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        width = x.shape[-1]
        x = x + Attention(self.heads)(nn.LayerNorm()(x))
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))), None


class GPT(nn.Module):
    """From numbers of characters (B, T) to net inputs of the next ones (B, T, vocab)."""

    vocab: int
    width: int
    depth: int
    heads: int

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        embed = nn.Embed(self.vocab, self.width, embedding_init=nn.initializers.normal(0.02))
        places = self.param("places", nn.initializers.normal(0.02), (ids.shape[-1], self.width))
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True},
            length=self.depth,
        )  # fmt: skip
        x, _ = blocks(self.heads)(embed(ids) + places, None)
        return embed.attend(nn.LayerNorm()(x))


def encode(characters: int | None) -> tuple[np.ndarray, int]:
    """Numbers for the characters of Python's help topics, and how many different ones there are."""
    topics = pydoc_data.topics.topics
    book = "\n".join(topics[name] for name in sorted(topics))[:characters]
    letters = {letter: i for i, letter in enumerate(sorted(set(book)))}
    return np.array([letters[letter] for letter in book], "int32"), len(letters)


def draw(rng: np.random.Generator, ids: np.ndarray, size: int, length: int) -> Any:
    """Windows from anywhere, independently, and the same moved on by one."""
    places = rng.integers(0, len(ids) - length, size)[:, None] + np.arange(length)
    return ids[places], ids[places + 1]


def seconds(step: Any, *inputs: Any) -> float:
    """Of one call, the shortest of five, once compiled."""
    jax.block_until_ready(step(*inputs))
    found = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(step(*inputs))
        found.append(time.perf_counter() - start)
    return min(found)


def picture(rows: list[dict[str, float]], size: int, path: Path) -> None:
    """The loss and the noise scale by step."""
    steps = [row["step"] for row in rows]
    fig, (left, right) = jb.diagnose.pictures.figure(columns=2)
    left.plot(steps, [row["loss"] for row in rows], marker=".")
    left.set(xlabel="step", ylabel="loss, nats for each character")
    right.semilogy(steps, [row["noise scale"] for row in rows], marker=".")
    right.axhline(size, color="grey", linestyle=":")
    right.set(xlabel="step", ylabel="noise scale, in windows")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    width: int = 64,
    depth: int = 3,
    heads: int = 4,
    length: int = 64,
    steps: int = 400,
    every: int = 40,
    size: int = 16,
    characters: int | None = None,
    decay: bool = True,
    seed: int = 0,
    output: str | Path = "output/flax_gpt.png",
) -> dict[str, Any]:
    """Learn and track; print, draw and return the figures."""
    ids, vocab = encode(characters)
    model, rng = GPT(vocab, width, depth, heads), np.random.default_rng(seed)
    params = model.init(jax.random.key(seed), jnp.zeros((1, length), "int32"))
    end = 0.0 if decay else 3e-3
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, steps, end)
    optimizer = optax.adam(schedule)
    state = optimizer.init(params)

    def cost(params: Any, x: Array, y: Array) -> Array:
        """Of one window: the mean over its characters."""
        z = model.apply(params, x[None])[0]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, y))

    @jax.jit
    def step(params: Any, state: Any, x: Array, y: Array) -> Any:
        costs, factored = jb.capture(cost)(params, x, y)
        grads = jb.per_example.mean(factored)
        updates, state = optimizer.update(grads, state)
        noise = jb.per_example.noise_scale(factored)
        return optax.apply_updates(params, updates), state, jnp.mean(costs), noise

    @jax.jit
    def ordinary(params: Any, state: Any, x: Array, y: Array) -> Any:
        """The same without the noise scale, to compare the time."""
        costs = jax.vmap(cost, (None, 0, 0))
        value, grads = jax.value_and_grad(lambda p: jnp.mean(costs(p, x, y)))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{len(ids):,} characters, {vocab} different; {count:,} parameters")
    print(jb.capture.explain(cost)(params, *draw(rng, ids, size, length)))
    first = (params, state, *draw(rng, ids, size, length))
    times = seconds(step, *first) / seconds(ordinary, *first)

    rows: list[dict[str, float]] = []
    losses, found = [], []
    for number in range(1, steps + 1):
        params, state, value, noise = step(params, state, *draw(rng, ids, size, length))
        losses.append(value)
        found.append(noise)
        if number % every == 0:
            mean = jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *found)
            rows.append(
                {
                    "step": number,
                    "loss": float(np.mean(losses)),
                    "trace": float(mean.trace),
                    "square": float(mean.gradient_square_norm),
                    "noise scale": float(mean.simple),
                }
            )
            losses, found = [], []

    print(f"\nWindows of {length} characters, {size} in a mini-batch; means over {every} steps")
    columns = (">step", ">loss", ">tr(Sigma)", ">|G|^2", ">noise scale")
    table = [
        (
            f"{row['step']}", f"{row['loss']:.3f}", f"{row['trace']:.3f}", f"{row['square']:.4f}",
            f"{row['noise scale']:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    print(render(columns, table))
    print(f"\nA step takes {times:.2f} times as long as one without the noise scale")
    picture(rows, size, Path(output))
    print(f"Picture: {output}")
    return {"rows": rows, "times": times}


if __name__ == "__main__":
    main()
