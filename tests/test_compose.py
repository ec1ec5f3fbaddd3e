"""Composites: against loops written out in plain JAX, with keys, transports, and what they keep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from truth import assert_close, relative

import jbackprop as jb
from jbackprop import structure, sweep
from jbackprop.factored import is_factored

pytestmark = pytest.mark.newest
BLOCK = jb.Sequential(jb.Dense(4, 4), jb.Tanh())
HALF = jb.Sequential(jb.Dense(2, 2), jb.Tanh())
LOSS = jb.SquaredError()


def problem(net, features=4, batch=5):
    params = net.init(jax.random.key(1))
    x = jax.random.normal(jax.random.key(2), (batch, features))
    y = jnp.sin(jnp.arange(batch * features, dtype=float)).reshape(batch, features)
    return params, x, y


def half_squares(z, y):
    return 0.5 * jnp.sum(jnp.square(z - y))


def dense(p, x):
    return x @ p["w"] + jnp.broadcast_to(p["b"], (len(x), len(p["b"])))


def copy(params, i):
    return jax.tree.map(lambda p: p[i], params)


@pytest.mark.parametrize("every", [None, 1, 2, 3, 4, 7, 9])
def test_repeat_is_a_loop(every):
    net = jb.Repeat(jb.Skip(BLOCK), 7, checkpoint_every=every)
    params, x, y = problem(net)

    def cost(params, x):
        for i in range(7):
            x = x + jnp.tanh(dense(copy(params, i)[0], x))
        return half_squares(x, y)

    bp = jb.backprop(net, LOSS, params, x, y)
    truth, delta_x = jax.jit(jax.grad(cost, (0, 1)))(params, x)
    assert_close(jb.gradient(bp, jnp.ones(5)), truth)
    assert_close(bp.delta_x, delta_x)
    assert_close(jb.value_and_grad(net, LOSS)(params, x, y, jnp.ones(5)), (cost(params, x), truth))


def coupled(params, x, f, g):
    x1, x2 = jnp.split(x, 2, axis=1)
    y1 = x1 + f(params[0], x2)
    return jnp.concatenate([y1, x2 + g(params[1], y1)], axis=1)


@pytest.mark.parametrize("depth", [1, 6])
def test_reversible_is_additive_coupling(depth):
    net = jb.Repeat(jb.Reversible(HALF, jb.Dense(2, 2)), depth)
    params, x, y = problem(net)

    def cost(params, x):
        for i in range(depth):
            f = lambda p, x: jnp.tanh(dense(p[0], x))  # noqa: E731
            x = coupled(copy(params, i), x, f, dense)
        return half_squares(x, y)

    bp = jb.backprop(net, LOSS, params, x, y)
    truth, delta_x = jax.jit(jax.grad(cost, (0, 1)))(params, x)
    assert_close(jb.gradient(bp, jnp.ones(5)), truth)
    assert_close(bp.delta_x, delta_x)


def test_reversible_recovers_its_input_and_takes_a_tuple(key):
    layer = jb.Reversible(HALF, jb.Tanh())
    params, x, _ = problem(layer)
    y, saved = jb.forward(layer, params, x)
    assert relative(layer.invert(params, y, saved), x) < 1e-14
    halves, _ = jb.forward(layer, params, (x[:, :2], x[:, 2:]))
    assert_close(halves, (y[:, :2], y[:, 2:]), 0)
    stack = jb.Repeat(layer, 5)
    params = stack.init(key)
    y, saved = jb.forward(stack, params, x)
    assert relative(stack.invert(params, y, saved), x) < 1e-13


def test_fan_out_and_parallel_are_what_they_say():
    net = jb.Sequential(
        jb.FanOut(jb.Dense(4, 3), jb.Sigmoid(), jb.Dense(4, 2)),
        jb.Parallel(jb.Tanh(), jb.Dense(4, 3), jb.Identity()),
        jb.FanOut(jb.Sequential(jb.Select(0)), jb.Select(1), jb.Select(2)),
        jb.Concatenate(),
    )
    params, x, _ = problem(net)
    y = jnp.cos(jnp.arange(40, dtype=float)).reshape(5, 8)

    def cost(params, x):
        first, second = params[0], params[1]
        a, b, c = dense(first[0], x), jax.nn.sigmoid(x), dense(first[2], x)
        z = jnp.concatenate([jnp.tanh(a), dense(second[1], b), c], axis=1)
        return half_squares(z, y)

    bp = jb.backprop(net, LOSS, params, x, y)
    truth, delta_x = jax.jit(jax.grad(cost, (0, 1)))(params, x)
    assert_close(jb.gradient(bp, jnp.ones(5)), truth)
    assert_close(bp.delta_x, delta_x)


DRAWING = jb.Sequential(jb.Dense(4, 4), jb.Dropout(0.5))
HALF_DRAWING = jb.Sequential(jb.Dense(2, 2), jb.Dropout(0.5))
WITH_KEYS = [
    jb.Skip(DRAWING),
    jb.Skip(DRAWING, DRAWING),
    jb.Checkpoint(DRAWING),
    jb.Repeat(DRAWING, 3),
    jb.Repeat(jb.Checkpoint(DRAWING), 3),
    jb.Repeat(jb.Skip(DRAWING), 5, checkpoint_every=2),
    jb.Repeat(jb.Repeat(DRAWING, 2), 2),
    jb.Sequential(jb.FanOut(DRAWING, DRAWING), jb.Parallel(jb.Dropout(0.5), jb.Tanh()), jb.Add()),
    jb.Reversible(HALF_DRAWING, HALF_DRAWING),
    jb.Repeat(jb.Reversible(HALF_DRAWING, jb.Dropout(0.5)), 3),
    jb.Repeat(jb.Repeat(jb.Reversible(HALF_DRAWING, jb.Dropout(0.5)), 2), 2),
    jb.Frozen(DRAWING),
]


@pytest.mark.parametrize("net", WITH_KEYS, ids=repr)
def test_keys_reach_the_leaves_and_the_way_back_draws_the_same(net):
    params, x, y = problem(net)
    x = jnp.broadcast_to(x[:1], x.shape)

    @jax.jit
    def of(params, x, key):
        def cost(params, x):
            return half_squares(jb.forward(net, params, x, key)[0], y)

        outputs = [jb.forward(net, params, x, k)[0] for k in (key, key, None)]
        found = jb.value_and_grad(net, LOSS)(params, x, y, jnp.ones(5), key)
        delta_x = jb.backprop(net, LOSS, params, x, y, key=key).delta_x
        value, truth = jax.value_and_grad(cost, (0, 1))(params, x)
        return outputs, (*found, delta_x), (value, *truth)

    (outputs, again, without), found, truth = of(params, x, jax.random.key(3))
    assert len(np.unique(np.asarray(outputs), axis=0)) > 1, "every example draws for itself"
    assert relative(again, outputs) == 0
    assert len(np.unique(np.asarray(without), axis=0)) == 1
    assert_close(found, truth)


def test_copies_draw_each_for_itself():
    net = jb.Repeat(jb.Dropout(0.5), 2)
    y, _ = jb.forward(net, (), jnp.ones((64, 32)), jax.random.key(0))
    assert 0.15 < float(jnp.mean(y != 0)) < 0.35  # one mask twice would leave one half


TRANSPORTED = [
    jb.Repeat(BLOCK, 3),
    jb.Repeat(BLOCK, 5, checkpoint_every=2),
    jb.Repeat(jb.Checkpoint(BLOCK), 3),
    jb.Repeat(jb.Reversible(HALF, jb.Dense(2, 2)), 3),
    jb.Skip(BLOCK, jb.Dense(4, 4)),
    jb.Sequential(jb.FanOut(BLOCK, jb.Dense(4, 4)), jb.Add()),
    jb.Sequential(
        jb.FanOut(jb.Identity(), jb.Dense(4, 4)), jb.Parallel(BLOCK, jb.Dense(4, 4)), jb.Add()
    ),
    jb.Sequential(jb.Dense(4, 4), jb.Frozen(BLOCK), jb.Checkpoint(jb.Dense(4, 4))),
]


class Fed(jb.Dense):
    """z = x W + b, whose derivative by x is the feedback: stop(x) W + b + x F - stop(x F)."""

    def forward(self, params, x, key=None):
        own, feedback = params
        carried = x @ jax.lax.stop_gradient(feedback["w"])
        exact = jax.lax.stop_gradient(x) @ own["w"] + own["b"]
        return exact + carried - jax.lax.stop_gradient(carried), None


@pytest.mark.parametrize("net", TRANSPORTED, ids=repr)
def test_transport_carries_the_delta_and_nothing_else(net):
    params, x, y = problem(net)
    feedback = jax.tree.map(lambda p: jnp.cos(7 * p + 1), params)
    fed = {path: other for path, _, other in structure.walk(net, feedback)}

    def pair(path, layer, own):
        return (Fed(layer.p, layer.q), (own, fed[path])) if own else (layer, own)

    def cost(params):
        return half_squares(jb.forward(*structure.rebuild(net, params, pair), x)[0], y)

    bp = jb.backprop(net, LOSS, params, x, y, transport=feedback)
    assert_close(jb.gradient(bp, jnp.ones(5)), jax.jit(jax.grad(cost))(params))
    same = jb.backprop(net, LOSS, params, x, y, transport=params)
    assert relative(same.delta_x, bp.delta_x) > 0.1


@pytest.mark.parametrize("net", TRANSPORTED, ids=repr)
def test_every_layer_is_given_its_part_of_aux(net):
    params, x, _ = problem(net)
    y, saved = jb.forward(net, params, x)
    aux, other = (jax.tree.map(lambda p, i=i: jnp.cos(7 * p + i), params) for i in range(2))

    def collect(factored, delta, aux):
        return jax.tree.map(lambda _, own: own, factored, aux, is_leaf=is_factored)

    _, found = jb.backward(net, params, net.trace(x, y, saved), y, collect, other, aux)
    assert_close(found, aux)


def test_collect_runs_in_the_scan_and_aux_is_routed():
    net = jb.Repeat(BLOCK, 3)
    params, x, y = problem(net)
    outputs, saved = jb.forward(net, params, x)
    trace, delta = net.trace(x, outputs, saved), outputs - y
    aux = jax.tree.map(lambda p: jnp.arange(1.0, 4.0), params)
    seen = []

    def collect(factored, delta, aux):
        seen.append(delta.shape)
        return jax.tree.map(
            lambda pair, a: a * pair.square_norm(), factored, aux, is_leaf=is_factored
        )

    _, found = jb.backward(net, params, trace, delta, collect, aux=aux)
    assert seen == [(5, 4)], "once, for a mini-batch of one copy"
    bp = jb.backprop(net, LOSS, params, x, y)
    each = jax.tree.map(lambda pair: pair.each(), bp.factored, is_leaf=is_factored)
    norms = jax.tree.map(lambda g: jnp.sum(g**2, axis=tuple(range(2, g.ndim))).T, each)
    assert_close(found, jax.tree.map(lambda n: jnp.arange(1.0, 4.0)[:, None] * n, norms))
    _, plain = jb.backward(net, params, trace, delta, sweep.square_norm)
    assert_close(plain, norms)


def test_deltas_and_activations_name_every_copy():
    net = jb.Sequential(jb.Dense(4, 4), jb.Repeat(jb.Checkpoint(BLOCK), 2), jb.Dense(4, 4))
    params, x, y = problem(net)
    long = jb.Sequential(jb.Dense(4, 4), BLOCK, BLOCK, jb.Dense(4, 4))
    own = (params[0], copy(params[1], 0), copy(params[1], 1), params[2])
    deltas = jb.deltas(jb.backprop(net, LOSS, params, x, y))
    assert list(deltas) == [
        "layers[0]", "layers[1].layer[0].layer.layers[0]", "layers[1].layer[1].layer.layers[0]",
        "layers[2]",
    ]  # fmt: skip
    truth = jb.deltas(jb.backprop(long, LOSS, own, x, y))
    assert_close(list(deltas.values()), list(truth.values()))
    found = jb.activations(net, params, x)
    assert_close(list(found.values()), list(jb.activations(long, own, x).values()))
    flow = jb.diagnose.delta_norms(jb.backprop(net, LOSS, params, x, y))
    assert len(flow.norms) == 4
    assert len(jb.diagnose.saturation(net, params, x)) == 2
    assert "x 2" in jb.summary(net, (4,))


def test_the_first_nonfinite_copy_is_named(key):
    net = jb.Repeat(jb.Sequential(jb.Dense(4, 4), jb.Tanh()), 3)
    params, x, y = problem(net)
    huge = jax.tree.map(lambda p: p.at[1].mul(jnp.inf), params)
    assert "parameters of layer[1].layers[0]" in jb.diagnose.first_nonfinite(net, LOSS, huge, x, y)
    net = jb.Repeat(jb.Activation(jnp.exp, jnp.exp), 6)
    place = jb.diagnose.first_nonfinite(net, LOSS, (), jnp.ones((2, 4)), jnp.zeros((2, 4)))
    assert place.startswith("the output of layer[3] (")


def test_frozen_layers_have_no_gradients_and_a_mask():
    net = jb.Sequential(jb.Dense(4, 4), jb.Frozen(BLOCK), jb.Repeat(jb.Frozen(jb.Dense(4, 4)), 2))
    params, x, y = problem(net)
    bp = jb.backprop(net, LOSS, params, x, y)
    grads = jb.gradient(bp)
    assert jax.tree.all(jax.tree.map(lambda g: not np.any(g), grads[1:]))
    assert np.any(grads[0]["w"])
    for pair in jax.tree.leaves(bp.factored[1:], is_leaf=is_factored):
        assert isinstance(pair, jb.Nothing)
        assert pair.each().shape == (5, *pair.total().shape)
        assert not np.any(pair.square_norm())
        assert not np.any(pair.gram(pair))
    mask = jb.trainable_mask(net, params)
    assert jax.tree.leaves(mask) == [True] * 2 + [False] * 4
    decay = optax.chain(optax.masked(optax.add_decayed_weights(0.1), mask), optax.sgd(0.1))
    after = jb.fit(net, LOSS, params, (x, y), decay, epochs=2, key=jax.random.key(0)).params
    assert_close(after[1:], params[1:], 0)
    assert relative(after[0]["w"], params[0]["w"]) > 0.01


def temp(net, batch=64):
    params, x, y = problem(net, 32, batch)
    step = jax.jit(lambda p, x, y: jb.value_and_grad(net, LOSS)(p, x, y))
    memory = step.lower(params, x, y).compile().memory_analysis()
    grads = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return memory.temp_size_in_bytes, grads, 64 * 32 * x.dtype.itemsize


@pytest.mark.as_shipped
def test_what_a_stack_keeps():
    """Temporary memory for each copy more, in units of one activation (batch, width)."""
    deep = functools.partial(jb.Sequential, jb.Dense(32, 32), jb.Tanh())
    wide = jb.Sequential(jb.Dense(32, 128), jb.Gelu(), jb.Dense(128, 32))
    half = jb.Sequential(jb.Dense(16, 64), jb.Gelu(), jb.Dense(64, 16))

    def grows(make, few=8, many=40):
        (low, less, unit), (high, more, _) = temp(make(few)), temp(make(many))
        return (high - low - (more - less)) / (many - few) / unit, (high - low) / (
            many - few
        ) / unit

    kept = grows(lambda n: jb.Repeat(deep(), n))
    assert kept[0] <= 2.05, kept  # its input, and the net input's activation
    assert grows(lambda n: jb.Repeat(jb.Checkpoint(wide), n))[0] <= 1.05
    assert grows(lambda n: jb.Repeat(jb.Reversible(half, half), n))[0] <= 0.05
    assert grows(lambda n: jb.Repeat(jb.Checkpoint(wide), n, checkpoint_every=8))[0] <= 0.2


def test_a_stack_is_traced_once_whatever_its_depth():
    traced = []

    class Counted(jb.Dense):
        def backward(self, params, trace, delta):
            traced.append(delta.shape)
            return super().backward(params, trace, delta)

    for n in (3, 100):
        net = jb.Repeat(jb.Skip(jb.Sequential(Counted(4, 4), jb.Tanh())), n)
        params, x, y = problem(net)
        size = len(str(jax.make_jaxpr(jb.value_and_grad(net, LOSS))(params, x, y)))
        assert size < 40_000, size
    assert len(traced) == 1


def test_errors_inside_name_the_path(key):
    net = jb.Sequential(jb.Dense(4, 4), jb.Repeat(jb.Skip(jb.Sequential(jb.Dense(3, 4))), 2))
    with pytest.raises(ValueError, match="needs 3 features") as caught:
        jb.forward(net, net.init(key), jnp.ones((2, 4)))
    notes = [note for note in caught.value.__notes__ if note.startswith("in the network")]
    assert notes == ["in the network, at layers[1].layer.branch.layers[0]: Dense(3, 4)"]


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: jb.Repeat(jb.Tanh(), 0), None, "n must be an int of at least 1"),
        (lambda: jb.Repeat(jb.Tanh(), True), None, "n must be an int of at least 1"),
        (lambda: jb.Repeat(jb.Tanh(), 3, 0), None, "checkpoint_every must be an int"),
        (lambda: jb.Repeat(jb.Dense(4, 3), 2), jnp.ones((2, 4)), "each copy feeds the next"),
        (lambda: jb.Skip(jb.Dense(4, 3)), jnp.ones((2, 4)), "give it a shortcut"),
        (lambda: jb.Skip(jb.Dense(4, 3), jb.Tanh()), jnp.ones((2, 4)), "make the shortcut give"),
        (lambda: jb.FanOut(), None, "at least one layer"),
        (lambda: jb.FanOut(jb.Tanh), None, "make an instance"),
        (lambda: jb.Parallel(jb.Tanh(), jb.Tanh()), jnp.ones((2, 4)), "use FanOut"),
        (lambda: jb.Reversible(jb.Tanh(), jb.Tanh()), jnp.ones((2, 5)), "even number of features"),
        (lambda: jb.Reversible(jb.Dense(2, 3), jb.Tanh()), jnp.ones((2, 4)), "keep the shape"),
        (lambda: jb.Reversible(jb.Tanh, jb.Tanh()), None, r"Reversible: f is .*: add \(\)"),
        (lambda: jb.Reversible(jb.Tanh(), jnp.tanh), None, "Reversible: g is .* no layer"),
        (lambda: jb.Skip(jb.Tanh), None, r"Skip: branch is .*: add \(\)"),
        (lambda: jb.Skip(jb.Tanh(), jb.Tanh), None, r"Skip: shortcut is .*: add \(\)"),
        (lambda: jb.Repeat([jb.Tanh()], 2), None, "Repeat: layer is .* no layer"),
        (lambda: jb.Checkpoint(jb.Tanh), None, r"Checkpoint: layer is .*: add \(\)"),
        (lambda: jb.Frozen(jb.Tanh), None, r"Frozen: layer is .*: add \(\)"),
        (lambda: jb.Tied(jb.Frozen(jb.Embedding(3, 2)), jb.Tanh()), None, "wrap the Tied"),
        (lambda: jb.Tied(jb.Embedding(3, 2), jb.Tanh), None, r"Tied: body is .*: add \(\)"),
        (lambda: jb.transformer(5, 4, 1, 2, 3, activation=jb.Relu), None, r"block: activation is .*: add \(\)"),
        (lambda: jb.transformer(5, 4, 1, 2, 0, rotary=True), None, "length must be"),
        (lambda: jb.transformer(5, 6, 1, 2, 3, rotary=True), None, "a multiple of 4"),
        (lambda: jb.RNN(2, 2, reverse="no"), None, "RNN: reverse must be True or False, not 'no'"),
        (lambda: jb.LSTM(2, 2, states=1), None, "LSTM: states must be True or False"),
        (lambda: jb.Attention(2, causal="no"), None, "Attention: causal must be"),
        (lambda: jb.Rotary(2, interleaved=0), None, "Rotary: interleaved must be"),
        (lambda: jb.Dense(2, 2, bias="no"), None, "Dense: bias must be"),
        (lambda: jb.Conv(1, 1, (3,), bias=None), None, "Conv: bias must be"),
        (lambda: jb.Conv(1, 1, (3,), padding=True), None, "padding must be .* not True"),
        (lambda: jb.LayerNorm(2, scale=None), None, "LayerNorm: scale must be"),
        (lambda: jb.FusedSoftmaxCrossEntropy(logit_cap="3"), None, "logit_cap must be .* not '3'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(make, x, message, key):
    def run():
        net = make()
        jb.forward(net, net.init(key), x)

    with pytest.raises((ValueError, TypeError), match=message):
        run()


def test_parameters_of_another_depth_are_refused(key):
    params = jb.Repeat(BLOCK, 3).init(key)
    with pytest.raises(ValueError, match="an axis of 4 copies in front"):
        jb.forward(jb.Repeat(BLOCK, 4), params, jnp.ones((2, 4)))


def test_a_tuple_of_outputs_needs_a_join(key):
    net = jb.FanOut(jb.Tanh(), jb.Tanh())
    with pytest.raises(ValueError, match="put a join"):
        jb.backward(net, ((), ()), jb.Trace(None, None, (None, None)), jnp.ones((2, 3)), sweep.keep)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stacks_keep_their_dtype(dtype):
    net = jb.Repeat(jb.Checkpoint(jb.Skip(BLOCK)), 3, checkpoint_every=2)
    params, x, y = jax.tree.map(lambda v: v.astype(dtype), problem(net))
    value, grads = jb.value_and_grad(net, LOSS)(params, x, y)
    assert value.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    wide = jax.tree.map(lambda v: v.astype("float64"), (params, x, y))
    _, truth = jb.value_and_grad(net, LOSS)(*wide)
    tolerance = 40 * float(jnp.finfo(dtype).eps)
    for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(truth), strict=True):
        assert relative(g.astype(float), t) < tolerance


def test_under_jit_vmap_and_jvp():
    net = jb.Repeat(jb.Checkpoint(jb.Skip(BLOCK)), 3, checkpoint_every=2)
    params, x, y = problem(net)
    call = jb.value_and_grad(net, LOSS)
    plain = call(params, x, y)
    assert_close(jax.jit(call)(params, x, y), plain, 1e-14)
    many = jax.vmap(lambda s: call(params, s * x, y))(jnp.array([1.0, 0.5]))
    assert_close(jax.tree.map(lambda v: v[0], many), plain, 1e-14)

    def cost(params):
        return half_squares(jb.forward(net, params, x)[0], y) / 5

    v = jax.tree.map(jnp.cos, params)
    _, product = jax.jvp(lambda p: call(p, x, y)[1], (params,), (v,))
    _, truth = jax.jvp(jax.grad(cost), (params,), (v,))
    assert_close(product, truth)
