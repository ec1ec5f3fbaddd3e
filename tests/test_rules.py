"""Every rule of the catalogue: proved against jax.grad, and the laws that rules keep."""

import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import assert_close, each_grad, mean_cost, relative

import jbackprop as jb
from jbackprop import catalogue, layers, losses, sweep
from jbackprop.factored import is_factored

CASES = catalogue.cases()
LEAVES = [c for c in CASES if isinstance(c.net, jb.Layer)]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_leaf = pytest.mark.parametrize("case", LEAVES, ids=lambda case: case.name)


def traced(case):
    """The trace and a delta of a leaf's case."""
    y, saved = jb.forward(case.net, case.params, case.x)
    reads = case.net.reads
    trace = jb.Trace(case.x if "x" in reads else None, y if "y" in reads else None, saved)
    return trace, case.loss.delta(y, case.y)


@by_name
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_agrees_with_autodiff_in_float64(case, dtype):
    truth = "both" if dtype == "float64" else "autodiff"  # which numbers have confirmed there
    verdict = jb.check.network(case.net, case.loss, case.params, case.x, case.y, dtype, truth)
    assert verdict.ok, f"{case.name}\n{verdict}"
    assert len(verdict.leaves) > 2


@pytest.mark.newest
@by_name
def test_value_and_gradient_are_those_of_jax_grad(case):
    truth = jax.value_and_grad(lambda p: mean_cost(case.net, case.loss, p, case.x, case.y))(
        case.params
    )
    assert_close(jb.value_and_grad(case.net, case.loss)(case.params, case.x, case.y), truth)


@by_name
def test_per_example_questions_are_those_of_vmap_grad(case):
    bp = jb.backprop(case.net, case.loss, case.params, case.x, case.y)
    truth = each_grad(case.net, case.loss, case.params, case.x, case.y)
    pairs = jax.tree.leaves(bp.factored, is_leaf=is_factored)
    n = len(case.x)
    for pair, g in zip(pairs, jax.tree.leaves(truth), strict=True):
        flat = g.reshape(n, -1)
        assert relative(pair.each(), g) <= 1e-12
        assert relative(pair.total(), g.sum(0)) <= 1e-12
        assert relative(pair.square_norm(), (flat**2).sum(1)) <= 1e-12
        assert relative(pair.second_moment(), (g**2).sum(0)) <= 1e-12
        assert relative(pair.gram(pair), flat @ flat.T) <= 1e-12
        assert relative(pair.dot(pair), (flat**2).sum(1)) <= 1e-12


@pytest.mark.newest
class TestVariants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_jit_equals_eager(self):
        for case in CASES:
            call = self.variant(jb.value_and_grad(case.net, case.loss))
            with jax.disable_jit():
                slow = jb.value_and_grad(case.net, case.loss)(case.params, case.x, case.y)
            chex.assert_trees_all_close(
                call(case.params, case.x, case.y), slow, rtol=1e-13, atol=1e-15
            )


@each_leaf
def test_backward_is_linear_in_delta(case):
    trace, delta = traced(case)

    def collected(delta):
        return jb.backward(case.net, case.params, trace, delta, sweep.total)

    zeros = collected(jnp.zeros_like(delta))
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(zeros))
    other = jnp.flip(delta, 0)
    combined = collected(2 * delta - 3 * other)
    separate = jax.tree.map(lambda a, b: 2 * a - 3 * b, collected(delta), collected(other))
    assert_close(combined, separate, 1e-13)


@each_leaf
def test_adjoint_identity(case):
    """<J v, u> = <v, J^T u> for the Jacobian of the layer at x."""
    trace, u = traced(case)
    v = jnp.sin(jnp.arange(case.x.size, dtype=float)).reshape(case.x.shape)
    _, jv = jax.jvp(lambda x: jb.forward(case.net, case.params, x)[0], (case.x,), (v,))
    delta_x, _ = jb.backward(case.net, case.params, trace, u, sweep.keep)
    assert abs(jnp.sum(jv * u) - jnp.sum(v * delta_x)) <= 1e-13 * jnp.sum(jnp.abs(jv * u))


