"""The public calls, in every surrounding that JAX has."""

import dataclasses
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from truth import assert_close, each_grad, mean_cost, relative

import jbackprop as jb
from jbackprop import sweep
from jbackprop.mesh import EXPLICIT

LOSS = jb.SoftmaxCrossEntropy()
NET = jb.mlp([6, 8, 5, 3], [jb.Tanh(), jb.Gelu()])


def batch(n=7, p=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, p))), jnp.asarray(rng.integers(0, classes, n))


@pytest.fixture
def params(key):
    return NET.init(key)


def truth(params, x, y):
    return jax.jit(jax.value_and_grad(lambda p: mean_cost(NET, LOSS, p, x, y)))(params)


def test_backprop_hands_out_what_jax_grad_hides(params):
    x, y = batch()
    bp = jb.backprop(NET, LOSS, params, x, y)
    assert relative(bp.losses, LOSS.value(jb.forward(NET, params, x)[0], y)) == 0
    assert bp.outputs.shape == (7, 3)
    assert list(jb.deltas(bp)) == ["layers[0]", "layers[2]", "layers[4]"]
    assert [d.shape for d in jb.deltas(bp).values()] == [(7, 8), (7, 5), (7, 3)]
    one_hot = jax.nn.one_hot(y, 3, dtype=float)
    assert relative(jb.deltas(bp)["layers[4]"], jax.nn.softmax(bp.outputs) - one_hot) < 1e-14
    truth_x = jax.vmap(
        jax.grad(lambda x, y: LOSS.value(jb.forward(NET, params, x[None])[0], y[None])[0])
    )
    assert relative(bp.delta_x, truth_x(x, y)) < 1e-13
    paths = [p.place.path for p in jax.tree.leaves(bp.factored, is_leaf=jb.factored.is_factored)]
    assert paths == [f"layers[{i}].{name}" for i in (0, 2, 4) for name in ("b", "w")]
    assert_close(jb.gradient(bp), truth(params, x, y)[1])


def test_weights(params):
    x, y = batch()
    w = jnp.asarray([0.1, 2.0, 0.0, 1.0, -0.5, 0.3, 4.0])
    value, grads = jax.jit(
        jax.value_and_grad(lambda p: jnp.sum(w * LOSS.value(jb.forward(NET, p, x)[0], y)))
    )(params)
    bp = jb.backprop(NET, LOSS, params, x, y)
    assert_close(jb.gradient(bp, w), grads)
    assert_close(jb.value_and_grad(NET, LOSS)(params, x, y, w), (value, grads))
    each = each_grad(NET, LOSS, params, x, y)
    assert_close(jb.gradient(bp, w), jax.tree.map(lambda g: jnp.tensordot(w, g, 1), each))


