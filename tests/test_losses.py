"""Losses: values against NumPy, SciPy and scikit-learn, deltas against the complex step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk
from truth import relative

import jbackprop as jb
from jbackprop import catalogue

pytestmark = pytest.mark.newest
B, Q = 6, 4
rng = np.random.default_rng(0)
Z = rng.normal(size=(B, Q)) * 2
REAL = rng.normal(size=(B, Q))
BITS = rng.integers(0, 2, size=(B, Q)).astype(float)
COUNTS = rng.poisson(2.0, size=(B, Q)).astype(float)
LABELS = rng.integers(0, Q, size=B)
MIXED = special.softmax(rng.normal(size=(B, Q)), axis=1)
W = (0.5, 1.0, 2.0, 0.25)


def cross_entropy(z, y):
    """Written for complex z too."""
    return -np.sum(y * (z - np.log(np.sum(np.exp(z), 1, keepdims=True))), 1)


def hot(labels):
    return np.eye(Q)[labels]


def smoothed(y, s, w=1.0):
    return w * ((1 - s) * y + s / Q)


def huber(z, y):
    e = z - y
    return np.sum(np.where(abs(e.real) <= 1, e * e / 2, np.sign(e.real) * e - 0.5), 1)


REFERENCE = {
    "squared": (jb.SquaredError(), REAL, lambda z: np.sum((z - REAL) ** 2, 1) / 2),
    "sigmoid": (
        jb.SigmoidCrossEntropy(), BITS,
        lambda z: np.sum(np.log(1 + np.exp(z)) - BITS * z, 1),
    ),
    "softmax, labels": (jb.SoftmaxCrossEntropy(), LABELS, lambda z: cross_entropy(z, hot(LABELS))),
    "softmax, distributions": (jb.SoftmaxCrossEntropy(), MIXED, lambda z: cross_entropy(z, MIXED)),
    "softmax, smoothed": (
        jb.SoftmaxCrossEntropy(label_smoothing=0.1), LABELS,
        lambda z: cross_entropy(z, smoothed(hot(LABELS), 0.1)),
    ),
    "softmax, weighted": (
        jb.SoftmaxCrossEntropy(class_weights=W), LABELS,
        lambda z: cross_entropy(z, np.array(W) * hot(LABELS)),
    ),
    "softmax, weighted distributions": (
        jb.SoftmaxCrossEntropy(class_weights=W), MIXED,
        lambda z: cross_entropy(z, np.array(W) * MIXED),
    ),
    "softmax, all options": (
        jb.SoftmaxCrossEntropy(0.2, W, ignore_index=1), LABELS,
        lambda z: (LABELS != 1) * cross_entropy(z, smoothed(hot(LABELS), 0.2, np.array(W))),
    ),
    "poisson": (jb.PoissonNLL(), COUNTS, lambda z: np.sum(np.exp(z) - COUNTS * z, 1)),
    "huber": (jb.Huber(), REAL, lambda z: huber(z, REAL)),
    "on probabilities": (
        jb.CrossEntropy(), MIXED, lambda a: -np.sum(MIXED * np.log(a), 1),
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", REFERENCE)


def inputs(name):
    return special.softmax(Z, axis=1) if name == "on probabilities" else Z


@each
def test_value(name):
    loss, y, cost = REFERENCE[name]
    value = loss.value(jnp.asarray(inputs(name)), jnp.asarray(y))
    assert value.shape == (B,)
    assert relative(value, cost(inputs(name))) < 1e-14


@each
def test_delta_by_the_complex_step(name):
    """Im C(z + ih) / h is exact to rounding: a truth that no autodiff has a part in."""
    loss, y, cost = REFERENCE[name]
    z, h = inputs(name), 1e-30
    steps = [cost(z + 1j * h * np.eye(Q)[q]).imag / h for q in range(Q)]
    assert relative(loss.delta(jnp.asarray(z), jnp.asarray(y)), np.stack(steps, 1)) < 1e-13


def test_scikit_learn_says_the_same_of_log_loss_and_poisson_deviance():
    value = jb.SoftmaxCrossEntropy().value(jnp.asarray(Z), jnp.asarray(LABELS))
    truth = sk.log_loss(LABELS, special.softmax(Z, axis=1), labels=range(Q))
    assert relative(value.mean(), truth) < 1e-14
    counts = COUNTS[:, :1] + 1
    z = jnp.asarray(Z[:, :1])
    nll = jb.PoissonNLL().value(z, jnp.asarray(counts)).mean()
    saturated = jb.PoissonNLL().value(jnp.log(jnp.asarray(counts)), jnp.asarray(counts)).mean()
    truth = sk.mean_poisson_deviance(counts[:, 0], np.exp(Z[:, 0]))
    assert relative(2 * (nll - saturated), truth) < 1e-13


@pytest.mark.parametrize(
    ("loss", "y"),
    [(jb.SquaredError(), REAL), (jb.SigmoidCrossEntropy(), BITS), (jb.SoftmaxCrossEntropy(), hot(LABELS)),
     (jb.PoissonNLL(), COUNTS)],
)  # fmt: skip
def test_the_canonical_delta_is_output_minus_target(loss, y):
    z = jnp.asarray(Z)
    assert relative(loss.delta(z, jnp.asarray(y)), loss.predict(z) - y) < 1e-14


def test_predictions():
    z = jnp.asarray(Z)
    assert relative(jb.SoftmaxCrossEntropy().predict(z), special.softmax(Z, axis=1)) < 1e-14
    assert relative(jb.SigmoidCrossEntropy().predict(z), special.expit(Z)) < 1e-14
    assert relative(jb.PoissonNLL().predict(z), np.exp(Z)) < 1e-14
    assert relative(jb.Huber().predict(z), Z) == 0


def test_positions_are_averaged_and_ignored_ones_do_not_count():
    z = jnp.asarray(rng.normal(size=(3, 5, Q)))
    y = jnp.asarray(rng.integers(0, Q, size=(3, 5))).at[0, 1:].set(-1).at[2].set(-1)
    loss = jb.SoftmaxCrossEntropy(ignore_index=-1)
    flat = jb.SoftmaxCrossEntropy()
    one = [
        np.asarray(flat.value(z[n], jnp.maximum(y[n], 0)))[np.asarray(y[n]) >= 0] for n in range(3)
    ]
    truth = [one[0].mean(), one[1].mean(), 0.0]
    assert relative(loss.value(z, y), truth) < 1e-14
    grad = jax.grad(lambda z: loss.value(z, y).sum())(z)
    assert relative(loss.delta(z, y), grad) < 1e-14
    assert not np.any(np.asarray(loss.delta(z, y))[2])
    real = jnp.asarray(rng.normal(size=(3, 5, Q)))
    for other in (jb.SquaredError(), jb.Huber(0.5)):
        per = jnp.stack([other.value(z[:, t], real[:, t]) for t in range(5)]).mean(0)
        assert relative(other.value(z, real), per) < 1e-14
        grad = jax.grad(lambda z, f=other: f.value(z, real).sum())(z)
        assert relative(other.delta(z, real), grad) < 1e-14


@pytest.mark.parametrize("s", [0.0, 0.2])
@pytest.mark.parametrize("w", [None, W])
def test_all_options_over_positions_written_out_in_numpy(s, w):
    z, y = rng.normal(size=(3, 5, Q)), rng.integers(0, Q, size=(3, 5))
    loss = jb.SoftmaxCrossEntropy(s, w, ignore_index=1)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    t = np.array(w or [1.0] * Q) * ((1 - s) * np.eye(Q)[y] + s / Q)
    counted = y != 1
    expected = (-(t * log_p).sum(-1) * counted).sum(1) / counted.sum(1)
    delta = t.sum(-1, keepdims=True) * np.exp(log_p) - t
    delta = delta * counted[..., None] / counted.sum(1).reshape(3, 1, 1)
    assert relative(loss.value(jnp.asarray(z), jnp.asarray(y)), expected) < 1e-13
    assert relative(loss.delta(jnp.asarray(z), jnp.asarray(y)), delta) < 1e-13


def test_probabilities_over_positions():
    a = jnp.asarray(special.softmax(rng.normal(size=(3, 5, Q)), axis=-1))
    y = jnp.asarray(special.softmax(rng.normal(size=(3, 5, Q)), axis=-1))
    loss = jb.CrossEntropy()
    assert relative(loss.value(a, y), -(y * np.log(a)).sum(-1).mean(1)) < 1e-14
    assert relative(loss.delta(a, y), -y / a / 5) < 1e-14


@pytest.mark.parametrize("w", [None, W])
@pytest.mark.parametrize("s", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-1, 100])
def test_an_ignored_place_is_not_there_even_if_it_is_nan(ignored, s, w):
    z = jnp.asarray(Z).at[2].set(jnp.nan)
    y = jnp.asarray(LABELS).at[2].set(ignored)
    loss = jb.SoftmaxCrossEntropy(s, w, ignored)
    assert bool(jnp.all(jnp.isfinite(loss.value(z, y))))
    assert not np.any(np.asarray(loss.delta(z, y))[2])


def test_a_class_of_weight_0_is_not_there_even_if_it_is_nan():
    z, y = jnp.asarray(Z).at[2].set(jnp.nan), jnp.asarray(LABELS).at[2].set(3)
    loss = jb.SoftmaxCrossEntropy(class_weights=(*W[:3], 0.0))
    assert bool(jnp.all(jnp.isfinite(loss.value(z, y))))
    assert not np.any(np.asarray(loss.delta(z, y))[2])


@each
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_value_and_delta_at_once_are_those_one_by_one(name, dtype):
    loss, y, _ = REFERENCE[name]
    z, y = jnp.asarray(inputs(name), dtype), jnp.asarray(y)
    value, delta = loss.value_and_delta(z, y)
    assert delta.dtype == z.dtype
    np.testing.assert_array_equal(value, loss.value(z, y))
    np.testing.assert_array_equal(delta, loss.delta(z, y))


def test_a_probability_of_0_has_the_delta_0_and_divides_nothing_by_0():
    tiny = float(jnp.finfo(float).tiny)
    a, y = jnp.asarray([[1.0, 0.0, 0.0, tiny]]), jnp.asarray([[0.5, 0.0, 0.25, 0.25]])
    with jax.debug_nans(True):
        np.testing.assert_array_equal(jb.CrossEntropy().delta(a, y), [[-0.5, 0, 0, 0]])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [n for n in REFERENCE if n != "poisson"])
def test_extreme_net_inputs_are_finite_and_right(name, dtype):
    loss, y, _ = REFERENCE[name]
    z = jnp.asarray([[1e4, -1e4, 0.0, 5.0]] * B, dtype)
    if name == "on probabilities":
        z = jax.nn.softmax(z)
    y = jnp.asarray(y)
    value, delta = loss.value(z, y), loss.delta(z, y)
    assert delta.dtype == z.dtype
    assert bool(jnp.all(jnp.isfinite(value)))
    assert bool(jnp.all(jnp.isfinite(delta)))
    wide = z.astype(float)
    if name not in ("on probabilities", "huber", "squared"):
        truth = loss.value(wide, y)
        assert relative(value, truth) < 1e-6
    assert relative(delta, loss.delta(wide, y)) < 4 * float(jnp.finfo(dtype).eps)


def test_softmax_at_extremes_by_hand():
    z = jnp.asarray([[1e4, -1e4, 0.0]])
    loss = jb.SoftmaxCrossEntropy()
    for label, cost in ((0, 0.0), (1, 2e4), (2, 1e4)):
        assert float(loss.value(z, jnp.asarray([label]))[0]) == cost
        np.testing.assert_array_equal(
            loss.delta(z, jnp.asarray([label]))[0], np.eye(3)[0] - np.eye(3)[label]
        )


@pytest.mark.parametrize(
    "loss", [jb.SoftmaxCrossEntropy(0.0, w, i) for i in (None, 9) for w in (None, W)],
    ids=repr,
)  # fmt: skip
def test_a_label_out_of_range_under_jit_is_nan_never_a_number(loss):
    z, labels = jnp.asarray(Z), jnp.asarray(LABELS).at[2].set(Q).at[4].set(-1)
    value, delta = jax.jit(lambda z, y: (loss.value(z, y), loss.delta(z, y)))(z, labels)
    assert list(np.isnan(value)) == [False, False, True, False, True, False]
    assert list(np.isnan(delta).all(1)) == [False, False, True, False, True, False]


def test_labels_of_a_small_dtype_count_many_classes():
    z = jnp.asarray(rng.normal(size=(3, 300)))
    y = np.array([0, 100, 127])
    loss = jb.SoftmaxCrossEntropy(label_smoothing=0.1)
    small = loss.value(z, jnp.asarray(y, jnp.int8))
    assert relative(small, loss.value(z, jnp.asarray(y))) == 0
    unsigned = loss.value(z, jnp.asarray([0, 100, 255], jnp.uint8))
    assert relative(unsigned, loss.value(z, jnp.asarray([0, 100, 255]))) == 0


class Cauchy(jb.Loss):
    """A user's own: C = sum log(1 + (z - y)^2)."""

    def value(self, z, y):
        return jnp.sum(jnp.log1p((z - y) ** 2), axis=-1)

    def delta(self, z, y):
        return 2 * (z - y) / (1 + (z - y) ** 2)