@each_leaf
def test_vmap_over_the_batch_equals_a_loop(case):
    trace, delta = traced(case)
    delta_x, factored = jb.backward(case.net, case.params, trace, delta, sweep.keep)
    each = jax.tree.map(lambda pair: pair.each(), factored, is_leaf=is_factored)
    for n in range(len(case.x)):
        one = jax.tree.map(lambda v, n=n: v[n : n + 1], trace)
        dx, f = jb.backward(case.net, case.params, one, delta[n : n + 1], sweep.keep)
        assert_close(dx[0], delta_x[n], 1e-14)
        got = jax.tree.map(lambda pair: pair.each()[0], f, is_leaf=is_factored)
        assert_close(got, jax.tree.map(lambda g, n=n: g[n], each), 1e-14)


@each_leaf
def test_reads_says_what_backward_reads(case):
    """Each of x and y is in `reads` exactly if the program of backward depends on it."""
    one = jax.tree.map(lambda v: v[0], (case.x, jb.forward(case.net, case.params, case.x)))
    x, (y, saved) = one

    def backward(x, y, saved, delta):
        return case.net.backward(case.params, jb.Trace(x, y, saved), delta)

    given = (x if "x" in case.net.reads else None, y if "y" in case.net.reads else None)
    closed = jax.make_jaxpr(backward)(*given, saved, jnp.ones_like(y))
    used = {v for eqn in closed.jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    used |= {v for v in closed.jaxpr.outvars if not hasattr(v, "val")}
    inputs = closed.jaxpr.invars[: len(case.net.reads)]
    assert all(v in used for v in inputs), f"{case.net} reads {case.net.reads}, but not really"


@each_leaf
def test_no_parameter_is_in_the_trace(case):
    closed = jax.make_jaxpr(lambda p, x: jb.forward(case.net, p, x)[1])(case.params, case.x)
    params = set(closed.jaxpr.invars[: len(jax.tree.leaves(case.params))])
    assert not params & {v for v in closed.jaxpr.outvars if not hasattr(v, "val")}


@each_leaf
def test_a_trace_keeps_only_what_is_read(case):
    net = jb.Sequential(case.net, case.net) if case.net.init(jax.random.key(0)) == () else None
    if net is None:
        net = jb.Sequential(jb.Identity(), case.net)
        params = ((), case.params)
    else:
        params = ((), ())
    _, (boundaries, _) = jb.forward(net, params, case.x)
    first, second = net.layers
    assert (boundaries[0] is not None) == ("y" in first.reads or "x" in second.reads)
    assert boundaries[1] is None


@by_name
def test_configurations_are_values(case):
    net = case.net
    assert hash(net) == hash(pickle.loads(pickle.dumps(net)))
    assert pickle.loads(pickle.dumps(net)) == net
    assert pickle.loads(pickle.dumps(case.loss)) == case.loss
    assert type(net).__name__ in repr(net)
    assert net != jb.Dense(77, 78)


def public(module, base):
    return {
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)
    }


def test_every_public_layer_and_loss_is_in_the_catalogue():
    tried = {type(leaf) for net, _ in catalogue.LAYERS for _, leaf, _ in sweep.walk(net)}
    assert public(layers, jb.Layer) <= tried
    assert public(jb, jb.Layer) <= tried
    assert public(losses, jb.Loss) <= {type(loss) for loss, _, _ in catalogue.LOSSES}


KINKED = [c.net for c in LEAVES if getattr(c.net, "kinks", ())]


