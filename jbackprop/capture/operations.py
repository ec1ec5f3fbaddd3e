"""What each operation of a program does with the parameters that come to it.

It moves their parts on (`MOVES`), puts the parts of several operands together (`LINEAR`: what of
them is no parameter's is added), multiplies them with a number, or uses them: then they meet data,
in one of the rules of `uses`. What has no rule raises `UnfollowedError`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from jbackprop.capture import parts, uses
from jbackprop.capture.parts import Part, Parts
from jbackprop.capture.uses import Use


class Known(NamedTuple):
    """What is known of a variable.

    Attributes:
        parts: the parameters that it consists of, as far as its differential goes.
        data: whether it depends on the example.
        active: whether it may depend on something that is used.
    """

    parts: Parts = ()
    data: bool = False
    active: bool = False


class Factor(NamedTuple):
    """A number that parts are multiplied with: a variable's value, or one over it."""

    depth: int
    key: Any
    inverse: bool = False


class UnfollowedError(Exception):
    """An operation that has no rule, and why."""


def like_of(v: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a variable."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def shape_of(v: Any) -> tuple[int, ...]:
    """The shape of a variable."""
    return tuple(v.aval.shape)


def carries_delta(v: Any) -> bool:
    """Whether a variable has a delta."""
    return bool(jnp.issubdtype(v.aval.dtype, jnp.inexact))


Rule = Callable[[JaxprEqn, list[Known]], list[Parts]]


def _each(move: Callable[[JaxprEqn, Part], Any]) -> Rule:
    """A move of one operand with one result, of each of its parts."""

    def rule(eqn: JaxprEqn, known: list[Known]) -> list[Parts]:
        if any(k.parts for k in known[1:]):
            raise UnfollowedError(f"no rule for the operands of {eqn.primitive.name}")
        found = [move(eqn, part) for part in known[0].parts]
        if any(part is None for part in found):
            raise UnfollowedError(f"no rule for this {eqn.primitive.name}")
        return [tuple(part for part in found if part != ())]

    return rule


def _broadcast(eqn: JaxprEqn, part: Part) -> Part:
    into = eqn.params["broadcast_dimensions"]
    return parts.broadcast(part, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), into)


def _reshape(eqn: JaxprEqn, part: Part) -> Part | None:
    if eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None:
        return None
    return parts.reshape(part, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))


def _slice(eqn: JaxprEqn, part: Part) -> Any:
    p = eqn.params
    return parts.cut(part, p["start_indices"], p["limit_indices"], p["strides"])


def _split(eqn: JaxprEqn, known: list[Known]) -> list[Parts]:
    shape, axis, start = shape_of(eqn.invars[0]), eqn.params["axis"], 0
    results: list[Parts] = []
    for size in map(int, eqn.params["sizes"]):
        starts, stops = [0] * len(shape), list(shape)
        starts[axis], stops[axis] = start, start + size
        found = [parts.cut(part, starts, stops, None) for part in known[0].parts]
        if any(part is None for part in found):
            raise UnfollowedError("no rule for this split")
        results.append(tuple(part for part in found if isinstance(part, Part)))
        start += size
    return results


def _identity(eqn: JaxprEqn, known: list[Known]) -> list[Parts]:
    return [known[k].parts for k in range(len(eqn.outvars))]


def _convert(eqn: JaxprEqn, known: list[Known]) -> list[Parts]:
    dtype = like_of(eqn.outvars[0]).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UnfollowedError(f"it is made {dtype}")
    return [known[0].parts]


IDENTITIES = {
    "copy", "copy_p", "optimization_barrier", "sharding_constraint", "name",
    "device_put", "mesh_cast", "pvary", "reshard", "layout_constraint",
}  # fmt: skip


MOVES: dict[str, Rule] = {
    "transpose": _each(lambda eqn, part: parts.transpose(part, eqn.params["permutation"])),
    "broadcast_in_dim": _each(_broadcast),
    "reshape": _each(_reshape),
    "squeeze": _each(_reshape),
    "expand_dims": _each(_reshape),
    "slice": _each(_slice),
    "rev": _each(
        lambda eqn, part: parts.flip(part, shape_of(eqn.invars[0]), eqn.params["dimensions"])
    ),
    "neg": _each(lambda eqn, part: parts.scaled(part, -1.0)),
    "split": _split,
    "convert_element_type": _convert,
    **dict.fromkeys(IDENTITIES, _identity),
}


def _spread(eqn: JaxprEqn, known: list[Known], k: int) -> Parts:
    """The parts of an operand, spread to the shape of the result where JAX does so by itself."""
    old, new = shape_of(eqn.invars[k]), shape_of(eqn.outvars[0])
    if old == new:
        return known[k].parts
    return tuple(parts.broadcast(part, old, new, range(len(old))) for part in known[k].parts)


