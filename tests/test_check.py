"""The gradient checker: what it says of functions whose gradients are known, right and wrong."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbackprop as jb
from jbackprop.check import Figures, Report, TruthWarning, numerical, precision
from jbackprop.check.report import composed

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 4)).astype("float32")
W = (RNG.standard_normal((4, 3)) / 2).astype("float32")
B = (RNG.standard_normal(3) / 2).astype("float32")


def cost(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"].reshape(1, -1)) ** 2)


def by_hand(params, x):
    """In NumPy, in the dtype of its arguments."""
    a = np.tanh(x @ params["w"] + params["b"])
    delta = 2 * a * (1 - a**2)
    return {"w": x.T @ delta, "b": delta.sum(0)}


PARAMS = {"w": W, "b": B}
RIGHT = by_hand(PARAMS, X)


def one_wrong(report, path):
    """The only leaf that is not right."""
    (leaf,) = report.failures
    assert leaf.verdict == "wrong"
    assert leaf.path == path
    return leaf


# --- Reports -------------------------------------------------------------------------------------


def test_a_report_is_as_bad_as_its_worst_leaf():
    right, wrong = Report("a"), Report("b", own="wrong")
    unknown = Report("c", own="inconclusive")
    assert composed("", "", [right]).ok
    assert composed("", "", [right, unknown]).verdict == "inconclusive"
    tree = composed("", "", [right, composed("", "", [unknown, wrong])])
    assert tree.verdict == "wrong"
    assert not tree
    assert tree.failures == (unknown, wrong)
    assert tree.wrong == (wrong,)
    assert tree.leaves == (right, unknown, wrong)


def test_a_report_of_nothing_is_not_right():
    assert composed("", "", []).verdict == "inconclusive"
    assert composed("", "", [composed("", "", [])]).verdict == "inconclusive"


def test_a_report_as_json_and_as_text():
    leaf = Report("p.w", "gradient", own="wrong", diagnosis="yours times 2",
                  figures=Figures(math.inf, 1e-6, index=(1, 2), candidate=math.nan, truth=3.0))  # fmt: skip
    report = composed("check", "f", [Report("p.b"), leaf], notes=["seed 7"])
    tree = json.loads(report.to_json())
    assert tree["verdict"] == "wrong"
    assert tree["parts"][1]["figures"] == {
        "error": None, "tolerance": 1e-6, "cosine": None, "ratio": None, "index": [1, 2],
        "candidate": None, "truth": 3.0, "ulps": None, "kinks": 0, "cancels": False,
    }  # fmt: skip
    text = str(report)
    assert "check f: WRONG (1 wrong, 1 right)" in text
    assert "here is one that would be right: yours times 2" in text
    assert "seed 7" in text
    assert math.isinf(report.worst_error)


# --- Truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", ["autodiff", "numerical", "both"])
@pytest.mark.parametrize("flag", [True, False])
def test_truth_is_float64_whatever_the_flag(truth, flag):
    """The float32 error of a candidate is told to many digits, so that truth is better known."""
    wide = by_hand({name: v.astype(float) for name, v in PARAMS.items()}, X.astype(float))
    with precision.as_given("float32"), _flag(flag):
        candidate = jax.tree.map(jnp.asarray, RIGHT)
        report = jb.check.gradient(
            cost, jax.tree.map(jnp.asarray, PARAMS), jnp.asarray(X), candidate=candidate,
            truth=truth,
        )  # fmt: skip
        assert jax.config.jax_enable_x64 == flag
    assert report.ok, str(report)
    for leaf, name in zip(report.leaves, ("b", "w"), strict=True):
        error = np.linalg.norm(RIGHT[name] - wide[name]) / np.linalg.norm(wide[name])
        assert leaf.figures.error == pytest.approx(error, rel=1e-3)


def _flag(value):
    return precision.x64() if value else _off()


def _off():
    home = jax if hasattr(jax, "enable_x64") else jax.experimental
    return home.enable_x64(False)


def test_the_flag_is_as_it_was_after_an_error():
    def breaks(x):
        raise RuntimeError("inside")

    with _off():
        with pytest.raises(RuntimeError, match="inside"):
            jb.check.gradient(breaks, X, candidate=X)
        assert not jax.config.jax_enable_x64
        assert jax.config.jax_numpy_dtype_promotion == "strict"


def test_figures_of_a_gradient_that_is_one_unit_off():
    candidate = {name: v.copy() for name, v in RIGHT.items()}
    wide = by_hand({name: v.astype(float) for name, v in PARAMS.items()}, X.astype(float))
    exact = {name: v.astype("float32") for name, v in wide.items()}
    candidate["w"] = exact["w"].copy()
    at = np.unravel_index(np.argmax(np.abs(exact["w"])), (4, 3))
    candidate["w"][at] = np.nextafter(exact["w"][at], 2 * exact["w"][at])
    leaf = jb.check.gradient(cost, PARAMS, X, candidate=candidate).leaves[1]
    f = leaf.figures
    assert leaf.verdict == "right"
    assert f.index == at
    assert 0.5 <= f.ulps <= 1.5
    assert f.candidate == candidate["w"][at]
    assert f.truth == pytest.approx(wide["w"][at], rel=1e-14)
    assert f.cosine == pytest.approx(1)
    assert f.ratio == pytest.approx(1)


@jax.custom_vjp
def halved(x):
    return jnp.tanh(x)


halved.defvjp(lambda x: (jnp.tanh(x), x), lambda x, u: (u * (1 - jnp.tanh(x) ** 2) / 2,))


def test_a_custom_rule_that_fools_autodiff_does_not_fool_numbers():
    def fun(x):
        return jnp.sum(halved(x) ** 2)

    fooled = jax.grad(fun)(X)
    with pytest.warns(TruthWarning, match="disagree"):
        report = jb.check.gradient(fun, X, candidate=fooled)
    leaf = one_wrong(report, "x")
    assert "agrees with jax.grad" in leaf.why
    assert leaf.diagnosis.startswith("a custom rule inside the function is wrong")
    assert leaf.diagnosis.endswith("yours times 2")
    assert jb.check.gradient(fun, X, candidate=fooled, truth="autodiff").ok
    assert not jb.check.gradient(fun, X, candidate=fooled, truth="numerical").ok
    with pytest.warns(TruthWarning):
        assert jb.check.gradient(fun, X, candidate=2 * fooled).ok


def test_a_stop_gradient_is_told_from_numbers():
    def fun(x):
        return jnp.sum(jnp.square(x - jax.lax.stop_gradient(jnp.tanh(x))))

    with pytest.warns(TruthWarning):
        assert jb.check.gradient(fun, X, candidate=jax.grad(fun)(X)).verdict == "wrong"


def test_a_function_that_jax_cannot_differentiate_is_left_to_numbers():
    def fun(x):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * x), (0, x))[1]

    x = jnp.float32(1.5)  # x^4
    right = jnp.float32(4 * 1.5**3)
    report = jb.check.gradient(fun, x, candidate=right)
    assert report.ok, str(report)
    assert "cannot differentiate" in str(report)
    assert jb.check.gradient(fun, x, candidate=right * 1.001).verdict == "wrong"
    with pytest.raises(ValueError, match="while_loop"):
        jb.check.gradient(fun, x, candidate=right, truth="autodiff")


def test_functions_with_control_flow_of_python():
    def fun(x):
        return x**3 if x > 0 else -x

    for truth in ("both", "numerical"):
        assert jb.check.gradient(fun, np.float32(2), candidate=np.float32(12), truth=truth).ok
        assert not jb.check.gradient(fun, np.float32(-2), candidate=np.float32(1), truth=truth).ok


@pytest.mark.parametrize(
    ("f", "x", "slope"),
    [
        (jnp.sin, 0.7, math.cos(0.7)),
        (jnp.exp, 3.0, math.exp(3.0)),
        (lambda x: x ** (1 / 3), 1e-3, 1e-3 ** (-2 / 3) / 3),
        (lambda x: jnp.log1p(jnp.abs(x)), -0.4, -1 / 1.4),
        (lambda x: jnp.where(x > 0.3, x * x, 0.09 + 0.6 * (x - 0.3)), 0.31, 0.62),
        (lambda x: 1e8 + jnp.tanh(x), 0.5, 1 - math.tanh(0.5) ** 2),
        (lambda x: jnp.tanh(x.astype("float32")).astype(x.dtype), 0.5, 1 - math.tanh(0.5) ** 2),
    ],
)
def test_numerical_slopes_know_their_error(f, x, slope):
    found = numerical.Slopes(lambda p, data: f(p[0]), [np.asarray(x)]).along([np.asarray(1.0)])
    assert abs(found.value - slope) <= max(found.error, 1e-14 * abs(slope))
    assert found.error <= 1e-2 * abs(slope)


def test_the_complex_step_is_taken_where_it_is_right_only():
    point, one = [np.asarray([0.3, -0.8])], [np.asarray([1.0, 0.5])]
    analytic = numerical.Slopes(lambda p, data: jnp.sum(jnp.exp(p[0]) * p[0]), point).along(one)
    assert analytic.method == "complex step"
    truth = math.exp(0.3) * 1.3 + 0.5 * math.exp(-0.8) * 0.2
    assert analytic.value == pytest.approx(truth, rel=1e-15)
    for f in (jnp.abs, jnp.square, jax.nn.relu, lambda v: jnp.where(v > 0, v, 2 * v)):
        found = numerical.Slopes(lambda p, data, f=f: jnp.sum(f(jnp.abs(p[0]))), point).along(one)
        assert found.method == "differences"


# --- Three verdicts ------------------------------------------------------------------------------


def test_nothing_but_zeros_is_inconclusive():
    dead = jnp.full((3, 4), -5.0, "float32")
    report = jb.check.gradient(lambda x: jnp.sum(jax.nn.relu(x)), dead, candidate=0 * dead)
    assert report.verdict == "inconclusive"
    assert "zeros" in report.failures[0].why
    wrong = (0 * dead).at[1, 2].set(0.1)
    report = jb.check.gradient(lambda x: jnp.sum(jax.nn.relu(x)), dead, candidate=wrong)
    assert report.verdict == "wrong"


def test_what_the_function_does_not_use_has_the_gradient_zero():
    def fun(p):
        return jnp.sum(p["w"] ** 2)

    candidate = {"w": 2 * W, "unused": np.zeros(3, "float32")}
    args = {"w": W, "unused": B}
    for truth in ("both", "autodiff", "numerical"):
        report = jb.check.gradient(fun, args, candidate=candidate, truth=truth)
        assert report.ok, str(report)
        assert "does not depend" in str(report)
        wrong = candidate | {"unused": np.full(3, 1e-5, "float32")}
        assert jb.check.gradient(fun, args, candidate=wrong, truth=truth).verdict == "wrong"


def test_what_is_not_finite():
    holed = RIGHT | {"w": np.where(np.arange(12).reshape(4, 3) == 7, np.nan, RIGHT["w"])}
    leaf = one_wrong(jb.check.gradient(cost, PARAMS, X, candidate=holed), "params.w")
    assert "nan at [2, 1]" in leaf.why
    for truth in ("both", "autodiff", "numerical"):
        report = jb.check.gradient(
            lambda x: jnp.sum(jnp.log(x)), np.float32([1, 0]), candidate=np.float32([1, np.inf]),
            truth=truth,
        )  # fmt: skip
        assert report.verdict != "right"


def test_a_numerical_error_above_the_tolerance_is_inconclusive():
    x = X.astype("float64")

    def fun(x):
        return jnp.sum(jnp.abs(x) ** 1.5)

    right = jax.grad(fun)(x)
    report = jb.check.gradient(fun, x, candidate=right, truth="numerical")
    assert report.verdict == "inconclusive"
    assert "numerical error" in report.failures[0].why
    assert jb.check.gradient(fun, x, candidate=right, truth="numerical", tolerance=1e-8).ok
    assert jb.check.gradient(fun, x, candidate=right * 1.001, truth="numerical").verdict == "wrong"


@pytest.mark.newest
@pytest.mark.parametrize("truth", ["both", "autodiff", "numerical"])
@pytest.mark.parametrize(("slope", "verdict"), [(0, "right"), (0.5, "right"), (1, "right"), (3, "wrong"), (-1.5, "wrong")])  # fmt: skip
def test_at_a_kink_any_slope_between_is_right(truth, slope, verdict):
    x = np.float32([0.5, 0, -0.3, 0, 2])
    candidate = np.where(x > 0, 1, np.where(x == 0, slope, 0)).astype("float32")
    report = jb.check.gradient(
        lambda x: jnp.sum(jax.nn.relu(x)), x, candidate=candidate, truth=truth
    )
    assert report.verdict == verdict, str(report)
    assert report.leaves[0].figures.kinks == 2
    assert "2 of 5 entries" in str(report)
    away = np.where(x == 0.5, 0.7, candidate).astype("float32")
    assert not jb.check.gradient(lambda x: jnp.sum(jax.nn.relu(x)), x, candidate=away).ok


@pytest.mark.newest
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_gradient_that_is_zero_by_nature(dtype):
    """The bias of an attention's keys shifts all scores of a query alike."""
    q, k, v = (jnp.asarray(a, dtype) for a in RNG.standard_normal((3, 6, 4)))

    def fun(b):
        scores = q @ (k + jnp.broadcast_to(b, k.shape)).T
        return jnp.sum(jnp.sin(jax.nn.softmax(scores, axis=-1) @ v))

    b = jnp.asarray([0.1, -0.2, 0.3, 0.4], dtype)
    report = jb.check.gradient(fun, b, candidate=jax.grad(fun)(b))
    assert report.ok, str(report)
    assert report.leaves[0].figures.cancels
    assert jb.check.gradient(fun, b, candidate=0 * b).ok
    wrong = jnp.asarray([0.0, 0.2, 0.0, 0.0], dtype)
    assert jb.check.gradient(fun, b, candidate=wrong).verdict == "wrong"


