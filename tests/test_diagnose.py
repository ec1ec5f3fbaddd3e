"""Delta flow, saturation, and where NaN began."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import relative

import jbackprop as jb

pytestmark = pytest.mark.newest


def test_delta_norms_by_hand(key):
    net, loss = jb.mlp([3, 4, 2]), jb.SquaredError()
    x, y = jax.random.normal(key, (5, 3)), jnp.zeros((5, 2))
    bp = jb.backprop(net, loss, net.init(key), x, y)
    flow = jb.diagnose.delta_norms(bp)
    for path, delta in jb.deltas(bp).items():
        assert relative(flow.norms[path], np.sqrt((np.asarray(delta) ** 2).sum(1)).mean()) < 1e-14
    assert list(flow.ratios) == ["layers[0]"]
    assert flow.ratios["layers[0]"] == flow.norms["layers[0]"] / flow.norms["layers[2]"]
    assert "layers[0]" in str(flow)
    assert f"{flow.norms['layers[2]']:.3e}" in str(flow)


def test_vanishing_deltas_are_not_rounded_to_zero():
    """At 1e-30 the squares of float32 numbers are 0: the norm is not."""
    net, loss = jb.Dense(3, 3), jb.SquaredError()
    params = {"w": jnp.zeros((3, 3), "float32"), "b": jnp.full(3, 1e-30, "float32")}
    x, y = jnp.zeros((2, 3), "float32"), jnp.zeros((2, 3), "float32")
    flow = jb.diagnose.delta_norms(jb.backprop(net, loss, params, x, y))
    assert flow.norms["net"] == pytest.approx(3**0.5 * 1e-30, rel=1e-6)
    none = jb.diagnose.delta_norms(
        jb.backprop(net, loss, jax.tree.map(jnp.zeros_like, params), x, y)
    )
    assert none.norms == {"net": 0.0}


def test_sigmoids_vanish_and_the_ratio_says_so(key):
    net, loss = jb.mlp([8] + [8] * 10 + [2], jb.Sigmoid()), jb.SquaredError()
    x = jax.random.normal(key, (16, 8))
    flow = jb.diagnose.delta_norms(jb.backprop(net, loss, net.init(key), x, jnp.ones((16, 2))))
    assert all(ratio < 0.5 for ratio in flow.ratios.values())
    assert flow.norms["layers[0]"] < 1e-4 * flow.norms["layers[20]"]


def test_saturated_and_dead_units():
    net = jb.Sequential(jb.Identity(), jb.Relu(), jb.Tanh())
    x = jnp.asarray([[-1.0, 2.0, 9.0, -3.0], [-2.0, 1.0, 0.5, 4.0]])
    relu, tanh = jb.diagnose.saturation(net, ((), (), ()), x)
    assert (relu.path, relu.layer, relu.units) == ("layers[1]", "Relu()", 4)
    assert relu.saturated == 3 / 8
    assert relu.dead == 1 / 4  # the first unit is off for both; the last for one only
    slopes = 1 - np.tanh([[0, 2, 9, 0], [0, 1, 0.5, 4]]) ** 2
    assert tanh.saturated == (slopes < 0.05).mean()
    assert tanh.dead == 0
    table = str(jb.diagnose.saturation(net, ((), (), ()), x))
    assert "25.0%" in table


def test_first_nonfinite_in_the_order_of_computation(key):
    loss = jb.SquaredError()
    log = jb.Activation(jnp.log, lambda z: 1 / z)
    net = jb.Sequential(jb.Dense(2, 2), log, jb.Dense(2, 1))
    params = net.init(key)
    positive = ({"w": jnp.eye(2), "b": jnp.ones(2)}, (), params[2])
    x, y = jnp.ones((3, 2)), jnp.zeros((3, 1))
    where = jb.diagnose.first_nonfinite
    assert where(net, loss, positive, x, y) is None
    assert where(net, loss, positive, x * jnp.nan, y) == "the inputs x"
    negative = ({"w": -2 * jnp.eye(2), "b": jnp.zeros(2)}, (), params[2])
    assert where(net, loss, negative, x, y).startswith("the output of layers[1] (Activation(")
    broken = (positive[0], (), {"w": params[2]["w"] * jnp.inf, "b": params[2]["b"]})
    assert where(net, loss, broken, x, y) == "the parameters of layers[2] (Dense(2, 1))"
    assert where(net, loss, positive, x, y * jnp.nan).startswith("the cost (SquaredError()")
    root = jb.Activation(lambda z: jnp.sqrt(jnp.abs(z)), lambda z: 0.5 * z / jnp.abs(z) ** 1.5)
    net = jb.Sequential(jb.Dense(2, 2), root, jb.Dense(2, 1))
    zero = ({"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}, (), params[2])
    assert where(net, loss, zero, x, y + 1).startswith("the delta of layers[0] (Dense(2, 2))")


def test_the_picture(key, tmp_path):
    net, loss = jb.mlp([3, 4, 4, 2]), jb.SquaredError()
    params, x = net.init(key), jax.random.normal(key, (5, 3))
    flow = jb.diagnose.delta_norms(jb.backprop(net, loss, params, x, jnp.zeros((5, 2))))
    fig = jb.diagnose.plot(flow, jb.diagnose.saturation(net, params, x))
    drawn = fig.axes[0].lines[0].get_ydata()
    np.testing.assert_array_equal(drawn, list(flow.norms.values()))
    assert len(fig.axes[1].patches) == 4  # saturated and dead, of two layers
    fig.savefig(tmp_path / "deltas.png")
    assert (tmp_path / "deltas.png").read_bytes().startswith(b"\x89PNG")
    assert len(jb.diagnose.plot(flow).axes) == 1


def test_activations_by_path(key):
    net = jb.Sequential(jb.Dense(3, 4), jb.Sequential(jb.Tanh(), jb.Dense(4, 2)))
    params, x = net.init(key), jax.random.normal(key, (5, 3))
    found = jb.activations(net, params, x)
    assert list(found) == ["layers[0]", "layers[1].layers[0]", "layers[1].layers[1]"]
    z = x @ params[0]["w"]
    assert relative(found["layers[0]"], z) < 1e-15
    assert relative(found["layers[1].layers[0]"], np.tanh(z)) < 1e-14
    assert relative(found["layers[1].layers[1]"], jb.forward(net, params, x)[0]) == 0


def test_summary():
    table = jb.summary(jb.mlp([784, 128, 10]), (784,))
    assert "Dense(784, 128)" in table
    assert "100,352" not in table
    assert "100,480" in table
    assert "101,770" in table
    assert "(128,)" in table
    assert "(784, 128)" in jb.summary(jb.Dense(784, 128))
