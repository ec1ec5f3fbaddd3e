"""The symmetry detector of Rumelhart, Hinton and Williams (1986), learnt again.

Is a string of six bits symmetric about its middle? Two hidden units suffice, and the weights that
back-propagation finds for them are the paper's first figure: antisymmetric about the middle, so
that those of a symmetric string cancel out, and in the ratios 1 : 2 : 4, so that those of no other
string can.

The paper's settings: all 64 strings in every sweep, squared error summed over them, weights at
first uniform between -0.3 and 0.3, 1425 sweeps of

    change(t) = -eps dE/dw(t) + alpha change(t - 1),    eps = 0.1, alpha = 0.9.

Whether a random start gets there depends on eps, so that many starts are tried, with the paper's
eps and with a smaller one, and the successes counted. About one in four of them is another
solution: ratios 2 : 3 : 4, which cannot cancel out either. The library is pure: one `vmap` trains
all starts at once, and one `scan` takes all the steps.

Source: Learning representations by back-propagating errors, Nature 323 (1986), figure 1.

    python examples/symmetry.py
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbackprop as jb

x = np.array(list(itertools.product([0.0, 1.0], repeat=6)), dtype="float32")
y = np.all(x == x[:, ::-1], axis=1, keepdims=True).astype("float32")


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, minval=-0.3, maxval=0.3)


net = jb.Sequential(
    jb.Dense(6, 2, w_init=uniform, b_init=uniform),
    jb.Sigmoid(),
    jb.Dense(2, 1, w_init=uniform, b_init=uniform),
    jb.Sigmoid(),
)
loss = jb.SquaredError()

KINDS = {"1 : 2 : 4": np.array([[1], [2], [4]]), "2 : 3 : 4": np.array([[2], [3], [4]])}


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def train(key: jax.Array, eps: float, sweeps: int) -> tuple[Any, jax.Array]:
    """From one random start: the parameters learnt, and the outputs for all strings."""
    optimizer = optax.sgd(eps, momentum=0.9)
    value_and_grad = jb.value_and_grad(net, loss)

    def sweep(state: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, opt_state = state
        _, grads = value_and_grad(params, x, y, weights=jnp.ones(len(x)))  # the sum, as in 1986
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    start = net.init(key)
    (params, _), _ = jax.lax.scan(sweep, (start, optimizer.init(start)), length=sweeps)
    return params, jb.predict(net, loss, params, x)


def in_quarters(w: np.ndarray) -> np.ndarray:
    """Magnitudes of mirror images (averaged), ascending, the largest of each unit being 4."""
    size = np.sort(np.abs(w[:, :3] - w[:, :2:-1]) / 2, axis=1)
    return 4 * size / size[:, -1:]


def picture(w: np.ndarray, path: Path) -> None:
    fig, axes = jb.diagnose.pictures.figure(columns=2)
    for j, ax in enumerate(axes):
        ax.bar(range(1, 7), w[:, j], color=np.where(w[:, j] > 0, "C0", "C3"))
        ax.axvline(3.5, color="grey", linestyle=":")
        ax.set(title=f"hidden unit {j + 1}", xlabel="input", ylabel="weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)


def main(
    rates: Sequence[float] = (0.1, 0.04),
    sweeps: int = 1425,
    starts: int = 100,
    output: str | Path = "output/symmetry.png",
) -> dict[str, Any]:
    """Train from many starts with each eps, the last one to be shown; return the figures."""
    print("6 bits, 2 hidden units; solved: all 64 outputs on their side of 1/2")
    solved = {}
    for eps in rates:
        params, outputs = train(jax.random.split(jax.random.key(0), starts), eps, sweeps)
        right = np.all((np.asarray(outputs) > 0.5) == (y > 0.5), axis=(1, 2))
        solved[eps] = int(right.sum())
        print(f"  eps = {eps:<5} {sweeps} sweeps: {solved[eps]:3} of {starts} starts solved it")

    w, b = (np.asarray(params[0][name])[right] for name in ("w", "b"))  # (solution, input, unit)
    ratios = in_quarters(w)
    kinds = {name: np.all(np.abs(ratios / r - 1) < 0.05, axis=(1, 2)) for name, r in KINDS.items()}
    asymmetry = np.max(np.abs(w + w[:, ::-1]), axis=(1, 2)) / np.max(np.abs(w), axis=(1, 2))
    if not kinds["1 : 2 : 4"].any():
        raise RuntimeError(f"no start has found 1 : 2 : 4 with eps = {eps}; try more of them")

    print(f"\nAll {solved[eps]} solutions with eps = {eps}:")
    print(f"  |w_i + w_mirror| at most {asymmetry.max():.0e} of the largest weight")
    for name, is_kind in kinds.items():
        print(f"  {is_kind.sum():3} in ratios {name}, within 5%")

    shown = int(np.argmax(kinds["1 : 2 : 4"]))
    print("\nThe first of 1 : 2 : 4, its weights from the six inputs:")
    for j in range(2):
        weights = "".join(f"{v:8.2f}" for v in w[shown, :, j])
        measured = " : ".join(f"{r:.2f}" for r in ratios[shown, :, j])
        print(f"  hidden unit {j + 1}: {weights}    bias {b[shown, j]:6.2f}    ratios {measured}")
    picture(w[shown], Path(output))
    print(f"Picture: {output}")
    return {
        "solved": solved,
        "kinds": {name: int(is_kind.sum()) for name, is_kind in kinds.items()},
        "asymmetry": asymmetry,
        "w": w[shown],
        "ratios": ratios[shown],
    }


if __name__ == "__main__":
    main()