@pytest.mark.newest
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e10])
def test_the_tolerance_does_not_grow_with_the_values(scale):
    scale = np.float32(scale)

    def fun(p, x):
        return scale * cost(p, x)

    right = {name: scale * v for name, v in RIGHT.items()}
    report = jb.check.gradient(fun, PARAMS, X, candidate=right)
    assert report.ok, str(report)
    assert all(leaf.figures.tolerance < 1e-5 for leaf in report.leaves)
    off = right | {"w": right["w"] * np.float32(1.001)}
    one_wrong(jb.check.gradient(fun, PARAMS, X, candidate=off), "p.w")


def test_the_tolerance_can_be_given():
    off = RIGHT | {"w": RIGHT["w"] * np.float32(1.01)}
    assert jb.check.gradient(cost, PARAMS, X, candidate=off, tolerance=0.02).ok
    assert not jb.check.gradient(cost, PARAMS, X, candidate=off, tolerance=0.005).ok


def test_large_arrays_are_tried_along_directions_and_searched_by_halves():
    x = RNG.standard_normal((60, 50)).astype("float32")

    def fun(x):
        return jnp.sum(jnp.tanh(x) ** 2)

    right = np.asarray(jax.grad(fun)(x))
    assert jb.check.gradient(fun, x, candidate=right, truth="numerical").ok
    wrong = right.copy()
    wrong[41, 7] *= -1
    report = jb.check.gradient(fun, x, candidate=wrong, truth="numerical", seed=5)
    leaf = one_wrong(report, "x")
    assert leaf.figures.index == (41, 7)
    assert leaf.figures.truth == pytest.approx(right[41, 7], rel=1e-5)
    assert "seed 5" in str(report)
    again = jb.check.gradient(fun, x, candidate=wrong, truth="numerical", seed=5)
    assert again.to_json() == report.to_json()


