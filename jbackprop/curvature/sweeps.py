"""Several output deltas swept back over one trace, and what is made of their pairs on the way."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.calls import check_call, refuse_coupling
from jbackprop.capture.program import Program, parameter, traced
from jbackprop.capture.sweep import run_several
from jbackprop.checks import size_of
from jbackprop.curvature.roots import Columns, Roots
from jbackprop.factored import (
    Factored,
    Outer,
    Patches,
    Place,
    PyTree,
    devices_of,
    in_blocks,
    is_factored,
    scan_examples,
)
from jbackprop.losses import Loss
from jbackprop.mesh import shapes
from jbackprop.structure import walk
from jbackprop.sweep import Node, Trace, backward, batch_size, forward, keep

_T = TypeVar("_T")
DELTAS = "deltas"
"""The name of the axis of the deltas S_v, of which each pair is asked under a `jax.vmap`."""
AT_ONCE = 1 << 22
"""Numbers of the widest layer's deltas that are swept at once, about."""
REREAD = 8
"""What is read again at once had better be so much smaller than what is only written at once."""
FEW = 8
"""Examples that are swept at once at least."""

Model = Node | Callable[[PyTree, Any], Array]
"""A network of ours, or any function (params, one example's x) -> that example's outputs z."""
Ask = Callable[[Sequence[Factored], Sequence[Any]], Sequence[PyTree]]
"""From the pairs of one layer (one copy of it) and their parts of `aux`, to what is kept of each
parameter. It is called under the vmap over the deltas, and must sum over them."""


class Portions(NamedTuple):
    """What is swept at once: so many examples, and so many deltas of each in one of some blocks."""

    examples: int
    blocks: int
    deltas: int


class Group(NamedTuple):
    """A layer: its name, and its parameters' numbers."""

    name: str
    leaves: tuple[int, ...]


def check_model(
    net: Any,
    loss: Any,
    params: Any,
    x: Any,
    y: Any,
    key: Any = None,
    roots: Any = None,
    draws: bool = False,
) -> None:
    """Raise where the arguments cannot belong together."""
    if callable(net) and not isinstance(net, Node | type):
        check_call(_Function(), loss, (), x, y, key)
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            parameter("params" + jax.tree_util.keystr(path), leaf)
    else:
        check_call(net, loss, params, x, y, key)
    if roots is not None and not isinstance(roots, Roots):
        hint = ": add ()" if isinstance(roots, type) and issubclass(roots, Roots) else ""
        raise TypeError(f"roots must be Exact(), MonteCarlo() or Empirical(), not {roots!r}{hint}")
    if key is None and (draws or (roots is not None and roots.draws)):
        raise ValueError("random numbers are needed: give key=jax.random.key(...)")
    if batch_size(x) == 0:
        raise ValueError("the batch is empty: the curvature of its mean cost is not defined")
    z = _outputs.eval_shape(net, *shapes((params, x)))
    if not (hasattr(z, "shape") and jnp.issubdtype(z.dtype, jnp.floating)):
        raise TypeError(f"net must give one floating-point array of outputs, not {z}")
    loss.check(z.shape, y)


def check_number(name: str, value: Any, optional: bool = False) -> None:
    """Raise unless it is an int of at least 1 (or None)."""
    if value is not None or not optional:
        size_of(value, name)


class _Function(Node):
    """In the place of a network that is a function."""

    def init(self, key: Array) -> PyTree:
        return ()


def outputs_of(net: Model, params: PyTree, x: Any, key: Array | None = None) -> Array:
    """z (B, ..., q)."""
    if isinstance(net, Node):
        return forward(net, params, x, key)[0]
    return jax.vmap(net, in_axes=(None, 0))(params, x)


_outputs = jax.jit(outputs_of, static_argnums=0)
"""For its shapes, which are found once for each network and batch."""


def two_keys(net: Model, key: Array | None) -> tuple[Array | None, Array | None]:
    """One for the layers that draw, the same as in a gradient; and another for the targets."""
    own = key if isinstance(net, Node) and net.draws else None
    return own, None if key is None else jax.random.fold_in(key, 1)


def over_deltas(
    net: Model,
    loss: Loss,
    roots: Roots,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
    ask: Ask,
    aux: PyTree = None,
    portions: Portions | None = None,
) -> PyTree:
    """What `ask` gives of every layer's pairs, summed over the deltas of the outputs.

    Args:
        net, loss, roots, params, x, y, key: as in `jbackprop.curvature`.
        ask: what is made of the pairs; see `Ask`.
        aux: a tree like params whose leaves are trees of arrays, routed to `ask`; where copies of a
            layer are scanned, with axes for them in front.
        portions: what is swept at once; by default all. What is given of portions of the examples
            is added up.

    Returns:
        A tree like params of what `ask` gave; of scanned copies, stacked in front.
    """
    if isinstance(net, Node):
        refuse_coupling(net, "its curvature, parameter by parameter,")
    if portions is None or portions.examples == batch_size(x):
        return _over_deltas(net, loss, roots, params, x, y, key, ask, aux, portions)

    def some(batch: tuple[Any, Any]) -> tuple[PyTree, PyTree]:
        return (), _over_deltas(net, loss, roots, params, *batch, key, ask, aux, portions)

    return scan_examples(some, (x, y), batch_size(x), portions.examples)[1]


