"""The page of derivations: every formula of it against the library, and against autodiff."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from truth import relative

import jbackprop as jb
from jbackprop import compose, factored, layers, losses
from jbackprop import curvature as cv
from jbackprop.layers import windows
from jbackprop.sweep import keep

# One worker has all of it: tests share what a comparison finds.
pytestmark = [pytest.mark.newest, pytest.mark.xdist_group("derivations")]

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "derivations.md"
TEXT = PAGE.read_text()


# What is in the page.


@functools.cache
def parts(text=TEXT):
    """The page in order, as (kind, lines joined): "heading", "text", or the language of a fence."""
    found, language, lines = [], None, []

    def close(kind):
        if lines:
            found.append((kind, "\n".join(lines)))
        lines.clear()

    for line in text.splitlines():
        if line.startswith("```") and language is None:
            close("text")
            language = line[3:]
        elif line == "```":
            close(language)
            language = None
        elif language is None and line.startswith("#"):
            close("text")
            found.append(("heading", line.lstrip("# ")))
        elif language is not None or line.strip():
            lines.append(line)
    assert language is None, "a fence is left open"
    close("text")
    return found


@functools.cache
def units(text=TEXT):
    """(what comes before it since the block before or the heading, the block) of every formula."""
    before, found = [], []
    for part in parts(text):
        if part[0] == "python":
            if "def " in part[1]:
                found.append((tuple(before), part[1]))
            before = []
        elif part[0] == "heading":
            before = [part]
        else:
            before.append(part)
    return found


@functools.cache
def functions(source):
    return [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def run(text=TEXT):
    """The functions of the page, in one module."""
    space = {}
    source = "\n".join(content for kind, content in parts(text) if kind == "python")
    exec(compile(source, str(PAGE), "exec"), space)
    return types.SimpleNamespace(**{name: space[name] for name in functions(source)})


FORMULAS = [name for _, block in units() for name in functions(block)]
COMPARED = {}
KINDS = {}


def compares(*names):
    """Mark a function of the page's functions as what compares these of them."""

    def mark(f):
        for name in names:
            assert name not in COMPARED, name
            COMPARED[name] = f
        return f

    return mark