def test_every_entry_or_directions():
    off = RIGHT | {"w": RIGHT["w"].copy()}
    off["w"][1, 1] += 0.1
    for exact in (True, False):
        leaf = one_wrong(
            jb.check.gradient(cost, PARAMS, X, candidate=off, truth="numerical", exact=exact),
            "params.w",
        )
        assert leaf.figures.index == (1, 1)
        assert math.isnan(leaf.figures.cosine) == (not exact)


# --- Rules of functions --------------------------------------------------------------------------


def rich(tree, n, nothing, flags):
    """Trees in and out, an integer output, integer and None arguments."""
    x, s = tree["x"], tree["s"]
    return {"a": jnp.sin(x) * s, "n": n + 1}, (jnp.sum(x) ** 2, x[0] * s)


def _rich_fwd(tree, n, nothing, flags):
    return rich(tree, n, nothing, flags), tree


def _rich_bwd(factor, tree, u):
    x, s = tree["x"], tree["s"]
    ua, (u1, u2) = u[0]["a"], u[1]
    dx = ua * jnp.cos(x) * s + 2 * u1 * jnp.sum(x)
    dx = dx.at[0].add(u2 * s)
    ds = jnp.sum(ua * jnp.sin(x)) + factor * u2 * x[0]
    return {"x": dx, "s": ds}, None, None, None


