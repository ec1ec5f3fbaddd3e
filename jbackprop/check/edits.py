"""Every gradient of a program that comes out when one derivative in it is got wrong.

The mistakes are those that people make: f' forgotten, taken at the output, of another activation or
twice; a factor of a product or a path of a sum forgotten; weights not transposed on the way back;
the output delta multiplied by f' again. All of them are in one compiled program, which is told
which one to make.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbackprop.check.precision import subprograms
from jbackprop.check.programs import CALLS, CUSTOM, evaluate, step

_KNOWN = {
    "tanh", "logistic", "exp", "log", "log1p", "expm1", "sin", "cos", "sqrt", "rsqrt", "cbrt",
    "integer_pow", "square", "erf", "abs", "asinh", "atan",
}  # fmt: skip
_JOINS = ("mul", "div", "sub", "add", "add_any")
_LOOPS = ("scan", "cond", "while")
_MOST = 120
_EVERYWHERE = ("f' is", "the weights")
"""Mistakes that are made in every layer, if in one."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """One derivative got wrong; `words` say how."""

    code: int
    words: str


class Edits:
    """All gradients of scalar(active, passive) that have one derivative got wrong.

    Args:
        scalar: the program.
        active: the arrays to differentiate by.
        passive: the other arrays.
        neighbours: further elementwise functions whose derivative may have been taken, by name.
    """

    def __init__(
        self,
        scalar: Callable[[list[Any], list[Any]], Array],
        active: list[Any],
        passive: list[Any],
        neighbours: dict[str, Callable[[Array], Array]] | None = None,
    ) -> None:
        self._closed = jax.make_jaxpr(scalar)(active, passive)
        self._n, self._units = len(active), dict(neighbours or {})
        self._args = (active, passive)
        self._collect(self._closed.jaxpr)
        self.edits: list[Edit] = []
        self._gradient = jax.jit(jax.grad(self._edited))
        jax.eval_shape(self._gradient, active, passive, 0)

    def gradients(self) -> Iterator[tuple[Edit, list[Array]]]:
        """The gradient without an edit, then each edit with the gradient that it leads to."""
        everywhere = [
            Edit(code, f"{words}, in every layer")
            for words, (code, count) in self.families.items()
            if count > 1
        ]
        for edit in (Edit(0, ""), *self.edits[:_MOST], *everywhere):
            yield edit, self._gradient(*self._args, edit.code)

    def _collect(self, jaxpr: Any) -> None:
        """The elementwise functions in the program: neighbours of each other."""
        for eqn in jaxpr.eqns:
            f = _unit(eqn)
            if f is not None and len(self._units) < 4:
                self._units.setdefault(_named(eqn), f)
            elif f is None:
                for inner in subprograms(eqn):
                    self._collect(inner)

    def _edited(self, active: list[Any], passive: list[Any], code: Any) -> Array:
        self.edits = []
        self.families: dict[str, tuple[int, int]] = {}  # what is made everywhere: code, how often
        flags = [True] * len(active) + [False] * len(jax.tree.leaves(passive))
        flat = [*active, *jax.tree.leaves(passive)]

        def chosen(ways: list[tuple[str, Any]], right: Any, values: list[Any]) -> Any:
            base = len(self.edits) + 1
            self.edits += [Edit(base + i, words) for i, (words, _) in enumerate(ways)]
            inside = (code >= base) & (code < base + len(ways))
            branch = jnp.where(inside, code - base + 1, 0)
            for i, (words, _) in enumerate(ways):
                if words.startswith(_EVERYWHERE):
                    family = re.sub(r" \([\dx]+\)", "", words)
                    own, count = self.families.get(family, (-1 - len(self.families), 0))
                    self.families[family] = own, count + 1
                    branch = jnp.where(code == own, i + 1, branch)
            return lax.switch(branch, [right, *(way for _, way in ways)], *values)

        def visit(eqn: Any, values: list[Any], depends: list[bool], go: Any) -> list[Any]:
            ways = list(self._ways(eqn, values, depends, beside(eqn)))
            return [chosen(ways, lambda *v: go()[0], values)] if ways else go()

        inputs = _inputs_of_units(self._closed, flat, flags)
        seen: dict[str, int] = {}

        def beside(eqn: Any) -> list[Any]:
            """What the units of this name before and after it get."""
            name = _named(eqn)
            at, own = seen.get(name, 0), inputs.get(name, [])
            seen[name] = at + 1
            return [own[i % len(own)] for i in (at + 1, at - 1)[: len(own) - 1] if own]

        for i, z in enumerate(flat[: len(active)]):
            if z.ndim:
                flat[i] = chosen(list(_again("", z.shape[-1], lambda z: z)), lambda z: z, [z])
        return evaluate(self._closed, flat, flags, visit)[0]

    def _ways(
        self, eqn: Any, values: list[Any], depends: list[bool], beside: list[Any]
    ) -> Iterator[tuple[str, Any]]:
        if not any(depends):
            return
        enough = len(self.edits) > _MOST  # but for what is made everywhere
        name, stop = _named(eqn), lax.stop_gradient
        f = _unit(eqn)
        if f is not None:
            yield f"f' is missing, the derivative of {name}", lambda z, *_: graft(f(z), z)
            yield (
                f"f' is taken at the output a = f(z), not at z: that of {name}",
                lambda z, *_: graft(f(z), f(stop(f(z)) + z - stop(z))),
            )
            for which, other in zip(("next", "previous"), beside, strict=False):
                yield (
                    f"f' is that of the {which} layer, taken at its z: that of {name}",
                    lambda z, *_, at=other: graft(f(z), f(at + z - stop(z))),
                )
            if enough:
                return
            yield (
                f"f' is multiplied in twice, that of {name}",
                lambda z, *_: graft(f(z), f(stop(z) + f(z) - stop(f(z)))),
            )
            yield f"the part that goes through {name} is missing", lambda z, *_: stop(f(z))
            for words, slope in _AT_OUTPUT.items():
                yield (
                    f"f' is {words}, in the place of that of {name}",
                    lambda z, *_, slope=slope: graft(f(z), stop(slope(f(z))) * z),
                )
            for other, g in self._units.items():
                if other != name:
                    words = f"f' is that of {other}, in the place of that of {name}"
                    yield words, lambda z, *_, g=g: graft(f(z), g(z))
            return
        if eqn.primitive.name in _JOINS and all(depends) and len(values) == 2 and not enough:
            for i, way in enumerate(("first", "second")):

                def cut(*v: Any, i: int = i) -> Any:
                    v = tuple(stop(u) if j == i else u for j, u in enumerate(v))
                    return eqn.primitive.bind(*v, **eqn.params)

                words = f"what goes through the {way} operand of {_join(eqn)} is missing"
                yield words, cut
        if eqn.primitive.name == "dot_general":
            yield from _untransposed(eqn, depends)
        if enough:
            return
        net_input = eqn.primitive.name in ("dot_general", "add", "sub", "conv_general_dilated")
        if net_input and eqn.outvars[0].aval.shape:

            def bound(*v: Any) -> Any:
                return eqn.primitive.bind(*v, **eqn.params)

            yield from _again(_join(eqn), eqn.outvars[0].aval.shape[-1], bound)


def _again(name: str, width: int, value: Callable[..., Array]) -> Iterator[tuple[str, Any]]:
    """The delta of an output layer, multiplied by the f' that it already has in it."""
    for words, slope in _AGAIN.items():
        if width == 1 and "softmax" in words:
            continue
        told = f"the delta of the net input {name}".strip()
        yield (
            f"{told} is multiplied by f' again: {words}",
            lambda *v, slope=slope: _delta_times(slope, value(*v)),
        )


