"""Following every parameter through a traced program to where it is used, without any values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jbackprop.capture import parts, uses
from jbackprop.capture.operations import (
    CONSTANT,
    ENTERED_NOT,
    LINEAR,
    MOVES,
    USES,
    Factor,
    Known,
    UnfollowedError,
    carries_delta,
    like_of,
    shape_of,
    times_number,
)
from jbackprop.capture.parts import Parts
from jbackprop.capture.uses import Use
from jbackprop.factored import wide_dtype


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
                    same = not isinstance(v, Literal) and shape_of(v) == shape_of(out)
                    if same and v in made and readers[v] == 1:
                        own.after[0] += made[v]
                        made[v].clear()
            made[out] = own.after[0]
        for own in self.actions.values():
            for found in own.after.values():
                for use in found:
                    use.tap = found[0].index


CALLS = {"jit", "pjit", "closed_call", "core_call", "core_closed_call"}
CHECKPOINTS = {"checkpoint", "remat", "remat2"}


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
        like = like_of(of)
        # A number that a weight was multiplied with before a cast may not fit the delta's dtype.
        dtype = wide_dtype(like.dtype) if set(use.part.scales) - {1.0, -1.0} else like.dtype
        use.delta_like = jax.ShapeDtypeStruct(use.delta.like(like.shape), dtype)
        if use.look is not None:
            use.look_like = jax.eval_shape(use.look, [like_of(v) for v in operands])
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
        if name in CONSTANT or not any(map(carries_delta, eqn.outvars)):
            return Action(), nothing
        try:
            if name in MOVES:
                return Action(), MOVES[name](eqn, known)
            if name in LINEAR:
                own = LINEAR[name](eqn, known)
                if not data:
                    return Action(), [own]
                return self._after(eqn, [uses.shift(part, name) for part in own])
            if name in ("mul", "div"):
                own = times_number(eqn, known, depth)
                if own:
                    return Action(), [own]
            if name in USES:
                return self._after(eqn, USES[name](eqn, known))
            raise UnfollowedError(ENTERED_NOT.get(name, f"no rule for {name}"))
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
        shape = shape_of(self.eqn.invars[k])
        new = (self.length, *shape)
        into = range(1, len(new))
        return tuple(parts.broadcast(part, shape, new, into) for part in known[k].parts)
