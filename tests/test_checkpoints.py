"""Checkpoints: a run that was stopped and resumed is, bit by bit, the run that never was."""

import json
import os
import signal
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jbackprop as jb
from jbackprop.train.fingerprints import fingerprint

NET = jb.mlp([4, 8, 3])
LOSS = jb.SoftmaxCrossEntropy()
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(75, 4)), RNG.integers(0, 3, 75)
ADAM = optax.adam(0.02)


@pytest.fixture(autouse=True)
def optax_is_not_strict():
    with jax.numpy_dtype_promotion("standard"):
        yield


def fit(net=NET, data=(X, Y), optimizer=ADAM, loss=LOSS, **options):
    usual = {"epochs": 3, "batch_size": 10, "key": jax.random.key(1), "progress": False}
    if callable(data):
        usual["batch_size"] = None
    params = net.init(jax.random.key(0))
    return jb.fit(net, loss, params, data, optimizer, **(usual | options))


def assert_same(one, two):
    assert one.history == two.history
    assert (one.stopped, one.best_epoch, one.skipped) == (two.stopped, two.best_epoch, two.skipped)
    own, other = ((r.params, r.opt_state, r.rule_state, r.averages) for r in (one, two))
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


class StopError(Exception):
    """Training ends here, as by a kill."""


class Stopping:
    """A loader, order or callback that raises at its n-th call; what was begun is written."""

    def __init__(self, n):
        self.left = n

    def __call__(self, *_):
        self.left -= 1
        if self.left == 0:
            raise StopError


def loader(stop=lambda: None):
    def epoch(number):
        order = np.random.default_rng(number).permutation(len(X))
        for start in range(0, len(X), 10):
            stop()
            yield X[order[start : start + 10]], Y[order[start : start + 10]]

    return epoch


DROPS = jb.Sequential(jb.Dense(4, 8), jb.Tanh(), jb.Dropout(0.4), jb.Dense(8, 3))
NORMED = jb.Sequential(jb.Dense(4, 8), jb.BatchNorm(8), jb.Tanh(), jb.Dense(8, 3))
HELD_OUT = {"validation": (X[:20], Y[:20]), "metrics": {"accuracy": jb.metrics.accuracy}}
RUNS = {
    "plain": {},
    "layers that draw": {"net": DROPS},
    "batch norm": {"net": NORMED, **HELD_OUT},
    "early stopping": HELD_OUT | {"early_stopping": jb.EarlyStopping(patience=9), "optimizer": optax.sgd(0.1, momentum=-2.0)},
    "a rule with a state": {"rule": jb.credit.KolenPollack()},
    "skipping": {"nonfinite": "skip"},
    "rolling back": {"nonfinite": "rollback"},
    "private": {"private": jb.Private(1.0, noise_multiplier=1.0)},
    "whole batches": {"batch_size": None, "epochs": 6},
}  # fmt: skip


OF_OLD = ("plain", "batch norm", "private")
"""The runs that the oldest JAX is asked for too."""


@pytest.mark.parametrize(
    "name", [pytest.param(r, marks=() if r in OF_OLD else pytest.mark.newest) for r in RUNS]
)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(name, tmp_path, monkeypatch):
    options = RUNS[name]
    never = fit(**options)
    whole = name == "whole batches"
    stopping = Stopping(5 if whole else 21)
    run = jb.train.run.Run

    def each(self, *args, old=run._go):
        stopping()
        return old(self, *args)

    monkeypatch.setattr(run, "_go", each)
    kept = jb.Checkpoints(tmp_path, every=3)
    with pytest.raises(StopError):
        fit(checkpoints=kept, **options)
    resumed = fit(checkpoints=kept, resume=True, **options)
    assert resumed.resumed_from == (4 if whole else 18)
    assert_same(never, resumed)
    assert name != "early stopping" or never.best_epoch < 3  # what was best is not forgotten
    again = fit(checkpoints=kept, resume=True, **options)  # it is finished: there is nothing to do
    assert again.resumed_from == (6 if whole else 24)
    assert_same(never, again)


