"""What training refuses: before it begins, or, of data that come piece by piece, as they come."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbackprop import mesh
from jbackprop.calls import check_loss, check_net
from jbackprop.checks import check_params, size_of
from jbackprop.credit import Rule, State
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.sweep import Node, batch_size, forward


@dataclasses.dataclass(frozen=True)
class Fitting:
    """What examples must be like, to be learnt from or evaluated.

    Attributes:
        net, loss, params: of the network.
        rule: a rule that is to learn from them, or one's state that has learned and gives the
            outputs: it says itself what does not fit.
    """

    net: Node
    loss: Loss
    params: PyTree
    rule: Rule | State | None = None

    def __post_init__(self) -> None:
        check_net(self.net)
        check_loss(self.loss)
        check_params(self.params)

    @functools.cached_property
    def dtype(self) -> Any:
        """What floating-point inputs are cast to: the dtype of the parameters."""
        leaves = jax.tree.leaves(self.params)
        return jnp.result_type(*leaves) if leaves else jnp.result_type(float)

    def cast(self, dtype: Any) -> Any:
        """What inputs of a dtype become."""
        return self.dtype if jnp.issubdtype(dtype, jnp.floating) else dtype

    def values(self, name: str, x: Any, y: Any) -> Any:
        """The inputs in the dtype of the parameters, where all values are numbers and finite."""
        for part, tree in (("x", x), ("y", y)):
            for leaf in jax.tree.leaves(tree):
                _check_finite(name, part, leaf)
        return jax.tree.map(lambda leaf: _to(name, leaf, self.dtype), x)

    def shapes(self, x: Any, y: Any) -> tuple[int, ...] | None:
        """Raise where the network, the loss or the rule cannot take them; the outputs' shape."""
        if isinstance(self.rule, Rule):
            self.rule.check(self.net, self.loss, self.params, x, y)
            return None
        if self.rule is not None:
            outputs = jax.eval_shape(self.rule.rule.outputs, self.rule, mesh.shapes(self.params), x)
        else:
            params = mesh.shapes(self.params)
            outputs = jax.eval_shape(lambda p, x: forward(self.net, p, x)[0], params, x)
        self.loss.check(outputs.shape, y)
        return tuple(outputs.shape[1:])


@dataclasses.dataclass(frozen=True)
class Examples:
    """Arrays of examples, in memory or in memory maps; those of maps are checked as they are read.

    Attributes:
        name: what they are called in errors.
        x, y: trees of arrays, the examples along the first axis.
        n: how many there are.
        needs: what they must be like.
        outputs: the shape of one example's output, where the targets are yet to be checked.
        mapped: whether any of them is a memory map.
    """

    name: str
    x: Any
    y: Any
    n: int
    needs: Fitting
    outputs: tuple[int, ...] | None
    mapped: bool

    def rows(self, at: Any) -> tuple[Any, Any]:
        """The examples at indices, or of a slice."""
        x, y = jax.tree.map(lambda leaf: np.asarray(leaf[at]), (self.x, self.y))
        if not self.mapped:
            return x, y
        where = f"{at.start} to {at.stop}" if isinstance(at, slice) else f"{list(at[:3])}, ..."
        return self.needs.values(f"{self.name}, of the examples {where}", x, y), y

    def check_targets(self, y: Any) -> None:
        """Raise where targets that have only now been read do not fit."""
        if self.mapped and self.outputs is not None:
            self.needs.loss.check((len(jax.tree.leaves(y)[0]), *self.outputs), y)


def check_data(name: str, needs: Fitting, data: Any) -> Examples:
    """Arrays in the dtype of the parameters, or an error that says what does not fit."""
    x, y = pair(name, data)
    n = lengths(name, x, y)
    mapped = any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves((x, y)))
    if mapped:
        few = jax.tree.map(lambda leaf: np.asarray(leaf[:2]), (x, y))
        outputs = needs.shapes(needs.values(name, *few), few[1])
    else:
        x = needs.values(name, x, y)
        outputs = needs.shapes(x, y)
    return Examples(name, x, y, n, needs, outputs, mapped)


def pair(name: str, data: Any) -> tuple[Any, Any]:
    """x and y, of NumPy arrays."""
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise TypeError(
            f"{name} must be a pair (x, y) of arrays, or an iterable of such pairs, one for each "
            f"mini-batch, not {type(data).__name__}"
        )
    x, y = (
        np.asarray(part) if isinstance(part, list) else jax.tree.map(_array, part) for part in data
    )
    return x, y


def lengths(name: str, x: Any, y: Any) -> int:
    """How many examples there are; an error unless x and y have as many, and at least one."""
    n = batch_size(x)
    found = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(y)}
    if found != {n}:
        raise ValueError(f"{name}: x has {n} examples, but y has {' and '.join(map(str, found))}")
    if n == 0:
        raise ValueError(f"{name} is empty: there is no example in it")
    return n


def check_batch_size(batch_size: int | None, n: int) -> int:
    """The size of a batch, all n for None."""
    if batch_size is None:
        return n
    batch_size = size_of(batch_size, "batch_size", otherwise=", or None for the whole data at once")
    if batch_size > n:
        raise ValueError(
            f"batch_size is {batch_size}, but there are only {n} training examples; "
            "None takes them all at once"
        )
    return batch_size


_TAKEN = {
    "loss": "in the history that is the loss",
    "skipped": "in the history that is how many steps had no effect",
    "epoch": "in a log that is another column",
    "time": "in a log that is another column",
}


def check_metrics(metrics: Any) -> tuple[tuple[str, Any], ...]:
    """Metrics as pairs; raise unless they are functions by name, of names that are free."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise TypeError(
            "metrics must be functions by name, such as {'accuracy': jb.metrics.accuracy}, not "
            f"{type(metrics).__name__}"
        )
    pairs = tuple((metrics or {}).items())
    for name, metric in pairs:
        if not callable(metric):
            raise TypeError(f"metric {name!r} must be a function of outputs and targets: {metric}")
        why = _TAKEN.get(name)
        if isinstance(name, str) and name.startswith("validation_"):
            why = "in the history that is one of the validation data"
        if why or not isinstance(name, str):
            raise ValueError(f"a metric cannot be called {name!r}: {why or 'take a text'}")
    return pairs


def _array(leaf: Any) -> np.ndarray:
    return leaf if isinstance(leaf, np.memmap) else np.asarray(leaf)


def _check_finite(name: str, part: str, values: np.ndarray) -> None:
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        if values.dtype.kind not in "iub":
            hint = f"; of classes by name: classes, {part} = np.unique({part}, return_inverse=True)"
            raise TypeError(
                f"{name}: {part} has the dtype {values.dtype}, which is no number"
                + hint * (part == "y" and values.dtype.kind in "OSTU")
            )
        return
    bad = ~np.isfinite(values.astype(np.float32) if values.dtype.itemsize < 4 else values)
    if bad.any():
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        raise ValueError(
            f"{name}: {part}{list(at)} is {values[at]}; {int(bad.sum())} of {bad.size} values are "
            "not finite. Fill them in or leave those examples out"
        )


def _to(name: str, leaf: np.ndarray, dtype: Any) -> np.ndarray:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    largest, value = float(jnp.finfo(dtype).max), float(np.max(np.abs(leaf), initial=0))
    if value > largest:
        raise ValueError(f"{name}: x has the value {value:.3g}, too large for {dtype} parameters")
    return leaf.astype(dtype)
