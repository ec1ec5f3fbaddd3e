"""Training with differential privacy: what is drawn, what is added, and what is reported."""

import subprocess
import sys

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld
from truth import assert_close, relative

import jbackprop as jb
from jbackprop import per_example as pe
from jbackprop.train import private as private_module

NET, LOSS = jb.mlp([4, 6, 3]), jb.SoftmaxCrossEntropy()
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((40, 4)), RNG.integers(0, 3, 40)


@pytest.fixture(autouse=True)
def optax_is_not_strict():
    with jax.numpy_dtype_promotion("standard"):
        yield


def fit(private, params=None, net=NET, **options):
    options = {"epochs": 2, "key": jax.random.key(1), "progress": False} | options
    optimizer = options.pop("optimizer", optax.sgd(0.3))
    params = net.init(jax.random.key(0)) if params is None else params
    return jb.fit(net, LOSS, params, (X, Y), optimizer, private=private, **options)


def test_without_noise_or_clipping_or_sampling_it_is_gradient_descent():
    metrics = {"accuracy": jb.metrics.accuracy}
    found = fit(jb.Private(1e6, noise_multiplier=0.0), epochs=3, metrics=metrics)
    due = fit(None, epochs=3, metrics=metrics)
    assert_close(found.params, due.params, 1e-9)
    assert found.history.keys() == due.history.keys()
    for name, values in due.history.items():
        np.testing.assert_allclose(found.history[name], values, rtol=1e-6)
    assert found.privacy == (np.inf, 1e-5, 0.0, 1.0, 3)
    assert due.privacy is None


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("places", [None, 5])
def test_a_step_follows_the_clipped_sum_of_those_drawn(monkeypatch, microbatch, places):
    """Also where more are drawn than there are places."""
    if places:
        monkeypatch.setattr(private_module, "_capacity", lambda size, n: places)
    drawn, seen = [], []
    padded = private_module._padded
    monkeypatch.setattr(
        private_module, "_padded", lambda batch, n: drawn.append(batch) or padded(batch, n)
    )

    def update(grads, state, params=None, **extra):
        assert not extra, "the cost is private"
        return jax.tree.map(jnp.zeros_like, grads), grads

    keep = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), update
    )
    params = NET.init(jax.random.key(0))
    private = jb.Private(0.4, noise_multiplier=0.0, microbatch=microbatch)
    result = fit(private, params, batch_size=8, epochs=1, optimizer=keep,
                 callbacks=[lambda epoch: seen.append(epoch.opt_state)])  # fmt: skip
    assert len(drawn) == 5  # of 8 expected examples each
    last = drawn[-1]
    bp = jb.backprop(NET, LOSS, params, jnp.asarray(X[last]), jnp.asarray(Y[last]))
    due = jax.tree.map(lambda g: g / 8, pe.clipped_gradient(bp, 0.4).gradient)
    assert_close(seen[0], due, 1e-9)
    whole = [jb.backprop(NET, LOSS, params, jnp.asarray(X[i]), jnp.asarray(Y[i])).losses
             for i in drawn]  # fmt: skip
    np.testing.assert_allclose(result.history["loss"], np.concatenate(whole).mean(), rtol=1e-6)


def test_each_example_is_drawn_by_itself(monkeypatch):
    drawn = []
    padded = private_module._padded
    monkeypatch.setattr(
        private_module, "_padded", lambda batch, n: drawn.append(batch) or padded(batch, n)
    )
    fit(jb.Private(1.0, noise_multiplier=1.0), batch_size=8, epochs=80)
    there = np.zeros((len(drawn), 40))
    for i, batch in enumerate(drawn):
        assert len(set(batch)) == len(batch)
        there[i, batch] = 1
    assert len(drawn) == 400
    assert abs(there.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / there.size)
    sizes = there.sum(1)  # binomial: no mini-batch of a fixed size
    assert abs(sizes.var() / (40 * 0.2 * 0.8) - 1) < 0.35
    assert np.all(np.abs(there.mean(0) - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 400))
    assert np.all(there.any(0))


def test_noise_is_new_in_each_step_and_of_the_size_that_is_accounted_for():
    seen = []

    def update(grads, state, params=None):
        return jax.tree.map(jnp.zeros_like, grads), grads

    keep = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    net = jb.mlp([4, 400, 3])
    result = fit(jb.Private(1e-6, noise_multiplier=7e6), net=net, batch_size=10, epochs=2,
                 optimizer=keep, callbacks=[lambda e: seen.append(e.opt_state)])  # fmt: skip
    one, two = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(g)]) for g in seen)
    for noise in (one, two):
        assert abs(noise.std() / (7.0 / 10) - 1) < 4 / np.sqrt(2 * noise.size)
    assert abs(np.corrcoef(one, two)[0, 1]) < 4 / np.sqrt(one.size)
    assert result.privacy.steps == 8