@pytest.mark.newest
@pytest.mark.parametrize("n", [1, 9, 22])
def test_a_loader_is_gone_through_up_to_where_it_was(n, tmp_path):
    never = fit(data=loader())
    kept = jb.Checkpoints(tmp_path, every=2)
    with pytest.raises(StopError):
        fit(data=loader(Stopping(n)), checkpoints=kept)
    resumed = fit(data=loader(), checkpoints=kept, resume=True)
    assert_same(never, resumed)
    assert (resumed.resumed_from is None) == (n == 1)


@pytest.mark.newest
def test_a_loader_that_has_become_shorter_is_refused(tmp_path):
    kept = jb.Checkpoints(tmp_path, every=2)
    with pytest.raises(StopError):
        fit(data=loader(Stopping(8)), checkpoints=kept)
    with pytest.raises(ValueError, match="epoch 1 was left behind batch 6, but now it has 1 only"):
        fit(data=lambda epoch: [(X[:10], Y[:10])], checkpoints=kept, resume=True)


@pytest.mark.newest
@pytest.mark.filterwarnings("ignore")
def test_grains_loaders_are_taken_up_in_the_middle_of_an_epoch(tmp_path):
    """By their own state: nothing that was had before is read again."""
    import grain

    reads = []

    class Source:
        def __len__(self):
            return len(X)

        def __getitem__(self, i):
            reads.append(i)
            return X[i], Y[i]

    def epoch(number):
        data = grain.MapDataset.source(Source()).shuffle(seed=number).batch(10)
        return data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=1))

    never = fit(data=epoch)
    kept, stop = jb.Checkpoints(tmp_path, every=2), Stopping(2)  # epochs
    with pytest.raises(StopError):
        fit(data=epoch, checkpoints=kept, callbacks=[stop])
    assert {"8", "12", "14"} < set(os.listdir(tmp_path))
    reads.clear()
    resumed = fit(data=epoch, checkpoints=kept, resume=True)
    assert resumed.resumed_from == 14
    assert len(reads) == 75 + (75 - 60)
    assert_same(never, resumed)


def test_sigterm_finishes_the_step_and_leaves_with_its_own_status(tmp_path):
    never = fit()
    seen = []

    def data(number):
        for batch in loader()(number):
            seen.append(batch)
            if len(seen) == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(jb.Preempted) as caught:
        fit(data=data, checkpoints=tmp_path)
    assert isinstance(caught.value, SystemExit)
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert str(caught.value.step) in os.listdir(tmp_path)
    resumed = fit(data=loader(), checkpoints=tmp_path, resume=True)
    assert resumed.resumed_from == caught.value.step
    assert_same(fit(data=loader()), resumed)
    assert never.history != resumed.history  # another order


def test_without_checkpoints_sigterm_does_what_it_did():
    before = signal.getsignal(signal.SIGTERM)
    found = []
    fit(callbacks=[lambda epoch: found.append(signal.getsignal(signal.SIGTERM))])
    assert found == [before] * 3


def test_in_a_thread_there_are_checkpoints_but_no_signals(tmp_path):
    found = []

    def train():
        with jax.numpy_dtype_promotion("standard"):
            found.append(fit(checkpoints=tmp_path))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found[0].stopped == "finished"


def test_the_last_and_the_best_are_kept(tmp_path):
    options = HELD_OUT | {"epochs": 6, "optimizer": optax.sgd(0.1, momentum=-2.0)}  # it diverges
    accuracy = np.array(fit(**options).history["validation_accuracy"])
    assert accuracy[:4].max() > accuracy[4:].max()  # else this shows nothing
    kept = jb.Checkpoints(tmp_path, keep=2, monitor="validation_accuracy", higher_is_better=True)
    fit(checkpoints=kept, **options)
    best = {8 * (i + 1) for i in np.flatnonzero(accuracy == accuracy.max())}
    steps = {int(name) for name in os.listdir(tmp_path)}
    assert steps >= {40, 48}
    assert len(steps - {40, 48}) == 1
    assert steps - {40, 48} <= best


