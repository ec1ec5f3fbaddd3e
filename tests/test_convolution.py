"""Convolutions, pooling and shapes against forwards written anew, PyTorch, and their own words."""

import itertools
import math
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from truth import assert_close, mean_cost, relative

import jbackprop as jb
from jbackprop import sweep
from jbackprop.factored import Geometry, Patches, Place, Sum

pytestmark = pytest.mark.newest
TORCH = np.load(Path(__file__).parent / "torch_truth" / "convolution.npz")


def steps(value, axes):
    return value if isinstance(value, tuple) else (value,) * axes


def explicit(padding, size, reach, stride):
    if padding == "VALID":
        return [(0, 0)] * len(size)
    if padding != "SAME":
        return padding
    total = [
        max((math.ceil(n / s) - 1) * s + r - n, 0)
        for n, r, s in zip(size, reach, stride, strict=True)
    ]
    return [(p // 2, p - p // 2) for p in total]


def correlation(layer, w, x):
    """z_t = sum_k x_{ts + kd - p} w_k, place by place of the kernel and group by group."""
    axes = len(layer.kernel)
    stride, dilation = steps(layer.stride, axes), steps(layer.dilation, axes)
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel, dilation, strict=True)]
    padding = explicit(layer.padding, x.shape[1:-1], reach, stride)
    x = lax.pad(x, 0.0, [(low, high, 0) for low, high in [(0, 0), *padding, (0, 0)]])
    outputs = [(n - r) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, stride, strict=True)]
    z = 0.0
    for k in itertools.product(*map(range, layer.kernel)):
        rows = [
            slice(i * d, i * d + (t - 1) * s + 1, s)
            for i, d, t, s in zip(k, dilation, outputs, stride, strict=True)
        ]
        seen = jnp.split(x[(slice(None), *rows)], layer.groups, -1)
        parts = jnp.split(w[k], layer.groups, -1)
        z = z + jnp.concatenate([a @ b for a, b in zip(seen, parts, strict=True)], -1)
    return z


def laid_out(layer, w, x):
    """z_{us + kd - p} += x_u w_k: every entry of x, through the kernel, on a wide canvas."""
    axes = len(layer.kernel)
    stride, dilation = steps(layer.stride, axes), steps(layer.dilation, axes)
    size = x.shape[1:-1]
    reach = [(k - 1) * d + 1 for k, d in zip(layer.kernel, dilation, strict=True)]
    wide = [n * s for n, s in zip(size, stride, strict=True)]
    cut = explicit(layer.padding, wide, reach, stride)
    full = [(n - 1) * s + max(r, s) for n, s, r in zip(size, stride, reach, strict=True)]
    z = jnp.zeros((len(x), *full, layer.c_out), x.dtype)
    for k in itertools.product(*map(range, layer.kernel)):
        rows = [
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(k, dilation, size, stride, strict=True)
        ]
        seen = jnp.split(x, layer.groups, -1)
        parts = jnp.split(w[k], layer.groups, -1)
        laid = jnp.concatenate([a @ b for a, b in zip(seen, parts, strict=True)], -1)
        z = z.at[(slice(None), *rows)].add(laid)
    if layer.padding == "SAME":
        keep = [slice(low, low + n) for (low, _), n in zip(cut, wide, strict=True)]
    else:
        ends = [(n - 1) * s + r for n, s, r in zip(size, stride, reach, strict=True)]
        keep = [slice(low, n - high) for (low, high), n in zip(cut, ends, strict=True)]
    return z[(slice(None), *keep)]


C, T = jb.Conv, jb.ConvTranspose
CONVOLUTIONS = [
    (C(1, 1, (1,)), (1, 1)),
    (C(2, 3, (3,)), (1, 2)),
    (C(1, 2, (5,), padding="VALID"), (5, 1)),
    (C(3, 2, (3, 2), stride=(2, 3)), (7, 5, 3)),
    (C(2, 3, (2, 2), stride=3, padding="VALID"), (7, 7, 2)),
    (C(2, 2, (2, 3), padding=((-1, 2), (3, 0)), dilation=(2, 1)), (6, 4, 2)),
    (C(4, 6, (3, 1), stride=2, dilation=2, groups=2, bias=False), (6, 3, 4)),
    (C(2, 4, (2, 3), groups=2, padding=2), (3, 2, 2)),
    (C(1, 2, (2, 1, 2), stride=(1, 2, 1)), (2, 3, 2, 1)),
    (T(1, 1, (1,)), (1, 1)),
    (T(2, 3, (3,), stride=2), (1, 2)),
    (T(3, 2, (3, 2), stride=(2, 3)), (3, 2, 3)),
    (T(2, 3, (2, 1), stride=3, padding="VALID"), (2, 3, 2)),
    (T(2, 2, (2, 3), stride=2, padding=((1, 0), (2, 1)), dilation=(2, 1)), (3, 4, 2)),
    (T(4, 6, (3,), stride=2, dilation=2, groups=2, bias=False), (4, 4)),
    (T(2, 2, (4,), stride=2, groups=2, padding=1), (4, 2)),
]  # fmt: skip