@pytest.mark.parametrize("layer", KINKED, ids=repr)
def test_the_slope_at_a_kink_is_the_one_stated(layer):
    at = {"Relu": [0.0], "LeakyRelu": [getattr(layer, "alpha", None)], "HardTanh": [0.0, 0.0],
          "Elu": [getattr(layer, "alpha", None)], "Selu": [1.0507009873554805 * 1.6732632423543772]}  # fmt: skip
    x = jnp.asarray([layer.kinks])
    y, _ = jb.forward(layer, (), x)
    trace = jb.Trace(x if "x" in layer.reads else None, y, None)
    slope, _ = jb.backward(layer, (), trace, jnp.ones_like(y), sweep.keep)
    np.testing.assert_allclose(slope[0], at[type(layer).__name__], rtol=1e-15)


@pytest.mark.parametrize(
    "layer", [c.net for c in LEAVES if isinstance(c.net, jb.Elementwise)], ids=repr
)
def test_slopes_against_finite_differences_of_numpy(layer):
    """A truth without autodiff: central differences with one Richardson step."""
    z = np.array([-3.1, -1.7, -0.9, -0.4, -0.1, 0.2, 0.7, 0.95, 1.3, 2.8])
    y, _ = jb.forward(layer, (), jnp.asarray(z)[None])
    trace = jb.Trace(jnp.asarray(z)[None], y, None)
    slope, _ = jb.backward(layer, (), trace, jnp.ones_like(y), sweep.keep)

    def f(z):
        return np.asarray(jb.forward(layer, (), jnp.asarray(z)[None])[0][0])

    def central(h):
        return (f(z + h) - f(z - h)) / (2 * h)

    np.testing.assert_allclose(slope[0], (4 * central(5e-4) - central(1e-3)) / 3, atol=1e-10)


@pytest.mark.newest
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", LEAVES, ids=lambda case: case.name)
def test_extreme_net_inputs_give_finite_slopes(case, dtype):
    if not isinstance(case.net, jb.Elementwise | jb.Softmax) or isinstance(case.net, jb.Activation):
        return
    x = jnp.asarray([[-1e4, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4]], dtype)
    y, _ = jb.forward(case.net, (), x)
    slope, _ = jb.backward(case.net, (), jb.Trace(x, y, None), jnp.ones_like(y), sweep.keep)
    assert slope.dtype == x.dtype
    assert y.dtype == x.dtype
    assert bool(jnp.all(jnp.isfinite(slope)))
    assert bool(jnp.all(jnp.isfinite(y)))


WRONG = {
    "factor": jb.Activation(jnp.tanh, lambda z: 2 * (1 - jnp.tanh(z) ** 2)),
    "sign": jb.Activation(jnp.sin, lambda z: -jnp.cos(z)),
    "of the output": jb.Activation(jnp.tanh, lambda z: 1 - jnp.tanh(jnp.tanh(z)) ** 2),
    "one in a thousand": jb.Activation(jnp.tanh, lambda z: 1.001 * (1 - jnp.tanh(z) ** 2)),
}


