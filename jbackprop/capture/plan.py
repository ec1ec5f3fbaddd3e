"""Following every parameter through a traced program to where it is used, without any values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jbackprop.capture import parts, uses
from jbackprop.capture.parts import Part, Parts
from jbackprop.capture.uses import Use
from jbackprop.factored import wide_dtype


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


@dataclasses.dataclass
class Action:
    """What is to be done at one operation.

    Attributes:
        looks: uses that look at its operands.
        before: uses by the operand whose delta they want.
        after: uses by the result whose delta they want.
        inner: how the program inside it is to be run.
    """

    looks: list[Use] = dataclasses.field(default_factory=list)
    before: dict[int, list[Use]] = dataclasses.field(default_factory=dict)
    after: dict[int, list[Use]] = dataclasses.field(default_factory=dict)
    inner: Plan | None = None


@dataclasses.dataclass
class Plan:
    """How a program is to be run: what to do at which of its operations.

    Attributes:
        jaxpr: the program.
        consts: its constants.
        depth: how many programs are around it.
        actions: by the operation's number; others are run as they are.
        last: uses that want the delta of the result itself.
        uses: all uses inside.
        exports: (variable here, key outside) of factors that are needed outside.
        active: whether each input may carry a delta.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    depth: int
    actions: dict[int, Action] = dataclasses.field(default_factory=dict)
    last: list[Use] = dataclasses.field(default_factory=list)
    uses: list[Use] = dataclasses.field(default_factory=list)
    exports: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)
    active: list[bool] = dataclasses.field(default_factory=list)

    def share_deltas(self) -> None:
        """Where z + b is all that becomes of z, the delta of z is that of the sum.

        So the weights that made z want the delta that the bias has, and it is made once.
        """
        readers: dict[Any, int] = {}
        for eqn in self.jaxpr.eqns:
            for v in eqn.invars:
                if not isinstance(v, Literal):
                    readers[v] = readers.get(v, 0) + 1
        for v in self.jaxpr.outvars:
            if not isinstance(v, Literal):
                readers[v] = readers.get(v, 0) + 2
        made: dict[Any, list[Use]] = {}
        for number, eqn in enumerate(self.jaxpr.eqns):
            own = self.actions.get(number)
            if own is None or own.inner is not None or not own.after:
                continue
            out = eqn.outvars[0]
            if eqn.primitive.name == "add":
                for v in eqn.invars:
                    same = not isinstance(v, Literal) and _shape(v) == _shape(out)
                    if same and v in made and readers[v] == 1:
                        own.after[0] += made[v]
                        made[v].clear()
            made[out] = own.after[0]
        for own in self.actions.values():
            for found in own.after.values():
                for use in found:
                    use.tap = found[0].index


class Factor(NamedTuple):
    """A number that parts are multiplied with: a variable's value, or one over it."""

    depth: int
    key: Any
    inverse: bool = False


