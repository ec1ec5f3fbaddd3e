"""A training step, and an epoch, as people write them: gradient, Optax, and what is around it.

Steps are of Adam and start with its first state. The Flax and Equinox steps are jitted by their own
means where these have some, and called from Python like everybody's. An epoch is of plain SGD with
momentum over scikit-learn's digits in one order, so that all end with the same parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jbackprop as jb
from jbackprop.bench.declare import Absent, Contestant, Outside, Workload, peer
from jbackprop.bench.plain import perceptron
from jbackprop.bench.plain.transformer import Arrangement, Sizes, model
from jbackprop.bench.suite import flops
from jbackprop.bench.suite.mlp import ACTIVATIONS, LOSS, named
from jbackprop.bench.suite.transformer import Order, model_data

Function = Callable[..., Any]
RATE = 1e-3
ADAM = optax.adam(RATE)


def step(both: Function) -> Function:
    """((params, state), x, y) -> (value, (params, state)) after a step of Adam."""

    def run(carried: Any, x: Any, y: Any) -> Any:
        params, state = carried
        value, grads = both(params, x, y)
        updates, state = ADAM.update(grads, state, params)
        return value, (optax.apply_updates(params, updates), state)

    return run


def stepping(
    name: str, both: Function, kind: str, pack: Function = lambda p: p,
    unpack: Function = lambda p: p, jit: bool = True,
) -> Contestant:  # fmt: skip
    """A contestant that takes a step; only its parameters are compared."""

    def begin(params: Any) -> Any:
        packed = pack(params)
        return packed, ADAM.init(packed)

    return Contestant(name, step(both), kind, begin, lambda found: unpack(found[0]), jit)


def perceptrons(sizes: Sequence[int], activation: str) -> list[Contestant | Absent]:
    """Everybody, with a perceptron."""
    net = jb.mlp(sizes, ACTIVATIONS[activation])

    def flax() -> Contestant:
        """A `TrainState` under `jax.jit`, as in Flax's own examples."""
        from flax.training.train_state import TrainState

        cost = perceptron.flax(activation, sizes)

        @jax.jit
        def run(state: Any, x: Any, y: Any) -> Any:
            value, grads = jax.value_and_grad(cost)(state.params, x, y)
            return value, state.apply_gradients(grads=grads)

        def begin(params: Any) -> Any:
            return TrainState.create(apply_fn=cost, params=perceptron.to_flax(params), tx=ADAM)

        return Contestant(
            "", run, "", begin, lambda state: perceptron.from_flax(state.params), jit=False
        )

    def equinox() -> Contestant:
        """`eqx.filter_jit` and `eqx.filter_value_and_grad`, as in Equinox's own examples."""
        import equinox as eqx

        cost = perceptron.equinox(activation)

        @eqx.filter_jit
        def run(carried: Any, x: Any, y: Any) -> Any:
            net, state = carried
            value, grads = eqx.filter_value_and_grad(cost)(net, x, y)
            updates, state = ADAM.update(grads, state, eqx.filter(net, eqx.is_inexact_array))
            return value, (eqx.apply_updates(net, updates), state)

        def begin(params: Any) -> Any:
            made = perceptron.to_equinox(params)
            return made, ADAM.init(eqx.filter(made, eqx.is_inexact_array))

        return Contestant(
            "", run, "", begin, lambda found: perceptron.from_equinox(found[0]), jit=False
        )

    return [
        stepping("jax.value_and_grad, Optax", perceptron.plain(activation), "plain"),
        stepping("ours, Optax", jb.value_and_grad(net, LOSS), "ours"),
        peer("Flax, Optax", "flax", "flax", flax),
        peer("Equinox, Optax", "equinox", "equinox", equinox),
    ]


def language_models(sizes: Sizes) -> list[Contestant]:
    """Everybody, with a transformer."""
    net = jb.transformer(sizes.vocab, sizes.width, sizes.depth, sizes.heads, sizes.length)
    order = Order(net)
    lean = Arrangement(("block",), flat=False)
    return [
        stepping("jax.value_and_grad, Optax", model(Arrangement(flat=False), sizes), "plain"),
        stepping("checkpoint around a block, Optax", model(lean, sizes), "idiomatic"),
        stepping("ours, Optax", jb.value_and_grad(net, LOSS), "ours", order.pack, order.unpack),
    ]


