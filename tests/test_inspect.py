"""The page that shows a network: its figures against plain JAX and NumPy, and what is on it."""

import argparse
import json
import re
import sys
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import relative

import jbackprop as jb
from jbackprop import datasets, files, html
from jbackprop.cli import inspect as command
from jbackprop.inspect import facts, inspect, measure
from jbackprop.inspect.figures import extremes
from jbackprop.inspect.spread import Tally

pytestmark = pytest.mark.newest

LOSS = jb.SoftmaxCrossEntropy()


def data(n, p=5, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, p)), rng.integers(0, classes, n)


def plain_cost(params, x, y, act=jnp.tanh):
    """The cost of one example, in plain JAX."""
    a = act(x @ params[0]["w"] + params[0]["b"])
    z = a @ params[2]["w"] + params[2]["b"]
    return jax.nn.logsumexp(z) - z[y]


def norms_of(cost, params, x, y):
    """Of one gradient after the other, written out."""
    each = jax.jit(jax.vmap(jax.grad(cost), (None, 0, 0)))(params, jnp.asarray(x), jnp.asarray(y))
    return np.sqrt(sum(np.sum(g.reshape(len(x), -1) ** 2, 1) for g in jax.tree.leaves(each)))


@pytest.mark.parametrize("at_once", [2**22, 200])
def test_every_figure_is_what_plain_jax_and_numpy_say(key, at_once):
    net, (x, y) = jb.mlp([5, 7, 3], jb.Relu()), data(50)
    params = jax.tree.map(lambda v: np.array(2 * v), net.init(key))
    params[0]["b"][2] = -50.0  # a dead unit
    params[0]["w"][:, 4], params[0]["b"][4] = [10, 0, 0, 0, 0], -15  # one that is on for a few
    seen = measure(net, LOSS, params, x, y, shown=4, at_once=at_once)
    assert sum(seen.chunks) == seen.examples == 50
    assert (len(seen.chunks) > 1) == (at_once == 200)
    assert seen.parameters == 5 * 7 + 7 + 7 * 3 + 3

    z1 = x @ params[0]["w"] + params[0]["b"]
    a1 = np.maximum(z1, 0)
    z2 = a1 @ params[2]["w"] + params[2]["b"]
    delta2 = np.asarray(jax.nn.softmax(z2)) - np.eye(3)[y]
    delta_a = delta2 @ params[2]["w"].T
    delta1 = delta_a * (z1 > 0)
    dense, relu, last = seen.layers
    assert [l.path for l in seen.layers] == ["layers[0]", "layers[1]", "layers[2]"]
    for layer, activations, delta in (dense, z1, delta1), (relu, a1, delta_a), (last, z2, delta2):
        a, d = np.asarray(activations), np.asarray(delta)
        for spread, truth in (layer.activations, a), (layer.deltas, d):
            assert spread.count == truth.size
            assert spread.nonfinite == 0
            assert spread.zeros == (truth == 0).mean()
            assert spread.mean == pytest.approx(truth.mean(), rel=1e-12, abs=1e-14)
            assert spread.std == pytest.approx(truth.std(), rel=1e-12)
            assert (spread.least, spread.most) == pytest.approx((truth.min(), truth.max()))
        counts, edges = np.histogram(a[a != 0], 40, (a.min(), a.max()))
        np.testing.assert_allclose(layer.activations.edges, edges)
        np.testing.assert_array_equal(layer.activations.counts, counts)
        edges = layer.deltas.edges
        assert np.all(np.diff(edges) == 0.25)
        counts, _ = np.histogram(np.log10(np.abs(d[d != 0])), edges)
        np.testing.assert_array_equal(layer.deltas.counts, counts)
        assert layer.deltas.counts.sum() == (d != 0).sum()
        assert relative(layer.delta_norms, np.linalg.norm(d, axis=1)) < 1e-12
    assert relu.units.number == 7
    assert relu.units.off == relu.units.saturated == (z1 <= 0).mean()
    assert relu.units.dead == (z1 <= 0).all(0).mean() == 1 / 7
    assert 0 < (z1[:, 4] > 0).sum() < 6
    assert dense.units is None

    def cost(params, x, y):
        return plain_cost(params, x, y, jax.nn.relu)

    norms = norms_of(cost, params, x, y)
    assert relative(seen.norms, norms) < 1e-12
    assert relative(seen.costs, jax.vmap(cost, (None, 0, 0))(params, x, y)) < 1e-12
    assert seen.outcome.mean == (np.argmax(z2, 1) == y).mean()
    order = np.argsort(norms)
    assert seen.largest.tolist() == order[::-1][:4].tolist()
    assert seen.smallest.tolist() == order[:4].tolist()
    for row, outputs in seen.outputs.items():
        assert relative(outputs, z2[row]) < 1e-12


