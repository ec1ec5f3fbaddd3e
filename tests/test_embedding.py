"""Embeddings, joins, parts, gains and dropout: against plain formulas, and what is special."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from single import assert_rule, normal, random_like, torch_truth
from truth import assert_close, each_grad

import jbackprop as jb
from jbackprop import sweep
from jbackprop.factored import is_factored

pytestmark = pytest.mark.newest


def several(*shapes):
    return tuple(normal(4, *shape, seed=i) for i, shape in enumerate(shapes))


IDS = jnp.asarray([[0, 3, 3, 1], [2, 2, 2, 2], [4, 0, 1, 3], [3, 3, 0, 3]])


def one_hot(params, x):
    hot = (x[..., None].astype(int) == jnp.arange(5).reshape((1,) * x.ndim + (5,))).astype(float)
    return hot @ params["w"]


def by_scale(params, x):
    return x * jnp.broadcast_to(params["scale"], x.shape)


CASES = [
    (jb.Embedding(5, 3), one_hot, IDS),
    (jb.Embedding(5, 1), one_hot, IDS[:, 0]),
    (jb.Embedding(5, 2), one_hot, IDS.reshape(4, 2, 2).astype("uint8")),
    (jb.Positions(6, 3), lambda p, x: x + p["w"][:4], normal(4, 4, 3)),
    (jb.Positions(4, 3), lambda p, x: x + p["w"], normal(4, 4, 3)),
    (jb.Positions(5, 1), lambda p, x: x + p["w"][:1], normal(4, 1, 1)),
    (jb.Gain(3), by_scale, normal(4, 3)),
    (jb.Gain(3), by_scale, normal(4, 2, 2, 3)),
    (
        jb.Affine(3),
        lambda p, x: by_scale(p, x) + jnp.broadcast_to(p["shift"], x.shape),
        normal(4, 2, 3),
    ),
    (jb.Times(-0.7), lambda _, x: -0.7 * x, normal(4, 3)),
    (jb.Add(), lambda _, x: sum(x[1:], start=x[0]), several((2, 3), (2, 3), (2, 3))),
    (jb.Multiply(), lambda _, x: x[0] * x[1], several((3,), (3,))),
    (jb.Multiply(), lambda _, x: x[0] * x[1] * x[2] * x[3], several(*[(2, 3)] * 4)),
    (jb.Concatenate(), lambda _, x: jnp.concatenate(x, -1), several((2, 3), (2, 1), (2, 2))),
    (jb.Concatenate(), lambda _, x: x[0], several((2,))),
    (jb.Maximum(), lambda _, x: jnp.max(jnp.stack(x), 0), several(*[(2, 3)] * 5)),
    (jb.Split(1, 3, 2), lambda _, x: (x[..., :1], x[..., 1:4], x[..., 4:]), normal(4, 2, 2, 6)),
    (jb.Select(-2), lambda _, x: x[1], several((2,), (3, 2), (1,))),
    (jb.Select(1), lambda _, x: x[1], (IDS, normal(4, 2))),
    (jb.Take(), lambda _, x: x[-1], normal(4, 3, 2)),
    (jb.Take(1), lambda _, x: x[1], normal(4, 3, 2, 2)),
    (jb.Dropout(0.5), lambda _, x: x, normal(4, 3)),
]


@pytest.mark.parametrize(
    ("layer", "plain", "x"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_against_a_plain_formula(layer, plain, x):
    assert_rule(layer, plain, x)


def test_embeddings_in_a_scanned_stack(key):
    """Every copy adds rows of a table of its own to what the ids came with."""
    add = jb.Sequential(jb.Parallel(jb.Embedding(5, 3), jb.Identity()), jb.Add(), jb.Tanh())
    net = jb.Sequential(
        jb.FanOut(jb.Identity(), jb.Embedding(5, 3)),
        jb.Repeat(jb.FanOut(jb.Select(0), add), 3),
        jb.Select(1),
    )
    loss, params, y = jb.SquaredError(), net.init(key), normal(4, 4, 3)
    weights = jnp.arange(4.0)

    @jax.jit
    def of(params):
        bp = jb.backprop(net, loss, params, IDS, y)
        pairs = jax.tree.leaves(bp.factored, is_leaf=is_factored)
        assert [type(pair) for pair in pairs] == [jb.Lookup, jb.Lookup]
        found = [(p.each(), p.total(weights), p.gram(p), p.square_norm()) for p in pairs]
        return found, jax.tree.leaves(each_grad(net, loss, params, IDS, y))

    for found, g in zip(*of(params), strict=True):
        g = np.asarray(g)
        rows = g.reshape(4, -1)
        due = g, np.tensordot(weights, g, 1), rows @ rows.T, np.sum(rows**2, axis=1)
        assert_close(found, due)


def test_embedding_against_pytorch():
    truth = torch_truth("normalization", "embedding")
    layer, params = jb.Embedding(9, 4), {"w": truth["weight"]}
    y, _ = jb.forward(layer, params, truth["x"])
    trace = layer.trace(truth["x"], y, None)
    back, total = jb.backward(layer, params, trace, truth["delta"], sweep.total)
    assert back is None
    np.testing.assert_array_equal(y, truth["y"])
    assert_close(total["w"], truth["weight_gradient"])


def test_ids_out_of_range_give_nan_and_no_gradient_under_jit():
    layer = jb.Embedding(300, 2)
    params = layer.init(jax.random.key(0))
    for dtype, wrong in (("int32", [-1, 300, -301]), ("int8", [-1, -128]), ("uint32", [2**32 - 1])):
        ids = jnp.asarray([[5, *wrong]], dtype)
        y, _ = jb.forward(layer, params, ids)
        np.testing.assert_array_equal(y[0, 0], params["w"][5])
        assert np.all(np.isnan(y[0, 1:]))
        trace = layer.trace(ids, y, None)
        _, total = jb.backward(layer, params, trace, jnp.ones_like(y), sweep.total)
        assert_close(total["w"], np.zeros((300, 2)) + (np.arange(300) == 5)[:, None])
    with pytest.raises(ValueError, match="ids must be from 0 to 299, but there is -1; 2 of 3"):
        layer.forward(params, np.asarray([5, -1, 300]))


def test_a_fit_says_that_nan_began_in_the_embedding(key):
    net = jb.Sequential(jb.Embedding(5, 3), jb.Take(), jb.Dense(3, 2))
    data = IDS.at[1, 3].set(5), normal(4, 2)
    options = {"epochs": 1, "key": key, "progress": False}
    with pytest.raises(jb.NonFiniteError, match=r"began in the output of layers\[0\] \(Embedding"):
        jb.fit(net, jb.SquaredError(), net.init(key), data, optax.sgd(0.1), **options)


def test_rows_begin_with_a_length_of_about_one(key):
    for layer in (jb.Embedding(400, 50), jb.Positions(400, 50)):
        lengths = jnp.linalg.norm(layer.init(key)["w"], axis=1)
        assert abs(float(jnp.mean(lengths**2)) - 1) < 0.05


def test_the_first_values_of_gains():
    params = jb.Affine(3, 0.1).init(None)
    assert_close(params, {"scale": jnp.full(3, 0.1), "shift": jnp.zeros(3)})
    assert_close(jb.Gain(2).init(None), {"scale": jnp.ones(2)})


def test_a_product_with_zeros_has_its_delta():
    x = tuple(jnp.asarray([v]) for v in ([0.0, 0.0], [2.0, 0.0], [3.0, 5.0]))
    layer = jb.Multiply()
    y, _ = jb.forward(layer, (), x)
    delta, _ = jb.backward(layer, (), layer.trace(x, y, None), jnp.ones_like(y), sweep.keep)
    np.testing.assert_array_equal(jnp.stack(delta)[:, 0], [[6, 0], [0, 0], [0, 0]])


def test_at_a_tie_the_first_of_the_largest_takes_the_delta():
    x = tuple(jnp.asarray([v]) for v in ([1.0, 2.0, 0.0], [3.0, 2.0, 0.0], [3.0, 1.0, 0.0]))
    layer = jb.Maximum()
    y, saved = jb.forward(layer, (), x)
    np.testing.assert_array_equal(y, [[3, 2, 0]])
    assert saved[0].dtype == "uint8"
    delta, _ = jb.backward(layer, (), layer.trace(x, y, saved), y + 7, sweep.keep)
    np.testing.assert_array_equal(jnp.stack(delta)[:, 0], [[0, 9, 7], [10, 0, 0], [0, 0, 0]])


def test_many_parts_are_told_apart():
    x = tuple(jnp.full(2, i) for i in np.linspace(0, 1, 300))
    layer = jb.Maximum()
    y, saved = layer.forward((), x)
    delta, _ = layer.backward((), jb.Trace(None, None, saved), y)
    assert [i for i, d in enumerate(delta) if np.any(d)] == [299]


def test_gated_units_and_maxout_are_composites():
    gated = jb.Sequential(
        jb.FanOut(jb.Dense(3, 4), jb.Sequential(jb.Dense(3, 4), jb.Sigmoid())), jb.Multiply()
    )
    maxout = jb.Sequential(jb.FanOut(jb.Dense(3, 2), jb.Dense(3, 2), jb.Dense(3, 2)), jb.Maximum())

    def dense(params, x):
        return x @ params["w"] + params["b"]

    def glu(params, x):
        (one, (two, _)), _ = params
        return dense(one, x) * jax.nn.sigmoid(dense(two, x))

    assert_rule(gated, glu, normal(4, 3))
    assert_rule(maxout, lambda p, x: jnp.stack([dense(w, x) for w in p[0]]).max(0), normal(4, 3))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_dropout_leaves_out_a_share_and_scales_the_rest(dtype, key):
    layer, x = jb.Dropout(0.3), jnp.ones((50, 400), dtype)
    y, saved = jb.forward(layer, (), x, key)
    assert y.dtype == dtype
    kept = np.asarray(y != 0)
    assert set(np.unique(np.asarray(y, float))) == {0.0, float(x[0, 0] / 0.7)}
    assert abs(kept.mean() - 0.7) < 5 * np.sqrt(0.21 / kept.size)
    assert len({row.tobytes() for row in kept}) == 50  # a draw of its own for every example
    assert saved.shape == (50,)
    delta, _ = jb.backward(layer, (), layer.trace(x, y, saved), x, sweep.keep)
    np.testing.assert_array_equal(delta, y)
    again, _ = jb.forward(layer, (), x.astype("float32"), key)
    np.testing.assert_array_equal(again != 0, kept)  # in whatever dtype


def test_dropout_without_a_key_or_a_rate_is_off(key):
    x = normal(3, 4)
    for layer, given in ((jb.Dropout(0.5), None), (jb.Dropout(0), key)):
        y, saved = jb.forward(layer, (), x, given)
        assert saved is None
        np.testing.assert_array_equal(y, x)
    assert jb.Dropout(0.1).draws
    assert not jb.Dropout(0).draws
    assert not jb.Sequential(jb.Dropout(0), jb.Tanh()).draws


def test_dropout_hides_what_is_not_finite_where_it_drops():
    y, _ = jb.forward(jb.Dropout(0.5), (), jnp.full((2, 20), jnp.inf), jax.random.key(0))
    assert set(np.unique(y)) == {0.0, np.inf}


def test_dropout_in_a_network_is_the_gradient_of_what_was_drawn(key):
    net = jb.Sequential(jb.Dense(4, 6), jb.Dropout(0.5), jb.Tanh(), jb.Dropout(0.2), jb.Dense(6, 2))
    params, x, y = random_like(net.init(key)), normal(5, 4), normal(5, 2)
    loss = jb.SquaredError()
    truth = jax.jit(jax.grad(lambda p: jnp.mean(loss.value(jb.forward(net, p, x, key)[0], y))))(
        params
    )
    assert_close(jb.value_and_grad(net, loss)(params, x, y, key=key)[1], truth)
    other = jb.value_and_grad(net, loss)(params, x, y, key=jax.random.key(5))[1]
    assert not np.allclose(other[0]["w"], truth[0]["w"])


FANNED = jb.Sequential(
    jb.FanOut(jb.Dense(3, 3), jb.Gain(3), jb.Identity()),
    jb.Concatenate(),
    jb.Split(2, 7),
    jb.Select(1),
    jb.Dropout(0.4),
)


def test_a_whole_path_through_tuples():
    def plain(params, x):
        (dense, gain, _), *_ = params
        z = x @ dense["w"] + jnp.broadcast_to(dense["b"], x.shape)
        return jnp.concatenate([z, by_scale(gain, x), x], -1)[..., 2:]

    assert_rule(FANNED, plain, normal(4, 2, 3))


X = jnp.ones((2, 3, 6))
BAD = {
    "ids": (lambda: jb.forward(jb.Embedding(5, 2), {}, X), TypeError, "needs integer ids"),
    "table": (lambda: jb.forward(jb.Embedding(5, 2), {}, IDS), ValueError, "not the parameters"),
    "vocab": (lambda: jb.Embedding(0, 2), ValueError, "vocab must be an int of at least 1"),
    "length": (lambda: jb.Positions(2.5, 2), ValueError, "length must be an int"),
    "too long": (
        lambda: jb.forward(jb.Positions(2, 6), {"w": X[0, :2]}, X), ValueError, "up to 2 positions",
    ),
    "no positions": (
        lambda: jb.forward(jb.Positions(2, 6), {"w": X[0, :2]}, X[0]), ValueError, "batch axis",
    ),
    "gain": (lambda: jb.forward(jb.Gain(5), {}, X), ValueError, "needs 5 features"),
    "gain's": (lambda: jb.forward(jb.Gain(6), {}, X), ValueError, "not the parameters"),
    "times": (lambda: jb.Times(float("inf")), ValueError, "finite number"),
    "times text": (lambda: jb.Times("2"), ValueError, "finite number"),
    "no tuple": (lambda: jb.forward(jb.Add(), (), X), ValueError, "needs a tuple of 1 or more"),
    "one factor": (lambda: jb.forward(jb.Multiply(), (), (X,)), ValueError, "tuple of 2 or more"),
    "shapes": (
        lambda: jb.forward(jb.Add(), (), (X, X[:, :1])), ValueError, "one dtype and shape",
    ),
    "dtypes": (
        lambda: jb.forward(jb.Maximum(), (), (X, X.astype("float32"))), ValueError, "one dtype",
    ),
    "rows": (
        lambda: jb.forward(jb.Concatenate(), (), (X, X[:, :1])), ValueError, "but for the last",
    ),
    "numbers": (
        lambda: jb.forward(jb.Concatenate(), (), (X[:, 0, 0],)), ValueError, "with an axis",
    ),
    "integers": (lambda: jb.forward(jb.Add(), (), (IDS, IDS)), TypeError, "floating-point"),
    "params": (lambda: jb.forward(jb.Add(), X, (X, X)), ValueError, "no parameters"),
    "no sizes": (lambda: jb.Split(), ValueError, "one for each part"),
    "size": (lambda: jb.Split(2, 0), ValueError, "at least 1"),
    "sum": (lambda: jb.forward(jb.Split(2, 3), (), X), ValueError, "needs 5 features"),
    "index": (lambda: jb.Select(1.5), TypeError, "index must be an int"),
    "element": (lambda: jb.forward(jb.Select(2), (), (X, X)), ValueError, "an element 2"),
    "element of an array": (lambda: jb.forward(jb.Select(0), (), X), ValueError, "needs a tuple"),
    "position": (lambda: jb.forward(jb.Take(3), (), X), ValueError, r"shape \(3, 6\)"),
    "positions": (lambda: jb.forward(jb.Take(), (), X[:, 0, 0]), ValueError, r"shape \(\)"),
    "rate": (lambda: jb.Dropout(1), ValueError, "below 1"),
    "no rate": (lambda: jb.Dropout(float("nan")), ValueError, "below 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what):
    call, error, message = BAD[what]
    with pytest.raises(error, match=message):
        call()


def test_repr():
    layers = "Embedding(5, 2)", "Positions(4, 3)", "Split(1, 2)", "Select(-1)", "Take(-1)"
    layers += "Dropout(0.5)", "Times(c=0.5)", "Gain(3, init_value=0.1)", "Affine(3)", "Add()"
    for text in layers:
        assert repr(eval(text, vars(jb))) == text
