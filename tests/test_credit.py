"""Other rules of credit assignment, against their equations written out in plain JAX, in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.datasets import load_digits
from truth import assert_close, assert_same, relative

import jbackprop as jb
from jbackprop import credit
from jbackprop.credit.settling import largest, norm, share
from jbackprop.credit.transported import _pairwise_uniform
from jbackprop.structure import rebuild, walk
from jbackprop.sweep import Layer

pytestmark = pytest.mark.newest
LOSS = jb.SoftmaxCrossEntropy()


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def labels(n, classes=3, seed=9):
    return jax.random.randint(jax.random.key(seed), (n,), 0, classes)


def mlp(*sizes, activation=None):
    return jb.mlp(list(sizes), activation=activation or jb.Tanh())


def block(width):
    return jb.Skip(jb.Sequential(jb.LayerNorm(width), jb.Dense(width, width), jb.Tanh()))


NETS = {
    "perceptron": (mlp(6, 5, 4, 3), (4, 6)),
    "width 1": (mlp(1, 1, 1, 3), (3, 1)),
    "skips": (jb.Sequential(jb.Dense(6, 5), block(5), block(5), jb.Dense(5, 3)), (4, 6)),
    "scanned": (
        jb.Sequential(jb.Dense(6, 5), jb.Repeat(jb.Sequential(jb.Dense(5, 5), jb.Tanh()), 3), jb.Dense(5, 3)),
        (4, 6),
    ),
    "convolutions": (jb.cnn(shape=(6, 6, 1), channels=(2, 3), classes=3, hidden=(4,), activation=jb.Tanh()), (3, 6, 6, 1)),
    "with batch norm": (
        jb.Sequential(jb.Dense(6, 5), jb.BatchNorm(5), jb.Tanh(), jb.Dense(5, 4), jb.Tanh(), jb.Dense(4, 3)),
        (5, 6),
    ),
    "done again": (
        jb.Sequential(jb.Dense(6, 5), jb.Checkpoint(jb.Sequential(jb.Tanh(), jb.Dense(5, 4))), jb.Dense(4, 3)),
        (4, 6),
    ),
    "frozen": (jb.Sequential(jb.Frozen(jb.Dense(6, 5)), jb.Tanh(), jb.Dense(5, 4), jb.Frozen(jb.Dense(4, 4)), jb.Dense(4, 3)), (4, 6)),
    "recurrent": (jb.Sequential(jb.LSTM(4, 3), jb.RNN(3, 3), jb.Take(-1), jb.Dense(3, 3)), (3, 4, 4)),
    "branches": (
        jb.Sequential(jb.FanOut(jb.Sequential(jb.Dense(6, 5), jb.Tanh()), jb.Dense(6, 5)), jb.Add(), jb.Dense(5, 3)),
        (4, 6),
    ),
    "tied": (jb.Tied(jb.Embedding(3, 4), jb.Sequential(jb.Positions(5, 4), jb.Dense(4, 4), jb.Tanh())), (2, 5)),
    "dropout": (jb.Sequential(jb.Dense(6, 5), jb.Tanh(), jb.Dropout(0.3), jb.Dense(5, 4), jb.Dense(4, 3)), (4, 6)),
    "transposed": (
        jb.Sequential(
            jb.Conv(1, 2, (3, 3)), jb.ConvTranspose(2, 3, (3, 3), stride=(2, 2)), jb.Tanh(), jb.Flatten(),
            jb.Dense(3 * 12 * 12, 3),
        ),
        (3, 6, 6, 1),
    ),
    "tokens": (jb.transformer(vocab=3, width=4, depth=1, heads=2, length=5), (2, 5)),
}  # fmt: skip


@functools.cache
def problem(name):
    net, shape = NETS[name]
    params = jax.tree.map(lambda w: w + 0.1 * normal(5, *w.shape), net.init(jax.random.key(0)))
    if name in ("tied", "tokens"):
        return net, params, labels(10).reshape(2, 5), labels(10, 3, 4).reshape(2, 5)
    return net, params, normal(1, *shape), labels(shape[0])


@functools.partial(jax.jit, static_argnums=0)
def backprop_grads(net, params, x, y, key=None):
    return jb.value_and_grad(net, LOSS)(params, x, y, key=key)[1]


def started(rule, net, params, x=None, seed=3):
    rule = dataclasses.replace(rule, loss=LOSS)
    return rule, rule.init(jax.random.key(seed), net, params, x)


def flat(tree):
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])


def degrees(u, v):
    u, v = flat(u), flat(v)
    return np.degrees(np.arccos(np.clip(u @ v / np.linalg.norm(u) / np.linalg.norm(v), -1, 1)))


# --- rules in which other weights carry the delta ----------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrueWeights(credit.Transported):
    """Feedback weights that are the weights."""

    def feedback(self, state, params):
        return self.carriers(state.net, params)


@dataclasses.dataclass(frozen=True)
class Fed(Layer):
    """A layer whose derivative with respect to x is taken at other weights. Params: (own, those)."""

    inner: Layer

    @property
    def draws(self):
        return self.inner.draws

    def init(self, key):
        raise NotImplementedError

    def forward(self, params, x, key=None):
        @jax.custom_vjp
        def apply(own, other, x):
            return self.inner.forward(own, x, key)[0]

        def back(kept, delta):
            own, other, x = kept
            by_own = jax.vjp(lambda own: self.inner.forward(own, x, key)[0], own)[1](delta)[0]
            by_x = jax.vjp(lambda x: self.inner.forward(other, x, key)[0], x)[1](delta)[0]
            return by_own, jax.tree.map(jnp.zeros_like, other), by_x

        apply.defvjp(lambda *args: (apply(*args), args), back)
        return apply(*params, x), None

    def backward(self, params, trace, delta):
        raise NotImplementedError


@functools.partial(jax.jit, static_argnums=0)
def grads_with_feedback(net, params, feedback, x, y, key=None):
    """By autodiff, of the same network whose layers have feedback weights in their derivative."""
    carried = credit.carriers.as_transport(net, params, feedback)
    parts = {path: own for path, _, own in walk(net, carried)}

    def fed(path, layer, own):
        return (layer, own) if parts[path] is None else (Fed(layer), (own, parts[path]))

    other, both = rebuild(net, params, fed)
    grads = jax.grad(lambda p: jnp.mean(LOSS.value(jb.forward(other, p, x, key)[0], y)))(both)
    own = [g[0] if parts[path] is not None else g for path, _, g in walk(other, grads)]
    left = iter(own)
    return rebuild(net, params, lambda path, layer, p: (layer, next(left)))[1]


TRANSPORTED = [
    credit.FeedbackAlignment(),
    credit.SignSymmetry("uniform"),
    credit.SignSymmetry("batch"),
    credit.SignSymmetry("fixed"),
    credit.KolenPollack(),
    credit.WeightMirror(),
]


@pytest.mark.parametrize("name", [name for name in NETS if name != "with batch norm"])
def test_the_true_weights_as_feedback_give_backpropagation(name):
    net, params, x, y = problem(name)
    key = jax.random.key(4)
    rule, state = started(TrueWeights(), net, params)

    @jax.jit
    def due(params, x, y):
        bp = jb.backprop(net, LOSS, params, x, y, key=key)
        return jb.gradient(bp), dict(jb.deltas(bp)), bp.losses, bp.outputs

    grads, info = rule.gradient(state, params, x, y, key)
    truth, deltas, losses, outputs = due(params, x, y)
    assert_close(grads, truth)
    assert_same(dict(info.deltas), deltas)
    assert relative(info.loss, np.mean(losses)) < 1e-14
    assert_same(info.outputs, outputs)


WRITTEN = [(name, TRANSPORTED[0]) for name in NETS if name not in ("recurrent", "tied")]
WRITTEN += [("perceptron", TRANSPORTED[3]), ("convolutions", TRANSPORTED[3])]


@pytest.mark.parametrize(("name", "rule"), WRITTEN, ids=str)
def test_feedback_weights_against_autodiff(name, rule):
    """(Through time, and through a tied table, what `transport` does has tests of its own.)"""
    net, params, x, y = problem(name)
    key = jax.random.key(4)
    rule, state = started(rule, net, params)
    grads, _ = rule.gradient(state, params, x, y, key)
    truth = grads_with_feedback(net, params, rule.feedback(state, params), x, y, key)
    assert_close(grads, truth, zero=1e-14)


DIRECT = [credit.DirectFeedbackAlignment(), credit.DirectRandomTargetProjection()]
BY_TURNS = [
    (name, rule)
    for i, name in enumerate(NETS)
    for rule in (TRANSPORTED[0], TRANSPORTED[1 + i % 5], *DIRECT)
] + [("perceptron", rule) for rule in TRANSPORTED[2:]]


@pytest.mark.parametrize(("name", "rule"), BY_TURNS, ids=str)
def test_no_rule_is_backpropagation_in_disguise(name, rule):
    """Layers before the last weights differ from backpropagation; the last agrees with it."""
    if name == "width 1" and rule == credit.SignSymmetry("uniform"):
        rule = credit.SignSymmetry("fixed")  # of one number, the direction is that of the sign
    net, params, x, y = problem(name)
    if name in ("recurrent", "tied") and rule not in TRANSPORTED[:5]:
        with pytest.raises(ValueError, match="is not defined for"):
            started(rule, net, params, x)
        return
    rule, state = started(rule, net, params, x)
    grads, _ = rule.gradient(state, params, x, y)
    truth = backprop_grads(net, params, x, y)
    if name == "tied":
        grads, truth, net = (grads,), (truth,), jb.Sequential(net)
    else:
        assert_close(grads[-1], truth[-1], 1e-10)
    for path, _, own in walk(net, rule_error(grads, truth)):
        alone = path == f"layers[{len(net.layers) - 1}]" or "layers[0].layer" in path
        alone = alone or (name == "frozen" and path == "layers[3].layer")
        assert alone or all(gap > 0.02 for gap in jax.tree.leaves(own)), path


def rule_error(grads, truth):
    """How far each is from the truth, whatever its length; of one number, by length."""

    def of(g, t):
        if np.linalg.norm(t) <= 1e-12:
            return 1.0
        return relative(g, t) if np.size(t) == 1 else np.sin(np.radians(degrees(g, t)))

    return jax.tree.map(of, grads, truth)


def test_a_network_and_a_rule_of_one_key_have_weights_of_their_own():
    """Also of one that is split off: else feedback alignment is backpropagation, and says nothing."""
    key = jax.random.key(5)
    for own in (key, *jax.random.split(key), jax.random.split(jax.random.split(key)[0])[0]):
        params = mlp(6, 5, 4, 3).init(own)
        for rule in (credit.FeedbackAlignment(loss=LOSS), credit.KolenPollack(loss=LOSS)):
            state = rule.init(key, mlp(6, 5, 4, 3), params)
            for i in (2, 4):
                assert 30 < degrees(state.learned[i]["w"], params[i]["w"]) < 150


def test_the_first_layer_needs_no_feedback():
    net, params, _, _ = problem("perceptron")
    _, state = started(credit.FeedbackAlignment(), net, params)
    assert state.learned[0] == {"w": None, "b": None}
    assert state.learned[2]["w"].shape == (5, 4)
    assert state.learned[2]["b"] is None


@pytest.mark.parametrize("name", ["perceptron", "scanned", "convolutions"])
def test_sign_symmetry_has_the_signs_of_the_weights(name):
    net, params, _, _ = problem(name)
    for magnitudes in ("uniform", "batch", "fixed"):
        rule, state = started(credit.SignSymmetry(magnitudes), net, params)
        later = rule.update(state, params, params, None)[1]
        now, then = rule.feedback(state, params), rule.feedback(later, params)
        pairs = zip(*(jax.tree.leaves(t) for t in (now, then)), strict=True)
        carried = list(jax.tree.leaves(rule.carriers(net, params)))
        for (b, after), w in zip(pairs, carried, strict=True):
            assert np.array_equal(np.sign(b), np.sign(w))
            assert np.array_equal(b, after) == (magnitudes != "batch")
            each = np.abs(b).reshape(3, -1) if w.shape == (3, 5, 5) else np.abs(b).reshape(1, -1)
            assert all((len(np.unique(row)) == 1) == (magnitudes == "uniform") for row in each)
            assert np.all(np.abs(b) > 0)


def test_sign_symmetry_magnitudes_have_the_size_of_fresh_weights():
    net = jb.Sequential(jb.Dense(3, 200), jb.Dense(200, 300))
    params = net.init(jax.random.key(0))
    for magnitudes in ("uniform", "batch", "fixed"):
        rule, state = started(credit.SignSymmetry(magnitudes), net, params)
        b = rule.feedback(state, params)[1]["w"]
        assert abs(np.sqrt(np.mean(np.square(b)) * 500 / 2) - 1) < 0.02  # Glorot's 2 / (p + q)


def test_magnitudes_of_each_batch_are_uniform_and_any_two_independent():
    shapes = [(3, 4), (2, 1, 2)]
    draw = jax.jit(jax.vmap(lambda key: _pairwise_uniform(key, shapes)))
    drawn = draw(jax.random.split(jax.random.key(6), 4000))
    assert [d.shape[1:] for d in drawn] == shapes
    numbers = np.concatenate([d.reshape(4000, -1) for d in drawn], axis=1)
    assert 0 < numbers.min() < 1e-3
    assert 0.999 < numbers.max() <= 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    for a, b in itertools.combinations(numbers.T, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 4000**0.5
        far = np.abs(a - b)  # of independent ones it is triangular, nearer or not mod 1 uniform
        assert stats.kstest(np.minimum(far, 1 - far) * 2, "uniform").pvalue > 1e-4


def test_kolen_pollack_shrinks_the_difference_by_its_decay_whatever_the_optimizer():
    net, params, x, y = problem("skips")
    rule, state = started(credit.KolenPollack(decay=0.03), net, params)
    optimizer = optax.adam(0.05)
    opt_state, before = optimizer.init(params), difference(rule, state, params)
    for t in range(1, 6):
        grads, info = rule.gradient(state, params, x, y)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
        asked = updates
        updates, state = rule.update(state, params, updates, info)
        assert_same(updates[0], asked[0])  # the first layer has no feedback: no decay
        assert_close(updates[3]["w"], asked[3]["w"] - 0.03 * params[3]["w"])
        assert_same(updates[3]["b"], asked[3]["b"])
        params = optax.apply_updates(params, updates)
        for now, then in zip(difference(rule, state, params), before, strict=True):
            assert relative(now, then * (1 - 0.03) ** t) < 1e-12


def difference(rule, state, params):
    pairs = jax.tree.map(
        lambda b, w: None if b is None else w - b, rule.feedback(state, params), params,
        is_leaf=lambda v: v is None,
    )  # fmt: skip
    return jax.tree.leaves(pairs)


def test_kolen_pollack_without_decay_never_meets():
    net, params, x, y = problem("perceptron")
    rule, state = started(credit.KolenPollack(decay=0.0), net, params)
    before = difference(rule, state, params)
    grads, info = rule.gradient(state, params, x, y)
    updates, state = rule.update(state, params, jax.tree.map(jnp.negative, grads), info)
    params = optax.apply_updates(params, updates)
    for now, then in zip(difference(rule, state, params), before, strict=True):
        assert relative(now, then) < 1e-14


@pytest.mark.parametrize("name", ["perceptron", "scanned", "convolutions", "skips", "transposed"])
def test_the_mirror_is_the_mean_product_of_noise_and_response(name):
    """E[xi (outer) (xi W)] = W, with an error of 1 / sqrt(samples), for every tap of a kernel."""
    net, params, x, y = problem(name)
    gaps = []
    for samples in (250, 16000):
        rule, state = started(credit.WeightMirror(samples=samples), net, params)
        found = jax.tree.leaves(rule.gradient(state, params, x, y)[1].learned)
        weights = jax.tree.leaves(rule.carriers(net, params))
        gaps.append(np.array([relative(m, w) for m, w in zip(found, weights, strict=True)]))
    assert np.all(gaps[1] < (0.25 if name == "transposed" else 0.06)), gaps
    assert np.all(gaps[0] > 4 * gaps[1]), gaps


def test_the_mirror_learns_a_running_mean_and_does_not_see_the_bias():
    net, params, x, y = problem("perceptron")
    params = jax.tree.map(lambda w: w + 5.0 if w.ndim == 1 else w, params)
    rule, state = started(credit.WeightMirror(rate=0.2, samples=200), net, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(40):
        before = state
        info = rule.gradient(state, params, x, y)[1]
        _, state = rule.update(state, params, zeros, info)
    learned, mean = state.learned[2]["w"], info.learned[2]["w"]
    assert_close(learned, 0.8 * before.learned[2]["w"] + 0.2 * mean)
    assert degrees(learned, params[2]["w"]) < 5
    assert abs(np.linalg.norm(learned) / np.linalg.norm(params[2]["w"]) - 1) < 0.1
    decayed = dataclasses.replace(rule, decay=0.0).update(before, params, zeros, info)[1]
    assert_close(decayed.learned[2]["w"], before.learned[2]["w"] + 0.2 * mean)


# --- the error to every layer directly ---------------------------------------------------------


def test_direct_feedback_alignment_written_out():
    net, params, x, y = problem("perceptron")
    rule, state = started(credit.DirectFeedbackAlignment(), net, params)
    b1, b2 = state.learned[2], state.learned[4]
    assert (b1.shape, b2.shape) == ((3, 5), (3, 4))
    assert np.max(np.abs(b1)) <= np.sqrt(6 / 8)
    a1 = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None])
    a2 = jnp.tanh(a1 @ params[2]["w"] + params[2]["b"][None])
    o = jax.nn.softmax(a2 @ params[4]["w"] + params[4]["b"][None])

    def wanted(e, error):
        d2, d1 = (error @ b2) * (1 - a2**2), (error @ b1) * (1 - a1**2)
        deltas = {"layers[0]": d1, "layers[2]": d2, "layers[4]": e}
        pairs = ((x, d1), (), (a1, d2), (), (a2, e))
        return tuple(
            {"w": p[0].T @ p[1] / 4, "b": jnp.mean(p[1], 0)} if p else () for p in pairs
        ), deltas

    e = o - jax.nn.one_hot(y, 3)
    grads, info = rule.gradient(state, params, x, y)
    assert_close(grads, wanted(e, e)[0])
    assert_same(dict(info.deltas), wanted(e, e)[1])
    rule = credit.DirectRandomTargetProjection(loss=LOSS)
    state = dataclasses.replace(state, rule=rule)
    grads, info = rule.gradient(state, params, x, y)
    assert_close(grads, wanted(e, -jax.nn.one_hot(y, 3))[0])
    assert_same(dict(info.deltas), wanted(e, -jax.nn.one_hot(y, 3))[1])


def test_direct_feedback_goes_around_a_skip_and_through_a_norm():
    """y = x + branch(norm(x)): what comes around is added; the norm passes its delta as ever."""
    dense, norm = jb.Dense(5, 5), jb.LayerNorm(5)
    net = jb.Sequential(
        jb.Dense(6, 5), jb.Skip(jb.Sequential(norm, dense)), jb.Tanh(), jb.Dense(5, 3)
    )
    params, x, y = net.init(jax.random.key(0)), normal(1, 4, 6), labels(4)
    rule, state = started(credit.DirectFeedbackAlignment(), net, params)
    grads, info = rule.gradient(state, params, x, y)
    b_in, b_out = state.learned[1][1], state.learned[3]
    h = x @ params[0]["w"] + params[0]["b"][None]
    inner = params[1]

    def normed(h):
        return jb.forward(norm, inner[0], h)[0]

    z = h + normed(h) @ inner[1]["w"] + inner[1]["b"][None]
    e = jax.nn.softmax(jnp.tanh(z) @ params[3]["w"] + params[3]["b"][None]) - jax.nn.one_hot(y, 3)
    delta_z = (e @ b_out) * (1 - jnp.tanh(z) ** 2)
    delta_h = delta_z + jax.vjp(normed, h)[1](e @ b_in)[0]
    assert_close(info.deltas["layers[0]"], delta_h)
    assert_close(grads[0]["w"], x.T @ delta_h / 4)
    assert_close(grads[1][1]["w"], normed(h).T @ delta_z / 4)


def test_direct_feedback_in_a_scan_is_that_of_its_copies():
    scanned, params, x, y = problem("scanned")
    rule, state = started(credit.DirectFeedbackAlignment(), scanned, params)
    copies = [jb.Sequential(jb.Dense(5, 5), jb.Tanh()) for _ in range(3)]
    net = jb.Sequential(jb.Dense(6, 5), *copies, jb.Dense(5, 3))
    at = [jax.tree.map(lambda v, i=i: v[i], params[1]) for i in range(3)]
    flat_params = (params[0], *at, params[2])
    feedback = [(state.learned[1][0][i], None) for i in range(3)]
    assert len(set(map(float, state.learned[1][0][:, 0, 0]))) == 3
    flat_state = dataclasses.replace(state, net=net, learned=(None, *feedback, state.learned[2]))
    grads, _ = rule.gradient(state, params, x, y)
    wanted, _ = rule.gradient(flat_state, flat_params, x, y)
    assert_close(grads[0], wanted[0])
    for i in range(3):
        assert_close(jax.tree.map(lambda v, i=i: v[i], grads[1]), wanted[1 + i])


def test_direct_feedback_of_tokens_serves_each_position():
    net = jb.Sequential(jb.Dense(4, 5), jb.Tanh(), jb.Dense(5, 3))
    params, x, y = net.init(jax.random.key(0)), normal(1, 2, 7, 4), labels(14).reshape(2, 7)
    rule, state = started(credit.DirectFeedbackAlignment(), net, params, x)
    assert state.learned[2].shape == (3, 5)
    grads, info = rule.gradient(state, params, x, y)
    a = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None, None])
    e = (jax.nn.softmax(a @ params[2]["w"] + params[2]["b"][None, None]) - jax.nn.one_hot(y, 3)) / 7
    delta = (e @ state.learned[2]) * (1 - a**2)
    assert_close(info.deltas["layers[0]"], delta)
    assert_close(grads[0]["w"], jnp.einsum("btp,btq->pq", x, delta) / 2)


def test_direct_feedback_of_tokens_to_what_has_no_positions():
    """There all of the errors come together; B as a matrix from the flat error."""
    net = jb.Sequential(
        jb.Dense(4, 5), jb.Tanh(), jb.Dense(5, 6), jb.Reshape((2, 3)), jb.Dense(3, 3)
    )
    params, x, y = net.init(jax.random.key(0)), normal(1, 7, 4), labels(14).reshape(7, 2)
    rule, state = started(credit.DirectFeedbackAlignment(), net, params, x)
    inner, last = state.learned[2], state.learned[4]
    assert (inner.shape, last.shape) == ((6, 5), (3, 3))
    info = rule.gradient(state, params, x, y)[1]
    a = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None])
    b = (a @ params[2]["w"] + params[2]["b"][None]).reshape(7, 2, 3)
    o = jax.nn.softmax(b @ params[4]["w"] + params[4]["b"][None, None])
    e = (o - jax.nn.one_hot(y, 3)) / 2
    assert_close(info.deltas["layers[2]"], (e @ last).reshape(7, 6))
    assert_close(info.deltas["layers[0]"], (e.reshape(7, 6) @ inner) * (1 - a**2))


def test_target_projection_of_squared_error_carries_the_values():
    net, params, x, _ = problem("perceptron")
    y = normal(7, 4, 3)
    rule = credit.DirectRandomTargetProjection(loss=jb.SquaredError())
    state = rule.init(jax.random.key(3), net, params)
    info = rule.gradient(state, params, x, y)[1]
    a1 = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None])
    assert_close(info.deltas["layers[0]"], -(y @ state.learned[2]) * (1 - a1**2))
    rounded = y.astype(jnp.float32)
    narrow = rule.gradient(state, params, x, rounded)[1]
    wide = rule.gradient(state, params, x, rounded.astype(jnp.float64))[1]
    assert_same(dict(narrow.deltas), dict(wide.deltas))


# --- difference target propagation -------------------------------------------------------------


def test_difference_target_propagation_written_out():
    net, params = mlp(6, 5, 4, 3), None
    params = net.init(jax.random.key(0))
    x, y, step = normal(1, 4, 6), labels(4), 0.3
    rule, state = started(credit.DifferenceTargetPropagation(step=step), net, params)
    (v,), (c,) = state.learned
    c = c + normal(2, 5)
    state = dataclasses.replace(state, learned=([v], [c]))
    assert (v["w"].shape, v["b"], c.shape) == ((5, 4), None, (5,))

    def unit(i, h):
        z = h @ params[i]["w"] + params[i]["b"][None]
        return z if i == 4 else jnp.tanh(z)

    def inverse(h):
        return jnp.tanh(h @ v["w"].T + c[None])

    h1 = unit(0, x)
    h2 = unit(2, h1)
    z = unit(4, h2)
    e = jax.nn.softmax(z) - jax.nn.one_hot(y, 3)
    t2 = h2 - step * (e @ params[4]["w"].T)
    t1 = h1 + inverse(t2) - inverse(h2)
    d2, d1 = (h2 - t2) / step * (1 - h2**2), (h1 - t1) / step * (1 - h1**2)
    grads, info = rule.gradient(state, params, x, y)
    assert_same(dict(info.deltas), {"layers[0]": d1, "layers[2]": d2, "layers[4]": e})
    assert_close(grads[0]["w"], x.T @ d1 / 4)
    assert_close(grads[2]["w"], h1.T @ d2 / 4)
    assert_close(grads[4]["w"], h2.T @ e / 4)


def inverse_cost(state, params, x, noise, unit):
    """The cost of a network's one inverse, in plain JAX, at given noise."""
    (v,), (c,) = state.learned
    near = x + noise

    def cost(w, c):
        back = unit(w, c, near)
        return jnp.sum(jnp.square(back - near)) / (2 * len(x))

    return jax.value_and_grad(cost, argnums=(0, 1))(v["w"], c)


