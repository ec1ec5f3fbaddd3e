"""Logs of training: read back as a user would, after kills, resumptions and full disks."""

import builtins
import csv
import gc
import json
import math
import os
import resource
import shutil
import struct

import jax
import numpy as np
import optax
import pytest

import jbackprop as jb
from jbackprop.train.fit import Epoch

pytestmark = pytest.mark.newest

NAMES = ("loss", "top 5, of ten", "validation_loss")
NUMBERS = [
    (0.1, 1 / 3, math.nan),
    (1e300, -math.inf, 5e-324),
    (2.0, math.pi, math.inf),
    (-0.0, 1e-45, 123456789.123),
    (7.0, 8.0, 9.0),
]


def history(n, numbers=NUMBERS, names=NAMES):
    return {name: [row[i] for row in numbers[:n]] for i, name in enumerate(names)}


def train(logger, first, last, numbers=NUMBERS, names=NAMES):
    for number in range(first, last + 1):
        assert not logger(Epoch(number, None, None, history(number, numbers, names)))


def read_csv(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("time")
    return [{name: float(cell) for name, cell in row.items()} for row in rows]


def refuse_constant(text):
    raise AssertionError(f"{text} is not JSON")


def read_json(path):
    rows = [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().split("\n")[:-1]]  # fmt: skip
    for row in rows:
        row.pop("time")
    return [{name: float(value) for name, value in row.items()} for row in rows]


def events(path):
    """The events of a file, by the format's description; both checks are looked at."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    content = path.read_bytes()
    while len(content) >= 12:
        length, check = content[:8], content[8:12]
        (n,) = struct.unpack("<Q", length)
        if len(content) < n + 16:
            return  # killed while writing
        data, data_check = content[12 : 12 + n], content[12 + n : 16 + n]
        assert struct.unpack("<I", check) == (masked_crc32c(length),)
        assert struct.unpack("<I", data_check) == (masked_crc32c(data),)
        yield Event.FromString(data)
        content = content[16 + n :]


def read_events(folder):
    """What TensorBoard shows: a START at a step makes it forget that step and all later ones."""
    shown = []
    for path in sorted(folder.iterdir()):
        for number, event in enumerate(events(path)):
            assert (event.file_version == "brain.Event:2") == (number == 0)
            if event.HasField("session_log"):
                assert event.session_log.status == event.session_log.START
                shown = [row for row in shown if row["epoch"] < event.step]
            for value in event.summary.value:
                if not shown or shown[-1]["epoch"] != event.step or value.tag in shown[-1]:
                    shown.append({"epoch": event.step})
                shown[-1][value.tag] = value.simple_value
    return shown


class Kind:
    def __init__(self, name, make, read, single=False):
        self.name, self.make, self.read, self.single = name, make, read, single

    def expected(self, first, last, numbers=NUMBERS, names=NAMES):
        with np.errstate(over="ignore", under="ignore"):
            rows = [[float(np.float32(v)) if self.single else v for v in row] for row in numbers]
        return [{"epoch": n} | dict(zip(names, rows[n - 1], strict=True)) for n in range(first, last + 1)]  # fmt: skip

    def shows(self, path, *args, **kwargs):
        """Whether the file has these epochs, each once, and every bit of their numbers."""
        assert [list(row) for row in self.read(path)] == [list(row) for row in self.expected(*args, **kwargs)]  # fmt: skip
        return repr([[float(v) for v in row.values()] for row in self.read(path)]) == repr(
            [[float(v) for v in row.values()] for row in self.expected(*args, **kwargs)]
        )


TEXTS = [
    Kind("csv", jb.CSVLogger, read_csv),
    Kind("jsonl", jb.JSONLinesLogger, read_json),
]
KINDS = [*TEXTS, Kind("tensorboard", jb.TensorBoardLogger, read_events, single=True)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
every_text = pytest.mark.parametrize("kind", TEXTS, ids=lambda k: k.name)


@every_kind
def test_each_epoch_is_there_at_once_and_exactly(kind, tmp_path):
    logger = kind.make(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    for number in range(1, len(NUMBERS) + 1):
        train(logger, number, number)
        assert kind.shows(tmp_path / "log", 1, number)


@every_kind
@pytest.mark.parametrize("again", [2, 4, 5])
def test_a_run_that_goes_on_has_every_epoch_once(kind, again, tmp_path):
    train(kind.make(tmp_path / "log"), 1, 4)
    other = [*NUMBERS[: again - 1], *[(20.0 + i, 0.0, 1.0) for i in range(6 - again)]]
    logger = kind.make(str(tmp_path / "log"))
    train(logger, again, again, other)
    assert kind.shows(tmp_path / "log", 1, again, other)
    train(logger, again + 1, 5, other)
    assert kind.shows(tmp_path / "log", 1, 5, other)


@every_kind
def test_epochs_that_were_replaced_do_not_come_back(kind, tmp_path):
    train(kind.make(tmp_path / "log"), 1, 4)
    train(kind.make(tmp_path / "log"), 2, 2)
    assert kind.shows(tmp_path / "log", 1, 2)
    train(kind.make(tmp_path / "log"), 5, 5)
    assert kind.shows(tmp_path / "log", 1, 5)


@every_text
@pytest.mark.parametrize("again", [3, 4])
def test_killed_at_any_byte_the_next_process_mends_it(kind, again, tmp_path):
    path = tmp_path / "log"
    train(kind.make(path), 1, 3)
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        train(kind.make(path), again, 5)
        assert kind.shows(path, 1, 5), cut


def test_killed_at_any_byte_tensorboard_has_every_epoch_once(tmp_path):
    kind = KINDS[-1]
    path = tmp_path / "log"
    train(kind.make(path), 1, 3)
    (file,) = path.iterdir()
    content = file.read_bytes()
    for cut in range(0, len(content) + 1, 3):
        file.write_bytes(content[:cut])
        train(kind.make(path), 4, 5)
        assert kind.shows(path, 1, 5), cut
        for other in set(path.iterdir()) - {file}:
            other.unlink()


@every_text
def test_times_are_kept_and_tell_when(kind, tmp_path):
    path = tmp_path / "log"
    train(kind.make(path), 1, 2)
    lines = path.read_bytes().splitlines()[-2:]
    train(kind.make(path), 4, 4)
    after = path.read_bytes().splitlines()[-4:]
    assert after[:2] == lines
    if kind.name == "csv":
        times = [row["time"] for row in csv.DictReader(path.read_text().splitlines())]
    else:
        times = [json.loads(line)["time"] for line in after]
    assert not times[2]  # filled in
    stamps = [np.datetime64(times[i].removesuffix("+00:00")) for i in (0, 1, 3)]
    assert stamps == sorted(stamps)
    assert abs(np.datetime64("now") - stamps[-1]) < np.timedelta64(60, "s")


@every_kind
def test_the_log_of_another_run_is_refused_and_left(kind, tmp_path):
    path = tmp_path / "log"
    train(kind.make(path), 1, 3)
    reasons = {
        "epochs 1 to 3, and training is at 1": lambda log: train(log, 1, 1),
        "has loss, .* and this run loss, accuracy$|accuracy": lambda log: train(log, 3, 3, [(0.1, 1.0)] * 3, ("loss", "accuracy")),
        "has loss .* at epoch 2, and this run 0.5": lambda log: train(log, 3, 3, [(0.5, *row[1:]) for row in NUMBERS]),
    }  # fmt: skip
    for reason, begin in reasons.items():
        with pytest.raises(FileExistsError, match=rf"(?s)log is the log of another run.*{reason}"):
            begin(kind.make(path))
        assert kind.shows(path, 1, 3)


@every_kind
def test_overwrite_replaces_the_log_of_another_run_and_goes_on_with_its_own(kind, tmp_path):
    path = tmp_path / "log"
    train(kind.make(path), 1, 4)
    other = [(9.0, *row[1:]) for row in NUMBERS]
    train(kind.make(path, overwrite=True), 1, 2, other)
    assert kind.shows(path, 1, 2, other)
    train(kind.make(path, overwrite=True), 3, 3, other)
    assert kind.shows(path, 1, 3, other)
    pairs = [(1.0, 0.5)] * 4
    train(kind.make(path, overwrite=True), 4, 4, pairs, ("loss", "accuracy"))
    assert kind.shows(path, 1, 4, pairs, ("loss", "accuracy"))


@every_kind
def test_one_logger_in_two_fits_does_not_mix_them(kind, tmp_path):
    logger = kind.make(tmp_path / "log")
    train(logger, 1, 2)
    with pytest.raises(FileExistsError, match="another run"):
        train(logger, 1, 1)
    assert kind.shows(tmp_path / "log", 1, 2)


@every_text
@pytest.mark.parametrize(
    "content", [b"x", b"my notes\n", b"time,loss\n1,2\n", b"\xff\xfe\n", b"{}\n", b"[1]\n", b"\n"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_a_log_is_refused_before_training(kind, content, overwrite, tmp_path):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(FileExistsError, match=r"log is not a log of .*Logger.*another path"):
        kind.make(tmp_path / "log", overwrite=overwrite)
    assert (tmp_path / "log").read_bytes() == content


@every_text
def test_a_damaged_log_is_refused_with_its_line(kind, tmp_path):
    path = tmp_path / "log"
    train(kind.make(path), 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    head = len(lines) - 3
    damages = [
        [*lines[:-2], b"what?\n", lines[-1]],
        [*lines[:-2], lines[-2][:-5] + b"\xff\n", lines[-1]],
        [*lines[:-2], lines[-1], lines[-2]],
        [*lines[:-2], lines[-1], lines[-1]],
        [*lines[:-2], lines[-2].rpartition(b",")[0] + b"\n", lines[-1]],
    ]
    for damaged in damages:
        path.write_bytes(b"".join(damaged))
        with pytest.raises(FileExistsError, match=r"as it was written: after line \d"):
            kind.make(path)
    path.write_bytes(b"".join(damages[0]))
    with pytest.raises(FileExistsError, match=f"after line {head + 1}, "):
        kind.make(path)


def test_a_file_that_was_saved_with_windows_line_ends_is_gone_on_with(tmp_path):
    path = tmp_path / "log"
    train(jb.CSVLogger(path), 1, 3)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    train(jb.CSVLogger(path), 4, 4)
    assert TEXTS[0].shows(path, 1, 4)


@every_kind
def test_folders_that_are_not_there_are_named_before_training(kind, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        kind.make(tmp_path / "missing" / "log")
    wrong = tmp_path if kind in TEXTS else tmp_path / "a file"
    (tmp_path / "a file").touch()
    with pytest.raises(OSError, match=wrong.name):
        kind.make(wrong)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
@every_kind
def test_what_cannot_be_written_is_named_before_training(kind, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="log cannot be written"):
        kind.make(tmp_path / "log")


@every_kind
def test_a_full_disk_costs_no_training_and_the_log_has_all_afterwards(kind, tmp_path):
    path = tmp_path / "log"
    logger = kind.make(path)
    train(logger, 1, 2)
    file = path if path.is_file() else next(path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 9, limits[1]))
    try:
        for number in (3, 4):
            with pytest.warns(RuntimeWarning, match=rf"epoch {number} is not in the log yet.*log"):
                train(logger, number, number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(logger, 5, 5)
    assert kind.shows(path, 1, 5)


@every_kind
def test_a_full_disk_at_the_first_epoch_stops_training(kind, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    logger = kind.make(tmp_path / "log")
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="log"):
            train(logger, 1, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(logger, 1, 2)  # it can be tried again
    assert kind.shows(tmp_path / "log", 1, 2)


@every_kind
def test_a_folder_that_vanishes_costs_no_training_and_no_epoch(kind, tmp_path):
    path = tmp_path / "runs" / "log"
    path.parent.mkdir()
    logger = kind.make(path)
    train(logger, 1, 2)
    shutil.rmtree(path.parent)
    with pytest.warns(RuntimeWarning, match="epoch 3 is not in the log yet.*runs/log"):
        train(logger, 3, 3)
    path.parent.mkdir()
    train(logger, 4, 4)
    assert kind.shows(path, 1, 4)
    path.unlink() if path.is_file() else shutil.rmtree(path)
    train(logger, 5, 5)
    assert kind.shows(path, 1, 5)


@every_kind
def test_a_history_that_was_not_restored_is_logged_from_where_it_begins(kind, tmp_path):
    values = {name: of[2:] for name, of in history(3).items()}
    kind.make(tmp_path / "log")(Epoch(3, None, None, values))
    assert kind.shows(tmp_path / "log", 3, 3)
    train(kind.make(tmp_path / "log"), 4, 4)
    assert kind.shows(tmp_path / "log", 3, 4)


@every_kind
def test_names_that_come_or_go_in_mid_training_are_said(kind, tmp_path):
    logger = kind.make(tmp_path / "log")
    train(logger, 1, 1, names=("loss", "goes", "stays"))
    values = {"loss": [0.1, 2.0], "goes": [1 / 3], "stays": [1.0, 1.0], "comes": [4.0]}
    with pytest.warns(RuntimeWarning, match="not logged, for want of a value.*: comes, goes$"):
        logger(Epoch(2, None, None, values))
    if kind.name == "csv":
        assert (tmp_path / "log").read_text().splitlines()[-1].endswith("+00:00,2.0,,1.0")
    else:
        assert kind.read(tmp_path / "log")[-1] == {"epoch": 2, "loss": 2.0, "stays": 1.0}


@every_kind
@pytest.mark.parametrize("name", ["epoch", "time"])
def test_a_metric_with_the_name_of_another_column_is_refused(kind, name, tmp_path):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        kind.make(tmp_path / "log")(Epoch(1, None, None, {"loss": [1.0], name: [1.0]}))
    assert not (tmp_path / "log").exists()


@every_kind
def test_only_the_first_of_several_processes_writes(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    train(kind.make(tmp_path / "nowhere" / "log"), 1, 2)
    assert not list(tmp_path.iterdir())


def test_without_tensorboardx_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'jbackprop\[tensorboard\]'"):
        jb.TensorBoardLogger(tmp_path / "log")


def test_tensorboard_files_are_closed_and_those_of_others_left_alone(tmp_path):
    (tmp_path / "events.out.tfevents.1.other").write_bytes(b"of another writer")
    logger = jb.TensorBoardLogger(tmp_path)
    train(logger, 1, 1)
    (own,) = tmp_path.glob("*.jbackprop")
    assert [event.HasField("session_log") for event in events(own)] == [False, False]
    before = logger._close
    own.unlink()
    train(logger, 2, 2)  # into another file
    assert not before.alive
    close = logger._close
    del logger
    gc.collect()
    assert not close.alive
    assert (tmp_path / "events.out.tfevents.1.other").read_bytes() == b"of another writer"


def test_numpy_and_pandas_read_the_logs_of_a_fit(tmp_path):
    import pandas

    net = jb.mlp([3, 2], activation=jb.Tanh())
    params = net.init(jax.random.key(0))
    x, y = np.ones((4, 3)), np.zeros((4, 2))
    logs = [kind.make(tmp_path / kind.name) for kind in KINDS]
    result = jb.fit(
        net, jb.SquaredError(), params, (x, y), optax.sgd(0.1), epochs=3, key=jax.random.key(0),
        validation=(x, y), callbacks=logs, progress=False,
    )  # fmt: skip
    assert result.stopped == "finished"
    read = [
        np.genfromtxt(tmp_path / "csv", delimiter=",", names=True),
        pandas.read_csv(tmp_path / "csv"),
        pandas.read_json(tmp_path / "jsonl", lines=True),
    ]
    for log in read:
        assert list(log["epoch"]) == [1, 2, 3]
        for name, values in result.history.items():
            assert np.asarray(log[name]).tolist() == pytest.approx(values, rel=1e-15)
    shown = read_events(tmp_path / "tensorboard")
    assert [row["loss"] for row in shown] == [np.float32(v) for v in result.history["loss"]]


def test_pandas_reads_what_is_not_finite(tmp_path):
    import pandas

    for kind, read in zip(TEXTS, (pandas.read_csv, pandas.read_json), strict=True):
        path = tmp_path / kind.name
        train(kind.make(path), 1, 3)
        log = read(path, **({"lines": True} if kind.name == "jsonl" else {}))
        assert log["validation_loss"].dtype == np.float64
        assert math.isnan(log["validation_loss"][0])
        assert log["validation_loss"][2] == math.inf
        assert log["top 5, of ten"][1] == -math.inf


@every_kind
def test_a_run_killed_behind_its_first_row_goes_on_from_a_checkpoint_before_it(kind, tmp_path):
    path = tmp_path / "log"
    train(kind.make(path), 1, 1)
    train(kind.make(path), 1, 3)
    assert kind.shows(path, 1, 3)
    other = tmp_path / "other"
    train(kind.make(other), 1, 1, [(0.25, *NUMBERS[0][1:])])
    with pytest.raises(FileExistsError, match="another run"):
        train(kind.make(other), 1, 1)
