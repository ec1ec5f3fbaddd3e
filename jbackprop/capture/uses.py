"""Where a parameter meets data: the pair (what it met, delta of what came out) for each operation.

Every rule gives `Use`s: how to look at what the parameter met, and how the delta of the result
makes the other half of the pair, in the canonical form of a kind and for one example. The
operation's own gradient is nowhere used, so that each of these is a hand-derived rule: with P the
operation, W the parameter and x the other operand, dC/dW = <delta, dP/dW>.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from jbackprop.capture.parts import Box, Part, arranged
from jbackprop.factored import Geometry, Step

Values = Sequence[Array]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the axes of an array make those of a kind.

    Attributes:
        runs: for each axis of the kind, the axes that are merged into it.
        boxes: (axis, box) of axes that are cut first.
        summed: axes that are summed over, before they are merged.
    """

    runs: tuple[tuple[int, ...], ...]
    boxes: tuple[tuple[int, Box], ...] = ()
    summed: tuple[int, ...] = ()

    def of(self, x: Array) -> Array:
        """The array in that form."""
        for axis, box in self.boxes:
            x = lax.slice_in_dim(x, *box, axis=axis)
        if self.summed:
            x = jnp.sum(x, axis=self.summed, keepdims=True)
        shape = [math.prod(x.shape[k] for k in run) for run in self.runs]
        return x.transpose([k for run in self.runs for k in run]).reshape(shape)

    def like(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of an array of this shape in that form."""
        sizes = list(shape)
        for axis, box in self.boxes:
            sizes[axis] = box[1] - box[0]
        for axis in self.summed:
            sizes[axis] = 1
        return tuple(math.prod(sizes[k] for k in run) for run in self.runs)


@dataclasses.dataclass(eq=False)
class Use:
    """One place at which one part of a variable is used.

    Attributes:
        kind: "Outer", "Shift", "Scale", "Lookup", "Patches" or "Full".
        part: what is used.
        operation: the primitive.
        delta: the form of the delta: (G, T, feature), for "Patches" (N, *size, c), for "Full"
            (*the part's own shape).
        look: from the values of the operation's operands to the other half of the pair, if it has
            one, in its form; for a "Lookup" the rows (G, T).
        steps: from the parameter to the canonical form.
        order: the axes of the array that make G, i and o of an "Outer".
        geometry: of "Patches".
        rows: of a "Lookup".
        why: of "Full".
        index: among all uses.
        again: whether what it looked at is made again for the sweep back, rather than kept.
        tap: the same for uses of one delta.
        delta_like, look_like: the shapes and dtypes of the two halves.
        scans: the plans of the scans around, from the outermost.
    """

    kind: str
    part: Part
    operation: str
    delta: Form
    look: Callable[[Values], Array] | None = None
    steps: tuple[Step, ...] = ()
    order: tuple[tuple[int, ...], ...] = ()
    geometry: Geometry | None = None
    rows: int = 0
    why: str = ""
    index: int = -1
    again: bool = False
    tap: int = -1
    delta_like: Any = None
    look_like: Any = None
    scans: list[Any] = dataclasses.field(default_factory=list)


def _boxes(part: Part, axes: Sequence[int], of: Sequence[int]) -> tuple[tuple[int, Box], ...]:
    """The boxes of the part along the axes `of` of its variable, for an array's axes `axes`."""
    pairs = zip(axes, (part.boxes[k] for k in of), strict=True)
    return tuple((axis, box) for axis, box in pairs if box is not None)


def _real(part: Part, axes: Sequence[int], of: Sequence[int]) -> tuple[int, ...]:
    return tuple(k for k, w in zip(axes, of, strict=True) if part.axes[w] is not None)


def _repeated(part: Part, axes: Sequence[int], of: Sequence[int]) -> tuple[int, ...]:
    return tuple(k for k, w in zip(axes, of, strict=True) if part.axes[w] is None)


def _axes(part: Part, of: Sequence[int]) -> tuple[int, ...]:
    """The axes of the part's array along these axes of its variable."""
    return tuple(axis for axis in (part.axes[k] for k in of) if axis is not None)


def _positions(part: Part) -> Form:
    """Of an array like the variable: (T, o), T being the axes along which the part is repeated."""
    every = range(len(part.axes))
    runs = ((), _repeated(part, every, every), _real(part, every, every))
    return Form(runs, _boxes(part, every, every))


def _wide_enough(ids: Array) -> Array:
    """Indices of 8 or 16 bits cannot hold the number of rows."""
    return ids.astype(jnp.int32) if ids.dtype.itemsize < 4 else ids


def _floating(x: Array) -> Array:
    """Integers, and what has 8 bits, promote with no delta."""
    if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1:
        return x
    return x.astype(jnp.float32 if x.dtype.itemsize < 4 else jnp.result_type(float))


def full(part: Part, operation: str, why: str) -> Use:
    """Its gradient, written out for the example."""
    every = range(len(part.axes))
    gone, left = _repeated(part, every, every), _real(part, every, every)
    runs = (*((k,) for k in left[:-1]), (*left[-1:], *gone))
    delta = Form(runs, _boxes(part, every, every), gone)
    return Use("Full", part, operation, delta, steps=arranged(part, part.order), why=why)


def shift(part: Part, operation: str) -> Use:
    """y = W + x: sum_t delta_t, where t are the axes along which W is repeated."""
    return Use("Shift", part, operation, _positions(part), steps=arranged(part, part.order))


def scale(part: Part, shape: tuple[int, ...], operation: str, other: int) -> Use:
    """y = W * x or W / x: sum_t h_t * delta_t with h = x or 1 / x."""
    form = _positions(part)

    def look(values: Values) -> Array:
        h = jnp.broadcast_to(values[other], shape)
        return form.of(1 / h if operation == "div" else h)

    return Use("Scale", part, operation, form, look, arranged(part, part.order))


def dot(part: Part, shape: tuple[int, ...], numbers: Any, rank: int, mine: int) -> Use:
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
    yb = tuple(range(len(b)))
    first, second = (len(b) + len(t), len(b)) if mine else (len(b), len(b) + len(f))
    yf, yt = tuple(range(first, first + len(f))), tuple(range(second, second + len(t)))

    def form(groups: Any, positions: Any, features: Any, of: Any) -> Form:
        gone = _repeated(part, features, of)
        runs = (
            _real(part, groups, b),
            (*_repeated(part, groups, b), *positions),
            (*_real(part, features, of), *gone),
        )
        return Form(runs, _boxes(part, groups + features, b + of), gone)

    a, delta = form(xb, t, xc, c), form(yb, yt, yf, f)
    order = (_axes(part, b), _axes(part, c), _axes(part, f))
    return Use(
        "Outer",
        part,
        "dot_general",
        delta,
        lambda values: a.of(_floating(values[1 - mine])),
        arranged(part, sum(order, ())),
        order,
    )


def convolution(part: Part, shape: tuple[int, ...], params: dict[str, Any]) -> Use | str:
    """z_t = sum_k x_{t s + k d} w_k; see `jbackprop.factored.patches`."""
    numbers = params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        return "a convolution with groups of examples"
    repeated = any(axis is None and n != 1 for axis, n in zip(part.axes, shape, strict=True))
    if not part.whole or repeated:
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

    def places(spec: Sequence[int]) -> Form:
        n, features, *sizes = spec
        return Form(((n,), *((k,) for k in sizes), (features,)))

    a = places(numbers.lhs_spec)
    return Use(
        "Patches",
        part,
        "conv_general_dilated",
        places(numbers.out_spec),
        lambda values: a.of(values[0]),
        arranged(part, _axes(part, perm)),
        geometry=geometry,
    )


def gather(
    part: Part, shape: tuple[int, ...], params: dict[str, Any], out: tuple[int, ...]
) -> Use | str:
    """Rows of a table: sum_t e_{id_t} (outer) delta_t, along the one axis that is looked up.

    Out of range, JAX gives NaN or zeros and no gradient, or clips the index first.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    batch, batched = numbers.operand_batching_dims, numbers.start_indices_batching_dims
    # Along an axis that is read as a whole, an index that is in range, or clipped, is 0.
    mode, modes = params["mode"], lax.GatherScatterMode
    clip, inside = mode == modes.CLIP, mode in (modes.CLIP, modes.PROMISE_IN_BOUNDS)
    along = [j for j in numbers.start_index_map if not (inside and sizes[j] == shape[j])]
    if len(along) != 1 or sizes[along[0]] != 1:
        return "a gather along several axes, or of several rows at once"
    (k,) = along
    column = numbers.start_index_map.index(k)
    rest = tuple(j for j in range(len(shape)) if j not in (k, *batch))
    left = tuple(j for j in range(len(shape)) if j not in numbers.collapsed_slice_dims + batch)
    short = any(sizes[j] != shape[j] for j in rest) or not set(rest) <= set(left)
    if part.axes[k] is None or not part.whole or short:
        return "a gather of parts of rows, or from what is repeated or put together"
    rows, groups = shape[k], _real(part, batched, batch)
    places = tuple(j for j in range(len(out)) if j not in numbers.offset_dims)
    others = tuple(j for j in range(len(places)) if j not in groups)
    to = dict(zip(left, numbers.offset_dims, strict=True))
    beside = tuple(to[j] for j in rest)
    gone = (*_repeated(part, beside, rest), *((to[k],) if k in to else ()))
    features = (*_real(part, beside, rest), *gone)
    delta = (tuple(places[j] for j in groups), tuple(places[j] for j in others), features)
    ids = Form((groups, others))

    def look(values: Values) -> Array:
        found = _wide_enough(values[1][..., column])
        return ids.of(jnp.clip(found, 0, rows - 1) if clip else found)

    steps = arranged(part, _axes(part, (*batch, k, *rest)))
    return Use("Lookup", part, "gather", Form(delta, (), gone), look, steps, rows=rows)


def dynamic_slice(part: Part, shape: tuple[int, ...], out: tuple[int, ...]) -> Use | str:
    """Some rows that follow one another: as `gather`, where the first row is clipped."""
    cut = [k for k in range(len(shape)) if out[k] != shape[k]]
    if len(cut) != 1 or part.axes[cut[0]] is None or not part.whole:
        return "a dynamic slice along several axes, or of what is put together"
    (k,) = cut
    rows, size = shape[k], out[k]
    rest = tuple(j for j in range(len(shape)) if j != k)
    gone = _repeated(part, rest, rest)

    def look(values: Values) -> Array:
        start = jnp.clip(_wide_enough(jnp.asarray(values[1 + k])), 0, rows - size)
        return (start + jnp.arange(size, dtype=start.dtype))[None]

    delta = Form(((), (k,), (*_real(part, rest, rest), *gone)), (), gone)
    steps = arranged(part, _axes(part, (k, *rest)))
    return Use("Lookup", part, "dynamic_slice", delta, look, steps, rows=rows)
