"""The statistics of batch norms, as explicit state: collect them, average them, fold them in.

While a network learns, a batch norm normalises with the statistics of the mini-batch. Afterwards
the output of an example should depend on that example alone, so the statistics are fixed at their
averages over the training data (Ioffe and Szegedy, Batch normalization (2015), algorithm 2). The
layer is then an affine map,

    y = g (x - m) r + b = x (g r) + (b - m g r),        r = 1 / sqrt(v + epsilon)

which is what `fold_batch_norm` puts in its place. Nothing here is hidden in a network: the state is
a dict that is passed in and returned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbackprop.calls import check_inputs, check_net
from jbackprop.checks import check_params, number_of
from jbackprop.factored import PyTree, wide_dtype
from jbackprop.layers.batch_norm import BatchNorm
from jbackprop.layers.gain import Affine
from jbackprop.mesh import WHOLE, on_mesh
from jbackprop.observe import Observed, Seen, seen
from jbackprop.structure import rebuild, walk
from jbackprop.sweep import Layer, Node, batch_size


class Averages(NamedTuple):
    """What one batch norm takes for the mean and the variance of its inputs, (channels,) each.

    The variance is the unbiased one: divided by the number of entries less 1. Inside a repeated
    composite both have its depth in front.
    """

    mean: Array
    variance: Array


AveragesByPath = dict[str, Averages]
"""`Averages` by the path of each batch norm. A pytree, to be saved like parameters."""


@dataclasses.dataclass(frozen=True, repr=False)
class _Watched(Observed):
    """A batch norm that saves the statistics of its input, for the forward sweep only."""

    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        assert isinstance(self.inner, BatchNorm)
        y, _ = self.inner.forward(params, x, key)
        return y, Seen(self.inner.statistics(x), self.path)


def check_folds(net: Node) -> None:
    """Raise where a layer couples the examples, and `fold_batch_norm` leaves it in its place."""
    for path, layer, _ in walk(net):
        if layer.couples_examples and not isinstance(layer, BatchNorm):
            raise ValueError(
                f"{path} ({layer}) couples the examples, and is no BatchNorm whose statistics can "
                "be fixed: there is no output of one example to evaluate"
            )


def batch_averages(net: Node, params: PyTree, x: Any, key: Array | None = None) -> AveragesByPath:
    """The statistics of a mini-batch in every batch norm.

    Args:
        net: a layer or a composite.
        params: its parameters.
        x: the inputs, (B, ...): as many at once as there were in training, or more.
        key: for layers that draw; None draws nothing.

    Returns:
        `Averages` by path: {} for a network without batch norm.

    Raises:
        ValueError: an empty batch.
    """
    check_inputs(net, params, x, key)
    if batch_size(x) == 0:
        raise ValueError("the batch is empty: it has no statistics")
    return _batch_averages(net, params, x, key)


@on_mesh(lambda *_: WHOLE)
@functools.partial(jax.jit, static_argnums=0)
def _batch_averages(net: Node, params: PyTree, x: Any, key: Array | None) -> AveragesByPath:
    def watch(layer: Layer, path: str) -> Node:
        return _Watched(layer, path) if isinstance(layer, BatchNorm) else layer

    # They are the same for every example, (..., B, channels): those of the first.
    found = seen(net, params, x, watch, key)
    return {path: Averages(m[..., 0, :], v[..., 0, :]) for path, (m, v) in found.items()}


def update_averages(
    state: AveragesByPath | None, new: AveragesByPath, momentum: float | Array = 0.9
) -> AveragesByPath:
    """momentum * state + (1 - momentum) * new: a moving average over mini-batches.

    Args:
        state: the averages so far; None for none, which gives `new`.
        new: those of a mini-batch, from `batch_averages`.
        momentum: the share of the old averages, from 0 to 1. For the plain mean over k mini-batches
            give the k-th a momentum of (k - 1) / k.

    Raises:
        ValueError: averages of another network; a momentum that is no share.
    """
    if not isinstance(momentum, jax.core.Tracer):
        number_of(momentum, "momentum", least=0, most=1)
    for name, value in (("state", state), ("new", new)):
        if not (isinstance(value, Mapping) or (value is None and name == "state")):
            raise TypeError(f"{name} must be what batch_averages gives, not {type(value).__name__}")
    if state is None:
        return new
    if state.keys() != new.keys():
        raise ValueError(
            f"these are averages of different networks: of {sorted(state)} and of {sorted(new)}"
        )

    def blend(old: Array, fresh: Array) -> Array:
        share = jnp.asarray(momentum, fresh.dtype)
        return share * old.astype(fresh.dtype) + (1 - share) * fresh

    return jax.tree.map(blend, state, new)


def mean_averages(net: Node, params: PyTree, batches: Iterable[Any]) -> AveragesByPath:
    """The mean of `batch_averages` over many mini-batches, each weighted by its examples.

    Args:
        net: a layer or a composite.
        params: its parameters, the same for all mini-batches.
        batches: inputs, (B, ...) each.

    Raises:
        ValueError: no mini-batch, or an empty one.
        TypeError: one array rather than several.
    """
    if isinstance(batches, jax.Array | np.ndarray | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be several mini-batches, such as a list of arrays (B, ...), not one "
            f"{type(batches).__name__}"
        )
    state: AveragesByPath | None = None
    number = 0
    for x in batches:
        n = batch_size(x)
        state = update_averages(state, batch_averages(net, params, x), number / (number + n))
        number += n
    if state is None:
        raise ValueError("there is no mini-batch to take statistics of")
    return state


def fold_batch_norm(net: Node, params: PyTree, state: AveragesByPath) -> tuple[Node, PyTree]:
    """The network to predict with: every batch norm is an `Affine` with these fixed statistics.

    It has an output for each example by itself, and answers every question about single examples.
    Its affine maps can be trained on; the statistics stay what they are.

    The shift holds mean times gain: where the mean of an input is large beside its deviation, and
    in 16 bits above all, that rounds.

    Args:
        net: a layer or a composite.
        params: its parameters.
        state: from `batch_averages`, `update_averages`, or the `averages` of a `Fit`.

    Returns:
        The network and its parameters, in the shapes and dtypes of those given.

    Raises:
        ValueError: a batch norm that the state knows nothing of, or knows in another shape.
    """
    check_net(net)
    check_params(params)
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be what batch_averages gives, not {type(state).__name__}")

    def fold(path: str, layer: Layer, own: PyTree) -> tuple[Node, PyTree]:
        if not isinstance(layer, BatchNorm):
            return layer, own
        if path not in state:
            raise ValueError(
                f"state has no averages of {path} ({layer}), but those of "
                f"{', '.join(sorted(state)) or 'nothing'}; make it with batch_averages of this net"
            )
        m, v = state[path]
        shapes = {jnp.shape(w) for w in (*own.values(), m, v)} if own else {m.shape, v.shape}
        if len(shapes) > 1 or m.shape[-1:] != (layer.channels,):
            raise ValueError(
                f"the averages and parameters of {path} ({layer}) have different shapes: "
                f"{sorted(shapes)}; are they another network's?"
            )
        dtypes = {name: jnp.result_type(w) for name, w in own.items()} if own else {}
        dtype = next(iter(dtypes.values()), m.dtype)
        wide = wide_dtype(dtype)
        m, r = m.astype(wide), lax.rsqrt(v.astype(wide) + layer.epsilon)
        g = r * own["scale"].astype(wide) if "scale" in dtypes else r
        b = (own["shift"].astype(wide) if "shift" in dtypes else 0) - m * g
        return Affine(layer.channels), {"scale": g.astype(dtype), "shift": b.astype(dtype)}

    return rebuild(net, params, fold)