def rich_with(factor):
    @jax.custom_vjp
    def f(tree, n, nothing, flags):
        return rich(tree, n, nothing, flags)

    f.defvjp(_rich_fwd, lambda tree, u: _rich_bwd(factor, tree, u))
    return f


TREE = {"x": np.float32([0.3, -1.2, 0.8]), "s": np.float32(1.7)}
OTHERS = (3, None, np.array([True, False]))


@pytest.mark.parametrize("truth", ["both", "autodiff", "numerical"])
def test_vjp_of_trees_integers_and_none(truth):
    report = jb.check.vjp(rich_with(1), TREE, *OTHERS, truth=truth)
    assert report.ok, str(report)
    assert {leaf.path for leaf in report.leaves} >= {"tree.x", "tree.s"}
    wrong = jb.check.vjp(rich_with(-1), TREE, *OTHERS, truth=truth)
    assert {leaf.path for leaf in wrong.wrong} == {"tree.s"}
    alone = [leaf for leaf in wrong.wrong if "alone" in leaf.kind]
    assert [leaf.kind for leaf in alone] == ["cotangent from output[1][1] alone"]


def ruled(forward, backward, fun=jnp.tanh):
    f = jax.custom_vjp(lambda x: fun(x))
    f.defvjp(forward, backward)
    return f


