"""The suite: that everybody answers the same, that work is counted right, and that noise is known.

Nothing here is timed against anything: the samples of the tests of ratios are made up.
"""

import dataclasses
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbackprop.bench import report
from jbackprop.bench.comparison import compare, table
from jbackprop.bench.contest import (
    Row,
    answered,
    error_of,
    gap,
    in_turns,
    measure,
    tolerance_of,
    truth_of,
)
from jbackprop.bench.declare import (
    Absent,
    Contestant,
    Outside,
    Workload,
    one_of_each_kind,
    peer,
)
from jbackprop.bench.machine import ceilings, describe
from jbackprop.bench.outside import Process
from jbackprop.bench.results import Run, best, growth, joined, ratios
from jbackprop.bench.run import run
from jbackprop.bench.suite import WORKLOADS, flops
from jbackprop.bench.suite.mlp import contestants, named

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("as_jax_comes", "ranks")]

KINDS = ("plain", "ours", "idiomatic")


@pytest.fixture
def ranks():
    """The networks of others broadcast as people do."""
    with jax.numpy_rank_promotion("allow"):
        yield


def fast(load, kinds=KINDS):
    """The same workload with few contestants."""
    return dataclasses.replace(
        load, contestants=lambda: [p for p in load.contestants() if p.kind in kinds], outside=()
    )


def only(text, level=2):
    found = [load for load in WORKLOADS if text in load.name and load.level <= level]
    assert found, text
    return found[0]


def test_names_are_unique_and_the_quick_run_is_of_all_kinds():
    names = [load.name for load in WORKLOADS]
    assert len(set(names)) == len(names)
    quick = [load for load in WORKLOADS if load.level == 0]
    assert 4 <= len(quick) <= 8
    assert len({load.family for load in quick}) >= 4
    assert {load.axis[0] for load in WORKLOADS if load.axis} == {
        "batch", "depth", "width", "length", "vocabulary",
    }  # fmt: skip


def operations(jaxpr):
    """FLOPs of matmuls and convolutions in a traced program, loops counted as often as they run."""
    total = 0.0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval
        if name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            total += 2 * out.size * math.prod(eqn.invars[0].aval.shape[d] for d in left)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            where = eqn.params["dimension_numbers"].rhs_spec
            total += 2 * out.size * kernel.size / kernel.shape[where[0]]
        times = eqn.params["length"] if name == "scan" else 1
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    total += times * operations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    total += times * operations(inner)
    return total


COUNTED = [
    "mlp, 784-512x2-10 gelu", "deep, 32 x (gelu", "transformer blocks, width 128", "transformer, language model, width 128",
    "LSTM, 64 steps, width 128, batch 32", "head, 512", "attention, causal", "scaling in depth, 16",
]  # fmt: skip


@pytest.mark.parametrize("text", COUNTED)
def test_work_is_counted_on_paper_as_the_traced_program_has_it(text):
    load = only(text)
    plain = next(p for p in load.contestants() if p.kind == "plain")
    params, *data = jax.eval_shape(load.data)
    traced = jax.make_jaxpr(plain.function)(jax.eval_shape(plain.pack, params), *data)
    found = operations(traced.jaxpr)
    assert found == pytest.approx(load.flops, rel=1e-12)


@pytest.mark.parametrize("text", ["cnn, images 28x28x1, channels 32", "resnet"])
def test_convolutions_are_counted_as_the_forward_program_has_them(text):
    """Backward, XLA's convolutions with strides and padding do some of them on zeros."""
    load = only(text)
    plain = next(p for p in load.contestants() if p.kind == "plain")
    params, *data = jax.eval_shape(load.data)
    forward = jax.make_jaxpr(lambda *args: plain.function.__wrapped__(*args))(params, *data)
    first = {
        "cnn": flops.conv(64 * 28 * 28, 9, 1, 32),
        "resnet": flops.conv(32 * 32 * 32, 9, 3, 16),
    }
    whole = load.flops + first[text.split(",")[0]] / 3  # the first layer has no delta to hand on
    assert operations(forward.jaxpr) == pytest.approx(whole / 3, rel=1e-12)