@pytest.mark.newest
def test_epsilon_is_that_of_dp_accounting():
    result = fit(jb.Private(1.0, noise_multiplier=1.3, delta=1e-4), batch_size=10, epochs=3)
    step = dp_accounting.PoissonSampledDpEvent(0.25, dp_accounting.GaussianDpEvent(1.3))
    accountant = pld.PLDAccountant().compose(dp_accounting.SelfComposedDpEvent(step, 12))
    assert result.privacy == (accountant.get_epsilon(1e-4), 1e-4, 1.3, 0.25, 12)
    assert result.privacy.after(12) == result.privacy.epsilon
    assert result.privacy.after(6) < result.privacy.epsilon < result.privacy.after(24)
    assert result.privacy.after(0) == 0
    little = result.privacy._replace(noise_multiplier=0.05).after(12)
    assert 100 < little < np.inf


@pytest.mark.newest
def test_noise_that_is_asked_for_by_epsilon():
    wanted = fit(jb.Private(1.0, epsilon=0.5), batch_size=10, epochs=2).privacy
    assert 0.499 < wanted.epsilon <= 0.5
    early = fit(jb.Private(1.0, epsilon=0.5), batch_size=10, epochs=2,
                callbacks=[lambda epoch: True]).privacy  # fmt: skip
    assert early.steps == 4
    assert early.epsilon < wanted.epsilon
    plenty = fit(jb.Private(1.0, epsilon=1e4), batch_size=10, epochs=1).privacy
    assert plenty.noise_multiplier == 0.3
    assert plenty.epsilon < 1e4
    with pytest.raises(ValueError, match=r"no noise makes 4 steps \(1e-12, 1e-30\)-private"):
        fit(jb.Private(1.0, epsilon=1e-12, delta=1e-30), batch_size=10, epochs=1)


def test_the_same_key_gives_the_same_and_another_another():
    options = {"batch_size": 10, "private": jb.Private(1.0, noise_multiplier=1.0)}
    one, two = fit(**options), fit(**options)
    assert_close(one.params, two.params, 0)
    other = fit(**options, key=jax.random.key(2))
    assert relative(other.params[0]["w"], one.params[0]["w"]) > 0.01


def test_layers_with_bounds_of_their_own_and_draws():
    net = jb.Sequential(jb.Dense(4, 6), jb.Dropout(0.5), jb.Tanh(), jb.Dense(6, 3))
    bounds = {"layers[0]": 3.0, "layers[3]": 4.0}
    private = jb.Private(bounds, noise_multiplier=0.01, scheme="per_layer")
    result = fit(private, net=net, batch_size=10)
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(result.params))
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), NET.init(jax.random.key(0)))
    result = fit(jb.Private(1.0, noise_multiplier=0.1), half, batch_size=10)
    assert {p.dtype for p in jax.tree.leaves(result.params)} == {jnp.dtype("bfloat16")}


def test_what_cannot_be_private_is_refused():
    for bad in ({}, {"epsilon": 1.0, "noise_multiplier": 1.0}):
        with pytest.raises(ValueError, match="either noise_multiplier or epsilon"):
            jb.Private(1.0, **bad)
    for name, value in (("noise_multiplier", -1.0), ("epsilon", 0.0), ("epsilon", np.inf)):
        with pytest.raises(ValueError, match=name):
            jb.Private(1.0, **{name: value})
    for bad in ({"delta": 0.0}, {"delta": 1.0}, {"scheme": "soft"}, {"microbatch": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            jb.Private(1.0, noise_multiplier=1.0, **bad)
    with pytest.raises(ValueError, match="max_norm"):
        jb.Private(0.0, noise_multiplier=1.0)
    private = jb.Private(1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="private data"):
        fit(private, early_stopping=jb.EarlyStopping(monitor="loss"))
    net = jb.Sequential(jb.Dense(4, 3), jb.BatchNorm(3))
    with pytest.raises(ValueError, match=r"layers\[1\] .*BatchNorm.* couples the examples"):
        fit(private, net=net)
    with pytest.raises(TypeError, match=r"cost, which is of the private data.*value"):
        fit(private, optimizer=optax.lbfgs())
    with pytest.raises(ValueError, match="cannot be called 'validation_a'"):
        fit(private, metrics={"validation_a": jb.metrics.accuracy},
            early_stopping=jb.EarlyStopping(monitor="validation_a"))  # fmt: skip


def test_a_step_is_counted_before_it_is_done(monkeypatch):
    step = private_module._step
    calls = []

    def interrupted(*args):
        found = step(*args)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(private_module, "_step", interrupted)
    result = fit(jb.Private(1.0, noise_multiplier=1.0), batch_size=8)
    assert (result.stopped, result.privacy.steps) == ("interrupted", 3)


@pytest.mark.newest
def test_without_dp_accounting_it_says_what_to_install():
    program = """
import sys
sys.modules["dp_accounting"] = None
import jax, jax.numpy as jnp, optax, jbackprop as jb
net, x = jb.Dense(2, 2), jnp.ones((4, 2))
try:
    jb.fit(net, jb.SquaredError(), net.init(jax.random.key(0)), (x, x), optax.sgd(0.1), epochs=1,
           key=jax.random.key(0), private=jb.Private(1.0, noise_multiplier=1.0))
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'jbackprop[private]'" in found.stdout, found.stderr
