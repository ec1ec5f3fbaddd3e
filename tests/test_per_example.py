"""Questions about single examples: against vmap(jax.grad), written out by NumPy."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tabled import cases
from truth import assert_close, each_grad, relative, rows

import jbackprop as jb
from jbackprop import per_example as pe
from jbackprop.factored import base, outer

pytestmark = pytest.mark.newest
TRUTHS = Path(__file__).parent / "torch_truth"
W = np.array([0.5, 0.0, 2.0, 1.0, 0.25])
LOSS = jb.SoftmaxCrossEntropy()


DEEP = jb.Tied(
    jb.Embedding(5, 4), jb.Repeat(jb.Skip(jb.Sequential(jb.Dense(4, 4), jb.Tanh(), jb.Gain(4))), 3)
)
TOKENS = jax.random.randint(jax.random.key(7), (5, 7), 0, 5)


def deep(params=None):
    params = DEEP.init(jax.random.key(1)) if params is None else params
    return params, jb.backprop(DEEP, LOSS, params, TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.fixture(scope="module")
def scanned():
    params, bp = deep()
    later = pe.deferred(DEEP, LOSS, params, TOKENS[:, :-1], TOKENS[:, 1:])
    return params, bp, later, pe.gradients(bp)


@pytest.mark.parametrize("which", ["kept", "deferred", "pairs"])
@pytest.mark.parametrize("microbatch", [None, 2, 99])
def test_kept_deferred_and_in_microbatches_are_the_same(scanned, which, microbatch):
    _, bp, later, each = scanned
    source = {"kept": bp, "deferred": later, "pairs": bp.factored}[which]
    g = rows(each)
    norms = np.linalg.norm(g, axis=1)
    assert relative(pe.norms(source, microbatch=microbatch), norms) < 1e-12
    found = pe.clipped_gradient(source, 2.0, weights=jnp.asarray(W), microbatch=microbatch)
    factors = W * np.minimum(1, 2 / np.maximum(W * norms, 1e-300))
    due = jax.tree.map(lambda v: jnp.tensordot(jnp.asarray(factors), v, 1), each)
    assert_close(found.gradient, due, zero=1e-14)
    assert found.clipped_fraction == np.mean((norms * W > 2)[W != 0])
    moments = pe.variance(source, ddof=1, microbatch=microbatch)
    assert_close(moments, jax.tree.map(lambda v: np.var(v, axis=0, ddof=1), each), zero=1e-14)


def test_gradients_and_chunks_and_projections(scanned):
    params, bp, later, each = scanned
    direct = each_grad(DEEP, LOSS, params, TOKENS[:, :-1], TOKENS[:, 1:])
    for source in (bp, later, bp.factored):
        assert_close(pe.gradients(source, microbatch=2), direct, zero=1e-14)
        chunks = list(pe.gradient_chunks(source, 2))
        assert [len(jax.tree.leaves(chunk)[0]) for chunk in chunks] == [2, 2, 1]
        assert_close(jax.tree.map(lambda *v: jnp.concatenate(v), *chunks), direct, zero=1e-14)
        two = jax.tree.map(lambda v: v[1:3], direct)
        assert relative(pe.project(source, two, microbatch=3), rows(direct) @ rows(two).T) < 1e-12
        assert_close(pe.weighted_gradient(source, jnp.asarray(W)),
                     jax.tree.map(lambda v: jnp.tensordot(jnp.asarray(W), v, 1), direct),
                     zero=1e-14)  # fmt: skip
    assert relative(pe.gram(bp, microbatch=2), rows(each) @ rows(each).T) < 1e-12
    assert relative(pe.dots(later), rows(each) @ rows(each).T) < 1e-12
    assert relative(pe.gram(bp, method="gram"), rows(each) @ rows(each).T) < 1e-12
    some = jb.backprop(DEEP, LOSS, params, TOKENS[:2, 1:], TOKENS[:2, :-1])
    due = rows(each) @ rows(pe.gradients(some)).T
    assert relative(pe.gram_between(bp, some), due) < 1e-12


def test_layers_are_named_and_bounded_one_by_one(scanned):
    _, bp, later, each = scanned
    layers = pe.norms(bp, per_layer=True)
    assert list(layers) == list(jb.deltas(bp))
    bounds = {path: 0.1 + 0.01 * i for i, path in enumerate(layers)}
    scales = pe.noise_scale(later, per_layer=True)
    assert list(scales) == list(layers)
    assert pe.NoiseScale(jnp.array([6.0, 1.0]), jnp.array([2.0, -1.0])).simple.tolist() == [
        3,
        np.inf,
    ]
    np.testing.assert_allclose(
        sum(s.trace for s in scales.values()), pe.noise_scale(bp).trace, rtol=1e-12
    )
    for source in (bp, later):
        found = pe.clipped_gradient(source, bounds, "per_layer", microbatch=2)
        assert found.clipped_fraction == 1
    # of one layer alone: everything else may be as long as it likes
    free = dict.fromkeys(layers, 1e9)
    path = list(layers)[3]
    for source in (bp, later):
        found = pe.clipped_gradient(source, free | {path: 1e-3}, "per_layer").gradient
        moved = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b.sum(0)), found, each)
        assert sum(float(m) > 1e-9 for m in jax.tree.leaves(moved)) in (
            1,
            2,
        )  # its weights, its biases


@pytest.mark.parametrize("scheme", ["flat", "per_layer", "automatic"])
def test_gradients_written_out_once_are_clipped_the_same(scanned, scheme):
    """Of some examples at a time, in one sweep; also frozen ones, and one that holds NaN."""
    _, bp, later, _ = scanned
    net = jb.Sequential(jb.Dense(4, 6), jb.Frozen(jb.Dense(6, 5)), jb.Tanh(), jb.Dense(5, 3))
    rng = np.random.default_rng(0)
    data = jnp.asarray(rng.standard_normal((5, 4))).at[3].set(jnp.nan), jnp.arange(5) % 3
    mixed = pe.deferred(net, LOSS, net.init(jax.random.key(3)), *data)
    for source, weights in ((bp, W), (later, W), (bp.factored, W), (mixed, None), (mixed, W)):
        own = None if weights is None else jnp.asarray(weights)
        due = pe.clipped_gradient(source, 0.7, scheme, weights=own)
        found = pe.clipped_gradient(
            source, 0.7, scheme, weights=own, method="materialise", microbatch=2
        )
        assert_close(found.gradient, due.gradient, 1e-12, zero=1e-14)
        np.testing.assert_allclose(found.norms, due.norms, rtol=1e-12)
        assert found.clipped_fraction == due.clipped_fraction


def test_per_layer_bounds_are_equal_shares(key):
    net = jb.mlp([4, 3, 2])
    params, x, y = net.init(key), jax.random.normal(key, (6, 4)), jnp.arange(6) % 2
    bp = jb.backprop(net, LOSS, params, x, y)
    each = pe.gradients(bp)
    found = pe.clipped_gradient(bp, 0.5, "per_layer")
    for i in (0, 2):
        own = rows(each[i])
        factors = np.minimum(1, 0.5 / np.sqrt(2) / np.linalg.norm(own, axis=1))
        got = rows(jax.tree.map(lambda v: v[None], found.gradient[i]))[0]
        assert relative(got, factors @ own) < 1e-12


def truths(name, family="per_example"):
    with np.load(TRUTHS / f"{family}.npz") as file:
        return {
            k.removeprefix(f"{name}."): jnp.asarray(file[k])
            for k in file.files
            if k.startswith(f"{name}.")
        }


def in_layers(given, what):
    return [{kind: given[f"{what}.{i}.{kind}"] for kind in "wb"} for i in (0, 1)]


NETS = {
    "mlp": jb.mlp([5, 4, 3], jb.Tanh()),
    "cnn": jb.Sequential(jb.Conv(2, 3, (3, 3)), jb.Sigmoid(), jb.Flatten(), jb.Dense(60, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_the_same_as_opacus_and_backpack(name):
    """Opacus' grad_sample is ours; in BackPACK's figures the mean's 1/N is left in."""
    net, given = NETS[name], truths(name)
    first, last = in_layers(given, "params")
    params = tuple({0: first, len(net.layers) - 1: last}.get(i, ()) for i in range(len(net.layers)))
    bp = jb.backprop(net, LOSS, params, given["x"], given["y"])
    n = len(given["y"])

    def ours(tree):
        return [part for part in tree if part]

    assert_close(ours(pe.gradients(bp)), in_layers(given, "grad_sample"))
    squares = [jax.tree.map(lambda v: jnp.sum(v.reshape(n, -1) ** 2, axis=1) / n**2, part)
               for part in ours(pe.gradients(bp))]  # fmt: skip
    assert_close(squares, in_layers(given, "batch_l2"))
    whole = sum(jax.tree.leaves(in_layers(given, "batch_l2")))
    assert relative(pe.norms(bp) ** 2 / n**2, whole) < 1e-12
    moment = jax.tree.map(lambda v: v / n, pe.second_moment(bp))  # a sum of n, each over n^2
    assert_close(ours(moment), in_layers(given, "sum_grad_squared"))
    variance = jax.tree.map(lambda v: v / n**2, pe.variance(bp))
    assert_close(ours(variance), in_layers(given, "variance"), 1e-11)


