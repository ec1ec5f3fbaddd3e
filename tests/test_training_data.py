"""Where training takes its examples from: arrays, memory maps, loaders, and all of them ahead."""

import threading
import time

import jax
import numpy as np
import optax
import pytest

import jbackprop as jb
from jbackprop.train.data import ahead

pytestmark = pytest.mark.newest

NET = jb.mlp([4, 8, 3])
LOSS = jb.SoftmaxCrossEntropy()
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(75, 4)), RNG.integers(0, 3, 75)
SGD = optax.sgd(0.3)


@pytest.fixture(autouse=True)
def optax_is_not_strict():
    with jax.numpy_dtype_promotion("standard"):
        yield


def fit(data=(X, Y), net=NET, **options):
    usual = {"epochs": 2, "key": jax.random.key(1), "progress": False}
    usual["batch_size"] = 10 if isinstance(data, tuple) else None
    params = net.init(jax.random.key(0))
    return jb.fit(net, LOSS, params, data, SGD, **(usual | options))


def assert_same(one, two):
    assert one.history == two.history
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_array_equal(a, b)


def mapped(folder, values, name):
    path = folder / f"{name}.npy"
    np.save(path, values)
    return np.load(path, mmap_mode="r")


@pytest.mark.parametrize("batch_size", [1, 10, 75, None])
def test_memory_maps_give_the_bits_of_arrays(batch_size, tmp_path):
    data = mapped(tmp_path, X, "x"), mapped(tmp_path, Y, "y")
    held_out = {"validation": data, "batch_size": batch_size, "epochs": 1 if batch_size == 1 else 2}
    assert_same(fit(data, **held_out), fit(**(held_out | {"validation": (X, Y)})))


def test_of_a_memory_map_only_what_is_due_is_read(tmp_path, monkeypatch):
    """A sparse file of 80 GB, of which the first step takes ten rows."""
    shape = (10**7, 1000)
    x = np.memmap(tmp_path / "x", np.float64, "w+", shape=shape)
    y = np.memmap(tmp_path / "y", np.int64, "w+", shape=shape[:1])
    net, params = jb.Dense(1000, 3), jb.Dense(1000, 3).init(jax.random.key(0))
    done = []

    class EnoughError(Exception):
        pass

    def advance(self, params, opt_state, batch):
        done.append(jax.tree.map(np.shape, (batch.x, batch.y)))
        raise EnoughError

    monkeypatch.setattr(jb.train.run.Run, "_advance", advance)
    monkeypatch.setattr(jax.random, "permutation", lambda key, n: np.arange(n)[::-1][:100])
    with pytest.raises(EnoughError):
        jb.fit(net, LOSS, params, (x, y), SGD, epochs=1, batch_size=10, key=jax.random.key(0), progress=False)  # fmt: skip
    assert done == [((10, 1000), (10,))]


def test_a_memory_map_is_checked_where_it_is_read(tmp_path):
    bad = X.copy()
    bad[40, 2] = np.inf
    with pytest.raises(
        ValueError, match=r"data, of the examples \[.*: x\[\d, 2\] is inf; 1 of 40 values"
    ):
        fit((mapped(tmp_path, bad, "x"), mapped(tmp_path, Y, "y")))
    labels = Y.copy()
    labels[40] = 3
    with pytest.raises(ValueError, match=r"y\[\d\] is 3; 1 of 10"):
        fit((mapped(tmp_path, X, "x"), mapped(tmp_path, labels, "y")))
    with pytest.raises(ValueError, match=r"Dense\(4, 8\) needs 4 features"):
        fit((mapped(tmp_path, X[:, :3], "x"), mapped(tmp_path, Y, "y")))
    single = jax.tree.map(lambda p: p.astype("float32"), NET.init(jax.random.key(0)))
    found = jb.fit(
        NET, LOSS, single, (mapped(tmp_path, X, "x"), Y), SGD, epochs=1, batch_size=10,
        key=jax.random.key(1), progress=False,
    )  # fmt: skip
    assert {p.dtype for p in jax.tree.leaves(found.params)} == {np.dtype("float32")}


def order(epoch):
    return np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(1), epoch), 75))


def in_batches(epoch):
    for start in range(0, 75, 10):
        at = order(epoch)[start : start + 10]
        yield X[at], Y[at]


def test_a_function_of_the_epoch_gives_the_bits_of_arrays_in_that_order():
    assert_same(fit(in_batches), fit())


def test_a_list_of_batches_is_a_loader():
    batches = list(in_batches(1))
    found = fit(batches, validation=batches)
    assert found.history["loss"][0] == fit().history["loss"][0]
    whole = jb.evaluate(NET, LOSS, found.params, (X, Y), {"accuracy": jb.metrics.accuracy})
    parts = jb.evaluate(NET, LOSS, found.params, batches, {"accuracy": jb.metrics.accuracy})
    assert parts["accuracy"] == pytest.approx(whole["accuracy"], abs=1e-12)
    assert parts["loss"] == pytest.approx(found.history["validation_loss"][-1], rel=1e-12)


