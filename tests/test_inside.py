"""What goes on inside a network: frozen layers and drawn numbers under the check, tables, places."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import assert_close

import jbackprop as jb

pytestmark = pytest.mark.newest
LOSS = jb.SquaredError()


@dataclasses.dataclass(frozen=True, repr=False)
class BadTanh(jb.Tanh):
    def backward(self, params, trace, delta):
        return 1.1 * super().backward(params, trace, delta)[0], ()

    def __repr__(self):
        return "BadTanh()"


class BadDense(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, factored = super().backward(params, trace, delta)
        return -delta_x, factored


@dataclasses.dataclass(frozen=True, repr=False)
class BadDropout(jb.Dropout):
    def backward(self, params, trace, delta):  # as if nothing had been drawn
        return delta, ()


class BadFrozen(jb.Frozen):
    def backward(self, *args):
        delta_x, collected = super().backward(*args)
        return 2 * delta_x, collected


def problem(net, features=4, batch=3):
    params = net.init(jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (batch, features))
    return params, x, jnp.sin(jnp.arange(batch * features, dtype=float)).reshape(batch, features)


def frozen(layer):
    return jb.Sequential(jb.Dense(4, 4), jb.Frozen(layer), jb.Dense(4, 4))


def checked(net, **options):
    return jb.check.network(net, LOSS, *problem(net), **options)


@pytest.mark.parametrize("truth", ["both", "autodiff"])
def test_frozen_layers_are_checked(truth):
    inner = jb.Sequential(jb.Dense(4, 4), jb.Tanh())
    report = checked(frozen(inner), truth=truth)
    assert report.ok, report
    found = {(leaf.path, leaf.kind) for leaf in report.leaves}
    assert ("layers[1].layer.layers[0]", "delta") in found
    assert ("layers[1].layer.layers[0]", "dC/dx alone") in found
    assert not any(p.startswith("layers[1]") and k.startswith("gradient") for p, k in found)
    assert any(p.startswith("layers[0]") and k == "gradient" for p, k in found)
    assert checked(jb.Repeat(jb.Frozen(inner), 2), truth=truth).ok
    assert checked(jb.Frozen(inner), truth=truth).ok


@pytest.mark.parametrize(
    ("layer", "wrong"),
    [(jb.Sequential(jb.Dense(4, 4), BadTanh()), "layers[1], BadTanh"), (BadDense(4, 4), "layer, Bad"),
     (jb.Repeat(BadTanh(), 2), "layer.layer, BadTanh")],
)  # fmt: skip
def test_a_wrong_frozen_rule_is_named(layer, wrong):
    report = checked(frozen(layer))
    assert not report.ok
    assert report.why.startswith("The first rule that is wrong"), report.why
    assert wrong in report.why
    assert "1.1" in str(report) or "-1" in str(report)


def test_a_composite_that_is_wrong_is_blamed_where_its_layers_are_right():
    net = jb.Sequential(jb.Dense(4, 4), BadFrozen(jb.Tanh()), jb.Dense(4, 4))
    report = checked(net)
    assert "Every rule is right by itself" in report.why
    assert "layers[0]" in report.why


@pytest.mark.parametrize("kind", ["threefry2x32", None])
def test_what_is_drawn_is_checked(kind):
    net = jb.Sequential(
        jb.Dense(4, 4),
        jb.Repeat(jb.Sequential(jb.Dense(4, 4), jb.Dropout(0.5)), 2),
        jb.Dropout(0.4),
    )
    key = jax.random.PRNGKey(3) if kind is None else jax.random.key(3, impl=kind)
    report = checked(net, key=key)
    assert report.ok, report
    wrong = jb.Sequential(jb.Dense(4, 4), BadDropout(0.5), jb.Dense(4, 4))
    assert checked(wrong).ok
    report = checked(wrong, key=key)
    assert "layers[1], BadDropout" in report.why, report
    assert checked(net, key=key, dtype="float32").ok


def test_as_function_takes_a_key():
    net = jb.Sequential(jb.Dense(4, 4), jb.Dropout(0.5), jb.Dense(4, 4))
    (params, x, _), key = problem(net), jax.random.key(5)
    f = jb.as_function(net)
    np.testing.assert_array_equal(f(params, x), jb.forward(net, params, x)[0])
    np.testing.assert_array_equal(f(params, x, key=key), jb.forward(net, params, x, key)[0])
    assert np.any(f(params, x, key) != f(params, x))

    def grads(call, key):
        return jax.jit(jax.grad(lambda *at: jnp.sum(jnp.sin(call(*at, key))), (0, 1)))(params, x)

    for each in (key, jax.random.PRNGKey(5), None):
        assert_close(grads(f, each), grads(lambda p, x, k: jb.forward(net, p, x, k)[0], each))


def test_summary_of_tokens_and_tuples():
    net = jb.transformer(11, 4, 2, 2, 5)
    tokens = jnp.zeros((3, 5), jnp.int32)
    table = jb.summary(net, x=tokens)
    assert "(5, 11)" in table
    assert table == jb.summary(net, x=jax.ShapeDtypeStruct((7, 5), jnp.int32))
    assert "(4,)" in jb.summary(jb.Add(), x=(jnp.ones((2, 4)), jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="not both"):
        jb.summary(jb.Dense(4, 4), (4,), x=jnp.ones((2, 4)))


def test_summary_of_tokens_by_the_shape_of_one_says_what_to_give():
    with pytest.raises(TypeError, match="integer ids") as caught:
        jb.summary(jb.transformer(5, 4, 1, 2, 3), (3,))
    assert any("give x=tokens" in note for note in caught.value.__notes__)


def test_delta_norms_of_tuples():
    net = jb.LSTM(4, 3, states=True)
    params = net.init(jax.random.key(0))
    x = (jnp.ones((2, 5, 4)), (jnp.ones((2, 3)), jnp.ones((2, 3))))
    z, (h, c) = jb.forward(net, params, x)[0]
    ends = jb.Sequential(net, jb.Parallel(jb.Identity(), Pair()), Pair())
    y = jnp.zeros_like(jb.forward(ends, ends.init(jax.random.key(0)), x)[0])
    bp = jb.backprop(ends, LOSS, (params, ((), ()), ()), x, y)
    flow = jb.diagnose.delta_norms(bp)
    parts = jax.tree.leaves(jb.deltas(bp)["layers[0]"])
    assert [p.shape for p in parts] == [z.shape, h.shape, c.shape]
    squares = sum(jnp.sum(jnp.square(p.reshape(2, -1)), axis=1) for p in parts)
    assert flow.norms["layers[0]"] == pytest.approx(float(jnp.mean(jnp.sqrt(squares))), rel=1e-12)


@dataclasses.dataclass(frozen=True)
class Pair(jb.Layer):
    """Two arrays as one long vector."""

    reads = ("x",)

    def init(self, key):
        return ()

    def forward(self, params, x, key=None):
        return jnp.concatenate([x[0].ravel(), x[1].ravel()]), None

    def backward(self, params, trace, delta):
        a, b = trace.x
        return (delta[: a.size].reshape(a.shape), delta[a.size :].reshape(b.shape)), ()


def test_ratios_go_along_the_flow():
    d, two = jb.Dense(4, 4), jb.Sequential(jb.Dense(4, 4), jb.Dense(4, 4))
    net = jb.Sequential(jb.FanOut(two, jb.Repeat(d, 2)), jb.Add(), jb.Repeat(jb.Skip(d), 2))
    flow = jb.diagnose.delta_norms(jb.backprop(net, LOSS, *problem(net)))
    paths, out = list(flow.norms), "layers[2].layer[0].branch"
    first = "layers[0].layers[0].layers", "layers[0].layers[1].layer"
    ahead = dict(
        zip(paths, [f"{first[0]}[1]", out, f"{first[1]}[1]", out, paths[-1]], strict=False)
    )
    assert list(flow.ratios) == paths[:-1]
    for path, following in ahead.items():
        assert flow.ratios[path] == flow.norms[path] / flow.norms[following], path


def test_the_copy_whose_gradient_is_not_finite_is_named():
    class Broken(jb.Dense):
        def backward(self, params, trace, delta):
            delta_x, factored = super().backward(params, trace, delta)
            bad = jnp.where(trace.x[0] > 5, jnp.nan, 1.0)
            return delta_x, {**factored, "w": jb.Outer.of(bad * trace.x, delta)}

    net = jb.Repeat(Broken(4, 4), 3)
    params, x, y = problem(net)
    params = jax.tree.map(jnp.zeros_like, params)
    params["b"] = params["b"].at[0].add(6.0)
    params["w"] = params["w"].at[2].add(jnp.eye(4))
    where = jb.diagnose.first_nonfinite(net, LOSS, params, jnp.zeros_like(x), y + 9)
    assert where.startswith("the gradient of layer[1] (Broken"), where
