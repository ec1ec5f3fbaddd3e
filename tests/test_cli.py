"""The command line, as a user types it."""

import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jbackprop as jb
from jbackprop import catalogue, check, cli, datasets
from jbackprop.cli.output import print_json

pytestmark = pytest.mark.newest


def run(*args, cwd=None):
    """In a process of its own, with JAX as it comes."""
    return subprocess.run(
        [sys.executable, "-m", "jbackprop", *map(str, args)],
        capture_output=True, text=True, timeout=300, check=False, cwd=cwd,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": os.environ.get("JBACKPROP_TEST_CACHE", ".cache/jax")},
    )  # fmt: skip


@pytest.mark.as_shipped
def test_demo_learns_the_digits_and_proves_it(tmp_path):
    done = run("demo", "--quick", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True
    assert found["test_accuracy"] >= 0.97
    assert found["worst_relative_error"]["float64"] <= 1e-12
    assert found["training_seconds"] < 30
    assert list(found["delta_norms"]["after"]) == ["layers[0]", "layers[2]", "layers[4]"]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.as_shipped
def test_demo_is_no_lucky_seed(tmp_path):
    done = run("demo", "--quick", "--out", tmp_path, "--seed", 1)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"test (\d+\.\d)%", done.stdout)[1])
    assert accuracy >= 97
    assert done.stdout.count("right") >= 22
    assert "WRONG" not in done.stdout