def _over_deltas(
    net: Model,
    loss: Loss,
    roots: Roots,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
    ask: Ask,
    aux: PyTree,
    portions: Portions | None,
) -> PyTree:
    """The same for all these examples at once."""
    own_key, drawn = two_keys(net, key)
    if isinstance(net, Node):
        z, saved = forward(net, params, x, own_key)
        trace, columns = net.trace(x, z, saved), roots.columns(loss, z, y, drawn)

        def some(at: Array) -> PyTree:
            return _of_network(net, params, trace, _there(columns, at, number), ask, aux)
    else:
        z = _outputs.eval_shape(net, *shapes((params, x)))
        program = traced(net, False, params, (x,), outputs=True)

        def some(at: Array) -> PyTree:
            def of_example(z: Array, own: Any) -> Array:
                y, n = own
                once = None if drawn is None else jax.random.fold_in(drawn, n)
                z, y = jax.tree.map(lambda v: v[None], (z, y))
                return _there(roots.columns(loss, z, y, once), at, number)[:, 0]

            own = (jax.tree.map(jnp.asarray, y), jnp.arange(program.n))
            return _of_program(program, of_example, own, ask, aux)

    number = roots.number(loss, z, y)
    if portions is None or portions.blocks == 1:
        return some(jnp.arange(number))
    at_once = jnp.arange(portions.deltas)
    nothing = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), jax.eval_shape(some, at_once))

    def step(so_far: PyTree, start: Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, so_far, some(start + at_once)), None

    return lax.scan(step, nothing, jnp.arange(portions.blocks) * portions.deltas)[0]


