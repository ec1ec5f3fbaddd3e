"""Training: what is learnt, what is reported, and what happens when something goes wrong."""

import io
import os
import pickle
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_iris
from truth import assert_close, mean_cost, relative

import jbackprop as jb
from jbackprop.train import checks, placement, progress, run, step

NET = jb.mlp([4, 8, 3])
LOSS = jb.SoftmaxCrossEntropy()
IRIS = load_iris()
X, Y = (IRIS.data - IRIS.data.mean(0)) / IRIS.data.std(0), IRIS.target


@pytest.fixture(autouse=True)
def optax_is_not_strict():
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def params(key):
    return NET.init(key)


def fit(params, optimizer=None, x=X, y=Y, **options):
    options = {"epochs": 3, "key": jax.random.key(1), "progress": False} | options
    return jb.fit(NET, LOSS, params, (x, y), optimizer or optax.sgd(0.3), **options)


def test_batch_gradient_descent_is_what_it_says(params):
    result = fit(params, epochs=4)
    p, losses = params, []
    for _ in range(4):
        value, grads = jax.value_and_grad(
            lambda p: mean_cost(NET, LOSS, p, jnp.asarray(X), jnp.asarray(Y))
        )(p)
        p = jax.tree.map(lambda w, g: w - 0.3 * g, p, grads)
        losses.append(float(value))
    assert_close(result.params, p, 1e-12)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-13)
    assert result.stopped == "finished"
    assert result.best_epoch is None


@pytest.mark.parametrize(
    ("batch_size", "steps"), [(None, 1), (1, 150), (32, 5), (150, 1), (149, 2)]
)
def test_every_example_takes_part_once_in_each_epoch(params, batch_size, steps):
    """Seen through an optimizer that counts, and a loss of which each example has its own."""
    seen = []

    def update(grads, state, params=None, **extra):
        return jax.tree.map(jnp.zeros_like, grads), state + 1

    count = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)
    result = fit(
        params, count, epochs=2, batch_size=batch_size,
        callbacks=[lambda epoch: seen.append(int(epoch.opt_state))],
    )  # fmt: skip
    assert seen == [steps, 2 * steps]
    whole = float(mean_cost(NET, LOSS, params, jnp.asarray(X), jnp.asarray(Y)))
    np.testing.assert_allclose(result.history["loss"], [whole, whole], rtol=1e-12)


def test_the_order_is_new_in_each_epoch_and_the_ragged_batch_follows_its_own_mean(params):
    orders = []

    class Remember(jb.SoftmaxCrossEntropy):
        def value(self, z, y):
            jax.debug.callback(lambda y: orders.append(np.asarray(y)), y, ordered=True)
            return super().value(z, y)

        def value_and_delta(self, z, y):
            return self.value(z, y), self.delta(z, y)

    net = jb.mlp([1, 2, 20])
    x, y = np.linspace(-1, 1, 20)[:, None], np.arange(20)
    start = net.init(jax.random.key(4))
    result = jb.fit(
        net, Remember(), start, (x, y), optax.sgd(0.1),
        epochs=2, batch_size=8, key=jax.random.key(2), progress=False,
    )  # fmt: skip
    jax.effects_barrier()
    assert [len(order) for order in orders] == [8, 8, 4, 8, 8, 4]
    first, second = np.concatenate(orders[:3]), np.concatenate(orders[3:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)
    assert list(first) != list(range(20))
    p = start
    for batch in orders:
        cost = lambda p, b=batch: mean_cost(net, LOSS, p, jnp.asarray(x[b]), jnp.asarray(y[b]))  # noqa: E731
        p = jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(cost)(p))
    assert_close(result.params, p, 1e-11)


def test_the_same_key_gives_the_same_bits(params):
    one, two = (fit(params, optax.adam(0.01), batch_size=16) for _ in range(2))
    assert one.history == two.history
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)
    other = fit(params, optax.adam(0.01), batch_size=16, key=jax.random.key(9))
    assert other.history != one.history


def test_it_learns_and_says_so(params):
    result = fit(
        params, optax.adam(0.02), epochs=40, batch_size=16,
        x=X[::2], y=Y[::2], validation=(X[1::2], Y[1::2]), metrics={"accuracy": jb.metrics.accuracy},
    )  # fmt: skip
    assert list(result.history) == ["loss", "accuracy", "validation_loss", "validation_accuracy"]
    assert all(len(values) == 40 for values in result.history.values())
    found = jb.evaluate(
        NET, LOSS, result.params, (X[1::2], Y[1::2]), {"accuracy": jb.metrics.accuracy}
    )
    assert found["loss"] == result.history["validation_loss"][-1]
    p = np.asarray(jb.predict(NET, LOSS, result.params, jnp.asarray(X[1::2])))
    assert found["accuracy"] == pytest.approx((p.argmax(1) == Y[1::2]).mean(), abs=1e-7)
    assert found["accuracy"] > 0.93
    assert relative(p.sum(1), np.ones(75)) < 1e-12