def _inputs_of_units(closed: Any, flat: list[Any], flags: list[bool]) -> dict[str, list[Any]]:
    """What the elementwise functions of a program get, by name; within loops it cannot be had."""
    found: dict[str, list[Any]] = {}
    loops = 0

    def visit(eqn: Any, values: list[Any], depends: list[bool], go: Any) -> list[Any]:
        nonlocal loops
        if not loops and _unit(eqn) is not None:
            found.setdefault(_named(eqn), []).append(lax.stop_gradient(values[0]))
            return step(eqn, values, depends, _as_is)
        loops += eqn.primitive.name in _LOOPS
        out = go()
        loops -= eqn.primitive.name in _LOOPS
        return out

    evaluate(closed, flat, flags, visit)
    return found


def _as_is(eqn: Any, values: list[Any], depends: list[bool], go: Any) -> list[Any]:
    return go()


def graft(value: Array, surrogate: Array) -> Array:
    """The value of the one with the derivative of the other."""
    return lax.stop_gradient(value) + (surrogate - lax.stop_gradient(surrogate))


def _unit(eqn: Any) -> Callable[[Array], Array] | None:
    """The operation as an elementwise-looking function of one array, if it is one."""
    floats = [v for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
    if len(eqn.outvars) != 1 or not floats:
        return None
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name in _KNOWN:
        return lambda z: eqn.primitive.bind(z, **eqn.params)
    if name in CALLS and len(eqn.invars) == 1 and out.shape == eqn.invars[0].aval.shape:
        return lambda z: step(eqn, [z], [True], _as_is)[0]
    if name in ("max", "min") and hasattr(eqn.invars[1], "val"):
        return lambda z: eqn.primitive.bind(z, jnp.full_like(z, eqn.invars[1].val), **eqn.params)
    return None


def _named(eqn: Any) -> str:
    name = str(eqn.params.get("name", eqn.primitive.name))
    if name in CUSTOM:
        inner = subprograms(eqn)
        called = [e.params["name"] for e in inner[0].eqns if "name" in e.params] if inner else []
        name = str(called[0]) if called else "a function with a custom rule"
    shape = "x".join(map(str, eqn.outvars[0].aval.shape))
    return f"{name} ({shape})" if shape else name


def _join(eqn: Any) -> str:
    return f"{eqn.primitive.name} ({'x'.join(map(str, eqn.outvars[0].aval.shape))})"


def _untransposed(eqn: Any, depends: list[bool]) -> Iterator[tuple[str, Any]]:
    """A square matrix that carries the delta back the way it carried the activation there."""
    (_, batch), stop = eqn.params["dimension_numbers"], lax.stop_gradient
    for m in (0, 1):
        shape = eqn.invars[m].aval.shape
        if len(shape) != 2 or shape[0] != shape[1] or batch[0] or not depends[1 - m]:
            continue

        def way(*v: Any, m: int = m) -> Any:
            def dot(a: Any, b: Any) -> Any:
                return eqn.primitive.bind(a, b, **eqn.params)

            matrix, other = v[m], v[1 - m]
            flipped = (stop(matrix.T), other) if m == 0 else (other, stop(matrix.T))
            own = (matrix, stop(other)) if m == 0 else (stop(other), matrix)
            return graft(dot(*v), dot(*flipped) + dot(*own))

        yield (
            f"the weights of {_join(eqn)} are not transposed on the way back "
            "(W where its transpose is due)",
            way,
        )


def _delta_times(g: Callable[[Array, Array], Array], z: Array) -> Array:
    @jax.custom_vjp
    def same(z: Array) -> Array:
        return z

    same.defvjp(lambda z: (z, z), lambda z, delta: (g(z, delta),))
    return same(z)


def _softmax_diagonal(z: Array, delta: Array) -> Array:
    p = jax.nn.softmax(z, axis=-1)
    return delta * p * (1 - p)


def _softmax_jacobian(z: Array, delta: Array) -> Array:
    p = jax.nn.softmax(z, axis=-1)
    return p * (delta - jnp.sum(p * delta, axis=-1, keepdims=True))


def _sigmoid_slope(z: Array, delta: Array) -> Array:
    p = jax.nn.sigmoid(z)
    return delta * p * (1 - p)


_AT_OUTPUT: dict[str, Callable[[Array], Array]] = {
    "a (1 - a), the sigmoid's": lambda a: a * (1 - a),
    "1 - a^2, the tanh's": lambda a: 1 - a * a,
}

_AGAIN = {
    "p (1 - p) of the softmax": _softmax_diagonal,
    "the Jacobian of the softmax": _softmax_jacobian,
    "that of the sigmoid": _sigmoid_slope,
}
