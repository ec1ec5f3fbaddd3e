"""The checker where it is hard: what a review of it found, and what must not come back."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import verdict

import jbackprop as jb
from jbackprop.check.precision import x64

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("as_jax_comes")]
KEY = jax.random.key(3)
X = np.random.default_rng(0).standard_normal(8).astype("float32")


# --- Sizes -----------------------------------------------------------------------------------------


def test_a_gradient_that_loses_digits_is_not_zero_by_nature():
    x = (np.random.default_rng(1).standard_normal(64) + 300).astype("float32")

    def spread(x):
        return jnp.log(jnp.mean(x**2) - jnp.mean(x) ** 2)

    assert verdict(spread, x) == "right"
    assert verdict(spread, x, candidate=1.3 * jax.grad(spread)(x)) == "wrong"

    def waves(x):
        return jnp.sum(jnp.sin(x * 3e6)) / 3e6

    assert verdict(waves, X) == "inconclusive"
    assert verdict(waves, X, candidate=0 * X) != "right"


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_any_size_in_float64(size):
    with x64():
        x = X.astype(float)

        def fun(x):
            return jnp.sum(jnp.sin(x)) * size

        assert verdict(fun, x, candidate=size * np.cos(x)) == "right"
        report = jb.check.gradient(fun, x, candidate=2 * size * np.cos(x))
        assert report.verdict == "wrong"
        assert report.wrong[0].diagnosis == "yours times 1/2"
        assert verdict(lambda x: jnp.sum(x**2), x * 1e-200, candidate=2e-200 * x) == "right"


def test_tolerance_is_that_of_what_each_leaf_is_computed_in():
    half = X.astype(jnp.bfloat16)

    def fun(p):
        return jnp.sum(jnp.sin(p["a"])) + jnp.sum(jnp.sin(p["b"]).astype(jnp.float32))

    p = {"a": X, "b": half}
    right = jax.grad(fun)(p)
    report = jb.check.gradient(fun, p, candidate=right | {"a": right["a"] * 1.001})
    assert [leaf.path for leaf in report.wrong] == ["p.a"]
    assert verdict(fun, p) == "right"
    assert verdict(lambda w, m: jnp.sum(jnp.sin(w) * m), X, half, candidate=1.001 * np.cos(X) * half.astype("float32")) == "wrong"  # fmt: skip


def test_tolerance_by_numbers_does_not_grow_with_the_size():
    x = np.random.default_rng(0).standard_normal(10**5).astype("float32")

    def fun(x):
        return jnp.sum(jnp.sin(x))

    assert verdict(fun, x, truth="numerical") == "right"
    assert verdict(fun, x, candidate=np.cos(x) * (1 + 3e-5), truth="numerical") == "wrong"


# --- Edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["both", "autodiff", "numerical"])
def test_where_the_truth_is_not_finite(truth):
    at_edge, with_nan = np.float32([0, 1, 4]), np.float32([np.nan, 1, 4])
    assert verdict(lambda x: jnp.sum(jnp.sqrt(x)), at_edge, truth=truth) == "inconclusive"
    assert verdict(lambda x: jnp.sum(jnp.sin(x)), with_nan, truth=truth) == "inconclusive"


def test_nan_is_no_slope_at_a_kink():
    report = jb.check.gradient(jnp.linalg.norm, 0 * X, candidate=np.nan * X)
    assert report.verdict == "wrong"
    assert "nan at [0]" in str(report)
    assert "[0] nan for" in str(report)


@pytest.mark.parametrize("truth", ["both", "autodiff", "numerical"])
@pytest.mark.parametrize(("slope", "due"), [(0.7, "right"), (0, "right"), (2, "wrong"), (-0.1, "wrong")])  # fmt: skip
def test_slopes_beyond_both_sides_of_a_kink_are_wrong(slope, due, truth):
    def fun(x):
        return jnp.sum(jax.nn.relu(x) * jnp.arange(1.0, 5))

    x = np.float32([0, 1, -4, 2])
    assert verdict(fun, x, candidate=np.float32([slope, 2, 0, 4]), truth=truth) == due


def test_empty_arrays_are_right():
    p = {"a": X, "b": np.zeros((0, 3), "float32")}
    assert verdict(lambda p: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"]), p) == "right"


# --- Arguments -----------------------------------------------------------------------------------


def test_python_numbers_stay_what_they_are():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scaled(s, x):
        return s * x

    scaled.defvjp(lambda s, x: (s * x, None), lambda s, _, u: (s * u,))
    assert jb.check.vjp(scaled, 2.0, X).ok
    static = jax.jit(lambda x, n: jnp.sum(x**2 * n), static_argnums=1)
    assert verdict(static, X, 2.0) == "right"
    assert verdict(lambda p: p**2, 3.0, candidate=6) == "right"
    assert (
        verdict(lambda p: jnp.sum(p**2), X[:2], candidate=[2 * float(v) for v in X[:2]]) == "right"
    )


def test_python_control_flow_gets_arrays_of_jax():
    def fun(x):
        return jnp.sum(x.at[0].set(1.0) ** 2) if x[0] > -9 else jnp.sum(x)

    assert verdict(fun, jnp.asarray(X), candidate=np.append(0, 2 * X[1:])) == "right"


def test_keys_that_look_alike():
    p = {"a": {"b": X}, "a.b": X}
    assert verdict(lambda p: jnp.sum(p["a"]["b"] ** 2 + p["a.b"] ** 3), p) == "right"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"argnums": (0, 0), "candidate": (X, X)}, "each argument can be given once"),
        ({"argnums": (0, -1), "candidate": (X, X)}, "each argument can be given once"),
        ({"tolerance": -1.0}, "tolerance must be a finite number above 0"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number above 0"),
        ({"directions": 1.5}, "directions must be an int"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
        ({"truth": "perhaps"}, "truth must be"),
    ],
)
def test_options_that_mean_nothing(options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        jb.check.gradient(lambda x: jnp.sum(x**2), X, **({"candidate": 2 * X} | options))
    if "argnums" not in options:
        net = jb.mlp([8, 3])
        params = net.init(KEY)
        with pytest.raises((ValueError, TypeError), match=error):
            jb.check.network(net, jb.SquaredError(), params, X[None], np.ones((1, 3), "float32"), **options)  # fmt: skip


def test_inside_jit_it_says_so():
    with pytest.raises(TypeError, match="called inside jit"):
        jax.jit(lambda x: jb.check.gradient(jnp.sum, x, candidate=x))(X)


def test_debug_nans_do_not_stop_a_probe():
    with jax.debug_nans(True):
        assert verdict(lambda x: jnp.sum(jnp.log(x)), np.float32([1e-3, 1])) == "right"


# --- Reasons -------------------------------------------------------------------------------------


def diagnosis(fun, x, candidate):
    report = jb.check.gradient(fun, x, candidate=candidate)
    (leaf,) = report.wrong
    return leaf.diagnosis


def test_a_factor_is_no_regularisation():
    assert diagnosis(lambda w: jnp.sum(w**2), X, 2.74 * X).startswith("yours times 0.72")
    ones = np.ones(5, "float32")
    assert diagnosis(lambda w: jnp.sum(w**3 * 0.1), ones, 0.36 * ones).startswith("yours times 0.83")  # fmt: skip


def test_chance_explains_nothing():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x, c = (jnp.asarray(rng.standard_normal(2), jnp.bfloat16) for _ in range(2))
        assert diagnosis(lambda w: jnp.sum(jnp.sin(w)), x, c) == "", seed


def test_nothing_is_fitted_to_a_truth_that_is_zero():
    assert diagnosis(lambda x: jnp.sum(jnp.round(x)), X, np.abs(X)) == ""


def test_an_absolute_value():
    assert "absolute value" in diagnosis(lambda x: jnp.sum(x**2), X, np.abs(2 * X))


def test_the_derivative_of_the_sigmoid_at_the_output_of_a_tanh():
    class Confused(jb.Tanh):
        def slope(self, z, a):
            return a * (1 - a)

    net = jb.Sequential(jb.Dense(8, 4), Confused(), jb.Dense(4, 3))
    report = jb.check.network(net, jb.SquaredError(), net.init(KEY), X[None], np.ones((1, 3), "float32"))  # fmt: skip
    assert "Confused()" in report.why
    (alone,) = (leaf for leaf in report.wrong if leaf.kind.endswith("alone"))
    assert "a (1 - a), the sigmoid's" in alone.diagnosis


@pytest.mark.parametrize(("values", "deltas", "what"), [(1, 2, "delta"), (3, 1, "value")])
def test_a_loss_whose_value_and_delta_do_not_belong_together(values, deltas, what):
    class Apart(jb.SquaredError):
        def value_and_delta(self, z, y):
            value, delta = super().value_and_delta(z, y)
            return values * value, deltas * delta

    net = jb.mlp([8, 3])
    report = jb.check.network(net, Apart(), net.init(KEY), X[None], np.ones((1, 3), "float32"))
    assert f"the {what} of the loss" in report.why
    assert report.wrong[0].kind == what


def test_lines_are_not_too_long_and_nothing_else_is_warned_of():
    def shaky(x):
        return jnp.sum(jax.lax.stop_gradient(x) * x.astype(jnp.float32))

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = jb.check.gradient(shaky, X, candidate=X)
    assert {w.category for w in told} == {jb.check.TruthWarning}
    assert {w.filename for w in told} == {__file__}
    rows = [line for line in str(report).splitlines() if not line.startswith(" ")]
    assert max(map(len, rows)) <= 100


def test_a_subclass_of_sequential_stays_one():
    class Named(jb.Sequential):
        def __init__(self, name, *layers):
            super().__init__(*layers)
            object.__setattr__(self, "name", name)

    new = Named("mine", jb.Tanh()).with_children((jb.Relu(),))
    assert type(new) is Named
    assert new.layers == (jb.Relu(),)