def test_inverses_follow_the_gradient_of_their_reconstruction():
    net, params, x, y = problem("perceptron")
    rule, state = started(credit.DifferenceTargetPropagation(noise=0.2), net, params)
    info = rule.gradient(state, params, x, y)[1]
    h = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None])
    noise = 0.2 * jax.random.normal(jax.random.split(state.drawn, 3)[1], h.shape)

    def there_and_back(w, c, near):
        there = jnp.tanh(near @ params[2]["w"] + params[2]["b"][None])
        return jnp.tanh(there @ w.T + c[None])

    cost, (w_grad, c_grad) = inverse_cost(state, params, h, noise, there_and_back)
    (v,), (c,) = info.learned
    assert relative(info.extra["reconstruction"], cost) < 1e-12
    assert_close((v["w"], c), (w_grad, c_grad))
    after = rule.update(state, params, params, info)[1]
    assert_close(after.learned[0][0]["w"], state.learned[0][0]["w"] - 0.01 * w_grad)
    assert_close(after.learned[1][0], state.learned[1][0] - 0.01 * c_grad)


def test_inverses_of_convolutions_and_pooling_learn_to_undo():
    net = jb.Sequential(
        jb.Conv(1, 2, (3, 3)), jb.Tanh(), jb.Conv(2, 2, (3, 3)), jb.Tanh(), jb.MaxPool((2, 2)),
        jb.Flatten(), jb.Dense(18, 3),
    )  # fmt: skip
    params, x, y = net.init(jax.random.key(0)), normal(1, 8, 6, 6, 1), labels(8)
    rule, state = started(credit.DifferenceTargetPropagation(inverse_rate=0.05), net, params, x)
    costs = []
    for _ in range(60):
        info = rule.gradient(state, params, x, y)[1]
        costs.append(float(info.extra["reconstruction"]))
        state = rule.update(state, params, params, info)[1]
    assert np.mean(costs[-5:]) < 0.8 * np.mean(costs[:5])


