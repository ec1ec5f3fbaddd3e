"""Recurrent layers against PyTorch, and against loops that are written out here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from single import answers
from truth import assert_close, relative

import jbackprop as jb
from jbackprop import sweep
from jbackprop.layers.recurrent import carried

pytestmark = pytest.mark.newest
TORCH = Path(__file__).parent / "torch_truth" / "recurrent.npz"


def swept(layer, params, x, delta, collect=sweep.total, transport=None):
    """(y, dC/dx, what is collected) for the cost <delta, y>."""
    y, saved = jb.forward(layer, params, x)
    trace = layer.trace(x, y, saved)
    return y, *jb.backward(layer, params, trace, delta, collect, transport)


def one_step(name, p, state, x):
    """The next state, from the textbook; every gate has a matrix of its own."""
    h = state[0]
    q = len(h)

    def part(k):
        cols = slice(k * q, (k + 1) * q)
        return x @ p["w_x"][:, cols] + p["b"][cols], h @ p["w_h"][:, cols]

    if name == "RNN":
        return (jnp.tanh(sum(part(0))),)
    if name == "GRU":
        r, u = (1 / (1 + jnp.exp(-sum(part(k)))) for k in (0, 1))
        a, b = part(2)
        n = jnp.tanh(a + r * (b + p["b_h"]))
        return ((1 - u) * n + u * h,)
    i, f, o = (1 / (1 + jnp.exp(-sum(part(k)))) for k in (0, 1, 3))
    c = f * state[1] + i * jnp.tanh(sum(part(2)))
    return o * jnp.tanh(c), c


def plain(layer, params, x, state=None):
    """The layer as a Python loop over one example: all hidden states, and the last state."""
    name = type(layer).__name__
    state = state or (jnp.zeros(layer.q),) * (2 if name == "LSTM" else 1)
    ys = [None] * len(x)
    order = range(len(x))[::-1] if layer.reverse else range(len(x))
    for count, t in enumerate(order):
        if layer.truncate and count and count % layer.truncate == 0:
            state = jax.tree.map(lax.stop_gradient, state)
        state = one_step(name, params, state, x[t])
        ys[t] = state[0]
    return jnp.stack(ys), state


def case(layer, steps, batch=2, seed=0):
    k = jax.random.split(jax.random.key(seed), 4)
    params = jax.tree.map(lambda v: v + 0.3 * jax.random.normal(k[3], v.shape), layer.init(k[0]))
    x = jax.random.normal(k[1], (batch, steps, layer.p))
    return params, x, jax.random.normal(k[2], (batch, steps, layer.q))


def truths(layer, params, x, u):
    """y, dC/dx, and the gradient of every example, by autodiff of the loop."""

    def cost(params, x, u):
        return jnp.sum(u * plain(layer, params, x)[0])

    @jax.jit
    def all_of_them(params, x, u):
        y = jax.vmap(lambda x: plain(layer, params, x)[0])(x)
        grads, delta_x = jax.jit(jax.vmap(jax.grad(cost, (0, 1)), (None, 0, 0)))(params, x, u)
        return y, delta_x, grads

    return all_of_them(params, x, u)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", [jb.RNN, jb.LSTM, jb.GRU])
def test_agrees_with_pytorch(kind, reverse):
    start = kind.__name__ + (".reverse" if reverse else "") + "/"
    saved = np.load(TORCH)
    of = {k.removeprefix(start): jnp.asarray(saved[k]) for k in saved.files if k.startswith(start)}
    params, grads = (
        {k.removeprefix(what): v for k, v in of.items() if k.startswith(what)}
        for what in ("params.", "grads.")
    )
    layer = kind(of["x"].shape[2], of["y"].shape[2], reverse=reverse)
    y, delta_x, found = swept(layer, params, of["x"], of["u"])
    assert relative(y, of["y"]) <= 1e-12
    assert relative(delta_x, of["delta_x"]) <= 1e-12
    assert_close(found, grads)


LAYERS = [
    (jb.RNN(3, 4), 5), (jb.RNN(1, 1, reverse=True), 1), (jb.RNN(2, 3, truncate=2), 5),
    (jb.LSTM(3, 4), 5), (jb.LSTM(2, 1), 1), (jb.LSTM(1, 2, reverse=True, truncate=3), 7),
    (jb.LSTM(2, 3, truncate=1), 3), (jb.GRU(3, 4), 5), (jb.GRU(2, 1, reverse=True), 3),
    (jb.GRU(2, 3, truncate=2), 4),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "steps"), LAYERS, ids=str)
def test_agrees_with_a_loop(layer, steps):
    params, x, u = case(layer, steps)
    weights = jnp.asarray([2.0, -0.5])

    @jax.jit
    def ours(params, x, u):
        y, delta_x, pairs = swept(layer, params, x, u, sweep.keep)
        return y, delta_x, {name: answers(pair, weights) for name, pair in pairs.items()}

    y, delta_x, answered = ours(params, x, u)
    true_y, true_delta_x, each = truths(layer, params, x, u)
    assert relative(y, true_y) <= 1e-12
    assert relative(delta_x, true_delta_x) <= 1e-12
    for name, (found, total, weighted, squares, *_) in answered.items():
        g = each[name]
        if steps == 1 and name == "w_h":
            assert not np.any(total)
            continue
        assert relative(found, g) <= 1e-12, name
        assert relative(weighted, jnp.einsum("n,n...->...", weights, g)) <= 1e-12, name
        assert relative(squares, (g.reshape(2, -1) ** 2).sum(1)) <= 1e-12, name


def test_autodiff_of_the_truncated_forward_is_truncated_too():
    layer = jb.LSTM(2, 3, truncate=2)
    params, x, u = case(layer, 5)
    auto = jax.jit(jax.grad(lambda p: jnp.sum(u * jb.forward(layer, p, x)[0])))(params)
    assert_close(swept(layer, params, x, u)[2], auto)
    whole = jb.LSTM(2, 3)
    np.testing.assert_array_equal(jb.forward(layer, params, x)[0], jb.forward(whole, params, x)[0])
    assert relative(swept(whole, params, x, u)[2]["w_h"], auto["w_h"]) > 1e-3


def test_a_truncated_delta_reaches_back_to_the_start_of_its_piece():
    layer = jb.GRU(2, 3, truncate=3)
    params, x, u = case(layer, 8)
    u = u.at[:, :7].set(0)  # only the last step, number 7, of the piece 6, 7
    delta = swept(layer, params, x, u, sweep.keep)[2]["b"].delta
    norms = np.linalg.norm(delta[:, 0], axis=-1)
    assert np.all(norms[:, :6] == 0)
    assert np.all(norms[:, 6:] > 0)


@pytest.mark.parametrize("kind", [jb.RNN, jb.LSTM, jb.GRU])
def test_pieces_that_hand_on_their_states_are_the_whole(kind):
    whole, piece = kind(2, 3), kind(2, 3, states=True)
    params, x, u = case(whole, 7)
    y, delta_x, grads = swept(whole, params, x, u)
    zeros = jax.tree.map(lambda s: jnp.zeros((2, *s.shape)), whole.zero_state(x.dtype))
    first = (x[:, :4], zeros)
    (y1, state), saved1 = jb.forward(piece, params, first)
    second = (x[:, 4:], state)
    (y2, _), saved2 = jb.forward(piece, params, second)
    assert relative(jnp.concatenate([y1, y2], 1), y) <= 1e-14
    d2, g2 = jb.backward(
        piece, params, piece.trace(second, None, saved2), (u[:, 4:], zeros), sweep.total
    )
    d1, g1 = jb.backward(
        piece, params, piece.trace(first, None, saved1), (u[:, :4], d2[1]), sweep.total
    )
    assert relative(jnp.concatenate([d1[0], d2[0]], 1), delta_x) <= 1e-12
    assert_close(jax.tree.map(jnp.add, g1, g2), grads)


@pytest.mark.parametrize(("reverse", "truncate"), [(False, None), (True, None), (False, 2)])
def test_a_first_state_is_differentiated(reverse, truncate):
    layer = jb.LSTM(2, 3, states=True, reverse=reverse, truncate=truncate)
    params, x, u = case(layer, 3)
    k = jax.random.split(jax.random.key(5), 4)
    h, c, u_h, u_c = (jax.random.normal(key, (2, 3)) for key in k)

    def cost(params, x, state):
        y, (last_h, last_c) = jax.vmap(lambda x, s: plain(layer, params, x, s))(x, state)
        return jnp.sum(u * y) + jnp.sum(u_h * last_h) + jnp.sum(u_c * last_c)

    grads, *back = jax.jit(jax.grad(cost, (0, 1, 2)))(params, x, (h, c))
    (y, _), delta_x, found = swept(layer, params, (x, (h, c)), (u, (u_h, u_c)))
    assert y.shape == (2, 3, 3)
    assert_close(found, grads)
    assert_close(delta_x, tuple(back))


@pytest.mark.parametrize("kind", [jb.RNN, jb.LSTM, jb.GRU])
def test_transport_carries_the_deltas_through_time(kind):
    """With feedback weights B: the pairs are those of a loop whose states come back through B."""
    layer = kind(2, 3)
    params, x, u = case(layer, 4)
    feedback = jax.tree.map(lambda v: jax.random.normal(jax.random.key(9), v.shape), params)

    @jax.custom_vjp
    def dot(a, w, b):
        return a @ w

    dot.defvjp(
        lambda a, w, b: (a @ w, (a, b)),
        lambda res, d: (d @ res[1].T, jnp.outer(res[0], d), jnp.zeros_like(res[1])),
    )

    class Fed:
        def __init__(self, w, b):
            self.w, self.b = w, b

        def __rmatmul__(self, a):
            return dot(a, self.w, self.b)

        def __getitem__(self, at):
            return Fed(self.w[at], self.b[at])

    def cost(params, x):
        fed = params | {k: Fed(params[k], feedback[k]) for k in ("w_x", "w_h")}
        return jnp.sum(u * jax.vmap(lambda x: plain(layer, fed, x)[0])(x))

    grads, true_delta_x = jax.jit(jax.grad(cost, (0, 1)))(params, x)
    _, delta_x, found = swept(layer, params, x, u, transport=feedback)
    assert relative(delta_x, true_delta_x) <= 1e-12
    assert_close(found, grads)


def test_what_crosses_in_half_precision_keeps_its_dtype():
    layer = jb.GRU(2, 3, states=True)
    params, x, u = case(layer, 4)
    h = jax.random.normal(jax.random.key(5), (2, 3))
    args = params, (x, h), (u, h)
    truth = swept(layer, *args)
    half = jax.tree.map(lambda v: v.astype("bfloat16"), args)
    mixed = half[0], half[1], jax.tree.map(lambda v: v.astype("float32"), half[2])
    wide = jax.tree.map(lambda v: v.astype("float32"), half[0])
    with jax.numpy_dtype_promotion("standard"):
        found = [swept(layer, *half), swept(layer, wide, *mixed[1:], transport=half[0])]
    for each in found:
        y, delta_x, grads = jax.tree.map(lambda v: v.astype("float64"), each)
        assert {v.dtype for v in jax.tree.leaves(each[1])} == {jnp.dtype("bfloat16")}
        assert_close((y, delta_x, grads), truth, 0.05)
    assert {v.dtype for v in jax.tree.leaves(found[1][0])} == {jnp.dtype("float32")}
    swept(layer, *half)  # strictly, without any promotion


def test_a_delta_keeps_its_dtype_whatever_transport_carries_it():
    delta, w = jnp.ones(4, "float32"), jnp.ones((3, 4), "float64")
    assert carried(delta, w).dtype == jnp.dtype("float32")


def test_bidirectional_runs_both_ways():
    net = jb.bidirectional(jb.GRU(2, 3))
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 2))
    there, back = params[0]
    y = jb.forward(net, params, x)[0]
    assert relative(y[..., :3], jb.forward(jb.GRU(2, 3), there, x)[0]) == 0
    flipped = jb.forward(jb.GRU(2, 3), back, x[:, ::-1])[0]
    assert relative(y[..., 3:], flipped[:, ::-1]) <= 1e-15
    ends = jb.bidirectional(jb.GRU(2, 3), last=True)
    params = (((there, ()), (back, ())), ())
    np.testing.assert_array_equal(
        jb.forward(ends, params, x)[0], jnp.concatenate([y[:, -1, :3], y[:, 0, 3:]], 1)
    )


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (2, 2)),
        ({"last": False}, (2, 5, 2)),
        ({"depth": 2, "bidirectional": True}, (2, 2)),
        ({"vocab": 7, "inputs": None}, (2, 2)),
    ],
)
def test_a_ready_lstm(options, shape):
    net = jb.lstm(**{"inputs": 3, "hidden": 4, "outputs": 2} | options)
    params = net.init(jax.random.key(0))
    x = jnp.arange(10).reshape(2, 5) % 7 if "vocab" in options else jnp.ones((2, 5, 3))
    y = jnp.ones(shape)

    def cost(p):
        return jnp.mean(jb.SquaredError().value(jb.forward(net, p, x)[0], y))

    assert jb.forward(net, params, x)[0].shape == shape
    found = jb.value_and_grad(net, jb.SquaredError())(params, x, y)[1]
    assert_close(found, jax.jit(jax.grad(cost))(params))


def test_what_init_makes():
    params = jb.LSTM(3, 4).init(jax.random.key(0))
    np.testing.assert_array_equal(params["b"], np.repeat([0.0, 1.0, 0.0, 0.0], 4))
    assert not np.any(jb.LSTM(3, 4, forget_bias=0.0).init(jax.random.key(0))["b"])
    for block in jnp.split(params["w_h"], 4, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(4), atol=1e-12)
    bound = np.sqrt(6 / (3 + 4))  # Glorot's for one gate, not for the four side by side
    assert 0.8 * bound < np.abs(params["w_x"]).max() <= bound


def test_bad_calls_name_the_fix():
    lstm = jb.LSTM(3, 4)
    params = lstm.init(jax.random.key(0))
    with pytest.raises(ValueError, match="truncate must be an int of at least 1"):
        jb.LSTM(3, 4, truncate=0)
    with pytest.raises(ValueError, match="q must be an int"):
        jb.GRU(3, 0)
    with pytest.raises(TypeError, match="elementwise activation"):
        jb.RNN(3, 4, activation=jb.Softmax())
    with pytest.raises(ValueError, match=r"a sequence \(T, 3\).*x\[None\]"):
        jb.forward(lstm, params, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match="at least one step"):
        jb.forward(lstm, params, jnp.ones((2, 0, 3)))
    with pytest.raises(ValueError, match="set states=True"):
        jb.forward(lstm, params, (jnp.ones((2, 5, 3)), jnp.ones((2, 4))))
    stateful = jb.LSTM(3, 4, states=True)
    with pytest.raises(ValueError, match=r"\(sequence, first state\)"):
        jb.forward(stateful, params, jnp.ones((2, 5, 3)))
    with pytest.raises(ValueError, match="first state like"):
        jb.forward(stateful, params, (jnp.ones((2, 5, 3)), jnp.ones((2, 4))))
    with pytest.raises(ValueError, match="not the parameters of"):
        jb.forward(jb.GRU(3, 4), params, jnp.ones((2, 5, 3)))
    with pytest.raises(TypeError, match="recurrent layer such as"):
        jb.bidirectional(jb.Dense(3, 4))
    with pytest.raises(ValueError, match="leave states out"):
        jb.bidirectional(stateful)
    with pytest.raises(ValueError, match="give inputs"):
        jb.lstm()
    with pytest.raises(ValueError, match="depth must be"):
        jb.lstm(3, depth=0)
    assert repr(jb.LSTM(3, 4, reverse=True)) == "LSTM(3, 4, reverse=True)"