def test_early_stopping_goes_back_to_the_best(params):
    kept = {}
    result = fit(
        params, optax.sgd(3.0), epochs=60, batch_size=10,
        x=X[:30], y=(np.arange(30) * 7) % 3, validation=(X[30:60], (np.arange(30) * 5) % 3),
        early_stopping=jb.EarlyStopping(patience=4),
        callbacks=[lambda epoch: kept.update({epoch.number: epoch.params})],
    )  # fmt: skip
    losses = result.history["validation_loss"]
    best = int(np.argmin(losses)) + 1
    assert result.stopped == "early"
    assert result.best_epoch == best
    assert len(losses) == best + 4
    assert_close(result.params, kept[best], 0)


def test_early_stopping_upwards_and_min_delta():
    up = jb.EarlyStopping(monitor="a", higher_is_better=True, min_delta=0.1)
    assert up.better(0.5, None)
    assert up.better(0.65, 0.5)
    assert not up.better(0.55, 0.5)
    assert not up.better(float("nan"), 0.5)
    assert not jb.EarlyStopping().better(1.0, 0.5)


def test_a_callback_stops(params):
    result = fit(params, epochs=9, callbacks=[lambda epoch: epoch.number == 2])
    assert result.stopped == "callback"
    assert len(result.history["loss"]) == 2


def test_a_learning_rate_too_high_stops_and_says_where_it_began(key):
    net, loss = jb.mlp([4, 3, 1], jb.Identity()), jb.SquaredError()
    data = X, Y.reshape(-1, 1).astype(float)
    options = {"epochs": 500, "batch_size": 50, "key": key, "progress": False}
    with pytest.raises(jb.NonFiniteError, match=r"at step \d+; it began in") as caught:
        jb.fit(net, loss, net.init(key), data, optax.sgd(1e3), **options)
    error = caught.value
    assert error.step >= 2
    assert str(error.step) in str(error)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(error.params))
    assert jb.diagnose.first_nonfinite(net, loss, net.init(key), *map(jnp.asarray, data)) is None


def log_unit():
    """log z: NaN for a negative net input, in the layer where it stands."""
    return jb.Activation(jnp.log, lambda z: 1 / z)


def test_the_layer_where_nan_began_is_named(key):
    net = jb.Sequential(jb.Dense(4, 5), jb.Tanh(), log_unit(), jb.Dense(5, 3))
    with pytest.raises(
        jb.NonFiniteError, match=r"step 1; it began in the output of layers\[2\]"
    ) as caught:
        jb.fit(net, LOSS, net.init(key), (X, Y), optax.sgd(0.1), epochs=1, key=key, progress=False)
    assert caught.value.step == 1


def test_the_delta_where_nan_began_is_named(key):
    """f is finite everywhere, f' is not: |z|^(1/2) at 0."""
    root = jb.Activation(lambda z: jnp.sqrt(jnp.abs(z)), lambda z: 0.5 * z / jnp.abs(z) ** 1.5)
    net = jb.Sequential(jb.Dense(4, 5), root, jb.Dense(5, 3))
    where = r"the delta of layers\[0\] \(Dense\(4, 5\)\), while all outputs are finite"
    with pytest.raises(jb.NonFiniteError, match=where):
        jb.fit(
            net, LOSS, net.init(key), (0 * X, Y), optax.sgd(0.1), epochs=1, key=key, progress=False
        )


def test_nan_after_many_steps_is_found_at_its_step(key):
    """1,000 steps with a look at every 200th: the step is still exact."""

    def update(grads, state, params=None, **extra):
        bad = jnp.where(state == 500, jnp.nan, 0.0)
        return jax.tree.map(lambda g: 0 * g + bad, grads), state + 1

    poisoned = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)
    with pytest.raises(jb.NonFiniteError, match="at step 501; it began in the optimizer's update"):
        fit(NET.init(key), poisoned, epochs=10, batch_size=2)


def test_ctrl_c_returns_what_was_learnt(params):
    def interrupt(epoch):
        if epoch.number == 3:
            raise KeyboardInterrupt

    result = fit(params, epochs=50, callbacks=[interrupt])
    assert result.stopped == "interrupted"
    assert len(result.history["loss"]) == 3
    assert_close(result.params, fit(params, epochs=3).params, 0)


def test_a_real_sigint_in_the_middle_of_an_epoch(params):
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # some shells turn it off
    try:
        timer.start()
        result = fit(params, epochs=10**6, batch_size=10)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.stopped == "interrupted"
    assert time.monotonic() - start < 60
    assert result.history["loss"][-1] < 1.0


def test_ctrl_c_never_returns_parameters_that_are_not_finite(params):
    """Interrupted after NaN came up, but before anybody looked."""

    def update(grads, state, params=None, **extra):
        return jax.tree.map(lambda g: g * jnp.where(state == 1, jnp.nan, 1.0), grads), state + 1

    poisoned = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)
    task = step.Task(NET, LOSS, poisoned, ())
    place = placement.Placement(NET, params, None, None)
    data = checks.check_data("data", checks.Fitting(NET, LOSS, params), (X, Y))
    state = run.Run(task, params, data, 50, jax.random.key(0), place)
    for batch in state._feed.batches(1):
        state._go(batch, {})
    assert not np.isfinite(state.params[0]["w"]).any()
    state.settle()
    assert_close(state.params, params, 0)