def test_targets_of_orthogonal_layers_and_their_inverses_are_backpropagation():
    """The inverse of an orthogonal matrix is its transpose: no other weights have both."""
    net = jb.Sequential(*(jb.Dense(5, 5) for _ in range(4)))
    params = net.init(jax.random.key(0))
    turned = tuple(
        {"w": jnp.linalg.qr(normal(i, 5, 5))[0], "b": p["b"]} for i, p in enumerate(params)
    )
    x, y = normal(1, 4, 5), normal(2, 4, 5)
    rule = credit.DifferenceTargetPropagation(loss=jb.SquaredError())
    state = rule.init(jax.random.key(3), net, turned)
    inverses = [{"w": turned[i]["w"], "b": None} for i in (1, 2)]
    state = dataclasses.replace(state, learned=(inverses, state.learned[1]))
    grads, _ = rule.gradient(state, turned, x, y)
    assert_close(grads, jb.value_and_grad(net, jb.SquaredError())(turned, x, y)[1])
    _, info = rule.gradient(state, turned, x, y)
    assert float(info.extra["reconstruction"]) < 1e-28


# --- predictive coding -------------------------------------------------------------------------


DRAWING = jb.Sequential(jb.Tanh(), jb.Dropout(0.3), jb.Sequential(jb.Dense(5, 4), jb.Dropout(0.2)))
NETS["nested"] = (
    jb.Sequential(jb.Dense(6, 5), jb.Checkpoint(DRAWING), jb.Checkpoint(jb.Tanh()), jb.Dense(4, 3)),
    (4, 6),
)
NETS["deep"] = mlp(3, *[3] * 12, 3, activation=jb.Sigmoid()), (3, 3)


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "dropout", "nested", "deep"])
def test_predictive_coding_with_fixed_predictions_is_backpropagation(name):
    net, params, x, y = problem(name)
    key = jax.random.key(4)
    rule, state = started(credit.PredictiveCoding(rate=1.0, fixed_prediction=True), net, params)
    grads, info = rule.gradient(state, params, x, y, key)
    assert_close(grads, backprop_grads(net, params, x, y, key))
    assert_same(dict(info.deltas), dict(jb.deltas(jb.backprop(net, LOSS, params, x, y, key=key))))
    hidden = len(info.deltas) - 1
    assert int(info.extra["steps"]) == hidden
    short = dataclasses.replace(rule, steps=hidden - 1)
    grads, _ = short.gradient(dataclasses.replace(state, rule=short), params, x, y, key)
    assert np.max(np.abs(flat(grads[0]))) == 0  # a step a unit: the error has not come there yet
    slow = dataclasses.replace(rule, rate=0.3, tolerance=0.0, steps=400)
    grads, _ = slow.gradient(dataclasses.replace(state, rule=slow), params, x, y, key)
    assert_close(grads, backprop_grads(net, params, x, y, key))


