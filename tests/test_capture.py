"""Pairs from any program: each operation that is followed or that meets data, and what goes around.

The truth is `vmap(jax.grad)` of the same function. Runs on the oldest JAX and the newest, whose
programs are not the same.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from truth import relative, rows

import jbackprop as jb
from jbackprop import per_example as pe
from jbackprop.factored import is_factored

B = 3


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def kinds_of(factored):
    return [type(p).__name__ for p in jax.tree.leaves(factored, is_leaf=is_factored)]


def assert_exact(cost, params, *batch, captured=None, tolerance=1e-12):
    """Costs, each gradient, norms and a weighted sum; returns the kinds."""
    axes = (None, *(0 for _ in batch))
    n = len(jax.tree.leaves(batch)[0])
    weights = jnp.linspace(0.5, 2.0, n)
    seen = []

    @jax.jit
    def both(params, batch):
        due = jax.vmap(jax.value_and_grad(cost), axes)(params, *batch)
        costs, factored = (captured or jb.capture(cost))(params, *batch)
        seen.append(factored)
        answers = pe.gradients(factored), pe.norms(factored)
        return due, costs, answers, pe.weighted_gradient(factored, weights)

    (costs, each), ours, (found, norms), total = both(params, batch)
    assert relative(ours, costs) < tolerance
    assert jax.tree.structure(found) == jax.tree.structure(each)
    due = rows(each) if n else np.zeros((0, sum(v.size for v in jax.tree.leaves(params))))
    largest = np.max(np.abs(due), initial=0) or 1
    for truth, mine in zip(jax.tree.leaves(each), jax.tree.leaves(found), strict=True):
        assert mine.shape == truth.shape
        np.testing.assert_allclose(mine, truth, rtol=0, atol=tolerance * largest)
    np.testing.assert_allclose(norms, np.linalg.norm(due, axis=1), rtol=tolerance, atol=1e-300)
    by_weight = np.tensordot(weights, due, 1)
    np.testing.assert_allclose(
        np.concatenate([np.ravel(v) for v in jax.tree.leaves(total)]), by_weight,
        rtol=0, atol=tolerance * largest * n,
    )  # fmt: skip
    return kinds_of(seen[0])


def meets(move, shape):
    """The cost of W moved, then in a matmul with data and added to data."""

    def cost(params, x):
        w = move(params["w"])
        h = jnp.tanh(jnp.tensordot(x[: w.shape[0]], w, 1))
        return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.cos(w * x[: w.size].reshape(w.shape)))

    return cost, {"w": drawn(*shape)}


DATA = drawn(B, 64)
MOVES = {
    "transpose": (lambda w: w.T, (4, 3)),
    "transpose of three": (lambda w: w.transpose(2, 0, 1), (4, 3, 2)),
    "reshape": (lambda w: w.reshape(3, 4), (2, 6)),
    "reshape of a transpose": (lambda w: w.transpose(1, 0, 2).reshape(3, 8), (4, 3, 2)),
    "reshape with axes of length 1": (lambda w: w.reshape(1, 4, 1, 3).reshape(4, 3), (4, 3)),
    "squeeze": (lambda w: w[2], (4, 3)),
    "expand": (lambda w: w[:, None, :, None], (4, 3)),
    "broadcast": (lambda w: jnp.broadcast_to(w, (5, 4, 3)), (4, 3)),
    "broadcast of length 1": (lambda w: jnp.broadcast_to(w, (4, 5)), (4, 1)),
    "broadcast within, transposed": (
        lambda w: jnp.broadcast_to(w[:, None], (4, 2, 3)).transpose(2, 1, 0), (4, 3)
    ),
    "broadcast and reshape": (
        lambda w: jnp.broadcast_to(w[:, None], (4, 2, 3)).reshape(4, 2, 3, 1), (4, 3)
    ),
    "slice": (lambda w: w[1:3, :2], (4, 3)),
    "strided slice": (lambda w: w[::2, 1:], (5, 3)),
    "split": (lambda w: jnp.split(w, [1, 4], axis=0)[1], (6, 3)),
    "flip": (lambda w: w[::-1, ::-1], (4, 3)),
    "negative": (lambda w: -w, (4, 3)),
    "times a number": (lambda w: 0.25 * w / 3, (4, 3)),
    "times a number of no example": (lambda w: w * jnp.arange(3.0)[1] / jnp.float64(2), (4, 3)),
    "plus a constant": (lambda w: w + drawn(4, 3, seed=1), (4, 3)),
    "minus from a constant": (lambda w: 1.0 - w, (4, 3)),
    "twice": (lambda w: w + w, (4, 3)),
    "joined with its half": (lambda w: jnp.concatenate([w, w[:2] * 0.5]), (4, 3)),
    "joined along the other axis": (lambda w: jnp.concatenate([w[:, :1], w], 1).T, (4, 3)),
    "joined and cut within": (lambda w: jnp.concatenate([jnp.ones((2, 3)), w])[3:5], (4, 3)),
    "pad": (lambda w: jnp.pad(w, ((1, 0), (2, 1))), (4, 3)),
    "pad and flip and slice": (lambda w: jnp.pad(w, ((2, 1), (0, 0)))[::-1][1:6], (4, 3)),
    "stack": (lambda w: jnp.stack([w, 2 * w]), (4, 3)),
    "repeated": (lambda w: jnp.tile(w, (2, 1)), (3, 3)),
    "tile of length 1": (lambda w: jnp.tile(w, (4, 1)), (1, 3)),
    "nested call": (lambda w: jax.jit(lambda v: (v * 2.0).T)(w), (4, 3)),
    "checkpoint": (lambda w: jax.checkpoint(lambda v: v.T / jnp.arange(3.0)[2])(w), (4, 3)),
    "stopped beside": (lambda w: w + lax.stop_gradient(w), (4, 3)),
    "barrier": (lambda w: lax.optimization_barrier(w), (4, 3)),
}  # fmt: skip


@pytest.fixture
def any_rank():
    """As users have it: a vector may be added to a matrix."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", MOVES)
