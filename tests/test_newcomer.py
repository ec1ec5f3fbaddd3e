"""What a newcomer does first, and gets wrong: the words that say how it is done."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbackprop as jb

pytestmark = pytest.mark.newest
LOSS = jb.SoftmaxCrossEntropy()


def fit(net: Any, params: Any, x: Any, y: Any, optimizer: Any = None, loss: Any = LOSS) -> jb.Fit:
    return jb.fit(
        net, loss, params, (x, y), optimizer or optax.adam(1e-2), epochs=2, batch_size=4,
        key=jax.random.key(1), progress=False,
    )  # fmt: skip


@pytest.fixture
def net() -> jb.Sequential:
    return jb.mlp([4, 5, 3])


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((8, 4)).astype("float32"), rng.integers(0, 3, 8)


@pytest.mark.parametrize("kind", [str, object])
def test_classes_by_name_are_to_be_made_numbers(as_jax_comes, net, data, kind) -> None:
    x, y = data
    names = np.array(["ash", "elm", "oak"])[y].astype(kind)
    with pytest.raises(TypeError, match=r"no number; of classes .* np\.unique\(y") as error:
        fit(net, net.init(jax.random.key(0)), x, names)
    (code,) = [part for part in str(error.value).split(": ") if "np.unique" in part]
    space: dict[str, Any] = {"np": np, "y": names}
    exec(code, space)
    np.testing.assert_array_equal(space["classes"][space["y"]], names)


def test_text_among_the_features_is_not_taken_for_classes(as_jax_comes, net, data) -> None:
    with pytest.raises(TypeError, match=r"x must be arrays of real numbers, not of <U32"):
        fit(net, net.init(jax.random.key(0)), data[0].astype(str), data[1])


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2, weight_decay=0.5), optax.sgd(0.1)])
def test_what_is_frozen_stays_whatever_weight_decay_there_is(
    as_jax_comes, net, data, optimizer
) -> None:
    tuned = jb.Sequential(jb.Frozen(net.layers[0]), *net.layers[1:])
    params = net.init(jax.random.key(0))
    params[0]["b"] = params[0]["b"] + 1  # that zeros stay says nothing
    found = fit(tuned, params, *data, optimizer).params
    for name in ("w", "b"):
        np.testing.assert_array_equal(found[0][name], params[0][name])
    assert np.any(found[2]["w"] != params[2]["w"])


def test_an_eps_that_is_0_in_float16_is_named(as_jax_comes, net, data) -> None:
    x, y = data
    x[:, 0] = 0  # a gradient of 0 over an eps of 0
    params = jax.tree.map(lambda v: v.astype("float16"), net.init(jax.random.key(0)))
    with pytest.raises(jb.NonFiniteError, match="in float16 an eps of 1e-8, as Adam has, is 0"):
        fit(net, params, x.astype("float16"), y)
    history = fit(net, params, x.astype("float16"), y, optax.adam(1e-2, eps=1e-4)).history
    assert np.all(np.isfinite(history["loss"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jb.Sequential([jb.Dense(2, 3), jb.Tanh()]), r"no layer; .*: add \* in front$"),
        (lambda: jb.Sequential(jb.Dense(2, 3), jnp.tanh), r"no layer; .* Activation\(f, derivat"),
        (lambda: jb.Sequential(jb.Dense(2, 3), jb.Tanh), r"no layer; make an instance: add \(\)$"),
        (lambda: jb.Sequential(jb.Dense(2, 3), None), r"None, which is no layer$"),
        (lambda: jb.mlp([2, 3, 1], jnp.tanh), r"no layer; .* Activation\(f, derivative\)$"),
        (lambda: jb.value_and_grad(jb.Tanh(), lambda z, y: z), "subclass of jb.Loss with value"),
    ],
)
def test_what_is_no_layer_or_loss_says_what_would_be_one(call, message) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_list_of_inputs_is_to_be_a_tuple() -> None:
    net = jb.Sequential(jb.Parallel(jb.Dense(2, 3), jb.Dense(4, 3)), jb.Add())
    params, x = net.init(jax.random.key(0)), [jnp.ones((5, 2)), jnp.ones((5, 4))]
    call = jb.value_and_grad(net, jb.SquaredError())
    with pytest.raises(TypeError, match=r"use np\.asarray\(x\), or tuple\(x\) of several$"):
        call(params, x, jnp.ones((5, 3)))
    call(params, tuple(x), jnp.ones((5, 3)))
    with pytest.raises(TypeError, match=r"use np\.asarray\(x\)$"):
        jb.value_and_grad(net.layers[0].layers[0], jb.SquaredError())(
            params[0][0], [[1.0, 2.0]], jnp.ones((1, 3))
        )


def test_the_summary_of_several_inputs_takes_x() -> None:
    net = jb.Sequential(jb.Parallel(jb.Dense(2, 3), jb.Dense(4, 3)), jb.Add())
    with pytest.raises((TypeError, ValueError), match="x_shape") as error:
        jb.summary(net, ((2,), (4,)))  # type: ignore[arg-type]
    assert "give x=, a mini-batch" in "".join(error.value.__notes__)
    assert "(3,)" in jb.summary(net, x=(jnp.ones((1, 2)), jnp.ones((1, 4))))


def test_weights_of_positions_are_the_losss() -> None:
    net = jb.Dense(2, 3)
    params, x, y = net.init(jax.random.key(0)), jnp.ones((4, 5, 2)), jnp.zeros((4, 5), int)
    call = jb.value_and_grad(net, LOSS)
    with pytest.raises(ValueError, match=r"not \(4, 5\); positions are left out by the loss"):
        call(params, x, y, weights=jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"not \(5,\)") as error:
        call(params, x, y, weights=jnp.ones(5))
    assert "positions" not in str(error.value)


def test_a_single_output_has_no_accuracy_of_the_largest(as_jax_comes, net, data) -> None:
    """It was 1 whatever came."""
    x, y = data
    one, bits = jb.mlp([4, 5, 1]), (y > 0)[:, None]
    z = jb.forward(one, one.init(jax.random.key(0)), x)[0]
    for targets in (bits, bits[:, 0]):
        with pytest.raises(ValueError, match="binary_accuracy is for one output"):
            jb.metrics.accuracy(z, targets)
    np.testing.assert_array_equal(jb.metrics.binary_accuracy(z, bits), ((z > 0) == bits)[:, 0])
    with pytest.raises(ValueError, match="or SigmoidCrossEntropy one and y"):
        fit(one, one.init(jax.random.key(0)), x, bits[:, 0].astype(int))
    fit(one, one.init(jax.random.key(0)), x, bits, loss=jb.SigmoidCrossEntropy())


@pytest.mark.parametrize(
    ("shape", "hint"),
    [((5, 3, 8, 6), "jnp.moveaxis(x, 1, -1)"), ((5, 8, 3, 6), "jnp.moveaxis(x, 2, -1)")],
)
def test_channels_come_last(shape, hint) -> None:
    conv, x = jb.Conv(3, 2, (3, 3)), jnp.ones(shape)
    params = conv.init(jax.random.key(0))
    with pytest.raises(ValueError, match="needs 3 features on the last axis") as error:
        jb.forward(conv, params, x)
    assert hint in str(error.value)
    jb.forward(conv, params, eval(hint))


def test_grey_images_get_an_axis() -> None:
    conv, x = jb.Conv(1, 2, (3, 3)), jnp.ones((5, 8, 6))
    params = conv.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"give it one: x\[\.\.\., None\]"):
        jb.forward(conv, params, x)
    jb.forward(conv, params, x[..., None])


@dataclasses.dataclass(frozen=True)
class Gains(jb.Layer):
    """The README's, with one thing forgotten in each of those below."""

    reads = ("x",)

    def init(self, key: Any) -> Any:
        return jnp.ones(4)

    def forward(self, g: Any, x: Any, key: Any = None) -> Any:
        return g * x, None

    def backward(self, g: Any, trace: Any, delta: Any) -> Any:
        return delta * g, jb.Scale.of(trace.x, delta)


