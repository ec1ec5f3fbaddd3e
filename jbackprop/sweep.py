"""The sweep: forward with a trace, and the deltas back through it.

Two functions walk a network. `forward` computes the activations and keeps what the way back will
read; `backward` carries delta^l = dC/dz^l from the output to the input,

    delta^l = (delta^{l+1} (W^{l+1})^T) * f'(z^l),

and hands the factored gradients of each layer, as soon as they are born, to `collect`.

A `Layer` is a rule for ONE example; it is mapped over the mini-batch right here, so that the batch
axis is known to the sweep and never to a rule. A `Composite` routes deltas between layers, and
nothing else. Both are immutable configurations without arrays in them.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from jax import Array

from jbackprop.checks import check_arrays, check_key, check_leaves
from jbackprop.factored import Factored, PyTree, is_factored, place_in

BATCH_AXIS = "batch"
"""The name of the batch axis inside the rules, for the few that must sum over it by name."""


class Trace(NamedTuple):
    """What the way back may read of one layer: its input, its output, and what it saved.

    `x` and `y` are None unless the layer's `reads` names them. In a rule they are one example's;
    in the sweep they have the batch axis in front.
    """

    x: Any
    y: Any
    saved: Any


class Beheaded(NamedTuple):
    """A network without its last linear map z = h w + b.

    Attributes:
        body: what comes before it; None if that is nothing.
        body_params: the parameters of the body.
        w: (p, q).
        b: (q,), or None.
        rejoin: (gradients of the body, of w, of b) -> a tree like the network's params.
    """

    body: Node | None
    body_params: PyTree
    w: Array
    b: Array | None
    rejoin: Callable[[PyTree, Array, Any], PyTree]


class Node(abc.ABC):
    """What layers and composites have in common.

    Attributes:
        takes_transport: whether weights other than its own may carry its delta.
        carries: whether its parameters of two or more axes are weights, from inputs to outputs,
            and not something that is only added or looked up.
        reads: which of "x" and "y" backward reads in its trace; the others are not kept.
        draws: whether forward draws random numbers; only then do keys reach it.
        couples_examples: whether one example's output depends on the other examples.
        inverts: whether `invert` finds the input from the output, so that nobody need keep it.
        learns: whether its parameters have gradients.
    """

    takes_transport: ClassVar[bool] = True
    carries: ClassVar[bool] = True
    reads: ClassVar[Any] = ()
    draws: ClassVar[Any] = False
    couples_examples: ClassVar[Any] = False
    inverts: ClassVar[bool] = False
    learns: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, key: Array) -> PyTree:
        """Fresh parameters, a pytree of arrays; () for none."""

    def trace(self, x: Any, y: Any, saved: Any) -> Trace:
        """The trace of one forward sweep: of x and y, what backward reads."""
        return Trace(x if "x" in self.reads else None, y if "y" in self.reads else None, saved)

    def invert(self, params: PyTree, y: Any, saved: Any) -> Any:
        """The input, from the output; for those that say `inverts`."""
        raise NotImplementedError(f"{self} does not invert")

    def behead(self, params: PyTree) -> Beheaded:
        """The network without the linear map that it ends in; for losses that take that over."""
        raise ValueError(f"a network that ends in a Dense (or is a Tied) is needed, not in {self}")


class Layer(Node):
    """A leaf: a rule for one example. Subclass it as a frozen dataclass that holds no arrays."""

    @abc.abstractmethod
    def forward(self, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
        """The output y of one example, and what else backward needs (often None).

        Parameters must not be among what is saved. A layer that draws saves its key, not its draw;
        `key=None` means that nothing is drawn.
        """

    @abc.abstractmethod
    def backward(self, params: PyTree, trace: Trace, delta: Any) -> tuple[Any, PyTree]:
        """The delta rule of one example: from dC/dy to (dC/dx, factored gradients).

        Linear in delta, and reads `params` only to carry it. dC/dx has x's structure and dtype,
        with None at integer leaves; the factored gradients mirror params.
        """


Collect = Callable[[PyTree, Any, Any], PyTree]
"""collect(factored, delta, aux): what to keep of one layer, called as soon as it is born.