def test_an_example_of_weight_0_is_not_there_even_if_it_is_nan(params):
    x, y = batch()
    w = jnp.asarray([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    expected = jb.value_and_grad(NET, LOSS)(params, x, y, w)
    poisoned = x.at[1].set(jnp.nan).at[6].set(jnp.inf)
    assert_close(jb.value_and_grad(NET, LOSS)(params, poisoned, y, w), expected, 0)
    bp = jb.backprop(NET, LOSS, params, poisoned, y)
    assert_close(jb.gradient(bp, w), expected[1], 0)


def test_deltas_against_perturbed_net_inputs(params):
    """The delta of a layer by central differences in its net input: no autodiff at all."""
    x, y = batch(2)
    bp = jb.backprop(NET, LOSS, params, x, y)
    for i in (0, 2, 4):
        below, above = jb.Sequential(*NET.layers[: i + 1]), NET.layers[i + 1 :]
        z = jb.forward(below, params[: i + 1], x)[0]

        def cost(z, above=above, i=i):
            out = jb.forward(jb.Sequential(*above), params[i + 1 :], z)[0] if above else z
            return LOSS.value(out, y)

        h = 1e-4
        eye = jnp.eye(z.shape[1])

        def central(h, e, z=z, cost=cost):
            e = jnp.broadcast_to(h * e, z.shape)
            return (cost(z + e) - cost(z - e)) / (2 * h)

        columns = [(4 * central(h, e) - central(2 * h, e)) / 3 for e in eye]
        assert relative(jb.deltas(bp)[f"layers[{i}]"], jnp.stack(columns, 1)) < 1e-9


def test_homogeneous_form(key):
    """b folded into W, with a constant input 1, has the same gradient."""
    x, y = batch()
    net, folded = jb.mlp([6, 3]), jb.Dense(7, 3, bias=False)
    (p,) = net.init(key)
    ones = jnp.concatenate([x, jnp.ones((7, 1))], axis=1)
    w = jnp.concatenate([p["w"], p["b"].reshape(1, 3)])
    value, (grads,) = jb.value_and_grad(net, LOSS)((p,), x, y)
    value_f, grads_f = jb.value_and_grad(folded, LOSS)({"w": w}, ones, y)
    assert relative(value, value_f) < 1e-14
    assert relative(jnp.concatenate([grads["w"], grads["b"].reshape(1, 3)]), grads_f["w"]) < 1e-14


class TestSurroundings(chex.TestCase):
    def setUp(self):
        super().setUp()
        self.params = NET.init(jax.random.key(0))
        self.x, self.y = batch()
        self.call = jb.value_and_grad(NET, LOSS)

    @chex.variants(with_jit=True, without_jit=True)
    def test_jit(self):
        got = self.variant(self.call)(self.params, self.x, self.y)
        chex.assert_trees_all_close(got, truth(self.params, self.x, self.y), rtol=1e-12)

    @chex.variants(with_jit=True, without_jit=True)
    def test_vmap_over_an_ensemble(self):
        stack = jax.vmap(NET.init)(jax.random.split(jax.random.key(3), 4))
        got = self.variant(jax.vmap(self.call, in_axes=(0, None, None)))(stack, self.x, self.y)
        chex.assert_trees_all_close(
            got, jax.vmap(truth, in_axes=(0, None, None))(stack, self.x, self.y), rtol=1e-11
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_hessian_vector_product_by_jvp_of_our_gradient(self):
        v = jax.tree.map(jnp.sin, self.params)

        def product(grad):
            return jax.jvp(lambda p: grad(p, self.x, self.y)[1], (self.params,), (v,))[1]

        got = self.variant(lambda: product(self.call))()
        chex.assert_trees_all_close(got, product(truth), rtol=1e-10)

    def test_reverse_mode_through_our_gradient(self):
        def size(grad):
            return lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(p, self.x, self.y)[1]))

        got = jax.jit(jax.grad(size(self.call)))(self.params)
        chex.assert_trees_all_close(got, jax.jit(jax.grad(size(truth)))(self.params), rtol=1e-10)

    def test_scan_over_steps(self):
        def step(params, _):
            value, grads = self.call(params, self.x, self.y)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

        _, values = jax.lax.scan(step, self.params, length=5)
        params, expected = self.params, []
        for _ in range(5):
            params, value = step(params, None)
            expected.append(value)
        chex.assert_trees_all_close(values, jnp.stack(expected), rtol=1e-13)

    def test_one_trace_per_shape(self):
        call = jax.jit(chex.assert_max_traces(self.call, n=1))
        for seed in range(3):
            call(self.params, *batch(seed=seed))
        with pytest.raises(AssertionError):
            call(self.params, *batch(8))

    def test_eager_calls_are_compiled_once(self):
        gradient = sys.modules["jbackprop.gradient"]  # its name in jb is that of the function

        net = jb.mlp([6, 4, 3], jb.Softplus())
        compiled = gradient._backprop.__wrapped__ if EXPLICIT else gradient._backprop
        params, before = net.init(jax.random.key(1)), compiled._cache_size()
        for seed in range(3):
            jb.backprop(net, LOSS, params, *batch(seed=seed))
        assert compiled._cache_size() == before + 1
        assert jb.as_function(net) is jb.as_function(jb.mlp([6, 4, 3], jb.Softplus()))

    def test_donation(self):
        def step(params, x, y):
            _, grads = self.call(params, x, y)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

        expected = step(self.params, self.x, self.y)
        donated = jax.tree.map(jnp.copy, self.params)
        got = jax.jit(step, donate_argnums=0)(donated, self.x, self.y)
        chex.assert_trees_all_close(got, expected, rtol=1e-13)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))

    def test_lowers_for_cpu_cuda_and_tpu(self):
        from jax import export

        def deltas(*args):
            return jb.deltas(jb.backprop(NET, LOSS, *args))

        for dtype in ("float32", "bfloat16"):
            params = jax.tree.map(lambda v, dtype=dtype: v.astype(dtype), self.params)
            args = params, self.x.astype(dtype), self.y
            for call in (self.call, deltas):
                done = export.export(jax.jit(call), platforms=("cpu", "cuda", "tpu"))(*args)
                assert done.platforms == ("cpu", "cuda", "tpu")

    def test_as_function_inside_another_model(self):
        f = jb.as_function(NET)
        outer = jax.random.normal(jax.random.key(9), (4, 6))

        def cost(outer, params, function):
            z = function(params, jnp.tanh(self.x[:, :4] @ outer))
            return jnp.mean(LOSS.value(z, self.y))

        got = jax.jit(jax.value_and_grad(lambda *a: cost(*a, f), (0, 1)))(outer, self.params)
        plain = jax.value_and_grad(
            lambda *a: cost(*a, lambda p, x: jb.forward(NET, p, x)[0]), (0, 1)
        )
        chex.assert_trees_all_close(got, plain(outer, self.params), rtol=1e-12)
        stacked = jax.vmap(lambda o: jax.grad(lambda *a: cost(*a, f))(o, self.params))
        both = jnp.stack([outer, 2 * outer])
        chex.assert_trees_all_close(
            stacked(both)[1],
            jax.jit(jax.grad(lambda o: cost(o, self.params, f)))(both[1]),
            rtol=1e-12,
        )


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_dtypes_go_in_and_come_out(params, dtype):
    x, y = batch()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    value, grads = jb.value_and_grad(NET, LOSS)(params, x.astype(dtype), y)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    assert value.dtype == (jnp.float64 if dtype == "float64" else jnp.float32)
    bp = jb.backprop(NET, LOSS, params, x.astype(dtype), y)
    assert {d.dtype for d in jb.deltas(bp).values()} == {jnp.dtype(dtype)}
    assert_close(jb.gradient(bp), grads, 4 * float(jnp.finfo(dtype).eps))
    assert jb.predict(NET, LOSS, params, x.astype(dtype)).dtype == jnp.dtype(dtype)


