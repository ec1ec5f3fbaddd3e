"""The training loop: gradient descent by the delta rule, with any Optax optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import jax
import optax
from jax import Array
from jax.sharding import Mesh

from jbackprop.averages import AveragesByPath, check_folds
from jbackprop.checks import check_key, flag_of, function_of, size_of
from jbackprop.credit import Rule, State
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.sharding import Sharding
from jbackprop.sweep import Node
from jbackprop.train.accounting import Privacy
from jbackprop.train.checkpoints import Checkpoints, Store
from jbackprop.train.checks import Fitting, check_batch_size, check_metrics
from jbackprop.train.data import Loaded, examples_of
from jbackprop.train.evaluation import Metric, evaluated
from jbackprop.train.kept import Kept, check_agreed, configuration_of, monitoring
from jbackprop.train.placement import Placement
from jbackprop.train.preemption import Watch
from jbackprop.train.private import Private, PrivateRun
from jbackprop.train.progress import Progress
from jbackprop.train.ruled import RuledRun
from jbackprop.train.run import Run
from jbackprop.train.step import NonFinite, Task
from jbackprop.train.stopping import EarlyStopping, Keeper


@dataclasses.dataclass(frozen=True)
class Epoch:
    """What a callback sees after each epoch.

    Attributes:
        number: of the epoch, from 1.
        params: the parameters by now.
        opt_state: the optimizer's state.
        history: all values so far, the last of each list those of this epoch.
        rule_state: the state of the rule that assigns credit, where one was given.
    """

    number: int
    params: PyTree
    opt_state: PyTree
    history: Mapping[str, list[float]]
    rule_state: State | None = None


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` has learnt.

    Attributes:
        params: the parameters: the last ones, or with early stopping the best.
        opt_state: the optimizer's last state.
        history: by name, one value for each epoch: "loss" and the metrics, means over the epoch's
            training examples as they were seen while learning; with validation data the same names
            with "validation_" in front, after the epoch.
        stopped: "finished", "early", "callback" or "interrupted" (Ctrl-C).
        best_epoch: with early stopping the epoch, from 1, that params are from; else None.
        averages: by path, the statistics of every batch norm under params: means over the training
            data, in mini-batches as in training. `fold_batch_norm(net, params, averages)` is the
            network to predict and evaluate with. {} where there is no batch norm.
        privacy: (epsilon, delta) and what they follow from, with `private`; else None.
        rule_state: the last state of the `rule`; else None.
        skipped: steps whose work was thrown away, as `nonfinite` has it.
        resumed_from: the step of the checkpoint that training went on from; None: from none.
    """

    params: PyTree
    opt_state: PyTree
    history: dict[str, list[float]]
    stopped: str
    best_epoch: int | None
    averages: AveragesByPath = dataclasses.field(default_factory=dict)
    privacy: Privacy | None = None
    rule_state: State | None = None
    skipped: int = 0
    resumed_from: int | None = None