Its arguments are the layer's factored gradients (a tree like its params), the delta of the layer's
output (B, ...), and the layer's part of the `aux` tree. Inside a scanned composite it runs in the
body of the scan.
"""


class Composite(Node):
    """Routes activations and deltas between layers; works on mini-batches, and computes nothing.

    The layers are found in the dataclass fields. A composite with one field that is a layer has
    that layer's params; one of several layers, or of a tuple of layers, has a tuple of theirs.

    Attributes:
        chains: whether its layers are a chain: each is given what the one before gives.
        ties: the names of children whose weights are used in another place too, and carry there.
    """

    chains: ClassVar[bool] = False
    ties: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def forward(self, params: PyTree, x: Any, key: Array | None) -> tuple[Any, Any]:
        """Like `sweep.forward`, for the layers inside."""

    @abc.abstractmethod
    def backward(
        self,
        params: PyTree,
        trace: Trace,
        delta: Any,
        collect: Collect,
        transport: PyTree,
        aux: PyTree,
    ) -> tuple[Any, PyTree]:
        """Like `sweep.backward`, for the layers inside."""

    @property
    def copies(self) -> int | None:
        """How many copies of the layer inside it runs, parameters stacked; None for no stack."""
        return None

    def keys(self, key: Array | None) -> list[Array | None]:
        """Of a chain: the key of each of its layers."""
        return keys_for(list(self.children().values()), key)

    def opened(self) -> Composite:
        """The same forward, saving all that the layers inside save: for looking at them."""
        return self

    def untied(self, params: PyTree) -> tuple[Node, PyTree]:
        """The same where every layer has parameters of its own, for looking at each of them."""
        return self, params

    def children(self) -> dict[str, Node]:
        """The layers inside by name, in forward order."""
        found: dict[str, Node] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Node):
                found[field.name] = value
            elif isinstance(value, tuple) and all(isinstance(item, Node) for item in value):
                found |= {f"{field.name}[{i}]": item for i, item in enumerate(value)}
        return found

    def with_children(self, layers: Sequence[Node]) -> Composite:
        """The same composite of other layers, in the order of `children`."""
        left = iter(layers)
        new: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Node):
                new[field.name] = next(left)
            elif isinstance(value, tuple) and all(isinstance(item, Node) for item in value):
                new[field.name] = tuple(next(left) for _ in value)
        return dataclasses.replace(self, **new)  # type: ignore[type-var]

    def split(self, tree: PyTree) -> tuple[PyTree, ...]:
        """Each child's part of a tree like params; None for each of them if there is no tree."""
        number = len(self.children())
        if tree is None:
            return (None,) * number
        if not self._is_tuple:
            return (tree,)
        if not isinstance(tree, tuple) or len(tree) != number:
            found = f" of {len(tree)}" if isinstance(tree, tuple | list) else ""
            raise ValueError(
                f"{type(self).__name__} of {number} layers: a tree like its params is a tuple of "
                f"{number}, not a {type(tree).__name__}{found}; parameters are made with init"
            )
        return tree

    def join(self, parts: Sequence[PyTree]) -> PyTree:
        """The tree like params that has these parts."""
        return tuple(parts) if self._is_tuple else parts[0]

    @property
    def _is_tuple(self) -> bool:
        names = list(self.children())
        return len(names) != 1 or names[0].endswith("]")

    @functools.cached_property
    def draws(self) -> bool:
        return any(layer.draws for layer in self.children().values())

    @functools.cached_property
    def couples_examples(self) -> bool:
        return any(layer.couples_examples for layer in self.children().values())


def keys_for(layers: Sequence[Node], key: Array | None) -> list[Array | None]:
    """A key for each layer that draws, None for the others."""
    drawing = [i for i, layer in enumerate(layers) if layer.draws]
    keys: list[Array | None] = [None] * len(layers)
    if key is not None and drawing:
        for i, own in zip(drawing, jax.random.split(key, len(drawing)), strict=True):
            keys[i] = own
    return keys