def test_moves_are_followed(name):
    cost, params = meets(*MOVES[name])
    old = jax.__version_info__ < (0, 8) and name in ("strided slice", "repeated")
    written = "Full" in str(jb.capture.explain(cost)(params, DATA))
    assert written == old  # there they are a gather of parts of rows, and a reshape
    assert_exact(cost, params, DATA)


def conv(x, w, **options):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, **{
        "window_strides": (1, 1), "padding": "SAME", "dimension_numbers": dims, **options
    })  # fmt: skip


def gathered(mode):
    ids = jnp.array([0, 4, 2, 4, -1, 7])  # some out of range
    return lambda w, x: w.at[ids].get(mode=mode, fill_value=0) * x[:18].reshape(6, 3)


IMAGES = (4, 4, 2)  # of 64 numbers, 32 are used
OPERATIONS = {
    "matrix times vector": (lambda w, x: w @ x[:3], (4, 3), "Outer"),
    "positions": (lambda w, x: x[:12].reshape(4, 3) @ w, (3, 2), "Outer"),
    "einsum, two axes contracted": (
        lambda w, x: jnp.einsum("ths,hsd->td", x[:24].reshape(4, 3, 2), w), (3, 2, 5), "Outer"
    ),
    "groups": (lambda w, x: jnp.einsum("gti,gio->tgo", x[:24].reshape(2, 4, 3), w), (2, 3, 2), "Outer"),
    "groups, on the left": (
        lambda w, x: jnp.einsum("oig,git->tog", w, x[:24].reshape(2, 3, 4)), (2, 3, 2), "Outer"
    ),
    "repeated over a batch axis": (
        lambda w, x: lax.dot_general(
            jnp.broadcast_to(w, (4, 2, 3)), x[:24].reshape(4, 3, 2), (((2,), (1,)), ((0,), (0,)))
        ), (2, 3), "Outer",
    ),
    "repeated along what is contracted": (
        lambda w, x: jnp.broadcast_to(w[:, None], (2, 3)) @ x[:6].reshape(3, 2), (2,), "Outer"
    ),
    "its own transpose": (lambda w, x: w.T @ jnp.tanh(w @ x[:3]), (4, 3), "Outer"),
    "times itself": (lambda w, x: (w @ w) @ x[:3], (3, 3), "Outer"),
    "inner product": (lambda w, x: jnp.dot(w, x[:4]), (4,), "Outer"),
    "convolution": (lambda w, x: conv(x[:32].reshape(1, *IMAGES), w), (3, 3, 2, 3), "Patches"),
    "strides, dilation, padding": (
        lambda w, x: conv(
            x[:32].reshape(1, *IMAGES), w, window_strides=(2, 1), rhs_dilation=(1, 2),
            padding=((1, 2), (0, 3)), lhs_dilation=(2, 1),
        ), (2, 2, 2, 3), "Patches",
    ),
    "groups of channels, several images": (
        lambda w, x: conv(x[:64].reshape(2, 4, 4, 2), w, feature_group_count=2), (3, 3, 1, 4), "Patches"
    ),
    "other orders of axes": (
        lambda w, x: conv(
            x[:32].reshape(2, 1, 4, 4), w.transpose(1, 0, 3, 2), dimension_numbers=("CNHW", "OIWH", "NHWC")
        ), (2, 3, 3, 2), "Patches",
    ),
    "added": (lambda w, x: x[:12].reshape(4, 3) + w, (3,), "Shift"),
    "subtracted": (lambda w, x: jnp.sin(x[:12].reshape(4, 3) - w), (3,), "Shift"),
    "added, with axes of length 1": (lambda w, x: lax.add(x[:12].reshape(4, 3), w.reshape(1, 3)), (3,), "Shift"),
    "a number added": (lambda w, x: x[:4] + w, (), "Shift"),
    "multiplied": (lambda w, x: x[:12].reshape(4, 3) * w, (3,), "Scale"),
    "divided": (lambda w, x: w / (2 + jnp.square(x[:12].reshape(4, 3))), (3,), "Scale"),
    "a number times": (lambda w, x: w * x[:4], (), "Scale"),
    "two parameters": (lambda w, x: (w[0] * x[:3]) * w[1], (2, 3), "Sum"),
    "joined with data": (lambda w, x: jnp.concatenate([x[:6].reshape(2, 3), w]), (2, 3), "Shift"),
    "rows": (lambda w, x: w[jnp.array([0, 4, 2, 4])] * x[:12].reshape(4, 3), (5, 3), "Lookup"),
    "columns": (lambda w, x: w[:, jnp.array([1, 1, 0])] * x[:15].reshape(5, 3), (5, 3), "Lookup"),
    "rows, mapped": (
        lambda w, x: jax.vmap(lambda k: w[k])(jnp.array([0, 4, 4])) * x[:9].reshape(3, 3), (5, 3), "Lookup"
    ),
    "columns, mapped": (
        lambda w, x: jax.vmap(lambda k: w[:, k])(jnp.array([2, 0, 2])) * x[:15].reshape(3, 5), (5, 3), "Lookup"
    ),
    "out of range, filled": (gathered("fill"), (5, 3), "Lookup"),
    "out of range, clipped": (gathered("clip"), (5, 3), "Lookup"),
    "of the data": (lambda w, x: w[jnp.argsort(x[:4])] * x[:12].reshape(4, 3), (5, 3), "Lookup"),
    "a window": (
        lambda w, x: lax.dynamic_slice_in_dim(w, jnp.argmax(x[:6]) + 1, 2) * x[:6].reshape(2, 3),
        (5, 3), "Lookup",
    ),
    "taken from each group": (
        lambda w, x: jnp.take_along_axis(w, jnp.array([[0, 1], [4, 4], [2, 0]]), 1) * x[:6].reshape(3, 2),
        (3, 5), "Lookup",
    ),
    "a complex product": (
        lambda w, x: (w.astype(complex) @ lax.complex(x[:3], x[3:6])).imag, (4, 3), "Full"
    ),
    "repeated and merged": (
        lambda w, x: jnp.broadcast_to(w[:, None], (4, 2, 3)).reshape(8, 3) @ x[:3], (4, 3), "Full"
    ),
    "a square": (lambda w, x: jnp.sum(w**2) + x[0], (4, 3), "Full"),
    "a norm": (lambda w, x: jnp.linalg.norm(w) * x[0], (4, 3), "Full"),
    "a mask of constants": (lambda w, x: (w * jnp.tri(4, 3, dtype="float64")) @ x[:3], (4, 3), "Full"),
    "a branch": (
        lambda w, x: lax.cond(x[0] > 0, lambda w: w @ x[:3], lambda w: w[:, 0] * 2, w), (4, 3), "Full"
    ),
    "a rule of its own": (lambda w, x: jax.nn.relu(w) @ x[:3], (4, 3), "Full"),
    "a mask": (lambda w, x: jnp.where(jnp.tri(4, 3, dtype=bool), w, 0) @ x[:3], (4, 3), "Full"),
    "what has no slope": (lambda w, x: x[jnp.argmax(w)] * jnp.sign(w[0]), (4,), "Nothing"),
    "not used": (lambda w, x: x, (4, 3), "Nothing"),
}  # fmt: skip


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_pairs(name):
    """Each alone, and once more beside a use of another kind: with the cross terms."""
    use, shape, kind = OPERATIONS[name]
    x = drawn(B, 64, seed=5)

    def cost(params, x):
        return jnp.sum(jnp.sin(use(params["w"], x)))

    def twice(params, x):
        return cost(params, x) + jnp.sum(jnp.cos(params["w"].reshape(-1)[:, None] * x[:2]))

    params = {"w": drawn(*shape)}
    assert assert_exact(cost, params, x) == [kind]
    assert_exact(twice, params, x)


