"""The kinds, alone: every answer against gradients written out example by example."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import relative

import jbackprop as jb

pytestmark = pytest.mark.newest
B = 5


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def outer(g, t, i, o, shape=None, steps=(), seed=0):
    place = jb.Place(shape or ((i, o) if g == 1 else (g, i, o)), jnp.dtype(float), steps=steps)
    return jb.Outer(normal(B, g, t, i, seed=seed), normal(B, g, t, o, seed=seed + 1), place)


@jax.jit
def answered(pair, w):
    """All that is asked of one pair, as one program: that is much cheaper than op by op."""
    return {
        "each": pair.each(), "total": pair.total(), "weighted": pair.total(w),
        "square_norm": pair.square_norm(), "second_moment": pair.second_moment(),
        "dot": pair.dot(pair), "gram": pair.gram(pair),
    }  # fmt: skip


@jax.jit
def across(one, other):
    return one.dot(other), one.gram(other)


def at_examples(pair, numbers):
    """The pair, with these numbers in the place of these examples."""

    def put(v):
        v = np.array(v)
        for n, number in numbers.items():
            v[n] = number
        return jnp.asarray(v)

    return jax.tree.map(put, pair)


def explicit(pair):
    """Written out by numpy, in the canonical shape (B, G, ...)."""
    if isinstance(pair, jb.Outer):
        return np.einsum("ngti,ngto->ngio", pair.a, pair.delta)
    if isinstance(pair, jb.Shift):
        return np.sum(pair.delta, axis=2)
    return np.asarray(pair.g)


def shift(g, t, o, seed=0):
    place = jb.Place((o,) if g == 1 else (g, o), jnp.dtype(float))
    return jb.Shift(normal(B, g, t, o, seed=seed), place)


def full(*shape):
    return jb.Full(normal(B, *shape), "a test", jb.Place(shape, jnp.dtype(float)))


KINDS = {
    "outer": outer(1, 1, 3, 4),
    "outer over positions, gram": outer(1, 2, 9, 8),
    "outer over positions, written out": outer(1, 20, 3, 2),
    "outer in groups": outer(3, 1, 2, 4),
    "outer in groups over positions": outer(3, 4, 6, 5),
    "outer of width 1": outer(1, 1, 1, 1),
    "shift": shift(1, 1, 4),
    "shift over positions": shift(1, 6, 4),
    "shift in groups": shift(3, 2, 4),
    "shift of width 1": shift(1, 1, 1),
    "full": full(3, 4),
    "full scalar": full(),
}


@pytest.mark.parametrize("pair", KINDS.values(), ids=KINDS.keys())
def test_answers(pair):
    g = explicit(pair).reshape(B, *pair.place.shape)
    flat = g.reshape(B, -1)
    w = np.array([0.5, 0.0, 2.0, -1.0, 3.0])
    found = answered(pair, jnp.asarray(w))
    assert relative(found["each"], g) < 1e-14
    assert relative(found["total"], g.sum(0)) < 1e-14
    assert relative(found["weighted"], np.tensordot(w, g, 1)) < 1e-14
    assert relative(found["square_norm"], (flat**2).sum(1)) < 1e-14
    assert relative(found["second_moment"], (g**2).sum(0)) < 1e-14
    assert relative(found["dot"], (flat**2).sum(1)) < 1e-14
    assert relative(found["gram"], flat @ flat.T) < 1e-13


@pytest.mark.parametrize("t", [1, 3, 30])
@pytest.mark.parametrize("s", [1, 3, 30])
def test_dot_and_gram_of_two_of_a_kind_with_other_positions(t, s):
    one, other = outer(1, t, 4, 3), outer(1, s, 4, 3, seed=5)
    a, b = explicit(one).reshape(B, -1), explicit(other).reshape(B, -1)
    dot, gram = across(one, other)
    assert relative(dot, (a * b).sum(1)) < 1e-13
    assert relative(gram, a @ b.T) < 1e-13


def test_dot_across_kinds():
    one, other = outer(1, 2, 4, 3), full(4, 3)
    a, b = explicit(one).reshape(B, -1), explicit(other).reshape(B, -1)
    assert relative(one.dot(other), (a * b).sum(1)) < 1e-13
    assert relative(other.gram(one), b @ a.T) < 1e-13
    turned = jb.Place((2, 2), jnp.dtype(float), steps=(("transpose", (1, 0)),))
    bias = shift(2, 3, 2)
    for kind in (full(2, 2), jb.Shift(normal(B, 2, 1, 2, seed=3), turned)):
        a, b = bias.each().reshape(B, 4), kind.each().reshape(B, 4)
        assert relative(bias.dot(kind), (a * b).sum(1)) < 1e-13
        assert relative(bias.gram(kind), a @ b.T) < 1e-13


def test_sum_has_its_cross_terms():
    parts = (outer(1, 1, 4, 3), outer(1, 3, 4, 3, seed=7), full(4, 3))
    pair = jb.Sum(parts, parts[0].place)
    g = sum(explicit(p).reshape(B, 4, 3) for p in parts)
    flat = g.reshape(B, -1)
    assert relative(pair.each(), g) < 1e-14
    assert relative(pair.total(), g.sum(0)) < 1e-13
    assert relative(pair.square_norm(), (flat**2).sum(1)) < 1e-13
    assert relative(pair.second_moment(), (g**2).sum(0)) < 1e-13
    assert relative(pair.gram(pair), flat @ flat.T) < 1e-13
    assert relative(parts[0].dot(pair), (flat * explicit(parts[0]).reshape(B, -1)).sum(1)) < 1e-13
    assert relative(pair.dot(parts[0]), (flat * explicit(parts[0]).reshape(B, -1)).sum(1)) < 1e-13
    assert relative(pair.gram(parts[1]), flat @ explicit(parts[1]).reshape(B, -1).T) < 1e-13
    naive = sum(p.square_norm() for p in parts)
    assert relative(naive, (flat**2).sum(1)) > 0.1


def test_a_place_leads_back_through_transpose_and_slice():
    """w (6, 2, 5): its part [1:4] transposed and reshaped is what multiplies."""
    steps = (("slice", (1, 0, 0), (4, 2, 5)), ("transpose", (2, 0, 1)), ("reshape", (1, 5, 6)))
    pair = outer(1, 2, 5, 6, shape=(6, 2, 5), steps=steps)

    def cost(w, a, delta):
        part = jnp.transpose(w[1:4], (2, 0, 1)).reshape(5, 6)
        return jnp.sum((a[0] @ part) * delta[0])

    w = normal(6, 2, 5)
    truth = jax.jit(jax.vmap(jax.grad(cost), in_axes=(None, 0, 0)))(w, pair.a, pair.delta)
    assert relative(pair.each(), truth) < 1e-14
    assert relative(pair.total(), truth.sum(0)) < 1e-14
    assert relative(pair.second_moment(), (truth**2).sum(0)) < 1e-14
    assert relative(pair.square_norm(), (truth**2).sum((1, 2, 3))) < 1e-14
    plain = full(6, 2, 5)
    expected = (truth * plain.g).sum((1, 2, 3))
    assert relative(pair.dot(plain), expected) < 1e-13


@pytest.mark.parametrize("name", ["outer", "outer over positions, gram", "shift", "full"])
def test_a_scan_moves_its_depth_into_the_groups(name):
    pair = KINDS[name]

    @jax.jit
    def asked(pair):
        copies = [jax.tree.map(lambda v, k=k: (k + 1) * v, pair) for k in range(3)]
        stack = jax.tree.map(lambda *v: jnp.stack(v), *copies).stacked()
        assert stack.place.stack == (3,)
        again = jax.tree.map(lambda v: jnp.stack([v, v]), stack).stacked()
        assert jax.eval_shape(again.each).shape == (B, 2, 3, *pair.place.shape)
        each = jnp.stack([p.each() for p in copies], axis=1)
        return each, stack.each(), stack.total(), stack.square_norm()

    each, found, total, square_norm = map(np.asarray, asked(pair))
    assert relative(found, each) < 1e-14
    assert relative(total, each.sum(0)) < 1e-14
    assert relative(square_norm, (each.reshape(B, -1) ** 2).sum(1)) < 1e-13


def test_a_scan_stacks_sums_and_steps_too():
    steps = (("transpose", (1, 0)),)
    parts = (outer(1, 1, 4, 3, shape=(3, 4), steps=steps), full(3, 4))
    pair = jb.Sum(parts, parts[0].place)
    stack = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), pair).stacked()
    quadratic = jnp.stack(
        [parts[0].each() + parts[1].each(), 4 * parts[0].each() + 2 * parts[1].each()], 1
    )
    assert stack.place.stack == (2,)
    assert relative(stack.each(), quadratic) < 1e-14
    assert relative(stack.total(), quadratic.sum(0)) < 1e-14


def test_a_scan_stacks_nothing():
    none = jb.Nothing.like(outer(1, 2, 3, 4))
    stack = jax.tree.map(lambda v: jnp.stack([v, v]), none).stacked()
    assert stack.place.stack == (2,)
    for pair, shape in ((none, (3, 4)), (stack, (2, 3, 4))):
        np.testing.assert_array_equal(pair.each(), np.zeros((B, *shape)))
        np.testing.assert_array_equal(pair.total(jnp.ones(B)), np.zeros(shape))
        np.testing.assert_array_equal(pair.square_norm(), np.zeros(B))


def lookup(ids, seed=0, steps=()):
    place = jb.Place((4, 4), jnp.dtype(float), steps=steps)
    ids = jnp.broadcast_to(jnp.asarray(ids), (B, 1, len(ids)))
    return jb.Lookup(ids, normal(*ids.shape, 4, seed=seed), 4, place)


def test_dot_of_rows_that_were_looked_up():
    one = lookup([1, 0, 1, 3])
    ask = jax.jit(lambda one, other: (one.each(), other.each(), one.dot(other), other.gram(one)))
    for other in (
        lookup([3, 1, 2, 9], seed=1),
        lookup([2, 3], seed=2),
        lookup([0, 3, 1], seed=3, steps=(("transpose", (1, 0)),)),
        full(4, 4),
    ):
        *each, dot, gram = ask(one, other)
        a, b = (np.asarray(g).reshape(B, -1) for g in each)
        assert relative(dot, (a * b).sum(1)) < 1e-13
        assert relative(gram, b @ a.T) < 1e-13


@pytest.mark.parametrize("pair", KINDS.values(), ids=KINDS.keys())
def test_an_example_of_weight_0_is_not_there_even_if_it_is_nan(pair):
    bad = at_examples(pair, {1: np.nan, 2: np.inf})
    w = jnp.asarray([1.0, 0.0, 0.0, 2.0, 1.0])
    total = jax.jit(lambda pair: pair.total(w))
    assert relative(total(bad), total(pair)) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_are_kept_in_float32(dtype):
    """4096 equal terms: in the dtype itself a sum would stop growing long before."""
    n = 4096
    place = jb.Place((2, 2), jnp.dtype(dtype))
    a, delta = jnp.full((n, 1, 1, 2), 1.5, dtype), jnp.full((n, 1, 1, 2), 3.0, dtype)
    pair = jb.Outer(a, delta, place)
    assert pair.total().dtype == pair.square_norm().dtype == jnp.float32
    np.testing.assert_array_equal(pair.total(), np.full((2, 2), 4.5 * n))
    bias = jb.Shift(delta, jb.Place((2,), jnp.dtype(dtype)))
    np.testing.assert_array_equal(bias.total(), np.full(2, 3.0 * n))
    big = jb.Outer(a[:1] * 200, delta[:1] * 100, place)  # its square overflows float16
    np.testing.assert_allclose(big.square_norm(), [4 * (300.0 * 300) ** 2], rtol=1e-6)
    np.testing.assert_allclose(big.second_moment(), np.full((2, 2), (300.0 * 300) ** 2), rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 3])
def test_totals_of_a_half_precision_are_float32(groups):
    a, delta = normal(B, groups, 2, 3), normal(B, groups, 2, 4, seed=1)
    w, shapes = normal(B, seed=2).astype("bfloat16"), ((groups, 3, 4), (groups, 4))
    places = [jb.Place(shape, jnp.dtype("bfloat16")) for shape in shapes]
    pair, bias = jb.Outer(a, delta, places[0]), jb.Shift(delta, places[1])
    for kind in (pair, bias, jb.Full(bias.each(), "a test", places[1])):
        half = jax.tree.map(lambda v: v.astype("bfloat16"), kind)
        wide = jax.tree.map(lambda v: v.astype(float), half)
        found, due = answered(half, w), answered(wide, w.astype(float))
        for question in ("each", "square_norm", "second_moment", "total", "weighted"):
            assert found[question].dtype == jnp.float32
            assert relative(found[question], due[question]) < 1e-6


def test_a_kind_without_a_place_says_so():
    pair = dataclasses.replace(KINDS["outer"], place=None)
    with pytest.raises(ValueError, match="has no place yet"):
        pair.total()


def test_kinds_are_pytrees_with_static_places():
    pair = KINDS["outer"]
    leaves, tree = jax.tree.flatten(pair)
    assert len(leaves) == 2
    assert jax.tree.unflatten(tree, leaves).place == pair.place
    doubled = jax.jit(lambda p: jax.tree.map(lambda v: 2 * v, p))(pair)
    assert relative(doubled.total(), 4 * pair.total()) < 1e-14


def test_nested_scans_keep_the_order_of_their_copies():
    pair = KINDS["outer"]
    inner = [jax.tree.map(lambda v, k=k: (k + 1) * v, pair) for k in range(3)]
    outer_copies = [
        jax.tree.map(lambda *v, s=s: s * jnp.stack(v), *inner).stacked() for s in (1, 10)
    ]
    both = jax.tree.map(lambda *v: jnp.stack(v), *outer_copies).stacked()
    each = jnp.stack([c.each() for c in outer_copies], axis=1)
    assert both.each().shape == (B, 2, 3, 3, 4)
    assert relative(both.each(), each) < 1e-14
    assert relative(both.total(), each.sum(0)) < 1e-14


def test_the_canonical_forms_of_differently_placed_pairs_are_not_compared():
    square = outer(1, 1, 4, 4)
    steps = (("transpose", (1, 0)),)
    turned = outer(1, 1, 4, 4, shape=(4, 4), steps=steps, seed=3)
    a = explicit(square).reshape(B, -1)
    b = explicit(turned).reshape(B, 4, 4).transpose(0, 2, 1).reshape(B, -1)
    assert relative(square.dot(turned), (a * b).sum(1)) < 1e-13
    assert relative(turned.gram(square), b @ a.T) < 1e-13


def test_full_sums_in_float32():
    g = jnp.full((4096, 3), 3.0, "bfloat16")
    pair = jb.Full(g, "a test", jb.Place((3,), jnp.dtype("bfloat16")))
    np.testing.assert_array_equal(pair.total(), np.full(3, 3.0 * 4096))
    np.testing.assert_array_equal(pair.total(jnp.ones(4096)), np.full(3, 3.0 * 4096))


@pytest.mark.parametrize("pair", KINDS.values(), ids=KINDS.keys())
def test_scans_in_scans(pair):
    """The first of `stack` is the outermost scan; one copy has an axis too."""
    stack = (3, 1)

    @jax.jit
    def asked(pair):
        each = pair.each()
        for depth in reversed(stack):
            pair = jax.tree.map(lambda v, d=depth: jnp.stack([(k + 1) * v for k in range(d)]), pair)
            pair = pair.stacked()
        return each, pair.each(), pair.total(), pair.square_norm()

    each, copies, total, square_norm = map(np.asarray, asked(pair))
    assert copies.shape == (B, *stack, *each.shape[1:])
    assert relative(total, copies.sum(0)) < 1e-14
    first = copies[(slice(None), *[0] * len(stack))]
    assert relative(first, each) < 1e-14
    assert relative(square_norm, (copies.reshape(B, -1) ** 2).sum(1)) < 1e-13


@pytest.mark.parametrize("pair", KINDS.values(), ids=KINDS.keys())
def test_one_example(pair):
    one = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)[:1]), pair)
    small = jax.tree.map(lambda v: jnp.asarray(1e-3 * np.asarray(v)), one)
    each = explicit(one).reshape(pair.place.shape)

    @jax.jit
    def asked(pair):
        return pair.total(), pair.total(jnp.ones(1)), pair.square_norm(), pair.each()

    total, weighted, square_norm, _ = asked(one)
    assert relative(total, each) < 1e-14
    assert relative(weighted, each) < 1e-14
    assert relative(square_norm, np.sum(each**2).reshape(1)) < 1e-14
    *_, square_norm, each = asked(small)
    assert relative(square_norm, np.sum(each**2).reshape(1)) < 1e-13


def test_steps_between_equal_shapes_are_taken():
    steps = (("transpose", (0, 2, 1)),)
    pair = outer(1, 2, 4, 4, shape=(1, 4, 4), steps=steps)
    g = explicit(pair).transpose(0, 1, 3, 2)
    assert relative(pair.each(), g) < 1e-14
    assert relative(pair.total(), g.sum(0)) < 1e-14
    bias = jb.Shift(pair.delta, jb.Place((4, 1), jnp.dtype(float), steps=(("transpose", (1, 0)),)))
    assert relative(bias.total(), explicit(bias).transpose(0, 2, 1).sum(0)) < 1e-14


@pytest.mark.parametrize("pair", KINDS.values(), ids=KINDS.keys())
def test_a_nan_that_counts_is_not_hidden(pair):
    bad = at_examples(pair, {1: np.nan})
    assert np.isnan(jax.jit(lambda pair: pair.total(jnp.full(B, 0.5)))(bad)).all()


def test_a_pair_that_was_never_placed_is_stacked_all_the_same():
    for name in ("outer", "shift", "full"):
        pair = dataclasses.replace(KINDS[name], place=None)
        stack = jax.tree.map(lambda v: jnp.stack([v, v]), pair).stacked()
        assert stack.place is None


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("groups", [1, 3])
def test_a_pair_of_two_dtypes_is_taken_in_the_wider(groups, dtypes):
    place = jb.Place((groups, 3, 4), jnp.dtype("float32"))
    a, delta = normal(B, groups, 2, 3), normal(B, groups, 2, 4, seed=1)
    pair = jb.Outer(a.astype(dtypes[0]), delta.astype(dtypes[1]), place)
    wide = jax.tree.map(lambda v: v.astype(float), pair)
    asked = jax.jit(lambda pair: (pair.total(), pair.each()))
    with jax.numpy_dtype_promotion("standard"):
        total, each = asked(pair)
    assert total.dtype == jnp.float32
    for found, due in zip((total, each), asked(wide), strict=True):
        assert relative(found, due) < 1e-6


def test_a_square_norm_is_not_negative_where_the_gradient_cancels():
    """Positions, or parts, that undo each other in pairs: what is left is rounding."""
    a, d, noise = normal(64, 1, 2, 9), normal(64, 1, 2, 8, seed=1), normal(64, 1, 2, 9, seed=2)
    near, place = a * (1 + 1e-6 * noise), jb.Place((9, 8), jnp.dtype("float32"))

    def pair(*arrays):
        return jb.Outer(*(v.astype("float32") for v in arrays), place)

    both = pair(jnp.concatenate([a, near], 2), jnp.concatenate([d, -d], 2))
    parts = jb.Sum((pair(a, d), pair(-near, d)), place)
    assert jnp.min(both.dot(dataclasses.replace(both))) < 0  # unclamped: another object
    assert jnp.min(parts.dot(parts)) < 0
    assert jnp.min(parts.square_norm()) == 0
    exact = np.einsum("ngti,ngto->nio", *(np.asarray(v, float) for v in (both.a, both.delta)))
    assert relative(both.square_norm(), np.sum(exact**2, axis=(1, 2))) < 0.05  # written out


def test_a_square_norm_takes_as_much_care_as_it_needs(monkeypatch):
    """Nothing in common between positions, a mean that cancels, a large one that does; float32."""
    mean = np.array([0.0, 0, 0, 0, 0, 0, 10, 300])[:, None, None, None]
    a, d = (normal(len(mean), 1, 64, 16, seed=seed) for seed in (0, 1))
    a, d = np.float32(a + mean), np.float32(np.where(mean == 0, d, d - d.mean(2, keepdims=True)))
    place = jb.Place((16, 16), jnp.dtype("float32"))
    pair = jb.Outer(jnp.asarray(a), jnp.asarray(d), place)
    exact = np.sum(np.einsum("ngti,ngto->nio", a.astype(float), d.astype(float)) ** 2, (1, 2))
    assert relative(pair.square_norm("gram")[:7], exact[:7]) < 3e-7
    assert relative(pair.square_norm("gram")[7], exact[7]) < 3e-6
    nothing = jnp.full(len(mean), jnp.nan, "float32")
    monkeypatch.setattr(jb.Outer, "_written_out", lambda _: nothing)
    assert list(np.flatnonzero(np.isnan(pair.square_norm("gram")))) == [7]
    monkeypatch.setattr("jbackprop.factored.outer._inner", lambda *_: nothing)
    assert list(np.flatnonzero(np.isnan(pair.square_norm("gram")))) == [6, 7]


def test_gradients_are_written_out_only_where_that_is_cheaper(monkeypatch):
    for question in ("dot", "gram", "second_moment"):
        monkeypatch.setattr(jb.Factored, question, lambda *_: "written out")
    here, there = (dataclasses.replace(KINDS["outer"].place, path=p) for p in ("here", "there"))
    pair, other = (dataclasses.replace(KINDS["outer"], place=p) for p in (here, there))
    bias = KINDS["shift"]
    for answer in (pair.dot(other), pair.gram(other), pair.second_moment(), bias.dot(bias)):
        assert isinstance(answer, jax.Array)
    ones = lambda spec, *_: jnp.ones((1,) * len(spec.split("->")[1]))  # noqa: E731
    monkeypatch.setattr("jbackprop.factored.outer.einsum", ones)
    for t, s, i, o in itertools.product((1, 2, 3, 9), (1, 2, 3, 9), (1, 2, 3, 7), (1, 2, 3, 7)):
        place = jb.Place((i, o), jnp.dtype(float))
        one, two = (jb.Outer(np.ones((1, 1, n, i)), np.ones((1, 1, n, o)), place) for n in (t, s))
        dearer = t * s * (i + o) > (t + s) * i * o
        assert isinstance(one.dot(two), str) == dearer, (t, s, i, o)