def test_predictive_coding_settles_where_the_energy_is_least():
    net, params, x, y = problem("perceptron")
    rule, state = started(
        credit.PredictiveCoding(rate=0.2, steps=3000, tolerance=1e-13), net, params
    )
    grads, info = rule.gradient(state, params, x, y)

    def unit(params, i, v):
        z = v @ params[i]["w"] + params[i]["b"][None]
        return z if i == 4 else jnp.tanh(z)

    def energy(params, v1, v2):
        own = 0.5 * jnp.sum((v1 - unit(params, 0, x)) ** 2) + 0.5 * jnp.sum(
            (v2 - unit(params, 2, v1)) ** 2
        )
        return own + jnp.sum(LOSS.value(unit(params, 4, v2), y))

    v1 = unit(params, 0, x)
    v = (v1, unit(params, 2, v1))

    @jax.jit
    def settled(v):
        slope = jax.grad(energy, argnums=(1, 2))
        return jax.lax.fori_loop(
            0, 3000, lambda _, v: jax.tree.map(lambda a, s: a - 0.1 * s, v, slope(params, *v)), v
        )

    truth = jax.tree.map(lambda g: g / 4, jax.grad(energy)(params, *settled(v)))
    assert float(info.extra["residual"]) <= 1e-13
    assert_close(grads, truth, 1e-11)
    assert degrees(grads, backprop_grads(net, params, x, y)) > 3