def test_a_net_input_that_is_read_twice_has_a_delta_of_its_own():
    """That of its sum with the bias is not its own."""

    def cost(params, x):
        z = x @ params["w"]
        return jnp.sum(jnp.sin(z + params["b"])) + jnp.sum(jnp.square(z))

    kinds = assert_exact(cost, {"w": drawn(4, 3), "b": drawn(3)}, drawn(B, 4))
    assert kinds == ["Shift", "Outer"]


def layer(h, w):
    return jnp.tanh(h @ w["a"] + w["b"])


def stack(params, x):
    """Scanned weights, redone, with the scale of all."""

    @jax.checkpoint
    def block(h, w):
        return h + layer(h, w) @ (w["c"] / 2.0), h

    return lax.scan(block, x @ params["i"], params["w"])


def of_stack(params, x):
    h, hs = stack(params, x)
    return jnp.sum(jnp.sin(h)) + jnp.sum(jnp.square(hs @ params["i"].T))


STACK = {
    "w": {"a": drawn(3, 4, 5), "b": drawn(3, 5), "c": drawn(3, 5, 4)},
    "i": drawn(4, 4),
}


def time(params, x):
    """Weights that stay the same in a scan, with a stack of layers in every turn."""

    def turn(h, x):
        h, _ = lax.scan(lambda h, w: (layer(h, w), None), h, params["w"])
        return h * params["s"] + x, h

    h, hs = lax.scan(turn, jnp.zeros(4), x, reverse=True, unroll=2)
    return jnp.sum(h) + jnp.sum(jnp.sin(hs @ params["w"]["a"][0]))


TIME = {"w": {"a": drawn(2, 4, 4), "b": drawn(2, 4)}, "s": drawn(4)}


def layers_over_time(params, x):
    """Scanned layers, in each of them a scan over time with that layer's weights."""

    def one(xs, w):
        _, hs = lax.scan(lambda h, x: ((h := layer(h + x, w)), h), jnp.zeros(4), xs)
        return hs, None

    return jnp.sum(lax.scan(one, x, params)[0] ** 2)


