"""jbackprop inspect: a network on a table of numbers, as a page to look at."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jbackprop import datasets, html, losses
from jbackprop.cli.output import print_json, say_of
from jbackprop.cli.parsed import add_data, positive, rate, sizes
from jbackprop.cli.train import ACTIVATIONS, LOSSES, metrics_of, targets_of
from jbackprop.compose import mlp
from jbackprop.diagnose.pictures import figure
from jbackprop.factored import PyTree
from jbackprop.inspect.examples import Showing, image_shape_of
from jbackprop.inspect.facts import facts
from jbackprop.inspect.figures import measure
from jbackprop.inspect.page import page
from jbackprop.inspect.pictures import checked_history
from jbackprop.saved import load
from jbackprop.sweep import Node, forward
from jbackprop.train import fit

_MOST = 2000
_IMAGES = {"digits": (8, 8)}
_FRESH = ("hidden", "activation", "train", "learning_rate", "raw")
"""What a saved network has settled."""


def add(commands: Any) -> None:
    """Tell the parser of the command."""
    inspect = commands.add_parser(
        "inspect",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="look at a network: deltas, units, single examples, as a page",
        description="Write a page, self-contained, that shows what goes on in a network on some\n"
        "data: how the deltas flow, which units are saturated or dead, which examples have the\n"
        "largest gradients, how activations and deltas are spread in every layer.",
        epilog="examples:\n"
        "  jbackprop inspect digits --train 20 --out digits.html\n"
        "  jbackprop train iris --save iris.npz --log iris.csv\n"
        "  jbackprop inspect iris --model iris.npz --log iris.csv\n"
        "  jbackprop inspect digits --hidden 32,32,32,32,32,32 --activation sigmoid\n\n"
        "features (and real targets) are standardised as the saved network's notes say; those of\n"
        "a network made here by the mean and deviation of the rows that it is trained on, or of\n"
        "all. A page of that name is replaced.",
    )
    add_data(inspect)
    inspect.add_argument(
        "--model", type=Path, metavar="FILE.npz",
        help="a network of `jbackprop train --save`, or of jbackprop.save",
    )  # fmt: skip
    inspect.add_argument(
        "--hidden", type=sizes, help="without a model: widths of hidden layers; default: 64"
    )
    inspect.add_argument(
        "--activation", choices=sorted(ACTIVATIONS), metavar="NAME",
        help=f"without a model: {', '.join(sorted(ACTIVATIONS))}; default: tanh",
    )  # fmt: skip
    inspect.add_argument(
        "--train", type=positive, metavar="EPOCHS",
        help="without a model: train on 80 %% of the rows first (Adam, mini-batches of 32)",
    )  # fmt: skip
    inspect.add_argument("--learning-rate", type=rate, help="of that training; default: 0.001")
    inspect.add_argument(
        "--raw", action="store_true", default=None,
        help="without a model: standardise neither features nor targets",
    )  # fmt: skip
    inspect.add_argument(
        "--loss", choices=sorted(LOSSES),
        help="default: the model's; softmax for classes, squared for real targets",
    )  # fmt: skip
    inspect.add_argument(
        "--log", type=Path, metavar="FILE",
        help="the log of a training, .csv or .jsonl, for the learning curve",
    )  # fmt: skip
    inspect.add_argument(
        "--examples", type=positive, default=_MOST, metavar="N",
        help="look at so many rows at most, drawn with the seed; default: %(default)s",
    )  # fmt: skip
    inspect.add_argument(
        "--shown", type=positive, default=8, metavar="K",
        help="show so many examples with the largest gradients, and with the smallest; default: 8",
    )  # fmt: skip
    inspect.add_argument(
        "--image", type=_shape, metavar="HxW",
        help="show examples as pictures: 8x8, 28x28, 32x32x3; known for digits",
    )  # fmt: skip
    inspect.add_argument(
        "--shape", type=_shape, metavar="AxBxC",
        help="the shape that the model takes an example in, such as 28x28x1; flat by default",
    )  # fmt: skip
    inspect.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    inspect.add_argument(
        "--out", type=Path, default=Path("inspect.html"), metavar="FILE.html",
        help="the page; default: %(default)s",
    )  # fmt: skip
    inspect.set_defaults(run=run_inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON on standard output")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.lower().split("x"))


@dataclasses.dataclass(frozen=True, eq=False)
class _Subject:
    """A network, and the data as it takes them.

    Attributes:
        net, loss, params: the network.
        before: its parameters before training; None if it is fresh.
        history: of its training; None for none.
        x, y: all rows.
        classes: their names, in the order of the outputs; () for none.
        units: offset and scale of the targets; None where they are as they were.
        about: what was done to it, in words.
    """

    net: Node
    loss: losses.Loss
    params: PyTree
    before: PyTree
    history: dict[str, list[float]] | None
    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]
    units: tuple[np.ndarray, np.ndarray] | None
    about: str


def run_inspect(args: argparse.Namespace) -> int:
    """The command."""
    say = say_of(args)
    html.check_path(args.out)
    figure()  # is matplotlib there?
    if args.train and args.log:
        raise ValueError("--train has a learning curve of its own: leave --log out")
    logged = None if args.log is None else checked_history(_read_log(args.log))
    data = datasets.load(args.data, args.target)
    image = image_shape_of(data.x, args.image or _IMAGES.get(args.data))
    subject = _saved(args, data) if args.model else _made(args, data)
    history = logged if subject.history is None else checked_history(subject.history)
    rows = np.random.default_rng(args.seed).permutation(len(data.x))[: args.examples]
    rows = np.sort(rows)
    x, y = subject.x[rows], subject.y[rows]
    seen = measure(
        subject.net, subject.loss, subject.params, x, y, before=subject.before, shown=args.shown
    )
    name = args.model.name if args.model else "A network"
    some = f"{len(rows):,} of {len(data.x):,} rows" if len(rows) < len(data.x) else "all rows"
    about = f"{data.name}, {some}, {data.x.shape[1]} features. {subject.about}"
    showing = Showing(data.x[rows], image, None, (), subject.classes, subject.units, rows)
    lines = facts(seen, history)
    html.write(args.out, page(seen, y, showing, f"{name} on {data.name}", about, history))
    for fact in lines:
        say(f"- {fact.text}")
    say(f"\nThe page is {args.out}.")
    if args.json:
        said = [{"kind": fact.kind, "text": fact.text} for fact in lines]
        found = seen.as_dict()
        for which in ("largest", "smallest"):
            found[which] = [int(rows[i]) for i in found[which]]
        print_json(found | {"facts": said, "page": str(args.out)})
    return 0


def _made(args: argparse.Namespace, data: datasets.Dataset) -> _Subject:
    """A multilayer perceptron, fresh or trained first."""
    loss = LOSSES[args.loss or ("softmax" if data.classes else "squared")]
    y, outputs = targets_of(data, loss)
    parts = [np.arange(len(y)), np.arange(0)]
    if args.train:
        parts = datasets.split(len(y), (0.2,), args.seed)
        if min(map(len, parts)) == 0:
            raise ValueError(f"{data.name}: {len(y)} rows are too few to train on 80 % of them")
    mean, scale = np.zeros(data.x.shape[1]), np.ones(data.x.shape[1])
    if not args.raw:
        mean, scale = _moments(data.x[parts[0]])
    units = None
    if isinstance(loss, losses.SquaredError | losses.Huber) and not args.raw:
        units = _moments(y[parts[0]])
    x, y = _scaled(data.x, (mean, scale)), _scaled(y, units)
    widths = (64,) if args.hidden is None else args.hidden
    net = mlp((x.shape[1], *widths, outputs), ACTIVATIONS[args.activation or "tanh"]())
    fresh = net.init(jax.random.key(args.seed))
    if not args.train:
        about = f"A fresh network, seed {args.seed}."
        return _Subject(net, loss, fresh, None, None, x, y, data.classes, units, about)
    train, validation = ((x[i], y[i]) for i in parts)
    learnt = fit(
        net,
        loss,
        fresh,
        train,
        optax.adam(args.learning_rate or 1e-3),
        epochs=args.train,
        batch_size=min(32, len(train[0])),
        key=jax.random.key(args.seed + 1),
        validation=validation,
        metrics=metrics_of(loss, np.ones(outputs) if units is None else units[1]),
        progress=False if args.json else None,
    )
    about = f"Trained on {len(train[0]):,} of all rows for {args.train:,} epochs."
    return _Subject(
        net, loss, learnt.params, fresh, learnt.history, x, y, data.classes, units, about
    )


def _saved(args: argparse.Namespace, data: datasets.Dataset) -> _Subject:
    """A saved network, and the data as its notes want them."""
    for name in _FRESH:
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is for a network made here: leave it out with --model")
    saved = load(args.model)
    loss = LOSSES[args.loss] if args.loss else saved.loss
    if loss is None:
        raise ValueError(f"{args.model} was saved without a loss: give one by --loss")
    notes = saved.notes if isinstance(saved.notes, dict) else {}
    y, outputs = targets_of(data, loss)
    labelled = isinstance(loss, losses.SoftmaxCrossEntropy | losses.SigmoidCrossEntropy)
    classes = data.classes if labelled else ()
    if labelled and notes.get("classes"):
        classes = tuple(map(str, notes["classes"]))
        y = _mapped(args, data, classes).reshape(y.shape).astype(y.dtype)
    features = _pair_of(notes, "mean", "scale")
    if features is not None and features[0].size != data.x.shape[1]:
        raise ValueError(
            f"{args.model} was trained on {features[0].size} features, but {data.name} has "
            f"{data.x.shape[1]}"
        )
    units = None if labelled else _pair_of(notes, "target_mean", "target_scale")
    if units is not None and units[0].size != outputs:
        raise ValueError(
            f"{args.model} was trained on {units[0].size} targets, but {data.name} has {outputs}"
        )
    if units is not None and not np.any(units[0]) and np.all(units[1] == 1):
        units = None
    x, y = _scaled(data.x, features), _scaled(y, units)
    if args.shape:
        if int(np.prod(args.shape)) != x.shape[1]:
            raise ValueError(
                f"--shape {'x'.join(map(str, args.shape))} has {int(np.prod(args.shape))} entries, "
                f"but an example of {data.name} has {x.shape[1]}"
            )
        x = x.reshape(-1, *args.shape)
    jax.eval_shape(lambda p, x: forward(saved.net, p, x)[0], saved.params, x[:1])  # it may raise
    about = f"Saved by jbackprop {saved.version}; compared with fresh weights, seed {args.seed}."
    if features is None:
        about += " No notes of how its features were standardised: they are as they are."
    fresh = saved.net.init(jax.random.key(args.seed))
    return _Subject(saved.net, loss, saved.params, fresh, None, x, y, classes, units, about)


def _mapped(
    args: argparse.Namespace, data: datasets.Dataset, classes: tuple[str, ...]
) -> np.ndarray:
    """The labels in the model's order of classes, found by their names."""
    unknown = [name for name in data.classes if name not in classes]
    if unknown:
        raise ValueError(
            f"{data.name} has the class {unknown[0]!r}, which {args.model} does not know; it knows "
            f"{', '.join(classes)}"
        )
    assert data.labels is not None
    return np.array([classes.index(name) for name in data.classes], np.int32)[data.labels]