def times_number(eqn: JaxprEqn, known: list[Known], depth: int) -> Parts:
    """The parts of what is multiplied with (or divided by) a number that is not of the data."""
    for k in (0, 1):
        v, other = eqn.invars[1 - k], known[1 - k]
        if other.parts or other.data or any(n != 1 for n in shape_of(v)):
            continue
        divided = eqn.primitive.name == "div"
        if divided and k == 1:
            continue
        factor = v.val if isinstance(v, Literal) else None
        if factor is not None:
            with np.errstate(divide="ignore", invalid="ignore"):
                by: Any = float(np.divide(1.0, np.float64(factor)) if divided else factor)
        else:
            by = Factor(depth, v, divided)
        return tuple(parts.scaled(part, by) for part in _spread(eqn, known, k))
    return ()


def _tile(eqn: JaxprEqn, known: list[Known]) -> Parts:
    old, new = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    found = known[0].parts
    for axis, (size, total) in enumerate(zip(old, new, strict=True)):
        shape = (*new[:axis], *old[axis:])
        if size == 1:
            wider = (*new[: axis + 1], *old[axis + 1 :])
            found = tuple(parts.broadcast(part, shape, wider, range(len(old))) for part in found)
        else:
            starts = range(0, total, max(size, 1))
            found = tuple(
                parts.put(part, shape, axis, at, total) for part in found for at in starts
            )
    return found


def _add(eqn: JaxprEqn, known: list[Known]) -> Parts:
    return _spread(eqn, known, 0) + _spread(eqn, known, 1)


def _sub(eqn: JaxprEqn, known: list[Known]) -> Parts:
    right = tuple(parts.scaled(part, -1.0) for part in _spread(eqn, known, 1))
    return _spread(eqn, known, 0) + right


def _concatenate(eqn: JaxprEqn, known: list[Known]) -> Parts:
    axis, start, found = eqn.params["dimension"], 0, []
    total = shape_of(eqn.outvars[0])[axis]
    for v, own in zip(eqn.invars, known, strict=True):
        found += [parts.put(part, shape_of(v), axis, start, total) for part in own.parts]
        start += shape_of(v)[axis]
    return tuple(found)


def _stack(eqn: JaxprEqn, known: list[Known]) -> Parts:
    axis, total, found = eqn.params["axis"], len(eqn.invars), []
    for k, v in enumerate(eqn.invars):
        old = shape_of(v)
        new = (*old[:axis], 1, *old[axis:])
        into = [j + (j >= axis) for j in range(len(old))]
        wider = [parts.broadcast(part, old, new, into) for part in known[k].parts]
        found += [parts.put(part, new, axis, k, total) for part in wider]
    return tuple(found)


def _pad(eqn: JaxprEqn, known: list[Known]) -> Parts:
    config = eqn.params["padding_config"]
    if known[1].parts or any(low < 0 or high < 0 or inner for low, high, inner in config):
        raise UnfollowedError("no rule for this pad")
    found, shape = list(known[0].parts), list(shape_of(eqn.invars[0]))
    for axis, (low, high, _) in enumerate(config):
        total = low + shape[axis] + high
        found = [parts.put(part, shape, axis, low, total) for part in found]
        shape[axis] = total
    return tuple(found)


LINEAR: dict[str, Callable[[JaxprEqn, list[Known]], Parts]] = {
    "add": _add,
    "add_any": _add,
    "tile": _tile,
    "sub": _sub,
    "concatenate": _concatenate,
    "pad": _pad,
    "stack": _stack,
}


def _mul(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    shape = shape_of(eqn.outvars[0])
    matrix = any(len(part.order) > 1 for k in known for part in k.parts)
    if matrix and not any(k.data for k in known):  # a mask, weight normalisation
        raise UnfollowedError("it is multiplied with what is no data")
    if eqn.primitive.name == "div" and known[1].parts:
        raise UnfollowedError("it is divided by")
    return [
        uses.scale(part, shape, eqn.primitive.name, 1 - k)
        for k in (0, 1)
        for part in _spread(eqn, known, k)
    ]


def _checked(found: Use | str) -> Use:
    if isinstance(found, str):
        raise UnfollowedError(found)
    return found


def _dot(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    numbers = eqn.params["dimension_numbers"]
    shapes = [shape_of(v) for v in eqn.invars]
    return [
        uses.dot(part, shapes[k], numbers, len(shapes[1 - k]), k)
        for k in (0, 1)
        for part in known[k].parts
    ]


def _convolution(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    if known[0].parts:
        raise UnfollowedError("a kernel is laid over it")
    shape = shape_of(eqn.invars[1])
    return [_checked(uses.convolution(part, shape, eqn.params)) for part in known[1].parts]


def _gather(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    shape, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return [_checked(uses.gather(part, shape, eqn.params, out)) for part in known[0].parts]


def _dynamic_slice(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    shape, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    return [_checked(uses.dynamic_slice(part, shape, out)) for part in known[0].parts]


USES: dict[str, Callable[[JaxprEqn, list[Known]], list[Use]]] = {
    "mul": _mul,
    "div": _mul,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
CONSTANT = {"stop_gradient", "sign", "floor", "ceil", "round"}  # nothing comes back through these
ENTERED_NOT = {
    "custom_jvp_call": "a custom rule, which is not entered",
    "custom_vjp_call": "a custom rule, which is not entered",
    "custom_vjp_call_jaxpr": "a custom rule, which is not entered",
    "cond": "a branch of a cond",
    "while": "a while loop",
}