def along_the_other_axis(params, x):
    w = jnp.moveaxis(params["w"], 1, 0)
    return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(w[::-1] @ h), None), x[0], w)[0])


def handed_through(params, x):
    """A carry that is a parameter and stays it, and weights given back by a scan."""

    def turn(carry, v):
        h, w = carry
        return (jnp.tanh(h @ w + v), w), (w, v)

    (h, w), (many, vs) = lax.scan(turn, (x[0], params["w"]), params["v"])
    return jnp.sum(h @ w) + jnp.sum(x[1] @ many) + jnp.sum(vs @ x[0])


def learned_start(params, x):
    """A carry that begins as a parameter, and one that is written out in a scan."""

    def turn(h, x):
        return jnp.tanh(h * jnp.exp(params["g"]) + x @ params["w"]), None

    return jnp.sum(lax.scan(turn, params["h"], x)[0])


SCANS = {
    "stack": (of_stack, STACK, (B, 4), {"Outer", "Shift"}),
    "time": (time, TIME, (B, 5, 4), {"Shift", "Scale", "Sum"}),
    "layers over time": (
        layers_over_time, {"a": drawn(3, 4, 4), "b": drawn(3, 4)}, (B, 5, 4), {"Outer", "Shift"}
    ),
    "the other axis": (along_the_other_axis, {"w": drawn(4, 3, 4)}, (B, 2, 4), {"Outer"}),
    "handed through": (
        handed_through, {"w": drawn(4, 4), "v": drawn(3, 4)}, (B, 2, 4), {"Outer", "Sum"}
    ),
    "learned start": (
        learned_start, {"g": drawn(4), "w": drawn(4, 4), "h": drawn(4)}, (B, 3, 4), {"Full", "Outer"}
    ),
    "one turn": (of_stack, jax.tree.map(lambda v: v[:1] if v.ndim > 1 and len(v) == 3 else v, STACK), (B, 4), None),
    "ensemble": (
        lambda p, x: jnp.sum(jnp.sin(jax.vmap(layer, (None, 0))(x, p))),
        {"a": drawn(3, 4, 5), "b": drawn(3, 5)}, (B, 4), {"Outer", "Shift"},
    ),
    "ensembles in a stack": (
        lambda p, x: jnp.sum(jnp.sin(
            lax.scan(lambda h, w: (jax.vmap(layer)(h, w), None), jnp.stack([x, 2 * x]), p)[0])),
        {"a": drawn(3, 2, 4, 4), "b": drawn(3, 2, 4)}, (B, 4), {"Outer", "Shift"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCANS)
def test_scans(name):
    cost, params, shape, kinds = SCANS[name]
    found = assert_exact(cost, params, drawn(*shape, seed=1))
    assert kinds is None or set(found) == kinds


def answers(source, params, size):
    """All that is asked of pairs, with every copy by itself and in microbatches."""
    return {
        "norms": pe.norms(source, microbatch=size),
        "layers": pe.norms(source, per_layer=True, microbatch=size),
        "clipped": pe.clipped_gradient(source, 0.5, microbatch=size),
        "by layer": pe.clipped_gradient(source, 0.5, "per_layer", microbatch=size),
        "moments": pe.variance(source, microbatch=size),
        "along": pe.project(source, jax.tree.map(jnp.cos, params), microbatch=size),
    }


@pytest.mark.parametrize("name", ["stack", "time", "layers over time", "the other axis"])
def test_deferred_is_the_same(name):
    """Contracted where the pairs are born, or not."""
    cost, params, shape, _ = SCANS[name]
    x = drawn(*shape, seed=1)
    size = 2 if name == "stack" else None

    @jax.jit
    def both(params, x):
        kept = jb.capture(cost)(params, x)[1]
        later = jb.capture.deferred(cost)(params, x)
        return answers(kept, params, None), answers(later, params, size)

    kept, later = both(params, x)
    assert jax.tree.structure(kept) == jax.tree.structure(later)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13), later, kept)


def test_deferred_pairs_meet_and_are_written_out():
    params, x = {"w": drawn(2, 4, 4)}, drawn(B, 4)

    def cost(params, x):
        return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, params["w"])[0])

    later, each = (
        jb.capture.deferred(cost)(params, x),
        jax.jit(jax.vmap(jax.grad(cost), (None, 0)))(params, x),
    )
    np.testing.assert_allclose(pe.gram(later), rows(each) @ rows(each).T, rtol=1e-12)
    np.testing.assert_allclose(pe.gradients(later, microbatch=2)["w"], each["w"], rtol=1e-12)
    chunks = [chunk["w"] for chunk in pe.gradient_chunks(later, 2)]
    np.testing.assert_allclose(jnp.concatenate(chunks), each["w"], rtol=1e-12)
    once = pe.clipped_gradient(later, 0.5, method="materialise", microbatch=2)
    np.testing.assert_allclose(once.norms, np.linalg.norm(rows(each), axis=1), rtol=1e-12)
    kept = jb.capture(cost)(params, x)[1]
    np.testing.assert_allclose(jb.gradient(kept)["w"], np.mean(each["w"], axis=0), rtol=1e-12)
    with pytest.raises(TypeError, match="gram_between needs the pairs of both"):
        pe.gram_between(later, kept)
    with pytest.raises(ValueError, match="gram compares every example with every other"):
        pe.gram(later, microbatch=2)