RATES, SIZE = (0.1, 0.9), 32
"""Learning rate and momentum of the epochs, and their mini-batch."""
DIGITS = (64, 64, 10)


def digits() -> tuple[Any, Any, Any]:
    """A perceptron's parameters; scikit-learn's 1,797 digits, in one order."""
    from jbackprop import datasets

    table = datasets.load("digits")
    params, *_ = perceptron.data(DIGITS, 1)
    return params, jnp.asarray(table.x / 16, jnp.float32), jnp.asarray(table.labels)


def sgd() -> Any:
    """Of the epochs."""
    return optax.sgd(*RATES)


def epoch(both: Function) -> Function:
    """(params, x, y) -> ((), params) after an epoch: a jitted step in a Python loop."""
    tx, size = sgd(), SIZE

    @jax.jit
    def one(carried: Any, x: Any, y: Any) -> Any:
        params, state = carried
        _, grads = both(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run(params: Any, x: Any, y: Any) -> Any:
        carried = params, tx.init(params)
        for start in range(0, len(x), size):
            carried = one(carried, x[start : start + size], y[start : start + size])
        return (), carried[0]

    return run


def by_fit(net: Any) -> Function:
    """The same by `jb.fit`, with all that it does beside: what is not finite is found, and kept."""
    size, tx = SIZE, sgd()

    def run(params: Any, x: Any, y: Any) -> Any:
        def batches(_: int) -> Iterator[Any]:
            for start in range(0, len(x), size):
                yield x[start : start + size], y[start : start + size]

        found = jb.fit(
            net, LOSS, params, batches, tx, epochs=1, key=jax.random.key(0), progress=False
        )
        return (), found.params

    return run


def epochs() -> list[Contestant]:
    """Everybody, for an epoch."""
    net = jb.mlp(DIGITS, jb.Tanh())
    return [
        Contestant("jax.value_and_grad, a loop", epoch(perceptron.plain("tanh")), "plain",
                   jit=False),
        Contestant("ours, a loop", epoch(jb.value_and_grad(net, LOSS)), "ours", jit=False),
        Contestant("jb.fit", by_fit(net), "variant", jit=False),
    ]  # fmt: skip


def _step(sizes: Sequence[int], activation: str, batch: int, level: int) -> Workload:
    return Workload(
        f"step of Adam, {named(sizes)} {activation}, batch {batch}",
        "mlp",
        functools.partial(perceptron.data, sizes, batch),
        functools.partial(perceptrons, sizes, activation),
        question="step",
        outside=[Outside("pytorch.py", f"mlp {activation}")],
        flops=flops.mlp(sizes, batch),
        level=level,
        tolerance=1e-3,  # Adam divides by a gradient's size, however small that is
    )


def _model_step(sizes: Sizes, level: int) -> Workload:
    rows = sizes.batch * sizes.length
    return Workload(
        f"step of Adam, transformer, language model, {sizes}",
        "transformer",
        functools.partial(model_data, sizes),
        functools.partial(language_models, sizes),
        question="step",
        flops=flops.transformer(
            sizes.depth, sizes.batch, sizes.length, sizes.width, sizes.vocab, rows
        ),
        level=level,
        tolerance=1e-3,
    )


WORKLOADS = (
    _step((784, 512, 512, 10), "relu", 128, 0),
    _step((64, 32, 10), "tanh", 32, 1),
    _model_step(Sizes(128, 6, 4, 64, 16), 1),
    Workload(
        f"epoch of 1,797 digits, {named(DIGITS)} tanh, batch 32",
        "mlp",
        digits,
        epochs,
        question="epoch",
        outside=[Outside("scikit_learn.py", f"tanh {RATES[0]} {RATES[1]} {SIZE}")],
        flops=flops.mlp(DIGITS, 1797),
        level=1,
        tolerance=1e-3,
    ),
)
