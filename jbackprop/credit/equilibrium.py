"""Equilibrium propagation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jbackprop.checks import check_flags, check_numbers, check_sizes
from jbackprop.credit.chain import (
    Link,
    Unit,
    activates,
    check_chain,
    join_units,
    nothing,
    split_units,
    unit_backward,
    unit_forward,
    units,
    weighted,
)
from jbackprop.credit.rule import (
    Info,
    Rule,
    State,
    keep,
    taken_apart,
    widened,
)
from jbackprop.credit.settling import largest, norm, settle, share
from jbackprop.factored import PyTree
from jbackprop.losses import Loss
from jbackprop.mesh import examples, like, on_mesh
from jbackprop.sweep import Node, batch_size, forward

LONG = 20_000
"""Steps at most, where the truth settles."""

SETTLED = 1e-3
"""The residual below which it has."""


@dataclasses.dataclass(frozen=True)
class EquilibriumPropagation(Rule):
    """The network settles, free and nudged to the target; the difference is the gradient.

    The units of the network are joined in both directions, by the same weights: each is a layer
    A_l, usually linear, A_l(s) = s W^l + b^l, and an activation sigma_l, and with s^0 = x

        Phi = sum_l <s^l, A_l(s^{l-1})>
        s^l <- (1 - rate) s^l + rate sigma_l(dPhi/ds^l - beta dC/ds^l)
        dPhi/ds^l = A_l(s^{l-1}) + s^{l+1} (W^{l+1})^T

    (for another A_{l+1} its derivative is in the place of W^{l+1}),
    where only the output units have a cost C(s^L), and none above them. Free, beta = 0; from there
    nudged, with beta = nudge, and beta = -nudge. Then, for one example,

        dC/dW^l ~ -(dPhi/dW^l (s_beta) - dPhi/dW^l (s_-beta)) / (2 beta)

    and dPhi/dW^l is the layer's own pair of s^{l-1} and s^l. With `symmetric=False` it is the free
    state in place of s_-beta, and the divisor beta. As beta goes to 0 this becomes the gradient of
    the cost of the *free equilibrium*, C(s*), with an error of beta^2 (of beta, if not symmetric):
    that is the `truth` here, found from the linear equations of the equilibrium (Almeida, 1987;
    Pineda, 1987), for which the network settles until rounding stops it; NaN if it does not settle.
    `outputs` are s^L of the free equilibrium, not those of the forward sweep.

    Source: Scellier and Bengio, Equilibrium propagation: bridging the gap between energy-based
    models and backpropagation (2017); Laborieux, Ernoult, Scellier, Bengio, Grollier and Querlioz,
    Scaling equilibrium propagation to deep convnets by drastically reducing its gradient estimator
    bias (2021), for Phi and symmetric nudging.

    Initialisation: s is 0 before the free phase. Nothing is learned but the weights.

    Assumes: symmetric weights; a chain of units A_l that are linear, bias aside (or max-pooling),
    and whose activations do not decrease, so that there is an energy; and that it settles, which is
    not given: look at the residuals. Bounded activations (`HardTanh`, `Sigmoid`, `Tanh`), at the
    output too, settle most surely; `Relu` may grow without bound.

    Attributes:
        nudge: beta, above 0.
        steps: at most so many, in the free phase.
        nudged_steps: at most so many, in each nudged phase.
        rate: how far each step goes, above 0 and at most 1.
        tolerance: stop when in every unit there is left to go (to the right-hand side above) at
            most this part of the way that it has come in this phase, or what rounding hides.
        symmetric: whether to nudge in both directions.

    `Info.extra` has "steps" and "residual" of the free phase, and the residuals of the nudged ones:
    what is compared with the tolerance, 1 where nothing has come to a unit yet, NaN where s
    diverges.

    Raises:
        ValueError: settings out of range; layers that no such energy has, by name.
    """

    nudge: float = 0.1
    steps: int = 300
    nudged_steps: int = 100
    rate: float = 0.5
    tolerance: float = 1e-5
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "nudge", above=0)
        check_numbers(self, "rate", above=0, most=1)
        check_sizes(self, "steps", "nudged_steps")
        check_numbers(self, "tolerance", least=0)
        check_flags(self, "symmetric")

    def begin(self, key: Array, net: Node, params: PyTree, x: Any) -> PyTree:
        name = type(self).__name__
        check_chain(net, name)
        for unit in units(net):
            linear, rest = _halves(unit)
            for link in linear:
                if activates(link):
                    raise ValueError(
                        f"{name} is not defined for {link.path}, {link.node}: an activation before "
                        "the first weights; apply it to the inputs instead"
                    )
            for link in rest:
                _check_activation(name, link.path, link.node)
        if net.draws:
            raise ValueError(f"{name} is not defined for layers that draw, such as dropout")
        return None

    def sweep(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None
    ) -> tuple[PyTree, Info]:
        net, loss, n = state.net, state.loss, batch_size(x)
        params, x = widened((params, x))
        chain, own = units(net), split_units(net, params)

        def phase(start: list[Array], beta: float, most: int) -> tuple[list[Array], Any, Any]:
            return self._settle(state, params, x, y, start, beta, most)

        free, steps, residual = phase(self._zeros(net, params, x), 0.0, self.steps)
        up, _, residual_up = phase(free, self.nudge, self.nudged_steps)
        down, residual_down, width = free, jnp.zeros_like(residual), self.nudge
        if self.symmetric:
            down, _, residual_down = phase(free, -self.nudge, self.nudged_steps)
            width = 2 * self.nudge

        def pairs(s: list[Array]) -> list[Any]:
            """-dPhi/dW of every unit, with the deltas that they are made of."""
            found = []
            for unit, params_of, before, here in zip(chain, own, [x, *s], s, strict=False):
                linear, rest = _halves(unit)
                _, traces = unit_forward(linear, params_of[: len(linear)], before)
                kept = unit_backward(linear, params_of[: len(linear)], traces, -here, keep)[1]
                found.append((*kept, *[()] * len(rest)))
            return found

        kept = jax.tree.map(lambda a, b: (a - b) / width, pairs(up), pairs(down))
        grads, deltas = taken_apart(net, join_units(net, kept), n)
        losses = loss.value(free[-1], y)
        extra = {
            "steps": steps,
            "residual": residual,
            "residual_up": residual_up,
            "residual_down": residual_down,
        }
        return grads, Info(jnp.mean(losses), free[-1], deltas, extra)

    def outputs(self, state: State, params: PyTree, x: Any) -> Any:
        return _free(self, state, params, x)[-1]

    def truth(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> PyTree:
        """The gradient of the mean cost of the free equilibrium.

        At s = T(s, W) the cost has the gradient (dT/dW)^T u, where u = dC/ds + (dT/ds)^T u.
        """
        return _truth(self, state, params, x, y)

    def true_deltas(
        self, state: State, params: PyTree, x: Any, y: Any, key: Array | None = None
    ) -> dict[str, Any]:
        return {}

    def check(self, net: Node, loss: Loss, params: PyTree, x: Any, y: Any) -> None:
        super().check(net, loss, params, x, y)
        shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), x)
        leaves, tree = jax.tree.flatten(shapes)
        bent = _bent(net, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if bent is not None:
            raise ValueError(
                f"{type(self).__name__} is not defined for {bent.path}, {bent.node}: it is neither "
                "linear nor an activation of each number by itself, so that no energy has it"
            )

    def _zeros(self, net: Node, params: PyTree, x: Any) -> list[Array]:
        shapes = jax.eval_shape(functools.partial(_activities, net), params, x)
        return [jnp.zeros(s.shape, s.dtype) for s in shapes]

    def _settle(
        self,
        state: State,
        params: PyTree,
        x: Any,
        y: Any,
        start: list[Array],
        beta: float,
        most: int,
    ) -> tuple[list[Array], Array, Array]:
        """Where s settles; how many steps that took, and what is left of the way."""

        def far(s: list[Array]) -> tuple[list[Array], Array]:
            target = self._target(state, params, x, y, s, beta)
            way = [t - v for t, v in zip(target, s, strict=True)]
            return way, _left(way, target, [v - v0 for v, v0 in zip(s, start, strict=True)])

        return settle(far, start, self.rate, most, self.tolerance)

    def _target(
        self, state: State, params: PyTree, x: Any, y: Any, s: list[Array], beta: float
    ) -> list[Array]:
        """sigma_l(dPhi/ds^l - beta dC/ds^l) of every unit."""
        chain, own = units(state.net), split_units(state.net, params)
        above: list[Any] = []
        inputs: list[Array] = []
        for unit, params_of, before, here in zip(chain, own, [x, *s], s, strict=False):
            linear, _ = _halves(unit)
            z, traces = unit_forward(linear, params_of[: len(linear)], before)
            inputs.append(z)
            parts = linear, params_of[: len(linear)], traces, here
            above.append(unit_backward(*parts, nothing)[0])
        found = []
        for i, (unit, params_of) in enumerate(zip(chain, own, strict=True)):
            linear, rest = _halves(unit)
            z = inputs[i]
            if i + 1 < len(chain):
                z = z + above[i + 1]
            elif beta:
                z = z - beta * state.loss.delta(s[-1], y)
            found.append(unit_forward(rest, params_of[len(linear) :], z)[0])
        return found


def _halves(unit: Unit) -> tuple[Unit, Unit]:
    """The linear part of a unit, and its activations."""
    start = weighted(unit)
    at = next((i for i in range(start, len(unit)) if activates(unit[i])), len(unit))
    return unit[:at], unit[at:]


@functools.lru_cache(maxsize=256)
def _bent(net: Node, tree: Any, shapes: tuple[Any, ...]) -> Link | None:
    """The first link before an activation that is not linear: twice the input is not twice as far.

    (From 0, so that a bias is none; max-pooling passes.)
    """

    def drawn(key: Array, shape: Any, dtype: Any) -> Array:
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.zeros((2, *shape), dtype)
        return jax.random.normal(key, (2, *shape), jnp.float32)

    tried: list[Link] = []

    def bends() -> list[Array]:
        keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
        params = jax.tree.map(lambda w: w.astype(jnp.float32), net.init(keys[0]))
        x = jax.tree.unflatten(tree, [drawn(k, *s) for k, s in zip(keys[1:], shapes, strict=True)])
        found = []
        for unit, own in zip(units(net), split_units(net, params), strict=True):
            linear, _ = _halves(unit)
            for link, part in zip(unit, own, strict=True):
                y = forward(link.node, part, x)[0]
                if link in linear and _is_float(x) and _is_float(y):
                    start, twice = (forward(link.node, part, size * x)[0] for size in (0, 2))
                    apart = norm((twice - start) - 2 * (y - start))
                    found.append(apart > 1e-3 * norm(twice - start))
                    tried.append(link)
                x = y
        return found

    found = jax.jit(bends).lower().compile()()  # also where all else is being traced
    return next((link for link, bent in zip(tried, found, strict=True) if bent), None)


def _is_float(x: Any) -> bool:
    return hasattr(x, "dtype") and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _check_activation(rule: str, path: str, node: Any) -> None:
    if not hasattr(node, "activate"):
        raise ValueError(
            f"{rule} is not defined for {path}, {node}: behind the activation of a unit there is "
            "no place for it; put it before the activation, or leave it out"
        )
    with jax.ensure_compile_time_eval():
        heights = np.asarray(node.activate(jnp.linspace(-8, 8, 161)))
    if np.any(np.diff(heights) < -1e-6):
        raise ValueError(
            f"{rule} is not defined for {path}, {node}: the activation decreases somewhere, so "
            "that no energy has it; use HardTanh, Sigmoid or Tanh"
        )


def _activities(net: Node, params: PyTree, x: Any) -> list[Array]:
    found: list[Array] = []
    for unit, own in zip(units(net), split_units(net, params), strict=True):
        found.append(unit_forward(unit, own, found[-1] if found else x)[0])
    return found


@on_mesh(lambda rule, state, params, x: examples(x))
@functools.partial(jax.jit, static_argnums=0)
def _free(rule: EquilibriumPropagation, state: State, params: PyTree, x: Any) -> list[Array]:
    params, x = widened((params, x))
    start = rule._zeros(state.net, params, x)
    return rule._settle(state, params, x, None, start, 0.0, rule.steps)[0]


@on_mesh(lambda rule, state, params, *_: like(params))
@functools.partial(jax.jit, static_argnums=0)
def _truth(rule: EquilibriumPropagation, state: State, params: PyTree, x: Any, y: Any) -> PyTree:
    n, dtypes = batch_size(x), jax.tree.map(lambda w: w.dtype, params)
    params, x = widened((params, x))
    zeros = rule._zeros(state.net, params, x)
    rounding = float(jnp.finfo(zeros[0].dtype).eps)
    closely = dataclasses.replace(rule, tolerance=10 * rounding)
    s, _, residual = closely._settle(state, params, x, y, zeros, 0.0, LONG)
    cost = jax.vjp(lambda s: rule._target(state, params, x, y, s, 0.0), s)[1]
    outer = [*zeros[:-1], state.loss.delta(s[-1], y)]

    def far(u: list[Array]) -> tuple[list[Array], Array]:
        target = [a + b for a, b in zip(outer, cost(u)[0], strict=True)]
        way = [t - v for t, v in zip(target, u, strict=True)]
        return way, _left(way, target, u)

    u, _, apart = settle(far, outer, rule.rate, LONG, closely.tolerance)
    found = jax.vjp(lambda params: rule._target(state, params, x, y, s, 0.0), params)[1](u)[0]
    settled = jnp.maximum(residual, apart) < SETTLED
    return jax.tree.map(
        lambda g, dtype: jnp.where(settled, g / n, jnp.nan).astype(dtype), found, dtypes
    )


def _left(way: list[Array], target: list[Array], come: list[Array]) -> Array:
    """How far there is to go beside the way that a unit has come, where that is most; at most 1.

    What is lost in rounding where one is to go is not counted.
    """

    def of(way: Array, target: Array, come: Array) -> Array:
        far, whole = norm(way), norm(target)
        seen = jnp.maximum(far - jnp.finfo(far.dtype).eps * whole, 0)
        return share(jnp.where(jnp.isfinite(whole), seen, jnp.nan), jnp.maximum(far, norm(come)))

    return largest(map(of, way, target, come))