def test_more_epochs_go_on_where_fewer_ended(tmp_path):
    fit(checkpoints=tmp_path)
    assert_same(fit(checkpoints=tmp_path, resume=True, epochs=5), fit(epochs=5))
    with pytest.raises(jb.CheckpointError, match="is in its epoch 5: epochs=3 is less"):
        fit(checkpoints=tmp_path, resume=True)


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    options = HELD_OUT | {
        "early_stopping": jb.EarlyStopping(patience=1), "optimizer": optax.sgd(5.0), "epochs": 9,
    }  # fmt: skip
    first = fit(checkpoints=tmp_path, **options)
    assert first.stopped == "early"
    assert_same(fit(checkpoints=tmp_path, resume=True, **options), first)


def test_fewer_epochs_than_are_under_way_are_refused(tmp_path):
    kept = jb.Checkpoints(tmp_path, every=3)
    with pytest.raises(StopError):
        fit(data=loader(Stopping(14)), checkpoints=kept)
    with pytest.raises(jb.CheckpointError, match="is in its epoch 2: epochs=1 is less"):
        fit(data=loader(), checkpoints=kept, resume=True, epochs=1)


@pytest.mark.newest
def test_a_private_run_gives_away_what_it_gave_before_it_was_stopped(tmp_path):
    """And with epsilon= the noise is that of all epochs: more of them would need more."""
    private = {"private": jb.Private(1.0, noise_multiplier=2.0)}
    never = fit(epochs=2, **private).privacy
    fit(epochs=1, checkpoints=tmp_path / "a", **private)
    resumed = fit(epochs=2, checkpoints=tmp_path / "a", resume=True, **private).privacy
    again = fit(epochs=2, checkpoints=tmp_path / "a", resume=True, **private).privacy
    assert never == resumed == again
    private = {"private": jb.Private(1.0, epsilon=3.0)}
    fit(epochs=1, checkpoints=tmp_path / "b", **private)
    with pytest.raises(jb.CheckpointError, match="another run: noise_multiplier is"):
        fit(epochs=2, checkpoints=tmp_path / "b", resume=True, **private)


def test_an_optimizer_that_counts_in_python(tmp_path):
    def update(grads, state, params=None, **extra):
        return jax.tree.map(lambda g: -0.1 * g, grads), {"n": state["n"] + 1}

    optimizer = optax.GradientTransformationExtraArgs(lambda params: {"n": 0}, update)
    never = fit(optimizer=optimizer)
    fit(optimizer=optimizer, checkpoints=tmp_path, epochs=2)
    assert_same(fit(optimizer=optimizer, checkpoints=tmp_path, resume=True), never)


def test_a_new_folder_with_resume_begins_anew(tmp_path):
    assert_same(fit(checkpoints=tmp_path / "a" / "b", resume=True), fit())