def test_every_unit_has_to_settle():
    """In a deep net the errors of the first units are too small to be seen beside those of the last."""
    net, params, x, y = problem("deep")
    rule, state = started(credit.PredictiveCoding(rate=0.5, steps=3000), net, params)
    grads, info = rule.gradient(state, params, x, y)
    closely = dataclasses.replace(rule, tolerance=1e-12)
    truth, _ = closely.gradient(dataclasses.replace(state, rule=closely), params, x, y)
    norms = [np.linalg.norm(flat(g)) for g in truth if jax.tree.leaves(g)]
    assert norms[0] < 1e-6 * norms[-1]
    assert_close(grads, truth, 0.01)
    assert 12 < int(info.extra["steps"]) < 3000
    short = dataclasses.replace(rule, steps=11)
    info = short.gradient(dataclasses.replace(state, rule=short), params, x, y)[1]
    assert float(info.extra["residual"]) == 1


def test_norms_neither_overflow_nor_call_what_diverges_settled():
    huge = jnp.asarray([3e30, 4e30], jnp.float32)
    assert relative(norm(huge), 5e30) < 1e-6
    assert relative(norm(huge * jnp.float32(1e-30) * jnp.float32(1e-30)), 5e-30) < 1e-6
    assert relative(norm(huge * jnp.float32(4e7)), 2e38) < 1e-6  # 1 / 2e38 is not a normal number
    infinite = jnp.asarray(jnp.inf, jnp.float32)
    assert np.isnan(share(jnp.float32(1), infinite))
    assert np.isnan(share(infinite, infinite))
    assert share(jnp.float32(0), jnp.float32(0)) == 0
    assert np.isnan(largest([jnp.float32(0), jnp.float32(jnp.nan), jnp.float32(1)]))


