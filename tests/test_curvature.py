"""Second derivatives: against explicit Jacobians and Hessians in float64, and against peers."""

import dataclasses
import functools
import itertools
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from tabled import cases
from truth import each_grad, mean_cost, relative, rows

import jbackprop as jb
from jbackprop import catalogue, structure
from jbackprop import curvature as cv
from jbackprop.curvature.sweeps import pairs_of
from jbackprop.layers.recurrent import Recurrent

pytestmark = pytest.mark.newest
TRUTHS = Path(__file__).parent / "torch_truth"
CASES = [c for c in cases(3) if not c.net.couples_examples]
LEARNING = [c for c in CASES if jax.tree.leaves(jax.eval_shape(c.net.init, jax.random.key(0)))]
LOSS = jb.SoftmaxCrossEntropy()


def named(some):
    return pytest.mark.parametrize("case", some, ids=lambda case: case.name)


def flat(tree):
    return ravel_pytree(tree)[0]


def flats(tree):
    """Rows of the trees that are stacked in one, (k, P)."""
    return jax.vmap(flat)(tree)


def units(params):
    """All unit vectors, as a tree like params with an axis in front."""
    vector, back = ravel_pytree(params)
    return jax.vmap(back)(jnp.eye(vector.size, dtype=vector.dtype))


def learns(net, params):
    mask = jb.trainable_mask(net, params)
    return flat(jax.tree.map(lambda own, p: jnp.full(p.shape, float(own)), mask, params))


def loss_hessian(loss, z, y):
    """d^2 C_n / dz_n^2 by jax.hessian of the cost alone, (B, q, q); of a capped loss at z'."""
    capped = getattr(loss, "logit_cap", None)

    def cost(z, y):
        found = loss.value(z[None], jax.tree.map(lambda v: v[None], y))[0]
        return found

    if capped is None:
        hessian = jax.vmap(jax.hessian(cost))(z, y)
    else:  # the Gauss-Newton part: the cap is a layer
        plain = jb.SoftmaxCrossEntropy(loss.label_smoothing, loss.class_weights, loss.ignore_index)
        inner = functools.partial(loss_hessian, plain)
        slopes = 1 - jnp.tanh(z / capped) ** 2
        hessian = inner(capped * jnp.tanh(z / capped), y)
        slopes = slopes.reshape(len(z), -1)
        return hessian * slopes[:, :, None] * slopes[:, None, :]
    q = z[0].size
    return hessian.reshape(len(z), q, q)


def jacobian(outputs, params):
    """(B, q, P)."""
    vector, back = ravel_pytree(params)
    found = jax.jacobian(lambda v: outputs(back(v)))(vector)
    return found.reshape(found.shape[0], -1, vector.size)


def by_autodiff(net, loss, params, x, y, key=None):
    """The dense Gauss-Newton matrix and Hessian."""

    @jax.jit
    def both(params, x, y):
        vector, back = ravel_pytree(params)
        j = jacobian(lambda p: jb.forward(net, p, x, key)[0], params)
        h = loss_hessian(loss, jb.forward(net, params, x, key)[0], y)
        return j, h, jax.hessian(lambda v: mean_cost(net, loss, back(v), x, y, key))(vector)

    j, h, hessian = map(np.asarray, both(params, x, y))
    return dense_ggn(j, h), hessian


def dense_ggn(j, h):
    return np.einsum("nap,nar->pr", j, np.einsum("nab,nbr->nar", h, j), optimize=True) / len(j)


def blocks_of(net, params):
    """A number for every parameter: equal where one layer, and one copy of it, has both."""
    axes = structure.stack_axes(net)
    ids, number = [], 0

    def of(path, layer, part):
        nonlocal number

        def one(p):
            stack = p.shape[: axes.get(path, 0)]
            own = jnp.arange(int(np.prod(stack))).reshape(stack + (1,) * (p.ndim - len(stack)))
            return jnp.broadcast_to(number + own, p.shape).astype(float)

        found = jax.tree.map(one, part)
        number += 1000
        return layer, found

    ids = structure.rebuild(net, params, of)[1]
    return np.asarray(flat(ids))


# Every small net of the table.


TURNS = (
    ("each", "ggn", "blocks", "in chunks"),
    ("root", "ekfac trace", "kfac"),
    ("diagonal", "trace", "hessian product", "propagated"),
)
"""What is asked of every net, in three parts; in this order a transformer and a resnet are asked
for products with the Hessian."""


def kfac_is_exact(case):
    """Of one example: where every layer is one matrix, with its bias, used at one position."""
    params = jax.eval_shape(case.net.init, jax.random.key(0))
    for _, layer, part in structure.walk(case.net, params):
        if jax.tree.leaves(part) and not isinstance(layer, jb.Dense):
            return False
    pairs = pairs_of(case.net, params, catalogue._shapes(case.inputs, case.batch))
    return all(getattr(p, "delta", np.zeros((0, 0, 2))).shape[2] == 1 for p in pairs)


def in_turns():
    """Everything of layers and small composites: they have every kind of pair, and every way to it.

    Of the others a third, by turns: of large composites, which are made of these; of recurrent
    layers, whose pairs are those of a `Dense` with positions; and of losses, whose roots are tested
    alone, with what is not asked of their roots.
    """
    every = {name for turn in TURNS for name in turn}
    turns = {kind: itertools.cycle(map(set, TURNS)) for kind in ("loss", "recurrent", "large")}
    for case in LEARNING:
        composite, loss = (isinstance(case.rule, kind) for kind in (jb.Composite, jb.losses.Loss))
        if loss:
            asked = next(turns["loss"]) | {"ggn", "hessian product"}
        elif isinstance(case.rule, Recurrent):
            asked = next(turns["recurrent"])
        elif composite and len(list(structure.walk(case.net))) > 4:
            asked = next(turns["large"])
        else:
            asked = every
        asked = asked - ({"in chunks"} if composite or loss else {"propagated"})
        asked = asked if kfac_is_exact(case) else asked - {"kfac"}
        yield pytest.param(case, asked, id=case.name)