REFUSED = {
    "resume without a place": (lambda kept: fit(resume=True), ValueError, "say where, checkpoints="),
    "a folder that has a run": (lambda kept: fit(checkpoints=kept), jb.CheckpointError, "holds a run up to step 24: go on with resume=True"),
    "another batch size": (lambda kept: fit(checkpoints=kept, resume=True, batch_size=15), jb.CheckpointError, "batch_size is 10 there, 15 here"),
    "another key": (lambda kept: fit(checkpoints=kept, resume=True, key=jax.random.key(2)), jb.CheckpointError, "another run: key is "),
    "another network": (lambda kept: fit(net=jb.mlp([4, 8, 8, 3]), checkpoints=kept, resume=True), jb.CheckpointError, r"another run: network.layers\[2\].q is 3 there, 8 here"),
    "another loss": (lambda kept: fit(loss=jb.SoftmaxCrossEntropy(label_smoothing=0.1), checkpoints=kept, resume=True), jb.CheckpointError, "another run: loss.label_smoothing is "),
    "other data": (lambda kept: fit(data=(X + 1e-9, Y), checkpoints=kept, resume=True), jb.CheckpointError, r"data\[0\] is 'float64 \(75, 4\), CRC .* there"),
    "other metrics": (lambda kept: fit(metrics={"a": jb.metrics.accuracy}, checkpoints=kept, resume=True), jb.CheckpointError, "another run: the history has 1 items there, 2 here"),
    "validation where there was none": (lambda kept: fit(validation=(X, Y), checkpoints=kept, resume=True), jb.CheckpointError, "another run: the history"),
    "a rule": (lambda kept: fit(rule=jb.credit.FeedbackAlignment(), checkpoints=kept, resume=True), jb.CheckpointError, "another run: rule is "),
    "another policy": (lambda kept: fit(nonfinite="skip", checkpoints=kept, resume=True), jb.CheckpointError, "another run: nonfinite is 'raise' there"),
    "another optimizer": (lambda kept: fit(optimizer=optax.sgd(0.1), checkpoints=kept, resume=True), jb.CheckpointError, "another run: optimizer.init"),
    "another dtype": (lambda kept: jb.fit(NET, LOSS, jax.tree.map(lambda p: p.astype("float32"), NET.init(jax.random.key(0))), (X, Y), ADAM, epochs=3, batch_size=10, key=jax.random.key(1), progress=False, checkpoints=kept, resume=True), jb.CheckpointError, "CRC .* there, 'float32"),
    "a monitor that is not there": (lambda kept: fit(checkpoints=jb.Checkpoints(kept, monitor="accuracy"), resume=True), ValueError, "monitor is 'accuracy', but the history will have loss"),
    "every 0": (lambda kept: jb.Checkpoints(kept, every=0), ValueError, "every must be an int of at least 1"),
    "keep 0": (lambda kept: jb.Checkpoints(kept, keep=0), ValueError, "keep must be an int of at least 1"),
    "keep 2.5": (lambda kept: jb.Checkpoints(kept, keep=2.5), ValueError, "keep must be an int"),
    "no path": (lambda kept: jb.Checkpoints(3), TypeError, "folder must be a path, not 3"),
    "a file": (lambda kept: fit(checkpoints=kept / "file", resume=True), jb.CheckpointError, "is a file: checkpoints need a folder"),
    "a policy that is none": (lambda kept: fit(nonfinite="ignore"), ValueError, "must be \"raise\", \"skip\" or \"rollback\", not 'ignore'"),
    "private and skipping": (lambda kept: fit(nonfinite="skip", private=jb.Private(1.0, noise_multiplier=1.0)), ValueError, "would tell of the private data"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with jax.numpy_dtype_promotion("standard"):
        fit(checkpoints=folder)
    (folder / "file").write_text("")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_belong_together_is_refused(name, finished):
    call, error, message = REFUSED[name]
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    with pytest.raises(error, match=message):
        call(finished)
    assert before == {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}


@pytest.mark.newest
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_fingerprint_tells_any_single_bit(data):
    dtype = data.draw(
        st.sampled_from(["float64", "float32", "bfloat16", "float16", "int32", "uint8"])
    )
    shape = data.draw(st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 4)]))
    n = int(np.prod(shape, dtype=int)) * jnp.dtype(dtype).itemsize
    raw = np.frombuffer(data.draw(st.binary(min_size=n, max_size=n)), np.uint8)
    bit = data.draw(st.integers(0, 8 * n - 1))
    other = raw.copy()
    other[bit // 8] ^= 1 << (bit % 8)
    one, two = (jnp.asarray(v.view(jnp.dtype(dtype)).reshape(shape)) for v in (raw, other))
    assert (fingerprint(one) != fingerprint(two)).all()
    np.testing.assert_array_equal(fingerprint(one), fingerprint(one.copy()))


def test_a_fingerprint_tells_places():
    v = jnp.arange(12.0).reshape(3, 4)
    prints = {
        tuple(np.asarray(fingerprint(w)))
        for w in (v, v.T, v[::-1], v.reshape(2, 6) + 1, jnp.roll(v, 1))
    }
    assert len(prints) == 5
    z = jnp.asarray([1 + 2j, 3j])
    assert (fingerprint(z) != fingerprint(z.conj())).all()
    assert (
        fingerprint(jnp.asarray([True, False])) != fingerprint(jnp.asarray([False, True]))
    ).all()


def nan_at(*steps):
    """sgd, whose update is NaN in these steps (from 0, whatever comes of them)."""

    def update(grads, state, params=None, **extra):
        bad = jnp.any(jnp.asarray(steps) == state)
        return jax.tree.map(lambda g: jnp.where(bad, jnp.nan, -0.1 * g), grads), state + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), int), update)