LOADS = [
    "mlp, 64-32x30", "deep, 32 x (gelu", "resnet", "LSTM, 64 steps, width 128, batch 32",
    "head, 512", "step of Adam, 64-32", "epoch", "feedback alignment", "rules of credit",
    "scaling in batch, 1", "scaling in width, 16", "scaling in length, 128",
]  # fmt: skip


@pytest.mark.parametrize("text", LOADS)
def test_everybody_answers_the_same(text):
    """Of the kinds that take the least to compile; the rest of the suite was run by hand."""
    load = only(text)
    params, *data = load.data()
    inputs = (params, *data)
    people = [p for p in load.contestants() if isinstance(p, Contestant)]
    truth = truth_of(load, people[0], inputs)
    kinds = (*KINDS, "flax", "equinox", "rule", "custom_vjp", "variant")
    told = {}
    for person in people[:1] + [p for p in people[1:] if p.kind in kinds]:
        own = truth_of(load, person, inputs) if person.own_truth else truth
        function = jax.jit(person.function) if person.jit else person.function
        answer = answered(load, person, function(person.pack(params), *data))
        told[person.name] = error_of(answer, own)
        assert told[person.name] <= load.tolerance, told
    assert len(told) >= 2


def test_a_wrong_contestant_is_not_timed_and_a_missing_one_is_a_row():
    load = fast(only("mlp, 64-32x30"))
    good = load.contestants()

    def doubled(*args):
        value, grads = good[1].function(*args)
        return value, jax.tree.map(lambda g: 2 * g, grads)

    def full(*args):
        raise MemoryError("needs 99 GiB")

    people = [
        *good, Contestant("twice", doubled), Contestant("full", full),
        peer("absent", "flax", "no_such_module", lambda: good[0]),
    ]  # fmt: skip
    rows = {
        r.contestant: r
        for r in measure(dataclasses.replace(load, contestants=lambda: people), 0.01)
    }
    assert rows["twice"].note.startswith("WRONG: its answer is off by 1e+00")
    assert rows["twice"].samples == ()
    assert rows["full"].note == "needs 99 GiB"
    assert rows["absent"].note == "not installed: no_such_module"
    ours = rows["ours"]
    assert ours.error < 1e-5
    assert ours.temp > 0
    assert ours.total > ours.temp
    assert len([s for s in ours.samples if s]) >= 3
    assert min(ours.trace, ours.lower, ours.compile, ours.first) > 0
    assert rows["jax.value_and_grad"].unit


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr("jbackprop.bench.contest.room", lambda: 1000)
    rows = measure(fast(only("mlp, 64-32x30")), 0.01)
    assert all(r.note.startswith("needs 0.0 GiB") for r in rows)
    assert report.table(Run(describe(), {"matmul_flops": 1.0, "stream_bytes": 1.0}, tuple(rows)))


def test_gap_is_relative_leaf_by_leaf():
    truth = {"a": np.array([[3.0, 4.0]]), "b": np.array([[1e-9]])}
    assert gap({"a": np.array([[3.0, 4.5]]), "b": truth["b"]}, truth) == pytest.approx(0.1)
    # b is measured by a thousandth of a's norm
    assert gap({"a": truth["a"], "b": np.array([[5e-6]])}, truth) == pytest.approx(1e-3, rel=1e-3)
    norms = np.array([1.0, 100.0])
    assert gap(np.array([1.1, 100.0]), norms) == pytest.approx(0.1)
    assert math.isnan(gap(np.array([math.nan, 100.0]), norms))
    with pytest.raises(ArithmeticError, match="other shapes"):
        gap(np.zeros(3), norms)