class ReadsNothing(Gains):
    reads = ()


class UsesNone(ReadsNothing):
    def backward(self, g: Any, trace: Any, delta: Any) -> Any:
        return delta * g, jb.Scale.of(trace.x * 1.0, delta)


class SavesNothing(Gains):
    def forward(self, g: Any, x: Any, key: Any = None) -> Any:
        return g * x


@pytest.mark.parametrize("n", [2, 5])
def test_a_forward_that_saves_nothing_says_so(n) -> None:
    """Also of two examples, which could be taken for the two."""
    with pytest.raises(TypeError, match="must give two, y and what is saved: return y, None"):
        jb.forward(SavesNothing(), jnp.ones(4), jnp.ones((n, 4)))


@pytest.mark.parametrize("layer", [ReadsNothing(), UsesNone()])
def test_what_backward_uses_is_to_be_named(layer) -> None:
    x = jnp.ones((5, 4))
    with pytest.raises((AttributeError, TypeError), match="NoneType") as error:
        jb.backprop(layer, jb.SquaredError(), jnp.ones(4), x, x)
    assert "x and y may be None. What backward uses, `reads` has" in "".join(error.value.__notes__)
    jb.backprop(Gains(), jb.SquaredError(), jnp.ones(4), x, x)


@dataclasses.dataclass(frozen=True)
class Holds(Gains):
    a: Any = None


@dataclasses.dataclass(eq=True)
class NotFrozen(jb.Layer):
    p: int = 4

    def init(self, key: Any) -> Any:
        return ()

    def forward(self, params: Any, x: Any, key: Any = None) -> Any:
        return x, None

    def backward(self, params: Any, trace: Any, delta: Any) -> Any:
        return delta, ()


@pytest.mark.parametrize("layer", [Holds(jnp.ones(4)), NotFrozen()])
def test_a_layer_is_frozen_and_holds_no_arrays(layer) -> None:
    net, x = jb.Sequential(layer, jb.Dense(4, 4)), jnp.ones((5, 4))
    params = (jnp.ones(4), jb.Dense(4, 4).init(jax.random.key(0)))
    for call in (jb.backprop, lambda net, loss, *at: jb.value_and_grad(net, loss)(*at)):
        with pytest.raises(TypeError, match="a frozen dataclass that holds no arrays"):
            call(net, jb.SquaredError(), params, x, x)