def test_a_step_that_is_not_finite_is_skipped():
    """The state too is that before it, so that the optimizer fails at its fourth step again."""
    count = lambda *steps: fit(optimizer=nan_at(*steps), nonfinite="skip", epochs=2)  # noqa: E731
    with pytest.raises(jb.NonFiniteError, match="'skip' was of no use 100 times in a row"):
        fit(optimizer=nan_at(4), nonfinite="skip", epochs=20)
    fine = count(99)
    assert fine.history["skipped"] == [0.0, 0.0]
    assert fine.skipped == 0
    found = count(5)
    assert found.history["skipped"] == [3.0, 8.0]
    assert found.skipped == 11
    five = fit(optimizer=optax.sgd(0.1), epochs=1).history
    assert five["loss"] != found.history["loss"]
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(found.params))
    assert int(found.opt_state) == 5


def test_an_example_that_makes_nan_costs_its_batch():
    """log z of a negative z, in one example: the batches it is in are left out, and no other."""
    bad = X.copy()
    bad[7] = 1e200  # the costs overflow

    net, loss = jb.mlp([4, 1], jb.Identity()), jb.SquaredError()
    target = X @ np.array([[1.0], [2.0], [0.0], [-1.0]])
    found = fit(net, (bad, target), optax.sgd(0.1), loss, nonfinite="skip", epochs=4)
    assert found.history["skipped"] == [1.0] * 4
    assert found.history["loss"][-1] < 0.1 * found.history["loss"][0]
    with pytest.raises(jb.NonFiniteError):
        fit(net, (bad, target), optax.sgd(0.1), loss, epochs=4)


def test_rolling_back_goes_on_with_the_batches_behind():
    """A look at every 8th step, the end of an epoch: the second epoch is as if it was not there."""
    found = fit(optimizer=nan_at(11), nonfinite="rollback", epochs=3)
    assert found.history["skipped"] == [0.0, 8.0, 8.0]
    assert np.isnan(found.history["loss"][1])
    first = fit(optimizer=optax.sgd(0.1), epochs=1)
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(jb.NonFiniteError, match="'rollback' was of no use 10 times in a row"):
        fit(optimizer=nan_at(11), nonfinite="rollback", epochs=20)


