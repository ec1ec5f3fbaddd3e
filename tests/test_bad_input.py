"""Bad input: each with a message of its own that names the place and the fix."""

import inspect
import re
import traceback
from pathlib import Path

import bad_input_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbackprop as jb

NET = jb.mlp([4, 5, 3])
LOSS = jb.SoftmaxCrossEntropy()
PARAMS = NET.init(jax.random.key(0))
X, Y = jnp.ones((6, 4)), jnp.zeros(6, int)
OTHER = jb.mlp([4, 6, 3]).init(jax.random.key(0))


def backprop(net=NET, loss=LOSS, params=PARAMS, x=X, y=Y, **options):
    return jb.backprop(net, loss, params, x, y, **options)


def fit(net=NET, loss=LOSS, params=PARAMS, x=X, y=Y, optimizer=None, **options):
    options = {"epochs": 1, "key": jax.random.key(0), "progress": False} | options
    return jb.fit(net, loss, params, (x, y), optimizer or optax.sgd(0.1), **options)


class Swapped(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"w": jb.Outer.of(delta, trace.x)}


class NoPair(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"b": delta}


class Shrunk(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x[:1], pairs


class Told(jb.Dense):
    """A rule that gives something else."""

    def backward(self, params, trace, delta):
        return self.given(*super().backward(params, trace, delta))


class OneOfTwo(Told):
    def given(self, delta_x, pairs):
        return delta_x


class Three(Told):
    def given(self, delta_x, pairs):
        return delta_x, pairs, None


class OneShort(Told):
    def given(self, delta_x, pairs):
        return delta_x, {"w": pairs["w"]}


class NoDelta(Told):
    def given(self, delta_x, pairs):
        return None, pairs


def with_rule(layer, call=backprop):
    net = jb.Sequential(jb.Dense(4, 5), layer(5, 3))
    return call(net=net, params=net.init(jax.random.key(0)))


def check(net, params):
    return jb.check.network(net, LOSS, params, X, Y)


class Coupled(jb.Identity):
    couples_examples = True


class Summed(jb.SoftmaxCrossEntropy):
    def value_and_delta(self, z, y):
        return jnp.sum(self.value(z, y)), self.delta(z, y)


def mismatched():
    net = jb.Sequential(jb.Dense(4, 5), jb.Tanh(), jb.Dense(6, 3))
    return net, net.init(jax.random.key(0))


CASES = {
    "feature count": (
        lambda: backprop(x=jnp.ones((6, 7))),
        ValueError,
        r"Dense\(4, 5\) needs 4 features on the last axis.*\(7,\)",
        "layers[0]: Dense(4, 5)",
    ),
    "an image": (
        lambda: backprop(x=jnp.ones((6, 2, 2))),
        ValueError,
        r"flatten each example first: x.reshape\(len\(x\), -1\)",
        "layers[0]",
    ),
    "rank: one example without a batch axis": (
        lambda: backprop(x=jnp.ones(4), y=jnp.zeros(4, int)),
        ValueError,
        r"batch axis: x\[None\]",
        "layers[0]",
    ),
    "rank: a scalar": (lambda: backprop(x=jnp.ones(())), ValueError, "need a batch axis", None),
    "integers": (
        lambda: backprop(x=jnp.ones((6, 4), int)),
        TypeError,
        r"floating-point inputs, not int",
        "layers[0]",
    ),
    "integers into an activation": (
        lambda: backprop(net=jb.Tanh(), params=(), x=jnp.ones((6, 4), int)),
        TypeError,
        "floating-point inputs, not int",
        None,
    ),
    "labels out of range": (
        lambda: backprop(y=Y.at[4].set(3)),
        ValueError,
        r"y\[4\] is 3; 1 of 6",
        None,
    ),
    "labels that are floats": (
        lambda: backprop(y=jnp.zeros(6)),
        TypeError,
        r"y.astype\('int32'\)",
        None,
    ),
    "targets of another shape": (
        lambda: backprop(y=jnp.zeros((6, 2))),
        ValueError,
        r"\(6, 2\), but outputs \(6, 3\)",
        None,
    ),
    "another number of targets": (
        lambda: backprop(y=Y[:5]),
        ValueError,
        "x has 6 examples, but the targets y have 5",
        None,
    ),
    "integer parameters": (
        lambda: backprop(params=jax.tree.map(lambda p: p.astype(int), PARAMS)),
        TypeError,
        r"params\[0\]\['b'\] has the dtype int64: parameters must be floating",
        None,
    ),
    "lists": (lambda: backprop(x=[[1.0] * 4]), TypeError, "must be arrays", None),
    "no targets": (lambda: backprop(y=None), TypeError, "must be arrays", None),
    "operands that are swapped": (
        lambda: backprop(net=Swapped(4, 3), params=jb.Dense(4, 3).init(jax.random.key(0))),
        ValueError,
        "are its operands swapped",
        None,
    ),
    "an array instead of a pair": (
        lambda: backprop(net=NoPair(4, 3), params=jb.Dense(4, 3).init(jax.random.key(0))),
        TypeError,
        "must give a factored gradient",
        None,
    ),
    "a delta of another shape": (
        lambda: backprop(net=Shrunk(4, 3), params=jb.Dense(4, 3).init(jax.random.key(0))),
        ValueError,
        r"backward gives dC/dx of shape \(6, 1\) for x \(6, 4\)",
        None,
    ),
    "one of two": (
        lambda: with_rule(OneOfTwo),
        TypeError,
        "must give .dC/dx, factored gradients.*not",
        "layers[1]",
    ),
    "one of two, in a check": (
        lambda: with_rule(OneOfTwo, check),
        TypeError,
        "must give .dC/dx, factored",
        "layers[1]",
    ),
    "three": (lambda: with_rule(Three), TypeError, "not a tuple of 3", "layers[1]"),
    "a gradient too few": (
        lambda: with_rule(OneShort),
        ValueError,
        "gradients in the structure",
        "layers[1]",
    ),
    "no delta": (
        lambda: with_rule(NoDelta),
        ValueError,
        r"no delta comes to Dense\(4, 5\)",
        "layers[0]",
    ),
    "a loss that adds up the batch": (
        lambda: backprop(loss=Summed()),
        ValueError,
        r"one cost for each example",
        None,
    ),
    "weights by class name": (
        lambda: jb.SoftmaxCrossEntropy(class_weights={0: 1.0, 1: 5.0}),
        TypeError,
        "must be a sequence with one number for each class",
        None,
    ),
    "an activation that is a class": (
        lambda: jb.mlp([4, 5, 3], jb.Tanh),
        TypeError,
        r"make an instance: add \(\)",
        None,
    ),
    "targets of a metric": (
        lambda: jb.metrics.binary_accuracy(jnp.ones((3, 1)), jnp.ones(3)),
        ValueError,
        r"binary_accuracy: the targets need the shape \(3, 1\)",
        None,
    ),
    "data too large for the parameters": (
        lambda: fit(
            params=jax.tree.map(lambda p: p.astype("float32"), PARAMS), x=np.full((6, 4), 1e300)
        ),
        ValueError,
        "too large for float32",
        None,
    ),
    "coupled examples in the check": (
        lambda: jb.check.network(Coupled(), jb.SquaredError(), (), X, X),
        ValueError,
        "couples the examples",
        None,
    ),
    "empty network": (lambda: jb.Sequential(), ValueError, "at least one layer", None),
    "a class instead of a layer": (
        lambda: jb.Sequential(jb.Dense(4, 5), jb.Tanh),
        TypeError,
        r"layers\[1\].*add \(\)",
        None,
    ),
    "a function instead of a layer": (
        lambda: jb.Sequential(jnp.tanh),
        TypeError,
        "which is no layer",
        None,
    ),
    "mismatched sizes": (
        lambda: backprop(*(lambda n, p: (n, LOSS, p))(*mismatched())),
        ValueError,
        r"Dense\(6, 3\) needs 6 features.*\(5,\)",
        "layers[2]: Dense(6, 3)",
    ),
    "mismatched sizes in a summary": (
        lambda: jb.summary(mismatched()[0], (4,)),
        ValueError,
        "needs 6 features",
        "layers[2]",
    ),
    "params of another network": (
        lambda: backprop(params=OTHER),
        ValueError,
        r"not the parameters of Dense\(4, 5\).*\(4, 6\)",
        "layers[0]",
    ),
    "params of a shorter network": (
        lambda: backprop(params=PARAMS[:1]),
        ValueError,
        "of 3 layers: a tree like its params is a tuple of 3, not a tuple of 1",
        None,
    ),
    "params that are no tuple": (
        lambda: backprop(params=PARAMS[0]),
        ValueError,
        "a tree like its params is a tuple of 3, not a dict",
        None,
    ),
    "params for a layer without": (
        lambda: backprop(params=(PARAMS[0], PARAMS[0], PARAMS[2])),
        ValueError,
        r"Tanh\(\) has no parameters",
        "layers[1]",
    ),
    "a bias too many": (
        lambda: backprop(
            net=jb.Dense(4, 3, bias=False), params={"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
        ),
        ValueError,
        "not the parameters of Dense",
        None,
    ),
    "transport of another shape": (
        lambda: backprop(transport=OTHER),
        ValueError,
        "transport must have the shapes",
        "layers[2]",
    ),
    "transport of another length": (
        lambda: backprop(transport=PARAMS[:2]),
        ValueError,
        "a tuple of 3, not a tuple of 2",
        None,
    ),
    "transport through a rule that has none": (
        lambda: backprop(
            net=jb.Autodiff(lambda p, x: x * p, lambda key: jnp.ones(4)),
            params=jnp.ones(4),
            loss=jb.SquaredError(),
            y=X,
            transport=jnp.ones(4),
        ),
        ValueError,
        "takes no transport",
        None,
    ),
    "weights of another shape": (
        lambda: jb.gradient(backprop(), jnp.ones(5)),
        ValueError,
        r"shape \(6,\), not \(5,\)",
        None,
    ),
    "weights of another shape in value_and_grad": (
        lambda: jb.value_and_grad(NET, LOSS)(PARAMS, X, Y, jnp.ones((6, 1))),
        ValueError,
        r"shape \(6,\), not \(6, 1\)",
        None,
    ),
    "a loss that is a class": (
        lambda: backprop(loss=jb.SquaredError),
        TypeError,
        r"make an instance: add \(\)",
        None,
    ),
    "a net that is params": (lambda: backprop(net=PARAMS), TypeError, "net must be a layer", None),
    "one size": (lambda: jb.mlp([4]), ValueError, "at least two sizes", None),
    "activations that are too few": (
        lambda: jb.mlp([4, 5, 6, 3], [jb.Tanh()]),
        ValueError,
        "2 hidden layers but 1 activations",
        None,
    ),
    "a size of 0": (lambda: jb.Dense(0, 3), ValueError, "p must be an int of at least 1", None),
    "a size that is no int": (lambda: jb.Dense(4, 2.5), ValueError, "q must be an int", None),
    "a negative slope": (
        lambda: jb.LeakyRelu(-0.1),
        ValueError,
        "alpha must not be negative",
        None,
    ),
    "celu of 0": (lambda: jb.Celu(0.0), ValueError, "must be a finite number above 0", None),
    "a derivative of another shape": (
        lambda: backprop(
            net=jb.Activation(jnp.tanh, lambda z: jnp.ones(())),
            params=(),
            loss=jb.SquaredError(),
            y=X,
        ),
        ValueError,
        "must be f' of every unit",
        None,
    ),
    "softmax of a number": (
        lambda: jb.forward(jb.Softmax(), (), jnp.ones(3)),
        ValueError,
        "needs an axis of classes",
        None,
    ),
    "NaN in the data": (
        lambda: fit(x=X.at[2, 1].set(jnp.nan)),
        ValueError,
        r"data: x\[2, 1\] is nan; 1 of 24",
        None,
    ),
    "infinite targets": (
        lambda: fit(loss=jb.SquaredError(), y=jnp.full((6, 3), jnp.inf)),
        ValueError,
        r"y\[0, 0\] is inf",
        None,
    ),
    "NaN in the validation data": (
        lambda: fit(validation=(X * jnp.nan, Y)),
        ValueError,
        r"validation: x\[0, 0\] is nan",
        None,
    ),
    "words": (
        lambda: fit(x=np.full((6, 4), "a")),
        TypeError,
        "arrays of real numbers, not of <U1",
        None,
    ),
    "labels out of range in fit": (lambda: fit(y=Y.at[5].set(7)), ValueError, r"y\[5\] is 7", None),
    "labels out of range in validation": (
        lambda: fit(validation=(X, Y - 1)),
        ValueError,
        r"y\[0\] is -1",
        None,
    ),
    "feature count in fit": (lambda: fit(x=X[:, :3]), ValueError, "needs 4 features", "layers[0]"),
    "sizes of x and y": (
        lambda: fit(y=Y[:4]),
        ValueError,
        "data: x has 6 examples, but y has 4",
        None,
    ),
    "no data": (lambda: fit(x=X[:0], y=Y[:0]), ValueError, "data is empty", None),
    "data that is no pair": (
        lambda: jb.fit(NET, LOSS, PARAMS, X, optax.sgd(0.1), epochs=1, key=jax.random.key(0)),
        TypeError,
        r"a pair \(x, y\)",
        None,
    ),
    "batch size 0": (
        lambda: fit(batch_size=0),
        ValueError,
        "batch_size must be an int of at least 1",
        None,
    ),
    "batch size above n": (lambda: fit(batch_size=7), ValueError, "only 6 training examples", None),
    "no epochs": (lambda: fit(epochs=0), ValueError, "epochs must be an int of at least 1", None),
    "no optimizer": (lambda: fit(optimizer=0.1), TypeError, "one of Optax's", None),
    "unknown option": (lambda: fit(lr=0.1), TypeError, "unexpected keyword argument 'lr'", None),
    "early stopping on what is not there": (
        lambda: fit(early_stopping=jb.EarlyStopping()),
        ValueError,
        "give validation data",
        None,
    ),
    "patience 0": (lambda: jb.EarlyStopping(patience=0), ValueError, "at least 1", None),
    "a metric that is a number": (
        lambda: fit(metrics={"a": lambda z, y: jnp.mean(z)}),
        ValueError,
        "one number for each example",
        None,
    ),
    "a metric called loss": (
        lambda: fit(metrics={"loss": jb.metrics.accuracy}),
        ValueError,
        "a metric cannot be called 'loss'",
        None,
    ),
    "threshold 0": (
        lambda: jb.diagnose.saturation(NET, PARAMS, X, threshold=0.0),
        ValueError,
        "must be a finite number above 0",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, error, message, place = CASES[name]
    with pytest.raises(error, match=message) as caught:
        call()
    if place is not None:
        assert any(place in note for note in caught.value.__notes__), caught.value.__notes__


@pytest.mark.parametrize("name", ["feature count", "params of another network", "integers"])
def test_the_same_under_jit(name):
    call, error, message, _ = CASES[name]
    with pytest.raises(error, match=message):
        jax.jit(call)()


def test_messages_are_all_different():
    assert len({message for _, _, message, _ in CASES.values()}) > 40


TABLES = {
    name: list(getattr(bad_input_cases, name)())
    for name in (
        "configurations", "layers", "joins", "losses", "functions", "rules", "others",
        "evaluations",
    )
}  # fmt: skip
"""Cases that are generated, by the function that makes them; see `bad_input_cases`."""
GROUPS: dict[tuple[str, str], list] = {}
for _table, _cases in TABLES.items():
    for _case in _cases:
        GROUPS.setdefault((_table, _case.of[0]), []).append(_case)
PACKAGE = str(Path(jb.__file__).parent)


def refusal(case):
    """What is wrong with how a case is refused: it must be by us, by name, with the remedy."""
    try:
        case.call()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        text = "\n".join([str(error), *getattr(error, "__notes__", [])])
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
            return f"{case.name}: raised by others, {type(error).__name__}: {text[:200]}"
        if not re.search(case.message, text):
            return f"{case.name}: without {case.message!r}: {text[:200]}"
    except Exception as error:
        return f"{case.name}: {type(error).__name__}: {str(error)[:200]}"
    else:
        return f"{case.name}: is not refused"


@pytest.fixture
def every_frame():
    """Tracebacks as they are: JAX would hide its own frames, and what it raises look like ours."""
    before = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    yield
    jax.config.update("jax_traceback_filtering", before)


@pytest.mark.newest
@pytest.mark.parametrize(("table", "name"), GROUPS, ids=map("-".join, GROUPS))
def test_every_generated_case_is_refused(table, name, every_frame):
    wrong = [found for found in map(refusal, GROUPS[table, name]) if found]
    assert not wrong, "\n".join(wrong)


def test_the_table_is_large():
    assert len(CASES) >= 70
    assert sum(map(len, GROUPS.values())) > 6000


NOTHING_TO_REFUSE = {
    "what others give, made by no user: it holds what it is given": (
        "Averages", "Backprop", "Fit", "Privacy", "Saved", "Trace", "per_example.Clipped",
        "per_example.NoiseScale", "per_example.Noisy", "curvature.BlockDiagonal",
        "curvature.Density", "curvature.Diagonal", "curvature.Eigen", "curvature.Kronecker",
        "credit.Alignment", "credit.Info", "optim.HessianFreeState", "optim.KfacState",
        "check.Figures", "check.Report", "diagnose.DeltaFlow", "diagnose.Saturation",
        "diagnose.SaturationTable",
    ),
    "errors and warnings": (
        "CheckpointError", "FormatError", "NonFiniteError", "Preempted", "check.TruthWarning",
    ),
    "abstract: what is made of them is refused by its own name": (
        "Composite", "Elementwise", "Factored", "Layer", "Loss", "Recurrent", "curvature.Roots",
        "credit.Transported",
    ),
    "a pytree of arrays, rebuilt by every transformation, also around what is no array: pairs are "
    "checked where they get their place": (
        "Coupled", "Full", "Lookup", "Nothing", "Patches", "Place", "Scale", "Shift", "Sum",
    ),
    "without settings, and of any example: a mark among the roots": (
        "curvature.Empirical", "curvature.Exact",
    ),
}  # fmt: skip
"""Public names without a case, by the reason."""
MODULES = (
    "",
    "per_example",
    "curvature",
    "credit",
    "optim",
    "check",
    "diagnose",
    "metrics",
    "sharding",
)
ELSEWHERE = {
    "test_bad_training.py": {
        "fit", "EarlyStopping", "Checkpoints", "sharding.Sharding", "sharding.data_parallel",
        "sharding.fsdp", "sharding.tensor_parallel", "sharding.place", "sharding.put",
        "sharding.specs_like", "sharding.paths", "sharding.check_mesh",
    },
    "test_private.py": {"Private"},
    "test_inspect.py": {"inspect"},
    "test_loggers.py": {"CSVLogger", "JSONLinesLogger", "TensorBoardLogger"},
    "test_saved.py": {"save", "load"},
}  # fmt: skip
"""Names whose cases are written by hand, by the file that has them."""


def public_names():
    for module in MODULES:
        home = getattr(jb, module) if module else jb
        for name, value in vars(home).items():
            if name.startswith("_") or inspect.ismodule(value) or not callable(value):
                continue
            if getattr(value, "__module__", "").startswith(home.__name__):
                yield f"{module}.{name}" if module else name


def test_every_public_name_has_a_case():
    names = set(public_names())
    covered = {name for cases in TABLES.values() for case in cases for name in case.of}
    excused = {name for names in NOTHING_TO_REFUSE.values() for name in names}
    assert not covered & excused, covered & excused
    for file, own in ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text()
        missing = {name for name in own if f".{name.split('.')[-1]}" not in text}
        assert not missing, f"{missing} are not in {file}"
    left = names - covered - excused - set().union(*ELSEWHERE.values())
    assert not left, f"no bad input is tried on {sorted(left)}: add cases to bad_input_cases"
    assert not excused - names, excused - names
