"""A hand-written rule inside an Equinox model.

The rule is a gated linear unit, derived below as you would a layer of your own (ours is `jb.glu`).
`jb.check.network` proves it against `jax.grad` in float64, and `jb.as_function` makes of it a plain
JAX function whose reverse rule is ours. In the model it stands between two `eqx.nn.Linear`
layers, is differentiated by `eqx.filter_value_and_grad` and trained by Optax; neither notices.

    python examples/inside_equinox.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.nn import initializers
from sklearn.datasets import load_digits

import jbackprop as jb


@dataclasses.dataclass(frozen=True)
class GatedLinear(jb.Layer):
    """y = u * s with u = x V and s = sigmoid(x W): one half decides how much of the other passes.

    Derivation. Let delta = dC/dy, and z = x W, so that s has the slope s (1 - s). Then

        delta_u = dC/du = delta * s,        delta_z = dC/dz = delta * u * s (1 - s).

    Both are net inputs of a matrix, so the rest is the delta rule, twice: dC/dV = x (outer)
    delta_u, dC/dW = x (outer) delta_z, and x reaches the cost through both,

        dC/dx = delta_u V^T + delta_z W^T.

    Source: Dauphin et al., Language modeling with gated convolutional networks (2016), equation 1.
    """

    p: int
    q: int

    reads = ("x",)

    def init(self, key: Array) -> dict[str, Array]:
        shape, glorot = (self.p, self.q), initializers.glorot_uniform()
        key_v, key_w = jax.random.split(key)
        return {"v": glorot(key_v, shape), "w": glorot(key_w, shape)}

    def forward(self, params: Any, x: Array, key: Array | None = None) -> tuple[Array, Any]:
        u, s = x @ params["v"], jax.nn.sigmoid(x @ params["w"])
        return u * s, (u, s)

    def backward(self, params: Any, trace: jb.Trace, delta: Array) -> tuple[Array, Any]:
        u, s = trace.saved
        delta_u = delta * s
        delta_z = delta * u * s * (1 - s)
        delta_x = delta_u @ params["v"].T + delta_z @ params["w"].T
        return delta_x, {"v": jb.Outer.of(trace.x, delta_u), "w": jb.Outer.of(trace.x, delta_z)}


def plain_gated_linear(params: Any, x: Array) -> Array:
    """The same as anyone would write it, to be differentiated by JAX."""
    return (x @ params["v"]) * jax.nn.sigmoid(x @ params["w"])


class Model(eqx.Module):
    """Pixels -> linear -> gated linear -> linear -> net inputs of ten classes."""

    encoder: eqx.nn.Linear
    gate_params: dict[str, Array]
    decoder: eqx.nn.Linear
    gate: Callable[[Any, Array], Array] = eqx.field(static=True)

    def __init__(self, rule: GatedLinear, gate: Callable[[Any, Array], Array], key: Array):
        keys = jax.random.split(key, 3)
        self.encoder = eqx.nn.Linear(64, rule.p, key=keys[0])
        self.gate_params = rule.init(keys[1])
        self.decoder = eqx.nn.Linear(rule.q, 10, key=keys[2])
        self.gate = gate

    def __call__(self, x: Array) -> Array:
        h = jax.vmap(self.encoder)(x)
        h = self.gate(self.gate_params, h)  # takes the whole mini-batch
        return jax.vmap(self.decoder)(h)


@eqx.filter_value_and_grad
def cost(model: Model, x: Array, y: Array) -> Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(x), y))


def relative_difference(ours: Any, theirs: Any) -> float:
    """|ours - theirs| / |theirs|, the largest of all parameters."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def main(width: int = 32, steps: int = 300, batch_size: int = 64) -> dict[str, Any]:
    """Prove the rule, compare the model's gradients with plain autodiff's, and train it."""
    rng = np.random.default_rng(0)
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(pixels))
    x, y = jnp.asarray(pixels[order] / 16, "float32"), jnp.asarray(labels[order], "int32")
    x_train, y_train, x_test, y_test = x[:1400], y[:1400], x[1400:], y[1400:]

    rule = GatedLinear(width, width)
    inputs = jax.random.normal(jax.random.key(0), (8, width))
    params = rule.init(jax.random.key(1))
    verdict = jb.check.network(rule, jb.SquaredError(), params, inputs, inputs, dtype="float64")
    print(f"{verdict}\n")

    model = Model(rule, jb.as_function(rule), jax.random.key(2))
    plain = Model(rule, plain_gated_linear, jax.random.key(2))
    _, by_rule = cost(model, x_train, y_train)
    _, by_autodiff = cost(plain, x_train, y_train)
    difference = relative_difference(by_rule, by_autodiff)
    print("The model's gradients, our rule inside against plain autodiff:")
    print(f"  relative difference {difference:.1e} (float32)\n")

    optimizer = optax.adam(3e-3)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model: Model, opt_state: Any, x: Array, y: Array) -> tuple[Model, Any, Array]:
        value, grads = cost(model, x, y)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    losses = []
    for _ in range(steps):
        batch = rng.choice(len(x_train), batch_size, replace=False)
        model, opt_state, value = step(model, opt_state, x_train[batch], y_train[batch])
        losses.append(float(value))
    accuracy = float(jnp.mean(jnp.argmax(model(x_test), axis=1) == y_test))
    print(f"Trained by Adam for {steps} steps: loss {losses[0]:.3f} -> {losses[-1]:.3f},")
    print(f"  {accuracy:.1%} of {len(x_test)} test digits right")
    return {
        "rule_error": verdict.worst_error,
        "rule_ok": verdict.ok,
        "difference": difference,
        "losses": losses,
        "accuracy": accuracy,
    }


if __name__ == "__main__":
    main()