def batch_size(x: Any) -> int:
    """The length of the leading axis of a batch, be it one array or a tree of them."""
    check_arrays("x", x)
    leaves = jax.tree.leaves(x)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves):
        raise ValueError(
            "inputs need a batch axis in front, (B, ...); for one example pass x[None]"
        )
    sizes = {leaf.shape[0] for leaf in leaves}
    if len(sizes) > 1:
        raise ValueError(
            f"the input arrays have different batch sizes, {sorted(sizes)}: they must be of one"
        )
    return int(sizes.pop())


def forward(net: Node, params: PyTree, x: Any, key: Array | None = None) -> tuple[Any, Any]:
    """Run a mini-batch through a network and keep what the way back will read.

    Args:
        net: a layer or a composite.
        params: its parameters.
        x: the mini-batch, (B, ...).
        key: for layers that draw; every example gets a key of its own. None: nothing is drawn.

    Returns:
        The outputs (B, ...), and what was saved: the third part of the network's `Trace`.

    Raises:
        ValueError, TypeError: inputs or parameters that do not fit; a note says where in the
            network.
    """
    check_key(key, optional=True)
    n = batch_size(x)
    if isinstance(net, Composite):
        return net.forward(params, x, key)
    if not isinstance(net, Layer):
        raise no_layer(net)
    check_leaves("params", params)
    keys = jax.random.split(key, n) if key is not None and net.draws else None
    return _layer_forward(net, params, x, keys)


def backward(
    net: Node,
    params: PyTree,
    trace: Trace,
    delta: Any,
    collect: Collect,
    transport: PyTree = None,
    aux: PyTree = None,
) -> tuple[Any, PyTree]:
    """Carry the delta of a mini-batch back through a network.

    Args:
        net: a layer or a composite.
        params: its parameters.
        trace: `Trace(x, y, saved)` of the forward sweep.
        delta: dC/dy of every example's own cost, (B, ...); linear in it.
        collect: gets every layer's factored gradients; see `Collect`, `keep` and `total`. Where a
            layer couples the examples only totals mean something (`backprop` gives `Coupled`).
        transport: a tree like params that carries the deltas in the place of the true weights;
            None (also for a part of it) means the true ones. Fixed random weights here are
            feedback alignment (Lillicrap et al., 2016).
        aux: a tree like params, routed to `collect`.

    Returns:
        dC/dx, and a tree like params of what `collect` returned.

    Raises:
        ValueError, TypeError: a delta, parameters or a transport that do not fit; a rule that does
            not give what it must. A note says where in the network.
    """
    if isinstance(net, Composite):
        return net.backward(params, trace, delta, collect, transport, aux)
    if not isinstance(net, Layer):
        raise no_layer(net)
    if delta is None and not jax.tree.leaves(params):
        return None, params  # integers go through it
    if delta is None:
        raise ValueError(
            f"no delta comes to {net}: the layer after it gives None for dC/dx, which is only for "
            "integer inputs"
        )
    _check_delta(net, trace, delta)
    carry = params
    if transport is not None and jax.tree.leaves(params):
        _check_transport(net, params, transport)
        carry = transport
    delta_x, factored = _layer_backward(net, params, carry, trace, delta)
    if not jax.tree.leaves(params):
        return delta_x, factored
    return delta_x, collect(factored, delta, aux)


def no_layer(net: Any) -> TypeError:
    """The error where a network is none."""
    hint = "; make an instance: add ()" if isinstance(net, type) else ""
    return TypeError(f"net must be a layer or a composite of layers, not {net!r}{hint}")


def _check_delta(layer: Layer, trace: Trace, delta: Any) -> None:
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(trace)}
    for leaf in jax.tree.leaves(delta):
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact)
        apart = sizes and leaf.shape[:1] not in sizes
        if apart or not (floating or leaf.dtype == jax.dtypes.float0):
            raise ValueError(
                f"{layer}: delta must be floating-point, with as many examples in front as the "
                f"trace has, {sorted(sizes)}, not {leaf.dtype}{list(leaf.shape)}"
            )


def _check_transport(layer: Layer, params: PyTree, transport: PyTree) -> None:
    if not layer.takes_transport:
        raise ValueError(
            f"{layer} takes no transport: its rule does not tell the weights that carry the delta "
            "from those it reads. Give None in its place, or derive a rule for it"
        )
    shapes, theirs = (jax.tree.map(jax.numpy.shape, tree) for tree in (params, transport))
    if shapes != theirs:
        raise ValueError(
            f"transport must have the shapes of the parameters, {shapes}, not {theirs}; "
            "None in the place of a layer means its true weights"
        )