class Wrong(Cauchy):
    def delta(self, z, y):
        return (z - y) / (1 + (z - y) ** 2)


def test_a_users_own_loss_is_served_and_checked(key):
    net = jb.mlp([3, 5, Q])
    args = net.init(key), jnp.asarray(rng.normal(size=(B, 3))), jnp.asarray(REAL)
    assert jb.check.network(net, Cauchy(), *args).ok
    verdict = jb.check.network(net, Wrong(), *args)
    assert verdict.failures[0].path == "loss"
    assert "the delta of the loss" in verdict.why


BAD = [
    (jb.SoftmaxCrossEntropy(), (B, Q), np.full(B, Q), ValueError, r"y\[0\] is 4; 6 of 6"),
    (jb.SoftmaxCrossEntropy(), (B, Q), np.array([0, 1, -1, 0, 0, 0]), ValueError, r"y\[2\] is -1"),
    (jb.SoftmaxCrossEntropy(), (B, Q), LABELS.astype(float), TypeError, "must be integers"),
    (jb.SoftmaxCrossEntropy(), (B, Q), hot(LABELS).astype(int), ValueError, "one-hot rows must be"),
    (jb.SoftmaxCrossEntropy(), (B, Q), MIXED[:, :2], ValueError, "need integer labels"),
    (jb.SoftmaxCrossEntropy(), (B, Q), -MIXED, ValueError, "no negative entries"),
    (
        jb.SoftmaxCrossEntropy(class_weights=(1, 2)),
        (B, Q),
        LABELS,
        ValueError,
        "2 class_weights for 4",
    ),
    (jb.SoftmaxCrossEntropy(ignore_index=0), (B, Q), MIXED, TypeError, "needs integer labels"),
    (jb.SquaredError(), (B, 1), REAL[:, 0], ValueError, r"use y\[..., None\]"),
    (jb.SquaredError(), (B, Q), LABELS, ValueError, "class labels are for SoftmaxCrossEntropy"),
    (jb.SquaredError(), (B, Q), REAL[:, :2], ValueError, "must be the same"),
    (jb.SigmoidCrossEntropy(), (B, Q), REAL * 9, ValueError, "0 to 1, but y"),
    (jb.PoissonNLL(), (B, Q), -1 - COUNTS, ValueError, "not negative, but y"),
    (jb.Huber(), (B, Q), REAL[:, :2], ValueError, "must be the same"),
    (jb.CrossEntropy(), (B, Q), -MIXED, ValueError, "no negative entries"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}: {case[-1]}")
def test_targets_that_do_not_fit(case):
    loss, shape, y, error, message = case
    with pytest.raises(error, match=message):
        loss.check(shape, y)
    net = jb.Identity()
    with pytest.raises(error, match=message):
        jb.backprop(net, loss, (), jnp.ones(shape), jnp.asarray(y))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jb.SoftmaxCrossEntropy(label_smoothing=1.5), "at least 0 and at most 1"),
        (
            lambda: jb.SoftmaxCrossEntropy(class_weights=(1.0, -2.0)),
            r"class_weights\[1\] must be a finite number of at least 0",
        ),
        (lambda: jb.Huber(0.0), "above 0"),
    ],
)
def test_options_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_catalogue_tries_every_kind_of_target():
    assert len({(type(loss), targets) for loss, targets, _ in catalogue.LOSSES}) >= 9


def test_log_loss_of_a_sure_and_right_prediction_keeps_its_digits():
    z, y = jnp.asarray([[30.0], [-30.0]]), jnp.asarray([[1.0], [0.0]])
    value = jb.SigmoidCrossEntropy().value(z, y)
    np.testing.assert_allclose(value, np.log1p(np.exp(-30.0)), rtol=1e-14)


def test_predictions_in_half_precision_are_rounded_once():
    z = jnp.asarray(Z, "bfloat16")
    for loss in (jb.SoftmaxCrossEntropy(), jb.SigmoidCrossEntropy(), jb.PoissonNLL()):
        wide = loss.predict(z.astype("float32")).astype("bfloat16")
        np.testing.assert_array_equal(loss.predict(z).astype(float), wide.astype(float))