def test_a_callback_may_answer_with_numpys_true(params):
    result = fit(params, epochs=9, callbacks=[lambda epoch: np.bool_(epoch.number == 2)])
    assert (result.stopped, len(result.history["loss"])) == ("callback", 2)


def test_numpys_integers_are_integers(params):
    result = fit(params, epochs=np.int64(2), batch_size=np.int32(50))
    assert len(result.history["loss"]) == 2
    assert jb.mlp(np.array([4, 8, 3])) == NET


def test_one_compilation_for_equal_calls(params):
    compiled = step.step
    optimizer = optax.sgd(0.123)
    before = compiled._cache_size()
    for _ in range(3):
        fit(params, optimizer, batch_size=50)
    assert compiled._cache_size() == before + 1


def test_the_error_pickles():
    error = jb.NonFiniteError("what", 3, "where", (np.ones(2),), {"loss": [1.0]})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.step, again.place) == ("what", 3, "where")


def test_a_network_without_parameters(key):
    result = jb.fit(
        jb.Tanh(), jb.SquaredError(), (), (X, X), optax.sgd(0.1), epochs=2, key=key, progress=False
    )
    assert len(result.history["loss"]) == 2


def test_params_and_data_are_left_as_they_are(params):
    before = jax.tree.map(lambda p: np.array(p), params)
    x = X.copy()
    fit(params, x=x)
    assert_close(params, before, 0)
    np.testing.assert_array_equal(x, X)


def test_lists_are_arrays(params):
    assert_close(fit(params, x=X.tolist(), y=Y.tolist()).params, fit(params).params, 0)


def test_float32_parameters_stay_float32(params):
    single = jax.tree.map(lambda p: p.astype("float32"), params)
    result = fit(single, batch_size=16, x=X.astype("float64"))
    assert {leaf.dtype for leaf in jax.tree.leaves(result.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.contrib.reduce_on_plateau()])
def test_optimizers_that_want_more_than_the_gradient(params, optimizer):
    chain = optimizer if optimizer is not None else None
    if "Plateau" in str(type(optimizer.init(params))):
        chain = optax.chain(optax.sgd(0.1), optimizer)
    result = fit(params, chain, epochs=15)
    assert result.history["loss"][-1] < result.history["loss"][0]


def test_progress_in_a_log_file_is_a_few_lines(params, capsys):
    fit(params, epochs=100, progress=None)
    lines = capsys.readouterr().err.splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("epoch 1/100 (")
    assert lines[-1].startswith("epoch 100/100 (")
    assert "loss" in lines[-1]
    assert "\r" not in "".join(lines)


def test_progress_is_a_bar_where_someone_watches(params, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    bar = progress.Progress(3, None)
    bar._bar.fp = terminal
    bar.epoch(1, {"loss": 0.5})
    bar.close()
    assert bar._lines is False


def test_progress_can_be_off(params, capsys):
    fit(params, progress=False)
    assert capsys.readouterr().err == ""


def test_metrics():
    with jax.numpy_dtype_promotion("strict"):
        check_metrics()


def check_metrics():
    z = jnp.asarray([[1.0, 2.0], [3.0, -1.0]])
    np.testing.assert_array_equal(jb.metrics.accuracy(z, jnp.asarray([1, 1])), [1, 0])
    hot = jnp.asarray([[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(jb.metrics.accuracy(z, hot), [1, 0])
    np.testing.assert_array_equal(jb.metrics.binary_accuracy(z, hot), [0.5, 0])
    np.testing.assert_array_equal(jb.metrics.absolute_error(z, hot), [1.0, 2.5])


def test_metrics_may_be_truth_values(params):
    """Whether each is right is 0 or 1, also where the mean is one of clipped, weighted examples."""
    as_bools = {"right": lambda z, y: jnp.argmax(z, 1) == y}
    found = fit(params, batch_size=32, metrics=as_bools, validation=(X, Y))
    numbers = fit(params, batch_size=32, metrics={"right": jb.metrics.accuracy}, validation=(X, Y))
    assert found.history == numbers.history
    private = jb.Private(1.0, noise_multiplier=1.0)
    assert (
        0 < fit(params, batch_size=32, metrics=as_bools, private=private).history["right"][-1] < 1
    )


def test_metrics_are_added_up_in_float32_at_least(params):
    """In bfloat16 a sum over a hundred examples would be of three digits."""
    small = jax.tree.map(lambda p: p.astype("bfloat16"), params)
    found = jb.evaluate(NET, LOSS, small, (X, Y), {"a": lambda z, y: z[:, 0]})["a"]
    z = np.asarray(jb.forward(NET, small, jnp.asarray(X, "bfloat16"))[0][:, 0], np.float64)
    assert found == pytest.approx(z.mean(), rel=1e-5)


@pytest.mark.parametrize("state", [3, jb.credit.KolenPollack()])
def test_what_is_no_state_of_a_rule_is_refused(params, state):
    with pytest.raises(TypeError, match="rule_state must be a state"):
        jb.evaluate(NET, LOSS, params, (X, Y), rule_state=state)