@pytest.mark.parametrize("bound", [0.3, 1.0, 3.0])
def test_the_same_as_jax_privacy(bound):
    given, due = truths("mlp"), truths(str(bound), "clipped")
    first, last = in_layers(given, "params")
    bp = jb.backprop(NETS["mlp"], LOSS, (first, (), last), given["x"], given["y"])
    found = pe.clipped_gradient(bp, bound)
    for got, i in ((found.gradient[0], 0), (found.gradient[2], 1)):
        assert_close(got, {kind: due[f"{i}.{kind}"] for kind in "wb"})
    assert relative(found.norms, due["norms"]) < 1e-12


@settings(max_examples=4, deadline=None)
@given(st.sampled_from([(1, 1), (3, 5, 2)]), st.sampled_from([0, 3]), st.integers(0, 99),
       st.sampled_from(["float64", "float32", "bfloat16", "float16"]))  # fmt: skip
def test_laws_of_the_gradients_of_single_examples(sizes, positions, seed, dtype):
    n = 4
    net, loss = jb.mlp(sizes, jb.Tanh()), jb.SquaredError()
    rng = np.random.default_rng(seed)
    shape = (n, positions) if positions else (n,)
    params = jax.tree.map(lambda p: p.astype(dtype), net.init(jax.random.key(seed)))
    x = jnp.asarray(rng.standard_normal((*shape, sizes[0])), dtype)
    y = jnp.asarray(rng.standard_normal((*shape, sizes[-1])), dtype)
    bp = jb.backprop(net, loss, params, x, y)
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == "float64" else {"rtol": 2e-4, "atol": 2e-4}
    each = pe.gradients(bp)
    for total, g in zip(jax.tree.leaves(pe.mean(bp)), jax.tree.leaves(each), strict=True):
        np.testing.assert_allclose(total, np.mean(np.asarray(g), axis=0), **close)
    norms = np.asarray(pe.norms(bp))
    np.testing.assert_allclose(norms, np.linalg.norm(rows(each).astype(float), axis=1), **close)

    order = rng.permutation(n)
    turned = jb.backprop(net, loss, params, x[order], y[order])
    np.testing.assert_allclose(pe.norms(turned), norms[order], rtol=1e-5)

    both = jb.backprop(net, loss, params, *(jnp.concatenate([v, v]) for v in (x, y)))
    once, twice = (pe.clipped_gradient(b, 0.5) for b in (bp, both))
    half = {"rtol": 2e-2, "atol": 2e-2} if "16" in dtype else close
    for a, b in zip(jax.tree.leaves(once.gradient), jax.tree.leaves(twice.gradient), strict=True):
        np.testing.assert_allclose(2 * np.asarray(a, float), np.asarray(b, float), **half)

    bound = float(norms[0]) * 0.37 or 1.0
    for scheme in ("flat", "automatic", "per_layer", lambda norms: 3 * norms):
        alone = pe.clipped_gradient(
            jb.backprop(net, loss, params, x[:1], y[:1]), bound, scheme
        ).gradient
        assert all(g.dtype == dtype for g in jax.tree.leaves(alone))
        length = np.sqrt(sum(np.sum(np.square(np.asarray(g, np.float64)))
                             for g in jax.tree.leaves(alone)))  # fmt: skip
        assert length <= bound
        assert length > 0.5 * bound or norms[0] < 1e-3 or scheme in ("automatic", "per_layer")

    hurt = jb.backprop(net, loss, params, x.at[0].set(jnp.nan), y)
    found = np.asarray(pe.norms(hurt))
    assert np.isnan(found[0])
    np.testing.assert_array_equal(found[1:], norms[1:])


