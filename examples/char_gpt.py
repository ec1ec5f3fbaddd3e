"""A transformer that learns to write Python's own documentation, character by character.

The text is real and comes with every Python: the 460,000 characters of the help topics, in
`pydoc_data.topics`. Windows of 64 characters go in, the same moved on by one are the targets, and
the cost of a window is the mean over its characters of -log p(next character). Every block of the
transformer keeps the inputs of its two halves and little else; on the way back they are done again.

Printed are the loss beside what a table of frequencies reaches, in bits for each character (the
entropy of single characters, and of characters given the one before), the norm of the delta at
every block, first to last, before learning and after, and a sample of what the net writes.

    python examples/char_gpt.py
"""

from __future__ import annotations

import functools
import math
import pydoc_data.topics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbackprop as jb


def text() -> str:
    """The help topics, one after the other, in alphabetical order."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def encode(book: str) -> tuple[np.ndarray, str]:
    """Numbers for the characters, and the characters in the order of their numbers."""
    letters = "".join(sorted(set(book)))
    number = {letter: i for i, letter in enumerate(letters)}
    return np.array([number[letter] for letter in book], "int32"), letters


def windows(ids: np.ndarray, length: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Every `step` characters a window, and the same moved on by one."""
    starts = np.arange(0, len(ids) - length, step)
    places = starts[:, None] + np.arange(length)
    return ids[places], ids[places + 1]


def entropies(train: np.ndarray, test: np.ndarray, vocab: int) -> tuple[float, float]:
    """Bits for each character of `test` by the frequencies in `train`: of it alone, of pairs."""
    single = np.bincount(train, minlength=vocab) + 1.0
    pairs = np.bincount(train[:-1] * vocab + train[1:], minlength=vocab**2) + 0.1
    pairs = pairs.reshape(vocab, vocab)
    alone = np.log2(single / single.sum())[test]
    after = np.log2(pairs / pairs.sum(1, keepdims=True))[test[:-1], test[1:]]
    return -float(alone.mean()), -float(after.mean())


@functools.partial(jax.jit, static_argnums=(0, 4))
def write(net: jb.Sequential, params: Any, key: Any, prompt: Any, number: int) -> Any:
    """Continue the prompt by `number` characters, each drawn from what the net expects."""
    length = len(prompt)

    def draw(window: Any, key: Any) -> tuple[Any, Any]:
        z, _ = jb.forward(net, params, window[None])
        new = jax.random.categorical(key, z[0, -1] / 0.7)  # a little bolder than it is
        return jnp.append(window[1:], new.astype(window.dtype)), new

    return jax.lax.scan(draw, prompt[-length:], jax.random.split(key, number))[1]


def flow(net: jb.Sequential, params: Any, x: Any, y: Any) -> list[float]:
    """The mean norm of the delta at each block's last Dense, first block first."""
    bp = jb.backprop(net, jb.SoftmaxCrossEntropy(), params, x, y)
    norms = jb.diagnose.delta_norms(bp).norms
    last = ".layers[1].layer.branch.layers[3]"  # second half, second Dense
    return [norm for path, norm in norms.items() if path.endswith(last)]


def main(
    width: int = 128,
    depth: int = 4,
    length: int = 64,
    epochs: int = 5,
    batch_size: int = 32,
    characters: int | None = None,
    sample: int = 400,
    seed: int = 0,
) -> dict[str, Any]:
    """Learn, and print loss, deltas and a sample."""
    ids, letters = encode(text()[:characters])
    cut = int(0.95 * len(ids))
    train, test = ids[:cut], ids[cut:]
    x, y = windows(train, length, length // 2)
    x_test, y_test = windows(test, length, length)
    net = jb.transformer(
        vocab=len(letters), width=width, depth=depth, heads=max(1, width // 32), length=length
    )
    loss = jb.SoftmaxCrossEntropy()
    params = net.init(jax.random.key(seed))
    alone, after = entropies(train, test, len(letters))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{len(ids):,} characters, {len(letters)} different; {count:,} parameters")

    before = flow(net, params, x_test[:64], y_test[:64])
    steps = epochs * math.ceil(len(x) / batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, min(100, steps // 4), steps)
    start = time.perf_counter()
    fit = jb.fit(
        net,
        loss,
        params,
        (x, y),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        epochs=epochs,
        batch_size=batch_size,
        key=jax.random.key(seed),
    )
    seconds = time.perf_counter() - start
    bits = jb.evaluate(net, loss, fit.params, (x_test, y_test))["loss"] / math.log(2)
    print(f"{steps} steps of {batch_size} x {length} characters, {seconds:.0f} s\n")
    print("Held-out text, bits for each character")
    print(f"  characters by frequency              {alone:.2f}")
    print(f"  given the character before           {after:.2f}")
    print(f"  this transformer                     {bits:.2f}\n")

    print("Mean norm of the delta behind each block, first to last")
    found = flow(net, fit.params, x_test[:64], y_test[:64])
    for name, norms in (("before", before), ("after", found)):
        print(f"  {name:<8}" + "".join(f"{norm:11.2e}" for norm in norms))

    drawn = write(net, fit.params, jax.random.key(seed + 1), jnp.asarray(x_test[0]), sample)
    written = "".join(letters[i] for i in np.asarray(drawn))
    print(f"\nWhat it writes:\n\n{written}")
    return {
        "bits": bits,
        "by frequency": alone,
        "given the one before": after,
        "losses": fit.history["loss"],
        "deltas": (before, found),
        "sample": written,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