def everything(case, asked, params, x, y, vectors):
    """What is asked, and Jacobian, the costs' Hessians, and where it is needed the Hessian."""
    net, loss = case.net, case.loss
    at = net, loss, params, x, y
    vector, back = ravel_pytree(params)
    one = jax.tree.map(lambda v: v[:1], (x, y))
    questions = {
        "diagonal": lambda: flat(cv.diag_ggn(*at)),
        "in chunks": lambda: flat(cv.diag_ggn(*at, chunk=2)),
        "each": lambda: flats(cv.diag_ggn(*at, per_example=True)),
        "trace": lambda: cv.trace_ggn(*at),
        "ekfac trace": lambda: cv.ekfac(*at, cv.Exact()).trace(),
        "ggn": lambda: flats(cv.ggn_product(*at, vectors)),
        "hessian product": lambda: flats(cv.hessian_product(*at, vectors)),
        "propagated": lambda: flat(cv.diag_hessian(*at, chunk=5)),
        "blocks": lambda: flats(cv.ggn_block_product(*at, vectors)),
        "root": lambda: jax.vmap(flats)(cv.ggn_root(*at)),
        "kfac": lambda: flats(cv.kfac(net, loss, params, *one, cv.Exact()).product(vectors)),
    }
    j = jacobian(lambda p: jb.forward(net, p, x)[0], params)
    h = loss_hessian(loss, jb.forward(net, params, x)[0], y)
    hessian = None
    if "hessian product" in asked:
        hessian = jax.hessian(lambda v: mean_cost(net, loss, back(v), x, y))(vector)
    return {name: ask() for name, ask in questions.items() if name in asked}, j, h, hessian


@pytest.mark.parametrize(("case", "asked"), list(in_turns()))
def test_every_net_against_its_dense_matrices(case, asked):
    params, x, y = case.params, case.x, case.y
    vector, back = ravel_pytree(params)
    v = jax.random.normal(jax.random.key(1), (2, vector.size), vector.dtype)
    program = jax.jit(functools.partial(everything, case, asked))
    found, j, h, hessian = program(params, x, y, jax.vmap(back)(v))
    mask = np.asarray(learns(case.net, params))
    v = np.asarray(v) * mask
    j, h = np.asarray(j) * mask, np.asarray(h)
    ggn, one = (dense_ggn(j[:n], h[:n]) for n in (len(j), 1))
    hessian = np.zeros_like(ggn) if hessian is None else np.asarray(hessian) * np.outer(mask, mask)
    ids = blocks_of(case.net, params)
    same = ids[:, None] == ids[None]
    due = {
        "diagonal": np.diag(ggn), "in chunks": np.diag(ggn), "trace": np.trace(ggn),
        "each": np.einsum("nap,nab,nbp->np", j, h, j), "ekfac trace": np.trace(ggn),
        "ggn": v @ ggn, "hessian product": v @ hessian, "propagated": np.diag(hessian),
        "blocks": v @ (ggn * same), "root": ggn, "kfac": v @ (one * same),
    }  # fmt: skip
    if "root" in found:
        root = np.asarray(found["root"]).reshape(-1, vector.size)
        found["root"] = root.T @ root
    assert found.keys() == asked
    for name, answer in found.items():
        assert relative(answer, due[name]) < 1e-10, name


def test_kfac_is_tried_where_it_is_exact():
    exact = [case for case in LEARNING if kfac_is_exact(case)]
    assert len(exact) > 20


BENDING = [
    (jb.Dense(3, 2), (2, 3)),
    (jb.GRU(3, 2), (3, 3)),
    (jb.Conv(2, 2, (2,), groups=2), (4, 2)),
    (jb.LayerNorm(4), (4,)),
]


@pytest.mark.parametrize(("layer", "shape"), BENDING, ids=str)
def test_the_propagated_diagonal_behind_what_bends(layer, shape):
    """With a layer before and behind, so that there is a second derivative on both sides."""
    x = jax.random.normal(jax.random.key(0), (2, *shape))
    net = jb.Sequential(jb.Dense(shape[-1], shape[-1]), jb.Tanh(), layer, jb.Sigmoid())
    params = net.init(jax.random.key(1))
    y = jax.random.normal(jax.random.key(2), jb.forward(net, params, x)[0].shape)
    _, back = ravel_pytree(params)

    @jax.jit
    def both(params, x, y):
        loss = jb.SquaredError()
        dense = jax.hessian(lambda v: mean_cost(net, loss, back(v), x, y))
        return dense(flat(params)), flat(cv.diag_hessian(net, loss, params, x, y))

    dense, found = both(params, x, y)
    assert np.min(np.diag(dense)) < 0
    assert relative(found, np.diag(dense)) < 1e-10


# A small problem for the rest.


@pytest.fixture(scope="module")
def problem():
    net = jb.mlp([4, 5, 3], jb.Tanh())
    params = net.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (6, 4))
    y = jax.random.randint(jax.random.key(2), (6,), 0, 3)
    return net, LOSS, params, x, y


@pytest.fixture(scope="module")
def matrices(problem):
    """The dense Gauss-Newton matrix and Hessian, and the empirical Fisher matrix."""
    net, loss, params, x, y = problem
    ggn, hessian = by_autodiff(net, loss, params, x, y)
    g = rows(jax.jit(functools.partial(each_grad, net, loss))(params, x, y))
    return ggn, hessian, g.T @ g / len(g)