def swept(layer, params, x, delta, collect=sweep.total):
    y, saved = jb.forward(layer, params, x)
    trace = jb.Trace(x if "x" in layer.reads else None, y if "y" in layer.reads else None, saved)
    return jb.backward(layer, params, trace, delta, collect)


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=str)
def test_convolution_is_the_sum_over_its_kernel(layer, shape):
    keys = jax.random.split(jax.random.key(0), 4)
    params = layer.init(keys[0])
    if layer.bias:
        params["b"] = jax.random.normal(keys[1], params["b"].shape)
    x = jax.random.normal(keys[2], (3, *shape))
    written = correlation if isinstance(layer, C) else laid_out

    def anew(params, x):
        z = written(layer, params["w"], x)
        return z + jnp.broadcast_to(params["b"], z.shape) if layer.bias else z

    delta = jax.random.normal(keys[3], jax.eval_shape(anew, params, x).shape)

    def truth(params, x):
        z, vjp = jax.vjp(anew, params, x)
        return z, *vjp(delta)

    def ours(params, x):
        z, _ = jb.forward(layer, params, x)
        return z, *reversed(swept(layer, params, x, delta))

    assert_close(jax.jit(ours)(params, x), jax.jit(truth)(params, x))


def case(kind):
    return {key.split("/")[2]: TORCH[key] for key in TORCH if key.startswith(kind + "/")}