def test_rounds_pair_neighbours_and_slow_ones_take_part_in_fewer(monkeypatch):
    now = itertools.count()
    log = []

    def of(name, seconds):
        def timed(calls):
            log.append((next(now), name))
            return seconds * calls

        return timed

    samples = in_turns([of("a", 0.001), of("b", 0.001), of("slow", 0.5)], 0.4)
    rounds = len(samples[0])
    assert len({len(s) for s in samples}) == 1
    assert None not in samples[0] + samples[1]
    part = [i for i, s in enumerate(samples[2]) if s is not None]
    assert 3 <= len(part) < rounds
    assert samples[0][0] == pytest.approx(0.001)
    calls = [name for _, name in log[6:]]
    assert calls[::2] == calls[1::2]  # one that is not timed before each sample
    fast = [name for name in calls[1::2] if name != "slow"]
    pairs = list(zip(fast[::2], fast[1::2], strict=True))
    assert {frozenset(pair) for pair in pairs} == {frozenset("ab")}
    assert len(set(pairs)) == 2  # the order is drawn anew


def row(name, samples, unit=False, **more):
    return Row(
        "w", "f", "gradient", name, "plain" if unit else "ours", samples=samples, unit=unit, **more
    )


def made(scale, seed, noise=0.02, n=40, temp=1000):
    """A run whose machine is slower or faster from round to round, and all of it by the seed."""
    rng = np.random.default_rng(seed)
    drift = (1 + rng.random()) * np.exp(rng.normal(0, 0.3, n))
    unit = drift * np.exp(rng.normal(0, noise, n))
    ours = scale * drift * np.exp(rng.normal(0, noise, n))
    rows = (
        row("plain", tuple(unit.tolist()), True),
        row("ours", tuple(ours.tolist()), temp=temp),
    )
    return Run({"device": "made up"}, {"matmul_flops": 1.0, "stream_bytes": 1.0}, rows)


def test_ratios_are_paired_so_that_drift_cancels():
    found = ratios(made(0.8, 0).rows)
    assert found[0] == (1, 1, 1)
    assert found[1][1] == pytest.approx(0.8, rel=0.02)
    assert found[1][2] - found[1][0] < 0.1


def test_compare_knows_about_noise():
    verdicts = [compare(made(1, 2 * i), made(1, 2 * i + 1))[0].verdict for i in range(100)]
    assert verdicts.count("the same") >= 95
    assert not {"faster", "slower"} & set(verdicts)
    wild = [compare(made(1, i, 0.5), made(1, 900 + i, 0.5))[0].verdict for i in range(100)]
    assert wild.count("slower") + wild.count("faster") <= 3
    assert "cannot tell" in wild
    slower = [compare(made(1, i), made(1.2, 300 + i))[0] for i in range(20)]
    assert {c.verdict for c in slower} == {"slower"}
    assert all(c.worse for c in slower)
    assert sum(c.low < 1.2 < c.high for c in slower) >= 17  # of 20, at 95 %
    assert compare(made(1.2, 0), made(1, 1))[0].verdict == "faster"
    (change,) = compare(made(1, 0), made(1, 1, temp=1100))
    assert change.verdict == "the same, larger"
    assert change.worse
    (change,) = compare(made(1, 0, n=4), made(1.5, 1, n=4))
    assert change.verdict == "cannot tell"
    text = table([change], made(1, 0), made(1, 1))
    assert "cannot tell" in text
    other = dataclasses.replace(made(1, 1), machine={"device": "another"})
    assert "not from the same machine" in table([change], made(1, 0), other)


def test_what_is_in_one_run_alone_is_said():
    a, b = made(1, 0), made(1, 1)
    renamed = dataclasses.replace(
        b, rows=(b.rows[0], dataclasses.replace(b.rows[1], contestant="x"))
    )
    assert [c.verdict for c in compare(a, renamed)] == ["only in A", "only in B"]