def test_vjp_sees_a_forward_part_that_is_another_function():
    f = ruled(lambda x: (1.01 * jnp.tanh(x), x), lambda x, u: (u * (1 - jnp.tanh(x) ** 2),))
    report = jb.check.vjp(f, X)
    assert {leaf.kind for leaf in report.wrong} == {"forward part"}


def test_vjp_sees_a_rule_that_is_not_linear():
    def clipped(x, u):
        return (jnp.clip(u, -3, 3) * (1 - jnp.tanh(x) ** 2),)

    report = jb.check.vjp(ruled(lambda x: (jnp.tanh(x), x), clipped), X)
    assert "twice the cotangent" in {leaf.kind for leaf in report.wrong}


def test_vjp_of_a_function_whose_body_jax_cannot_differentiate():
    def root(a):
        return jax.lax.while_loop(
            lambda s: jnp.any(jnp.abs(s * s - a) > 1e-6 * a), lambda s: (s + a / s) / 2, a
        )

    right = ruled(lambda a: (root(a), a), lambda a, u: (u / (2 * jnp.sqrt(a)),), root)
    wrong = ruled(lambda a: (root(a), a), lambda a, u: (u / jnp.sqrt(a),), root)
    a = np.float64([0.5, 2, 9])
    assert jb.check.vjp(right, a, tolerance=1e-5).ok
    report = jb.check.vjp(wrong, a, tolerance=1e-5)
    assert report.verdict == "wrong"
    assert report.wrong[0].diagnosis == "yours times 1/2"


def test_custom_rules_within_scans_conditionals_and_jits_are_taken_away():
    def fun(x):
        def body(c, v):
            return c + jax.lax.cond(v > 0, halved, jnp.sin, v) + jax.jit(halved)(v), c

        return jax.lax.scan(body, jnp.zeros((), x.dtype), x)

    report = jb.check.vjp(fun, X[0], truth="autodiff")
    assert report.verdict == "wrong"
    assert report.wrong[0].path == "x"
    assert jb.check.vjp(fun, X[0]).verdict == "wrong"


@pytest.mark.parametrize(("factor", "verdict"), [(1, "right"), (1.001, "wrong"), (-1, "wrong")])
@pytest.mark.parametrize("truth", ["both", "numerical", "autodiff"])
def test_jvp(factor, verdict, truth):
    @jax.custom_jvp
    def f(x, y):
        return {"p": x * jnp.sin(y), "s": jnp.sum(y)}

    @f.defjvp
    def _(primals, tangents):
        (x, y), (dx, dy) = primals, tangents
        p = dx * jnp.sin(y) + jnp.asarray(factor, x.dtype) * x * jnp.cos(y) * dy
        return f(x, y), {"p": p, "s": jnp.sum(dy)}

    report = jb.check.jvp(f, X[0], X[1], truth=truth)
    assert report.verdict == verdict, str(report)
    if verdict == "wrong":
        assert {leaf.path for leaf in report.wrong} == {"output.p"}
        assert "tangent along x alone" not in {leaf.kind for leaf in report.wrong}