def test_rolling_back_is_the_same_where_sigterm_came_before_a_look(tmp_path, monkeypatch):
    """Looks are at every fifth step: what is wrong in the twelfth undoes the eleventh and up to 15."""
    monkeypatch.setattr(jb.train.run, "_LOOK_EVERY", 5)
    net, loss = jb.mlp([4, 1], jb.Identity()), jb.SquaredError()

    def data(number, end=False):
        for i in range(8):
            x = 1e200 * X[:10] if (number, i) == (2, 3) else X[i : i + 10]
            if end and (number, i) == (2, 7):
                os.kill(os.getpid(), signal.SIGTERM)
            yield x, X[i : i + 10, :1]

    def run(data, **kept):
        return fit(net, data, optax.sgd(0.1), loss, nonfinite="rollback", **kept)

    never = run(data)
    assert never.history["skipped"] == [0.0, 5.0, 0.0]
    with pytest.raises(jb.Preempted) as caught:
        run(lambda number: data(number, end=True), checkpoints=tmp_path)
    assert caught.value.step == 10  # it came later, and the look was there
    assert_same(never, run(data, checkpoints=tmp_path, resume=True))


def test_of_private_data_the_record_has_no_sum(tmp_path):
    fit(checkpoints=tmp_path, epochs=1, private=jb.Private(1.0, noise_multiplier=1.0))
    record = (tmp_path / "8" / "record" / "metadata").read_text()
    assert "float64 (75, 4)" in record
    assert "CRC" not in record
    assert "sha256" in record
    assert '\\"key\\"' not in record


def test_the_record_is_json_that_anybody_can_read(tmp_path):
    fit(checkpoints=tmp_path)
    signed = json.loads((tmp_path / "24" / "record" / "metadata").read_text())
    record = json.loads(signed["text"])
    assert record["record"]["at"]["step"] == 24
    assert record["configuration"]["batch_size"] == 10


def test_checkpoints_without_orbax_say_what_to_install(tmp_path, monkeypatch):
    import sys

    jb.train.checkpoints._orbax.cache_clear()
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'jbackprop\[checkpoints\]'"):
        fit(checkpoints=tmp_path)
    monkeypatch.undo()
    jb.train.checkpoints._orbax.cache_clear()


def test_nothing_is_said_where_all_is_well(tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(checkpoints=tmp_path)
        fit(checkpoints=tmp_path, resume=True)
    assert not [w for w in seen if "jbackprop" in str(w.filename)]


class Live:
    """An iterator that gives its state itself, not a copy of it."""

    def __init__(self):
        self.at = {"i": 0}

    def __iter__(self):
        return self

    def __next__(self):
        if self.at["i"] >= 8:
            raise StopIteration
        self.at["i"] += 1
        return X[self.at["i"] :][:10], Y[self.at["i"] :][:10]

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


@pytest.mark.newest
def test_a_loader_that_gives_its_live_state(tmp_path):
    kept, data = jb.Checkpoints(tmp_path, every=3), lambda epoch: Live()
    never = fit(data=data)

    class Stopped(Live):
        def __next__(self):
            if self.at["i"] == 7:
                raise StopError
            return super().__next__()

    with pytest.raises(StopError):
        fit(data=lambda epoch: Stopped(), checkpoints=kept)
    resumed = fit(data=data, checkpoints=kept, resume=True)
    assert resumed.resumed_from == 6
    assert_same(never, resumed)

    class Odd(Live):
        def get_state(self):
            return {"i": np.int64(3)}

    with pytest.raises(jb.CheckpointError, match="the state of the loader must be bytes, or what"):
        fit(data=lambda epoch: Odd(), checkpoints=jb.Checkpoints(tmp_path / "odd", every=3))


@pytest.mark.newest
def test_a_hundred_skipped_in_a_row_are_seen_wherever_they_stand():
    """Steps 10 to 160 of 200 between two looks; after them all is well."""

    def data(epoch):
        for i in range(200):
            yield (np.full_like(X[:10], 1e200) if 10 <= i < 160 else X[:10]), X[:10, :1]

    net = jb.mlp([4, 1], jb.Identity())
    with pytest.raises(jb.NonFiniteError, match="'skip' was of no use 150 times in a row"):
        fit(net, data, optax.sgd(1e-3), jb.SquaredError(), nonfinite="skip", epochs=1)