def test_a_loader_may_fill_the_same_arrays_anew():
    def reusing(epoch):
        x, y = np.empty((10, 4)), np.empty(10, int)
        for start in range(0, 70, 10):
            at = order(epoch)[start : start + 10]
            x[:], y[:] = X[at], Y[at]
            yield x, y

    fresh = lambda epoch: [batch for batch in in_batches(epoch) if len(batch[0]) == 10]  # noqa: E731
    assert_same(fit(reusing), fit(fresh))


def test_two_batches_in_a_list_are_no_pair():
    assert_same(fit([(X, Y), (X[:75], Y[:75])]), fit(lambda epoch: [(X, Y)] * 2))


def test_a_loader_of_grain():
    import grain

    source = list(zip(X, Y, strict=True))
    data = grain.MapDataset.source(source).batch(25).to_iter_dataset()
    plain = [(X[i : i + 25], Y[i : i + 25]) for i in (0, 25, 50)]
    assert_same(fit(data), fit(plain))


LOADERS = {
    "an iterator": (lambda: iter([(X, Y)]), TypeError, "is an iterator, which is empty after one epoch"),
    "a function that gives none": (lambda: lambda epoch: 3, TypeError, "for epoch 1 it gave int"),
    "no batch": (list, ValueError, "there is no batch in epoch 1"),
    "a batch without targets": (lambda: [X, X, X], TypeError, r"data, batch 1 of epoch 1 must be a pair \(x, y\)"),
    "lengths": (lambda: [(X, Y), (X[:9], Y[:8]), (X, Y)], ValueError, "batch 2 of epoch 1: x has 9 examples, but y has 8"),
    "not finite": (lambda: [(X, Y), (X, Y), (np.inf * X, Y)], ValueError, "batch 3 of epoch 1: x.* is .*inf"),
    "labels": (lambda: [(X, Y), (X, Y + 1), (X, Y)], ValueError, r"y\[\d+\] is 3"),
    "an empty batch": (lambda: [(X, Y), (X[:0], Y[:0]), (X, Y)], ValueError, "batch 2 of epoch 1 is empty"),
    "features": (lambda: [(X, Y), (X[:, :2], Y), (X, Y)], ValueError, "needs 4 features"),
    "a set of words": (lambda: {"a"}, TypeError, "batch 1 of epoch 1 must be a pair"),
    "a number": (lambda: 3, TypeError, "must be a pair .* or an iterable"),
    "a triple": (lambda: (X, Y, Y), TypeError, "must be a pair"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_loader_is_refused(name):
    make, error, message = LOADERS[name]
    with pytest.raises(error, match=message):
        fit(make())


def test_options_that_a_loader_has_no_use_for():
    with pytest.raises(ValueError, match="batch_size is the loader's to choose"):
        fit(in_batches, batch_size=10)
    with pytest.raises(ValueError, match="private training draws its own batches"):
        fit(in_batches, private=jb.Private(1.0, noise_multiplier=1.0))
    with pytest.raises(ValueError, match="not as a loader"):
        fit(in_batches, rule=jb.credit.FeedbackAlignment())


def test_batches_are_made_ahead_in_order_and_no_further():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    found = ahead(items(), depth=3)
    assert next(found) == 0
    end = time.monotonic() + 60
    while len(made) < 5 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 5  # one was taken, three are ready, one waits to be put
    assert list(found) == list(range(1, 20))


def test_what_goes_wrong_ahead_is_raised_where_it_is_due():
    def items():
        yield 1
        raise ZeroDivisionError("here")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError, match="here"):
        next(found)


def test_leaving_early_leaves_no_thread_behind():
    before = threading.active_count()
    for _ in range(5):
        found = ahead(iter(range(10**9)))
        assert next(found) == 0
        found.close()
    assert threading.active_count() == before


def test_a_loader_in_a_thread_of_settings_of_its_own():
    """float64 here only: what is read ahead in another thread must not lose half its bits."""
    jax.config.update("jax_enable_x64", False)
    try:
        with jax.enable_x64(True):
            inside = fit(in_batches)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert_same(inside, fit(in_batches))


def test_the_memory_of_what_waits_for_a_look_is_bounded(monkeypatch):
    looks = []
    run = jb.train.run.Run

    def look(self, history, old=run.look):
        looks.append((self.at.step, len(self._waiting)))
        old(self, history)

    monkeypatch.setattr(run, "look", look)
    monkeypatch.setattr(jb.train.run, "_HELD", 3 * (10 * 4 * 8 + 10 * 8))
    found = fit(in_batches, epochs=1)
    assert looks == [(3, 3), (6, 3), (8, 2)]
    assert_same(found, fit(in_batches, epochs=1))