def model(params, x):
    """The same network as a function of one example."""
    z = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
    return z @ params[2]["w"] + params[2]["b"]


@pytest.mark.parametrize("kind", ["net", "function"])
def test_products_are_linear_symmetric_and_definite(problem, matrices, kind):
    net, loss, params, x, y = problem
    net = net if kind == "net" else model
    every = units(params)
    ggn = flats(cv.ggn_product(net, loss, params, x, y, every))
    hessian = flats(cv.hessian_product(net, loss, params, x, y, every))
    empirical = flats(cv.fisher_product(net, loss, params, x, y, every, cv.Empirical()))
    for found, due in zip((ggn, hessian, empirical), matrices, strict=True):
        assert relative(found, due) < 1e-12
        assert relative(found, found.T) < 1e-12
    assert np.linalg.eigvalsh(ggn).min() > -1e-14
    assert np.linalg.eigvalsh(hessian).min() < -1e-3
    fisher = flats(cv.fisher_product(net, loss, params, x, y, every))
    assert relative(fisher, matrices[0]) < 1e-12
    inner = cv.ggn_inner(net, loss, params, x, y, every)
    assert relative(inner, matrices[0]) < 1e-12
    one = jax.tree.map(lambda v: v[3], every)
    assert relative(flat(cv.ggn_product(net, loss, params, x, y, one)), ggn[3]) < 1e-13
    for ask in (cv.diag_ggn, cv.diag_fisher):
        due = matrices[0 if ask is cv.diag_ggn else 2]
        assert relative(flat(ask(net, loss, params, x, y)), np.diag(due)) < 1e-12
    if kind == "function":
        found = cv.diag_ggn(model, loss, params, x, y, per_example=True, chunk=2)
        due = cv.diag_ggn(problem[0], loss, params, x, y, per_example=True)
        assert relative(flats(found), flats(due)) < 1e-12
        corrected = cv.ekfac(model, loss, params, x, y, cv.Exact())
        assert relative(corrected.trace(), np.trace(matrices[0])) < 1e-12


def errors(ask, due, numbers=(200, 3200)):
    """The relative errors of what was asked with so many random deltas."""
    return [relative(flat(ask(cv.MonteCarlo(n), jax.random.key(5))), flat(due)) for n in numbers]