def snake(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def concrete(module, base):
    """The public classes of a module that are of this kind and can be made."""
    found = (v for v in vars(module).values() if inspect.isclass(v) and issubclass(v, base))
    return sorted({cls.__name__ for cls in found if not inspect.isabstract(cls)})


LAYERS = concrete(layers, jb.Layer)
COMPOSITES = concrete(compose, jb.Composite)
LOSSES = concrete(losses, jb.Loss)
PAIRS = concrete(factored, jb.Factored)
DUE = {snake(name): name for name in LAYERS + COMPOSITES + LOSSES}
DUE |= {snake(name) + "_gradient": name for name in PAIRS}


# What compares.

B = 3


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def normal_like(seed, tree):
    """Numbers for every array of a tree."""
    leaves, form = jax.tree.flatten(tree)
    return jax.tree.unflatten(form, [normal((seed, i), *v.shape) for i, v in enumerate(leaves)])


@functools.cache
def parameters(net):
    """Normal numbers, biases too."""
    return normal_like(1, jax.eval_shape(net.init, jax.eval_shape(jax.random.key, 0)))


def compiled(*static):
    """Make one program of a function, whose answers are NumPy's arrays: those are quick to index."""

    def mark(f):
        program = jax.jit(f, static_argnums=static)
        return lambda *arguments: jax.tree.map(np.asarray, program(*arguments))

    return mark


def same(found, due, tolerance=1e-12):
    """Every array of two trees, whose containers may differ."""
    found, due = jax.tree.leaves(found), jax.tree.leaves(due)
    assert len(found) == len(due)
    for one, other in zip(found, due, strict=True):
        assert relative(one, other) <= tolerance, relative(one, other)


def nth(tree, n):
    return jax.tree.map(lambda v: np.asarray(v[n]), tree)


def stack(trees):
    return jax.tree.map(lambda *v: np.stack(v), *trees)


def floating(tree):
    return [v for v in jax.tree.leaves(tree) if jnp.issubdtype(v.dtype, jnp.floating)]


@compiled(0)
def swept(net, params, x, delta, key=None):
    """The library's answers, and those of automatic differentiation of the forward sweep."""
    y, saved = jb.forward(net, params, x, key)
    delta_x, pairs = jb.backward(net, params, net.trace(x, y, saved), delta, keep)
    ask = functools.partial(jax.tree.map, is_leaf=factored.is_factored)
    total, each = ask(lambda p: p.total(), pairs), ask(lambda p: p.each(), pairs)
    _, back = jax.vjp(lambda params, x: jb.forward(net, params, x, key)[0], params, x)
    true_w, true_x = back(delta)
    return y, delta_x, pairs, total, each, true_w, true_x


def tried(net, x, key=None):
    """Parameters, a delta, and what `swept` says of them."""
    params = parameters(net)
    y = jax.eval_shape(functools.partial(jb.forward, net), params, x)[0]
    delta = normal_like(2, y)
    return params, delta, swept(net, params, x, delta, key)


def compare(net, rule, x, key=None, name=None):
    """A rule (params, x, delta) -> (y, delta_x, gradients) of one example, with the library's.

    Outputs, deltas, every example's gradient and the totals; the last three with autodiff's, too.
    """
    x = normal(0, B, *x) if isinstance(x, tuple) and isinstance(x[0], int) else x
    params, delta, found = tried(net, x, key)
    y, delta_x, pairs, total, each, true_w, true_x = found
    own = [rule(params, nth(x, n), nth(delta, n)) for n in range(B)]
    ys, deltas, gradients = (stack([one[i] for one in own]) for i in range(3))
    same(ys, y)
    same(deltas, delta_x)
    same(deltas, floating(true_x))
    assert jax.tree.structure(gradients) == jax.tree.structure(params)
    same(gradients, each)
    summed = jax.tree.map(lambda g: g.sum(axis=0), gradients)
    same(summed, total)
    same(summed, true_w)
    if name:
        KINDS.setdefault(name, set()).update(
            type(p).__name__ for p in jax.tree.leaves(pairs, is_leaf=factored.is_factored)
        )


def plain(rule):
    """A rule of (x, delta) -> (y, delta_x), of a layer without parameters."""
    return lambda params, x, delta: (*rule(x, delta), ())


def flat(x):
    """All positions in one row."""
    return x.reshape(-1, x.shape[-1])


# One weight, and all of them.


@compares("one_weight")
def one_weight(f):
    net, loss = jb.Dense(3, 1), jb.SigmoidCrossEntropy()
    params, x, y = parameters(net), normal(1, B, 3), np.eye(B)[:, :1]
    bp, each = jb.backprop(net, loss, params, x, y), truth(net, loss, params, x, y)
    its = each_of(bp.factored)
    for n in range(B):
        delta, dw, db = f.one_weight(params["w"][:, 0], params["b"][0], x[n], y[n, 0])
        same([delta], [delta_of(bp)[n, 0]])
        same([dw, db], [its["w"][n, :, 0], its["b"][n, 0]])
        same([dw, db], [each["w"][n, :, 0], each["b"][n, 0]])


def delta_of(bp):
    """The delta of the only layer with weights."""
    (delta,) = jb.deltas(bp).values()
    return np.asarray(delta)


@compiled(0, 1)
def truth(net, loss, params, x, y):
    """Every example's gradient, by vmap(grad)."""

    def cost(params, x, y):
        return loss.value(jb.forward(net, params, x[None])[0], y[None])[0]

    return jax.vmap(jax.grad(cost), in_axes=(None, 0, 0))(params, x, y)


@compiled()
def each_of(pairs):
    """Every example's gradient by pairs, in a tree of them."""
    return jax.tree.map(lambda pair: pair.each(), pairs, is_leaf=factored.is_factored)


gradient_of = compiled()(jb.gradient)


def numbers(cell):
    """A vector, or a matrix whose rows end in semicolons."""
    return np.array([[float(v) for v in row.split()] for row in cell.split(";")])


def table_of_the_worked_example(text=TEXT):
    rows = re.findall(r"^\| layer \d \| (.*) \|$", text, re.MULTILINE)
    return [[numbers(cell) for cell in row.split("|")] for row in rows]


@compares("worked_example")
def worked_example(f):
    table = table_of_the_worked_example()
    weights = [row[0] for row in table]
    x, y = np.array([1.0, 0.0]), np.array([1.0])
    found = f.worked_example(*weights, x, y)
    for l, (_, a, delta, dw) in enumerate(table, 1):
        for name, due in ((f"a{l}", a), (f"delta{l}", delta), (f"dw{l}", dw)):
            assert np.abs(np.atleast_2d(found[name]) - due).max() <= 0.5e-4 + 1e-12, name
    spec = importlib.util.spec_from_file_location("worked", ROOT / "examples" / "worked_example.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    same(weights, [example.w1, example.w2, example.w3])
    same([x, y], [example.x, example.y])

    dense = [jb.Dense(*w.shape, bias=False) for w in weights]
    net = jb.Sequential(dense[0], jb.Sigmoid(), dense[1], jb.Sigmoid(), dense[2])
    params = [v for w in weights for v in ({"w": w}, ())][:-1]
    loss = jb.SigmoidCrossEntropy()
    bp = jb.backprop(net, loss, tuple(params), x[None], y[None])
    same([found[f"delta{l}"][None] for l in (1, 2, 3)], list(jb.deltas(bp).values()))
    same([found[f"dw{l}"] for l in (1, 2, 3)], gradient_of(bp))
    same([found["a3"][None]], [loss.predict(bp.outputs)])
    same(
        [found[f"dw{l}"][None] for l in (1, 2, 3)],
        truth(net, loss, tuple(params), x[None], y[None]),
    )
    inside = jb.activations(net, tuple(params), x[None])
    same([found["a1"][None], found["a2"][None]], list(inside.values())[1:4:2])


@compares("delta_rule")
def delta_rule(f):
    net, loss = jb.mlp([3, 4, 5, 2], jb.Sigmoid()), jb.SigmoidCrossEntropy()
    params = parameters(net)
    x, y = normal(1, B, 3), np.ones((B, 2))
    bp, each = jb.backprop(net, loss, params, x, y), truth(net, loss, params, x, y)
    its, its_deltas = each_of(bp.factored), [np.asarray(v) for v in jb.deltas(bp).values()]
    weights, biases = ([params[l][name] for l in (0, 2, 4)] for name in ("w", "b"))
    for n in range(B):
        deltas, gradients = f.delta_rule(
            weights, biases, lambda z: f.sigmoid(z)[0], lambda z: f.sigmoid(z)[1], x[n],
            lambda z, n=n: f.sigmoid(z)[0] - y[n],
        )  # fmt: skip
        same(deltas, [v[n] for v in its_deltas])
        same(gradients, [its[l]["w"][n] for l in (0, 2, 4)])
        same(gradients, [each[l]["w"][n] for l in (0, 2, 4)])
        same(deltas, [each[l]["b"][n] for l in (0, 2, 4)])


@compares("output_delta")
def output_delta(f):
    net, loss = jb.mlp([3, 2], output=jb.Sigmoid()), jb.SquaredError()
    params = parameters(net)
    x, y = normal(1, B, 3), normal(2, B, 2)
    bp = jb.backprop(net, loss, params, x, y)
    a, slope = f.sigmoid(x @ params[0]["w"] + params[0]["b"])
    found = f.output_delta(a - y, slope)
    same(found, jb.deltas(bp)["layers[0]"])
    same(found, truth(net, loss, params, x, y)[0]["b"])


@compares("canonical")
def canonical(f):
    def p(z):
        return np.exp(z) / np.exp(z).sum()

    family = (
        (jb.SquaredError(), lambda z: z, lambda z: np.eye(4)),
        (jb.SigmoidCrossEntropy(), lambda z: f.sigmoid(z)[0], lambda z: np.diag(f.sigmoid(z)[1])),
        (jb.SoftmaxCrossEntropy(), p, lambda z: np.diag(p(z)) - np.outer(p(z), p(z))),
        (jb.PoissonNLL(), np.exp, lambda z: np.diag(np.exp(z))),
    )
    z, v, y = normal(0, B, 4), normal(1, B, 4), np.exp(normal(2, B, 4))
    y = y / y.sum(axis=1, keepdims=True)
    for loss, mean, variance in family:
        found = [f.canonical(mean, variance, z[n], y[n]) for n in range(B)]
        _, delta, true, product, _, curved = asked(loss, z, y, v)
        own = np.stack([d for d, _ in found])
        same([own, own], [delta, true])
        own = np.stack([h @ v[n] for n, (_, h) in enumerate(found)])
        same([own, own], [product, curved])


@compares("batch_gradient")
def batch_gradient(f):
    net, loss = jb.Dense(3, 2), jb.SquaredError()
    params, mu = parameters(net), normal(3, B)
    x, y = normal(1, B, 3), normal(2, B, 2)
    bp = jb.backprop(net, loss, params, x, y)
    found = f.batch_gradient(mu, x, delta_of(bp))
    same(found, gradient_of(bp, jnp.asarray(mu))["w"])
    same(found, jax.grad(lambda p: loss.value(jb.forward(net, p, x)[0], y) @ mu)(params)["w"])
    same(f.batch_gradient(np.full(B, 1 / B), x, x), x.T @ x / B)


# Pairs.


@functools.cache
def kinds():
    """Pairs of every kind that answers for single examples, of batches of B."""
    key = jax.random.key(0)

    def of(net, x):
        return tried(net, x)[2][2]

    ids = jax.random.randint(key, (B, 5), 0, 4)
    x = normal(0, B, 5, 3)
    dense, norm = of(jb.Dense(3, 2), x), of(jb.LayerNorm(3), x)
    conv = of(jb.Conv(3, 2, (3,), stride=2, padding=((2, 1),), dilation=2), normal(1, B, 7, 3))
    lookup, full = of(jb.Embedding(4, 3), ids), of(_autodiff(), normal(2, B, 4))
    tied = of(jb.Tied(jb.Embedding(4, 3), jb.Tanh()), ids)[0]
    nothing = of(jb.Frozen(jb.Dense(3, 2)), x)
    return {"Outer": dense["w"], "Shift": dense["b"], "Scale": norm["scale"], "Patches": conv["w"],
            "Lookup": lookup["w"], "Full": full["w"], "Sum": tied["w"], "Nothing": nothing["w"]}  # fmt: skip


def test_of_every_kind_there_is_a_pair():
    assert {*kinds(), "Coupled"} == set(PAIRS)
    assert all(type(pair).__name__ == name for name, pair in kinds().items())


def _bent(params, x):
    return jnp.tanh(x @ params["w"])


def _bent_params(key):
    return {"w": jax.random.normal(key, (4, 3))}


def _autodiff():
    return jb.Autodiff(_bent, _bent_params)


def check_kind(name, gradient):
    """gradient(pair's arrays of one example, one group)."""
    pair = kinds()[name]
    arrays = jax.tree.map(lambda v: np.asarray(v[:, 0]), pair)
    each = each_of(pair)
    for n in range(B):
        same(gradient(nth(arrays, n)), each[n])


@compares("outer_gradient")
def outer_gradient(f):
    check_kind("Outer", lambda p: f.outer_gradient(p.a, p.delta))


@compares("shift_gradient")
def shift_gradient(f):
    check_kind("Shift", lambda p: f.shift_gradient(p.delta))


@compares("scale_gradient")
def scale_gradient(f):
    check_kind("Scale", lambda p: f.scale_gradient(p.h, p.delta))


@compares("lookup_gradient")
def lookup_gradient(f):
    check_kind("Lookup", lambda p: f.lookup_gradient(p.ids, p.delta, p.rows))
    pair = jb.Lookup.of(jnp.array([0, 7, -1]), jnp.ones((3, 2)), 4)  # two ids drop out
    pair = jax.tree.map(lambda v: v[None], pair).at(jb.Place((4, 2), jnp.dtype(float)))
    same(f.lookup_gradient(np.array([0, 7, -1]), np.ones((3, 2)), 4), each_of(pair)[0])


@compares("patches_gradient")
def patches_gradient(f):
    check_kind("Patches", lambda p: f.patches_gradient(p.a, p.delta, 3, 2, 2, 2))


@compares("sum_gradient")
def sum_gradient(f):
    pair = kinds()["Sum"]
    parts, each, squares = *each_of((pair.parts, pair)), jax.jit(lambda p: p.square_norm())(pair)
    for n in range(B):
        g, square = f.sum_gradient([np.asarray(part[n]) for part in parts])
        same([g, square], [each[n], squares[n]])


@compares("full_gradient")
def full_gradient(f):
    net, x = _autodiff(), normal(2, B, 4)
    params, delta, found = tried(net, x)
    jacobian = jax.vmap(jax.jacobian(_bent), (None, 0))(params, x)["w"].reshape(B, 3, -1)
    assert type(found[2]["w"]) is jb.Full
    for n in range(B):
        own = f.full_gradient(delta[n], np.asarray(jacobian[n]))
        same(own, found[4]["w"][n].reshape(-1))


@compares("nothing_gradient")
def nothing_gradient(f):
    pair = kinds()["Nothing"]
    same(f.nothing_gradient(normal(0, 3, 2)), each_of(pair)[0])
    assert not f.nothing_gradient(normal(0, 3, 2)).any()


@compares("coupled_gradient")
def coupled_gradient(f):
    net, loss = jb.Sequential(jb.Dense(3, 4), jb.BatchNorm(4)), jb.SquaredError()
    params = parameters(net)
    x, y = normal(1, B, 3), normal(2, B, 4)
    bp = jb.backprop(net, loss, params, x, y)
    total = jax.jit(jax.grad(lambda p: loss.value(jb.forward(net, p, x)[0], y).sum()))(params)
    pairs = (bp.factored[0]["w"], bp.factored[1]["scale"])
    assert all(type(pair) is jb.factored.Coupled for pair in pairs)
    shares = each_of([pair.pair for pair in pairs])
    mean = gradient_of(bp)
    means = mean[0]["w"], mean[1]["scale"]
    for own, its, due in zip(shares, means, (total[0]["w"], total[1]["scale"]), strict=True):
        found = f.coupled_gradient(np.asarray(own))
        same([found / B, found], [its, due])


def rows(pair):
    return np.asarray(each_of(pair)).reshape(B, -1)


@compiled()
def answers(pair, mu, v, other):
    return (pair.total(mu), pair.square_norm(), pair.project(v), pair.second_moment(mu),
            *pair.moments(mu), pair.dot(other), pair.gram(other))  # fmt: skip


@compares("total", "square_norm", "project", "moments", "dot_and_gram")
def questions(f):
    mu = np.abs(normal(9, B))
    for pair in kinds().values():
        g, v = rows(pair), normal(8, *pair.home.shape)
        other = pair.with_deltas(lambda d: jnp.roll(d, 1, axis=0) - 0.5 * d)
        due = answers(pair, mu, v, other)
        dot, gram = f.dot_and_gram(g, rows(other))
        own = (
            f.total(g, mu),
            f.square_norm(g),
            f.project(g, v.ravel()),
            *f.moments(g, mu),
            dot,
            gram,
        )
        for one, its in zip(own, due, strict=True):
            same(one, its.reshape(one.shape))


@compares("shared_by_two")
def shared_by_two(f):
    a, delta, more_a, more_delta = (normal(i, B, 4 - i // 2, 3 - i % 2) for i in range(4))
    place = jb.Place((3, 2), jnp.dtype(float))
    one, two = (
        jax.vmap(jb.Outer.of)(jnp.asarray(p), jnp.asarray(q)).at(place)
        for p, q in ((a, delta), (more_a, more_delta))
    )
    each = each_of(jb.Sum((one, two), place))
    for n in range(B):
        same(f.shared_by_two(a[n], delta[n], more_a[n], more_delta[n]), each[n])


# Layers.


@compares("dense")
def dense(f):
    def rule(w, x, delta):
        return f.dense(w["w"], w["b"], x, delta)

    compare(jb.Dense(3, 4), rule, (5, 3), name="dense")
    compare(jb.Dense(5, 2), rule, (1, 5))


@compares("gain")
def gain(f):
    compare(jb.Gain(3), lambda w, x, d: f.gain(w["scale"], x, d), (4, 3), name="gain")


@compares("affine")
def affine(f):
    def rule(w, x, delta):
        return f.affine(w["scale"], w["shift"], x, delta)

    compare(jb.Affine(3), rule, (4, 3), name="affine")


@compares("times")
def times(f):
    compare(jb.Times(-0.7), plain(lambda x, d: f.times(-0.7, x, d)), (4, 3))


@compares("dropout")
def dropout(f):
    net, key = jb.Dropout(0.4), jax.random.key(3)
    m = np.asarray(jb.forward(net, (), jnp.ones((B, 4, 5)), key)[0] != 0).astype(float)
    assert 0 < m.mean() < 1
    x, left = normal(0, B, 4, 5), iter(m)
    compare(net, plain(lambda x, d: f.dropout(next(left), 0.4, x, d)), x, key)


@compares("autodiff")
def autodiff(f):
    def rule(w, x, delta):
        dy_dw, dy_dx = jax.jacobian(_bent, argnums=(0, 1))(w, x)
        delta_x, grads = f.autodiff(*jax.tree.map(np.asarray, (dy_dx, dy_dw)), delta)
        return np.tanh(x @ w["w"]), delta_x, grads

    compare(_autodiff(), rule, (4,), name="autodiff")


def _cube(z):
    return z * z * z


def _cube_slope(z):
    return 3 * z * z


@compares("activation")
def activation(f):
    rule = plain(lambda z, d: f.activation(_cube, _cube_slope, z, d))
    compare(jb.Activation(_cube, _cube_slope), rule, (3, 4))


ACTIVATIONS = {
    "identity": [(jb.Identity(), ())],
    "sigmoid": [(jb.Sigmoid(), ())],
    "tanh": [(jb.Tanh(), ())],
    "relu": [(jb.Relu(), ())],
    "leaky_relu": [(jb.LeakyRelu(), (0.01,)), (jb.LeakyRelu(0.3), (0.3,))],
    "elu": [(jb.Elu(), (1.0,)), (jb.Elu(0.6), (0.6,))],
    "selu": [(jb.Selu(), ())],
    "celu": [(jb.Celu(), (1.0,)), (jb.Celu(0.6), (0.6,))],
    "softplus": [(jb.Softplus(), ())],
    "softsign": [(jb.Softsign(), ())],
    "silu": [(jb.Silu(), ())],
    "gelu": [(jb.Gelu(), ())],
    "gelu_by_tanh": [(jb.Gelu(tanh=True), ())],
    "mish": [(jb.Mish(), ())],
    "hard_tanh": [(jb.HardTanh(), ())],
}


@compares(*ACTIVATIONS)
def activations(f, names=ACTIVATIONS):
    z = 2 * normal(0, B, 20)
    for name in names:
        for net, options in ACTIVATIONS[name]:

            def rule(params, z, delta, name=name, options=options):
                a, slope = getattr(f, name)(z, *options)
                return a, delta * slope, ()

            compare(net, rule, z)
            kinks = np.tile(
                np.array(net.kinks), (B, 1)
            )  # where autodiff has conventions of its own
            if kinks.size:
                _, delta, found = tried(net, kinks)
                a, delta_z, _ = rule((), kinks, delta)
                same([a, delta_z], found[:2])


def test_of_every_activation_there_is_a_formula():
    here = {type(net).__name__ for tried in ACTIVATIONS.values() for net, _ in tried}
    assert here | {"Activation"} == set(concrete(layers, layers.Elementwise))


@compares("softmax")
def softmax(f):
    compare(jb.Softmax(), plain(f.softmax), (2, 3, 4))


# Convolutions and pooling.


@compares("covered")
def covered(f):
    """The numbers of the places that `Geometry.patches` picks, 0 where there is none."""
    for size, kernel, stride, dilation, padding in (
        ((7,), (3,), (2,), (2,), ((2, 1),)),
        ((4, 5), (2, 3), (1, 2), (2, 1), ((1, 0), (0, 2))),
    ):
        geometry = factored.Geometry(kernel, stride, padding, dilation, (1,) * len(size))
        places = 1.0 + np.arange(np.prod(size)).reshape(1, *size, 1)
        due = np.asarray(geometry.patches(jnp.asarray(places)))[0, ..., 0]
        found = np.zeros_like(due)
        for t in np.ndindex(*geometry.outputs(size)):
            for k, u in f.covered(t, kernel, stride, dilation, [p for p, _ in padding], size):
                found[t + k] = places[0][u][0]
        same(found, due)


@compares("same_padding")
def same_padding(f):
    for n in range(1, 9):
        for kernel, stride, dilation in ((1, 1, 1), (2, 1, 1), (3, 2, 1), (2, 3, 2), (3, 4, 2)):
            reach = (kernel - 1) * dilation + 1
            found = f.same_padding(n, kernel, stride, dilation)
            assert (found,) == windows.pairs("SAME", (n,), (reach,), (stride,))
            outputs = (n + sum(found) - reach) // stride + 1
            assert outputs == -(-n // stride) or sum(found) == 0


def in_front(f, size, kernel, stride, dilation):
    """The padding in front that "SAME" has, for each axis."""
    sizes = zip(size, kernel, stride, dilation, strict=True)
    return [f.same_padding(*each)[0] for each in sizes]


@compares("conv")
def conv(f):
    def rule(stride, dilation, padding, groups=1):
        return lambda w, x, d: f.conv(w["w"], w["b"], x, d, stride, dilation, padding, groups)

    explicit = rule((2,), (2,), (2,), 2)
    net = jb.Conv(4, 6, (3,), stride=2, padding=((2, 1),), dilation=2, groups=2)
    compare(net, explicit, (7, 4), name="conv")
    valid = rule((1, 2), (1, 1), (0, 0))
    compare(jb.Conv(2, 3, (2, 3), stride=(1, 2), padding="VALID"), valid, (4, 5, 2))
    front = in_front(f, (5, 4), (3, 2), (2, 1), (1, 2))
    net = jb.Conv(2, 3, (3, 2), stride=(2, 1), dilation=(1, 2))
    compare(net, rule((2, 1), (1, 2), front), (5, 4, 2))


@compares("conv_transpose")
def conv_transpose(f):
    def rule(stride, dilation, padding, groups=1):
        def of(w, x, delta):
            return f.conv_transpose(w["w"], w["b"], x, delta, stride, dilation, padding, groups)

        return of

    net = jb.ConvTranspose(4, 6, (3,), stride=2, padding=((2, 1),), dilation=2, groups=2)
    compare(net, rule((2,), (2,), (2,), 2), (6, 4), name="conv_transpose")
    net = jb.ConvTranspose(2, 3, (2, 3), stride=(3, 1), padding="VALID")
    compare(net, rule((3, 1), (1, 1), (0, 0)), (3, 4, 2))
    front = in_front(f, (3 * 2, 4), (3, 2), (2, 1), (1, 1))  # what the Conv of its outputs has
    compare(jb.ConvTranspose(2, 3, (3, 2), stride=(2, 1)), rule((2, 1), (1, 1), front), (3, 4, 2))


@compares("max_pool", "average_pool")
def pools(f, names=("max_pool", "average_pool")):
    for name in names:
        net = {"max_pool": jb.MaxPool, "average_pool": jb.AveragePool}[name]
        pool = getattr(f, name)
        front = in_front(f, (5, 4), (3, 2), (2, 1), (1, 1))
        compare(
            net((3, 2), stride=(2, 1), padding="SAME"),
            plain(lambda x, d, pool=pool, front=front: pool(x, d, (3, 2), (2, 1), front)),
            (5, 4, 3),
        )
        compare(net((2,)), plain(lambda x, d, pool=pool: pool(x, d, (2,), (2,), (0,))), (7, 3))
    if "max_pool" in names:  # the first of those that are equal
        _, delta, found = tried(jb.MaxPool((2, 2)), np.ones((B, 4, 4, 2)))
        for n in range(B):
            own = f.max_pool(np.ones((4, 4, 2)), delta[n], (2, 2), (2, 2), (0, 0))
            same(own, [found[0][n], found[1][n]])


@compares("global_max_pool", "global_average_pool")
def global_pools(f):
    def over(pool):
        def rule(x, delta):
            y, delta_x = pool(flat(x), delta)
            return y, delta_x.reshape(x.shape)

        return plain(rule)

    compare(jb.GlobalMaxPool(), over(f.global_max_pool), (3, 2, 4))
    compare(jb.GlobalAveragePool(), over(f.global_average_pool), (3, 2, 4))
    _, delta, found = tried(jb.GlobalMaxPool(), np.ones((B, 3, 2)))
    same(f.global_max_pool(np.ones((3, 2)), delta[0]), [found[0][0], found[1][0]])


# Normalisation, tables, attention.


@compares("normalization", "layer_norm", "rms_norm", "group_norm", "instance_norm")
def norms(f):
    def of(name, *options):
        def rule(w, x, delta):
            return getattr(f, name)(w["scale"], w["shift"], x, delta, *options)

        return rule

    compare(jb.LayerNorm(5, 0.03), of("layer_norm", 0.03), (2, 4, 5), name="layer_norm")
    rms = jb.RMSNorm(5, 0.03, shift=True)
    compare(rms, of("rms_norm", 0.03), (2, 4, 5), name="rms_norm")
    compare(jb.GroupNorm(2, 6), of("group_norm", 1e-5, 2), (3, 2, 6), name="group_norm")
    compare(jb.InstanceNorm(3), of("instance_norm", 1e-5), (2, 3, 3), name="instance_norm")

    def by_hand(w, x, delta):
        return f.normalization(lambda v: v.mean(), w["scale"], w["shift"], x, delta, 1e-5)

    compare(jb.GroupNorm(1, 3), by_hand, (4, 3))


@compares("batch_norm")
def batch_norm(f):
    net, x = jb.BatchNorm(3, 0.03), normal(0, B, 4, 3)
    params, delta, (y, delta_x, pairs, total, _, true_w, true_x) = tried(net, x)
    own = f.batch_norm(params["scale"], params["shift"], x, delta, 0.03)
    same(own, (y, delta_x, total))
    same(own[1:], (true_x, true_w))
    KINDS["batch_norm"] = {type(pair).__name__ for pair in pairs.values()}


@compares("embedding")
def embedding(f):
    def rule(w, ids, delta):
        y, grads = f.embedding(w["w"], ids, delta)
        return y, None, grads

    ids = np.random.default_rng(0).integers(0, 5, (B, 6))
    compare(jb.Embedding(5, 3), rule, ids, name="embedding")


@compares("positions")
def positions(f):
    def rule(w, x, delta):
        return f.positions(w["w"], x, delta)

    compare(jb.Positions(6, 3), rule, (4, 3), name="positions")
    compare(jb.Positions(4, 3), rule, (4, 3))


@compares("rotary")
def rotary(f):
    for heads, base, interleaved in ((2, 10000.0, False), (1, 7.0, True)):
        net = jb.Rotary(heads, base, interleaved)

        def rule(x, delta, options=(heads, base, interleaved)):
            return f.rotary(x, delta, *options)

        compare(net, plain(rule), (5, 6 * heads))


@compares("attend")
def attend(f):
    q, k, v = normal(0, B, 3, 2), normal(1, B, 4, 2), normal(2, B, 4, 5)

    def rule(x, delta):
        y, *deltas = f.attend(*x, np.ones((3, 4)), 0.7, delta)
        return y, tuple(deltas)

    compare(jb.Attention(1, scale=0.7), plain(rule), (q, k, v))


@compares("attention")
def attention(f):
    T, S = 5, 5
    q, k, v = normal(0, B, T, 4 * 2), normal(1, B, S, 2 * 2), normal(2, B, S, 2 * 3)
    mask = np.random.default_rng(3).random((B, T, S)) < 0.6
    mask[0, 2] = False  # a query that may attend to nothing

    def rule(x, delta, causal=True):
        q, k, v, *mask = x
        m = np.tril(np.ones((T, S))) if causal else np.ones((T, S))
        m = m * mask[0] if mask else m
        y, *deltas = f.attention(q, k, v, m, 1 / np.sqrt(2), 4, 2, delta)
        return y, tuple(deltas)

    compare(jb.Attention(4, 2), plain(functools.partial(rule, causal=False)), (q, k, v))
    compare(jb.Attention(4, 2, causal=True, block=2), plain(rule), (q, k, v, mask))


# Recurrence.


def recurrent(layer, rule, state, name):
    """A rule (params, x, first, delta, delta_last, truncate) -> (y, last, delta_x, ...) of a layer.

    From zeros, backwards, from a state that is handed in and on, and truncated.
    """
    p, q = 3, 2
    x, zeros = normal(0, B, 5, p), jax.tree.map(np.zeros_like, nth(state, 0))

    def from_zeros(params, x, delta, turn=1, truncate=None):
        y, _, delta_x, _, grads = rule(params, x[::turn], zeros, delta[::turn], zeros, truncate)
        return y[::turn], delta_x[::turn], grads

    def with_states(params, x, delta):
        y, last, delta_x, first, grads = rule(params, *x, *delta, 2)
        return (y, last), (delta_x, first), grads

    compare(layer(p, q), from_zeros, x, name=name)
    backwards = functools.partial(from_zeros, turn=-1, truncate=2)
    compare(layer(p, q, reverse=True, truncate=2), backwards, x)
    compare(layer(p, q, states=True, truncate=2), with_states, (x, state))


@compares("rnn")
def rnn(f):
    for activation, name in ((jb.Tanh(), "tanh"), (jb.Gelu(), "gelu")):
        f_of = getattr(f, name)

        def rule(w, x, h, delta, delta_h, truncate, f_of=f_of):
            return f.rnn(w["w_x"], w["w_h"], w["b"], x, h, lambda z: f_of(z)[0],
                         lambda z: f_of(z)[1], delta, delta_h, truncate)  # fmt: skip

        layer = functools.partial(jb.RNN, activation=activation)
        recurrent(layer, rule, normal(5, B, 2), "rnn")


@compares("lstm")
def lstm(f):
    def rule(w, x, first, delta, delta_last, truncate):
        return f.lstm(w["w_x"], w["w_h"], w["b"], x, *first, delta, *delta_last, truncate)

    recurrent(jb.LSTM, rule, (normal(5, B, 2), normal(6, B, 2)), "lstm")


@compares("gru")
def gru(f):
    def rule(w, x, h, delta, delta_h, truncate):
        return f.gru(w["w_x"], w["w_h"], w["b"], w["b_h"], x, h, delta, delta_h, truncate)

    recurrent(jb.GRU, rule, normal(5, B, 2), "gru")


# Layers that move entries, and joins.


@compares("flatten", "reshape", "upsample", "split", "select", "take")
def moves(f):
    compare(jb.Flatten(), plain(f.flatten), (3, 2, 2))
    compare(jb.Reshape((2, 6)), plain(functools.partial(f.reshape, (2, 6))), (4, 3))
    compare(jb.Upsample((3, 2)), plain(functools.partial(f.upsample, (3, 2))), (2, 3, 4))
    compare(jb.Upsample(2), plain(functools.partial(f.upsample, 2)), (3, 2))
    compare(jb.Split(1, 3, 2), plain(functools.partial(f.split, (1, 3, 2))), (4, 6))
    several = (normal(0, B, 3), normal(1, B, 2, 2), normal(2, B, 1))
    compare(jb.Select(1), plain(functools.partial(f.select, 1)), several)
    compare(jb.Take(), plain(functools.partial(f.take, -1)), (4, 3))
    compare(jb.Take(1), plain(functools.partial(f.take, 1)), (4, 3))


@compares("add", "multiply", "concatenate", "maximum")
def joins(f):
    alike = tuple(normal(i, B, 2, 3) for i in range(4))
    compare(jb.layers.Add(), plain(f.add), alike)
    compare(jb.layers.Multiply(), plain(f.multiply), alike)
    compare(jb.layers.Maximum(), plain(f.maximum), alike)
    apart = tuple(normal(i, B, 2, 3 + i) for i in range(3))
    compare(jb.layers.Concatenate(), plain(f.concatenate), apart)
    equal = (np.ones((B, 3)),) * 3  # the first of those that are equal
    _, delta, found = tried(jb.layers.Maximum(), equal)
    same(f.maximum(nth(equal, 0), delta[0]), nth(found[:2], 0))


# Composites: layers are pairs of functions, made of the page's own.


def dense_of(f, w):
    def forward(x):
        return f.dense(w["w"], w["b"], x, np.zeros((len(x), len(w["b"]))))[0]

    return forward, lambda x, delta: f.dense(w["w"], w["b"], x, delta)[1:]


def tanh_of(f):
    return lambda z: f.tanh(z)[0], lambda z, delta: (delta * f.tanh(z)[1], ())


def chain_of(f, *own):
    """Dense and tanh layers, as a pair themselves."""
    chain = [dense_of(f, w) if w else tanh_of(f) for w in own]

    def back(x, delta):
        _, delta_x, grads = f.sequential(chain, x, delta)
        return delta_x, tuple(grads)

    return lambda x: f.sequential(chain, x, np.zeros_like(chain_end(chain, x)))[0], back


def chain_end(chain, x):
    for forward, _ in chain:
        x = forward(x)
    return x


@compares("sequential")
def sequential(f):
    def rule(own, x, delta):
        y, delta_x, grads = f.sequential(
            [dense_of(f, own[0]), tanh_of(f), dense_of(f, own[2])], x, delta
        )
        return y, delta_x, tuple(grads)

    compare(jb.Sequential(jb.Dense(3, 4), jb.Tanh(), jb.Dense(4, 2)), rule, (5, 3))


@compares("skip")
def skip(f):
    def rule(own, x, delta):
        around = (lambda x: x, lambda x, delta: (delta, ()))
        y, delta_x, (branch, _) = f.skip(chain_of(f, *own), around, x, delta)
        return y, delta_x, branch

    def with_shortcut(own, x, delta):
        branch, shortcut = own
        return f.skip(dense_of(f, branch), dense_of(f, shortcut), x, delta)

    compare(jb.Skip(jb.Sequential(jb.Dense(3, 3), jb.Tanh())), rule, (5, 3))
    compare(jb.Skip(jb.Dense(3, 2), jb.Dense(3, 2)), with_shortcut, (5, 3))


@compares("fan_out", "parallel")
def side_by_side(f):
    def rule(which):
        def of(own, x, deltas):
            branches = [dense_of(f, own[0]), tanh_of(f), dense_of(f, own[2])]
            y, delta_x, grads = which(branches, x, deltas)
            return tuple(y), delta_x, tuple(grads)

        return of

    branches = jb.Dense(3, 2), jb.Tanh(), jb.Dense(3, 4)
    compare(jb.FanOut(*branches), rule(f.fan_out), (5, 3))
    several = tuple(normal(i, B, 5, 3) for i in range(3))
    compare(jb.Parallel(*branches), rule(f.parallel), several)


@compares("repeat")
def repeat(f):
    def rule(stacked, x, delta):
        copies = [nth(stacked, l) for l in range(4)]
        y, delta_x, grads = f.repeat(lambda own: chain_of(f, *own), copies, x, delta)
        return y, delta_x, stack(grads)

    copy = jb.Sequential(jb.Dense(3, 3), jb.Tanh())
    for every in (None, 3):
        compare(jb.Repeat(copy, 4, checkpoint_every=every), rule, (5, 3))


@compares("checkpoint")
def checkpoint(f):
    def rule(own, x, delta):
        y, delta_x, grads = f.checkpoint([tanh_of(f), dense_of(f, own[1])], x, delta)
        return y, delta_x, tuple(grads)

    compare(jb.Checkpoint(jb.Sequential(jb.Tanh(), jb.Dense(3, 2))), rule, (5, 3))


@compares("reversible")
def reversible(f):
    def rule(own, x, delta):
        y, delta_x, grads, again = f.reversible(chain_of(f, *own[0]), dense_of(f, own[1]), x, delta)
        same(again, x)
        return y, delta_x, grads

    net = jb.Reversible(jb.Sequential(jb.Tanh(), jb.Dense(2, 2)), jb.Dense(2, 2))
    compare(net, rule, (5, 4))


@compares("frozen")
def frozen(f):
    def rule(own, x, delta):
        return f.frozen(dense_of(f, own), x, delta)

    compare(jb.Frozen(jb.Dense(3, 2)), rule, (5, 3), name="frozen")


@compares("tied")
def tied(f):
    def rule(own, ids, delta):
        y, grads, in_body = f.tied(own[0]["w"], chain_of(f, *own[1]), ids, delta)
        return y, None, (grads, in_body)

    body = jb.Sequential(jb.Dense(3, 3), jb.Tanh())
    ids = np.random.default_rng(0).integers(0, 5, (B, 6))
    compare(jb.Tied(jb.Embedding(5, 3), body), rule, ids)
    pair = tried(jb.Tied(jb.Embedding(5, 3), jb.Tanh()), ids)[2][2][0]["w"]
    KINDS["tied"] = {type(p).__name__ for p in (pair, *pair.parts)}


# Losses.


@compiled(0)
def asked(loss, z, y, v):
    def delta(z):
        return jax.grad(lambda z: loss.value(z, y).sum())(z)

    root = loss.hessian_root(z, y)
    blocks = jnp.einsum("rn...o,rn...j->n...oj", root, root)
    curved = jax.jvp(delta, (z,), (v,))[1]
    return (
        loss.value(z, y),
        loss.delta(z, y),
        delta(z),
        loss.hessian_product(z, y, v),
        blocks,
        curved,
    )


def check_loss(f, loss, formula, z, y, spread=None, m=None, gauss_newton=False):
    """z (B, T, q); `spread` makes the formula's targets of y, m (B, T) tells what counts."""
    v, spread = normal(9, *z.shape), y if spread is None else spread
    m = np.ones(z.shape[:2]) if m is None else m
    own = [f.over_positions(formula, z[n], spread[n], m[n]) for n in range(B)]
    cost, delta, hessian = stack(own)
    value, its, true, product, blocks, curved = asked(loss, z, y, v)
    same([cost, delta, delta], [value, its, true])
    found = np.einsum("ntoj,ntj->nto", hessian, v)
    same([found, hessian], [product, blocks])
    if not gauss_newton:
        same(found, curved)
    if z.shape[1] == 1:  # without an axis of positions
        same([cost, delta[:, 0]], asked(loss, z[:, 0], y[:, 0], v[:, 0])[:2])


def outputs(positions=2, q=4):
    z = normal(0, B, positions, q)
    return z, np.exp(normal(1, *z.shape))


OF_NUMBERS = {
    "squared_error": (jb.SquaredError(), ()),
    "poisson_nll": (jb.PoissonNLL(), ()),
    "huber": (jb.Huber(0.7), (0.7,)),
}


@compares(*OF_NUMBERS)
def losses_of_numbers(f, names=OF_NUMBERS):
    for name in names:
        loss, options = OF_NUMBERS[name]
        for T in (1, 2):
            formula = getattr(f, name)
            check_loss(f, loss, lambda z, y, g=formula, o=options: g(z, y, *o), *outputs(T))


@compares("sigmoid_cross_entropy", "softmax_cross_entropy", "cross_entropy")
def losses_of_probabilities(f):
    for T in (1, 2):
        z, y = outputs(T)
        y = y / y.sum(axis=-1, keepdims=True)
        a = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        check_loss(f, jb.SigmoidCrossEntropy(), f.sigmoid_cross_entropy, z, y)
        check_loss(f, jb.SoftmaxCrossEntropy(), f.softmax_cross_entropy, z, y)
        check_loss(f, jb.CrossEntropy(), f.cross_entropy, a, y)
        labels = np.random.default_rng(2).integers(0, 4, (B, T))
        omega = (0.5, 1.0, 2.0, 0.3)
        loss = jb.SoftmaxCrossEntropy(label_smoothing=0.2, class_weights=omega)

        def smoothed(z, y, omega=omega):
            return f.softmax_cross_entropy(z, y, np.array(omega), 0.2)

        check_loss(f, loss, smoothed, z, labels, np.eye(4)[labels])


@compares("over_positions")
def over_positions(f):
    z, _ = outputs(5)
    labels = np.random.default_rng(2).integers(0, 4, (B, 5))
    labels[0] = 1  # nothing of this example counts
    loss = jb.SoftmaxCrossEntropy(ignore_index=1)
    counted = (labels != 1).astype(float)
    check_loss(f, loss, f.softmax_cross_entropy, z, labels, np.eye(4)[labels], counted)
    check_loss(f, jb.SquaredError(), f.squared_error, *outputs(3))


@compares("fused_softmax_cross_entropy")
def fused_softmax_cross_entropy(f):
    T, p, q, cap, omega = 3, 2, 5, 1.5, (0.5, 1.0, 2.0, 0.3, 0.7)
    loss = jb.FusedSoftmaxCrossEntropy(0.2, omega, logit_cap=cap, block=2, vocab_block=2)
    w, b, h, mu = normal(0, p, q), normal(1, q), normal(2, B, T, p), normal(3, B)
    y = np.random.default_rng(4).integers(0, q, (B, T))

    def one(h, y):
        return f.fused_softmax_cross_entropy(w, b, h, np.eye(q)[y], cap, np.array(omega), 0.2)

    own = stack([stack([one(h[n, t], y[n, t]) for t in range(T)]) for n in range(B)])
    cost, delta_h, dw, db, hessian = own
    weighted = np.einsum("n,ntio->io", mu, dw) / T, np.einsum("n,nto->o", mu, db) / T

    @compiled()
    def asked(h, w, b, v):
        def costs(h, w, b):
            return loss.value(jnp.dot(h, w) + jnp.broadcast_to(b, (B, T, q)), y)

        z = jnp.dot(h, w) + jnp.broadcast_to(b, (B, T, q))
        root = loss.hessian_root(z, y)
        alone = loss.value(z, y), loss.delta(z, y), loss.hessian_product(z, y, v)
        by_autodiff = (
            jax.grad(lambda h: costs(h, w, b).sum())(h),
            jax.grad(lambda w, b: costs(h, w, b) @ mu, argnums=(0, 1))(w, b),
        )
        blocks = jnp.einsum("rnto,rntj->ntoj", root, root)
        return tuple(loss.head(h, w, b, y, mu)), by_autodiff, (*alone, blocks)

    cost, delta_h, db, hessian = cost.mean(axis=1), delta_h / T, db / T, hessian / T
    v = normal(5, B, T, q)
    fused, by_autodiff, alone = asked(h, w, b, v)
    same([cost, delta_h, *weighted], fused)
    same([delta_h, weighted], by_autodiff)
    same([cost, db, np.einsum("ntoj,ntj->nto", hessian, v), hessian], alone)


@compares("cross_entropy_behind_softmax")
def cross_entropy_behind_softmax(f):
    z, y = (v[:, 0] for v in outputs(1))
    net, loss = jb.Sequential(jb.Dense(4, 4), jb.Softmax()), jb.CrossEntropy()
    params = ({"w": np.eye(4), "b": np.zeros(4)}, ())
    delta = delta_of(jb.backprop(net, loss, params, z, y))
    true = truth(net, loss, params, z, y)[0]["b"]
    for n in range(B):
        same([f.cross_entropy_behind_softmax(z[n], y[n])] * 2, [delta[n], true[n]])


# Quantities.


gram_of = jax.jit(lambda pair: pair.gram(pair))


def of_positions(T):
    """Dense, tanh, Dense, without biases: backprop's answer and every example's gradient."""
    net = jb.Sequential(jb.Dense(3, 4, bias=False), jb.Tanh(), jb.Dense(4, 2, bias=False))
    params = parameters(net)
    x, y = normal(1, B, T, 3), normal(2, B, T, 2)
    bp = jb.backprop(net, jb.SquaredError(), params, x, y)
    each = truth(net, jb.SquaredError(), params, x, y)
    pairs = [bp.factored[l]["w"] for l in (0, 2)]
    return bp, [(np.asarray(p.a[:, 0]), np.asarray(p.delta[:, 0])) for p in pairs], each


@compares("norms_of_one_position", "norms_of_positions", "inner_products")
def per_example_norms(f):
    for T in (1, 5):
        bp, pairs, each = of_positions(T)
        by_layer = jb.per_example.norms(bp, per_layer=True, method="gram" if T > 1 else "auto")
        for l, (a, delta) in zip((0, 2), pairs, strict=True):
            rows = np.asarray(each[l]["w"]).reshape(B, -1)
            found = f.norms_of_positions(a, delta)
            same([found, found], [by_layer[f"layers[{l}]"], np.linalg.norm(rows, axis=1)])
            pair = bp.factored[l]["w"]
            same([f.inner_products(a, delta)] * 2, [gram_of(pair), rows @ rows.T])
            if T == 1:
                same(f.norms_of_one_position(a[:, 0], delta[:, 0]), found)
        grams = sum(f.inner_products(*pair) for pair in pairs)
        same(grams, jb.per_example.gram(bp))


@compares("clipped_sum")
def clipped_sum(f):
    bp, pairs, each = of_positions(4)
    norms = np.asarray(jb.per_example.norms(bp))
    bound = float(np.sort(norms)[1]) * 0.99  # some are shorter, some longer
    assert (norms < bound).any()
    assert (norms > bound).any()
    found = f.clipped_sum(pairs, bound)
    same(found, jb.per_example.clipped_gradient(bp, bound).gradient)
    factors = np.minimum(1, bound / norms)
    same(found, jax.tree.map(lambda g: np.einsum("n,nio->io", factors, g), each))


@compares("variance")
def variance(f):
    bp, pairs, each = of_positions(1)
    due = jb.per_example.variance(bp)
    for l, (a, delta) in zip((0, 2), pairs, strict=True):
        found = f.variance(a[:, 0], delta[:, 0])
        same([found, found], [due[l]["w"], np.var(each[l]["w"], axis=0)])


@functools.cache
def curved():
    """A network of two layers under cross-entropy, with its Jacobians, Hessians and roots."""
    net, loss = jb.mlp([3, 4, 3]), jb.SoftmaxCrossEntropy()
    params = parameters(net)
    x, y = normal(1, B, 3), np.array([0, 2, 1])
    vector = normal_like(2, params)

    @compiled()
    def arrays(params, vector):
        row, form = ravel_pytree(params)

        def outputs(row):
            return jb.forward(net, form(row), x)[0]

        z = outputs(row)
        hessians = jax.vmap(jax.hessian(lambda z, y: loss.value(z[None], y[None])[0]))(z, y)
        roots = loss.hessian_root(z, y)
        return jax.jacfwd(outputs)(row), hessians, roots, ravel_pytree(vector)[0]

    return (net, loss, params, x, jnp.asarray(y)), vector, arrays(params, vector)


def in_a_row(tree):
    """All numbers of a tree, in the order of `ravel_pytree`."""
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])


@compares("ggn_product", "diag_ggn")
def gauss_newton(f):
    batch, vector, (jacobians, hessians, roots, v) = curved()
    found = f.ggn_product(jacobians, hessians, v)
    same(found, in_a_row(cv.ggn_product(*batch, vector)))
    same(f.diag_ggn(jacobians, roots), in_a_row(cv.diag_ggn(*batch)))
    matrix = np.einsum("nop,noj,njs->ps", jacobians, hessians, jacobians) / B
    same([found, f.diag_ggn(jacobians, roots)], [matrix @ v, np.diag(matrix)])


@compares("diag_ggn_of_pairs")
def diag_ggn_of_pairs(f):
    batch, _, (_, _, roots, _) = curved()
    _, _, params, x, _ = batch
    a = np.tanh(x @ params[0]["w"] + params[0]["b"])
    below = np.einsum("vno,jo->vnj", roots, params[2]["w"]) * (1 - a**2)
    found = f.diag_ggn_of_pairs(x, below), f.diag_ggn_of_pairs(a, roots)
    due = cv.diag_ggn(*batch)
    same(found, [due[0]["w"], due[2]["w"]])


@compares("kfac_expand", "kfac_reduce", "kronecker_product")
def kronecker(f):
    """Under squared error the root is the identity, at one position after the other."""
    net, loss, T, q = jb.mlp([3, 4, 2]), jb.SquaredError(), 5, 2
    params = parameters(net)
    x, y = normal(1, B, T, 3), normal(2, B, T, q)
    a = np.tanh(x @ params[0]["w"] + params[0]["b"])
    roots = np.einsum("ot,oj,ts->tojs", np.ones((q, T)), np.eye(q), np.eye(T)) / np.sqrt(T)
    roots = np.broadcast_to(roots.transpose(0, 1, 3, 2).reshape(T * q, 1, T, q), (T * q, B, T, q))
    below = np.einsum("vnto,jo->vntj", roots, params[2]["w"]) * (1 - a**2)
    vector = normal_like(3, params)
    for sharing in ("expand", "reduce"):
        factors = cv.kfac(net, loss, params, x, y, cv.Exact(), sharing=sharing)
        products = factors.product(vector)
        for l, inputs, s in ((0, x, below), (2, a, roots)):
            own = getattr(f, f"kfac_{sharing}")(inputs, s)
            block = factors.blocks[f"layers[{l}]"]
            same(own, [block.a[0], block.g[0]])
            found = f.kronecker_product(*own, vector[l]["w"], vector[l]["b"])
            same(found, [products[l]["w"], products[l]["b"]])
    # of one example of one position the block is the Gauss-Newton matrix's
    one = x[:1, :1]
    factor, gamma = f.kfac_expand(one, below[:2, :1, :1] * np.sqrt(T))
    own = cv.ggn_block_product(net, loss, params, one, y[:1, :1], vector)[0]
    same(f.kronecker_product(factor, gamma, vector[0]["w"], vector[0]["b"]), [own["w"], own["b"]])


@compares("hessian_product")
def hessian_product(f):
    batch, vector, _ = curved()
    net, loss, params, x, y = batch

    def of_layers(tree):
        return tuple(np.asarray(tree[l][name]) for l in (0, 2) for name in ("w", "b"))

    def curvature(z):
        return -2 * np.tanh(z) * (1 - np.tanh(z) ** 2)

    own = [
        f.hessian_product(
            of_layers(params), of_layers(vector), np.tanh, lambda z: 1 - np.tanh(z) ** 2, curvature,
            f.softmax_cross_entropy, x[n], np.eye(3)[y[n]],
        )
        for n in range(B)
    ]  # fmt: skip
    found = jax.tree.map(lambda v: v.mean(axis=0), stack(own))
    same(found, of_layers(cv.hessian_product(*batch, vector)))

    gradient = jax.grad(lambda p: loss.value(jb.forward(net, p, x)[0], y).mean())
    along = jax.jit(lambda v: jax.jvp(gradient, (params,), (v,))[1])(vector)
    same(found, of_layers(along))


# The tests.


class Watched:
    """The functions of the page, and which of them were called."""

    def __init__(self, functions):
        self.called, self.functions = set(), functions

    def __getattr__(self, name):
        self.called.add(name)
        return getattr(self.functions, name)


@functools.cache
def outcome(comparison):
    """What a comparison of several formulas has called; it is made once."""
    watched = Watched(run())
    comparison(watched)
    return watched.called


@pytest.mark.parametrize("name", FORMULAS)
def test_the_formula_is_the_code(name):
    assert name in COMPARED, f"nothing compares {name}"
    assert name in outcome(COMPARED[name]), f"the comparison of {name} does not call it"


def test_what_is_compared_is_in_the_page():
    assert len(set(FORMULAS)) == len(FORMULAS)
    assert set(COMPARED) == set(FORMULAS)


@pytest.mark.parametrize("name", DUE)
def test_all_that_is_public_has_a_formula(name):
    """Layers, activations, joins, composites, losses and kinds, as the package has them."""
    unit = next((before for before, block in units() if name in functions(block)), None)
    assert unit, f"{DUE[name]} has no formula: the page needs a function {name}"
    links = {link.split(".")[0] for part in unit for link, _ in links_in(part[1])}
    assert DUE[name] in links, f"no link to {DUE[name]} stands beside its formula"


def test_what_is_due_is_most_of_the_library():
    assert {"Dense", "LSTM", "MaxPool", "Rotary", "Mish", "Maximum"} < set(LAYERS)
    assert {"Sequential", "Tied"} < set(COMPOSITES)
    assert {"Huber", "FusedSoftmaxCrossEntropy"} < set(LOSSES)
    assert {"Outer", "Coupled"} < set(PAIRS)


def links_in(text):
    """The code that is linked to: names, and the files that they are in."""
    return re.findall(r"\[`([\w.]+)`\]\((\.\./jbackprop/[^)]+)\)", text)


@pytest.mark.parametrize("block", [b for _, b in units()], ids=lambda b: functions(b)[0])
def test_a_block_stands_below_its_formula_and_beside_the_name_of_the_code(block):
    (before,) = (before for before, its in units() if its == block)
    assert "math" in [kind for kind, _ in before]
    assert any(link for kind, text in before if kind == "text" for link in links_in(text))
    source = TEXT.split(f"```python\n{block}\n```")
    assert len(source) == 2
    above = source[0].rstrip().splitlines()
    if above[-1] != "```":  # words between them, a paragraph at most
        assert "```" in above[-5:], "no formula directly above this block"


@functools.cache
def defined(file):
    """The functions and classes of a file."""
    body = ast.parse(file.read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize(("name", "path"), sorted(set(links_in(TEXT))))
def test_the_code_is_where_the_page_says(name, path):
    file = (PAGE.parent / path).resolve()
    assert file.exists(), f"{path} does not exist"
    module = importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    first, *others = name.split(".")
    own = defined(file)
    assert first in own, f"{path} has no {first}"
    value = getattr(module, first)
    for other in others:
        holder = next((cls for cls in value.__mro__ if other in vars(cls)), None)
        assert holder, f"{name} does not exist"
        assert holder.__module__ == module.__name__, f"{name} is that of {holder.__module__}"


def test_other_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        for kind, text in parts()
        if kind == "heading"
    }
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (PAGE.parent / target).exists(), target


@pytest.mark.parametrize("name", sorted(DUE))
def test_the_kinds_are_those_that_the_rule_gives(name):
    before = next(before for before, block in units() if name in functions(block))
    said = re.findall(r"Kinds: ((?:[^.]|\n)*?)\.", "\n".join(t for k, t in before if k == "text"))
    if name in COMPARED:
        outcome(COMPARED[name])
    assert set(re.findall(r"`(\w+)`", " ".join(said))) == KINDS.get(name, set())


# Of what MathJax has, what is used here; GitHub leaves some macros out.
MACROS = """
    alpha aligned arg bar beta big Big bigodot cases cdot cos cosh delta dot dots epsilon eta frac
    Gamma ge in kappa lambda langle le lfloor lceil log lvert mapsto mathrel mathrm mathsf max min mu
    nabla ne nu odot omega otimes partial Phi phi pi qquad quad rangle rceil rfloor rho rvert sigma sin
    sinh sqrt sum tanh tau text tfrac theta top underbrace varepsilon varphi Xi xi zeta begin end
"""


def formulas(text=TEXT):
    """Every formula: blocks, and those inside lines."""
    blocks = [content for kind, content in parts(text) if kind == "math"]
    prose = "\n".join(content for kind, content in parts(text) if kind == "text")
    return blocks, re.findall(r"\$`([^`]*)`\$", prose), re.sub(r"\$`[^`]*`\$", "", prose)


def test_formulas_are_what_github_renders():
    blocks, inline, left = formulas()
    assert "$" not in left, "a formula inside a line is $`...`$, which Markdown leaves alone"
    for formula in blocks + inline:
        assert set(re.findall(r"\\([A-Za-z]+)", formula)) <= set(MACROS.split()), formula
        assert formula.count("{") - formula.count(r"\{") == formula.count("}") - formula.count(
            r"\}"
        )
        begun, ended = (re.findall(rf"\\{which}{{(\w+)}}", formula) for which in ("begin", "end"))
        assert sorted(begun) == sorted(ended)
        assert "\n\n" not in formula
        assert "|" not in formula  # it would end the cell of a table
