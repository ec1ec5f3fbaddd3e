"""jbackprop train: a multilayer perceptron on a table of numbers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jbackprop import datasets, layers, losses, metrics
from jbackprop.cli.output import print_json, say_of
from jbackprop.cli.parsed import add_data, batch, positive, rate, shares, sizes
from jbackprop.compose import mlp
from jbackprop.saved import save
from jbackprop.summary import summary
from jbackprop.sweep import Node
from jbackprop.table import render
from jbackprop.train import CSVLogger, EarlyStopping, JSONLinesLogger, evaluate, fit

ACTIVATIONS: dict[str, Callable[[], Node]] = {
    cls.__name__.lower(): cls
    for cls in (
        layers.Celu, layers.Elu, layers.Gelu, layers.HardTanh, layers.Identity, layers.LeakyRelu,
        layers.Mish, layers.Relu, layers.Selu, layers.Sigmoid, layers.Silu, layers.Softplus,
        layers.Softsign, layers.Tanh,
    )
}  # fmt: skip
LOSSES = {
    "softmax": losses.SoftmaxCrossEntropy(),
    "sigmoid": losses.SigmoidCrossEntropy(),
    "squared": losses.SquaredError(),
    "huber": losses.Huber(),
    "poisson": losses.PoissonNLL(),
}
OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
    "adam": optax.adam,
    "adamw": optax.adamw,
}


def add(commands: Any) -> None:
    """Tell the parser of the command."""
    train = commands.add_parser(
        "train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="train a multilayer perceptron on a table",
        description="Train a multilayer perceptron by the delta rule on a table of numbers.",
        epilog="examples:\n"
        "  jbackprop train iris\n"
        "  jbackprop train digits --hidden 128,64 --activation relu --epochs 30\n"
        "  jbackprop train measurements.csv --target yield --loss huber --patience 20\n"
        "  jbackprop train arrays.npz --save model.npz --json\n\n"
        "what --save writes is for jbackprop.load: the network, its weights and its loss, and as\n"
        "notes the classes, and the mean and scale of the features and of the targets.",
    )
    add_data(train)
    train.add_argument(
        "--hidden", type=sizes, default=(64,), help="widths of hidden layers, such as 128,64; "
        "'none' for no hidden layer; default: 64",
    )  # fmt: skip
    train.add_argument(
        "--activation", choices=sorted(ACTIVATIONS), default="tanh", metavar="NAME",
        help=f"of the hidden units: {', '.join(sorted(ACTIVATIONS))}; default: tanh",
    )  # fmt: skip
    train.add_argument(
        "--loss", choices=sorted(LOSSES),
        help="default: softmax for classes, squared for real targets",
    )  # fmt: skip
    train.add_argument(
        "--optimizer", choices=sorted(OPTIMIZERS), default="adam", help="default: adam"
    )
    train.add_argument("--learning-rate", type=rate, default=1e-3, help="default: %(default)s")
    train.add_argument("--epochs", type=positive, default=50, help="default: %(default)s")
    train.add_argument(
        "--batch-size", type=batch, default=32,
        help="examples in a mini-batch, or 'all' for batch gradient descent; default: 32",
    )  # fmt: skip
    train.add_argument(
        "--patience", type=positive,
        help="stop after so many epochs without a better validation loss, and keep the best",
    )  # fmt: skip
    train.add_argument(
        "--shares", type=shares, default=(0.1, 0.2), metavar="V,T",
        help="shares of the rows to validate and to test on; default: 0.1,0.2",
    )  # fmt: skip
    train.add_argument(
        "--raw", action="store_true", help="standardise neither features nor targets"
    )
    train.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    train.add_argument("--save", type=Path, metavar="FILE.npz", help="where to save the network")
    train.add_argument(
        "--checkpoints", type=Path, metavar="FOLDER", help="where to keep the run every epoch; if "
        "there is one, go on with it. SIGTERM then ends with the exit status 75",
    )  # fmt: skip
    train.add_argument(
        "--log", type=Path, metavar="FILE", help="log every epoch, as .csv or .jsonl"
    )
    train.add_argument(
        "--nonfinite", choices=("raise", "skip", "rollback"), default="raise",
        help="what to do about a step that is not finite; default: raise",
    )  # fmt: skip
    train.add_argument("--quiet", action="store_true", help="no progress")
    train.set_defaults(run=run_train)
    train.add_argument("--json", action="store_true", help="print JSON on standard output")


def run_train(args: argparse.Namespace) -> int:
    """The command."""
    say = say_of(args)
    if args.save and args.save.suffix != ".npz":
        raise ValueError(f"--save {args.save}: the name must end in .npz")
    if args.save and not args.save.parent.is_dir():
        raise FileNotFoundError(f"--save {args.save}: there is no folder {args.save.parent}")
    data = datasets.load(args.data, args.target)
    loss = LOSSES[args.loss or ("softmax" if data.classes else "squared")]
    y, outputs = targets_of(data, loss)
    parts = datasets.split(len(data.x), args.shares, args.seed)
    if min(map(len, parts)) == 0:
        raise ValueError(f"{data.name}: {len(data.x)} rows are too few for shares {args.shares}")
    mean, scale = np.zeros(data.x.shape[1]), np.ones(data.x.shape[1])
    if not args.raw:
        mean, scale = data.x[parts[0]].mean(0), data.x[parts[0]].std(0)
        scale = np.where(scale == 0, 1, scale)
    x = ((data.x - mean) / scale).astype(np.float32)
    y_mean, y_scale = np.zeros(outputs), np.ones(outputs)
    standardised = isinstance(loss, losses.SquaredError | losses.Huber) and not args.raw
    if standardised:
        y_mean, y_scale = y[parts[0]].mean(0), y[parts[0]].std(0)
        y_scale = np.where(y_scale == 0, 1, y_scale)
        y = (y - y_mean) / y_scale
    y = y.astype(np.float32) if y.dtype.kind == "f" else y
    train, validation, test = ((x[i], y[i]) for i in parts)
    sizes = (x.shape[1], *args.hidden, outputs)
    net = mlp(sizes, ACTIVATIONS[args.activation]())
    labelled = isinstance(loss, losses.SoftmaxCrossEntropy | losses.SigmoidCrossEntropy)
    kind = f"{len(data.classes)} classes" if labelled else f"{outputs} real targets"
    say(f"{data.name}: {len(x)} rows, {x.shape[1]} features, ", end="")
    say(f"{kind}\n")
    say(summary(net, x.shape[1:]))
    if standardised:
        say("\nthe targets are standardised: the loss is in units of their variance, ", end="")
        say("the absolute error in their own")
    measures = metrics_of(loss, y_scale)
    start = time.perf_counter()
    learnt = fit(
        net,
        loss,
        net.init(jax.random.key(args.seed)),
        train,
        OPTIMIZERS[args.optimizer](args.learning_rate),
        epochs=args.epochs,
        batch_size=None if args.batch_size is None else min(args.batch_size, len(train[0])),
        key=jax.random.key(args.seed + 1),
        validation=validation,
        metrics=measures,
        early_stopping=EarlyStopping(args.patience) if args.patience else None,
        callbacks=[_logger(args.log, args.checkpoints)] if args.log else [],
        checkpoints=args.checkpoints,
        resume=args.checkpoints is not None,
        nonfinite=args.nonfinite,
        progress=False if args.quiet else None,
    )
    seconds = time.perf_counter() - start
    found = {
        name: evaluate(net, loss, learnt.params, part, measures)
        for name, part in (("training", train), ("validation", validation), ("test", test))
    }
    columns = ("", *(f">{name}" for name in found["test"]))
    rows = [(name, *(f"{v:.4g}" for v in values.values())) for name, values in found.items()]
    say(f"\n{loss}, {len(learnt.history['loss'])} epochs ({learnt.stopped}) in {seconds:.1f} s\n")
    say(render(columns, rows))
    if args.save:
        notes = {
            "classes": data.classes, "mean": mean.tolist(), "scale": scale.tolist(),
            "target_mean": y_mean.tolist(), "target_scale": y_scale.tolist(),
        }  # fmt: skip
        save(args.save, net, learnt.params, loss=loss, notes=notes)
        say(f"\nsaved in {args.save}")
    if args.json:
        print_json(
            found
            | {"epochs": len(learnt.history["loss"]), "stopped": learnt.stopped,
               "best_epoch": learnt.best_epoch, "seconds": seconds, "history": learnt.history}
        )  # fmt: skip
    return 0


def _logger(path: Path, checkpoints: Path | None) -> Callable[[Any], None]:
    """By the ending of its name; with checkpoints the same command begins anew, or goes on."""
    kinds: dict[str, Any] = {".csv": CSVLogger, ".jsonl": JSONLinesLogger}
    if path.suffix not in kinds:
        raise ValueError(f"--log {path}: the name must end in {' or '.join(kinds)}")
    return kinds[path.suffix](path, overwrite=checkpoints is not None)


def targets_of(data: datasets.Dataset, loss: losses.Loss) -> tuple[np.ndarray, int]:
    """Targets as the loss wants them, and how many outputs that needs."""
    if isinstance(loss, losses.SoftmaxCrossEntropy):
        if data.labels is None:
            raise ValueError(f"{data.name} has real targets: --loss softmax needs classes")
        return data.labels, len(data.classes)
    if isinstance(loss, losses.SigmoidCrossEntropy):
        if data.labels is None or len(data.classes) != 2:
            raise ValueError(
                f"{data.name} has {len(data.classes) or 'no'} classes: --loss sigmoid needs two"
            )
        return data.labels.reshape(-1, 1).astype(np.float32), 1
    if data.values is None:
        raise ValueError(f"{data.name}: the targets are words, but this loss needs numbers")
    return data.values, data.values.shape[1]


def metrics_of(loss: losses.Loss, scale: np.ndarray) -> dict[str, Any]:
    """What is measured beside the loss; errors in the units of the targets as they came."""
    if isinstance(loss, losses.SoftmaxCrossEntropy):
        return {"accuracy": metrics.accuracy}
    if isinstance(loss, losses.SigmoidCrossEntropy):
        return {"accuracy": metrics.binary_accuracy}
    if isinstance(loss, losses.PoissonNLL):
        return {}
    scale = scale[None].astype(np.float32)
    return {"absolute_error": lambda z, y: metrics.absolute_error(z * scale, y * scale)}