def test_exponents_are_fitted_over_the_larger_half():
    sizes = (1, 4, 16, 64, 256)
    rows = [
        Row("s", "scaling", "gradient", "c", "ours", ("batch", n), samples=(1e-3 + 1e-6 * n**2,),
            temp=100 * n, theory=(2.0, 1.0))
        for n in reversed(sizes)
    ]  # fmt: skip
    time, memory = growth(rows)
    assert (time.what, memory.what) == ("time", "memory")
    assert memory.exponent == pytest.approx(1)
    assert memory.deviation == pytest.approx(0, abs=1e-9)
    assert time.sizes == (16, 64, 256)
    assert 1.2 < time.exponent < 2  # what a call costs still shows
    assert (time.theory, memory.theory) == (2.0, 1.0)


def test_files_come_back_as_they_were(tmp_path):
    before = made(1, 0)
    before = dataclasses.replace(
        before, rows=(*before.rows, Row("w", "f", "gradient", "gone", "flax", note="not installed"))
    )
    before.save(tmp_path / "a.json")
    after = Run.load(tmp_path / "a.json")
    assert after.machine == before.machine
    assert [r.contestant for r in after.rows] == ["plain", "ours", "gone"]
    for old, new in zip(before.rows, after.rows, strict=True):
        assert dataclasses.replace(old, samples=()) == dataclasses.replace(new, samples=())
        assert np.allclose(old.samples, new.samples, rtol=5e-4, atol=0)  # four digits are saved
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    for text, message in (("{}", "not a file"), ("[1", "not a file"), ('{"format": 0}', "measure")):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Run.load(tmp_path / "b.json")


def test_a_run_writes_results_charts_and_a_page(tmp_path):
    loads = [fast(only("mlp, 64-32x30")), fast(only("scaling in batch, 1")),
             fast(only("scaling in batch, 64"))]  # fmt: skip
    said = []
    done = run(loads, 0.01, tmp_path / "out", show=said.append)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "results.json",
        "report.html",
        "ratios-gradient.png",
        "scaling.png",
        "roofline.png",
    } == names
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "http://" not in page.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "")
    assert all(load.name in page for load in loads)
    assert any("mlp, 64-32x30" in text for text in said)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["machine"]["versions"]["jax"] == jax.__version__
    assert saved["ceilings"]["matmul_flops"] > 1e6
    assert len(saved["rows"]) == len(done.rows) == 9
    assert best(done.rows, ["ours"]).kind == "ours"
    assert "jax.value_and_grad" in report.table(done)
    assert "batch" in report.growth_table(done)
    (line, *_) = report.verdict_lines(done)
    assert line[0] == loads[0].name


SERVED = """
import json, sys, time
import numpy as np
arrays = dict(np.load(sys.argv[1]))
assert sys.argv[2:4] == ["some task", "gradient"]
assert arrays["params/0/w"].shape == arrays["wanted/0/w"].shape == (64, 32)
print(json.dumps({"contestant": "there", "kind": "torch", "error": 1e-6, "first": 0.1}), flush=True)
print(json.dumps({"contestant": "wrong", "kind": "torch", "error": 0.5}), flush=True)
print(json.dumps({"contestant": "not there", "kind": "torch", "note": "no such thing"}), flush=True)
print("a warning of somebody's", flush=True)
print("ready", flush=True)
for line in sys.stdin:
    name, calls = line.rstrip().split("\\t")
    assert name == "there"
    print(0.001 * int(calls), flush=True)
"""


def test_peers_in_a_process_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr("jbackprop.bench.outside._FOLDER", tmp_path)
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "lost.py").write_text("import no_such_module\n")
    load = dataclasses.replace(
        fast(only("mlp, 64-32x30"), ("plain",)),
        outside=(Outside("served.py", "some task"), Outside("lost.py", "some task")),
    )
    rows = {r.contestant: r for r in measure(load, 0.01, sys.executable)}
    assert rows["there"].seconds == pytest.approx(0.001)
    assert rows["wrong"].note.startswith("WRONG")
    assert rows["not there"].note == "no such thing"
    assert rows["lost"].note == "No module named 'no_such_module'"
    nobody = {r.contestant for r in measure(load, 0.01, None)}
    assert nobody == {"jax.value_and_grad"}