def test_what_is_collected_may_close_over_what_is_traced():
    """Weights of a jitted function, inside a scan; what is asked of each copy is stacked."""
    x = drawn(B, 4, seed=1)

    @jax.jit
    def ask(weights):
        def collect(pair):
            return {"sum": pair.total(weights), "norms": pair.square_norm(), "none": ()}

        return jb.capture(of_stack, collect=collect)(STACK, x)[1]

    weights = jnp.arange(3.0)
    kept = jb.capture(of_stack)(STACK, x)[1]
    found = ask(weights)
    assert found["w"]["a"]["norms"].shape == (3, B)  # copies in front
    np.testing.assert_allclose(
        found["w"]["a"]["norms"].sum(0), kept["w"]["a"].square_norm(), rtol=1e-12
    )
    np.testing.assert_allclose(found["w"]["a"]["sum"], kept["w"]["a"].total(weights), rtol=1e-12)
    np.testing.assert_allclose(found["i"]["norms"], kept["i"].square_norm(), rtol=1e-12)


def test_parameters_side_by_side_of_which_some_are_scanned_are_layers_of_their_own():
    def cost(params, x):
        return jnp.sum(
            lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x + params["b"], params["w"])[0]
        )

    params, x = {"w": drawn(3, 4, 4), "b": drawn(4)}, drawn(B, 4)
    layers = pe.norms(jb.capture(cost)(params, x)[1], per_layer=True)
    assert list(layers) == ["['b']", "['w'][0]", "['w'][1]", "['w'][2]"]
    each = jax.jit(jax.vmap(jax.grad(cost), (None, 0)))(params, x)
    np.testing.assert_allclose(layers["['w'][1]"], np.linalg.norm(each["w"][:, 1], axis=(1, 2)))
    np.testing.assert_allclose(layers["['b']"], np.linalg.norm(each["b"], axis=1))


def test_under_every_transformation():
    """jit, scan, vmap over parameters, forward mode, and closures over what is traced."""
    x, w = drawn(2, B, 4, seed=1), drawn(3, 4, 4)

    def cost(s, params, x):
        return s * jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0])

    def norms(s, w, x):
        return pe.norms(jb.capture(functools.partial(cost, s))(w, x)[1])

    def squares(s, w, x):
        capture = jb.capture(functools.partial(cost, s), collect=lambda pair: pair.square_norm())
        return jnp.sum(capture(w, x)[1], axis=0)

    each = jax.jit(jax.vmap(jax.grad(functools.partial(cost, 1.0)), (None, 0)))(w, x[0])
    alone = np.linalg.norm(each.reshape(B, -1), axis=1)
    for ask, due in ((norms, alone), (squares, alone**2)):
        close = functools.partial(np.testing.assert_allclose, desired=due, rtol=1e-12)
        close(jax.jit(ask)(1.0, w, x[0]))
        close(jax.jit(jax.vmap(ask, (None, 0, None)))(1.0, jnp.stack([w, 2 * w]), x[0])[0])
        close(jax.jit(lambda x, ask=ask: lax.map(lambda x: ask(1.0, w, x), x))(x)[0])
    np.testing.assert_allclose(norms(1.0, w, x[0]), alone, rtol=1e-12)
    value, slope = jax.jit(lambda s: jax.jvp(lambda s: norms(s, w, x[0]), (s,), (1.0,)))(2.0)
    np.testing.assert_allclose(value, 2 * alone, rtol=1e-12)
    np.testing.assert_allclose(slope, alone, rtol=1e-12)

    def by_hand(w):
        each = jax.vmap(jax.grad(functools.partial(cost, 1.0)), (None, 0))(w, x[0])
        return jnp.sum(jnp.square(each), axis=(1, 2, 3))

    due = jax.jit(jax.jacrev(by_hand))(w)
    for ask in (lambda w: jnp.square(norms(1.0, w, x[0])), lambda w: squares(1.0, w, x[0])):
        np.testing.assert_allclose(jax.jit(jax.jacrev(ask))(w), due, rtol=1e-10)
    with jax.disable_jit():
        np.testing.assert_allclose(norms(1.0, w, x[0]), alone, rtol=1e-12)


def test_what_comes_with_the_cost_and_trees_of_data():
    def cost(params, example, key):
        keep = jax.random.bernoulli(key, 0.5, (4,))
        h = jnp.where(keep, example["x"] @ params, 0)
        return jnp.sum(h**2), {"h": h, "w": params}

    keys = jax.random.split(jax.random.key(0), B)
    data, params = {"x": drawn(B, 4)}, drawn(4, 4)
    (costs, aux), pair = jb.capture(cost, has_aux=True)(params, data, keys)
    assert aux["h"].shape == (B, 4)
    assert aux["w"].shape == (B, 4, 4)
    each = jax.jit(jax.vmap(jax.grad(lambda *a: cost(*a)[0]), (None, 0, 0)))(params, data, keys)
    np.testing.assert_allclose(pair.each(), each, rtol=1e-12)
    np.testing.assert_allclose(costs, np.sum(np.square(aux["h"]), axis=1), rtol=1e-12)
    later = jb.capture.deferred(cost, has_aux=True)(params, data, keys)
    np.testing.assert_allclose(pe.norms(later, microbatch=2), np.linalg.norm(each, axis=(1, 2)))


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_none_and_of_one(n):
    assert_exact(of_stack, STACK, drawn(n, 4))
    assert pe.norms(jb.capture.deferred(of_stack)(STACK, drawn(n, 4))).shape == (n,)