RANDOM = {
    "diagonal": (cv.diag_ggn, lambda v: v),
    "kfac": (cv.kfac, lambda v: [b.g for b in v.blocks.values()]),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_deltas_converge_at_the_known_rate(problem, name):
    """sixteen times as many: a fourth of the error; a fixed seed."""
    ask, see = RANDOM[name]
    due = see(ask(*problem, cv.Exact()))
    few, many = errors(lambda roots, key: see(ask(*problem, roots, key=key)), due)
    assert few < 0.12
    assert 2 < few / many < 8


@pytest.mark.parametrize("kind", ["net", "function"])
def test_portions_of_examples_and_of_deltas_change_nothing(monkeypatch, kind):
    """11 examples by 8 and 3, their deltas one by one; and 4, 4 and 3 with all of their deltas."""
    net, x, y = jb.mlp([4, 6, 4], jb.Tanh()), jnp.ones((11, 5, 4)), jnp.ones((11, 5), int)
    params, vector = (net.init(jax.random.key(k)) for k in (0, 1))
    x = x * jax.random.normal(jax.random.key(2), x.shape)
    model = net if kind == "net" else lambda params, x: jb.forward(net, params, x[None])[0][0]

    @dataclasses.dataclass(frozen=True)
    class Once(jb.SoftmaxCrossEntropy):
        """Of another name: nothing that was traced before is taken."""

        name: str = ""

    def ask(name):
        def every(params, x):
            batch = (model, Once(name=name), params, x, y, cv.Exact())
            return [
                cv.diag_ggn(*batch), cv.trace_ggn(*batch), cv.kfac(*batch),
                cv.ekfac(*batch).product(vector), cv.ggn_block_product(*batch[:5], vector),
                cv.diag_ggn(*batch, per_example=True),
                *([cv.kfac(*batch, chunk=2)] if name else []),
            ]  # fmt: skip

        return jax.jit(every)(params, x)

    due = ask("")
    for at_once, few in ((1, 8), (2**10, 4)):
        monkeypatch.setattr("jbackprop.curvature.sweeps.AT_ONCE", at_once)
        monkeypatch.setattr("jbackprop.curvature.sweeps.FEW", few)
        found = ask(f"{at_once}")
        for both in zip(found, [*due, due[2]], strict=True):
            assert relative(*map(flat, both)) < 1e-12


def test_a_product_of_random_deltas_converges(problem, matrices):
    every = units(problem[2])

    def ask(roots, key):
        return flats(cv.fisher_product(*problem, every, roots, key=key))

    few, many = errors(ask, matrices[0])
    assert 2 < few / many < 8
    roots, key = cv.MonteCarlo(3), jax.random.key(7)
    trace = cv.trace_ggn(*problem, roots, key=key)
    diagonal = cv.diag_ggn(*problem, roots, key=key)
    assert relative(trace, jnp.sum(flat(diagonal))) < 1e-12


@named([c for c in CASES if isinstance(c.rule, jb.losses.Loss)])
def test_roots_and_products_of_every_loss(case):
    """With and without positions, against jax.hessian; and a root that is drawn, on average."""
    loss = case.loss
    for shape in ((3, 3), (2, 4, 3)):
        z = jax.random.normal(jax.random.key(1), shape)
        if isinstance(loss, jb.CrossEntropy):
            z = jax.nn.softmax(z)
        y = case.targets(jax.random.key(2), shape)
        n, q = shape[0], int(np.prod(shape[1:]))
        v = jax.random.normal(jax.random.key(3), shape)
        low = z.astype("bfloat16")
        for ask in (loss.hessian_root, functools.partial(loss.sampled_root, jax.random.key(0))):
            assert jax.eval_shape(ask, low, y).dtype == "bfloat16"
        assert jax.eval_shape(loss.hessian_product, low, y, v).dtype == "bfloat16"

        @jax.jit
        def all_of_it(z, y, v):
            many = jax.random.split(jax.random.key(4), 4000)
            return (
                loss_hessian(loss, z, y),
                loss.hessian_product(z, y, v),
                loss.hessian_root(z, y),
                jax.vmap(lambda key: loss.sampled_root(key, z, y))(many),
            )

        dense, product, root, drawn = map(np.asarray, all_of_it(z, y, v))
        assert (
            relative(product.reshape(n, q), np.einsum("nij,nj->ni", dense, v.reshape(n, q))) < 1e-12
        )
        places = root.reshape(len(root), n, q // 3, 3)
        blocks = np.einsum("rnti,rntj->ntij", places, places)
        whole = np.zeros((n, q, q))
        for t in range(q // 3):
            whole[:, 3 * t : 3 * t + 3, 3 * t : 3 * t + 3] = blocks[:, t]
        assert relative(whole, dense) < 1e-12
        drawn = drawn.reshape(len(drawn), n, q)
        assert relative(np.einsum("kni,knj->nij", drawn, drawn) / len(drawn), dense) < 0.15
        assert np.abs(drawn.mean(0)).max() < 5 * np.abs(drawn).max() / np.sqrt(len(drawn))


def test_the_root_of_classes_where_probabilities_underflow():
    """Rank q - 1; right, and differentiable, where all that is after a class is exactly 0."""
    z = jnp.array([[0.0, -2000.0, -1.0, -3000.0], [0.0, 1.0, -900.0, -900.0], [2000.0, 0, 0, 0]])
    root = LOSS.hessian_root(z, jnp.zeros(3, int))
    assert root.shape == (3, 3, 4)
    due = loss_hessian(LOSS, z, jnp.zeros(3, int))
    assert relative(jnp.einsum("rni,rnj->nij", root, root), due) < 1e-14
    slopes = jax.grad(lambda z: jnp.sum(LOSS.hessian_root(z, jnp.zeros(3, int))))(z)
    assert np.all(np.isfinite(slopes))
    alone = jb.SoftmaxCrossEntropy().hessian_root(jnp.ones((2, 1)), jnp.zeros(2, int))
    assert alone.shape == (1, 2, 1)
    assert not np.any(alone)


def test_a_masked_position_has_no_curvature_even_if_it_is_nan():
    capped = jb.FusedSoftmaxCrossEntropy(ignore_index=0, logit_cap=5.0)
    z = jnp.array([[[jnp.nan] * 3, [1.0, 2.0, 3.0]]])
    y = jnp.array([[0, 2]])
    for loss in (jb.SoftmaxCrossEntropy(ignore_index=0), capped):
        assert not np.any(loss.hessian_root(z, y)[:, 0, 0])
        for found in (
            loss.hessian_product(z, y, z), loss.sampled_root(jax.random.key(0), z, y),
            loss.delta(z, y), loss.value_and_delta(z, y)[1],
        ):  # fmt: skip
            assert not np.any(found[0, 0])
            assert np.all(np.isfinite(found[0, 1]) & (found[0, 1] != 0))


# Kronecker factors.


def dense_blocks(blocks, params):
    return flats(blocks.product(units(params)))


def linear(net, params, x, sharing, shape):
    """K-FAC's matrix and the Gauss-Newton matrix, for squared errors."""
    loss, y = jb.SquaredError(), jnp.zeros((len(x), *shape))
    found = dense_blocks(cv.kfac(net, loss, params, x, y, cv.Exact(), sharing=sharing), params)
    every = units(params)
    return found, flats(cv.ggn_block_product(net, loss, params, x, y, every))


def test_kfac_is_exact_in_linear_networks():
    """Where the deltas S do not depend on the example: expand, and reduce where it averages."""
    deep = jb.Sequential(jb.Dense(3, 4), jb.Dense(4, 2), jb.Dense(2, 3))
    params = deep.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (7, 3))
    assert relative(*linear(deep, params, x, "expand", (3,))) < 1e-12
    x = jax.random.normal(jax.random.key(1), (7, 4, 3))
    assert relative(*linear(deep, params, x, "expand", (4, 3))) < 1e-12
    assert relative(*linear(deep, params, x, "reduce", (4, 3))) > 0.1
    pooled = jb.Sequential(jb.Dense(3, 4), jb.GlobalAveragePool(), jb.Dense(4, 2))
    params = pooled.init(jax.random.key(0))
    assert relative(*linear(pooled, params, x, "reduce", (2,))) < 1e-12
    assert relative(*linear(pooled, params, x, "expand", (2,))) > 0.1


def backpack(name):
    with np.load(TRUTHS / "curvature.npz") as file:
        return {k.removeprefix(f"{name}."): file[k] for k in file.files if k.startswith(name)}


def from_backpack(name):
    """The network of ours, its parameters, x and y."""
    given = backpack(name)
    if name == "mlp":
        net = jb.mlp([5, 4, 4, 3], [jb.Sigmoid(), jb.Tanh()])
        layers = [{"w": given[str(k)].T, "b": given[str(k + 1)]} for k in (0, 2, 4)]
        params, x = (layers[0], (), layers[1], (), layers[2]), given["x"]
    else:
        conv = jb.Conv(2, 3, (3, 2), padding=((1, 1), (1, 1)))
        net = jb.Sequential(conv, jb.Sigmoid(), jb.Flatten(), jb.Dense(60, 3))
        w = given["2"].reshape(3, 3, 4, 5).transpose(2, 3, 1, 0).reshape(60, 3)
        first = {"w": given["0"].transpose(2, 3, 1, 0), "b": given["1"]}
        params, x = (first, (), (), {"w": w, "b": given["3"]}), given["x"].transpose(0, 2, 3, 1)
    params, x = jax.tree.map(jnp.asarray, (params, x))
    return net, LOSS, params, x, jnp.asarray(given["y"])


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_against_backpack(name):
    """Its costs are means too. A of a kernel is a sum over positions there, G as in "reduce"."""
    given, (net, loss, params, x, y) = backpack(name), from_backpack(name)
    for quantity, ask in (("diag_ggn", cv.diag_ggn), ("diag_hessian", cv.diag_hessian)):
        found = [layer for layer in ask(net, loss, params, x, y) if layer]
        for k, layer in enumerate(found):
            due = given[f"{2 * k}.{quantity}"]
            turned = due.T if due.ndim == 2 else due.transpose(2, 3, 1, 0)
            if name == "cnn" and k == 1:
                turned = due.reshape(3, 3, 4, 5).transpose(2, 3, 1, 0).reshape(60, 3)
            assert relative(layer["w"], turned) < 1e-12
            assert relative(layer["b"], given[f"{2 * k + 1}.{quantity}"]) < 1e-12
    exact = cv.kfac(net, loss, params, x, y, cv.Exact(), joint_bias=False).blocks
    reduced = cv.kfac(
        net, loss, params, x, y, cv.Exact(), joint_bias=False, sharing="reduce"
    ).blocks
    layers = [name.removesuffix("['w']") for name in exact if name.endswith("['w']")]
    for k, layer in enumerate(layers):
        kernel = name == "cnn" and k == 0
        positions = 20 if kernel else 1
        a = np.asarray(exact[f"{layer}['w']"].a[0]) * positions
        if kernel:
            a = a.reshape(3, 2, 2, 3, 2, 2).transpose(2, 0, 1, 5, 3, 4).reshape(12, 12)
        elif name == "cnn":
            order = np.arange(60).reshape(4, 5, 3).transpose(2, 0, 1).ravel()
            a = a[np.ix_(order, order)]
        assert relative(a, given[f"{2 * k}.kflr.1"]) < 1e-12
        g = (reduced if kernel else exact)[f"{layer}['w']"].g[0]
        assert relative(g, given[f"{2 * k}.kflr.0"]) < 1e-12
        assert relative(exact[f"{layer}['b']"].g[0], given[f"{2 * k + 1}.kflr.0"]) < 1e-12
        assert relative(g, given[f"{2 * k}.kfac.0"]) < 0.02  # of 20,000 random deltas


def test_against_kfac_jax():
    """Its blocks by exact roots, of mean costs; their rows are those of [b; w]."""
    net, loss, params, x, y = from_backpack("mlp")
    blocks = cv.kfac(net, loss, params, x, y, cv.Exact()).blocks
    with np.load(TRUTHS / "kfac_jax_blocks.npz") as file:
        for k, block in enumerate(blocks.values()):
            dense = np.kron(block.a[0], block.g[0])
            o = block.g.shape[1]
            order = np.roll(np.arange(len(dense)), o)
            assert relative(dense[np.ix_(order, order)], file[str(k)]) < 1e-10


def test_what_a_block_diagonal_matrix_answers(problem):
    params = problem[2]
    factors = cv.kfac(*problem, cv.Exact())
    dense = dense_blocks(factors, params)
    assert list(factors.blocks) == ["layers[0]", "layers[2]"]
    damped = dense + 0.1 * np.eye(len(dense))
    v = jax.tree.map(lambda p: jnp.ones_like(p) * 0.3, params)
    for matrix in (factors, factors.decomposed()):
        assert relative(dense_blocks(matrix, params), dense) < 1e-12
        assert relative(flat(matrix.solve(v, 0.1)), np.linalg.solve(damped, flat(v))) < 1e-12
        assert relative(matrix.trace(), np.trace(dense)) < 1e-12
        assert relative(matrix.log_determinant(0.1), np.linalg.slogdet(damped)[1]) < 1e-12
        root = matrix.apply(lambda e: (e + 0.1) ** -0.5, v)
        twice = matrix.apply(lambda e: (e + 0.1) ** -0.5, root)
        assert relative(flat(twice), np.linalg.solve(damped, flat(v))) < 1e-12
    other = cv.kfac(*problem, cv.Empirical())
    mixed = cv.update_average(factors, other, 0.75)
    first, second, found = (m.blocks["layers[0]"].g for m in (factors, other, mixed))
    assert relative(found, 0.75 * first + 0.25 * second) < 1e-14
    with pytest.raises(ValueError, match="eigenvectors have no average"):
        cv.update_average(factors.decomposed(), other.decomposed(), 0.75)
    with pytest.raises(ValueError, match="must be a tree like params"):
        factors.solve({"w": 1}, 0.1)


def test_a_joint_bias_has_the_delta_of_its_matrix():
    """Every layer of the table whose bias is taken for a row of its matrix."""
    joined = 0
    for case in LEARNING:
        if isinstance(case.rule, jb.Layer) and case.net is case.rule:
            at = case.params, case.x, case.y
            ask = functools.partial(cv.kfac, case.net, case.loss, roots=cv.Exact())
            blocks = jax.eval_shape(ask, *at).blocks
            if any(len(block.where.leaves) == 2 for block in blocks.values()):
                joined += 1
                bp = jax.jit(functools.partial(jb.backprop, case.net, case.loss))(*at)
                w, b = bp.factored["w"], bp.factored["b"]
                assert relative(np.ravel(w.delta), np.ravel(b.delta)) == 0
    assert joined > 5


def test_what_has_too_long_a_side_is_diagonal(monkeypatch):
    monkeypatch.setattr("jbackprop.curvature.roles.LARGEST", 5)
    net = jb.Sequential(jb.Embedding(7, 6), jb.Dense(6, 2), jb.Dense(2, 3))
    params, x, y = net.init(jax.random.key(0)), jnp.arange(4), jnp.arange(4) % 3
    found = cv.kfac(net, LOSS, params, x, y, cv.Exact())
    kinds = {name: type(block).__name__ for name, block in found.blocks.items()}
    assert kinds == {
        "layers[0]": "Diagonal", "layers[1]['b']": "Kronecker", "layers[1]['w']": "Diagonal",
        "layers[2]": "Kronecker",
    }  # fmt: skip
    diagonal = cv.diag_ggn(net, LOSS, params, x, y)
    for name, due in {"layers[0]": diagonal[0]["w"], "layers[1]['w']": diagonal[1]["w"]}.items():
        assert relative(found.blocks[name].diagonal, due) < 1e-12


def test_ekfac_is_nearer_in_the_frobenius_norm(problem, matrices):
    params = problem[2]
    blocks = matrices[0] * (np.equal.outer(*[blocks_of(problem[0], params)] * 2))
    plain = dense_blocks(cv.kfac(*problem, cv.Exact()), params)
    basis = cv.kfac(*problem, cv.Exact()).decomposed()
    corrected = cv.ekfac(*problem, cv.Exact(), basis=basis)
    found = dense_blocks(corrected, params)
    assert np.linalg.norm(found - blocks) < 0.9 * np.linalg.norm(plain - blocks)
    for name, block in corrected.blocks.items():
        u = np.kron(block.u[0], block.v[0])
        (ids,) = np.where(blocks_of(problem[0], params) == 1000 * int(name[7:-1]))
        order = ordered(params, ids)
        own = blocks[np.ix_(order, order)]
        assert relative(np.ravel(block.values[0]), np.diag(u.T @ own @ u)) < 1e-12
    again = cv.ekfac(*problem, cv.Exact(), basis=corrected)
    assert relative(dense_blocks(again, params), found) < 1e-12


def ordered(params, ids):
    """The numbers of a layer's parameters with the bias last, as the rows of its block are."""
    shapes = [p.shape for p in jax.tree.leaves(params)]  # b, w of each
    bias = next(s[0] for s in shapes if s[0] and len(s) == 1 and len(ids) % (s[0]) == 0)
    bias = {20 + 5: 5, 15 + 3: 3}[len(ids)] if len(ids) in (25, 18) else bias
    return np.concatenate([ids[bias:], ids[:bias]])


# Spectra, operators.


def test_spectra_against_dense_ones(problem, matrices):
    ids = blocks_of(problem[0], problem[2])
    for kind, dense in (("ggn", matrices[0]), ("hessian", matrices[1])):
        due = np.linalg.eigvalsh(dense)
        due = due[np.argsort(-np.abs(due))]
        values, vectors = cv.top_eigenvalues(*problem, 3, kind, vectors=True)
        assert relative(values, due[:3]) < 1e-12
        assert (
            relative(np.asarray(flats(vectors)) @ dense, values[:, None] * flats(vectors)) < 1e-10
        )
        found = cv.top_eigenvalues(*problem, 2, kind, per_layer=True)
        for name, own in found.items():
            at = ids == 1000 * int(name[7:-1])
            block = np.linalg.eigvalsh(dense[np.ix_(at, at)])
            assert relative(own, block[np.argsort(-np.abs(block))[:2]]) < 1e-12
        density = cv.spectral_density(*problem, kind, key=jax.random.key(1), steps=60, samples=200)
        mean = jnp.sum(density.nodes * density.weights) / len(density.nodes)
        assert relative(mean * len(dense), np.trace(dense)) < 0.05
        assert abs(jnp.max(density.nodes) - due.max()) < 1e-10
        assert abs(jnp.trapezoid(density.density, density.eigenvalues) - 1) < 1e-4
    layers = cv.trace_ggn(*problem, per_layer=True)
    assert relative(sum(layers.values()), np.trace(matrices[0])) < 1e-12
    few, many = (
        relative(cv.trace_hessian(*problem, n, key=jax.random.key(3)), np.trace(matrices[1]))
        for n in (30, 3000)
    )
    assert many < few
    assert many < 0.05
    signs = cv.estimate_diag_hessian(*problem, 4000, key=jax.random.key(1))
    assert relative(flat(signs), np.diag(matrices[1])) < 0.1


def test_the_lanczos_of_scipy_finds_them_too():
    """Of a matrix too large to be written out."""
    net, x = jb.mlp([6, 12, 3], jb.Tanh()), jax.random.normal(jax.random.key(1), (30, 6))
    params, y = net.init(jax.random.key(0)), jnp.arange(30) % 3
    dense = flats(cv.ggn_product(net, LOSS, params, x, y, units(params)))
    found, vectors = cv.top_eigenvalues(
        net, LOSS, params, x, y, 4, vectors=True, tolerance=1e-10, key=jax.random.key(2)
    )
    assert relative(found, np.sort(np.linalg.eigvalsh(dense))[::-1][:4]) < 1e-9
    assert relative(flats(vectors) @ dense, found[:, None] * flats(vectors)) < 1e-6


def test_linear_operators_are_solved_by_lineax(problem, matrices):
    net, loss, params, x, y = problem
    grads = jb.value_and_grad(net, loss)(params, x, y)[1]
    operator = cv.ggn_operator(*problem, damping=0.1)
    found = lineax.linear_solve(operator, grads, lineax.CG(rtol=1e-10, atol=1e-10)).value
    damped = matrices[0] + 0.1 * np.eye(len(matrices[0]))
    assert relative(flat(found), np.linalg.solve(damped, flat(grads))) < 1e-8
    assert lineax.is_symmetric(cv.hessian_operator(*problem))
    assert (
        relative(flat(cv.hessian_operator(*problem).mv(grads)), matrices[1] @ flat(grads)) < 1e-12
    )
    random = cv.ggn_operator(*problem, cv.MonteCarlo(2), key=jax.random.key(0))
    due = cv.fisher_product(*problem, grads, cv.MonteCarlo(2), key=jax.random.key(0))
    assert relative(flat(random.mv(grads)), flat(due)) < 1e-13


# In other settings.


def test_under_jit_and_in_lower_precision(problem):
    net, loss, params, x, y = problem
    due = cv.diag_ggn(*problem)
    found = jax.jit(lambda p: cv.diag_ggn(net, loss, p, x, y))(params)
    assert relative(flat(found), flat(due)) < 1e-13
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        low, xs = jax.tree.map(operator.methodcaller("astype", dtype), (params, x))
        got = cv.diag_ggn(net, loss, low, xs, y)
        assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(got))
        assert relative(flat(got), flat(due)) < tolerance
        own = cv.kfac(net, loss, low, xs, y, cv.Exact())
        assert own.blocks["layers[0]"].a.dtype == jnp.float32
        got = own.trace()
        assert relative(got, cv.kfac(*problem, cv.Exact()).trace()) < tolerance
        v = cv.ggn_product(net, loss, low, xs, y, low)
        assert v[0]["w"].dtype == dtype


def test_one_unit_one_example_and_sixty_layers():
    net = jb.Repeat(jb.Skip(jb.Sequential(jb.Dense(1, 1), jb.Tanh())), 60)
    params, loss = net.init(jax.random.key(0)), jb.SquaredError()
    x, y = jnp.ones((1, 1)), jnp.zeros((1, 1))
    dense = flats(cv.ggn_product(net, loss, params, x, y, units(params)))
    assert relative(flat(cv.diag_ggn(net, loss, params, x, y)), np.diag(dense)) < 1e-10
    factors = cv.kfac(net, loss, params, x, y, cv.Exact())
    ids = blocks_of(net, params)
    assert (
        relative(dense_blocks(factors, params), np.asarray(dense) * np.equal.outer(ids, ids))
        < 1e-10
    )


def test_a_batch_norm_is_refused_by_name_but_its_products_are_not():
    net = jb.Sequential(jb.Dense(3, 4), jb.BatchNorm(4), jb.Dense(4, 2))
    params, loss = net.init(jax.random.key(0)), jb.SquaredError()
    x, y = jax.random.normal(jax.random.key(1), (5, 3)), jnp.zeros((5, 2))
    for ask in (cv.diag_ggn, cv.kfac, cv.trace_ggn, cv.diag_hessian, cv.ggn_root):
        with pytest.raises(ValueError, match=r"BatchNorm.*fold_batch_norm"):
            ask(net, loss, params, x, y, key=jax.random.key(0))
    _, hessian = by_autodiff(net, loss, params, x, y)
    found = flats(cv.hessian_product(net, loss, params, x, y, units(params)))
    assert relative(found, hessian) < 1e-10


def test_one_key_is_one_network(problem):
    """Layers that draw: everything is about the network whose gradient has that key."""
    net = jb.Sequential(jb.Dense(4, 6), jb.Dropout(0.5), jb.Tanh(), jb.Dense(6, 3))
    params, key = net.init(jax.random.key(0)), jax.random.key(9)
    _, loss, _, x, y = problem
    ggn, hessian = by_autodiff(net, loss, params, x, y, key)
    batch, every = (net, loss, params, x, y), units(params)
    assert relative(flats(cv.hessian_product(*batch, every, key=key)), hessian) < 1e-12
    assert relative(flats(cv.ggn_product(*batch, every, key=key)), ggn) < 1e-12
    assert relative(flat(cv.diag_ggn(*batch, key=key)), np.diag(ggn)) < 1e-12
    assert relative(flat(cv.diag_hessian(*batch, key=key)), np.diag(hessian)) < 1e-12
    assert relative(cv.trace_ggn(*batch, key=key), np.trace(ggn)) < 1e-12
    top = cv.top_eigenvalues(*batch, matrix="hessian", key=key)
    due = np.linalg.eigvalsh(hessian)
    assert relative(top[0], due[np.argmax(np.abs(due))]) < 1e-10


def test_a_diagonal_has_a_derivative_where_deltas_are_zero(problem):
    net, _, params, x, y = problem
    loss = jb.SoftmaxCrossEntropy(ignore_index=1)

    def total(params):
        return jnp.sum(flat(cv.diag_ggn(net, loss, params, x, y)))

    direction = jax.tree.map(jnp.ones_like, params)
    found = flat(jax.grad(total)(params)) @ flat(direction)
    step = 1e-5

    def at(h):
        return total(jax.tree.map(lambda p, d: p + h * d, params, direction))

    assert relative(found, (at(step) - at(-step)) / (2 * step)) < 1e-7


def test_a_capped_loss_draws_what_it_predicts():
    loss, z = jb.FusedSoftmaxCrossEntropy(logit_cap=1.0), jnp.array([[0.0, 50.0]] * 4000)
    drawn = loss.sample(jax.random.key(0), z)
    assert relative(jnp.mean(drawn, axis=0), loss.predict(z)[0]) < 0.05


def test_spectra_of_next_to_nothing():
    x, y, loss = jnp.ones((3, 2)), jnp.zeros((3, 1)), jb.SquaredError()

    def zeros(params, x):
        return 0 * params["w"][:1]

    batch = zeros, loss, {"w": jnp.ones(100)}, x, y
    assert not np.any(cv.top_eigenvalues(*batch, 3))
    nothing = cv.spectral_density(*batch, key=jax.random.key(0), steps=10)
    assert not np.any(nothing.nodes)
    assert np.all(np.isfinite(nothing.density))
    one = cv.spectral_density(
        lambda params, x: params * x[:1], loss, jnp.ones(1), x, y, key=jax.random.key(0)
    )
    for density in (nothing, one):
        assert abs(jnp.trapezoid(density.density, density.eigenvalues) - 1) < 1e-4
    assert relative(one.nodes, np.ones((4, 1))) < 1e-12
    frozen = jb.Frozen(jb.Dense(2, 1))
    batch = frozen, loss, frozen.init(jax.random.key(0)), x, y
    for ask in (cv.top_eigenvalues, functools.partial(cv.spectral_density, key=jax.random.key(0))):
        with pytest.raises(ValueError, match="no parameter learns"):
            ask(*batch)
    assert cv.trace_ggn(*batch) == 0
    factors = cv.kfac(*batch, cv.Exact())
    assert factors.trace() == factors.log_determinant(0.1) == 0
    assert not np.any(flat(factors.solve(batch[2], 0.1)))
    assert cv.trace_ggn(jb.Tanh(), loss, (), y, y) == 0


def test_bfloat16_where_lapack_has_none(problem):
    net, loss, params, x, y = problem
    low, xs = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (params, x))
    batch = net, loss, low, xs, y
    due = flat(cv.diag_hessian(*problem))
    assert relative(flat(cv.diag_hessian(*batch)), due) < 0.1
    top = cv.top_eigenvalues(*problem, 2)
    assert relative(cv.top_eigenvalues(*batch, 2), top) < 0.05
    density = cv.spectral_density(*batch, key=jax.random.key(0), steps=6)
    assert relative(jnp.max(density.nodes), top[0]) < 0.05
    found = cv.trace_hessian(*batch, key=jax.random.key(0))
    assert found.dtype == jnp.float32