@dataclasses.dataclass(frozen=True)
class Scaled(jb.Loss):
    """A loss times a number."""

    size: float

    def value(self, z, y):
        return self.size * LOSS.value(z, y)

    def delta(self, z, y):
        return self.size * LOSS.delta(z, y)


def test_predictive_coding_goes_to_backpropagation_as_the_cost_goes_to_0():
    """Activities then stay where they are, by as much as the cost is small."""
    net, params, x, y = problem("perceptron")
    truth, gaps = flat(backprop_grads(net, params, x, y)), []
    for size in (1e-2, 1e-3):
        rule = credit.PredictiveCoding(rate=0.2, steps=3000, tolerance=1e-13, loss=Scaled(size))
        state = rule.init(jax.random.key(0), net, params)
        gaps.append(relative(flat(rule.gradient(state, params, x, y)[0]) / size, truth))
    assert gaps[1] < 3e-3
    assert abs(gaps[0] / gaps[1] / 10 - 1) < 0.1


# --- equilibrium propagation -------------------------------------------------------------------


SMALL = jb.Sequential(jb.Dense(5, 4), jb.Tanh(), jb.Dense(4, 4), jb.Sigmoid(), jb.Dense(4, 3))


def equilibrium(beta, **options):
    options = {"steps": 4000, "nudged_steps": 4000, "tolerance": 1e-15} | options
    return credit.EquilibriumPropagation(nudge=beta, **options)


def settled(params, x, steps=2000):
    """The free equilibrium of SMALL, in plain JAX."""
    w1, w2, w3 = (params[i]["w"] for i in (0, 2, 4))
    b1, b2, b3 = (params[i]["b"][None] for i in (0, 2, 4))

    def step(s, _):
        s1, s2, s3 = s
        new = (
            jnp.tanh(x @ w1 + b1 + s2 @ w2.T),
            jax.nn.sigmoid(s1 @ w2 + b2 + s3 @ w3.T),
            s2 @ w3 + b3,
        )
        return jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, s, new), None

    zeros = tuple(jnp.zeros((len(x), n)) for n in (4, 4, 3))
    return jax.lax.scan(step, zeros, None, steps)[0]


def small():
    return jax.tree.map(
        lambda w: 0.6 * w + 0.1 * normal(5, *w.shape), SMALL.init(jax.random.key(0))
    )


def test_equilibrium_propagation_goes_to_the_gradient_of_the_free_equilibrium():
    params, x, y = small(), normal(1, 4, 5), labels(4)
    truth = jax.grad(lambda p: jnp.mean(LOSS.value(settled(p, x)[2], y)))(params)
    rule, state = started(equilibrium(0.1), SMALL, params)
    assert_close(rule.truth(state, params, x, y), truth, 1e-10)
    assert_close(rule.outputs(state, params, x), settled(params, x)[2], 1e-12)
    for symmetric, order in ((True, 2), (False, 1)):
        gaps = []
        for beta in (0.04, 0.02, 0.01):
            rule = equilibrium(beta, symmetric=symmetric, loss=LOSS)
            state = dataclasses.replace(state, rule=rule)
            grads, info = rule.gradient(state, params, x, y)
            gaps.append(relative(flat(grads), flat(truth)))
        assert float(info.extra["residual"]) < 1e-14
        assert gaps[-1] < (1e-4 if symmetric else 1e-2)
        for wide, narrow in itertools.pairwise(gaps):
            assert abs(wide / narrow / 2**order - 1) < 0.05, (symmetric, gaps)
    assert degrees(grads, backprop_grads(SMALL, params, x, y)) > 3
    assert relative(info.loss, np.mean(LOSS.value(settled(params, x)[2], y))) < 1e-12
    assert not jb.credit.alignment(state, params, x, y).delta


def test_the_truth_settles_whatever_the_rule_does():
    """On a network of the usual size, which at the default settings is not settled."""
    net, (x, y) = mlp(64, 64, 64, 10), load_digits(return_X_y=True)
    params, x, y = net.init(jax.random.key(0)), jnp.asarray(x[:32] / 16), jnp.asarray(y[:32])
    rule, state = started(equilibrium(1e-4, steps=20000, nudged_steps=20000), net, params)
    grads, _ = rule.gradient(state, params, x, y)
    for rule in (credit.EquilibriumPropagation(loss=LOSS), equilibrium(0.1, steps=2, loss=LOSS)):
        truth = rule.truth(dataclasses.replace(state, rule=rule), params, x, y)
        assert_close(grads, truth, 1e-4)