@pytest.mark.parametrize("activation", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_wrong_derivative_is_found(activation, dtype, key):
    net, loss = jb.mlp([4, 5, 3], activation), jb.SquaredError()
    x, y = jnp.ones((6, 4)), jnp.zeros((6, 3))
    x = x * jnp.linspace(-1, 1, 6).reshape(6, 1)
    verdict = jb.check.network(net, loss, net.init(key), x, y, dtype)
    assert not verdict.ok
    wrong = {leaf.path for leaf in verdict.wrong}
    assert "layers[0].w" in wrong
    assert [leaf.path for leaf in verdict.wrong if leaf.kind.endswith("alone")] == ["layers[1]"]
    assert not {"layers[2]", "layers[2].w", "layers[2].b"} & wrong
    assert "WRONG" in str(verdict)


@pytest.mark.newest
def test_a_gradient_that_is_zero_by_nature_is_no_error(key):
    """Inputs in pairs x, -x with odd targets: the bias gradients cancel."""
    net, loss = jb.mlp([2, 3, 1]), jb.SquaredError()
    half = jax.random.normal(key, (4, 2))
    x = jnp.concatenate([half, -half])
    y = jnp.sum(jnp.sin(x), axis=1, keepdims=True)
    params = jax.tree.map(lambda p: p + 0.0, net.init(key))
    for dtype in ("float64", "float32"):
        verdict = jb.check.network(net, loss, params, x, y, dtype)
        assert verdict.ok, str(verdict)
        assert max(leaf.figures.tolerance for leaf in verdict.leaves) < 1e-3
    net = jb.Sequential(jb.Dense(2, 3), jb.Tanh(), BiasTwice(3, 1))
    assert not jb.check.network(net, loss, params, half, y[:4]).ok


class Untransposed(jb.Dense):
    def backward(self, params, trace, delta):
        _, pairs = super().backward(params, trace, delta)
        return delta @ params["w"], pairs


class BiasTwice(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"b": jb.Shift.of(2 * delta)}


class Swapped(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"w": jb.Outer.of(delta, trace.x)}


class DeltaLost(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return -delta_x, pairs


@pytest.mark.parametrize("wrong", [Untransposed, BiasTwice, Swapped, DeltaLost])
def test_a_mutated_rule_is_found(wrong, key):
    net, loss = jb.Sequential(jb.Dense(4, 4), jb.Tanh(), wrong(4, 4)), jb.SquaredError()
    x, y = jax.random.normal(key, (5, 4)), jnp.zeros((5, 4))
    assert not jb.check.network(net, loss, net.init(key), x, y).ok


@pytest.mark.parametrize(
    "case", [c for c in LEAVES if isinstance(c.net, jb.Elementwise)], ids=lambda case: case.name
)
def test_slope_is_what_backward_multiplies_with(case):
    trace, delta = traced(case)
    if not isinstance(case.net, jb.Identity):
        slope = case.net.slope(trace.x, trace.y)
        assert slope.dtype == delta.dtype
        delta_x, _ = case.net.backward((), trace, delta)
        np.testing.assert_array_equal(delta_x, delta * slope)


def test_the_slope_of_a_users_activation_is_cast_to_its_dtype():
    layer = jb.Activation(jnp.tanh, lambda z: 1 - jnp.square(jnp.tanh(z.astype("float64"))))
    z = jnp.linspace(-1, 1, 5, dtype="float32").reshape(1, 5)
    delta_x, _ = jb.backward(layer, (), jb.Trace(z, None, None), jnp.ones_like(z), sweep.keep)
    assert delta_x.dtype == z.dtype
    assert relative(delta_x, 1 / np.cosh(np.asarray(z, float)) ** 2) < 1e-7


def test_transport_passes_layers_without_parameters_and_leaves_gradients_their_dtype(key):
    net = jb.Sequential(jb.Dense(4, 3), jb.Autodiff(lambda _, x: jnp.sin(x)), jb.Dense(3, 2))
    params, x, y = net.init(key), jnp.ones((2, 4)), jnp.zeros((2, 2))
    same = jax.tree.map(lambda p: p.astype("float32").astype(p.dtype), params)
    transport = jax.tree.map(lambda p: p.astype("float32"), same)
    bp = jb.backprop(net, jb.SquaredError(), same, x, y, transport=transport)
    truth = jax.grad(lambda p: mean_cost(net, jb.SquaredError(), p, x, y))(same)
    assert_close(jb.gradient(bp), truth)
    assert {g.dtype for g in jax.tree.leaves(jb.gradient(bp))} == {jnp.dtype("float64")}


def test_transport_is_rounded_to_the_dtype_of_the_delta(key):
    layer = jb.Dense(64, 64, bias=False)
    w = layer.init(key)["w"].astype("float32")
    delta = jax.random.normal(key, (2, 64), "bfloat16")
    params, trace = {"w": w.astype("bfloat16")}, jb.Trace(delta, None, None)
    got, _ = jb.backward(layer, params, trace, delta, sweep.keep, {"w": w})
    expected, _ = jb.backward(layer, params, trace, delta, sweep.keep)
    np.testing.assert_array_equal(got.astype(float), expected.astype(float))