def test_one_examples_nan_is_its_own():
    x = drawn(B, 4).at[1].set(jnp.nan)
    found = pe.norms(jb.capture(of_stack)(STACK, x)[1])
    clean = pe.norms(jb.capture(of_stack)(STACK, drawn(B, 4))[1])
    assert np.isnan(found[1])
    np.testing.assert_array_equal(found[jnp.array([0, 2])], clean[jnp.array([0, 2])])


def test_in_16_bits_and_mixed():
    """Against the gradient in the same dtypes, whose sums are rounded to 8 bits."""

    def cost(params, x):
        h = jnp.tanh(x.astype("bfloat16") @ params["w"].astype("bfloat16") + params["b"][None])
        return jnp.sum(h.astype("float32") ** 2)

    params = {"w": drawn(4, 5).astype("float32"), "b": drawn(5).astype("bfloat16")}
    costs, found = jb.capture(cost)(params, drawn(B, 6, 4).astype("float32"))
    each = jax.jit(jax.vmap(jax.grad(cost), (None, 0)))(params, drawn(B, 6, 4).astype("float32"))
    assert costs.dtype == jnp.float32
    for pair, due in zip(
        jax.tree.leaves(found, is_leaf=is_factored), jax.tree.leaves(each), strict=True
    ):
        assert relative(pair.each(), due) < 0.02
        assert pair.home.dtype == due.dtype
    assert jb.gradient(found)["b"].dtype == jnp.bfloat16


def test_explained():
    def cost(params, x):
        e = (params["table"][jnp.array([0, 1, 1])] + x[None]) * params["scale"][None]
        h = jnp.tanh(e @ params["a"] + params["b"][None]) + jnp.sum(params["b"] ** 2)
        return jnp.sum(h @ params["a"].T @ x) + jnp.sum(params["table"] @ x)

    params = {
        "a": drawn(4, 5), "b": drawn(5), "table": drawn(6, 4), "scale": drawn(4), "left": drawn(2)
    }  # fmt: skip
    explained = jb.capture.explain(cost)(params, jax.ShapeDtypeStruct((B, 4), "float64"))
    rows = {row.path: row for row in explained.rows}
    a = rows["params['a']"]
    assert (a.kind, a.uses, a.groups, a.positions, a.dense) == ("Outer", 2, 1, 6, False)
    assert a.numbers == 6 * (4 + 5)
    assert rows["params['table']"].kind == "Lookup + Outer"
    assert rows["params['b']"].kind == "Shift + Full"
    assert rows["params['left']"].why == "it is not used: its gradient is 0"
    assert [row.path for row in explained.fallbacks] == ["params['b']"]
    assert "integer_pow" in rows["params['b']"].why or "square" in rows["params['b']"].why
    assert "3 gradients of 5 numbers" in str(explained)
    scanned = {row.path: row for row in jb.capture.explain(of_stack)(STACK, DATA[:, :4]).rows}
    assert scanned["params['w']['a']"].at_birth
    assert scanned["params['w']['a']"].groups == 3
    assert not scanned["params['i']"].at_birth
    masked = jb.capture.explain(lambda w, x: jnp.sum((w * jnp.tri(4, dtype="float64")) @ x))(
        drawn(4, 4), drawn(B, 4)
    )
    assert masked.rows[0].dense


def test_the_model_is_traced_once():
    counts = []

    def cost(params, x):
        counts.append(1)
        return of_stack(params, x)

    ask = jax.jit(lambda p, x: pe.clipped_gradient(jb.capture(cost)(p, x)[1], 1.0))
    ask(STACK, drawn(B, 4))
    ask(STACK, drawn(B, 4, seed=3))
    assert len(counts) == 1


def test_names_and_contexts_survive():
    def cost(params, x):
        with jax.named_scope("encoder"):
            h = jax.jit(lambda v: jnp.tanh(v), inline=False)(x @ params["i"])
        with jax.named_scope("loss"), jax.default_matmul_precision("highest"):
            return jnp.sum(h @ params["i"])

    lowered = jax.jit(jb.capture(cost)).lower({"i": drawn(4, 4)}, drawn(B, 4))
    text = lowered.as_text(debug_info=True)
    assert "encoder" in text
    assert "loss" in text
    assert "HIGHEST" in text