BROKEN = jnp.asarray([1.0, 0.0, 1.0, 1.0])


def test_an_example_of_weight_0_is_not_there_even_if_it_holds_nan(key):
    net = jb.mlp([4, 3, 2])
    params, x, y = net.init(key), jax.random.normal(key, (4, 4)), jnp.array([0, 1, 1, 0])
    there = np.array([0, 2, 3])
    due = jb.backprop(net, LOSS, params, x[there], y[there])
    for source in (jb.backprop, pe.deferred):
        bp = source(net, LOSS, params, x.at[1].set(jnp.nan), y)
        for mask in (BROKEN != 0, BROKEN.astype(int), BROKEN):
            assert_close(pe.norms(bp, weights=mask)[there], pe.norms(due))
            assert pe.norms(bp, weights=mask)[1] == 0
        for f in (pe.mean, pe.second_moment, pe.variance, pe.snr, pe.noise_scale):
            assert_close(f(bp, weights=mask), f(due), 1e-11)
            assert_close(f(bp, weights=mask, microbatch=2), f(due), 1e-11)
        for scheme in ("flat", "per_layer", "automatic"):
            found = pe.clipped_gradient(bp, 0.4, scheme, weights=mask)
            assert_close(found.gradient, pe.clipped_gradient(due, 0.4, scheme).gradient)
            assert found.clipped_fraction == pe.clipped_gradient(due, 0.4, scheme)[2]
        vectors = jax.tree.map(jnp.ones_like, params)
        assert pe.project(bp, vectors, weights=mask)[1] == 0
        assert pe.cosine_to_mean(bp, weights=mask)[1] == 0
        # by itself a gradient that is not finite cannot be bounded, and is left out
        found = pe.clipped_gradient(bp, 0.4)
        assert np.isnan(found.norms[1])
        assert_close(found.gradient, pe.clipped_gradient(due, 0.4).gradient)