def last(v):
    return jnp.moveaxis(jnp.asarray(v), 1, -1)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("conv/2d", C(3, 4, (3, 2), stride=(2, 1), padding=((1, 1), (2, 2)), dilation=(1, 2))),
        ("conv/groups", C(4, 6, (3, 3), stride=2, padding=1, groups=2)),
        ("conv/depthwise", C(3, 3, (4,), padding=2, groups=3)),
        ("transposed/2d", T(3, 2, (3, 2), stride=(2, 1), padding=((1, 0), (0, 0)))),
        ("transposed/groups", T(4, 6, (3, 3), stride=2, padding=1, groups=2, dilation=2)),
        ("transposed/depthwise", T(3, 3, (3,), stride=3, padding="VALID", groups=3)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_convolution_is_pytorchs(kind, layer):
    truth = case(kind)

    def kernel(w):  # PyTorch's (out, in, *k), or, transposed, (in, out of one group, *k)
        w = jnp.moveaxis(jnp.asarray(w), (0, 1), (-1, -2))
        if isinstance(layer, C):
            return w
        g = layer.groups
        w = w.reshape(*w.shape[:-1], g, -1)  # (*k, out of one group, g, in of one group)
        return jnp.moveaxis(w, -1, -3).swapaxes(-1, -2).reshape(*layer.kernel, layer.c_in // g, -1)

    params = {"w": kernel(truth["w"]), "b": jnp.asarray(truth["b"])}
    x, delta = last(truth["x"]), last(truth["delta"])
    assert_close(jb.forward(layer, params, x)[0], last(truth["z"]))
    delta_x, gradients = swept(layer, params, x, delta)
    assert_close(delta_x, last(truth["dx"]))
    assert_close(gradients, {"w": kernel(truth["dw"]), "b": jnp.asarray(truth["db"])})


@pytest.mark.parametrize("name", ["max", "average"])
def test_pooling_is_pytorchs_with_ties(name):
    truth = case(f"pool/{name}")
    layer = (jb.MaxPool if name == "max" else jb.AveragePool)((3, 2), stride=(2, 1))
    x = last(truth["x"])
    assert_close(jb.forward(layer, (), x)[0], last(truth["z"]))
    assert_close(swept(layer, (), x, last(truth["delta"]))[0], last(truth["dx"]))


M, A = jb.MaxPool, jb.AveragePool
POOLS = [
    ((2, 2), {}),
    ((2, 2), {"stride": 1}),
    ((3, 2), {"stride": (2, 3)}),
    ((1, 1), {}),
    ((3, 3), {}),
    ((5, 7), {}),
]
POOLS += [(w, o | {"padding": "SAME"}) for w, o in POOLS]


@pytest.mark.parametrize("make", [M, A])
@pytest.mark.parametrize(("window", "options"), POOLS, ids=str)
def test_pooling_is_lax_reduce_window(make, window, options):
    layer = make(window, **options)
    stride = steps(layer.stride or window, 2)

    def windows(x, init, f):
        return lax.reduce_window(x, init, f, (1, *window, 1), (1, *stride, 1), layer.padding)

    def anew(x):
        if make is M:
            return windows(x, -jnp.inf, lax.max)
        return windows(x, 0.0, lax.add) / windows(jnp.ones_like(x), 0.0, lax.add)

    x = jax.random.normal(jax.random.key(0), (2, 5, 7, 3))
    y, vjp = jax.vjp(anew, x)
    delta = jax.random.normal(jax.random.key(1), y.shape)
    assert_close(jb.forward(layer, (), x)[0], y)
    assert_close(swept(layer, (), x, delta)[0], vjp(delta)[0])


@pytest.mark.parametrize("value", [0.0, -jnp.inf, jnp.nan])
@pytest.mark.parametrize(
    "layer",
    [M((2, 3)), M((3, 3), stride=2, padding="SAME"), M((2, 2), stride=1), jb.GlobalMaxPool()],
    ids=str,
)
def test_first_of_equals_wins_alone(layer, value):
    x = jnp.full((1, 5, 7, 2), value)
    y, _ = jb.forward(layer, (), x)
    delta = jax.random.normal(jax.random.key(0), y.shape)
    delta_x, _ = swept(layer, (), x, delta)
    first = np.zeros(x.shape)  # each window's first entry that is no padding
    if isinstance(layer, M):
        stride = steps(layer.stride or layer.window, 2)
        low = explicit(layer.padding, (5, 7), layer.window, stride)
        for i, j in np.ndindex(y.shape[1:3]):
            at = [max(t * s - p, 0) for t, s, (p, _) in zip((i, j), stride, low, strict=True)]
            first[0, at[0], at[1]] += delta[0, i, j]
    else:
        first[0, 0, 0] = delta[0]
    assert_close(delta_x, first)


@pytest.mark.parametrize("layer", [M((2, 3)), jb.GlobalMaxPool()], ids=str)
def test_maximum_at_a_kink_goes_the_same_way_forward(layer):
    x = jnp.ones((1, 2, 3, 1))
    v = jnp.arange(1.0, 7).reshape(x.shape)
    _, jv = jax.jvp(lambda x: jb.forward(layer, (), x)[0], (x,), (v,))
    assert jv.item() == 1.0


def test_only_nans_own_window_is_spoilt():
    x = jnp.zeros((1, 4, 1)).at[0, 1].set(jnp.nan)
    y, _ = jb.forward(M((2,)), (), x)
    np.testing.assert_array_equal(y[0, :, 0], [jnp.nan, 0.0])
    np.testing.assert_array_equal(
        swept(M((2,)), (), x, jnp.ones((1, 2, 1)))[0][0, :, 0], [0, 1, 1, 0]
    )
    assert_close(swept(jb.GlobalMaxPool(), (), x, jnp.ones((1, 1)))[0], (x != x).astype(float))


def test_average_of_half_precision_is_taken_in_float32():
    x = jnp.full((1, 64, 64, 1), 100, jnp.float16)
    for layer in (A((64, 64)), jb.GlobalAveragePool()):
        assert jb.forward(layer, (), x)[0].item() == 100
    many = jnp.full((1, 4096, 1), 1, jnp.bfloat16)
    delta_x, _ = swept(jb.Upsample(4096), (), many[:, :1], many)
    assert delta_x.item() == 4096
    assert delta_x.dtype == jnp.bfloat16
    x = jnp.array([0, 0, 1, 0, 0], jnp.bfloat16).reshape(1, 5, 1)
    delta = jnp.array([1, 1, 256], jnp.bfloat16).reshape(1, 3, 1)
    for layer, due in ((M((3,), stride=1), 258), (A((3,), stride=1), 86)):
        delta_x, _ = swept(layer, (), x, delta)
        assert delta_x.dtype == jnp.bfloat16
        assert delta_x[0, 2, 0] == due


@pytest.mark.parametrize("layer", [C(2, 3, (3,), stride=2), T(2, 3, (3,), stride=2)], ids=str)
def test_a_kernel_of_another_dtype_is_promoted(layer):
    keys = jax.random.split(jax.random.key(0), 3)
    params = jax.tree.map(lambda w: w.astype(jnp.float32), layer.init(keys[0]))
    x = jax.random.normal(keys[1], (2, 5, 2), jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        z, _ = jb.forward(layer, params, x)
        delta = jax.random.normal(keys[2], z.shape, z.dtype)
        found = swept(layer, params, x, delta)
    due = swept(layer, params, x.astype(jnp.float32), delta)
    assert z.dtype == jnp.float32
    assert found[0].dtype == jnp.bfloat16
    assert relative(found[0], due[0].astype(jnp.bfloat16)) == 0
    assert all(relative(found[1][name], due[1][name]) <= 1e-6 for name in params)
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    due = swept(
        layer, jax.tree.map(lambda w: w.astype(jnp.float32), half), x.astype(z.dtype), delta
    )
    with jax.numpy_dtype_promotion("standard"):
        found = swept(layer, half, x.astype(z.dtype), delta)
    assert found[0].dtype == jnp.float32
    assert relative(found[0], due[0]) <= 1e-6


def kept(layer, shape, seed=0, batch=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    params, x = layer.init(keys[0]), jax.random.normal(keys[1], (batch, *shape))
    delta = jax.random.normal(
        keys[2], jax.eval_shape(lambda: jb.forward(layer, params, x)[0]).shape
    )
    return swept(layer, params, x, delta, sweep.keep)[1]["w"]


@pytest.mark.parametrize("groups", [1, 2])
def test_patches_of_a_scanned_stack(groups):
    layer = C(2, 2, (2, 2), groups=groups)
    pairs = [kept(layer, (3, 2, 2), seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *pairs).stacked()
    each = jnp.stack([pair.each() for pair in pairs], axis=1)
    weights = jnp.array([1.0, -2.0, 0.5])
    assert_close(stacked.each(), each)
    assert_close(stacked.total(weights), jnp.einsum("n,n...->...", weights, each))
    assert_close(stacked.square_norm(), (each.reshape(3, -1) ** 2).sum(1))
    assert_close(stacked.total(), each.sum(0))
    assert_close(jax.tree.map(lambda v: v[:1], stacked).total(), each[0])


def test_patches_answer_with_other_kinds_and_in_a_sum():
    conv, other, transposed = (
        C(2, 2, (3,)),
        C(2, 2, (3,), stride=2, dilation=2),
        T(2, 2, (3,), stride=2),
    )
    parts = [kept(conv, (5, 2)), kept(other, (7, 2), 1), kept(transposed, (4, 2), 2)]
    outer = parts[0].outer()
    full = jb.Full(parts[1].each(), "a test", parts[1].place)
    rows = [part.each().reshape(3, -1) for part in parts]
    for one, a in zip([*parts, outer, full], [*rows, rows[0], rows[1]], strict=True):
        for two, b in zip([*parts, outer, full], [*rows, rows[0], rows[1]], strict=True):
            assert_close(one.dot(two), (a * b).sum(1))
            assert_close(one.gram(two), a @ b.T)
    for part in parts:
        assert_close(part.second_moment(), (part.each() ** 2).sum(0))
    both = Sum(tuple(parts), parts[0].place)
    assert_close(both.square_norm(), (sum(rows) ** 2).sum(1))
    assert_close(both.total(), sum(rows).sum(0).reshape(3, 2, 2))


def test_patches_leave_the_absent_out():
    pair = kept(C(2, 3, (2,)), (4, 2))
    weights = jnp.array([1.0, 0.0, 2.0])
    ill = Patches(
        pair.a.at[1].set(jnp.nan), pair.delta.at[1].set(jnp.inf), pair.geometry, pair.place
    )
    assert_close(ill.total(weights), pair.total(weights))


def test_patches_of_half_precision_are_summed_in_float32():
    geometry = Geometry((1,), (1,), ((0, 0),), (1,), (1,))
    ones = jnp.ones((2, 1, 4096, 1), jnp.bfloat16)
    pair = Patches(ones, ones, geometry, Place((1, 1, 1), jnp.bfloat16))
    for g in (pair.total(), pair.total(jnp.ones(2, jnp.bfloat16)), pair.each().sum(0)):
        assert g.dtype == jnp.float32
        assert g.item() == 8192


def test_patches_whose_operands_are_swapped_are_refused():
    class Swapped(C):
        def backward(self, params, trace, delta):
            delta_x, factored = super().backward(params, trace, delta)
            w = factored["w"]
            return delta_x, factored | {"w": Patches(w.delta, w.a, w.geometry)}

    with pytest.raises(ValueError, match=r"kernels \(3, 4, 2\) does not fit .*\(3, 2, 4\)"):
        kept(Swapped(2, 4, (3,)), (5, 2))


def test_patches_with_steps_and_copies_of_their_own():
    """One parameter (o, c, copies, k): the steps lead to two kernels (k, c, o)."""
    pair = kept(C(2, 3, (2,)), (4, 2))
    twice = jnp.concatenate([pair.a, 2 * pair.a], 1), jnp.concatenate([pair.delta] * 2, 1)
    place = Place((3, 2, 2, 2), jnp.float64, steps=(("transpose", (2, 3, 1, 0)),))
    both = Patches(*twice, pair.geometry, place)
    due = jnp.stack([pair.each(), 2 * pair.each()], 1).transpose(0, 4, 3, 1, 2)
    assert_close(both.each(), due)
    assert_close(both.total(), due.sum(0))
    turned = Place((3, 2, 2), jnp.float64, steps=(("transpose", (2, 1, 0)),))
    alone = Patches(pair.a, pair.delta, pair.geometry, turned)
    assert_close(alone.total(), pair.total().transpose(2, 1, 0))


def test_a_cnn_for_sequences_learns_by_the_delta_rule():
    net = jb.cnn((9, 1), (2,), 3, kernel=4, pool=3)
    keys = jax.random.split(jax.random.key(0), 2)
    params, x = net.init(keys[0]), jax.random.normal(keys[1], (4, 9, 1))
    y, loss = jnp.array([0, 2, 1, 1]), jb.SoftmaxCrossEntropy()
    truth = jax.jit(jax.value_and_grad(lambda p: mean_cost(net, loss, p, x, y)))(params)
    assert_close(jb.value_and_grad(net, loss)(params, x, y), truth)


@pytest.mark.parametrize(
    "net", [jb.cnn((4, 1), (2,), 3), jb.resnet((4, 1), (2,), 1, 3)], ids=["cnn", "resnet"]
)
def test_ready_nets_pickle(net):
    assert pickle.loads(pickle.dumps(net)) == net


def test_resnet_halves_the_size_from_stage_to_stage():
    net = jb.resnet((8, 8, 3), (4, 8, 16), np.int64(1), 10)
    params = jax.eval_shape(net.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), float)
    shapes = [
        v.shape[1:]
        for v in jax.eval_shape(lambda p, x: jb.activations(net, p, x), params, x).values()
    ]
    assert (8, 8, 4) in shapes
    assert (4, 4, 8) in shapes
    assert (2, 2, 16) in shapes
    assert shapes[-1] == (10,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: C(0, 1, (3,)), "c_in must be an int of at least 1"),
        (lambda: C(1, 1, 3), r"one size for each spatial axis, such as \(3, 3\)"),
        (lambda: C(1, 1, ()), "one size for each spatial axis"),
        (lambda: C(1, 1, (3, 0)), "kernel must be whole numbers of at least 1, not 0"),
        (lambda: C(1, 1, (3,), stride=(1, 1)), "of 1 spatial axes: stride must be one number"),
        (lambda: C(1, 1, (3,), dilation=0), "dilation must be whole numbers"),
        (lambda: C(1, 1, (3,), padding="FULL"), '"SAME", "VALID", one number, or 1 pairs'),
        (lambda: C(1, 1, (3,), padding=(1, 1)), "1 pairs"),
        (lambda: C(1, 1, (3,), padding=((1, 1), (1, 1))), "1 pairs"),
        (lambda: C(1, 1, (3,), padding=((0.5, 1),)), "1 pairs"),
        (lambda: C(4, 6, (3,), groups=4), "4 groups must divide c_in = 4 and c_out = 6"),
        (lambda: M((2,), padding=1), 'padding must be "SAME", "VALID", not 1'),
        (lambda: M((2,), stride=0), "stride must be whole numbers"),
        (lambda: M(2), "one size for each spatial axis"),
        (lambda: jb.Upsample(0), "factor must be whole numbers of at least 1"),
        (lambda: jb.Upsample(()), "one number, or one for each spatial axis"),
        (lambda: jb.Reshape((2, 0.5)), "tuple of whole numbers"),
        (lambda: jb.Reshape((-1, -1)), "at most one -1"),
        (lambda: jb.cnn((28, 28), 16, 10), "channels must be whole numbers"),
        (lambda: jb.cnn((28,), (16,), 10), r"such as \(28, 28, 1\)"),
        (lambda: jb.cnn((4, 4, 1), (2, 2, 2), 10), "give at most 2 channels"),
        (lambda: jb.cnn((4, 4, 1), (), 10), "channels must be 1 or more sizes"),
        (lambda: jb.resnet((4, 4, 1), (2, 4), (1,), 10), "one number for all stages"),
        (lambda: jb.resnet((4, 4, 1), (2, 4), 0, 10), "blocks must be 1 or more sizes"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_is_no_activation():
    with pytest.raises(TypeError, match="make an instance"):
        jb.cnn((4, 4, 1), (2,), 2, activation=jb.Tanh)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (C(3, 1, (3, 3)), (4, 4, 1), "needs 3 features on the last axis"),
        (C(1, 1, (3, 3)), (4, 1), r"needs examples \(height, width, channels\)"),
        (C(4, 1, (3, 3)), (4, 4), r"without channels add their axis, x\[..., None\]"),
        (C(1, 1, (3,), padding="VALID"), (2, 1), "does not fit into .*SAME"),
        (T(1, 1, (1,), padding=1), (2, 1), "does not fit"),
        (M((3,)), (2, 1), "does not fit"),
        (M((2, 2)), (4, 4), "without channels add their axis"),
        (jb.Upsample((2, 2)), (4, 1), "needs examples"),
        (jb.GlobalMaxPool(), (4,), "needs positions"),
        (jb.Reshape((2, 3)), (5,), r"it has 5 entries.*without the batch axis"),
        (jb.Reshape((2, -1)), (5,), "it has 5 entries"),
        (jb.Reshape((0, -1)), (5,), "it has 5 entries"),
    ],
    ids=str,
)
def test_inputs_that_do_not_fit_are_refused(layer, shape, message):
    params = layer.init(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jb.forward(layer, params, jnp.ones((2, *shape)))
    if not isinstance(layer, jb.Reshape):  # which only moves
        with pytest.raises(TypeError, match="floating-point"):
            jb.forward(layer, params, jnp.ones((2, *shape), jnp.int32))


def test_other_params_are_refused():
    layer = C(1, 2, (3,))
    with pytest.raises(ValueError, match="not the parameters of Conv"):
        jb.forward(layer, {"w": jnp.ones((3, 2, 1)), "b": jnp.ones(2)}, jnp.ones((1, 4, 1)))


def test_they_print_compare_and_pickle():
    layer = C(3, 8, (3, 3), stride=[2, 2], padding="same", dilation=np.int64(1))
    assert repr(layer) == "Conv(3, 8, (3, 3), stride=2)"
    assert layer == C(3, 8, (3, 3), stride=2)
    assert repr(C(1, 1, (3,), padding=1)) == "Conv(1, 1, (3,), padding=((1, 1),))"
    assert repr(M([2, 2])) == "MaxPool((2, 2))"
    assert repr(A((2, 2), 1, "same")) == "AveragePool((2, 2), stride=1, padding='SAME')"
    assert repr(jb.Upsample(2)) == "Upsample(2)"
    assert pickle.loads(pickle.dumps(layer)) == layer


def test_a_reshape_keeps_nothing():
    for layer in (jb.Flatten(), jb.Reshape((6,)), A((2,)), jb.GlobalAveragePool()):
        assert not jax.tree.leaves(jb.forward(layer, (), jnp.ones((1, 3, 2)))[1])
