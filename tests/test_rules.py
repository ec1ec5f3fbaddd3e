"""Every rule of the catalogue: proved against jax.grad, and the laws that rules keep."""

import functools
import inspect
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabled import cases
from truth import assert_close, assert_same, each_grad, mean_cost, relative

import jbackprop as jb
from jbackprop import catalogue, compose, layers, losses, structure, sweep
from jbackprop.check.programs import reached
from jbackprop.factored import is_factored

CASES = cases()
RULES = [c for c in CASES if isinstance(c.rule, sweep.Node)]
LEAVES = [c for c in RULES if isinstance(c.rule, jb.Layer)]
ALONE = [c for c in RULES if not c.net.couples_examples]
"""Those whose examples do not reach each other's costs."""
OLD = jax.__version_info__ < (0, 8)
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def named(some):
    return pytest.mark.parametrize("case", some, ids=lambda case: case.name)


def own(case):
    """The parameters of the rule that is tried."""
    return case.params if case.net is case.rule else case.params[0]


def trace_of(case, params, x, key=None):
    y, saved = jb.forward(case.rule, params, x, key)
    return case.rule.trace(x, y, saved)


def delta_of(case):
    """A random delta of the rule's output."""
    y = jax.eval_shape(lambda p, x: jb.forward(case.rule, p, x)[0], own(case), case.x)
    return random_like(y, len(case.name))