# One static, inlined `jit` for each direction: layers of equal configuration and shape are traced
# once, and nothing of the call is left in the program.


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _layer_forward(layer: Layer, params: PyTree, x: Any, keys: Array | None) -> tuple[Any, Any]:
    rule = jax.vmap(
        layer.forward, in_axes=(None, 0, None if keys is None else 0), axis_name=BATCH_AXIS
    )
    found = rule(params, x, keys)
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(f"{layer}: forward must give two, y and what is saved: return y, None")
    return found


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _layer_backward(
    layer: Layer, params: PyTree, carry: PyTree, trace: Trace, delta: Any
) -> tuple[Any, PyTree]:
    rule = jax.vmap(layer.backward, in_axes=(None, 0, 0), axis_name=BATCH_AXIS)
    try:
        found = rule(carry, trace, delta)
    except (AttributeError, TypeError) as error:
        absent = [name for name in ("x", "y") if name not in layer.reads]
        if "NoneType" in str(error) and absent:
            error.add_note(
                f"{layer} reads {tuple(layer.reads)}, and of the trace no more is kept: "
                f"{' and '.join(absent)} may be None. What backward uses, `reads` has to name"
            )
        raise
    delta_x, factored = as_told(layer, params, found)
    shapes = jax.tree.map(jax.numpy.shape, (trace.x, delta_x))
    due = jax.tree.map(_shape_of_delta, trace.x)
    if trace.x is not None and delta_x is not None and due != shapes[1]:
        raise ValueError(
            f"{layer}: backward gives dC/dx of shape {shapes[1]} for x {shapes[0]}: it must be "
            "that of x; are the rule, the parameters or the transport another layer's?"
        )
    return delta_x, place_in(factored, params)


def _shape_of_delta(x: Array) -> tuple[int, ...] | None:
    """That of x; None where x has integers, and so no delta."""
    return x.shape if jax.numpy.issubdtype(x.dtype, jax.numpy.inexact) else None


def as_told(layer: Layer, params: PyTree, out: Any) -> tuple[Any, PyTree]:
    """What backward gave, if it is what it must give."""
    if not isinstance(out, tuple) or len(out) != 2:
        given = f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__
        raise TypeError(
            f"{layer}: backward must give (dC/dx, factored gradients like params), not {given}"
        )
    found: Any = jax.tree.structure(out[1], is_leaf=is_factored)
    due = jax.tree.structure(params)
    if found != due:
        raise ValueError(
            f"{layer}: backward gives gradients in the structure {found}; that of params is {due}"
        )
    return out


def keep(factored: PyTree, delta: Any, aux: Any) -> PyTree:
    """Collect the pairs themselves."""
    return factored


def leafwise(f: Callable[[Factored], Any]) -> Collect:
    """Collect f of every factored gradient."""

    @functools.partial(jax.jit, inline=True)  # traced once for each shape, as the rules are
    def of_each(factored: PyTree) -> PyTree:
        return jax.tree.map(f, factored, is_leaf=is_factored)

    return lambda factored, delta, aux: of_each(factored)


total = leafwise(lambda pair: pair.total())
"""Collect the gradient: the sum over the examples, in float32 at least."""

square_norm = leafwise(lambda pair: pair.square_norm())
"""Collect |g_n|^2 of every parameter and example, (B,) each."""


@contextlib.contextmanager
def inside(name: str, node: Node) -> Iterator[None]:
    """Add the place in the network to an error: one note with one path, however deep."""
    try:
        yield
    except Exception as error:
        path, what = getattr(error, "_jbackprop_place", ("", repr(node)))
        path = f"{name}.{path}" if path else name
        notes = getattr(error, "__notes__", [])
        notes[:] = [note for note in notes if not note.startswith("in the network, at ")]
        error._jbackprop_place = (path, what)  # type: ignore[attr-defined]
        error.add_note(f"in the network, at {path}: {what}")
        raise
