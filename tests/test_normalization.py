"""Normalisation: against plain formulas, PyTorch and NumPy; batch norm's averages and refusals."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from single import assert_rule, normal, random_like, torch_truth
from truth import assert_close, relative

import jbackprop as jb
from jbackprop import sweep

pytestmark = pytest.mark.newest
LOSS = jb.SquaredError()


def affine(params, h):
    for name, combine in (("scale", jnp.multiply), ("shift", jnp.add)):
        h = combine(h, jnp.broadcast_to(params[name], h.shape)) if name in params else h
    return h


def standard(x, axes, epsilon=1e-5):
    variance = jnp.mean(x * x, axes, keepdims=True) - jnp.mean(x, axes, keepdims=True) ** 2
    return (x - jnp.mean(x, axes, keepdims=True)) / jnp.sqrt(variance + epsilon)


def layer_norm(params, x):
    return affine(params, standard(x, -1))


def rms_norm(params, x, epsilon=1e-5):
    return affine(params, x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + epsilon))


def group_norm(groups, params, x):
    """Group by group."""
    parts = [standard(part, tuple(range(x.ndim))) for part in jnp.split(x, groups, -1)]
    return affine(params, jnp.concatenate(parts, -1))


def instance_norm(params, x):
    return affine(params, standard(x, tuple(range(x.ndim - 1))))


CASES = [
    (jb.LayerNorm(5), layer_norm, (5,)),
    (jb.LayerNorm(7), layer_norm, (1, 7)),
    (jb.LayerNorm(4, scale=False), layer_norm, (2, 3, 4)),
    (jb.LayerNorm(4, shift=False), layer_norm, (3, 4)),
    (jb.LayerNorm(4, scale=False, shift=False), layer_norm, (3, 4)),
    (jb.RMSNorm(5), rms_norm, (3, 5)),
    (jb.RMSNorm(1, 0.5), functools.partial(rms_norm, epsilon=0.5), (1, 1)),
    (jb.RMSNorm(4, 0.5, scale=False), functools.partial(rms_norm, epsilon=0.5), (4,)),
    (jb.RMSNorm(4, 0.5, shift=True), functools.partial(rms_norm, epsilon=0.5), (2, 4)),
    (jb.GroupNorm(3, 6), functools.partial(group_norm, 3), (3, 2, 6)),
    (jb.GroupNorm(1, 5), functools.partial(group_norm, 1), (1, 5)),
    (jb.GroupNorm(5, 5), functools.partial(group_norm, 5), (7, 5)),
    (jb.GroupNorm(2, 6, scale=False), functools.partial(group_norm, 2), (6,)),
    (jb.InstanceNorm(3), instance_norm, (2, 3, 3)),
    (jb.InstanceNorm(1), instance_norm, (5, 1)),
]


@pytest.mark.parametrize(
    ("layer", "plain", "shape"), CASES, ids=[f"{c[0]} on {c[2]}" for c in CASES]
)
def test_against_a_plain_formula(layer, plain, shape):
    assert_rule(layer, plain, normal(4, *shape))


def test_a_layer_norm_of_one_feature_is_all_shift():
    layer, x = jb.LayerNorm(1), normal(4, 3, 1)
    params = random_like(layer.init(None))
    y, (back, total) = swept(layer, params, x, x)
    np.testing.assert_array_equal(y, np.full(y.shape, params["shift"]))
    assert not np.any(back)
    assert not np.any(total["scale"])


def whole_batch(params, x):
    return affine(params, standard(x, tuple(range(x.ndim - 1))))


BATCH_CASES = [
    (jb.BatchNorm(5), (6, 5)),
    (jb.BatchNorm(3, scale=False), (4, 3, 3)),
    (jb.BatchNorm(3, shift=False), (1, 5, 3)),
    (jb.BatchNorm(2, scale=False, shift=False), (3, 2, 2, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), BATCH_CASES, ids=str)
def test_batch_norm_against_a_plain_formula(layer, shape):
    params, x = random_like(layer.init(None)), normal(*shape)
    y, saved = jb.forward(layer, params, x)
    delta = random_like(y, 3)
    truth = jax.jit(jax.grad(lambda p, x: jnp.sum(delta * whole_batch(p, x)), argnums=(0, 1)))(
        params, x
    )
    back, total = jb.backward(layer, params, layer.trace(x, y, saved), delta, sweep.total)
    assert_close(y, whole_batch(params, x))
    assert_close((total, back), truth)


def test_a_batch_of_one_without_positions_is_all_shift():
    layer, x = jb.BatchNorm(3), normal(1, 3)
    params = random_like(layer.init(None))
    y, _ = jb.forward(layer, params, x)
    np.testing.assert_array_equal(y[0], params["shift"])
    back, total = jb.backward(layer, params, layer.trace(x, y, None), y, sweep.total)
    assert not np.any(back)
    assert not np.any(total["scale"])
    m, v = jb.batch_averages(layer, params, x)["net"]
    np.testing.assert_array_equal(m, x[0])
    assert not np.any(v)


NORMS = [jb.LayerNorm(8), jb.RMSNorm(8), jb.GroupNorm(2, 8), jb.InstanceNorm(8), jb.BatchNorm(8)]
each_norm = pytest.mark.parametrize("layer", NORMS, ids=repr)


def swept(layer, params, x, delta):
    y, saved = jb.forward(layer, params, x)
    return y, jb.backward(layer, params, layer.trace(x, y, saved), delta, sweep.total)


@each_norm
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_computes_in_float32(layer, dtype):
    """What comes out is the float64 result, rounded to the dtype once."""
    params = jax.tree.map(lambda p: p.astype(dtype), random_like(layer.init(None)))
    x, delta = (normal(3, 5, 8, seed=s).astype(dtype) for s in (1, 2))
    y, (back, total) = swept(layer, params, x, delta)
    assert y.dtype == back.dtype == dtype
    assert {g.dtype for g in jax.tree.leaves(total)} == {jnp.dtype("float32")}
    exact = swept(layer, *jax.tree.map(lambda v: v.astype("float64"), (params, x, delta)))
    rounding = float(jnp.finfo(dtype).eps)
    assert relative(y, exact[0]) < 0.4 * rounding
    assert relative(back, exact[1][0]) < 0.4 * rounding
    for got, due in zip(jax.tree.leaves(total), jax.tree.leaves(exact[1][1]), strict=True):
        assert relative(got, due) < 1e-6


@each_norm
def test_a_large_mean_does_not_cancel(layer):
    """A mean 1000 times the spread: the variance is that of centred values."""
    if not layer.centred:
        return
    x, delta = 1000.0 + normal(3, 5, 8) / 2, normal(3, 5, 8, seed=2)
    x = x.astype("float32").astype("float64")
    params = random_like(layer.init(None))
    exact = swept(layer, params, x, delta)
    found = swept(layer, *jax.tree.map(lambda v: v.astype("float32"), (params, x, delta)))
    for got, due in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert relative(got, due) < 1e-3


@each_norm
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_entries_that_are_all_the_same_give_finite_numbers(layer, value):
    for dtype in ("float32", "float16"):
        x = jnp.full((2, 3, 8), value, dtype)
        params = jax.tree.map(lambda p, d=dtype: p.astype(d), layer.init(None))
        for leaf in jax.tree.leaves(swept(layer, params, x, jnp.ones_like(x))):
            assert bool(jnp.all(jnp.isfinite(leaf)))


@each_norm
def test_rules_can_be_differentiated_forward_and_compiled_and_scanned(layer):
    params, x = random_like(layer.init(None)), normal(3, 2, 8)

    def gradient(p):
        return swept(layer, p, x, x)[1][1]

    _, tangent = jax.jvp(gradient, (params,), (params,))
    assert all(not np.any(t) for t in jax.tree.leaves(tangent))  # scale and shift: h, delta alone
    _, moved = jax.jvp(lambda x: swept(layer, params, x, normal(3, 2, 8, seed=4)), (x,), (x + 1,))
    step = 1e-6
    ends = [swept(layer, params, x + s * (x + 1), normal(3, 2, 8, seed=4)) for s in (step, -step)]
    for t, up, down in zip(*map(jax.tree.leaves, (moved, *ends)), strict=True):
        np.testing.assert_allclose(t, (up - down) / (2 * step), atol=1e-7)


TORCH = {
    "layer_norm": jb.LayerNorm(7, 1e-4),
    "rms_norm": jb.RMSNorm(7, 1e-4),
    "group_norm": jb.GroupNorm(3, 6, 1e-4),
    "instance_norm": jb.InstanceNorm(3, 1e-4),
    "batch_norm": jb.BatchNorm(3, 1e-4),
}


@pytest.mark.parametrize("case", TORCH)
def test_against_pytorch(case):
    layer, truth = TORCH[case], torch_truth("normalization", case)
    ours = {"scale": "weight", "shift": "bias"}
    params = {name: truth[ours[name]] for name in layer.init(None)}
    y, (back, total) = swept(layer, params, truth["x"], truth["delta"])
    assert_close(y, truth["y"])
    assert_close(back, truth["delta_x"])
    assert_close(total, {name: truth[f"{ours[name]}_gradient"] for name in total})


def test_averages_are_those_of_pytorch():
    layer, truth = TORCH["batch_norm"], torch_truth("normalization", "batch_norm")
    params = {"scale": truth["weight"], "shift": truth["bias"]}
    first = {"net": jb.Averages(jnp.zeros(3), jnp.ones(3))}
    state = jb.update_averages(first, jb.batch_averages(layer, params, truth["x"]), 0.9)
    assert_close(state["net"].mean, truth["running_mean"])
    assert_close(state["net"].variance, truth["running_var"])
    y, _ = jb.forward(*jb.fold_batch_norm(layer, params, state), truth["eval_x"])
    assert_close(y, truth["eval_y"])


def test_averages_of_half_precision_are_computed_in_float32():
    layer, x = jb.BatchNorm(3), (300 + normal(50, 3)).astype("bfloat16")
    found = jb.batch_averages(layer, layer.init(None), x)["net"]
    assert found.mean.dtype == found.variance.dtype == "float32"
    np.testing.assert_allclose(found.mean, np.mean(x.astype(float), 0), rtol=1e-6)
    np.testing.assert_allclose(found.variance, np.var(x.astype(float), 0, ddof=1), rtol=1e-4)


def small_net():
    block = jb.Sequential(jb.Dense(4, 4), jb.BatchNorm(4), jb.Tanh())
    return jb.Sequential(
        jb.Dense(3, 4), jb.BatchNorm(4, scale=False, shift=False), jb.Tanh(),
        jb.Repeat(jb.Checkpoint(block), 3), jb.Dense(4, 2),
    )  # fmt: skip


def test_averages_are_means_and_unbiased_variances_of_what_comes_in(key):
    net, x = small_net(), normal(7, 3)
    params = random_like(net.init(key))
    state = jb.batch_averages(net, params, x)
    first, repeated = state.values()
    z = np.asarray(jb.forward(net.layers[0], params[0], x)[0])
    np.testing.assert_allclose(first.mean, z.mean(0), rtol=1e-12)
    np.testing.assert_allclose(first.variance, z.var(0, ddof=1), rtol=1e-12)
    assert repeated.mean.shape == repeated.variance.shape == (3, 4)
    a = jb.activations(net, params, x)
    dense = [v for path, v in a.items() if path.startswith("layers[3]") and "layers[0]" in path]
    for i, z in enumerate(dense):
        np.testing.assert_allclose(repeated.mean[i], np.mean(z, 0), rtol=1e-12)
        np.testing.assert_allclose(repeated.variance[i], np.var(z, 0, ddof=1), rtol=1e-12)


def test_a_folded_net_is_the_same_function_but_for_the_factor_of_the_variance(key):
    net, x = small_net(), normal(7, 3)
    params = random_like(net.init(key))
    biased = jax.tree.map(jnp.asarray, jb.batch_averages(net, params, x))
    biased = {path: jb.Averages(m, v * 6 / 7) for path, (m, v) in biased.items()}
    folded, own = jb.fold_batch_norm(net, params, biased)
    assert not folded.couples_examples
    assert_close(jb.forward(folded, own, x)[0], jb.forward(net, params, x)[0])
    assert_close(jb.forward(folded, own, x[:1])[0], jb.forward(folded, own, x)[0][:1])
    y = normal(7, 2)
    bp = jb.backprop(folded, LOSS, own, x, y)
    assert_close(
        jb.gradient(bp, jnp.eye(7)[2]),
        jb.value_and_grad(folded, LOSS)(own, x[2:3], y[2:3])[1],
    )


def test_folding_keeps_the_dtype_of_the_parameters():
    net = jb.Sequential(jb.BatchNorm(4), jb.BatchNorm(4, scale=False, shift=False))
    params = jax.tree.map(lambda p: p.astype("bfloat16"), net.init(jax.random.key(0)))
    x = normal(5, 4).astype("bfloat16")
    folded, own = jb.fold_batch_norm(net, params, jb.batch_averages(net, params, x))
    assert own[0]["scale"].dtype == "bfloat16"
    assert jb.forward(folded, own, x)[0].shape == (5, 4)
    assert folded.layers == (jb.Affine(4), jb.Affine(4))


def test_moving_and_plain_means_of_averages(key):
    net = jb.BatchNorm(3)
    params = net.init(key)
    batches = [normal(n, 3, seed=n) for n in (4, 4, 2)]
    each = [jb.batch_averages(net, params, b)["net"] for b in batches]
    state = jb.mean_averages(net, params, batches)["net"]
    for i in range(2):
        due = (4 * each[0][i] + 4 * each[1][i] + 2 * each[2][i]) / 10
        np.testing.assert_allclose(state[i], due, rtol=1e-12)
    two = [{"net": averages} for averages in each[:2]]
    assert jb.update_averages(None, two[0]) is two[0]
    moved = jax.jit(jb.update_averages)(*two, 0.75)["net"]
    np.testing.assert_allclose(moved.mean, 0.75 * each[0].mean + 0.25 * each[1].mean, rtol=1e-12)
    default = jb.update_averages(*two)["net"]
    np.testing.assert_allclose(default.mean, 0.9 * each[0].mean + 0.1 * each[1].mean, rtol=1e-12)


def test_a_fitted_batch_norm_is_evaluated_with_averages(key):
    net, x = small_net(), normal(22, 3)
    y = jnp.sin(x[:, :2])
    found = jb.fit(
        net, LOSS, net.init(key), (x, y), optax.sgd(1e-2), epochs=3, batch_size=8, key=key,
        validation=(x[:5], y[:5]), early_stopping=jb.EarlyStopping(), progress=False,
    )  # fmt: skip
    folded, params = jb.fold_batch_norm(net, found.params, found.averages)
    loss = jb.evaluate(folded, LOSS, params, (x[:5], y[:5]))["loss"]
    assert loss == found.history["validation_loss"][found.best_epoch - 1]
    assert jb.predict(folded, LOSS, params, x[:1]).shape == (1, 2)
    assert pickle.loads(pickle.dumps(found.averages)).keys() == found.averages.keys()


def test_a_fit_without_batch_norm_has_no_averages(key):
    net = jb.mlp([3, 2])
    data = normal(4, 3), normal(4, 2)
    options = {"epochs": 1, "key": key, "progress": False}
    assert jb.fit(net, LOSS, net.init(key), data, optax.sgd(0.1), **options).averages == {}


class Centred(jb.Identity):
    couples_examples = True


def refusals():
    net = jb.Sequential(jb.Dense(3, 2), jb.BatchNorm(2))
    params, x, y = net.init(jax.random.key(0)), normal(4, 3), normal(4, 2)
    state = jb.batch_averages(net, params, x)
    other = jb.Sequential(jb.Dense(3, 2), Centred())
    bp = jb.backprop(net, LOSS, params, x, y)

    def fit():
        options = {"epochs": 1, "key": jax.random.key(0), "progress": False}
        own = other.init(jax.random.key(0))
        return jb.fit(other, LOSS, own, (x, y), optax.sgd(0.1), validation=(x, y), **options)

    by_name = r"layers\[1\] \(BatchNorm\(2\)\) couples the examples"
    return {
        "predict": (lambda: jb.predict(net, LOSS, params, x), by_name + ".*fold_batch_norm"),
        "evaluate": (lambda: jb.evaluate(net, LOSS, params, (x, y)), by_name + ".*a Fit"),
        "weights": (lambda: jb.gradient(bp, jnp.ones(4)), by_name),
        "check": (lambda: jb.check.network(net, LOSS, params, x, y), by_name),
        "fit": (fit, r"layers\[1\] \(Centred\(\)\) couples .* no BatchNorm"),
        "empty": (lambda: jb.batch_averages(net, params, x[:0]), "batch is empty"),
        "no batches": (lambda: jb.mean_averages(net, params, []), "no mini-batch"),
        "momentum": (lambda: jb.update_averages(state, state, 1.5), "momentum .* not 1.5"),
        "other averages": (lambda: jb.update_averages(state, {}), "different networks"),
        "no averages": (lambda: jb.fold_batch_norm(net, params, {}), r"no averages of layers\[1\]"),
        "averages of another size": (
            lambda: jb.fold_batch_norm(
                net, params, {"layers[1]": jb.Averages(jnp.ones(3), jnp.ones(3))}
            ),
            "different shapes",
        ),
    }


@pytest.mark.parametrize("what", refusals())
def test_refusals_name_the_layer_and_the_fix(what):
    call, message = refusals()[what]
    with pytest.raises(ValueError, match=message):
        call()


X = jnp.ones((2, 3, 6))
BAD = {
    "no features": (lambda: jb.LayerNorm(0), ValueError, "features must be an int of at least 1"),
    "a bool": (lambda: jb.LayerNorm(True), ValueError, "features must be an int"),
    "epsilon": (lambda: jb.RMSNorm(3, -1e-5), ValueError, "epsilon must be"),
    "epsilon text": (lambda: jb.BatchNorm(3, "1"), ValueError, "epsilon must be"),
    "groups": (lambda: jb.GroupNorm(4, 6), ValueError, "do not divide 6 .* these do: 1, 2, 3, 6"),
    "no groups": (lambda: jb.GroupNorm(0, 6), ValueError, "groups must be"),
    "width": (lambda: jb.forward(jb.LayerNorm(5), (), X), ValueError, "needs 5 features"),
    "no positions": (lambda: jb.forward(jb.InstanceNorm(6), (), X[0]), ValueError, "needs 6 feat"),
    "integers": (
        lambda: jb.forward(jb.LayerNorm(6), (), X.astype(int)), TypeError, "floating-point",
    ),
    "a tuple": (lambda: jb.forward(jb.LayerNorm(6), (), (X, X)), TypeError, "one array"),
    "params": (lambda: jb.forward(jb.LayerNorm(6), (), X), ValueError, "not the parameters of"),
    "too many": (
        lambda: jb.forward(jb.LayerNorm(6, scale=False, shift=False), {"scale": X[0, 0]}, X),
        ValueError, "not the parameters of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_sizes_may_be_numpy_integers_and_repr_shows_options():
    layer = jb.GroupNorm(np.int64(2), np.int32(4))
    assert layer == jb.GroupNorm(2, 4)
    assert hash(layer) == hash(jb.GroupNorm(2, 4))
    assert repr(layer) == "GroupNorm(2, 4)"
    assert repr(jb.LayerNorm(3, 0.1, shift=False)) == "LayerNorm(3, epsilon=0.1, shift=False)"
    assert repr(jb.BatchNorm(3)) == "BatchNorm(3)"