def random_like(tree, seed):
    """Numbers for the floating-point leaves; None for the others."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda v: rng.standard_normal(v.shape).astype(v.dtype) if is_float(v) else None, tree
    )


def is_float(v):
    return jnp.issubdtype(jnp.result_type(v), jnp.floating)


def is_deep(case):
    """Whether it is of many layers, each of which is tried alone too."""
    return isinstance(case.rule, jb.Composite) and len(list(structure.walk(case.net))) > 5


@pytest.fixture
def op_by_op():
    """Nothing is compiled but single operations: as it runs outside jit."""
    with jax.disable_jit():
        yield


def in_dtypes():
    """The widest; leaves also in one of the others, by turns, small composites in the coarsest.

    Half of the composites, by turns: deep ones in the widest alone, as in 16 bits jax.grad itself
    loses too much there, and small ones also in 16 bits. The gradients of the other deep ones are
    those of test_per_example_rules.py. On the oldest JAX, the leaves and a third of the small
    composites.
    """
    turns = itertools.cycle(["bfloat16", "float32", "float16"])
    halves = {deep: itertools.cycle([True, False]) for deep in (True, False)}
    for i, case in enumerate(CASES):
        leaf, deep = not isinstance(case.rule, jb.Composite), is_deep(case)
        asked = leaf or next(halves[deep])
        if deep and not asked:
            continue
        coarse = [next(turns)] if leaf else ["bfloat16"] if asked and not deep else []
        marks = () if leaf or (i % 3 == 0 and not deep) else pytest.mark.newest
        yield pytest.param(case, "float64", marks=marks, id=f"float64-{case.name}")
        for dtype in coarse:
            yield pytest.param(case, dtype, marks=pytest.mark.newest, id=f"{dtype}-{case.name}")


@pytest.mark.parametrize(("case", "dtype"), list(in_dtypes()))
def test_agrees_with_autodiff_in_float64(case, dtype):
    """Numbers (complex step, differences) confirm autodiff for leaves in float64, on one JAX."""
    both = dtype == "float64" and not isinstance(case.rule, jb.Composite) and not OLD
    verdict = case.check(dtype, "both" if both else "autodiff")
    assert verdict.ok, f"{case.name}\n{verdict}"
    assert len(verdict.leaves) > 2


@pytest.mark.newest
@named([c for i, c in enumerate(CASES) if c.key is not None or (i % 3 == 0 and not is_deep(c))])
def test_value_and_gradient_are_those_of_jax_grad(case):
    """Random draws included, and a third of the others; layers and losses outside jit."""
    at = case.x, case.y
    truth = jax.value_and_grad(lambda p, x, y: mean_cost(case.net, case.loss, p, x, y, case.key))
    found = functools.partial(jb.value_and_grad(case.net, case.loss), key=case.key)
    if isinstance(case.rule, jb.Composite):
        both = jax.jit(lambda *at: (found(*at), truth(*at)))(case.params, *at)
        assert_close(*both, zero=1e-14)
        return
    due = jax.jit(truth)(case.params, *at)
    with jax.disable_jit():
        assert_close(found(case.params, *at), due, zero=1e-14)


@pytest.mark.newest
@named([case for case in CASES if not is_deep(case)])
def test_lowers_for_every_platform_and_under_vmap(case):
    """Nothing is compiled: XLA for cpu, cuda and tpu, and the shapes of two nets at once."""
    call = functools.partial(jb.value_and_grad(case.net, case.loss), key=case.key)
    args = case.params, case.x, case.y
    exported = jax.export.export(jax.jit(call), platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    two = jax.tree.map(lambda v: jnp.stack([v, v]), args)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(jax.vmap(call), *two))
    assert shapes == jax.tree.map(lambda v: (2, *v.shape), jax.eval_shape(call, *args))


SHIPPED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
"""How XLA compiles for users; here in conftest.py it is told to be quick."""


@pytest.mark.newest
@named([case for case in CASES if not isinstance(case.rule, jb.Composite)])
def test_compiled_as_for_users_it_is_the_same(case):
    """Composites are tried so layer by layer."""
    args = case.params, case.x, case.y, None, case.key
    program = jax.jit(jb.value_and_grad(case.net, case.loss)).lower(*args)
    slow, found = (program.compile(options)(*args) for options in (None, SHIPPED))
    assert_close(found, slow, 1e-13, zero=1e-15)


def with_pairs():
    """What has no weights, and losses, which make deltas alone, are for mutants only."""
    for case in CASES:
        if not (case.net.couples_examples or is_deep(case)):
            asked = isinstance(case.rule, sweep.Node) and jax.tree.leaves(shapes_of(case))
            yield pytest.param(case, id=case.name, marks=() if asked else pytest.mark.newest)


def shapes_of(case):
    return jax.eval_shape(case.net.init, jax.random.key(0))


@pytest.mark.oldest  # on the newest jb.per_example is asked, in test_per_example_rules.py
@pytest.mark.parametrize("case", list(with_pairs()))
def test_per_example_questions_are_those_of_vmap_grad(case):
    w = np.random.default_rng(0).standard_normal(case.batch)

    @jax.jit  # one program for all: that is much cheaper than one after the other
    def asked(params, x, y, w):
        bp = jb.backprop(case.net, case.loss, params, x, y)
        pairs = jax.tree.leaves(bp.factored, is_leaf=is_factored)
        answers = [
            {
                "each": p.each(), "total": p.total(), "weighted": p.total(w), "dot": p.dot(p),
                "square_norm": p.square_norm(), "second_moment": p.second_moment(),
                "gram": p.gram(p), "project": p.project(jnp.ones(p.place.stack + p.place.shape)),
                "moments": p.moments(),
            }
            for p in pairs
        ]  # fmt: skip
        return answers, jax.tree.leaves(each_grad(case.net, case.loss, params, x, y))

    answers, truth = asked(case.params, case.x, case.y, jnp.asarray(w))
    for found, g in zip(answers, map(np.asarray, truth), strict=True):
        rows = g.reshape(case.batch, -1)
        due = {
            "each": g, "total": g.sum(0), "weighted": np.tensordot(w, g, 1),
            "dot": (rows**2).sum(1), "square_norm": (rows**2).sum(1),
            "second_moment": (g**2).sum(0), "gram": rows @ rows.T, "project": rows.sum(1),
            "moments": (g.mean(0), g.var(0)),
        }  # fmt: skip
        assert_close(found, due, zero=1e-14)


@pytest.mark.newest
@named(LEAVES)
def test_backward_is_linear_in_delta(case):
    @jax.jit
    def collected(params, x, delta):
        return jb.backward(case.rule, params, trace_of(case, params, x), delta, sweep.total)

    def of(delta):
        return jax.tree.map(np.asarray, collected(own(case), case.x, delta))

    delta = delta_of(case)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of(jax.tree.map(np.zeros_like, delta))))
    other = jax.tree.map(lambda d: np.flip(d, 0), delta)
    combined = of(jax.tree.map(lambda a, b: 2 * a - 3 * b, delta, other))
    assert_same(combined, jax.tree.map(lambda a, b: 2 * a - 3 * b, of(delta), of(other)))


@pytest.mark.newest
@named([case for case in RULES if not is_deep(case)])
def test_adjoint_identity(case):
    """<J v, u> = <v, J^T u> for the Jacobian of the rule at its input and its parameters."""
    point, u = (own(case), case.x), delta_of(case)
    v = random_like(point, 1)

    @jax.jit
    def both(point, v, u):
        def along(moving):
            moved = jax.tree.map(lambda p, m: p if m is None else m, point, moving)
            return [y for y in jax.tree.leaves(jb.forward(case.rule, *moved)[0]) if is_float(y)]

        moving = jax.tree.map(lambda p: p if is_float(p) else None, point)
        delta_x, gradients = jb.backward(
            case.rule, point[0], trace_of(case, *point), u, sweep.total
        )
        return jax.jvp(along, (moving,), (v,))[1], (gradients, delta_x)

    jv, back = both(point, v, u)
    there = [np.asarray(j) * d for j, d in zip(jv, jax.tree.leaves(u), strict=True)]
    here = [d * np.asarray(g) for d, g in zip(*map(jax.tree.leaves, (v, back)), strict=True)]
    size = sum(float(np.sum(np.abs(term))) for term in there)
    assert abs(sum(map(np.sum, there)) - sum(map(np.sum, here))) <= 1e-13 * size


@pytest.mark.newest
@named([case for case in ALONE if not is_deep(case)])
def test_vmap_over_the_batch_equals_a_loop(case):
    @jax.jit
    def answers(params, x, delta):
        trace = trace_of(case, params, x)
        delta_x, factored = jb.backward(case.rule, params, trace, delta, sweep.keep)
        return delta_x, jax.tree.map(lambda pair: pair.each(), factored, is_leaf=is_factored)

    x, delta = jax.tree.map(np.asarray, case.x), delta_of(case)
    of_all = jax.tree.map(np.asarray, answers(own(case), x, delta))
    for n in range(case.batch):
        of_one = answers(own(case), *jax.tree.map(lambda v, n=n: v[n : n + 1], (x, delta)))
        assert_same(of_one, jax.tree.map(lambda v, n=n: v[n : n + 1], of_all))


@named([c for c in RULES if c.net.draws])
def test_the_draw_of_the_way_back_is_that_of_the_way_there(case):
    """Every example draws by itself, and no draw is that of another key."""
    x = jax.tree.map(jnp.ones_like, case.x)
    y, _ = jb.forward(case.rule, own(case), x, case.key)
    again, _ = jb.forward(case.rule, own(case), x, jax.random.key(1))
    still, _ = jb.forward(case.rule, own(case), x)
    if getattr(case.rule, "rate", 1) > 0:
        assert np.any(y != again)
        assert np.any(y[0] != y[1])
    assert np.any(y != still) == (getattr(case.rule, "rate", 1) > 0)
    trace, u = trace_of(case, own(case), x, case.key), delta_of(case)
    _, jv = jax.jvp(lambda x: jb.forward(case.rule, own(case), x, case.key)[0], (x,), (x,))
    delta_x, _ = jb.backward(case.rule, own(case), trace, u, sweep.total)
    assert relative(jnp.sum(jv * u), jnp.sum(x * delta_x)) <= 1e-13


@pytest.mark.newest
@named(LEAVES)
def test_reads_says_what_backward_reads(case):
    """Each of x and y is in `reads` exactly if the program of backward depends on it."""
    rule, params = case.rule, own(case)
    y, saved = jax.eval_shape(lambda p, x: jb.forward(rule, p, x), params, case.x)
    trace = rule.trace(case.x, y, saved)
    leaves, tree = jax.tree.flatten(trace)

    def backward(leaves, delta):
        rows = jax.vmap(rule.backward, in_axes=(None, 0, 0), axis_name=sweep.BATCH_AXIS)
        return rows(params, jax.tree.unflatten(tree, leaves), delta)

    delta = jax.tree.map(lambda v: v if is_float(v) else None, y)
    jaxpr = jax.make_jaxpr(backward)(leaves, delta).jaxpr  # fails where another one is read
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(trace)[0]]
    for name in rule.reads:
        ours = [path[0].name == name for path in paths]
        flags = ours + [False] * (len(jaxpr.invars) - len(paths))
        assert any(reached(jaxpr, flags)), f"{rule} reads {name}, but not really"


@pytest.mark.newest
@named(RULES)
def test_no_parameter_is_in_the_trace(case):
    closed = jax.make_jaxpr(lambda p, x: jb.forward(case.rule, p, x)[1])(own(case), case.x)
    params = set(closed.jaxpr.invars[: len(jax.tree.leaves(own(case)))])
    assert not params & {v for v in closed.jaxpr.outvars if not hasattr(v, "val")}


@pytest.mark.newest
@named([c for c in LEAVES if isinstance(c.x, jax.Array) and is_float(c.x)])
def test_a_trace_keeps_only_what_is_read(case):
    net = jb.Sequential(jb.Tanh(), case.rule, jb.Identity())
    _, (boundaries, _) = jax.eval_shape(
        lambda p, x: jb.forward(net, p, x), ((), own(case), ()), case.x
    )
    assert boundaries[0] is not None  # tanh reads its output
    assert (boundaries[1] is not None) == ("y" in case.rule.reads)
    net = jb.Sequential(jb.Identity(), case.rule)
    _, (boundaries, _) = jax.eval_shape(lambda p, x: jb.forward(net, p, x), ((), own(case)), case.x)
    assert (boundaries[0] is not None) == ("x" in case.rule.reads)
    assert boundaries[1] is None


@named(CASES)
def test_configurations_are_values(case):
    rule = case.rule
    assert hash(rule) == hash(pickle.loads(pickle.dumps(rule)))
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert type(rule).__name__ in repr(rule)
    assert rule != jb.Dense(77, 78)


def public(module, base):
    return {
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value)
    }


def inside(net):
    """The network and all that it is made of."""
    yield net
    for child in net.children().values() if isinstance(net, jb.Composite) else ():
        yield from inside(child)


def test_every_public_layer_and_loss_is_in_the_catalogue():
    tried = {type(node) for net, _ in catalogue.LAYERS for node in inside(net)}
    for module in (jb, layers, compose):
        assert public(module, sweep.Node) <= tried
    assert public(losses, jb.Loss) <= {type(loss) for loss, _, _ in catalogue.LOSSES}


def test_names_in_the_catalogue_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


ELEMENTWISE = [c for c in LEAVES if isinstance(c.rule, jb.Elementwise)]
KINKED = [c.rule for c in LEAVES if getattr(c.rule, "kinks", ())]


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("layer", KINKED, ids=repr)
def test_the_slope_at_a_kink_is_the_one_stated(layer):
    at = {"Relu": [0.0], "LeakyRelu": [getattr(layer, "alpha", None)], "HardTanh": [0.0, 0.0],
          "Elu": [getattr(layer, "alpha", None)], "Selu": [1.0507009873554805 * 1.6732632423543772]}  # fmt: skip
    x = jnp.asarray([layer.kinks])
    y, _ = jb.forward(layer, (), x)
    trace = jb.Trace(x if "x" in layer.reads else None, y, None)
    slope, _ = jb.backward(layer, (), trace, jnp.ones_like(y), sweep.keep)
    np.testing.assert_allclose(slope[0], at[type(layer).__name__], rtol=1e-15)


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("layer", [c.rule for c in ELEMENTWISE], ids=repr)
def test_slopes_against_finite_differences_of_numpy(layer):
    """A truth without autodiff: central differences with one Richardson step."""
    z = np.array([-3.1, -1.7, -0.9, -0.4, -0.1, 0.2, 0.7, 0.95, 1.3, 2.8])
    y, _ = jb.forward(layer, (), jnp.asarray(z)[None])
    trace = jb.Trace(jnp.asarray(z)[None], y, None)
    slope, _ = jb.backward(layer, (), trace, jnp.ones_like(y), sweep.keep)

    def f(z):
        return np.asarray(jb.forward(layer, (), jnp.asarray(z)[None])[0][0])

    def central(h):
        return (f(z + h) - f(z - h)) / (2 * h)

    np.testing.assert_allclose(slope[0], (4 * central(5e-4) - central(1e-3)) / 3, atol=1e-10)


@pytest.mark.newest
@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("dtype", DTYPES)
@named([c for c in LEAVES if isinstance(c.rule, jb.Elementwise | jb.Softmax)
        and not isinstance(c.rule, jb.Activation)])  # fmt: skip
def test_extreme_net_inputs_give_finite_slopes(case, dtype):
    most = float(jnp.finfo(dtype).max) / 2  # selu has a gain above 1
    x = jnp.asarray([[-most, -1e4, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4, most]], dtype)
    y, _ = jb.forward(case.rule, (), x)
    slope, _ = jb.backward(case.rule, (), jb.Trace(x, y, None), jnp.ones_like(y), sweep.keep)
    assert slope.dtype == x.dtype
    assert y.dtype == x.dtype
    assert bool(jnp.all(jnp.isfinite(slope)))
    assert bool(jnp.all(jnp.isfinite(y)))


WRONG = {
    "factor": jb.Activation(jnp.tanh, lambda z: 2 * (1 - jnp.tanh(z) ** 2)),
    "sign": jb.Activation(jnp.sin, lambda z: -jnp.cos(z)),
    "of the output": jb.Activation(jnp.tanh, lambda z: 1 - jnp.tanh(jnp.tanh(z)) ** 2),
    "one in a thousand": jb.Activation(jnp.tanh, lambda z: 1.001 * (1 - jnp.tanh(z) ** 2)),
}


@pytest.mark.parametrize("activation", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_wrong_derivative_is_found(activation, dtype, key):
    net, loss = jb.mlp([4, 5, 3], activation), jb.SquaredError()
    x, y = jnp.ones((6, 4)), jnp.zeros((6, 3))
    x = x * jnp.linspace(-1, 1, 6).reshape(6, 1)
    verdict = jb.check.network(net, loss, net.init(key), x, y, dtype)
    assert not verdict.ok
    wrong = {leaf.path for leaf in verdict.wrong}
    assert "layers[0].w" in wrong
    assert [leaf.path for leaf in verdict.wrong if leaf.kind.endswith("alone")] == ["layers[1]"]
    assert not {"layers[2]", "layers[2].w", "layers[2].b"} & wrong
    assert "WRONG" in str(verdict)


@pytest.mark.newest
def test_a_gradient_that_is_zero_by_nature_is_no_error(key):
    """Inputs in pairs x, -x with odd targets: the bias gradients cancel."""
    net, loss = jb.mlp([2, 3, 1]), jb.SquaredError()
    half = jax.random.normal(key, (4, 2))
    x = jnp.concatenate([half, -half])
    y = jnp.sum(jnp.sin(x), axis=1, keepdims=True)
    params = jax.tree.map(lambda p: p + 0.0, net.init(key))
    for dtype in ("float64", "float32"):
        verdict = jb.check.network(net, loss, params, x, y, dtype)
        assert verdict.ok, str(verdict)
        assert max(leaf.figures.tolerance for leaf in verdict.leaves) < 1e-3
    net = jb.Sequential(jb.Dense(2, 3), jb.Tanh(), BiasTwice(3, 1))
    assert not jb.check.network(net, loss, params, half, y[:4]).ok


class Untransposed(jb.Dense):
    def backward(self, params, trace, delta):
        _, pairs = super().backward(params, trace, delta)
        return delta @ params["w"], pairs


class BiasTwice(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"b": jb.Shift.of(2 * delta)}


class Swapped(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return delta_x, pairs | {"w": jb.Outer.of(delta, trace.x)}


class DeltaLost(jb.Dense):
    def backward(self, params, trace, delta):
        delta_x, pairs = super().backward(params, trace, delta)
        return -delta_x, pairs


@pytest.mark.parametrize("wrong", [Untransposed, BiasTwice, Swapped, DeltaLost])
def test_a_mutated_rule_is_found(wrong, key):
    net, loss = jb.Sequential(jb.Dense(4, 4), jb.Tanh(), wrong(4, 4)), jb.SquaredError()
    x, y = jax.random.normal(key, (5, 4)), jnp.zeros((5, 4))
    assert not jb.check.network(net, loss, net.init(key), x, y).ok


@pytest.mark.usefixtures("op_by_op")
@named(ELEMENTWISE)
def test_slope_is_what_backward_multiplies_with(case):
    trace, delta = trace_of(case, own(case), case.x), delta_of(case)
    a = case.x if isinstance(case.rule, jb.Identity) else trace.y  # it reads neither
    slope = case.rule.slope(trace.x, a)
    assert slope.dtype == delta.dtype
    delta_x, _ = case.rule.backward((), trace, delta)
    np.testing.assert_array_equal(delta_x, delta * slope)


def test_the_slope_of_a_users_activation_is_cast_to_its_dtype():
    layer = jb.Activation(jnp.tanh, lambda z: 1 - jnp.square(jnp.tanh(z.astype("float64"))))
    z = jnp.linspace(-1, 1, 5, dtype="float32").reshape(1, 5)
    delta_x, _ = jb.backward(layer, (), jb.Trace(z, None, None), jnp.ones_like(z), sweep.keep)
    assert delta_x.dtype == z.dtype
    assert relative(delta_x, 1 / np.cosh(np.asarray(z, float)) ** 2) < 1e-7


def test_transport_passes_layers_without_parameters_and_leaves_gradients_their_dtype(key):
    net = jb.Sequential(jb.Dense(4, 3), jb.Autodiff(lambda _, x: jnp.sin(x)), jb.Dense(3, 2))
    params, x, y = net.init(key), jnp.ones((2, 4)), jnp.zeros((2, 2))
    same = jax.tree.map(lambda p: p.astype("float32").astype(p.dtype), params)
    transport = jax.tree.map(lambda p: p.astype("float32"), same)
    bp = jb.backprop(net, jb.SquaredError(), same, x, y, transport=transport)
    truth = jax.grad(lambda p: mean_cost(net, jb.SquaredError(), p, x, y))(same)
    assert_close(jb.gradient(bp), truth)
    assert {g.dtype for g in jax.tree.leaves(jb.gradient(bp))} == {jnp.dtype("float64")}


def test_transport_is_rounded_to_the_dtype_of_the_delta(key):
    layer = jb.Dense(64, 64, bias=False)
    w = layer.init(key)["w"].astype("float32")
    delta = jax.random.normal(key, (2, 64), "bfloat16")
    params, trace = {"w": w.astype("bfloat16")}, jb.Trace(delta, None, None)
    got, _ = jb.backward(layer, params, trace, delta, sweep.keep, {"w": w})
    expected, _ = jb.backward(layer, params, trace, delta, sweep.keep)
    np.testing.assert_array_equal(got.astype(float), expected.astype(float))