def test_saturated_units(key):
    net, (x, y) = jb.mlp([5, 6, 3]), data(30)
    params = jax.tree.map(lambda v: np.array(4 * v), net.init(key))
    seen = measure(net, LOSS, params, x, y)
    slope = 1 - np.tanh(x @ params[0]["w"] + params[0]["b"]) ** 2
    units = seen.layers[1].units
    assert 0.1 < units.saturated == pytest.approx((slope < 0.05).mean())
    assert units.dead == units.off == 0
    (table,) = jb.diagnose.saturation(net, params, x)
    assert (units.saturated, units.dead) == pytest.approx((table.saturated, table.dead))


TOKENS = np.random.default_rng(1).integers(0, 6, (9, 5))
IMAGES = np.random.default_rng(2).normal(size=(9, 6, 6, 1))
STEPS = np.random.default_rng(3).normal(size=(9, 4, 3))
LABELS = np.arange(9) % 3
REPEATED = jb.Repeat(jb.Sequential(jb.Dense(4, 4), jb.Tanh()), 3)
ATTENDING = jb.Sequential(
    jb.Embedding(6, 4), jb.Skip(jb.Sequential(jb.LayerNorm(4), jb.multi_head_attention(4, 2))),
    jb.Dense(4, 6),
)  # fmt: skip
ANY = {
    "cnn": (jb.cnn((6, 6, 1), (2,), 3), LOSS, IMAGES, LABELS),
    "tokens": (ATTENDING, LOSS, TOKENS, np.roll(TOKENS, -1, 1)),
    "lstm": (jb.Sequential(jb.LSTM(3, 4), jb.Take(-1), jb.Dense(4, 3)), LOSS, STEPS, LABELS),
    "tied": (jb.Tied(jb.Embedding(6, 4), REPEATED), jb.FusedSoftmaxCrossEntropy(), TOKENS, TOKENS),
    "outputs": (jb.mlp([3, 4, 2]), jb.Huber(), STEPS[:, 0], STEPS[:, 1, :2]),
    "labels": (jb.mlp([3, 2]), jb.SigmoidCrossEntropy(), STEPS[:, 0], np.eye(2)[LABELS % 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", ANY)
def test_any_network(name, key):
    net, loss, x, y = ANY[name]
    params = net.init(key)
    seen = measure(net, loss, params, x, y, shown=3)

    def cost(params, x, y):
        return loss.value(jb.forward(net, params, x[None])[0], y[None])[0]

    assert relative(seen.norms, norms_of(cost, params, x, y)) < 1e-11
    flow = jb.diagnose.delta_norms(jb.backprop(net, loss, params, x, y)).norms
    assert {l.path: l.delta_norms.mean() for l in seen.weighted} == pytest.approx(flow)
    shapes = jax.eval_shape(lambda p, x: jb.activations(net, p, x), params, x)
    assert list(shapes) == [l.path for l in seen.layers]
    text = inspect(net, loss, params, x, y, shown=3)
    check_html(text)
    assert text.count("<figcaption><div>") + text.count("<figcaption><small>example") == 6
    assert ("data:image/png" in text) == (name in ("cnn", "lstm"))


class Balanced(HTMLParser):
    """Every element that is opened is closed, and nothing is loaded from elsewhere."""

    EMPTY = ("meta", "img", "br", "wbr")

    def __init__(self):
        super().__init__()
        self.open, self.words, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#")), value
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check_html(text):
    page = Balanced()
    page.feed(text)
    page.close()
    assert page.open == []
    assert "<script" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert len(text) < 2_000_000
    return " ".join(" ".join(page.words).split())


def test_the_page_says_and_shows_what_was_measured(key):
    net, (x, y) = jb.mlp([6, 7, 3]), data(40, 6)
    params, history = net.init(key), {"loss": [2.0, 1.0, 0.5], "validation_loss": [2.0, 1.0, 1.5]}
    text = inspect(
        net, LOSS, params, x, y, title="<b>Mine</b> & yours", about="of <i>old</i>", shown=2,
        history=history, classes=["a", "<script>", "c"], raw=x, image_shape=(2, 3),
        before=jax.tree.map(lambda v: 1e-3 * v, params),
    )  # fmt: skip
    words = check_html(text)
    assert "<b>Mine</b> & yours" in words
    assert "of <i>old</i>" in words
    assert text.count("data:image/png") == 4
    seen = measure(net, LOSS, params, x, y, shown=2)
    cards = words[words.index("Examples with the largest") :]
    for row in map(int, [*seen.largest, *seen.smallest]):
        share = seen.norms[row] ** 2 / (seen.norms**2).sum()
        card = re.search(f"example {row} .*?share (.*?) %", cards)
        assert f"norm {html.number(seen.norms[row])}" in card[0]
        assert card[1] == f"{100 * share:.2g}"
    places = [cards.index(f"example {row} ") for row in (*seen.largest, *seen.smallest)]
    assert places == sorted(places)
    assert "The validation loss was lowest at epoch 2 of 3, 1; it has since risen to 1.5" in words
    assert all(part in words for part in ("before training", "Learning curve", "Saturation"))
    assert f"{seen.outcome.mean:.1%}" in words
    for l in seen.layers:
        assert l.path in words
        assert html.number(l.activations.std) in words


def test_other_ways_to_show_an_example(key):
    net, (x, y) = jb.mlp([3, 4, 3]), data(20, 3)
    params = net.init(key)
    x[4, 1] = 60.0  # it has the largest gradient, and is far from the mean
    words = check_html(inspect(net, LOSS, params, x, y, features=["age", "a<b", "c"], shown=1))
    away = (60 - x[:, 1].mean()) / x[:, 1].std()
    assert f"a<b = 60 {away:+.1f} sd" in words
    words = check_html(inspect(net, LOSS, params, x, y, describe=lambda v: f"<{v[1]:.0f}>"))
    assert "<60>" in words
    words = check_html(
        inspect(jb.mlp([3, 2]), jb.SquaredError(), jb.mlp([3, 2]).init(key), x, x[:, :2],
                units=(np.array([100.0, 0.0]), np.array([10.0, 1.0])))
    )  # fmt: skip
    assert f"{html.number(100 + 10 * x[4, 0])}, 60, predicted" in words


def test_batch_norm_has_no_gradients_of_single_examples(key):
    net, (x, y) = (
        jb.Sequential(jb.Dense(5, 4), jb.BatchNorm(4), jb.Tanh(), jb.Dense(4, 3)),
        data(20),
    )
    params = net.init(key)
    seen = measure(net, LOSS, params, x, y)
    assert seen.norms is None
    z, _ = jb.forward(net, params, x)
    costs = LOSS.value(z, y)
    assert relative(seen.costs, costs) < 1e-12
    assert seen.largest.tolist() == np.argsort(-costs)[:8].tolist()
    words = check_html(inspect(net, LOSS, params, x, y))
    assert "layers[1] (BatchNorm(4)) couples the examples" in words
    assert "Examples with the largest costs" in words
    assert "Gradients of single examples" not in words
    parts = measure(net, LOSS, params, x, y, at_once=200)
    first = parts.chunks[0]
    assert len(parts.chunks) > 1
    z, _ = jb.forward(net, params, x[:first])
    assert relative(parts.costs[:first], LOSS.value(z, y[:first])) < 1e-12


def test_what_is_not_finite_is_said_and_counted(key):
    net, (x, y) = jb.mlp([5, 4, 3]), data(30)
    params = net.init(key)
    x[7, 2] = np.nan
    seen = measure(net, LOSS, params, x, y, shown=2)
    assert seen.nonfinite == "the inputs x, example 7"
    assert seen.largest[0] == 7
    assert np.flatnonzero(np.isnan(seen.norms)).tolist() == [7]
    assert seen.layers[0].activations.nonfinite == 4
    others = measure(net, LOSS, params, np.delete(x, 7, 0), np.delete(y, 7), shown=2)
    assert seen.layers[0].activations.std == pytest.approx(others.layers[0].activations.std)
    assert seen.largest[1] == np.delete(np.arange(30), 7)[others.largest[0]]
    words = check_html(inspect(net, LOSS, params, x, y, shown=2, image_shape=(1, 5)))
    assert "Not all is finite. NaN or infinity is first in the inputs x, example 7." in words
    assert "1 of 30 examples has a cost or a gradient that is not finite: 7." in words
    assert "4 not finite" in words
    assert "outputs not finite" in words
    broken = (params[0], (), {"w": params[2]["w"] * np.inf, "b": params[2]["b"]})
    words = check_html(inspect(net, LOSS, broken, *data(30)))
    assert "first in the parameters of layers[2] (Dense(4, 3))." in words
    assert [fact.kind for fact in facts(seen)][:2] == ["bad", "bad"]


def test_vanishing_deltas_in_sixty_layers(key):
    net, (x, y) = jb.mlp([5, *[4] * 60, 3], jb.Sigmoid()), data(25)
    seen = measure(net, LOSS, net.init(key), x, y, shown=0)
    assert len(seen.weighted) == 61
    first, last = (float(np.median(seen.weighted[i].delta_norms)) for i in (0, -1))
    assert 0 < first < 1e-20 * last
    (line,) = [fact for fact in facts(seen) if "Deltas" in fact.text]
    assert line.kind == "look"
    assert f"shrink {html.number(last / first)}-fold" in line.text
    assert "layers[120]" in line.text


def test_sizes_at_the_ends(key):
    one = jb.mlp([1, 1, 1])
    x = np.ones((1, 1))
    words = check_html(inspect(one, jb.SquaredError(), one.init(key), x, x))
    assert "over 1 example " in words
    wide = jb.mlp([2, 1000])
    x, y = data(30, 2, 1000)
    check_html(inspect(wide, LOSS, wide.init(key), x, y))
    many, (x, y) = jb.mlp([4, 500, 3], jb.Relu()), data(10_000, 4)
    seen = measure(many, LOSS, many.init(key), x, y)
    assert len(seen.chunks) > 1
    assert max(seen.chunks) * (1000 + 500 + 3) <= 2**22
    assert len(seen.norms) == len(seen.costs) == 10_000
    with pytest.raises(ValueError, match="there are no examples to inspect"):
        measure(many, LOSS, many.init(key), x[:0], y[:0])


def test_extremes_do_not_overlap():
    values = np.array([3.0, 1.0, np.nan, 2.0, 2.0])
    largest, smallest = extremes(values, 2)
    assert (largest.tolist(), smallest.tolist()) == ([2, 0], [1, 4])
    largest, smallest = extremes(values, 9)
    assert (largest.tolist(), smallest.tolist()) == ([2, 0, 3], [1, 4])
    assert [len(part) for part in extremes(values, 0)] == [0, 0]


def test_a_tally_in_parts_is_that_of_all(key):
    v = np.asarray(jax.random.normal(key, (90,))) * 10.0 ** np.arange(-80, 10)
    v[3], v[5] = 0, np.inf
    whole, parts = Tally(), Tally()
    whole.add(v, True)
    for part in np.split(v, [7, 50]):
        parts.add(part, True)
    a, b = whole.spread(True), parts.spread(True)
    own = v[np.isfinite(v)]
    assert (a.count, a.nonfinite, b.nonfinite) == (90, 1, 1)
    assert b.mean == pytest.approx(own.mean())
    assert b.std == pytest.approx(own.std())
    np.testing.assert_array_equal(a.counts, b.counts)
    assert b.counts.sum() == 88


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"history": {"accuracy": [1.0]}}, ValueError, 'needs a list "loss"'),
        ({"history": [1.0]}, TypeError, "history must be a dict"),
        ({"history": {"loss": ["low"]}}, TypeError, r"history\['loss'\] must be a list of numbers"),
        ({"image_shape": (2, 2)}, ValueError, "has 4 entries, but an example has 5"),
        ({"image_shape": (5, 1, 7)}, ValueError, "1 or 3 channels"),
        ({"raw": np.ones((3, 5))}, ValueError, "raw has 3 examples, but x has 20"),
        ({"features": ["a"]}, ValueError, "1 names of features"),
        ({"classes": "abc"}, TypeError, "classes must be a sequence of names"),
        ({"describe": "x"}, TypeError, "describe must be a function"),
        ({"shown": -1}, ValueError, "shown must be an int of at least 0"),
    ],
)  # fmt: skip
def test_what_makes_no_page(key, options, error, message):
    net, (x, y) = jb.mlp([5, 3]), data(20)
    with pytest.raises(error, match=message):
        inspect(net, LOSS, net.init(key), x, y, **options)