def test_what_does_not_settle_has_no_truth_and_no_small_residual():
    net = mlp(6, 8, 8, 3, activation=jb.Relu())
    params = jax.tree.map(lambda w: 4 * w.astype(jnp.float32), net.init(jax.random.key(0)))
    x, y = normal(1, 4, 6).astype(jnp.float32), labels(4)
    rule, state = started(credit.EquilibriumPropagation(), net, params)
    info = rule.gradient(state, params, x, y)[1]
    assert not float(info.extra["residual"]) <= 0.1
    assert np.all(np.isnan(flat(rule.truth(state, params, x, y))))
    assert np.isnan(credit.alignment(state, params, x, y).gradient["all"])


@pytest.mark.parametrize("nudge", [0.1, 0.01, 0.001])
def test_nudged_phases_settle_by_the_way_they_go_however_short_it_is(nudge):
    """Beside s itself it would be small from the start, and units far from the output stay behind."""
    net = mlp(6, 5, 5, 5, 3)
    params = jax.tree.map(lambda w: 0.6 * w, net.init(jax.random.key(0)))
    x, loss = normal(1, 4, 6), jb.SquaredError()
    rule = credit.EquilibriumPropagation(nudge=nudge, loss=loss)
    state = rule.init(jax.random.key(3), net, params)
    y = equilibrium(0.1, loss=loss).outputs(state, params, x) + 1e-3 * normal(2, 4, 3)
    grads, info = rule.gradient(state, params, x, y)
    assert_close(grads, rule.truth(state, params, x, y), 0.06)
    short = dataclasses.replace(rule, nudged_steps=2)
    info = short.gradient(dataclasses.replace(state, rule=short), params, x, y)[1]
    assert min(float(info.extra["residual_up"]), float(info.extra["residual_down"])) > 0.5


def test_equilibrium_propagation_of_convolutions():
    net = jb.Sequential(
        jb.Conv(1, 2, (3, 3)), jb.AveragePool((2, 2)), jb.HardTanh(), jb.Flatten(), jb.Dense(18, 3),
    )  # fmt: skip
    params = jax.tree.map(lambda w: 0.5 * w, net.init(jax.random.key(0)))
    x, y = normal(1, 3, 6, 6, 1), labels(3)
    rule, state = started(equilibrium(1e-3), net, params)
    grads, _ = rule.gradient(state, params, x, y)
    assert_close(grads, rule.truth(state, params, x, y), 1e-5)


# --- forward-forward ---------------------------------------------------------------------------


def test_forward_forward_written_out():
    net = jb.Sequential(jb.Dense(6, 5), jb.Relu(), jb.Dense(5, 4), jb.Relu())
    params = jax.tree.map(
        lambda w: 1.5 * w + 0.1 * normal(4, *w.shape), net.init(jax.random.key(0))
    )
    x, y = normal(1, 8, 6), labels(8)
    rule, state = started(credit.ForwardForward(classes=3, threshold=0.7, on=2.0), net, params)
    wrong = (y + jax.random.randint(state.drawn, y.shape, 1, 3, jnp.int32).astype(int)) % 3
    assert not np.any(wrong == y)

    def with_label(y):
        return x.at[:, :3].set(2.0 * jax.nn.one_hot(y, 3))

    def unit(params, i, h):
        return jax.nn.relu(h @ params[i]["w"] + params[i]["b"][None])

    def good(params, x, local):
        first = unit(params, 0, x)
        between = first / jnp.sqrt(jnp.mean(first**2, axis=1, keepdims=True) + jnp.finfo(float).eps)
        if local:
            between = jax.lax.stop_gradient(between)
        return [jnp.mean(h**2, axis=1) for h in (first, unit(params, 2, between))]

    def cost(params, local=True):
        plus, minus = good(params, with_label(y), local), good(params, with_label(wrong), local)
        costs = [
            jax.nn.softplus(0.7 - p) + jax.nn.softplus(m - 0.7)
            for p, m in zip(plus, minus, strict=True)
        ]
        return sum(map(jnp.mean, costs))

    value, truth = jax.value_and_grad(cost)(params)
    grads, info = rule.gradient(state, params, x, y)
    assert relative(info.loss, value) < 1e-13
    assert_close(grads, truth)
    assert_close(
        rule.truth(state, params, x, y), jax.grad(functools.partial(cost, local=False))(params)
    )
    assert degrees(grads[0], rule.truth(state, params, x, y)[0]) > 1
    outputs = rule.outputs(state, params, x)
    assert outputs.shape == (8, 3)
    for label in range(3):
        assert_close(outputs[:, label], good(params, with_label(jnp.full(8, label)), True)[1])
    assert info.outputs is None
    assert_close(info.extra["positive"][1], jnp.mean(good(params, with_label(y), True)[1]))


# --- forward gradients -------------------------------------------------------------------------


def test_a_forward_gradient_of_weights_is_the_derivative_times_its_direction():
    net, params, x, y = problem("scanned")
    rule, state = started(credit.ForwardGradient("weights"), net, params)
    grads, _ = rule.gradient(state, params, x, y)
    truth, g = flat(backprop_grads(net, params, x, y)), flat(grads)
    # g = (truth . v) v, so that truth . g = (truth . v)^2 and |g| = |truth . v| |v|
    along = np.sqrt(truth @ g)
    v = g / along
    assert abs(abs(truth @ v) / along - 1) < 1e-12
    assert abs(np.sum(v**2) / len(v) - 1) < 0.3


def test_a_forward_gradient_of_activities_is_the_derivative_of_each_example_times_its_direction():
    net, params, x, y = problem("perceptron")
    rule, state = started(credit.ForwardGradient(), net, params)
    grads, info = rule.gradient(state, params, x, y)
    true = jb.deltas(jb.backprop(net, LOSS, params, x, y))
    size, along = 0, 0
    for path in true:  # delta = d u, d = sum <true, u>: <true, delta> = d <true, u>
        along += np.sum(true[path] * info.deltas[path], axis=1)
        size += np.sum(np.square(info.deltas[path]), axis=1)
    assert np.all(along > 0)  # = d^2
    u = np.concatenate([info.deltas[path] for path in true], axis=1) / np.sqrt(along)[:, None]
    assert abs(np.mean(u**2) - 1) < 0.4
    assert np.linalg.matrix_rank(u) == 4  # every example has a direction of its own
    assert_close(grads[0]["w"], x.T @ info.deltas["layers[0]"] / 4)
    assert_close(grads[4]["b"], np.mean(info.deltas["layers[4]"], axis=0))