def portions_of(
    net: Model,
    loss: Loss,
    roots: Roots,
    params: PyTree,
    x: Any,
    y: Any,
    key: Array | None,
    chunk: int | None,
    of_each: bool = False,
) -> Portions:
    """What is best swept at once, of what is summed over the examples unless it is `of_each`.

    All deltas of as many examples as a cache can hold some of: so each is swept forward once. Where
    that is too few, or random numbers are drawn for all of them, not all deltas.

    Args:
        net, loss, roots, params, x, y, key: what is swept.
        chunk: at most so many deltas, where one wants that.
        of_each: whether something of each example is asked.
    """
    z = _outputs.eval_shape(net, *shapes((params, x)))
    number, n = roots.number(loss, z, y), batch_size(x)
    if number == 1:
        return Portions(n, 1, 1)
    each = max(1, _widest(net, params, x) // n)  # numbers of an example and a delta
    spread = devices_of(n)
    examples = n // spread  # of one device, where they are spread
    if not (of_each or roots.draws or two_keys(net, key)[0] is not None):
        examples = _dividing(examples, max(FEW, AT_ONCE // (each * number)))
    deltas = max(1, min(chunk or number, AT_ONCE // (each * examples)))
    blocks = -(-number // deltas)
    return Portions(spread * examples, blocks, -(-number // blocks))


def _dividing(n: int, most: int) -> int:
    """At most so many that n is a multiple of, if they are not much fewer."""
    most = min(n, most)
    return next((k for k in range(most, most // 2, -1) if n % k == 0), most)


def _there(columns: Columns, at: Array, number: int) -> Array:
    """The deltas of these numbers; 0 beyond the last, which fills the last block up."""
    found = columns(jnp.minimum(at, number - 1))
    inside = (at < number).reshape(-1, *(1,) * (found.ndim - 1))
    return jnp.where(inside, found, jnp.zeros((), found.dtype))


def _of_network(
    net: Node, params: PyTree, trace: Trace, deltas: Array, ask: Ask, aux: PyTree
) -> PyTree:
    def collect(factored: PyTree, delta: Any, own: PyTree) -> PyTree:
        pairs = jax.tree.leaves(factored, is_leaf=is_factored)
        tree: Any = jax.tree.structure(factored, is_leaf=is_factored)
        owns = [None] * len(pairs) if own is None else tree.flatten_up_to(own)
        return jax.tree.unflatten(tree, ask(pairs, owns))

    def one(delta: Array) -> PyTree:
        return backward(net, params, trace, delta, collect, None, aux)[1]

    return jax.vmap(one, axis_name=DELTAS, out_axes=None)(deltas)


def _of_program(
    program: Program, columns: Callable[..., Array], own: Any, ask: Ask, aux: PyTree
) -> PyTree:
    owns = [None] * len(program.params) if aux is None else program.tree.flatten_up_to(aux)

    def every(pairs: list[Factored]) -> list[PyTree]:
        found: list[PyTree] = [None] * len(pairs)
        for group in _siblings(program.tree, pairs):
            some = by_copy([pairs[k] for k in group.leaves], [owns[k] for k in group.leaves])
            for k, v in zip(group.leaves, some, strict=True):
                found[k] = v
        return found

    def by_copy(pairs: Sequence[Factored], owns: Sequence[Any]) -> Sequence[PyTree]:
        if pairs[0].home.stack:
            return jax.vmap(by_copy)([pair.copies() for pair in pairs], owns)
        return ask(pairs, owns)

    found = run_several(program, columns, own, every, DELTAS)
    return jax.tree.unflatten(program.tree, found)


def _siblings(tree: Any, pairs: Sequence[Factored]) -> list[Group]:
    """Parameters side by side that are stacked alike."""
    numbers = jax.tree.unflatten(tree, range(tree.num_leaves))
    paths, _ = jax.tree_util.tree_flatten_with_path(numbers)
    found: dict[Any, list[int]] = {}
    for (path, k), pair in zip(paths, pairs, strict=True):
        name = "params" + jax.tree_util.keystr(path[:-1])
        found.setdefault((name, pair.home.stack), []).append(k)
    return [Group(name, tuple(leaves)) for (name, _), leaves in found.items()]


def _widest(net: Model, params: PyTree, x: Any) -> int:
    """How many numbers the deltas of one layer have, at most; of a function, of all of them."""
    sizes = []
    for pair in pairs_of(net, params, x):
        copies = math.prod(pair.home.stack) if isinstance(net, Node) else 1
        sizes.append(sum(math.prod(v.shape) for v in linear_in_deltas(pair)) // max(copies, 1))
    return max(sizes, default=1) if isinstance(net, Node) else sum(sizes)


def linear_in_deltas(pair: Factored) -> list[Array]:
    """Its arrays that are."""
    found: list[Array] = []

    def see(v: Array) -> Array:
        found.append(v)
        return v

    pair.with_deltas(see)
    return found


def pairs_of(net: Model, params: PyTree, x: Any) -> list[Factored]:
    """The pairs of a mini-batch, shapes alone, copies in their stacks."""
    if not isinstance(net, Node):
        return _pairs_of_program(traced(net, False, params, (x,), outputs=True))

    def swept(params: PyTree, x: Any) -> PyTree:
        z, saved = forward(net, params, x)
        return backward(net, params, net.trace(x, z, saved), jnp.zeros_like(z), keep)[1]

    return jax.tree.leaves(jax.eval_shape(swept, *shapes((params, x))), is_leaf=is_factored)


def _pairs_of_program(program: Program) -> list[Factored]:
    def whole(pairs: list[Factored]) -> list[Factored]:
        return [pair.with_deltas(lambda delta: lax.psum(delta, DELTAS)) for pair in pairs]

    def one(z: Array, own: Any) -> Array:
        return jnp.zeros((1, *z.shape), z.dtype)

    return jax.eval_shape(lambda: run_several(program, one, (), whole, DELTAS))


def layers_of(net: Model, params: PyTree, pairs: Sequence[Factored]) -> list[Group]:
    """The layers of a model, with their parameters' numbers."""
    tree: Any = jax.tree.structure(params)
    if not isinstance(net, Node):
        return _siblings(tree, pairs)
    parts = walk(net, jax.tree.unflatten(tree, range(tree.num_leaves)))
    found = [Group(path, tuple(jax.tree.leaves(part))) for path, _, part in parts]
    return [group for group in found if group.leaves]


def by_blocks(pair: Outer | Patches, f: Callable[[Array, Array], _T], entries: int) -> _T:
    """The sum of f(a, S) over some examples at a time, asked under the vmap over deltas.

    Args:
        pair: of a matrix, or of a kernel, which is one over its patches.
        f: from a (b, G, T, i) and all the deltas S (b, v, G, T, o) to arrays.
        entries: so many numbers f writes out for an example, and reads again.
    """
    deltas = jnp.moveaxis(lax.all_gather(pair.delta, DELTAS), 0, 1)

    def some(part: tuple[Array, Array]) -> _T:
        a, deltas = part
        if isinstance(pair, Outer):
            return f(a, deltas)
        one = dataclasses.replace(pair, a=a, delta=deltas[:, 0])
        each = jax.vmap(lambda d: dataclasses.replace(one, delta=d).outer().delta, 1, 1)
        return f(one.outer().a, each(deltas))

    kernels = pair.entries if isinstance(pair, Patches) else 0
    return in_blocks(some, (pair.a, deltas), pair.size, REREAD * entries + kernels, summed=True)


def canonical_home(pair: Outer | Patches) -> Place:
    """The way from the parameter to (G, i, o); of a kernel, (G, patch, o)."""
    return pair.home if isinstance(pair, Outer) else pair.outer().home