class Bare(jb.losses.Loss):
    def value(self, z, y):
        return jnp.sum(z, axis=-1)

    def delta(self, z, y):
        return jnp.ones_like(z)

    def __repr__(self):
        return "Bare()"


class Rows(Bare):
    def hessian_root(self, z, y):
        return jnp.ones_like(z)


BAD = {
    "no columns": (
        lambda p: cv.diag_ggn(p[0], Rows(), *p[2:]), ValueError, r"Bare.*must give r columns"),
    "no root": (lambda p: cv.diag_ggn(p[0], Bare(), *p[2:]), NotImplementedError, "Bare.*hessian_root"),
    "no product": (
        lambda p: cv.ggn_product(p[0], Bare(), *p[2:], p[2]), NotImplementedError, "Bare.*hessian_product"),
    "no distribution": (
        lambda p: cv.fisher_product(p[0], jb.Huber(), *p[2:4], jnp.zeros((6, 3)), p[2]),
        NotImplementedError, "Huber.*not of the canonical family"),
    "a class": (lambda p: cv.diag_ggn(*p, cv.Exact), TypeError, r"add \(\)"),
    "a word": (lambda p: cv.kfac(*p, "exact"), TypeError, "roots must be"),
    "no arrays": (lambda p: cv.diag_ggn(model, LOSS, {"f": jnp.tanh}, *p[3:]), TypeError, "eqx.partition"),
    "dampings": (
        lambda p: cv.kfac(*p, cv.Exact()).solve(p[2], jnp.ones(2)), ValueError, "one number"),
    "no basis": (lambda p: cv.ekfac(*p, cv.Exact(), basis=42), TypeError, "basis must be"),
    "no key": (lambda p: cv.kfac(*p), ValueError, "key=jax.random.key"),
    "vector": (lambda p: cv.ggn_product(*p, jax.tree.map(lambda v: v[:1], p[2])), ValueError, "shapes"),
    "structure": (lambda p: cv.hessian_product(*p, p[2][0]), ValueError, "must be a tree like params"),
    "chunk": (lambda p: cv.diag_ggn(*p, chunk=0), ValueError, "chunk must be"),
    "samples": (lambda p: cv.MonteCarlo(0), ValueError, "samples must be an int of at least 1"),
    "no number": (lambda p: cv.MonteCarlo(1.5), ValueError, "samples must be an int"),
    "sharing": (lambda p: cv.kfac(*p, cv.Exact(), sharing="mean"), ValueError, "expand"),
    "matrix": (lambda p: cv.top_eigenvalues(*p, matrix="fisher"), ValueError, "ggn"),
    "function": (lambda p: cv.diag_hessian(model, *p[1:]), TypeError, "estimate_diag_hessian"),
    "empty": (lambda p: cv.diag_ggn(*p[:3], p[3][:0], p[4][:0]), ValueError, "empty"),
    "targets": (lambda p: cv.diag_ggn(*p[:4], p[4] + 2), ValueError, "out of range"),
    "two": (lambda p: cv.diag_ggn(lambda q, x: (x, x), *p[1:]), TypeError, "one floating-point array"),
    "basis": (
        lambda p: cv.ekfac(jb.Dense(4, 3), LOSS, {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, *p[3:],
                           cv.Exact(), basis=cv.kfac(*p, cv.Exact())), ValueError, "other parameters"),
    "damping": (lambda p: cv.ggn_operator(*p, damping=-1.0), ValueError, "damping must be a finite number of at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(problem, name):
    ask, error, words = BAD[name]
    with pytest.raises(error, match=words):
        ask(problem)
