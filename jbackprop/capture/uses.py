"""Where a parameter meets data: the pair (what it met, delta of what came out) for each operation.

Every rule gives `Use`s: what to read of the operation's operands, and how they and the delta of its
result make the arrays of a kind in canonical form, for one example. The operation's own gradient is
nowhere used, so that each of these is a hand-derived rule: with P the operation, W the parameter
and x the other operand, dC/dW = <delta, dP/dW>.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jbackprop.capture.parts import Part, arranged
from jbackprop.factored import Geometry, Step

Values = Sequence[Array]


@dataclasses.dataclass(eq=False)
class Use:
    """One place at which one part of a variable is used.

    Attributes:
        kind: "Outer", "Shift", "Scale", "Lookup", "Patches" or "Full".
        part: what is used.
        operation: the primitive.
        emit: from what is read, and the delta, to the arrays of the kind: (G, T, feature), for
            "Patches" (N, *size, c), for "Full" (*the part's own shape).
        reads: the operands that are read.
        steps: from the parameter to the canonical form.
        ids: from what is read to the rows (G, T) of a "Lookup".
        order: the axes of the array that make G, i and o of an "Outer".
        geometry: of "Patches".
        rows: of a "Lookup".
        why: of "Full".
        index: among all uses.
        shapes: of the arrays that `emit` makes.
    """

    kind: str
    part: Part
    operation: str
    emit: Callable[[Values, Array], tuple[Array, ...]]
    reads: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()
    ids: Callable[[Values], Array] | None = None
    order: tuple[tuple[int, ...], ...] = ()
    geometry: Geometry | None = None
    rows: int = 0
    why: str = ""
    index: int = -1
    shapes: tuple[Any, ...] = ()


def _box(x: Array, axes: Sequence[int], part: Part, of: Sequence[int]) -> Array:
    """x, where its axes `axes` lie along the axes `of` of a variable, cut to the part's box."""
    for axis, k in zip(axes, of, strict=True):
        box = part.boxes[k]
        if box is not None:
            x = lax.slice_in_dim(x, *box, axis=axis)
    return x


def _merged(x: Array, *runs: Sequence[int]) -> Array:
    """x with its axes in this order, each run of them made one axis."""
    shape = [math.prod(x.shape[k] for k in run) for run in runs]
    return x.transpose([k for run in runs for k in run]).reshape(shape)


def full(part: Part, shape: tuple[int, ...], operation: str, why: str) -> Use:
    """Its gradient, written out for the example."""

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        every = range(len(shape))
        delta = _box(delta, every, part, every)
        delta = jnp.sum(delta, axis=[k for k in every if part.axes[k] is None])
        return (delta.reshape([part.shape[k] for k in part.order]),)

    return Use("Full", part, operation, emit, steps=arranged(part, part.order), why=why)


def shift(part: Part, shape: tuple[int, ...], operation: str) -> Use:
    """y = W + x: sum_t delta_t, where t are the axes along which W is repeated."""

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        return (_in_positions(delta, part),)

    return Use("Shift", part, operation, emit, steps=arranged(part, part.order))


def scale(part: Part, shape: tuple[int, ...], operation: str, other: int) -> Use:
    """y = W * x or W / x: sum_t h_t * delta_t with h = x or 1 / x."""

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        h = jnp.broadcast_to(values[0], shape)
        h = 1 / h if operation == "div" else h
        return _in_positions(h, part), _in_positions(delta, part)

    steps = arranged(part, part.order)
    return Use("Scale", part, operation, emit, (other,), steps)


def _in_positions(x: Array, part: Part) -> Array:
    """An array like the variable as (1, T, o)."""
    every = range(x.ndim)
    x = _box(x, every, part, every)
    repeated = [k for k in every if part.axes[k] is None]
    return _merged(x, repeated, [k for k in every if part.axes[k] is not None])[None]


def dot(
    part: Part, shape: tuple[int, ...], numbers: Any, rank: int, mine: int
) -> Use:
    """y = sum_c W_bcf x_bct: a = x and delta in groups b and positions t.

    Where W is repeated along a batch axis b, that is one of positions; along a contracted axis c, x
    is summed over it; along a free axis f, delta is.

    Args:
        part: what W is made of; all others are zero in this.
        shape: of W.
        numbers: the dimension numbers of dot_general.
        rank: of x.
        mine: which operand W is.
    """
    contracting, batch = numbers
    b, c = tuple(batch[mine]), tuple(contracting[mine])
    xb, xc = tuple(batch[1 - mine]), tuple(contracting[1 - mine])
    f = tuple(k for k in range(len(shape)) if k not in b + c)
    t = tuple(k for k in range(rank) if k not in xb + xc)
    # y has the batch axes, then the free ones of the left operand, then those of the right one.
    first = len(b) + (len(t) if mine else 0)
    yf = tuple(range(first, first + len(f)))
    second = len(b) + (0 if mine else len(f))
    yt = tuple(range(second, second + len(t)))
    yb = tuple(range(len(b)))

    def real(axes: tuple[int, ...], of: tuple[int, ...]) -> list[int]:
        return [k for k, w in zip(axes, of, strict=True) if part.axes[w] is not None]

    def repeated(axes: tuple[int, ...], of: tuple[int, ...]) -> list[int]:
        return [k for k, w in zip(axes, of, strict=True) if part.axes[w] is None]

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        x = _box(values[0], xb + xc, part, b + c)
        delta = _box(delta, yb + yf, part, b + f)
        x = jnp.sum(x, axis=tuple(repeated(xc, c)), keepdims=True)
        delta = jnp.sum(delta, axis=tuple(repeated(yf, f)), keepdims=True)
        a = _merged(x, real(xb, b), [*repeated(xb, b), *t], [*real(xc, c), *repeated(xc, c)])
        delta = _merged(
            delta, real(yb, b), [*repeated(yb, b), *yt], [*real(yf, f), *repeated(yf, f)]
        )
        return a, delta

    order = tuple(
        tuple(axis for axis in (part.axes[k] for k in run) if axis is not None) for run in (b, c, f)
    )
    steps = arranged(part, sum(order, ()))
    return Use("Outer", part, "dot_general", emit, (1 - mine,), steps, order=order)


def convolution(part: Part, shape: tuple[int, ...], params: dict[str, Any]) -> Use | str:
    """z_t = sum_k x_{t s + k d} w_k; see `jbackprop.factored.patches`."""
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        return "a convolution with groups of examples"
    if not part.whole or any(
        axis is None and n != 1 for axis, n in zip(part.axes, shape, strict=True)
    ):
        return "a convolution whose kernel is repeated or put together"
    out, into, *spatial = numbers.rhs_spec
    perm = (*spatial, into, out)
    geometry = Geometry(
        tuple(shape[k] for k in spatial),
        tuple(params["window_strides"]),
        tuple(params["padding"]),
        tuple(params["rhs_dilation"]),
        tuple(params["lhs_dilation"]),
        params["feature_group_count"],
    )

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        n, features, *places = numbers.lhs_spec
        m, outputs, *others = numbers.out_spec
        return values[0].transpose(n, *places, features), delta.transpose(m, *others, outputs)

    order = tuple(axis for axis in (part.axes[k] for k in perm) if axis is not None)
    steps = arranged(part, order)
    return Use("Patches", part, "conv_general_dilated", emit, (0,), steps, geometry=geometry)


def gather(
    part: Part, shape: tuple[int, ...], params: dict[str, Any], out: tuple[int, ...]
) -> Use | str:
    """Rows of a table: sum_t e_{id_t} (outer) delta_t, along the one axis that is looked up.

    Out of range, JAX gives NaN or zeros and no gradient, or clips the index first.
    """
    numbers = params["dimension_numbers"]
    batch = tuple(numbers.operand_batching_dims)
    sizes = params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.collapsed_slice_dims != numbers.start_index_map:
        return "a gather along several axes, or of several rows at once"
    (k,) = numbers.start_index_map
    rest = tuple(j for j in range(len(shape)) if j not in (k, *batch))
    if part.axes[k] is None or not part.whole or any(sizes[j] != shape[j] for j in rest):
        return "a gather of parts of rows, or from what is repeated or put together"
    rows = shape[k]
    clip = params["mode"] == lax.GatherScatterMode.CLIP
    places = tuple(j for j in range(len(out)) if j not in numbers.offset_dims)
    batched = tuple(numbers.start_indices_batching_dims)
    groups = [j for j, w in zip(batched, batch, strict=True) if part.axes[w] is not None]
    features = [j for j, w in zip(numbers.offset_dims, rest, strict=True) if part.axes[w] is not None]
    repeated = [j for j, w in zip(numbers.offset_dims, rest, strict=True) if part.axes[w] is None]

    def ids(values: Values) -> Array:
        found = values[0][..., 0]
        found = jnp.clip(found, 0, rows - 1) if clip else found
        return _merged(found, groups, [j for j in range(found.ndim) if j not in groups])

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        delta = jnp.sum(delta, axis=tuple(repeated), keepdims=True)
        others = [places[j] for j in range(len(places)) if j not in groups]
        return (_merged(delta, [places[j] for j in groups], others, [*features, *repeated]),)

    order = [part.axes[j] for j in (*batch, k, *rest)]
    steps = arranged(part, [axis for axis in order if axis is not None])
    return Use("Lookup", part, "gather", emit, (1,), steps, ids=ids, rows=rows)


def dynamic_slice(part: Part, shape: tuple[int, ...], out: tuple[int, ...]) -> Use | str:
    """Some rows that follow one another: as `gather`, where the first row is clipped."""
    cut = [k for k in range(len(shape)) if out[k] != shape[k]]
    if len(cut) != 1 or part.axes[cut[0]] is None or not part.whole:
        return "a dynamic slice along several axes, or of what is put together"
    (k,) = cut
    rows, size = shape[k], out[k]
    features = [j for j in range(len(shape)) if j != k and part.axes[j] is not None]
    repeated = [j for j in range(len(shape)) if j != k and part.axes[j] is None]

    def ids(values: Values) -> Array:
        start = jnp.clip(jnp.asarray(values[0]), 0, rows - size)
        return (start + jnp.arange(size, dtype=start.dtype))[None]

    def emit(values: Values, delta: Array) -> tuple[Array, ...]:
        delta = jnp.sum(delta, axis=tuple(repeated), keepdims=True)
        return (_merged(delta, [], [k], [*features, *repeated]),)

    order = [part.axes[j] for j in (k, *features)]
    steps = arranged(part, [axis for axis in order if axis is not None])
    return Use("Lookup", part, "dynamic_slice", emit, (1 + k,), steps, ids=ids, rows=rows)