def test_train_on_a_data_set_and_save(tmp_path):
    path = tmp_path / "model.npz"
    done = run(
        "train", "iris", "--epochs", 80, "--hidden", "16,8", "--quiet", "--save", path, "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["test"]["accuracy"] > 0.9
    assert len(found["history"]["loss"]) == found["epochs"] == 80
    saved = jb.load(path)
    assert saved.net == jb.mlp([4, 16, 8, 3])
    assert saved.loss == jb.SoftmaxCrossEntropy()
    assert saved.notes["classes"] == ["setosa", "versicolor", "virginica"]
    assert saved.notes["target_scale"] == [1, 1, 1]
    data = datasets.load("iris")
    test = datasets.split(150, (0.1, 0.2), 0)[2]
    x = ((data.x[test] - saved.notes["mean"]) / saved.notes["scale"]).astype("float32")
    p = jb.predict(saved.net, saved.loss, saved.params, x)
    assert np.mean(np.asarray(p).argmax(1) == data.labels[test]) == pytest.approx(
        found["test"]["accuracy"]
    )


def test_train_on_csv_with_words_as_classes(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["height,kind,weight"]
    for _ in range(60):
        big = rng.integers(2)
        rows.append(f"{big + rng.normal() / 9:.3f},{'cat' if big else 'mouse'},{rng.normal():.3f}")
    path = tmp_path / "animals.csv"
    path.write_text("\n".join(rows))
    done = run(
        "train",
        path,
        "--target",
        "kind",
        "--quiet",
        "--epochs",
        60,
        "--loss",
        "sigmoid",
        "--hidden",
        "none",
    )
    assert done.returncode == 0, done.stderr
    assert "2 classes" in done.stdout
    data = datasets.load(str(path), "kind")
    assert data.classes == ("cat", "mouse")
    assert data.x.shape == (60, 2)


def test_train_on_npz_with_real_targets(tmp_path):
    x = np.random.default_rng(0).normal(size=(80, 3))
    np.savez(tmp_path / "a.npz", x=x, y=np.stack([x[:, 0], x.sum(1)], 1))
    args = ("--quiet", "--patience", 30, "--epochs", 400, "--learning-rate", 0.01, "--json")
    done = run("train", tmp_path / "a.npz", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["absolute_error"] < 0.2


def test_whole_numbers_stay_numbers_for_real_losses(tmp_path):
    """10, 20 and 40 are not 0, 1 and 2: the loss decides whether targets are classes."""
    path = tmp_path / "gaps.csv"
    path.write_text("a,y\n" + "\n".join(f"{i},{(10, 20, 40)[i % 3]}" for i in range(30)))
    data = datasets.load(str(path))
    assert data.classes == ("10", "20", "40")
    np.testing.assert_array_equal(data.values[:3], [[10], [20], [40]])
    y, outputs = cli.train.targets_of(data, jb.PoissonNLL())
    assert outputs == 1
    np.testing.assert_array_equal(y[:3], [[10], [20], [40]])
    assert cli.train.targets_of(data, jb.SoftmaxCrossEntropy())[0].tolist()[:3] == [0, 1, 2]


def test_large_features_keep_their_differences(tmp_path):
    path = tmp_path / "times.csv"
    path.write_text("t,y\n" + "\n".join(f"{1600000000 + i},{i}.5" for i in range(60)))
    assert len(np.unique(datasets.load(str(path)).x)) == 60


def test_two_targets_are_standardised_each_by_itself(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 2))
    np.savez(tmp_path / "a.npz", x=x, y=np.stack([1e6 + 10 * x[:, 0], x[:, 1]], 1))
    args = ("--quiet", "--epochs", 200, "--learning-rate", 0.01, "--json", "--hidden", "none")
    done = run("train", tmp_path / "a.npz", *args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["absolute_error"] < 0.5


def test_json_has_no_infinity(capsys):
    print_json({"a": [1.0, float("inf")], "b": float("nan")})
    assert json.loads(capsys.readouterr().out) == {"a": [1.0, None], "b": None}


@pytest.mark.parametrize(
    "text",
    ["a;b\n1;x\n2;y\n", "\ufeffa\tb\n\n1\tx\n2\ty\n", "1,x\n2,y\n", '"a","b"\n1,"x"\n2,"y"\n'],
)
def test_csv_dialects(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8")
    data = datasets.load(str(path))
    assert data.x.tolist() == [[1.0], [2.0]]
    assert data.labels.tolist() == [0, 1]
    assert data.classes == ("x", "y")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", "line 3: 1 cells, but 2 were expected"),
        ("a,b\n1,2\nx,3\n", "line 3, column 'a': 'x' is not a number"),
        ("a,b\n", "at least two rows"),
        ("a,b\nnan,1\n2,3\n", r"x[0, 0] is nan"),
        ("a,y\n1,0\n2,\n3,1\n", "line 3, column 'y': '' is not a number"),
        ("a,y\n1,0\n\n2,?\n3,1\n", "line 4, column 'y': '?' is not a number, as most"),
        ("a,y\n" + "".join(f"{i},w{i}\n" for i in range(20)), "20 different ones in 20 rows"),
        ("a\n1\n2\n", "there is one column, 'a'"),
        ("a,b\n1,x\n2,x\n", "all targets are x"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        datasets.load(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (("train", "nothing.csv"), 1, "there is no such file"),
        (("train", "iris", "--target", "x", "--save", "a.txt"), 1, "must end in .npz"),
        (("train", "iris", "--save", "no/such/a.npz"), 1, "there is no folder"),
        (("train", "iris", "--loss", "sigmoid"), 1, "needs two"),
        (("train", "diabetes", "--loss", "softmax"), 1, "needs classes"),
        (("train", "iris", "--hidden", "0"), 2, "must be at least 1"),
        (("train", "iris", "--batch-size", "0"), 2, "must be at least 1"),
        (("train", "iris", "--learning-rate", "-1"), 2, "must be positive"),
        (("train", "iris", "--shares", "0.9,0.9"), 2, "must be two shares"),
        (("train", "iris", "--activation", "step"), 2, "invalid choice"),
        (("train", "iris", "--nonsense"), 2, "unrecognized arguments: --nonsense"),
        (("check", "--only", "nothing at all"), 1, "no rule contains that"),
        ((), 2, "required"),
    ],
)
def test_usage_that_makes_no_sense(args, status, message, capsys):
    try:
        got = cli.main(args)
    except SystemExit as stop:
        got = stop.code
    assert got == status
    assert message in capsys.readouterr().err


def test_help_is_worth_reading(capsys):
    for command, words in (
        ((), ("demo", "train", "inspect", "check", "bench")),
        (("train",), ("--hidden", "--loss", "examples:", "digits", "what --save writes")),
        (("check",), ("exit status",)),
        (("bench",), ("jax.value_and_grad", "compare", "--quick")),
        (("demo",), ("--epochs", "default: 40")),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words), text


def test_check_as_a_table_and_as_json(capsys):
    assert cli.main(["check", "--only", "Softsign"]) == 0
    text = capsys.readouterr().out
    assert "rules are right" in text
    assert cli.main(["check", "--only", "Huber", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert len(found["rules"]) == 2


def test_check_fails_where_a_rule_is_wrong(monkeypatch, capsys):
    case = catalogue.cases()[0]
    wrong = check.Report("net.w", "gradient", own="wrong", figures=check.Figures(0.5, 1e-12))
    monkeypatch.setattr(catalogue, "cases", lambda: [case])
    monkeypatch.setattr(catalogue.Case, "check", lambda *a: wrong)
    assert cli.main(["check"]) == 1
    assert "WRONG" in capsys.readouterr().out


MINE = """
import jax, jax.numpy as jnp
import jbackprop as jb

@jax.custom_vjp
def swish(z):
    return z * jax.nn.sigmoid(z)

def swish_bwd(z, delta):
    s = jax.nn.sigmoid(z)
    return (delta * s,)  # z s (1 - s) is forgotten

swish.defvjp(lambda z: (swish(z), z), swish_bwd)
Z = jnp.linspace(-3.0, 3.0, 20)

def wrong():
    return jb.check.vjp(swish, Z)

def right():
    return [jb.check.vjp(jax.nn.silu, Z), jb.check.jvp(jax.nn.silu, Z)]

def asserting():
    jb.check.assert_vjp(swish, Z)

def nothing():
    jb.check.assert_vjp(jnp.tanh, Z)
"""


def test_check_runs_a_check_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    done = run("check", "mine:wrong", cwd=tmp_path)
    assert done.returncode == 1
    assert "jb.check.vjp swish: WRONG" in done.stdout
    assert "worst entry" in done.stdout
    done = run("check", tmp_path / "mine.py:right", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert [report["verdict"] for report in found["reports"]] == ["right", "right"]


def test_check_of_ones_own_that_cannot_be_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "ours.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for target, message in (
        ("ours:asserting", "swish: WRONG"),
        ("ours:nothing", "must return a Report"),
        ("ours:missing", "there is no missing in ours"),
        ("ours", "give module:function"),
        ("nowhere:wrong", "No module named 'nowhere'"),
        ("nowhere.py:wrong", "nowhere.py"),
    ):
        assert cli.main(["check", target]) == 1
        assert message in capsys.readouterr().err, target
    assert cli.main(["check", "ours:right", "--only", "Tanh"]) == 1
    assert "--only" in capsys.readouterr().err


@pytest.mark.as_shipped
def test_bench_prints_a_table_and_compare_two_runs(tmp_path, capsys, as_jax_comes):
    one = ["bench", "--only", "784-128-10 tanh", "--seconds", "0.05", "--no-peers", "--out"]
    with jax.numpy_rank_promotion("allow"):
        assert cli.main([*one, str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "jax.value_and_grad" in text
    assert "time / unit" in text
    file = str(tmp_path / "a" / "results.json")
    assert cli.main(["bench", "compare", file, file]) == 0
    assert "slower" not in capsys.readouterr().out
    assert cli.main(["bench", "compare", file, file, "--json"]) == 0
    changes = json.loads(capsys.readouterr().out)
    assert {change["change"] for change in changes} == {1.0}
    assert cli.main(["bench", "compare", file, str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_bench_lists_its_workloads(capsys):
    assert cli.main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    assert "--quick" in text
    assert "scaling in vocabulary" in text
    assert cli.main(["bench", "--only", "nobody", "--list"]) == 1
    assert "no workload contains that" in capsys.readouterr().err


def test_train_goes_on_and_logs(tmp_path, capsys, as_jax_comes):
    common = ["train", "iris", "--quiet", "--json", "--checkpoints", str(tmp_path / "run")]
    common += ["--log", str(tmp_path / "log.csv")]
    assert cli.main([*common, "--epochs", "2"]) == 0
    capsys.readouterr()
    assert cli.main([*common, "--epochs", "4"]) == 0
    gone_on = json.loads(capsys.readouterr().out)["history"]
    assert cli.main(["train", "iris", "--quiet", "--json", "--epochs", "4"]) == 0
    assert gone_on == json.loads(capsys.readouterr().out)["history"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5
    assert cli.main([*common, "--epochs", "4", "--hidden", "8"]) == 1
    assert "has another run: network" in capsys.readouterr().err
    assert cli.main(["train", "iris", "--quiet", "--log", "log.txt"]) == 1
    assert "the name must end in .csv or .jsonl" in capsys.readouterr().err