def test_scikit_learn_ends_an_epoch_with_the_same_parameters():
    load = only("epoch")
    inputs = load.data()
    truth = truth_of(load, load.contestants()[0], inputs)
    with Process(sys.executable, load.outside[0], load, truth, inputs) as process:
        (fields,) = process.entered
        assert fields["error"] < load.tolerance, fields
        assert process.runner(fields["contestant"])(1) > 0


def test_the_machine_is_described():
    found = describe()
    assert found["cores"] >= 1
    assert found["platform"] == jax.default_backend()
    measured = ceilings(0.01)
    assert measured["matmul_flops"] > 0
    assert measured["stream_bytes"] > 0


def test_widths_are_named_shortly():
    assert named((784, 512, 512, 10)) == "784-512x2-10"
    assert named((3, 3)) == "3x2"
    assert [p.name for p in contestants((4, 3, 2), "tanh") if not isinstance(p, Absent)][:2] == [
        "jax.value_and_grad", "ours",
    ]  # fmt: skip


def test_float64_is_the_truth_whatever_the_flag():
    load = fast(only("mlp, 64-32x30"), ("plain",))
    value, _ = truth_of(load, load.contestants()[0], load.data())
    assert value.dtype == np.float64
    assert jnp.zeros(1).dtype == jnp.float32


def test_a_workload_needs_no_file(tmp_path):
    """A stranger's: four lines."""
    mine = Workload(
        "mine", "mine", lambda: (jnp.ones(3), jnp.arange(3.0)),
        lambda: [
            Contestant("autodiff", jax.value_and_grad(lambda w, x: (w * x).sum()), "plain"),
            Contestant("by hand", lambda w, x: ((w * x).sum(), x), "ours"),
        ],
    )  # fmt: skip
    rows = measure(mine, 0.01)
    assert [r.error for r in rows] == [0, 0]


def test_the_quick_run_has_one_contestant_of_each_kind():
    load = only("deep, 32 x (Dense, tanh)")
    kinds = [p.kind for p in one_of_each_kind(load).contestants()]
    assert len(set(kinds)) == len(kinds) < len(load.contestants())
    assert {"plain", "ours", "idiomatic", "tuned"} <= set(kinds)
    assert "variant" not in kinds


def test_a_workload_that_fails_costs_a_row_and_not_the_run(tmp_path):
    def lost():
        raise OSError("the data are gone")

    good = fast(only("mlp, 64-32x30"), ("plain", "ours"))
    bad = dataclasses.replace(good, name="bad", data=lost)
    done = run([bad, good], 0.01, tmp_path, show=lambda _: None)
    assert done.rows[0].note == "OSError: the data are gone"
    assert [r.workload for r in done.rows if r.samples] == [good.name, good.name]
    assert "the data are gone" in (tmp_path / "report.html").read_text()


def test_tolerances_follow_the_precision(monkeypatch):
    load = only("mlp, 64-32x30")
    assert tolerance_of(load) == load.tolerance
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert tolerance_of(load) == 100 * load.tolerance
    with jax.default_matmul_precision("highest"):
        assert tolerance_of(load) == load.tolerance


def test_runs_of_one_machine_are_joined(tmp_path):
    a = made(1, 0)
    newer = dataclasses.replace(made(0.5, 1), ceilings={"matmul_flops": 2.0, "stream_bytes": 0.5})
    other = dataclasses.replace(a, rows=tuple(dataclasses.replace(r, workload="v") for r in a.rows))
    whole = joined([a, other, newer])
    assert [r.workload for r in whole.rows] == ["w", "w", "v", "v"]
    assert ratios(whole.rows)[1][1] == pytest.approx(0.5, rel=0.02)  # the last one counts
    assert whole.ceilings == {"matmul_flops": 2.0, "stream_bytes": 1.0}
    with pytest.raises(ValueError, match="differ in device, made up and another"):
        joined([a, dataclasses.replace(a, machine={"device": "another"})])