@pytest.mark.parametrize("method", ["auto", "gram", "materialise"])
def test_padding_positions_do_not_leak_into_a_norm(key, method):
    """Not even by rounding: what stands there is much larger than what counts."""
    net, loss = jb.Dense(6, 5), jb.SoftmaxCrossEntropy(ignore_index=-1)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), net.init(key))
    x = jax.random.normal(key, (3, 4, 6), jnp.float32)
    y = jax.random.randint(key, (3, 4), 0, 5)
    padded = jnp.concatenate([x, jnp.full((3, 4, 6), 1e6, jnp.float32)], axis=1)
    labels = jnp.concatenate([y, jnp.full((3, 4), -1)], axis=1)
    due = jb.backprop(net, loss, params, x, y)
    # the mean is over 8 positions now, of which 4 count: state the divisor, and it is the same
    found = jb.backprop(net, loss, params, padded, labels)
    ratio = pe.norms(found, method=method) / pe.norms(due, method=method)
    np.testing.assert_allclose(ratio, np.full(3, ratio[0]), rtol=1e-5)
    np.testing.assert_allclose(ratio, 1, rtol=1e-5)


def test_frozen_parameters_have_no_part(key):
    parts = [jb.Dense(4, 3), jb.Tanh(), jb.Dense(3, 2)]
    net = jb.Sequential(jb.Frozen(jb.Repeat(jb.Dense(4, 4), 2)), *parts)
    params, x, y = net.init(key), jax.random.normal(key, (6, 4)), jnp.arange(6) % 2
    alone = jb.Sequential(*parts)
    h = jb.forward(net.layers[0], params[0], x)[0]
    due = jb.backprop(alone, LOSS, params[1:], h, y)
    for source in (jb.backprop(net, LOSS, params, x, y), pe.deferred(net, LOSS, params, x, y)):
        assert_close(pe.norms(source), pe.norms(due))
        assert list(pe.norms(source, per_layer=True)) == ["layers[1]", "layers[3]"]
        for scheme in ("flat", "per_layer"):
            found = pe.clipped_gradient(source, 0.3, scheme).gradient
            assert_close(found[1:], pe.clipped_gradient(due, 0.3, scheme).gradient)
            assert not any(np.any(g) for g in jax.tree.leaves(found[0]))
        noisy = pe.noisy_gradient(key, source, 1.0, 5.0).gradient
        assert not any(np.any(g) for g in jax.tree.leaves(noisy[0]))
        assert all(np.all(g != 0) for g in jax.tree.leaves(noisy[1:]))
        assert_close(pe.noise_scale(source), pe.noise_scale(due), 1e-11)
        zeros = jax.tree.map(jnp.ones_like, params)
        assert_close(pe.project(source, zeros), pe.project(due, zeros[1:]))


def test_a_layer_that_couples_examples_is_refused_by_name(key):
    net = jb.Sequential(jb.Dense(4, 3), jb.BatchNorm(3), jb.Dense(3, 2))
    params, x, y = net.init(key), jax.random.normal(key, (6, 4)), jnp.arange(6) % 2
    bp = jb.backprop(net, LOSS, params, x, y)
    asks = (pe.norms, pe.gradients, pe.gram, pe.mean, pe.variance, pe.noise_scale,
            lambda bp: pe.clipped_gradient(bp, 1.0), lambda bp: pe.project(bp, params),
            lambda bp: pe.noisy_gradient(key, bp, 1.0, 1.0), lambda bp: pe.gradient_chunks(bp, 2),
            lambda bp: pe.weighted_gradient(bp, jnp.ones(6)),
            lambda bp: pe.gram_between(bp, bp))  # fmt: skip
    for asked in asks:
        with pytest.raises(ValueError, match=r"layers\[1\].*BatchNorm.*couples.*fold_batch_norm"):
            asked(bp)
    with pytest.raises(ValueError, match="couples"):
        pe.deferred(net, LOSS, params, x, y)