@pytest.mark.parametrize("perturb", ["weights", "activities"])
@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_forward_gradients_are_the_gradient_on_average(perturb, name):
    net, params, x, y = problem(name)
    truth = flat(backprop_grads(net, params, x, y))
    rule, state = started(credit.ForwardGradient(perturb), net, params)

    @jax.jit
    def gap(key):
        one = dataclasses.replace(state, key=key)
        g = rule.gradient(one, params, x, y)[0]
        return jnp.concatenate([v.ravel() for v in jax.tree.leaves(g)])

    n = 4000
    drawn = jax.lax.map(gap, jax.random.split(jax.random.key(8), n))
    error = drawn - truth[None]
    spread = np.mean(np.sum(error**2, axis=1))
    # the mean of n has the variance of one over n
    assert np.sum(np.mean(error, axis=0) ** 2) < 1.6 * spread / n
    if perturb == "weights":  # E|g - truth|^2 = (number + 1) |truth|^2
        assert abs(spread / ((len(truth) + 1) * np.sum(truth**2)) - 1) < 0.2


@pytest.mark.parametrize("perturb", ["weights", "activities"])
def test_several_directions_are_averaged(perturb):
    net, params, x, y = problem("perceptron")
    rule, state = started(credit.ForwardGradient(perturb, draws=3), net, params)
    grads, info = rule.gradient(state, params, x, y)
    one = rule._of_weights if perturb == "weights" else rule._of_activities
    each = jax.jit(lambda key: one(state, params, x, y, None, key))
    three = [each(key) for key in jax.random.split(state.drawn, 3)]
    assert_close(grads, jax.tree.map(lambda *g: sum(g) / 3, *(t[0] for t in three)))
    deltas = [dict(t[1].deltas) for t in three]
    assert_close(dict(info.deltas), jax.tree.map(lambda *d: sum(d) / 3, *deltas))


@pytest.mark.parametrize("name", ["dropout", "branches", "frozen", "recurrent", "tokens"])
def test_forward_gradients_of_activities_through_other_nets(name):
    """On average the gradient, of the same draw as a forward sweep with the same key."""
    net, params, x, y = problem(name)
    key = jax.random.key(4) if name == "dropout" else None
    truth = flat(backprop_grads(net, params, x, y, key))
    rule, state = started(credit.ForwardGradient(), net, params)
    info = rule.gradient(state, params, x, y, key)[1]
    assert_same(info.outputs, jb.forward(net, params, x, key)[0])
    assert_same(rule.gradient(state, params, x, y)[1].outputs, jb.forward(net, params, x)[0])
    assert "layers[0].layer" not in info.deltas  # frozen

    @jax.jit
    def drawn(seed):
        g = rule.gradient(dataclasses.replace(state, key=seed), params, x, y, key)[0]
        return jnp.concatenate([v.ravel() for v in jax.tree.leaves(g)])

    n = 800
    errors = jax.lax.map(drawn, jax.random.split(jax.random.key(8), n)) - truth[None]
    mean, spread = np.mean(errors, axis=0), np.mean(np.sum(np.square(errors), axis=1))
    assert np.sum(np.square(mean)) < 1.7 * spread / n
    weights = jax.tree.leaves(jax.tree.map(lambda on, w: np.full(w.size, on), jb.trainable_mask(net, params), params))  # fmt: skip
    assert np.all(errors[:, ~np.concatenate(weights)] == 0)


def test_what_is_drawn_in_one_step_is_not_drawn_in_the_next():
    """Also not of another layer: the key of a step and that of the next state have nothing in common."""
    net, params, x, y = problem("perceptron")
    rule, state = started(credit.ForwardGradient(), net, params)
    seen = set()
    for _ in range(4):
        grads, info = rule.gradient(state, params, x, y)
        for delta in info.deltas.values():
            ratios = np.round(delta[:, 0] / delta[:, 1], 9)
            assert not seen & set(ratios.tolist())
            seen |= set(ratios.tolist())
        state = rule.update(state, params, grads, info)[1]
    keys = [state.drawn, state.next().key, state.next().drawn, state.key]
    keys += list(jax.random.split(state.drawn, 4))
    assert len({tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys}) == len(keys)


def test_frozen_weights_and_what_is_added_have_no_part():
    net, params, x, y = problem("frozen")
    rule, state = started(credit.KolenPollack(decay=0.1), net, params)
    grads, info = rule.gradient(state, params, x, y)
    updates, after = rule.update(state, params, jax.tree.map(jnp.zeros_like, grads), info)
    assert np.max(np.abs(flat(updates[0]))) == np.max(np.abs(flat(updates[3]))) == 0
    assert_same(after.learned[3], state.learned[3])
    assert_close(updates[4]["w"], -0.1 * params[4]["w"])
    assert state.learned[0] == {"w": None, "b": None}  # nothing before it learns
    assert state.learned[2] == {"w": None, "b": None}
    for name in ("tokens", "tied"):
        net, params, x, y = problem(name)
        carried = {path: own for path, _, own in walk(net, TrueWeights().carriers(net, params))}
        assert not [
            path
            for path, layer, _ in walk(net)
            if isinstance(layer, jb.Positions) and jax.tree.leaves(carried[path])
        ]
        tables = [
            jax.tree.leaves(carried[path])
            for path, layer, _ in walk(net)
            if isinstance(layer, jb.Embedding)
        ]
        assert [bool(table) for table in tables] == [name == "tied"] * len(tables)


def test_a_first_layer_that_carries_inside_has_feedback():
    net, params, *_ = problem("recurrent")
    _, state = started(credit.FeedbackAlignment(), net, params)
    assert state.learned[0]["w_h"].shape == params[0]["w_h"].shape
    inside = jb.Sequential(jb.Checkpoint(jb.Dense(6, 5)), jb.Dense(5, 3))
    _, state = started(credit.FeedbackAlignment(), inside, inside.init(jax.random.key(0)))
    assert state.learned[0] == {"w": None, "b": None}