def test_float16_gradients_do_not_underflow_with_the_size_of_the_batch(key):
    """delta / B is below float16's smallest number here; autodiff of the mean loses it all."""
    n = 4096
    net, loss = jb.Dense(2, 2), jb.SquaredError()
    params = jax.tree.map(lambda p: 0 * p.astype("float16"), net.init(key))
    x, y = jnp.ones((n, 2), "float16"), jnp.full((n, 2), 1e-4, "float16")
    _, grads = jb.value_and_grad(net, loss)(params, x, y)
    np.testing.assert_allclose(grads["b"].astype(float), -1e-4, rtol=2e-3)
    lost = jax.jit(
        jax.grad(lambda p: jnp.mean(0.5 * jnp.sum((x @ p["w"] + p["b"].reshape(1, 2) - y) ** 2, 1)))
    )(params)
    assert not np.any(np.asarray(lost["b"], float))


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1], [5, 1, 4], [3, 2]])
def test_odd_sizes(n, sizes, key):
    net = jb.mlp(sizes)
    x = jax.random.normal(key, (n, sizes[0]))
    y = jnp.ones((n, sizes[-1]))
    assert jb.check.network(net, jb.SquaredError(), net.init(key), x, y).ok


@pytest.mark.newest
def test_sixty_layers(key):
    """Of few different widths and activations, so that they compile in a bearable time."""
    widths, activations = [5, 17, 2] * 20, ([jb.Elu(), jb.Softsign(), jb.Gelu()] * 20)[:60]
    net = jb.mlp([4, *widths, 2], activations)
    params = net.init(key)
    x, y = batch(3, 4, 2)
    got = jax.jit(jb.value_and_grad(net, LOSS))(params, x, y)
    truth = jax.jit(jax.value_and_grad(lambda p: mean_cost(net, LOSS, p, x, y)))
    assert_close(got, truth(params))