def test_functions_that_ship_with_jax():
    for f in (jax.nn.relu, jax.nn.softplus, jax.nn.gelu, jax.nn.log_softmax, jnp.sinc):
        report = jb.check.vjp(f, np.float32([[-2, -0.5, 0, 0.5, 30]]))
        assert report.ok, str(report)
        assert jb.check.jvp(f, np.float32([[-2, -0.5, 0.1, 0.5, 30]])).ok


# --- Asserting twins, and bad input --------------------------------------------------------------


def test_the_asserting_twins():
    jb.check.assert_gradient(cost, PARAMS, X, candidate=RIGHT)
    with pytest.raises(AssertionError, match="yours times -1"):
        jb.check.assert_gradient(cost, PARAMS, X, candidate={k: -v for k, v in RIGHT.items()})
    jb.check.assert_vjp(jnp.tanh, X)
    jb.check.assert_jvp(jnp.tanh, X)
    with pytest.raises(AssertionError, match="vjp"):
        jb.check.assert_vjp(halved, X)
    net, loss = jb.mlp([4, 3]), jb.SquaredError()
    jb.check.assert_network(net, loss, net.init(jax.random.key(0)), X, X[:, :3])
    jb.check.assert_layer(jb.Dense(4, 3), (4,))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jb.check.gradient(jnp.tanh, X, candidate=X), ValueError, "one scalar.*sum it"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate={"w": W}), ValueError, "no gradient for params.b"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate=RIGHT | {"c": B}), ValueError, "not in the argument: .c"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate=RIGHT | {"b": np.arange(3)}), TypeError, "floating-point, not int"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate=RIGHT, argnums=2), ValueError, "argnums 2"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate=RIGHT, argnums=(0, 1)), ValueError, "tuple of 2"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate=RIGHT, truth="exact"), ValueError, "truth must be"),
        (lambda: jb.check.gradient(cost, PARAMS, X, candidate=RIGHT, directions=0), ValueError, "directions"),
        (lambda: jb.check.gradient(lambda n: 1.0 * n, 3, candidate=1.0), TypeError, "no floating-point"),
        (lambda: jb.check.vjp(lambda x: x > 0, X), TypeError, "no floating-point output"),
        (lambda: jb.check.vjp(jnp.abs, X + 1j), TypeError, "complex"),
        (lambda: jb.check.vjp(lambda x: jax.lax.complex(x, x), X), TypeError, "complex"),
        (lambda: jb.check.layer(jb.Dense, (4,)), TypeError, "must be a layer"),
        (lambda: jb.check.layer(jb.Dense(4, 3)), ValueError, "x_shape"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_gradient_of_another_shape_is_wrong():
    leaf = one_wrong(
        jb.check.gradient(cost, PARAMS, X, candidate=RIGHT | {"w": RIGHT["w"].T}), "params.w"
    )
    assert leaf.diagnosis == "yours transposed"


# --- Networks ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Twice(jb.Tanh):
    def slope(self, z, a):
        return 2 * super().slope(z, a)


@dataclasses.dataclass(frozen=True)
class Half(jb.SquaredError):
    def delta(self, z, y):
        return super().delta(z, y) / 2

    def value_and_delta(self, z, y):
        return self.value(z, y), self.delta(z, y)


class LostSkip(jb.Sequential):
    """Carries the delta through its layers, but forgets a factor of its own: not the layers' fault."""

    def backward(self, params, trace, delta, collect, transport, aux):
        delta_x, collected = super().backward(params, trace, delta, collect, transport, aux)
        return -delta_x, collected


def checked(net, loss=None):
    params = net.init(jax.random.key(0))
    return jb.check.network(
        net, loss or jb.SquaredError(), params, X.astype(float), X[:, :3].astype(float)
    )


def test_the_first_wrong_rule_is_named_and_the_others_are_not_in_doubt():
    net = jb.Sequential(jb.Dense(4, 4), Twice(), jb.Dense(4, 5), Twice(), jb.Dense(5, 3))
    report = checked(net)
    assert "layers[3], Twice" in report.why
    alone = {leaf.path for leaf in report.wrong if leaf.kind.endswith("alone")}
    assert alone == {"layers[1]", "layers[3]"}
    assert all(
        leaf.diagnosis == "yours times 1/2" for leaf in report.wrong if leaf.kind.endswith("alone")
    )
    chained = {leaf.path for leaf in report.wrong if not leaf.kind.endswith("alone")}
    assert chained == {"layers[2]", "layers[2].w", "layers[2].b", "layers[1]", "layers[0]", "layers[0].w", "layers[0].b"}  # fmt: skip
    assert all(
        "because of layers[3]" in leaf.why
        for leaf in report.wrong
        if not leaf.kind.endswith("alone")
    )


def test_a_wrong_loss_is_named():
    report = checked(jb.mlp([4, 3]), Half())
    assert "delta of the loss" in report.why
    assert report.wrong[0].diagnosis == "yours times 2"


def test_a_wrong_composite_is_told_from_wrong_rules():
    report = checked(jb.Sequential(jb.Dense(4, 4), LostSkip(jb.Tanh(), jb.Dense(4, 3))))
    assert "Every rule is right by itself" in report.why
    assert {leaf.path for leaf in report.wrong} == {"layers[0]", "layers[0].w", "layers[0].b"}


def test_a_forward_with_a_wrong_rule_inside_is_seen_by_numbers():
    class Fooled(jb.Tanh):
        def activate(self, z):
            return halved(z)

        def slope(self, z, a):
            return (1 - a * a) / 2

    with pytest.warns(TruthWarning):
        report = checked(jb.Sequential(jb.Dense(4, 4), Fooled(), jb.Dense(4, 3)))
    assert report.verdict == "wrong"


# --- Single rules --------------------------------------------------------------------------------


class Plain(jb.Dense):
    """Dense, to be spoilt."""


class Offset(Plain):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x + 0.1, pairs


class Squared(Plain):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x * jnp.abs(jnp.sum(delta)), pairs


class Hidden(Plain):
    def forward(self, params, x, key=None):
        y, _ = super().forward(params, x)
        return y, params["w"].T


class Idle(Plain):
    reads = ("x", "y")


class Careless(Plain):
    def backward(self, params, trace, delta):
        if isinstance(params["b"], np.ndarray):
            params["b"] += 1.0
        return super().backward(params, trace, delta)


class Random(Plain):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        if isinstance(trace.x, jax.core.Tracer):
            return delta_x, pairs
        return delta_x * (1 + np.random.default_rng().uniform()), pairs


class Mixing(Plain):
    def forward(self, params, x, key=None):
        y, saved = super().forward(params, x)
        return y - jax.lax.pmean(y, jb.sweep.BATCH_AXIS), saved

    def backward(self, params, trace, delta):
        return super().backward(params, trace, delta - jax.lax.pmean(delta, jb.sweep.BATCH_AXIS))


class Forgetful(jb.Outer):
    def square_norm(self):
        return 2 * super().square_norm()


@pytest.mark.newest
@pytest.mark.parametrize(
    ("layer", "broken"),
    [
        (Offset, "linear: a delta of zero gives zero"),
        (Squared, "linear: sums and multiples"),
        (Squared, "adjoint: <J v, u> = <v, J^T u>"),
        (Hidden, "no params in the trace"),
        (Idle, "nothing is kept that nobody reads"),
        (Careless, "params are left as they were"),
        (Mixing, "vmap equals a loop"),
    ],
)
def test_a_broken_law_is_named(layer, broken):
    report = jb.check.layer(layer(4, 3), (4,))
    assert broken in {leaf.path for leaf in report.wrong}, str(report)
    assert jb.check.layer(Plain(4, 3), (4,)).ok


@pytest.mark.newest
def test_a_layer_in_its_own_dtype_and_with_its_own_inputs(key):
    for dtype in ("float64", "float32", "bfloat16"):
        assert jb.check.layer(jb.Dense(4, 3), (2, 4), dtype=dtype).ok
    params = jb.Dense(4, 3).init(key)
    assert jb.check.layer(jb.Dense(4, 3), x=X, params=params).ok
    report = jb.check.layer(Offset(4, 3), x=X, params=params)
    assert "x" in {leaf.path for leaf in report.wrong if leaf.kind == "alone"}