BAD = {
    "no function": (lambda: jb.capture(3)(1.0, DATA), TypeError, "cost must be a function"),
    "integers": (
        lambda: jb.capture(of_stack)({"w": jnp.arange(3)}, DATA), TypeError,
        r"params\['w'\] has the dtype int",
    ),
    "no arrays": (
        lambda: jb.capture(of_stack)({"f": jnp.tanh}, DATA), TypeError, r"params\['f'\] is .*eqx.partition"
    ),
    "complex": (
        lambda: jb.capture(of_stack)(jnp.ones(3, complex), DATA), TypeError, "params has the dtype complex"
    ),
    "a vector": (
        lambda: jb.capture(lambda p, x: p * x)(1.0, DATA), TypeError, r"not float64\[64\]\. A cost of a whole"
    ),
    "a batch of one": (
        lambda: jb.capture(lambda p, x: p * x[:1])(1.0, DATA), TypeError, r"take \[0\] of what the batched"
    ),
    "a pair": (
        lambda: jb.capture(lambda p, x: (p * x[0], x))(1.0, DATA), TypeError, "say has_aux=True"
    ),
    "no pair": (
        lambda: jb.capture(lambda p, x: p * x[0], has_aux=True)(1.0, DATA), TypeError, r"must give \(cost, aux\)"
    ),
    "an integer": (
        lambda: jb.capture(lambda p, x: jnp.argmax(x))(1.0, DATA), TypeError, "not int"
    ),
    "lengths": (
        lambda: jb.capture(of_stack)(STACK, DATA, DATA[:2]), ValueError, r"batch\[0\]: 3, batch\[1\]: 2"
    ),
    "no axis": (
        lambda: jb.capture(of_stack)(STACK, jnp.ones(())), ValueError, r"batch\[0\] has no axis of examples"
    ),
    "no batch": (lambda: jb.capture(of_stack)(STACK), ValueError, "found no arrays"),
    "coupled": (
        lambda: jb.capture(lambda p, x: jnp.sum(lax.pmean(p * x, "batch")))(1.0, DATA), ValueError,
        "reduces over an axis of examples.*batch norm.*inference",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_errors_of_the_model_say_what_it_was_given():
    with pytest.raises(TypeError) as caught:
        jb.capture(lambda p, x: jnp.sum(conv(x, p)))(drawn(3, 3, 2, 1), drawn(B, 4, 4, 2))
    notes = "".join(caught.value.__notes__)
    assert "If the model wants that axis, wrap it: give it x[None]" in notes
    assert "float64[4, 4, 2]" in notes
    with pytest.raises(TypeError, match=r"capture gives \(costs, factored\)"):
        jb.gradient(jb.capture(of_stack)(STACK, drawn(B, 4)))
    with pytest.raises(TypeError, match=r"capture gives \(costs, factored\)"):
        pe.norms(jb.capture(of_stack)(STACK, drawn(B, 4)))


DEEP = {
    "w": {"a": drawn(24, 32, 64), "b": drawn(24, 64), "c": drawn(24, 64, 32)},
    "i": drawn(32, 32),
}


def deep(params, x):
    """Blocks over positions, scanned and redone."""
    return jnp.sum(jnp.sin(stack(params, x)[0]))


def memory(f, *args):
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.as_shipped
@pytest.mark.newest
@pytest.mark.usefixtures("any_rank")
def test_what_is_scanned_and_redone_keeps_its_memory():
    params, x = jax.tree.map(lambda v: v.astype("float32"), (DEEP, drawn(16, 24, 32)))
    plain = memory(jax.grad(lambda p: jnp.mean(jax.vmap(deep, (None, 0))(p, x))), params)
    squares = jb.capture(deep, collect=lambda pair: pair.square_norm())
    assert memory(lambda p: squares(p, x), params) < 1.5 * plain
    later = jb.capture.deferred(deep)
    assert memory(lambda p: pe.clipped_gradient(later(p, x), 1.0), params) < 1.5 * plain
    assert memory(lambda p: pe.norms(jb.capture(deep)(p, x)[1]), params) > 2 * plain
    text = jax.jit(lambda p: pe.norms(later(p, x))).lower(params).as_text()
    assert not re.search(r"tensor<24x16x24x64x\w*>|tensor<16x24x24x64x", text)  # no pair is stacked


def scan_of(f, h, w):
    return lax.scan(lambda h, w: (f(h, w), None), h, w)[0]


def matmul(h, w):
    return jnp.tanh(w @ h)


UNEVEN = {
    "turned inside": lambda p, x: jnp.sum(
        scan_of(lambda h, w: scan_of(matmul, h, jnp.swapaxes(w, 0, 1)), x, p) ** 2
    ),
    "twice inside": lambda p, x: jnp.sum(
        scan_of(lambda h, w: scan_of(matmul, scan_of(matmul, h, w), w), x, p) ** 2
    ),
    "inside and at once": lambda p, x: jnp.sum(
        scan_of(lambda h, w: scan_of(matmul, h, w) + w[0] @ x, x, p) ** 2
    ),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_copies_are_the_same_to_all(name):
    """What is scanned twice, but not in all its uses: the same norms and bounds by layer."""
    cost, params, x = UNEVEN[name], drawn(2, 3, 3, 3), drawn(B, 3)
    assert_exact(cost, params, x)

    @jax.jit
    def both(params, x):
        kept, later = jb.capture(cost)(params, x)[1], jb.capture.deferred(cost)(params, x)
        sources = (kept, later)
        return [
            (pe.norms(s, per_layer=True), pe.clipped_gradient(s, 0.1, "per_layer")) for s in sources
        ]

    kept, later = both(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11), later, kept)
    one = pe.clipped_gradient(jb.capture.deferred(cost)(params, x[:1]), 0.1, "per_layer")
    assert np.linalg.norm(one.gradient) <= 0.1


TWO_FORMS = {
    "dot and outer product": (
        lambda p, x: jnp.dot(p, x) ** 2 + jnp.sum(jnp.sin(jnp.outer(x[:2], p))), (4,)
    ),
    "groups and none": (
        lambda p, x: jnp.sum(jnp.sin(jnp.einsum("bio,bi->bo", p, x.reshape(2, 2))))
        + jnp.sum(jnp.cos(jnp.einsum("bio,bi->o", p, x.reshape(2, 2)))), (2, 2, 4),
    ),
    "a row, and one of each row": (
        lambda p, x: jnp.sum(p[jnp.argmax(x[:2])] ** 2 * x[0])
        + jnp.sum(jax.vmap(lambda r, k: r[k])(p, jnp.argsort(x[:2])) * x[1]), (2, 3),
    ),
    "flipped in a scan and outside": (
        lambda p, x: scan_of(lambda h, w: h + jnp.sum(jnp.sin(w * x[0])), 0.0, p[::-1])
        + jnp.sum(jnp.sin(p[::-1] * x[1])), (3, 4),
    ),
    "one column": (
        lambda p, x: jnp.sum(jnp.sin(x @ p)) + jnp.sum(jnp.einsum("io,t->tio", p, x) ** 2), (4, 1)
    ),
}  # fmt: skip


@pytest.mark.usefixtures("any_rank")
@pytest.mark.parametrize("name", TWO_FORMS)
def test_two_forms_of_one_parameter(name):
    cost, shape = TWO_FORMS[name]
    assert_exact(cost, drawn(*shape), drawn(B, 4))


def test_rows_by_indices_of_8_bits():
    """They cannot hold the number of rows; nor does jax.grad always get these right: by hand."""
    table = drawn(300, 2)
    looks = {
        "int8": lambda p, i: jnp.take(p, i, axis=0, mode="clip"),
        "uint8": lambda p, i: lax.dynamic_index_in_dim(p, i[0]),
    }
    for dtype, ids, read in (
        ("int8", [[1, 2], [100, -3]], [[1, 2], [100, 0]]),
        ("uint8", [[250], [255]], [[250], [255]]),
    ):
        found = jb.capture(lambda p, i, look=looks[dtype]: jnp.sum(look(p, i) ** 2))(
            table, jnp.array(ids, dtype)
        )[1]
        due = np.zeros((2, 300, 2))
        for n, own in enumerate(read):
            due[n, own] = 2 * table[jnp.array(own)]
        np.testing.assert_allclose(found.each(), due, rtol=1e-12)


def test_a_weight_that_is_scaled_before_it_is_cast():
    """In 16 bits neither the factor nor its product with the delta need have a place."""
    w, x = drawn(3, 4).astype("float32"), drawn(2, 4).astype("float32")
    for factor in (1e-8, 1e6, 1 / 192**0.5):

        def cost(p, x, factor=factor):
            z = (p * jnp.float32(factor)).astype("float16") @ x.astype("float16")
            return jnp.sum(z.astype("float32"))

        found = jb.capture(cost)(w, x)[1].each()
        due = factor * np.broadcast_to(x.astype("float16")[:, None], (2, 3, 4)).astype("float64")
        assert relative(found, due) < 1e-6


def test_numbers_without_a_dtype_promote_as_ever():
    def cost(p, x):
        return jnp.sum(x * p["s"])

    x = drawn(B, 4).astype("bfloat16")
    costs, found = jb.capture(cost)({"s": 0.3}, x)
    assert costs.dtype == jnp.bfloat16
    each = jax.jit(jax.vmap(jax.grad(cost), (None, 0)))({"s": 0.3}, x)
    assert relative(found["s"].each(), each["s"]) < 0.01


def test_arrays_without_entries():
    def cost(p, x):
        wide = x @ p["none"]
        joined = jnp.concatenate([p["empty"], p["b"]])
        return (
            jnp.sum(wide) + jnp.sum(jnp.sin(joined * x)) + jnp.sum(scan_of(matmul, x, p["turns"]))
        )

    params = {
        "none": drawn(4, 0), "empty": drawn(0), "b": drawn(4), "turns": drawn(0, 4, 4)
    }  # fmt: skip
    assert_exact(cost, params, drawn(B, 4))
    assert pe.norms(jb.capture.deferred(cost)(params, drawn(B, 4))).shape == (B,)


def test_integers_times_weights():
    def cost(p, x):
        z = lax.dot_general(x, p, (((0,), (0,)), ((), ())), preferred_element_type="float32")
        return jnp.sum(jnp.sin(z))

    w, x = drawn(4, 3).astype("float32"), jnp.arange(8, dtype="int8").reshape(2, 4)
    each = jax.jit(jax.vmap(jax.grad(cost), (None, 0)))(w, x)
    np.testing.assert_allclose(jb.capture(cost)(w, x)[1].each(), each, rtol=1e-6)


def test_what_is_collected_is_floating():
    collect = jb.capture(of_stack, collect=lambda pair: pair.square_norm() > 1)
    with pytest.raises(TypeError, match=r"of params\['.*it gave bool"):
        collect(STACK, drawn(B, 4))


def test_explain_refuses_what_capture_refuses():
    params = {"w": jax.ShapeDtypeStruct((3,), "int32")}
    with pytest.raises(TypeError, match=r"params\['w'\] has the dtype int32"):
        jb.capture.explain(of_stack)(params, DATA)