def test_an_empty_batch(params):
    x, y = jnp.zeros((0, 6)), jnp.zeros(0, int)
    bp = jb.backprop(NET, LOSS, params, x, y)
    assert bp.losses.shape == (0,)
    nothing = jb.gradient(bp, jnp.zeros(0))
    assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(nothing))
    with pytest.raises(ValueError, match="the batch is empty"):
        jb.gradient(bp)
    with pytest.raises(ValueError, match="the batch is empty"):
        jb.value_and_grad(NET, LOSS)(params, x, y)


def test_numpy_arrays_that_are_not_contiguous(params):
    x, y = batch()
    strided = np.asfortranarray(np.repeat(np.asarray(x), 2, axis=1))[:, ::2]
    assert not strided.flags["C_CONTIGUOUS"]
    reversed_y = np.asarray(y)[::-1]
    got = jb.value_and_grad(NET, LOSS)(params, strided, reversed_y)
    assert_close(got, truth(params, x, jnp.asarray(reversed_y.copy())))


def test_transport_carries_the_deltas_and_nothing_else(params):
    """Feedback alignment, written out: fixed weights in the place of the transposed ones."""
    x, y = batch()
    feedback = NET.init(jax.random.key(5))
    bp = jb.backprop(NET, LOSS, params, x, y, transport=feedback)
    a1 = jnp.tanh(jb.forward(NET.layers[0], params[0], x)[0])
    z2 = jb.forward(NET.layers[2], params[2], a1)[0]
    delta3 = jax.nn.softmax(bp.outputs) - jax.nn.one_hot(y, 3, dtype=float)
    slope2 = jax.vmap(jax.vmap(jax.grad(lambda z: jax.nn.gelu(z, approximate=False))))(z2)
    delta2 = delta3 @ feedback[4]["w"].T * slope2
    delta1 = delta2 @ feedback[2]["w"].T * (1 - a1**2)
    for path, expected in (("layers[4]", delta3), ("layers[2]", delta2), ("layers[0]", delta1)):
        assert relative(jb.deltas(bp)[path], expected) < 1e-13
    assert relative(jb.gradient(bp)[0]["w"], x.T @ delta1 / 7) < 1e-13
    same = jb.backprop(NET, LOSS, params, x, y, transport=params)
    assert_close(jb.gradient(same), truth(params, x, y)[1])
    partly = (None, None, feedback[2], None, None)
    delta2 = delta3 @ params[4]["w"].T * slope2
    bp = jb.backprop(NET, LOSS, params, x, y, transport=partly)
    assert relative(jb.deltas(bp)["layers[2]"], delta2) < 1e-13


def test_collect_and_aux_reach_every_layer(params):
    x, y = batch()
    aux = ("first", None, "second", None, "third")
    seen = []

    def collect(factored, delta, part):
        seen.append((part, delta.shape))
        return {name: pair.square_norm() for name, pair in factored.items()}

    outputs, saved = jb.forward(NET, params, x)
    _, norms = jb.backward(
        NET, params, jb.Trace(x, None, saved), LOSS.delta(outputs, y), collect, None, aux
    )
    assert seen == [("third", (7, 3)), ("second", (7, 5)), ("first", (7, 8))]
    assert norms[1] == ()
    each = each_grad(NET, LOSS, params, x, y)
    truth_norms = jax.tree.map(lambda g: jnp.sum(g.reshape(7, -1) ** 2, axis=1), each)
    assert_close(norms, truth_norms)
    _, by_name = jb.backward(
        NET, params, jb.Trace(x, None, saved), LOSS.delta(outputs, y), sweep.square_norm
    )
    assert_close(by_name, truth_norms)


@dataclasses.dataclass(frozen=True)
class Skip(jb.Composite):
    """x + branch(x), as a user would write it: composites need nothing but the two sweeps."""

    branch: jb.Composite

    @property
    def reads(self):
        return ("x",) if "x" in self.branch.reads else ()

    def init(self, key):
        return self.branch.init(key)

    def forward(self, params, x, key):
        with sweep.inside("branch", self.branch):
            y, saved = jb.forward(self.branch, params, x, key)
        return x + y, (y if "y" in self.branch.reads else None, saved)

    def backward(self, params, trace, delta, collect, transport, aux):
        y, saved = trace.saved
        inner = jb.Trace(trace.x, y, saved)
        back, found = jb.backward(self.branch, params, inner, delta, collect, transport, aux)
        return delta + back, found


