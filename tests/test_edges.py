"""Where numbers, shapes and structures are at their edge: large scores, nothing, integers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import assert_close, relative

import jbackprop as jb
from jbackprop import sweep

pytestmark = pytest.mark.newest
LOSS = jb.SquaredError()
FUSED = jb.FusedSoftmaxCrossEntropy()
TOKENS = jnp.array([[0, 1, 4], [2, 2, 3], [1, 1, 1]])
THERE = jnp.array([[True, True, False], [True, True, True], [True, False, False]])


@pytest.mark.parametrize("mask", [(), (jnp.ones((1, 3), bool),)], ids=["", "masked"])
@pytest.mark.parametrize("c", [1e2, 1e3, 1e4])
def test_attention_with_large_scores(c, mask):
    layer = jb.Attention(1)
    q = jnp.full((1, 3, 4), c, "float32")
    x = (q, q, jnp.arange(12, dtype="float32").reshape(1, 3, 4), *mask)
    y, saved = jb.forward(layer, (), x)
    back = jb.backward(layer, (), layer.trace(x, y, saved), jnp.ones_like(y), sweep.total)
    np.testing.assert_allclose(back[0][2], 1, rtol=1e-6)  # three times a third of it


@pytest.mark.parametrize("c", [1e4, 1e6, 1e8])
def test_fused_head_with_large_net_inputs(c):
    net = jb.Sequential(jb.Dense(1, 3, bias=False))
    params = ({"w": jnp.array([[1, 1, 0]], "float32")},)
    x, y = jnp.array([[c]], "float32"), jnp.array([0])
    _, grads = jb.value_and_grad(net, jb.FusedSoftmaxCrossEntropy())(params, x, y)
    np.testing.assert_allclose(grads[0]["w"], [[-c / 2, c / 2, 0]], rtol=1e-6)


def test_float16_attention_keeps_small_deltas():
    layer = jb.Attention(2, causal=True)
    keys = jax.random.split(jax.random.key(0), 4)
    half = [jax.random.normal(k, (1, 256, 8), "float16") for k in keys]
    x, delta = tuple(half[:3]), half[3] * jnp.float16(1e-4)

    def back(x, delta):
        y, saved = jb.forward(layer, (), x)
        return jb.backward(layer, (), layer.trace(x, y, saved), delta, sweep.total)[0]

    wide = jax.tree.map(lambda v: v.astype("float64"), (x, delta))
    for got, due in zip(back(x, delta), back(*wide), strict=True):
        assert relative(got, due) < 5e-3


@pytest.mark.parametrize("common", [10.0, 1e3])
def test_norms_of_what_positions_have_in_common(common):
    """Activations with a large common part, deltas that sum to zero: their Gram matrices cancel."""
    rng = np.random.default_rng(0)
    a = 0.1 * rng.normal(size=(3, 6, 16)) + common * rng.normal(size=(1, 1, 16))
    delta = rng.normal(size=(3, 6, 16))
    delta -= delta.mean(1, keepdims=True)
    for one, other in ((a, delta), (delta, a)):
        pair = jax.vmap(jb.Outer.of)(jnp.asarray(one, "float32"), jnp.asarray(other, "float32"))
        pair = pair.at(jb.Place((16, 16), jnp.dtype("float32")))
        g = np.einsum("nti,nto->nio", *(np.asarray(v[:, 0], float) for v in (pair.a, pair.delta)))
        np.testing.assert_allclose(pair.square_norm(), np.sum(g**2, axis=(1, 2)), rtol=2e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layer", [jb.Gelu(), jb.Gelu(tanh=True)], ids=repr)
def test_the_tail_of_gelu_in_16_bits(layer, dtype):
    z = jnp.array([[-1, -2, -3, -4]], dtype)
    y, _ = jb.forward(layer, (), z)
    slope, _ = jb.backward(layer, (), jb.Trace(z, y, None), jnp.ones_like(y), sweep.total)
    wide = z.astype("float64")
    exact, _ = jb.forward(layer, (), wide)
    due, _ = jb.backward(layer, (), jb.Trace(wide, exact, None), jnp.ones_like(exact), sweep.total)
    tolerance = 4 * float(jnp.finfo(dtype).eps)  # and what float32 loses of 1 + tanh in the tail
    np.testing.assert_allclose(np.asarray(y, float), exact, rtol=tolerance)
    np.testing.assert_allclose(np.asarray(slope, float), due, rtol=tolerance)


MASKED = {
    "fan-out": jb.Sequential(
        jb.FanOut(jb.Sequential(jb.Select(0), jb.Embedding(5, 4)), jb.Select(1)),
        jb.multi_head_attention(4, 2, masked=True),
    ),
    "parallel": jb.Sequential(
        jb.Parallel(jb.Embedding(5, 4), jb.Identity()),
        jb.multi_head_attention(4, 2, masked=True),
    ),
}


@pytest.mark.parametrize("net", MASKED.values(), ids=MASKED.keys())
def test_tokens_with_a_mask_can_be_learnt(net, key):
    params, y = net.init(key), jnp.ones((3, 3, 4))

    def cost(params):
        return jnp.mean(LOSS.value(jb.forward(net, params, (TOKENS, THERE))[0], y))

    @jax.jit
    def of(params):
        bp = jb.backprop(net, LOSS, params, (TOKENS, THERE), y)
        assert len(jb.deltas(bp)) == 3
        found = jb.value_and_grad(net, LOSS)(params, (TOKENS, THERE), y)
        return found, jb.gradient(bp), jax.value_and_grad(cost)(params)

    found, gradient, truth = of(params)
    assert_close(found, truth)
    assert_close(gradient, truth[1])
    assert jb.as_function(net)(params, (TOKENS, THERE)).shape == (3, 3, 4)


def test_what_only_moves_entries_takes_integers(key):
    net = jb.Sequential(jb.Reshape((3, 2)), jb.Flatten(), jb.Take(2), jb.Embedding(9, 4))
    x = jnp.arange(12).reshape(2, 6) % 9
    value, _ = jb.value_and_grad(net, LOSS)(net.init(key), x, jnp.ones((2, 4)))
    assert np.isfinite(value)


def test_an_empty_batch_goes_through_scanned_nets(key):
    net = jb.Repeat(jb.Sequential(jb.Dense(4, 4), jb.Frozen(jb.Dense(4, 4))), 4, checkpoint_every=2)
    params = net.init(key)
    bp = jb.backprop(net, LOSS, params, jnp.ones((0, 4)), jnp.ones((0, 4)))
    assert bp.losses.shape == (0,)
    assert not np.any(jb.gradient(bp, jnp.ones(0))[0]["w"])
    full = jb.backprop(net, LOSS, params, jnp.ones((3, 4)), jnp.ones((3, 4)))
    assert full.factored[1]["w"].each().shape == (3, 4, 4, 4)


def test_an_empty_batch_with_places_to_ignore(key):
    net, loss = jb.Dense(3, 3), jb.SoftmaxCrossEntropy(ignore_index=-1)
    labels = jnp.zeros(0, int)
    value, _ = jb.value_and_grad(net, loss)(net.init(key), jnp.ones((0, 3)), labels, jnp.ones(0))
    assert value == 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no sequences", "of no tokens"])
@pytest.mark.parametrize("loss", [jb.SquaredError(), jb.SoftmaxCrossEntropy(), jb.Huber(), FUSED])
def test_nothing_with_positions_costs_nothing(loss, shape, key):
    net, x = jb.Sequential(jb.Embedding(5, 4), jb.Dense(4, 5)), jnp.zeros(shape, int)
    y = x if "CrossEntropy" in str(loss) else jnp.zeros((*shape, 5))
    params, weights = net.init(key), jnp.ones(len(x))
    found = jb.value_and_grad(net, loss)(params, x, y, weights)
    assert jax.tree.all(jax.tree.map(lambda v: not np.any(v), found))
    z, _ = jb.forward(net, params, x)
    assert jb.metrics.accuracy(z, x).shape == weights.shape


def test_a_linear_recurrent_net(key):
    assert jb.check.layer(jb.RNN(2, 3, activation=jb.Identity()), (4, 2), truth="autodiff").ok


def test_a_frozen_head_can_be_fused(key):
    net = jb.Sequential(jb.Dense(4, 3), jb.Frozen(jb.Sequential(jb.Tanh(), jb.Dense(3, 5))))
    params, x, y = net.init(key), jax.random.normal(key, (2, 4)), jnp.array([0, 3])
    fused = jb.value_and_grad(net, jb.FusedSoftmaxCrossEntropy())(params, x, y)
    assert_close(fused, jb.value_and_grad(net, jb.SoftmaxCrossEntropy())(params, x, y))


def test_kinds_kept_under_an_outer_vmap_refuse(key):
    nets = [
        (jb.Autodiff(lambda p, x: x * p, lambda k: jnp.ones(2)), jnp.ones((3, 2)), (3, 2)),
        (jb.Embedding(4, 2), jnp.zeros((3, 2), int), (3, 2, 2)),
        (jb.Dense(2, 2), jnp.ones((3, 2)), (3, 2)),
        (jb.Gain(2), jnp.ones((3, 2)), (3, 2)),
        (jb.Conv(1, 2, (1,)), jnp.ones((3, 2, 1)), (3, 2, 2)),
    ]
    for net, x, shape in nets:
        both = jax.tree.map(lambda p: jnp.stack([p, p]), net.init(key))
        bp = jax.vmap(lambda p, net=net, x=x, s=shape: jb.backprop(net, LOSS, p, x, jnp.ones(s)))(
            both
        )
        for ask in ("total", "each", "square_norm", "second_moment"):
            for pair in jax.tree.leaves(bp.factored, is_leaf=jb.factored.is_factored):
                with pytest.raises(ValueError, match="outer vmap"):
                    getattr(pair, ask)()


def test_transport_of_another_depth_is_named(key):
    net = jb.Repeat(jb.Dense(4, 4), 3)
    x = jnp.ones((2, 4))
    with pytest.raises(ValueError, match="every transport needs an axis of 3 copies"):
        jb.backprop(net, LOSS, net.init(key), x, x, transport=jb.Dense(4, 4).init(key))


def test_a_forgotten_join_is_named(key):
    net = jb.Sequential(jb.FanOut(jb.Dense(2, 2), jb.Dense(2, 2)), jb.Dense(2, 2))
    with pytest.raises(TypeError, match="behind a FanOut a join"):
        jb.forward(net, net.init(key), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="batch axis"):
        jb.forward(jb.Tanh(), (), jnp.float64(3))


def test_ignore_index_is_an_int():
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        jb.SoftmaxCrossEntropy(ignore_index=1.5)