def test_without_matplotlib(key, monkeypatch):
    net, (x, y) = jb.mlp([5, 3]), data(20)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install .*\[plots\]"):
        inspect(net, LOSS, net.init(key), x, y)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    html.write(path, "old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        html.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def run(*args):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(dest="command"))
    parsed = parser.parse_args(["inspect", *map(str, args)])
    return parsed.run(parsed)


@pytest.fixture
def iris(tmp_path, as_jax_comes):
    """A network that was saved as `jbackprop train --save` does, with another order of classes."""
    net, data = jb.mlp([4, 3]), datasets.load("iris")
    params = jax.tree.map(np.asarray, net.init(jax.random.key(3)))
    mean, scale = data.x.mean(0), data.x.std(0)
    notes = {"classes": ["virginica", "setosa", "versicolor"], "mean": mean.tolist(),
             "scale": scale.tolist(), "target_mean": [0.0] * 3, "target_scale": [1.0] * 3}  # fmt: skip
    jb.save(tmp_path / "iris.npz", net, params, loss=LOSS, notes=notes)
    x = ((data.x - mean) / scale).astype("float32")
    y = np.array([1, 2, 0])[data.labels]
    return tmp_path / "iris.npz", net, params, x, y


def test_the_command_inspects_a_saved_network(iris, tmp_path, capsys):
    model, _, params, x, y = iris
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"epoch": 1, "time": "x", "loss": 2.0}\n{"epoch": 2, "time": "x", "loss": null}\n'
    )
    out = tmp_path / "iris.html"
    assert run("iris", "--model", model, "--log", log, "--out", out, "--json", "--shown", 3) == 0
    found = json.loads(capsys.readouterr().out)
    z = x @ params[0]["w"] + params[0]["b"]
    assert found["accuracy"] == pytest.approx((np.argmax(z, 1) == y).mean())
    assert found["loss"] == pytest.approx(float(LOSS.value(z, y).mean()), rel=1e-5)
    delta = np.asarray(jax.nn.softmax(z)) - np.eye(3)[y]
    norms = np.linalg.norm(delta, axis=1) * np.sqrt(1 + (x**2).sum(1))
    assert found["norms"]["most"] == pytest.approx(norms.max(), rel=1e-5)
    assert found["largest"] == np.argsort(-norms, kind="stable")[:3].tolist()
    assert found["page"] == str(out)
    words = check_html(out.read_text())
    assert "iris.npz on iris" in words
    assert "Learning curve" in words
    assert "versicolor" in words