@dataclasses.dataclass(frozen=True)
class Noise(jb.Layer):
    """Multiplies by exp of normal noise, made again on the way back from the key it saved."""

    draws = True

    def init(self, key):
        return ()

    def _factor(self, x, key):
        return 1.0 if key is None else jnp.exp(0.1 * jax.random.normal(key, x.shape))

    def forward(self, params, x, key=None):
        return x * self._factor(x, key), key

    def backward(self, params, trace, delta):
        return delta * self._factor(delta, trace.saved), ()


def test_a_users_own_composite(key):
    net = jb.Sequential(
        jb.Dense(6, 4), Skip(jb.Sequential(jb.Dense(4, 4), jb.Tanh())), Skip(jb.mlp([4, 5, 4])),
        jb.Dense(4, 3),
    )  # fmt: skip
    x, y = batch()
    params = net.init(key)
    verdict = jb.check.network(net, LOSS, params, x, y)
    assert verdict.ok, str(verdict)
    bp = jb.backprop(net, LOSS, params, x, y)
    assert list(jb.deltas(bp)) == [
        "layers[0]", "layers[1].branch.layers[0]", "layers[2].branch.layers[0]",
        "layers[2].branch.layers[2]", "layers[3]",
    ]  # fmt: skip
    bad = jb.Sequential(Skip(jb.Sequential(jb.Tanh(), jb.Dense(4, 6))))
    bad_params = bad.init(key)
    with pytest.raises(ValueError, match="needs 4 features") as caught:
        jb.backprop(bad, LOSS, bad_params, x, y)
    notes = [n for n in caught.value.__notes__ if "in the network" in n]
    assert notes == ["in the network, at layers[0].branch.layers[1]: Dense(4, 6)"]


def test_keys_reach_layers_that_draw_one_for_each_example(key):
    net = jb.Sequential(jb.Dense(6, 4), Noise(), jb.Sequential(Noise(), jb.Dense(4, 3)))
    params = net.init(key)
    x, y = jnp.ones((7, 6)), jnp.zeros(7, int)
    quiet = jb.backprop(net, LOSS, params, x, y).outputs
    loud = jb.backprop(net, LOSS, params, x, y, key=key).outputs
    assert relative(quiet, jnp.broadcast_to(quiet[:1], quiet.shape)) < 1e-14
    assert len(np.unique(np.asarray(loud)[:, 0])) == 7
    call = jb.value_and_grad(net, LOSS)
    got = call(params, x, y, None, key)
    plain = jax.value_and_grad(lambda p: jnp.mean(LOSS.value(jb.forward(net, p, x, key)[0], y)))
    assert_close(got, plain(params))
    assert net.draws
    assert not NET.draws


@dataclasses.dataclass(frozen=True)
class Centre(jb.Layer):
    """Subtracts the mean over the batch: one example's output depends on the others."""

    couples_examples = True

    def init(self, key):
        return ()

    def forward(self, params, x, key=None):
        return x - jax.lax.pmean(x, sweep.BATCH_AXIS), None

    def backward(self, params, trace, delta):
        return delta - jax.lax.pmean(delta, sweep.BATCH_AXIS), ()


def test_coupled_examples_are_right_in_sum_and_refused_by_name_where_weights_make_no_sense(key):
    twice = jb.Repeat(jb.Sequential(Centre(), jb.Dense(4, 4)), 2)
    net = jb.Sequential(jb.Dense(6, 4, bias=False), Centre(), jb.Tanh(), twice, jb.Dense(4, 3))
    params = net.init(key)
    x, y = batch()
    w = jnp.linspace(0.5, 2, 7)

    def cost(p, w):
        return jnp.sum(w * LOSS.value(jb.forward(net, p, x)[0], y))

    call = jb.value_and_grad(net, LOSS)
    assert_close(
        call(params, x, y), jax.jit(jax.value_and_grad(cost))(params, jnp.full(7, 1 / 7)), 1e-11
    )
    assert_close(call(params, x, y, w), jax.jit(jax.value_and_grad(cost))(params, w), 1e-11)
    bp = jb.backprop(net, LOSS, params, x, y)
    assert_close(jb.gradient(bp), jax.jit(jax.grad(cost))(params, jnp.full(7, 1 / 7)), 1e-11)
    by_name = r"layers\[1\] \(Centre\(\)\) couples the examples"
    with pytest.raises(ValueError, match=by_name):
        jb.gradient(bp, w)
    pair = bp.factored[3][1]["w"]
    assert (pair.home.path, pair.home.stack) == ("layers[3].layer.layers[1].w", (2,))
    bare = pair.pair
    for ask in (
        pair.each, pair.square_norm, pair.second_moment, lambda: pair.total(w),
        lambda: pair.dot(pair), lambda: bare.dot(pair), lambda: pair.gram(bare),
        lambda: bare.gram(pair),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=by_name + ".*the gradient of one.*fold_batch_norm"):
            ask()