def _pair_of(notes: dict[str, Any], mean: str, scale: str) -> tuple[np.ndarray, np.ndarray] | None:
    if mean not in notes or scale not in notes:
        return None
    try:
        pair = np.asarray(notes[mean], float).ravel(), np.asarray(notes[scale], float).ravel()
    except (TypeError, ValueError):
        return None
    return pair if pair[0].size == pair[1].size else None


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = values.std(0)
    return values.mean(0), np.where(scale == 0, 1, scale)


def _scaled(values: np.ndarray, moments: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Standardised, and in float32; labels as they are."""
    if values.dtype.kind != "f":
        return values
    if moments is not None:
        values = (values - moments[0]) / moments[1]
    return values.astype(np.float32)


def _read_log(path: Path) -> dict[str, list[Any]]:
    """A log of `jbackprop train --log`, by column."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"--log {path}: the name must end in .csv or .jsonl")
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
        else:
            try:
                rows = [json.loads(line) for line in file if line.strip()]
            except json.JSONDecodeError as error:
                raise ValueError(f"--log {path}: it is no log: {error}") from None
    if not rows or not all(isinstance(row, dict) and "loss" in row for row in rows):
        raise ValueError(f'--log {path}: it is no log of a training: it has no column "loss"')
    names = [name for name in rows[0] if name and name != "time"]
    try:
        return {name: [_value(row.get(name)) for row in rows] for name in names}
    except ValueError as error:
        raise ValueError(f"--log {path}: it is no log of a training: {error}") from None


def _value(cell: Any) -> float | None:
    return None if cell is None or cell == "" else float(cell)