CALLS = {"jit", "pjit", "closed_call", "core_call", "core_closed_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}
IDENTITIES = {
    "copy", "copy_p", "optimization_barrier", "sharding_constraint", "name",
    "device_put", "mesh_cast", "pvary", "reshard", "layout_constraint",
}  # fmt: skip


class UnfollowedError(Exception):
    """An operation that has no rule, and why."""


def _like(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _shape(v: Any) -> tuple[int, ...]:
    return tuple(v.aval.shape)


def _carries_delta(v: Any) -> bool:
    return bool(jnp.issubdtype(v.aval.dtype, jnp.inexact))


def _inner(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]]:
    found: Any = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return (found.jaxpr, found.consts) if isinstance(found, ClosedJaxpr) else (found, ())


class Planner:
    """Plans one program and those inside it.

    Attributes:
        uses: all that have been found, in the order of the program.
        scans: how many scans are around.
    """

    def __init__(self) -> None:
        self.uses: list[Use] = []
        self.scans = 0

    def plan(
        self, jaxpr: Jaxpr, consts: Sequence[Any], known: Sequence[Known], depth: int = 0
    ) -> tuple[Plan, list[Known]]:
        """Plan a program whose inputs are `known`."""
        plan = Plan(jaxpr, consts, depth, active=[k.active for k in known])
        first = len(self.uses)
        env: dict[Any, Known] = dict(zip(jaxpr.invars, known, strict=True))

        def read(v: Any) -> Known:
            return Known() if isinstance(v, Literal) else env.get(v, Known())

        for number, eqn in enumerate(jaxpr.eqns):
            found = [read(v) for v in eqn.invars]
            data, active = any(k.data for k in found), any(k.active for k in found)
            if not any(k.parts for k in found):
                for out in eqn.outvars:
                    env[out] = Known((), data, active)
                continue
            action, moved = self._visit(eqn, found, data, depth)
            if action != Action():
                plan.actions[number] = action
            if isinstance(moved[0] if moved else None, Known):
                env.update(zip(eqn.outvars, moved, strict=True))
                continue
            active = active or bool(action.before or action.after)
            for out, own in zip(eqn.outvars, moved, strict=True):
                env[out] = Known(own or (), data, active)
        plan.uses = self.uses[first:]
        plan.share_deltas()
        return plan, [read(v) for v in jaxpr.outvars]

    def add(self, use: Use, of: Any, operands: Sequence[Any] = ()) -> Use:
        """Number a use of a variable, an operand or a result."""
        like = _like(of)
        # A number that a weight was multiplied with before a cast may not fit the delta's dtype.
        dtype = wide_dtype(like.dtype) if set(use.part.scales) - {1.0, -1.0} else like.dtype
        use.delta_like = jax.ShapeDtypeStruct(use.delta.like(like.shape), dtype)
        if use.look is not None:
            use.look_like = jax.eval_shape(use.look, [_like(v) for v in operands])
        use.index = len(self.uses)
        self.uses.append(use)
        return use

    def _visit(
        self, eqn: JaxprEqn, known: list[Known], data: bool, depth: int
    ) -> tuple[Action, Any]:
        """What to do at an operation, and its results: `Known`, or what they have of parameters."""
        name = eqn.primitive.name
        nothing: list[Parts] = [() for _ in eqn.outvars]
        if name in CALLS or name in CHECKPOINTS:
            return self._call(eqn, known, depth)
        if name == "scan":
            return self._scan(eqn, known, depth)
        if name in _CONSTANT or not any(map(_carries_delta, eqn.outvars)):
            return Action(), nothing
        try:
            if name in _MOVES:
                return Action(), _MOVES[name](eqn, known)
            if name in _LINEAR:
                own = _LINEAR[name](eqn, known)
                if not data:
                    return Action(), [own]
                return self._after(eqn, [uses.shift(part, name) for part in own])
            if name in ("mul", "div"):
                own = _times_number(eqn, known, depth)
                if own:
                    return Action(), [own]
            if name in _USES:
                return self._after(eqn, _USES[name](eqn, known))
            raise UnfollowedError(_ENTERED_NOT.get(name, f"no rule for {name}"))
        except UnfollowedError as reason:
            action = Action()
            for k, v in enumerate(eqn.invars):
                own = known[k].parts
                found = [uses.full(part, name, str(reason)) for part in own]
                if found:
                    action.before[k] = [self.add(use, v) for use in found]
            return action, nothing

    def _after(self, eqn: JaxprEqn, found: list[Use]) -> tuple[Action, list[Parts]]:
        (out,) = eqn.outvars
        found = [self.add(use, out, eqn.invars) for use in found]
        looks = [use for use in found if use.look is not None]
        return Action(looks, after={0: found}), [()]

    def _call(self, eqn: JaxprEqn, known: list[Known], depth: int) -> tuple[Action, list[Known]]:
        inner, out = self.plan(*_inner(eqn), known, depth + 1)
        if eqn.primitive.name in CHECKPOINTS:
            for use in inner.uses:  # integers cannot be handed over by a sweep back
                like = use.look_like
                use.again = like is not None and bool(jnp.issubdtype(like.dtype, jnp.floating))
        exports: dict[Any, Factor] = {}

        def leave(factor: Any) -> Any:
            if not isinstance(factor, Factor) or factor.depth <= depth:
                return factor
            if factor not in exports:
                exports[factor] = Factor(depth, object(), factor.inverse)
                inner.exports.append((factor.key, exports[factor].key))
            return exports[factor]

        left = [
            k._replace(
                parts=tuple(
                    dataclasses.replace(part, scales=tuple(map(leave, part.scales)))
                    for part in k.parts
                )
            )
            for k in out
        ]
        return Action(inner=inner), left

    def _scan(self, eqn: JaxprEqn, known: list[Known], depth: int) -> tuple[Action, list[Known]]:
        """Scanned parameters are groups, those that stay the same are positions."""
        jaxpr, consts = _inner(eqn)
        scan = _Scan(eqn, jaxpr)
        entering, closed = scan.enter(known)
        carried = [known[k].data for k in scan.carries]
        start = len(self.uses)
        self.scans += 1
        while True:
            del self.uses[start:]
            inside = [
                Known(
                    () if k in closed else entering.get(k, ()),
                    carried[k - scan.consts] if k in scan.carries else own.data,
                    own.active or k in closed or (k in scan.carries and k not in scan.same),
                )
                for k, own in enumerate(known)
            ]
            inner, out = self.plan(jaxpr, consts, inside, depth + 1)
            now = [a or b.data for a, b in zip(carried, out, strict=False)]
            if now != carried:
                carried = now
                continue
            # What is written out must not be so in every turn; what leaves must be known outside.
            refused = {
                use.part.leaf: use.why
                for use in inner.uses
                if use.kind == "Full" and not use.part.levels[self.scans - 1].grouped
            }
            left = [scan.leave(known, k, own) for k, own in enumerate(out)]
            for own, outside in zip(out, left, strict=True):
                if outside is None:
                    refused |= {part.leaf: "a scan that gives it back" for part in own.parts}
            newly = {
                k: why + (" in a scan" if "scan" not in why else "")
                for leaf, why in refused.items()
                for k, own in entering.items()
                if k not in closed and any(part.leaf == leaf for part in own)
            }
            if not newly:
                break
            closed |= newly
        self.scans -= 1
        for use in inner.uses:
            use.scans.insert(0, inner)
        action = Action(inner=inner)
        for k, why in closed.items():
            found = [uses.full(part, "scan", why) for part in known[k].parts]
            action.before[k] = [self.add(use, eqn.invars[k]) for use in found]
        data = [k.data for k in out]
        return action, [Known(a or (), b, True) for a, b in zip(left, data, strict=True)]


class _Scan:
    """Where parameters enter and leave a scan."""

    def __init__(self, eqn: JaxprEqn, jaxpr: Jaxpr):
        self.eqn, self.jaxpr, self.length = eqn, jaxpr, eqn.params["length"]
        self.consts = eqn.params["num_consts"]
        self.carries = range(self.consts, self.consts + eqn.params["num_carry"])
        self.same = {k for k in self.carries if jaxpr.outvars[k - self.consts] is jaxpr.invars[k]}

    def enter(self, known: list[Known]) -> tuple[dict[int, Parts], dict[int, str]]:
        """The parts inside by operand, and the operands that cannot be followed, and why."""
        entering: dict[int, Parts] = {}
        closed: dict[int, str] = {}
        for k, own in enumerate(known):
            if not own.parts:
                continue
            if k < self.consts or k in self.same:
                entering[k] = tuple(parts.held(part, self.length) for part in own.parts)
            elif k in self.carries:
                closed[k] = "it is in the carry of a scan"
            else:
                slices = [parts.scanned(part, self.length) for part in own.parts]
                entering[k] = tuple(part for part in slices if part is not None)
                if len(entering[k]) != len(slices):
                    closed[k] = "a scan along the axis on which it was put together"
        return entering, closed

    def leave(self, known: list[Known], number: int, own: Known) -> Parts | None:
        """The parts of a result outside; None where they are not known."""
        if not own.parts:
            return ()
        carry = number + self.consts
        if number < len(self.carries):
            return known[carry].parts if carry in self.same else None
        inputs = [k for k, v in enumerate(self.jaxpr.invars) if v is self.jaxpr.outvars[number]]
        if not inputs:
            return None
        (k,) = inputs
        if k not in self.carries and k >= self.consts:
            return known[k].parts
        shape = _shape(self.eqn.invars[k])
        new = (self.length, *shape)
        into = range(1, len(new))
        return tuple(parts.broadcast(part, shape, new, into) for part in known[k].parts)


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
    return parts.broadcast(part, _shape(eqn.invars[0]), _shape(eqn.outvars[0]), into)


def _reshape(eqn: JaxprEqn, part: Part) -> Part | None:
    if eqn.primitive.name == "reshape" and eqn.params.get("dimensions") is not None:
        return None
    return parts.reshape(part, _shape(eqn.invars[0]), _shape(eqn.outvars[0]))


def _slice(eqn: JaxprEqn, part: Part) -> Any:
    p = eqn.params
    return parts.cut(part, p["start_indices"], p["limit_indices"], p["strides"])


def _split(eqn: JaxprEqn, known: list[Known]) -> list[Parts]:
    shape, axis, start = _shape(eqn.invars[0]), eqn.params["axis"], 0
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
    dtype = _like(eqn.outvars[0]).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UnfollowedError(f"it is made {dtype}")
    return [known[0].parts]


_MOVES: dict[str, Rule] = {
    "transpose": _each(lambda eqn, part: parts.transpose(part, eqn.params["permutation"])),
    "broadcast_in_dim": _each(_broadcast),
    "reshape": _each(_reshape),
    "squeeze": _each(_reshape),
    "expand_dims": _each(_reshape),
    "slice": _each(_slice),
    "rev": _each(
        lambda eqn, part: parts.flip(part, _shape(eqn.invars[0]), eqn.params["dimensions"])
    ),
    "neg": _each(lambda eqn, part: parts.scaled(part, -1.0)),
    "split": _split,
    "convert_element_type": _convert,
    **dict.fromkeys(IDENTITIES, _identity),
}


def _spread(eqn: JaxprEqn, known: list[Known], k: int) -> Parts:
    """The parts of an operand, spread to the shape of the result where JAX does so by itself."""
    old, new = _shape(eqn.invars[k]), _shape(eqn.outvars[0])
    if old == new:
        return known[k].parts
    return tuple(parts.broadcast(part, old, new, range(len(old))) for part in known[k].parts)


def _times_number(eqn: JaxprEqn, known: list[Known], depth: int) -> Parts:
    """The parts of what is multiplied with (or divided by) a number that is not of the data."""
    for k in (0, 1):
        v, other = eqn.invars[1 - k], known[1 - k]
        if other.parts or other.data or any(n != 1 for n in _shape(v)):
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
    old, new = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
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
    total = _shape(eqn.outvars[0])[axis]
    for v, own in zip(eqn.invars, known, strict=True):
        found += [parts.put(part, _shape(v), axis, start, total) for part in own.parts]
        start += _shape(v)[axis]
    return tuple(found)


def _stack(eqn: JaxprEqn, known: list[Known]) -> Parts:
    axis, total, found = eqn.params["axis"], len(eqn.invars), []
    for k, v in enumerate(eqn.invars):
        old = _shape(v)
        new = (*old[:axis], 1, *old[axis:])
        into = [j + (j >= axis) for j in range(len(old))]
        wider = [parts.broadcast(part, old, new, into) for part in known[k].parts]
        found += [parts.put(part, new, axis, k, total) for part in wider]
    return tuple(found)


def _pad(eqn: JaxprEqn, known: list[Known]) -> Parts:
    config = eqn.params["padding_config"]
    if known[1].parts or any(low < 0 or high < 0 or inner for low, high, inner in config):
        raise UnfollowedError("no rule for this pad")
    found, shape = list(known[0].parts), list(_shape(eqn.invars[0]))
    for axis, (low, high, _) in enumerate(config):
        total = low + shape[axis] + high
        found = [parts.put(part, shape, axis, low, total) for part in found]
        shape[axis] = total
    return tuple(found)


_LINEAR: dict[str, Callable[[JaxprEqn, list[Known]], Parts]] = {
    "add": _add,
    "add_any": _add,
    "tile": _tile,
    "sub": _sub,
    "concatenate": _concatenate,
    "pad": _pad,
    "stack": _stack,
}


def _mul(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    shape = _shape(eqn.outvars[0])
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
    shapes = [_shape(v) for v in eqn.invars]
    return [
        uses.dot(part, shapes[k], numbers, len(shapes[1 - k]), k)
        for k in (0, 1)
        for part in known[k].parts
    ]


def _convolution(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    if known[0].parts:
        raise UnfollowedError("a kernel is laid over it")
    shape = _shape(eqn.invars[1])
    return [_checked(uses.convolution(part, shape, eqn.params)) for part in known[1].parts]


def _gather(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    shape, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return [_checked(uses.gather(part, shape, eqn.params, out)) for part in known[0].parts]


def _dynamic_slice(eqn: JaxprEqn, known: list[Known]) -> list[Use]:
    shape, out = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    return [_checked(uses.dynamic_slice(part, shape, out)) for part in known[0].parts]


_USES: dict[str, Callable[[JaxprEqn, list[Known]], list[Use]]] = {
    "mul": _mul,
    "div": _mul,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
_CONSTANT = {"stop_gradient", "sign", "floor", "ceil", "round"}  # nothing comes back through these
_ENTERED_NOT = {
    "custom_jvp_call": "a custom rule, which is not entered",
    "custom_vjp_call": "a custom rule, which is not entered",
    "custom_vjp_call_jaxpr": "a custom rule, which is not entered",
    "cond": "a branch of a cond",
    "while": "a while loop",
}