def test_token_ids_and_tuples_go_through(key):
    """Integer inputs get no delta, and as_function gives them none either."""

    @dataclasses.dataclass(frozen=True)
    class Pick(jb.Layer):
        reads = ("x",)

        def init(self, key):
            return jax.random.normal(key, (5, 3))

        def forward(self, params, x, key=None):
            return params[x], None

        def backward(self, params, trace, delta):
            hot = jax.nn.one_hot(trace.x, 5, dtype=delta.dtype)
            return None, jb.Outer.of(hot, delta)

    net = jb.Sequential(Pick(), jb.Dense(3, 3))
    params, ids, y = net.init(key), jnp.asarray([0, 4, 2]), jnp.asarray([0, 1, 2])
    bp = jb.backprop(net, LOSS, params, ids, y)
    assert bp.delta_x is None
    plain = jax.jit(jax.grad(lambda p: mean_cost(net, LOSS, p, ids, y)))(params)
    assert_close(jb.gradient(bp), plain)
    f = jb.as_function(net)
    assert_close(jax.jit(jax.grad(lambda p: jnp.mean(LOSS.value(f(p, ids), y))))(params), plain)


@pytest.mark.newest  # XLA's schedule is another with each version: on JAX 0.6.0 one takes 1.07
@pytest.mark.as_shipped
def test_temporary_memory_is_at_most_that_of_autodiff():
    """Deterministic: what the compiler says, for the benchmark's plain perceptrons."""
    from jbackprop.bench.suite.mlp import WORKLOADS

    with jax.numpy_rank_promotion("allow"):
        for load in WORKLOADS:
            args = jax.tree.map(
                lambda v: v.astype("float32") if v.dtype == float else v, load.data()
            )
            ours, theirs = (
                jax.jit(p.function).lower(*args).compile().memory_analysis().temp_size_in_bytes
                for kind in ("ours", "plain")
                for p in load.contestants()
                if p.kind == kind
            )
            assert ours <= theirs, load.name


