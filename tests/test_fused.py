"""The fused head and tied embeddings: against plain JAX, and against what may not be there."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from truth import assert_close, relative

import jbackprop as jb
from jbackprop.objective import costs

pytestmark = pytest.mark.newest
Fused = jb.FusedSoftmaxCrossEntropy
V = 7
W = (0.5, 1.0, 2.0, 0.25, 0.0, 1.5, 3.0)
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.normal(size=shape))


def labels(*shape, v=V):
    return jnp.asarray(rng.integers(0, v, size=shape))


def plain_costs(z, y, s=0.0, w=None, ignore=None, cap=None):
    """C_n, written as the definition has it."""
    z = cap * jnp.tanh(z / cap) if cap else z
    v = z.shape[-1]
    counted = jnp.ones(y.shape, bool) if ignore is None else y != ignore
    hot = jnp.eye(v)[jnp.where(counted, y, 0)]
    t = ((1 - s) * hot + s / v) * jnp.asarray(w or (1.0,) * v).reshape((1,) * y.ndim + (v,))
    cost = -jnp.sum(t * jax.nn.log_softmax(z, axis=-1), axis=-1)
    axes = tuple(range(1, y.ndim))
    number = jnp.maximum(jnp.sum(counted, axes, float), 1.0)
    return jnp.sum(jnp.where(counted, cost, 0.0), axis=axes) / number


def plain_net(params, x):
    (first, _, last) = params
    h = jnp.tanh(jnp.einsum("...i,io->...o", x, first["w"]) + jnp.expand_dims(first["b"], (0, 1)))
    return jnp.einsum("...i,io->...o", h, last["w"]) + jnp.expand_dims(last["b"], (0, 1))


NET = jb.Sequential(jb.Dense(4, 5), jb.Tanh(), jb.Dense(5, V))
PARAMS = NET.init(jax.random.key(0))
X, Y = normal(6, 3, 4), labels(6, 3).at[2].set(1).at[0, 1].set(1)
OPTIONS = [
    ({}, {}),
    ({"s": 0.1}, {"label_smoothing": 0.1}),
    ({"ignore": 1, "cap": 1.5}, {"ignore_index": 1, "logit_cap": 1.5}),
    ({"w": W}, {"class_weights": W}),
    (
        {"s": 0.3, "w": W, "ignore": 1, "cap": 0.7},
        {"label_smoothing": 0.3, "class_weights": W, "ignore_index": 1, "logit_cap": 0.7},
    ),
]
BLOCKS = [(None, None), (7, 3), (1, 7), (18, 1), (100, 100)]


@pytest.mark.parametrize("i", range(len(OPTIONS)))
def test_value_and_gradient_are_those_of_plain_jax_whatever_the_blocks(i):
    theirs, ours = OPTIONS[i]
    weights = jnp.asarray([0.5, 0.1, 2.0, 0.0, 0.3, 1.0]) if i % 2 else None
    scale = jnp.full(6, 1 / 6) if weights is None else weights

    def cost(params):
        return jnp.sum(scale * plain_costs(plain_net(params, X), Y, **theirs))

    @jax.jit
    def of(params):
        found = []
        for block, vocab_block in BLOCKS if i in (0, 4) else BLOCKS[1:2]:
            loss = Fused(**ours, block=block, vocab_block=vocab_block)
            found.append(jb.value_and_grad(NET, loss)(params, X, Y, weights))
        bp = jb.backprop(NET, loss, params, X, Y)
        losses = costs(NET, loss, params, X, Y)
        return jax.value_and_grad(cost)(params), found, jb.gradient(bp, scale), bp.losses, losses

    truth, found, gradient, of_backprop, losses = of(PARAMS)
    for each in found:
        assert_close(each, truth)
    assert_close(gradient, truth[1])
    assert relative(losses, of_backprop) < 1e-14


@pytest.mark.parametrize("i", range(len(OPTIONS)))
def test_on_net_inputs_it_is_the_plain_loss(i):
    theirs, ours = OPTIONS[i]
    loss, cap = Fused(**ours), theirs.get("cap")

    @jax.jit
    def of(z):
        truth = plain_costs(z, Y, **theirs)
        delta = jax.grad(lambda z: jnp.sum(plain_costs(z, Y, **theirs)))(z)
        mean = jax.nn.softmax(cap * jnp.tanh(z / cap) if cap else z, axis=-1)
        found = loss.value(z, Y), loss.delta(z, Y), *loss.value_and_delta(z, Y)
        return found, (truth, delta, truth, delta), loss.predict(z), mean

    costs_and_deltas, dues, predicted, mean = of(normal(6, 3, V))
    for found, due in zip(costs_and_deltas, dues, strict=True):
        assert relative(found, due) < 1e-13
    assert relative(predicted, mean) < 1e-14


@pytest.mark.parametrize(
    ("net", "shape", "v"),
    [
        (jb.Dense(1, 2, bias=False), (1, 1), 2),
        (jb.Dense(3, 1), (2, 3), 1),
        (jb.Sequential(jb.Dense(3, 5)), (5, 3), 5),
        (jb.Sequential(jb.Sequential(jb.Tanh()), jb.Sequential(jb.Dense(3, 5))), (2, 2, 3, 3), 5),
        (jb.Sequential(jb.Tanh(), jb.Sequential(jb.Gelu(), jb.Dense(3, 4, bias=False))), (2, 3), 4),
    ],
)
def test_every_network_that_ends_in_a_dense(net, shape, v):
    params, x, y = net.init(jax.random.key(1)), normal(*shape), labels(*shape[:-1], v=v)
    loss = Fused(block=3, vocab_block=2)

    def cost(params):
        return jnp.mean(plain_costs(jb.forward(net, params, x)[0], y))

    truth = jax.jit(jax.value_and_grad(cost))(params)
    value, grads = jb.value_and_grad(net, loss)(params, x, y.astype("int8"))
    assert_close(grads, truth[1]) if v > 1 else assert_close(grads, truth[1], 0)
    assert abs(value - truth[0]) < 1e-14


def test_an_example_of_weight_0_is_not_there_even_if_it_is_nan():
    run = jax.jit(jb.value_and_grad(NET, Fused(block=4, vocab_block=2)))
    weights = jnp.asarray([0.5, 0.0, 1.0, 0.0, 2.0, 0.1])
    there = np.asarray(weights) > 0
    truth = run(PARAMS, X[there], Y[there], weights[there])
    assert np.isfinite(truth[0])
    x = X.at[1].set(jnp.nan).at[3].set(1e308)
    assert_close(run(PARAMS, x, Y, weights), truth)
    value, grads = run(PARAMS, x, Y)
    assert np.isnan(value)
    assert np.isnan(grads[2]["w"]).all()
    w = normal(4, V)
    heads = [Fused().head(X, w, None, y, weights) for y in (Y, Y.at[1].set(99))]
    assert_close(heads[1].w_grad, heads[0].w_grad, 0)
    assert np.isfinite(heads[1].delta_h).all()


@pytest.mark.parametrize(
    "loss",
    [
        Fused(ignore_index=-1, block=4),
        Fused(0.1, W, ignore_index=100, logit_cap=2.0, vocab_block=3),
    ],
)
def test_ignored_places_are_not_there_even_if_all_are(loss):
    head, ignored = jb.Dense(4, V), loss.ignore_index
    params, run = head.init(jax.random.key(0)), jb.value_and_grad(head, loss)
    y = jnp.full((6, 3), ignored)
    value, grads = run(params, X.at[0, 0].set(jnp.nan), y)
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    y = Y.at[1].set(ignored)
    assert_close(run(params, X.at[1, 2].set(jnp.inf), y), run(params, X, y), 0)
    masked = params | {"b": params["b"].at[0].set(-jnp.inf).at[6].set(-jnp.inf)}
    y = jnp.clip(Y, 1, 5).at[1, 2].set(ignored)
    assert np.isfinite(run(masked, X, y)[0])
    found = loss.head(X, params["w"], None, y, jnp.ones(6))
    assert found.b_grad is None


def test_labels_out_of_range_are_never_silent():
    for bad, loss in ((V, Fused()), (-1, Fused(ignore_index=-100)), (-7, Fused())):
        y = Y.at[4, 2].set(bad)
        with pytest.raises(ValueError, match=rf"labels must be from 0 to 6.*y\[4, 2\] is {bad}"):
            jb.value_and_grad(NET, loss)(PARAMS, X, y)
        value, grads = jax.jit(jb.value_and_grad(NET, loss))(PARAMS, X, y)
        assert np.isnan(value)
        assert np.isnan(grads[2]["b"]).all()
        weights = jnp.ones(6).at[4].set(0)  # then it is not there
        found = jax.jit(jb.value_and_grad(NET, loss))(PARAMS, X, y, weights)
        assert_close(found, jb.value_and_grad(NET, loss)(PARAMS, X, Y, weights))


def test_big_and_infinite_net_inputs():
    head, b = jb.Dense(3, 5), jnp.asarray([1e4, -jnp.inf, 1e4 + 1, 9999.0, -jnp.inf])
    params, x, y = {"w": normal(3, 5), "b": b}, normal(4, 3), jnp.asarray([0, 2, 3, 2])
    finite = [0, 2, 3]
    small = {"w": params["w"][:, finite], "b": b[jnp.asarray(finite)] - 1e4}

    def cost(p):
        z = x @ p["w"] + p["b"][None]
        return jnp.mean(plain_costs(z, jnp.asarray([0, 1, 2, 1])))

    value, truth = jax.jit(jax.value_and_grad(cost))(small)
    found, grads = jb.value_and_grad(head, Fused(vocab_block=2))(params, x, y)
    assert abs(found - value) < 1e-11
    assert not np.any(grads["w"][:, jnp.asarray([1, 4])])
    assert_close(jax.tree.map(lambda g: g[..., jnp.asarray(finite)], grads), truth, 1e-11)


def test_a_class_of_weight_0_is_not_there_even_if_its_net_input_is_infinite():
    loss = Fused(0.1, class_weights=W, vocab_block=2)
    b = jnp.zeros(V).at[4].set(-jnp.inf)
    w, y = normal(4, V), jnp.minimum(Y, 3)
    found = loss.head(X, w, b, y, jnp.ones(6))
    truth = loss.head(X, w, b.at[4].set(-800.0), y, jnp.ones(6))
    assert np.isfinite(found.losses).all()
    assert_close(found, truth)


def test_large_and_small_net_inputs_share_a_block():
    """Were the maximum that of the block, the costs of the small ones would be infinite."""
    x, y = jnp.asarray([[1.0, 1e4], [1.0, 0.0], [1.0, -1e4]]), labels(3)
    params = {"w": normal(2, V).at[1].set(1.0), "b": jnp.zeros(V)}
    head = jb.Dense(2, V)

    def cost(p):
        return jnp.mean(plain_costs(x @ p["w"] + p["b"][None], y))

    assert_close(
        jb.value_and_grad(head, Fused())(params, x, y), jax.jit(jax.value_and_grad(cost))(params)
    )


def test_the_delta_of_a_rare_class_in_float16_does_not_underflow():
    h, w, y = (
        jnp.ones((2, 1), "float16"),
        jnp.asarray([[0, -18, 1]], "float16"),
        jnp.asarray([0, 2]),
    )
    found = Fused().head(h, w, None, y, jnp.ones(2))
    p = jax.nn.softmax(jnp.asarray([0.0, -18, 1]))
    assert relative(found.w_grad[0, 1], 2 * p[1]) < 1e-5
    assert found.delta_h.dtype == jnp.float16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_narrow_parameters(dtype):
    params, x = jax.tree.map(lambda v: v.astype(dtype), (PARAMS, X))
    exact = jax.tree.map(lambda v: v.astype("float64"), params)
    loss, eps = Fused(label_smoothing=0.1, block=4, vocab_block=3), float(jnp.finfo(dtype).eps)

    def cost(p):
        return jnp.mean(plain_costs(plain_net(p, x.astype("float64")), Y, s=0.1))

    value, grads = jb.value_and_grad(NET, loss)(params, x, Y)
    assert loss.delta(normal(6, 3, V).astype(dtype), Y).dtype == dtype
    assert value.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    truth = jax.jit(jax.value_and_grad(cost))(exact)
    assert relative(value, truth[0]) < 4 * eps
    assert_close(jax.tree.map(lambda g: g.astype("float64"), grads), truth[1], 8 * eps)
    weights = jnp.full(6, 1 / 6, dtype)
    weighted = jb.value_and_grad(NET, loss)(params, x, Y, weights)
    assert_close(jax.tree.map(lambda g: g.astype("float64"), weighted[1]), truth[1], 8 * eps)


def test_keys_and_layers_that_couple_examples():
    body = (jb.Dense(4, 5), jb.Dropout(0.5), jb.BatchNorm(5), jb.Dropout(0.3))
    net = jb.Sequential(*body, jb.Dense(5, V))
    params, key = net.init(jax.random.key(0)), jax.random.key(3)
    weights = jnp.asarray([0.5, 0.2, 1.0, 0.7, 2.0, 0.1])
    for w in (None, weights):
        found = jb.value_and_grad(net, Fused(block=4))(params, X, Y, w, key)
        assert_close(found, jb.value_and_grad(net, jb.SoftmaxCrossEntropy())(params, X, Y, w, key))


def test_vmap_jvp_and_scan():
    run = jb.value_and_grad(NET, Fused(label_smoothing=0.1, logit_cap=2.0, block=4, vocab_block=3))
    flip = jax.tree.map(jnp.negative, PARAMS)
    both = jax.tree.map(lambda *v: jnp.stack(v), PARAMS, flip)
    found = jax.jit(jax.vmap(lambda p: run(p, X, Y)))(both)
    for i, params in enumerate((PARAMS, flip)):
        assert_close(jax.tree.map(lambda v, i=i: v[i], found), run(params, X, Y))

    def cost(p):
        return jnp.mean(plain_costs(plain_net(p, X), Y, s=0.1, cap=2.0))

    product = jax.jit(lambda p, v: jax.jvp(lambda p: run(p, X, Y)[1], (p,), (v,))[1])
    truth = jax.jit(lambda p, v: jax.jvp(jax.grad(cost), (p,), (v,))[1])
    assert_close(product(PARAMS, flip), truth(PARAMS, flip), 1e-11)


def test_it_lowers_for_every_platform():
    run = jax.jit(jb.value_and_grad(NET, Fused(block=4, vocab_block=3)))
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(PARAMS, X, Y)
    assert_close(tuple(exported.call(PARAMS, X, Y)), run(PARAMS, X, Y))


def test_no_examples():
    value, grads = jb.value_and_grad(NET, Fused())(PARAMS, X[:0], Y[:0], jnp.zeros(0))
    assert value == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="the batch is empty"):
        jb.value_and_grad(NET, Fused())(PARAMS, X[:0], Y[:0])


def largest(f, *args):
    """The number of entries of the largest array in the compiled program."""
    text = jax.jit(f).lower(*args).compile().as_text()
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


B, T, P, BIG, BLOCK = 8, 32, 8, 600, 16  # N = 256


def test_no_array_of_positions_times_classes_exists():
    net = jb.Sequential(jb.Dense(P, P), jb.Tanh(), jb.Dense(P, BIG))
    tied = jb.Tied(jb.Embedding(BIG, P), jb.Dense(P, P))
    x = jax.ShapeDtypeStruct((B, T, P), float)
    y = jax.ShapeDtypeStruct((B, T), jnp.int32)
    options = {"label_smoothing": 0.1, "ignore_index": 0, "logit_cap": 30.0}
    for loss in (Fused(block=BLOCK, vocab_block=130), Fused(**options, block=BLOCK)):
        for model, inputs in ((net, x), (tied, y)):
            params = jax.eval_shape(model.init, jax.random.key(0))
            size = largest(jb.value_and_grad(model, loss), params, inputs, y)
            assert size <= BLOCK * BIG < B * T * BIG
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert largest(functools.partial(costs, net, loss), params, x, y) <= BLOCK * BIG
    assert largest(jb.value_and_grad(net, jb.SoftmaxCrossEntropy()), params, x, y) >= B * T * BIG


def test_the_default_blocks_are_some_megabytes():
    head = jb.Dense(64, 50257)
    params = jax.eval_shape(head.init, jax.random.key(0))
    params = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, "float32"), params)
    x = jax.ShapeDtypeStruct((4, 512, 64), jnp.float32)
    y = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    assert largest(jb.value_and_grad(head, Fused()), params, x, y) * 4 < 34e6


def test_what_is_refused():
    for options, what in (
        ({"logit_cap": 0.0}, "logit_cap must be a finite number above 0"),
        ({"logit_cap": jnp.inf}, "logit_cap must be a finite number above 0"),
        ({"block": 0}, "block must be an int of at least 1"),
        ({"block": True}, "block must be an int"),
        ({"vocab_block": 2.5}, "vocab_block must be an int"),
        (
            {"label_smoothing": 2},
            "label_smoothing must be a finite number of at least 0 and at most 1",
        ),
    ):
        with pytest.raises(ValueError, match=what):
            Fused(**options)
    assert Fused(block=np.int32(3)) == Fused(block=3)
    assert repr(Fused(block=3)).endswith("(block=3)")
    with pytest.raises(ValueError, match=r"ends in a Dense.*Tanh") as info:
        jb.value_and_grad(jb.Sequential(*NET.layers[:2]), Fused())(PARAMS[:2], X, jnp.minimum(Y, 4))
    assert "at layers[1]" in info.value.__notes__[0]
    with pytest.raises(TypeError, match=r"integer labels.*SoftmaxCrossEntropy takes them"):
        jb.value_and_grad(NET, Fused())(PARAMS, X, jnp.zeros((6, 3, V)))
    with pytest.raises(TypeError, match="labels must be integers"):
        jb.value_and_grad(NET, Fused())(PARAMS, X, Y.astype(float))
    with pytest.raises(ValueError, match="4 features"):
        jb.value_and_grad(NET, Fused())(PARAMS, X[..., :3], Y)
    with pytest.raises(ValueError, match="2 class_weights for 7 outputs"):
        jb.value_and_grad(NET, Fused(class_weights=(1.0, 2.0)))(PARAMS, X, Y)
    for net in (type("Odd", (jb.Dense,), {"forward": lambda *_: None})(4, V),
                type("Odd", (jb.Sequential,), {"forward": lambda *_: None})(jb.Dense(4, V))):  # fmt: skip
        with pytest.raises(ValueError, match="ends in a Dense"):
            net.behead(net.init(jax.random.key(0)))
    plain = jb.SoftmaxCrossEntropy()
    for call in (plain.head, plain.head_losses):
        with pytest.raises(NotImplementedError, match="net inputs"):
            call(*[None] * (5 if call == plain.head else 4))


def test_fit_and_evaluate_take_it_as_any_loss():
    data = (np.asarray(X[:, 0], np.float64), np.asarray(Y[:, 0]))
    options = {"epochs": 3, "batch_size": 4, "key": jax.random.key(0), "progress": False}
    metrics = {"accuracy": jb.metrics.accuracy}
    net = jb.Sequential(jb.Dense(4, V))
    params = net.init(jax.random.key(0))
    runs = [
        jb.fit(net, loss, params, data, optax.sgd(0.1), validation=data, metrics=m, **options)
        for loss, m in (
            (jb.SoftmaxCrossEntropy(), metrics), (Fused(block=2), metrics), (Fused(block=2), None)
        )
    ]  # fmt: skip
    for run in runs[1:]:
        assert_close(run.params, runs[0].params)
        for name in run.history:
            np.testing.assert_allclose(run.history[name], runs[0].history[name], rtol=1e-12)
    assert set(runs[2].history) == {"loss", "validation_loss"}


# Tied embeddings


BODY = jb.Sequential(jb.Dense(4, 3), jb.Tanh(), jb.Dense(3, 4))
TIED = jb.Tied(jb.Embedding(V, 4), BODY)
TIED_PARAMS = TIED.init(jax.random.key(2))
IDS = labels(5, 3)
NEXT = labels(5, 3)


def plain_tied(params, ids):
    table, (first, _, last) = params[0]["w"], params[1]
    h = jnp.tanh(jnp.einsum("nti,io->nto", table[ids], first["w"]) + first["b"][None, None])
    h = jnp.einsum("nti,io->nto", h, last["w"]) + last["b"][None, None]
    return jnp.einsum("nti,vi->ntv", h, table)


def tied_costs(params, ids, y):
    return plain_costs(plain_tied(params, ids), y)


def test_tied_forward_and_gradient_are_those_of_plain_jax():
    assert relative(jb.forward(TIED, TIED_PARAMS, IDS)[0], plain_tied(TIED_PARAMS, IDS)) < 1e-14
    mean = jax.jit(jax.value_and_grad(lambda p: jnp.mean(tied_costs(p, IDS, NEXT))))
    truth = mean(TIED_PARAMS)
    for loss in (jb.SoftmaxCrossEntropy(), Fused(), Fused(block=4, vocab_block=2)):
        assert_close(jb.value_and_grad(TIED, loss)(TIED_PARAMS, IDS, NEXT), truth)
    report = jb.check.network(TIED, Fused(), TIED_PARAMS, IDS, NEXT, truth="autodiff")
    assert report.verdict == "right"
    assert "head.w" in str(report)


def test_norms_of_single_examples_have_the_product_of_the_two_ways():
    bp = jb.backprop(TIED, jb.SoftmaxCrossEntropy(), TIED_PARAMS, IDS, NEXT)
    one = jax.grad(lambda p, ids, y: tied_costs(p, ids[None], y[None])[0])
    each = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))(TIED_PARAMS, IDS, NEXT)
    pair = bp.factored[0]["w"]
    assert isinstance(pair, jb.Sum)
    assert pair.home.path == "embedding.w"
    assert relative(pair.each(), each[0]["w"]) < 1e-13
    squares = jnp.sum(jnp.square(each[0]["w"]), axis=(1, 2))
    assert relative(pair.square_norm(), squares) < 1e-13
    weights = normal(5)
    assert relative(pair.total(weights), jnp.einsum("n,nvi->vi", weights, each[0]["w"])) < 1e-13
    assert list(jb.deltas(bp)) == ["embedding", "body.layers[0]", "body.layers[2]"]


def test_a_transport_for_the_table_carries_the_delta_through_the_head():
    other = {"w": normal(V, 4)}
    bp = jb.backprop(TIED, Fused(), TIED_PARAMS, IDS, NEXT, transport=(other, None))

    def cost(params, table):
        h = jb.forward(BODY, params, TIED_PARAMS[0]["w"][IDS])[0]
        true = jnp.einsum("nti,vi->ntv", h, TIED_PARAMS[0]["w"])
        carried = jnp.einsum("nti,vi->ntv", h, table)
        return jnp.sum(plain_costs(lax.stop_gradient(true - carried) + carried, NEXT))

    truth = jax.jit(jax.grad(cost))(TIED_PARAMS[1], other["w"])
    assert_close(jax.tree.map(lambda g: 5 * g, jb.gradient(bp)[1]), truth)


def test_tied_gives_each_layer_its_own_transport_and_aux():
    carry = BODY.init(jax.random.key(9))
    aux = ("of the table", ("of the first", (), "of the last"))
    y, table = TIED_PARAMS[0]["w"][IDS], TIED_PARAMS[0]["w"]
    h, saved = jb.forward(BODY, TIED_PARAMS[1], y)
    delta = normal(5, 3, V)

    def collect(factored, delta, aux):
        return delta, aux

    def swept(net, params, x, z, saved, delta, *trees):
        return jb.backward(net, params, net.trace(x, z, saved), delta, collect, *trees)

    delta_h = jnp.einsum("ntv,vi->nti", delta, table)
    due = swept(BODY, TIED_PARAMS[1], y, h, saved, delta_h, carry, aux[1])
    z, saved = jb.forward(TIED, TIED_PARAMS, IDS)
    delta_x, found = swept(TIED, TIED_PARAMS, IDS, z, saved, delta, (None, carry), aux)
    assert delta_x is None
    assert found[0][1] == aux[0]
    assert (found[1][0][1], found[1][2][1]) == (aux[1][0], aux[1][2])
    assert_close(
        (found[0][0], found[1][0][0], found[1][2][0]), (due[0], due[1][0][0], due[1][2][0])
    )
    narrow = jax.tree.map(lambda v: v.astype("bfloat16"), TIED_PARAMS)
    z, saved = jb.forward(TIED, narrow, IDS)
    wide = ({"w": table.astype("float32")}, None)
    _, found = swept(TIED, narrow, IDS, z, saved, delta, wide)
    assert {v.dtype for v in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}


def test_what_tied_refuses():
    with pytest.raises(TypeError, match="needs an Embedding first"):
        jb.Tied(BODY, BODY)
    with pytest.raises(TypeError, match="which is no layer"):
        jb.Tied(jb.Embedding(V, 4), jb.Tanh)
    net = jb.Tied(jb.Embedding(V, 4), jb.Dense(4, 3))
    with pytest.raises(ValueError, match="need the embedding's width"):
        jb.forward(net, net.init(jax.random.key(0)), IDS)
    odd = type("Odd", (jb.Tied,), {"forward": lambda *_: None})(jb.Embedding(V, 4), BODY)
    with pytest.raises(ValueError, match="ends in a Dense"):
        odd.behead(TIED_PARAMS)
    assert repr(TIED).startswith("Tied(Embedding(7, 4), Sequential(")