@pytest.mark.parametrize("name", ["Conv(2, 4", "Tied(Embedding(5, 3"])
@pytest.mark.parametrize("some", [1, 2])
def test_gradients_are_written_out_for_a_few_examples_at_a_time(monkeypatch, name, some):
    """The same in blocks of every size, also where they do not divide the batch."""
    (case,) = (case for case in cases(5) if case.name.startswith(name))
    bp = jb.backprop(case.net, case.loss, case.params, case.x, case.y)
    pair = jax.tree.leaves(bp.factored, is_leaf=jb.factored.is_factored)[-1 if some == 1 else 0]
    monkeypatch.setattr(base, "AT_ONCE", some * pair.entries)
    monkeypatch.setattr(outer, "AT_ONCE", some * 3)

    @jax.jit
    def answers(pair):
        inner = [
            (pair.square_norm(method), pair.dot(pair, method), pair.gram(pair, method))
            for method in ("gram", "materialise")
        ]
        return pair.each(), inner, pair.second_moment(), pair.moments(jnp.asarray(W))

    each, inner, second, (mean, variance) = answers(pair)
    flat, p = np.asarray(each).reshape(5, -1), W / W.sum()
    for square, dot, gram in inner:
        assert relative(square, (flat**2).sum(1)) < 1e-12
        assert relative(dot, (flat**2).sum(1)) < 1e-12
        assert relative(gram, flat @ flat.T) < 1e-12
    assert relative(second.ravel(), (flat**2).sum(0)) < 1e-12
    assert relative(mean.ravel(), p @ flat) < 1e-12
    assert relative(variance.ravel(), p @ (flat - p @ flat) ** 2) < 1e-12


@pytest.mark.parametrize("rows_at_once", [1 << 18, 12])
def test_a_variance_much_smaller_than_the_mean_is_not_lost(monkeypatch, rows_at_once):
    """In float32 the difference of the moments would have no digit left."""
    monkeypatch.setattr(outer, "_IN_CACHE", rows_at_once)
    rng = np.random.default_rng(0)
    a, delta = 1 + 1e-4 * rng.standard_normal((8, 7)), 1 + 1e-4 * rng.standard_normal((8, 3))
    a[:, 0] = rng.standard_normal(8)  # and one row that is well spread
    a, delta = (jnp.asarray(v[:, None, None], jnp.float32) for v in (a, delta))
    pair = jb.Outer(a, delta, jb.Place((7, 3), jnp.dtype("float32")))
    each = np.einsum("ni,no->nio", *(np.asarray(v[:, 0, 0], np.float64) for v in (a, delta)))
    mean, variance = (np.asarray(v, np.float64) for v in pair.moments())
    assert relative(variance, each.var(0)) < 1e-3
    assert np.all(np.abs(variance / each.var(0) - 1) < 1e-2)
    assert relative(mean, each.mean(0)) < 1e-6
    naive = np.asarray(pair.second_moment() / 8) - mean**2
    assert np.any(np.abs(naive / each.var(0) - 1) > 1)


def test_a_tied_head_needs_no_gradient_written_out(key):
    """The cross term of table and head is found from the pairs."""
    net = jb.Tied(jb.Embedding(200_000, 64), jb.Dense(64, 64))

    def norms(params, ids, net=net):
        return pe.norms(jb.backprop(net, LOSS, params, ids, ids))

    sizes = jax.eval_shape(net.init, key)
    text = jax.jit(norms).lower(sizes, jnp.zeros((16, 5), int)).as_text()
    for shape in ("200000x64x", "64x200000x", "12800000"):
        arrays = re.findall(rf"tensor<[0-9x]*{shape}f", text)
        assert not [a for a in arrays if a not in ("tensor<200000x64xf", "tensor<64x200000xf")]

    net = jb.Tied(jb.Embedding(40, 8), jb.Dense(8, 8))
    ids, params = jax.random.randint(key, (16, 5), 0, 40), net.init(key)
    each = each_grad(net, LOSS, params, ids, ids)
    assert relative(norms(params, ids, net), np.linalg.norm(rows(each), axis=1)) < 1e-12


@pytest.mark.as_shipped
def test_two_sweeps_of_a_scanned_stack_keep_no_pairs(key):
    """A gradient's memory and a few of one layer's; kept pairs are those of every layer."""
    net = jb.Repeat(jb.Sequential(jb.Dense(32, 32), jb.Tanh()), 40)
    params, x = net.init(key), jax.random.normal(key, (64, 32))

    def memory(f):
        return jax.jit(f).lower(params, x, x).compile().memory_analysis().temp_size_in_bytes

    loss = jb.SquaredError()
    plain = memory(jb.value_and_grad(net, loss))
    for ask in (pe.norms, lambda bp: pe.clipped_gradient(bp, 1.0)):
        two = memory(lambda p, x, y, ask=ask: ask(pe.deferred(net, loss, p, x, y)))
        kept = memory(lambda p, x, y, ask=ask: ask(jb.backprop(net, loss, p, x, y)))
        assert two < 1.35 * plain
        assert kept > 1.5 * plain
        parts = memory(lambda p, x, y: pe.norms(pe.deferred(net, loss, p, x, y), microbatch=8))
        assert parts < 0.4 * plain