def test_the_command_trains_or_takes_a_fresh_network(tmp_path, capsys, as_jax_comes):
    out = tmp_path / "digits.html"
    common = ("digits", "--hidden", 16, "--out", out, "--json", "--examples", 300, "--shown", 2)
    assert run(*common) == 0
    fresh = json.loads(capsys.readouterr().out)
    assert (fresh["examples"], fresh["delta_norms_before"]) == (300, {})
    text = out.read_text()
    assert text.count("data:image/png") == 4
    assert all(f"example {row:,}<" in text for row in fresh["largest"] + fresh["smallest"])
    assert max(fresh["largest"] + fresh["smallest"]) >= 300
    assert "A fresh network" in out.read_text()
    assert run(*common, "--train", 3) == 0
    trained = json.loads(capsys.readouterr().out)
    assert trained["accuracy"] > fresh["accuracy"] + 0.3
    assert set(trained["delta_norms_before"]) == {"layers[0]", "layers[2]"}
    assert any("validation loss fell" in fact["text"] for fact in trained["facts"])
    assert "Learning curve" in check_html(out.read_text())


def test_the_command_shows_real_targets_in_their_own_units(tmp_path, capsys, as_jax_comes):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 2))
    np.savez(tmp_path / "a.npz", x=x, y=1000 + 10 * x[:, 0])
    out = tmp_path / "a.html"
    assert run(tmp_path / "a.npz", "--out", out) == 0
    assert f"The page is {out}." in capsys.readouterr().out
    targets = re.findall(r"([\d,.]+), predicted", check_html(out.read_text()))
    assert len(targets) == 16
    assert all(960 < float(t.replace(",", "")) < 1040 for t in targets)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("iris", "--out", "page.txt"), "must end in .html"),
        (("iris", "--out", "no/such/page.html"), "there is no folder"),
        (("nothing.csv",), "there is no such file"),
        (("iris", "--model", "none.npz"), "none.npz"),
        (("iris", "--log", "log.txt"), "must end in .csv or .jsonl"),
        (("iris", "--log", "bad.csv"), "it is no log of a training"),
        (("iris", "--log", "bad.jsonl"), "it is no log"),
        (("iris", "--train", "1", "--log", "bad.csv"), "leave --log out"),
        (("iris", "--image", "3x3"), "has 9 entries, but an example has 4"),
        (("iris", "--model", "{iris}", "--hidden", "4"), "--hidden is for a network made here"),
        (("iris", "--model", "{iris}", "--raw"), "--raw is for a network made here"),
        (("wine", "--model", "{iris}"), "has the class 'class_0', which"),
        (("other.csv", "--model", "{iris}"), "was trained on 4 features, but other.csv has 1"),
        (("iris", "--model", "{iris}", "--shape", "3x3"), "--shape 3x3 has 9 entries"),
        (("diabetes", "--loss", "softmax"), "needs classes"),
    ],
)  # fmt: skip
def test_commands_that_make_no_sense_write_nothing(args, message, iris, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "other.csv").write_text("a,y\n1,setosa\n2,virginica\n")
    (tmp_path / "inspect.html").write_text("old")
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as caught:
        run(*(arg.format(iris=iris[0]) for arg in args))
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "inspect.html").read_text() == "old"