def fit(
    net: Node,
    loss: Loss,
    params: PyTree,
    data: Any,
    optimizer: optax.GradientTransformation,
    *,
    epochs: int,
    batch_size: int | None = None,
    key: Array,
    validation: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    callbacks: Iterable[Callable[[Epoch], Any]] = (),
    early_stopping: EarlyStopping | None = None,
    private: Private | None = None,
    rule: Rule | None = None,
    mesh: Mesh | None = None,
    sharding: Sharding | None = None,
    checkpoints: Checkpoints | str | None = None,
    resume: bool = False,
    nonfinite: NonFinite = "raise",
    progress: bool | None = None,
) -> Fit:
    """Train a network by the delta rule.

    The same key on the same machine gives the same result, bit by bit; also where it was killed and
    resumed in between.

    Args:
        net: a layer or a composite.
        loss: a `Loss`.
        params: where to start from; left as they are.
        data: (x, y), NumPy or JAX arrays with the examples along the first axis; floating-point x
            are cast to the parameters' dtype. Where one of them is a NumPy memory map, only the
            batches that are due are read, checked and cast, ahead of time. Or a loader: an iterable
            of batches (x, y), gone through once in each epoch, or a function from the number of an
            epoch (from 1) to one; see below.
        optimizer: from Optax.
        epochs: how often to go through the data.
        batch_size: None for batch gradient descent, 1 for stochastic, else mini-batches. Each step
            follows the mean gradient of its batch; the ragged last batch of an epoch takes part,
            and counts in the history for as many examples as it has. None with a loader.
        key: shuffles the data, anew in each epoch (not in batch gradient descent), and serves
            layers that draw.
        validation: (x, y), or a loader, to evaluate on after each epoch; with batch norms folded,
            see `Fit`.
        metrics: by name, functions (outputs, targets) -> (B,); see `jbackprop.metrics`.
        callbacks: each is called with an `Epoch` after every epoch; training stops when one returns
            something true.
        early_stopping: when to stop; the best parameters are then returned.
        private: to train with differential privacy, see `Private`: in about n / batch_size steps an
            epoch each example takes part by chance, and batch_size is what is expected of a
            mini-batch. What was given away is in the `privacy` of the result, which needs
            `pip install 'jbackprop[private]'`; history and callbacks are not private. Optimizers
            that search along a line are refused the cost, which is not either.
        rule: to assign credit in another way than by backpropagation, see `jbackprop.credit`: what
            it has for the gradient goes to the optimizer, and "loss" in the history is what it
            reduces, beside what else it tells of itself. Validation is of the outputs as the rule
            has them. Its state is in the result and in what callbacks see. Optimizers that search
            along a line, or ask for the curvature, are refused: the direction is none of theirs.
        mesh: the devices, a `jax.sharding.Mesh` as of `jax.make_mesh`; of explicit or automatic
            axes. None for one device.
        sharding: what is split over which axis of the mesh, see `jbackprop.sharding`; by default
            `data_parallel()`: the examples over the axis "data".
        checkpoints: where to keep the run, a `Checkpoints` or just a folder. SIGTERM then ends
            training by `Preempted`, a SystemExit of status 75, when the step is finished and a
            checkpoint written; where it comes in the middle of validation, after that.
        resume: go on from the last good checkpoint, if there is one, with all the same arguments
            (`epochs` may be more, `mesh` and `sharding` others). On the same devices that gives
            the bits of a run that was never stopped, on others the same to rounding. False: a
            folder that holds a run is refused.
        nonfinite: what to do about a loss or an update that is not finite. "raise": a
            `NonFiniteError`. "skip": leave that step out. "rollback": back to where all was well
            last, at most 200 steps before, and on with the batches behind (Chowdhery et al., PaLM:
            scaling language modeling with pathways (2022), section 5.1). The steps without effect
            are counted, in the history as "skipped"; after 100 skipped in a row, or 10 times back,
            it raises.
        progress: whether to show progress on stderr; None: a bar for a terminal or a notebook,
            lines for a log file.

    Returns:
        A `Fit`. Ctrl-C ends training and returns what was learnt up to the last full step.

    Raises:
        NonFiniteError: the loss or an update is not finite; says at which step and in which layer
            that began, and carries the parameters before it.
        CheckpointError: a checkpoint that cannot be written, is damaged beyond use, or is of
            another run.
        ValueError, TypeError: data, parameters or options that do not fit; before the first step,
            for memory maps and loaders at the batch.

    Loaders: where an iterator has `get_state` and `set_state`, as those of `grain` have, `resume`
    takes it up by them in the middle of an epoch; any other is gone through from its beginning, and
    must give the same batches again.

    With several processes (`jax.distributed`) all of them make the same call, with a mesh of all
    their devices. Arrays and memory maps all of them must see whole, and each reads the rows of its
    own devices; the order depends on the key alone. A loader gives each process its own part of
    every batch, to all equally many of equal sizes.
    """
    options = {"rule": rule, "early_stopping": early_stopping, "private": private}
    for option, kind in zip(options, (Rule, EarlyStopping, Private), strict=True):
        if not isinstance(options[option], kind | None):
            raise TypeError(
                f"{option} must be a jbackprop {kind.__name__}, not {options[option]!r}"
            )
    check_key(key)
    epochs = size_of(epochs, "epochs")
    resume = flag_of(resume, "resume")
    progress = None if progress is None else flag_of(progress, "progress")
    hooks = tuple(function_of(hook, "each of callbacks") for hook in callbacks)
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be one of Optax's, such as optax.adam(1e-3): {optimizer}")
    if nonfinite not in get_args(NonFinite):
        raise ValueError(f'nonfinite must be "raise", "skip" or "rollback", not {nonfinite!r}')
    if resume and checkpoints is None:
        raise ValueError("resume=True goes on from a checkpoint: say where, checkpoints=folder")
    if rule is not None and private is not None:
        raise ValueError(
            "private training clips the gradients of backpropagation: give private or rule"
        )
    if mesh is None and jax.process_count() > 1:
        raise ValueError(
            f"there are {jax.process_count()} processes: give mesh=, one of all their devices, "
            'such as jax.make_mesh((jax.device_count(),), ("data",))'
        )
    needs = Fitting(net, loss, params, rule)
    place = Placement(net, params, mesh, sharding)
    given = examples_of("data", needs, data, place)
    held_out = None if validation is None else examples_of("validation", needs, validation, place)
    if held_out:
        check_folds(net)
    if isinstance(given, Loaded) and batch_size is not None:
        raise ValueError("batch_size is the loader's to choose: give None with a loader")
    size = 0 if isinstance(given, Loaded) else check_batch_size(batch_size, given.n)
    names = check_metrics(metrics)
    recorded = ["loss", *dict(names)]
    recorded += [f"validation_{name}" for name in recorded] if held_out else []
    _check_monitor(early_stopping, recorded, private)
    task = Task(net, loss, optimizer, names, rule, nonfinite)
    history: dict[str, list[float]] = {}
    kept = None
    first, stopped, resumed_from = 1, "finished", None
    with place.entered():
        if rule is not None:
            run: Run = RuledRun(task, params, given, size, key, place)
        elif private is None:
            run = Run(task, params, given, size, key, place)
        else:
            run = PrivateRun(private, epochs, task, params, given, size, key, place)
        keeper = Keeper(early_stopping, run.params)
        about = {}
        if checkpoints is not None or jax.process_count() > 1:
            about = configuration_of(task, given, size, key, recorded, private, run.privacy())
            check_agreed(about)
        if checkpoints is not None:
            if not isinstance(checkpoints, Checkpoints):
                checkpoints = Checkpoints(checkpoints)
            kept = Kept(Store(monitoring(checkpoints, recorded), about), run, keeper, history)
            first, stopped, resumed_from = kept.restore(resume, epochs)
    bar = Progress(epochs, progress if jax.process_index() == 0 else False, first - 1)
    watch = Watch(kept is not None)
    try:
        with watch:
            for number in range(first, epochs + 1) if stopped == "finished" else ():
                with place.entered():
                    values = run.epoch(number, history, _each(run, kept, watch, number, history))
                    if held_out:
                        fixed, own = run.folded()
                        found = evaluated(
                            fixed, loss, own, held_out, names, run.states()[1], place
                        )  # fmt: skip
                        values |= {f"validation_{name}": value for name, value in found.items()}
                keeper.look(number, values, run.params)
                for name, value in values.items():
                    history.setdefault(name, []).append(value)
                bar.epoch(number, values)
                now, opt_state, rule_state = place.handed_back((run.params, *run.states()))
                seen = Epoch(number, now, opt_state, history, rule_state)
                if any([bool(callback(seen)) for callback in hooks]):  # noqa: C419, call every one
                    stopped = "callback"
                elif keeper.exhausted(number):
                    stopped = "early"
                if kept is not None:
                    with place.entered():
                        kept.save(number + 1, values, stopped)
                        if watch.came(run.at.step):
                            kept.leave()
                if stopped != "finished":
                    break
    except KeyboardInterrupt:
        stopped = "interrupted"
        run.settle()
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            error.add_note(
                f"in process {jax.process_index()} of {jax.process_count()}, about step "
                f"{run.at.step}: most likely another process has died. Start all of them again"
                + (", with resume=True" if kept else "")
            )
        raise
    finally:
        bar.close()
        if kept is not None:
            kept.close()
    best_epoch = keeper.epoch if early_stopping else None
    best = run.params if best_epoch is None else keeper.params
    with place.entered():
        averages = run.averages(best)
    best, averages, opt_state, rule_state = place.handed_back((best, averages, *run.states()))
    return Fit(
        best, opt_state, history, stopped, best_epoch, averages, run.privacy(), rule_state,
        run.at.lost_before + run.at.lost, resumed_from,
    )  # fmt: skip


def _check_monitor(
    early_stopping: EarlyStopping | None, recorded: list[str], private: Private | None
) -> None:
    if early_stopping is None:
        return
    monitor = early_stopping.monitor
    if monitor not in recorded:
        raise ValueError(
            f"EarlyStopping watches {monitor!r}, but the history will have {', '.join(recorded)}; "
            "give validation data, or another monitor"
        )
    if private is not None and not monitor.startswith("validation_"):
        raise ValueError(
            f"EarlyStopping watches {monitor!r}, which is of the private data: give validation "
            "data, and monitor its loss or metrics"
        )


def _each(
    run: Run, kept: Kept | None, watch: Watch, number: int, history: Any
) -> Callable[[], None]:
    """What comes after every step but the last of an epoch."""

    def each() -> None:
        if kept is None:
            return
        came, every = watch.came(run.at.step), kept.store.options.every
        if came:
            run.stop(history)
        elif every is not None and run.at.step % every == 0:
            run.look(history)
        else:
            return
        kept.save(number)
        if came:
            kept.leave()

    return each