def test_noise_is_as_large_as_it_says(key):
    net = jb.mlp([30, 40, 20])
    params, x, y = net.init(key), jax.random.normal(key, (8, 30)), jnp.arange(8)
    bp = jb.backprop(net, LOSS, params, x, y)
    clipped = pe.clipped_gradient(bp, 0.5)
    none = pe.noisy_gradient(key, bp, 0.5, 0.0, divisor=4)
    assert_close(none.gradient, jax.tree.map(lambda g: g / 4, clipped.gradient))
    found = pe.noisy_gradient(key, bp, 0.5, 3.0, divisor=4)
    assert (float(found.sensitivity), float(found.noise_std)) == (0.5, 1.5)
    noise = rows(jax.tree.map(lambda a, b: (a - b)[None] * 4, found.gradient, none.gradient))[0]
    assert abs(noise.std() - 1.5) < 4 * 1.5 / np.sqrt(2 * noise.size)
    assert abs(noise.mean()) < 4 * 1.5 / np.sqrt(noise.size)
    leaves = [np.ravel(g)[:20] for g in jax.tree.leaves(found.gradient)]
    assert len({tuple(leaf) for leaf in leaves}) == 4  # no two parameters have the same noise
    bounds = dict(zip(pe.norms(bp, per_layer=True), (3.0, 4.0), strict=True))
    assert pe.noisy_gradient(key, bp, bounds, 2.0, "per_layer").noise_std == 10.0


def test_automatic_and_own_schemes(key):
    net = jb.mlp([4, 3, 2])
    params, x, y = net.init(key), jax.random.normal(key, (6, 4)), jnp.arange(6) % 2
    bp = jb.backprop(net, LOSS, params, x, y)
    g = rows(pe.gradients(bp))
    norms = np.linalg.norm(g, axis=1)

    def sums(scheme, bound=0.7):
        found = pe.clipped_gradient(bp, bound, scheme).gradient
        return rows(jax.tree.map(lambda v: v[None], found))[0]

    assert relative(sums("automatic"), 0.7 / (norms + 0.01) @ g) < 1e-12
    assert relative(sums(lambda n: 0.1 * jnp.ones_like(n)), 0.1 * g.sum(0)) < 1e-12
    # a scheme that asks for more than its bound does not get it
    assert relative(sums(lambda n: 99 + n), 0.7 / norms @ g) < 1e-12


def test_half_precision_is_rounded_towards_zero(key):
    from jbackprop.per_example.clipping import _towards_zero

    g = jnp.asarray(np.random.default_rng(0).standard_normal(999), jnp.float32)
    for dtype in ("bfloat16", "float16"):
        found = _towards_zero(g, jnp.zeros(999, dtype))
        assert found.dtype == dtype
        assert np.all(np.abs(np.asarray(found, np.float32)) <= np.abs(g))
        up = jnp.nextafter(found, jnp.asarray(jnp.inf, dtype) * jnp.sign(found))
        assert np.all(np.abs(np.asarray(up, np.float32)) > np.abs(g))