def test_optax_takes_the_gradient(params):
    x, y = batch()
    _, grads = jb.value_and_grad(NET, LOSS)(params, x, y)
    with jax.numpy_dtype_promotion("standard"):  # Optax itself is not strict
        updates, _ = optax.adam(1e-3).update(grads, optax.adam(1e-3).init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_the_derivative_by_a_weight_is_there_also_where_the_weight_is_0(params):
    """Influence functions and learning to reweight start at a weight of exactly 0."""
    x, y = batch()
    call = jb.value_and_grad(NET, LOSS)
    zeros = jnp.zeros(7)
    by_weights = jax.jit(jax.grad(lambda w: call(params, x, y, w)[0]))(zeros)
    assert relative(by_weights, jb.backprop(NET, LOSS, params, x, y).losses) < 1e-13
    through = jax.jacobian(lambda w: call(params, x, y, w)[1])(zeros)
    each = each_grad(NET, LOSS, params, x, y)
    assert_close(jax.tree.map(lambda j: jnp.moveaxis(j, -1, 0), through), each)


@pytest.mark.parametrize("weight", [1 / 4096, 1e5])
def test_weights_in_float16_neither_underflow_nor_overflow(key, weight):
    n = 4096
    net, loss = jb.Dense(2, 2), jb.SquaredError()
    params = jax.tree.map(lambda p: 0 * p.astype("float16"), net.init(key))
    x, y = jnp.ones((n, 2), "float16"), jnp.full((n, 2), 1e-4, "float16")
    w = jnp.full(n, weight, "float32").at[2:].set(0.0 if weight > 1 else weight)
    expected = -1e-4 * float(w.sum())
    _, grads = jb.value_and_grad(net, loss)(params, x, y, w)
    np.testing.assert_allclose(grads["b"].astype(float), expected, rtol=3e-3)
    kept = jb.gradient(jb.backprop(net, loss, params, x, y), w)
    np.testing.assert_allclose(kept["w"].astype(float), expected, rtol=3e-3)


def test_a_kind_kept_under_an_outer_vmap_says_so(params):
    x, y = batch()
    stack = jax.vmap(NET.init)(jax.random.split(jax.random.key(3), 4))
    bps = jax.vmap(lambda p: jb.backprop(NET, LOSS, p, x, y))(stack)
    with pytest.raises(ValueError, match="kept under an outer vmap"):
        bps.factored[0]["w"].total()
    grads = jax.vmap(lambda p: jb.gradient(jb.backprop(NET, LOSS, p, x, y)))(stack)
    assert_close(grads, jax.vmap(lambda p: truth(p, x, y)[1])(stack), 1e-11)


@pytest.mark.newest
def test_data_parallel_on_four_devices():
    """The batch sharded over four devices gives one device's numbers."""
    script = """
import jax, jax.numpy as jnp, numpy as np, jbackprop as jb
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("data",))
net, loss = jb.mlp([6, 8, 3]), jb.SoftmaxCrossEntropy()
params = net.init(jax.random.key(0))
x, y = jax.random.normal(jax.random.key(1), (8, 6)), jnp.arange(8) % 3
put = lambda v: jax.device_put(v, NamedSharding(mesh, P("data")))
call = jax.jit(jb.value_and_grad(net, loss))
one, four = call(params, x, y), call(params, put(x), put(y))
for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
bp = jb.backprop(net, loss, params, put(x), put(y))
norms = bp.factored[0]["w"].square_norm()
plain = jb.backprop(net, loss, params, x, y).factored[0]["w"].square_norm()
np.testing.assert_allclose(norms, plain, rtol=1e-5)
print(len(jax.devices()), "devices agree")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env=os.environ | flags, timeout=300,
    )  # fmt: skip
    assert done.stdout.strip() == "4 devices agree", done.stderr


@dataclasses.dataclass(frozen=True)
class TorchLike(jb.Layer):
    """z = W x with W (q, p): its pair leads back through a transpose."""

    p: int
    q: int
    reads = ("x",)

    def init(self, key):
        return jax.random.normal(key, (self.q, self.p))

    def forward(self, w, x, key=None):
        return w @ x, None

    def backward(self, w, trace, delta):
        return delta @ w, jb.Outer.of(trace.x, delta, steps=(("transpose", (1, 0)),))


def test_steps_go_through_the_sweep(key):
    net = jb.Sequential(TorchLike(6, 4), jb.Tanh(), TorchLike(4, 3))
    x, y = batch()
    params = net.init(key)
    assert jb.check.network(net, LOSS, params, x, y).ok
    each = each_grad(net, LOSS, params, x, y)
    bp = jb.backprop(net, LOSS, params, x, y)
    for i in (0, 2):
        assert relative(bp.factored[i].each(), each[i]) < 1e-13


def test_mixed_dtypes_follow_their_owners(key):
    """bfloat16 inputs with float32 parameters: each gradient in the dtype of what it is of."""
    net = jb.mlp([6, 4, 3])
    params = jax.tree.map(lambda p: p.astype("float32"), net.init(key))
    x, y = batch()
    with jax.numpy_dtype_promotion("standard"):
        half = x.astype("bfloat16")
        bp = jb.backprop(net, LOSS, params, half, y)
        assert bp.delta_x.dtype == jnp.bfloat16
        assert {g.dtype for g in jax.tree.leaves(jb.gradient(bp))} == {jnp.dtype("float32")}
        by_x = jax.jit(jax.grad(lambda x: jnp.mean(LOSS.value(jb.as_function(net)(params, x), y))))(
            half
        )
        assert by_x.dtype == jnp.bfloat16
        truth = jax.jit(jax.grad(lambda x: mean_cost(net, LOSS, params, x, y)))(half)
        assert relative(by_x.astype(float), truth.astype(float)) < 0.01
    low = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    f = jb.as_function(net)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(f(p, half).astype("float32"))))(low)
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}