BAD = {
    "weights": (lambda bp: pe.norms(bp, weights=jnp.ones(3)), "weights must have the shape"),
    "method": (lambda bp: pe.norms(bp, method="fast"), "'auto', 'gram', 'materialise'"),
    "microbatch": (lambda bp: pe.mean(bp, microbatch=0), "at least 1"),
    "size": (lambda bp: pe.gradient_chunks(bp, None), "size must be"),
    "scheme": (lambda bp: pe.clipped_gradient(bp, 1.0, "soft"), "'flat', 'per_layer'"),
    "max_norm": (lambda bp: pe.clipped_gradient(bp, -1.0), "max_norm must be positive"),
    "max_norm nan": (lambda bp: pe.clipped_gradient(bp, float("nan")), "max_norm must be positive"),
    "max_norm shape": (lambda bp: pe.clipped_gradient(bp, np.ones(2)), "one number"),
    "bounds": (lambda bp: pe.clipped_gradient(bp, {"layers[0]": 1.0}, "per_layer"),
               r"missing: layers\[2\]; not a layer: none"),
    "bound names": (lambda bp: pe.clipped_gradient(bp, {"x": 1.0}, "per_layer"), "not a layer: x"),
    "bounds flat": (lambda bp: pe.clipped_gradient(bp, {"layers[0]": 1.0}), "needs scheme"),
    "noise": (lambda bp: pe.noisy_gradient(jax.random.key(0), bp, 1.0, -1.0), "noise_multiplier"),
    "divisor": (lambda bp: pe.noisy_gradient(jax.random.key(0), bp, 1.0, 1.0, divisor=0), "divisor"),
    "vectors": (lambda bp: pe.project(bp, (1.0,)), "vectors must be a tree like params"),
    "vector shapes": (lambda bp: pe.project(bp, jax.tree.map(lambda g: g[..., 0], jb.gradient(bp))),
                      "vectors must have the parameters' shapes"),
    "ddof": (lambda bp: pe.variance(bp, ddof=6), "more than 6 examples"),
    "own scheme": (lambda bp: pe.clipped_gradient(bp, 1.0, lambda n: jnp.ones(2)), "one factor"),
    "no weights": (lambda bp: pe.weighted_gradient(bp, None), "not None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(key, name):
    net = jb.mlp([4, 3, 2])
    bp = jb.backprop(net, LOSS, net.init(key), jnp.ones((6, 4)), jnp.zeros(6, int))
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(bp)


def test_what_is_no_mini_batch_is_refused(key):
    net = jb.mlp([4, 3, 2])
    params, x, y = net.init(key), jnp.ones((2, 4)), jnp.zeros(2, int)
    bp, later = (f(net, LOSS, params, x, y) for f in (jb.backprop, pe.deferred))
    with pytest.raises(TypeError, match="backprop"):
        pe.norms(params)
    with pytest.raises(TypeError, match="both"):
        pe.gram_between(bp, later)
    with pytest.raises(ValueError, match="microbatch"):
        pe.gram(later, microbatch=1)
    other = jb.mlp([4, 5, 2])
    wide = jb.backprop(other, LOSS, other.init(key), x, y)
    with pytest.raises(ValueError, match="different networks"):
        pe.gram_between(bp, wide)
    empty = jb.backprop(net, LOSS, params, x[:0], y[:0])
    assert pe.norms(empty).shape == (0,)
    assert pe.norms(empty, microbatch=3).shape == (0,)
    assert_close(pe.clipped_gradient(empty, 1.0).gradient, jax.tree.map(jnp.zeros_like, params))
    assert pe.gram(empty).shape == (0, 0)
    with pytest.raises(ValueError, match="empty"):
        pe.mean(empty)
    with pytest.raises(ValueError, match="two examples"):
        pe.noise_scale(jb.backprop(net, LOSS, params, x[:1], y[:1]))
    with pytest.raises(ValueError, match="labels"):
        pe.deferred(net, LOSS, params, x, y + 9)


def test_without_parameters_there_is_nothing(key):
    net, x = jb.Tanh(), jnp.ones((3, 2))
    for source in (jb.backprop, pe.deferred):
        bp = source(net, jb.SquaredError(), (), x, x)
        assert_close(pe.norms(bp), jnp.zeros(3))
        assert pe.gradients(bp) == pe.mean(bp) == pe.variance(bp) == ()
        assert pe.clipped_gradient(bp, 1.0, "per_layer").gradient == ()


def test_positions_that_cancel_do_not_hide_a_norm():
    """What the Gram matrices would lose in rounding: then gradients are written out."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sign_a, sign_d = np.array([1, -1, 1, -1]), np.array([1, 1, -1, -1])
        a = 3e3 * sign_a[:, None] * rng.standard_normal(64) / 8 + rng.standard_normal((4, 64)) / 20
        delta = sign_d[:, None] * rng.standard_normal(64) / 8
        pair = jb.Outer(*(jnp.asarray(v[None, None], jnp.float32) for v in (a, delta)),
                        jb.Place((64, 64), jnp.dtype("float32")))  # fmt: skip
        exact = np.linalg.norm(np.float32(a).astype(float).T @ np.float32(delta).astype(float))
        assert abs(float(pe.norms([pair])[0]) / exact - 1) < 1e-3
        found = pe.clipped_gradient([pair], 0.1 * exact).gradient
        assert np.linalg.norm(np.asarray(found[0], float)) <= 0.1 * exact * (1 + 1e-3)


def test_copies_have_shares_of_their_own_without_a_network_too(key):
    net = jb.Repeat(jb.Dense(3, 3), 9)
    x = 10 * jax.random.normal(key, (1, 3))
    bp = jb.backprop(net, jb.SquaredError(), net.init(key), x, jnp.ones((1, 3)))
    kept, pairs = (pe.clipped_gradient(v, 1.0, "per_layer") for v in (bp, bp.factored))
    assert_close(kept.gradient, pairs.gradient)
    assert list(pe.norms(bp.factored, per_layer=True)) == [f"net[{i}]" for i in range(9)]
    bounds = {f"net[{i}]": 0.1 for i in range(9)}
    assert_close(pe.clipped_gradient(bp.factored, bounds, "per_layer").gradient,
                 pe.clipped_gradient(bp, 0.3, "per_layer").gradient)  # fmt: skip


def test_no_example_gets_more_than_its_bound_by_a_scheme_of_ones_own():
    def shifts(*values):
        place = jb.Place((1,), jnp.dtype(float))
        return [jb.Shift(jnp.asarray(values, float).reshape(-1, 1, 1, 1), place)]

    relative_to_all = pe.clipped_gradient(shifts(1, 1, 1000), 1.0, lambda n: 1 / jnp.max(n))
    assert_close(relative_to_all.gradient[0], jnp.array([3.0]), 1e-12)
    for scheme in (lambda n: 1 / n, lambda n: jnp.nan * n, lambda n: jnp.inf):
        found = pe.clipped_gradient(shifts(0, 2), 1.0, scheme).gradient[0]
        assert np.all(np.abs(found) <= 1)
    tiny = pe.clipped_gradient(shifts(1e-200), 1.0, lambda n: 1e300 + 0 * n).gradient[0]
    assert np.all(np.abs(tiny) <= 1)
    for weight in (jnp.nan, jnp.inf, -jnp.inf):
        for scheme in ("flat", "per_layer", "automatic"):
            found = pe.clipped_gradient(shifts(3, 2), 1.0, scheme, weights=jnp.array([weight, 1.0]))
            assert np.all(np.abs(found.gradient[0]) <= 1)


def test_a_position_that_holds_nan_is_seen(key):
    net = jb.Sequential(jb.Dense(30, 20), jb.Take(-1))
    x = jax.random.normal(key, (3, 4, 30)).at[0, 0].set(jnp.nan)
    bp = jb.backprop(net, jb.SquaredError(), net.init(key), x, jnp.ones((3, 20)))
    for method in ("auto", "gram", "materialise"):
        norms = pe.norms(bp, method=method)
        assert np.isnan(norms).tolist() == [True, False, False]
        found = pe.clipped_gradient(bp, 1.0, method=method)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(found.gradient))
        assert np.isclose(found.clipped_fraction, np.mean(~(norms <= 1)))


def test_odd_batches(key):
    net, none = jb.mlp([3, 2, 2]), jb.Sequential(jb.Tanh())
    params = net.init(key)
    empty = jb.backprop(net, LOSS, params, jnp.ones((0, 3)), jnp.zeros(0, int))
    assert_close(pe.clipped_gradient(empty, 1.0, "per_layer").gradient,
                 jax.tree.map(jnp.zeros_like, params))  # fmt: skip
    nowhere = jb.backprop(net, jb.SquaredError(), params, jnp.ones((2, 0, 3)), jnp.ones((2, 0, 2)))
    assert_close(pe.norms(nowhere), jnp.zeros(2))
    assert_close(pe.gram(nowhere), jnp.zeros((2, 2)))
    four, two = (jb.backprop(none, jb.SquaredError(), ((),), x, x)
                 for x in (jnp.ones((4, 2)), jnp.ones((2, 2))))  # fmt: skip
    assert pe.gram(four, microbatch=2).shape == (4, 4)
    assert pe.gram_between(four, two).shape == (4, 2)


def test_weights_are_as_exact_as_sums(key):
    net = jb.Dense(3, 2)
    params, x = net.init(key), jax.random.normal(key, (301, 3))
    bp = jb.backprop(net, LOSS, params, x, jnp.zeros(301, int))
    for f in (pe.mean, pe.second_moment, pe.variance, pe.noise_scale):
        assert_close(f(bp, weights=jnp.ones(301, jnp.bfloat16)), f(bp), 1e-6)
    few = jnp.zeros(301).at[0].set(1.0)
    assert all(np.all(np.isnan(v)) for v in jax.tree.leaves(pe.variance(bp, ddof=1, weights=few)))
    with pytest.raises(ValueError, match="negative"):
        pe.mean(bp, weights=-few)
    half = (jax.tree.map(lambda p: p.astype(jnp.float32), params), params)
    two = jb.Sequential(net, jb.Autodiff(_mixed, lambda key: {"w": jnp.ones((2, 2))}))
    mixed = jb.backprop(two, LOSS, (half[0], {"w": jnp.ones((2, 2))}), x.astype(jnp.float32),
                        jnp.zeros(301, int))  # fmt: skip
    for f in (pe.gram, pe.variance, pe.noise_scale, pe.cosine_to_mean, pe.norms):
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(f(mixed)))
    pe.clipped_gradient(mixed, np.float64(1), "per_layer")


def _mixed(params, x):
    return x.astype(float) @ params["w"]
