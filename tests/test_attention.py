"""Attention, rotary positions, multi-head attention and gated units against plain formulas."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from single import assert_rule, normal, random_like, torch_truth
from truth import assert_close, relative

import jbackprop as jb
from jbackprop import sweep
from jbackprop.layers import attention

pytestmark = pytest.mark.newest


def attend(layer, q, k, v, mask=None):
    """Query by query and head by head, of one example."""
    d, groups = q.shape[1] // layer.heads, layer.heads // (layer.kv_heads or layer.heads)
    d_v = v.shape[1] * groups // layer.heads
    rows = []
    for t in range(len(q)):
        row = []
        for h in range(layer.heads):
            kv = h // groups
            z = k[:, kv * d : (kv + 1) * d] @ q[t, h * d : (h + 1) * d]
            e = jnp.exp(z * (layer.scale or 1 / math.sqrt(d)))
            if mask is not None:
                e = jnp.where(mask if mask.ndim == 1 else mask[t], e, 0.0)
            if layer.causal:
                e = jnp.where(np.arange(len(k)) <= t, e, 0.0)
            total = jnp.sum(e)
            row.append((e / jnp.where(total == 0, 1.0, total)) @ v[:, kv * d_v : (kv + 1) * d_v])
        rows.append(jnp.concatenate(row))
    return jnp.stack(rows)


def masked(x, *shape):
    """A batch with a mask that leaves the first example nothing, and others some."""
    there = np.random.default_rng(3).random((len(x[0]), *shape)) < 0.6
    there[0] = False
    return *x, jnp.asarray(there)


CASES = {
    "one query": (jb.Attention(1), [(1, 1), (2, 1), (2, 1)], None),
    "width 1": (jb.Attention(2), [(3, 2), (5, 2), (5, 4)], None),
    "ragged blocks": (jb.Attention(2, block=2), [(5, 4), (3, 4), (3, 2)], None),
    "causal": (jb.Attention(2, causal=True), [(4, 4)] * 3, None),
    "causal in blocks": (jb.Attention(1, causal=True, block=1), [(9, 2)] * 3, None),
    "causal in ragged blocks": (jb.Attention(1, causal=True, block=2), [(5, 2)] * 3, None),
    "grouped": (jb.Attention(4, 2, block=3), [(4, 8), (3, 4), (3, 2)], None),
    "one key head, causal": (jb.Attention(3, 1, True, block=2), [(5, 6), (5, 2), (5, 1)], None),
    "scaled": (jb.Attention(2, scale=0.3), [(3, 4)] * 3, None),
    "padding": (jb.Attention(2, 1), [(3, 4), (4, 2), (4, 3)], (4,)),
    "padding, causal": (jb.Attention(1, causal=True, block=2), [(5, 2)] * 3, (5,)),
    "a mask for each query": (jb.Attention(2, block=2), [(3, 2), (4, 2), (4, 2)], (3, 4)),
    "and causal": (jb.Attention(2, 1, True, block=2), [(5, 2), (5, 1), (5, 1)], (5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_against_loops(case):
    layer, shapes, mask = CASES[case]
    x = tuple(normal(3, *shape, seed=i) for i, shape in enumerate(shapes))
    x = x if mask is None else masked(x, *mask)
    assert_rule(layer, lambda params, x: attend(layer, *x), x)


def gradients(layer, x, delta):
    y, saved = jb.forward(layer, (), x)
    back, _ = jb.backward(layer, (), layer.trace(x, y, saved), delta, sweep.keep)
    return y, back


def test_the_blocks_do_not_matter():
    T = attention.WHOLE + 3
    x = tuple(normal(1, T, 1, seed=i) for i in range(3))
    for causal in (False, True):
        whole = gradients(jb.Attention(1, causal=causal, block=T), x, x[0])
        assert_close(gradients(jb.Attention(1, causal=causal), x, x[0]), whole)
        assert_close(gradients(jb.Attention(1, causal=causal, block=100), x, x[0]), whole)


@pytest.mark.parametrize(("more", "loops"), [(0, 0), (1, 1)])
def test_few_queries_are_worked_on_all_at_once(more, loops):
    x = jnp.ones((attention.WHOLE + more, 1))
    made = jax.make_jaxpr(lambda x: jb.Attention(1).forward((), (x, x, x)))(x)
    assert [e.primitive.name for e in made.jaxpr.eqns].count("scan") == loops


def test_a_single_key_gets_everything():
    x = tuple(normal(2, 1, 2, seed=i) for i in range(3))
    y, (of_q, of_k, of_v) = gradients(jb.Attention(2), x, x[0])
    assert_close((y, of_v), (x[2], x[0]))
    assert not np.any(np.abs([of_q, of_k]) > 1e-15)


def sizes_in(text):
    return [math.prod(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", text)]


@pytest.mark.parametrize("causal", [False, True])
def test_no_array_of_all_scores_is_ever_whole(causal):
    def largest(block, T):
        x = tuple(normal(1, T, 2, seed=i) for i in range(3))
        layer = jb.Attention(1, causal=causal, block=block)
        compiled = jax.jit(lambda x, d: gradients(layer, x, d)).lower(x, x[0]).compile()
        return max(sizes_in(compiled.as_text()))

    T, long = 67, attention.WHOLE + 3
    assert largest(8, T) <= 8 * T < T * T <= largest(T, T)
    assert largest(None, long) <= attention.PART * long


def test_what_is_kept_are_numbers_for_each_query_and_head():
    q, k, v = (normal(2, 5, 6, seed=i).astype("bfloat16") for i in range(3))
    _, saved = jb.forward(jb.Attention(3), (), (q, k, v))
    kept = jax.tree.leaves(saved)
    assert len(kept) <= 2
    assert all((leaf.shape, leaf.dtype) == ((2, 5, 3), jnp.float32) for leaf in kept)


def test_halves_are_summed_in_float32():
    q, k, v = (normal(1, 40, 2, seed=i).astype("float16") for i in range(3))
    x = (200 * q, 200 * k, v)  # scores up to 2e5, beyond float16
    y, back = gradients(jb.Attention(1, block=16), x, v)
    assert {a.dtype for a in (y, *back)} == {jnp.dtype("float16")}
    wide = tuple(a.astype("float64") for a in x)
    truth, truth_back = gradients(jb.Attention(1), wide, wide[2])
    assert relative(y, truth) < 1e-3
    assert relative(back[2], truth_back[2]) < 1e-2


def test_padding_is_as_if_it_were_not_there():
    layer = jb.Attention(2)
    q, k, v = (normal(1, 5, 4, seed=i) for i in range(3))
    short = gradients(layer, (q, k[:, :3], v[:, :3]), q)
    mask = jnp.arange(5)[None] < 3
    y, back = gradients(layer, (q, k.at[:, 3:].set(9e9), v.at[:, 3:].set(-9e9), mask), q)
    assert back[3] is None
    assert_close((y, (back[0], back[1][:, :3], back[2][:, :3])), short)
    assert not np.any(back[1][:, 3:])
    assert not np.any(back[2][:, 3:])


def test_large_scores_neither_overflow_nor_vanish():
    x = tuple(jnp.asarray([[[s * 1e4], [s * -1e4]]]) for s in (1.0, 2.0, 3.0))
    y, back = gradients(jb.Attention(1), x, x[0])
    np.testing.assert_array_equal(y, x[2])
    assert all(np.all(np.isfinite(d)) for d in back)


def test_curvature_through_the_rule():
    layer, shapes, _ = CASES["causal in ragged blocks"]
    x = tuple(normal(1, *shape, seed=i) for i, shape in enumerate(shapes))
    v = tuple(normal(1, *shape, seed=9 + i) for i, shape in enumerate(shapes))
    ours = jax.jvp(lambda x: gradients(layer, x, v[0])[1], (x,), (v,))[1]

    def cost(x):
        return jnp.sum(attend(layer, *(a[0] for a in x)) * v[0][0])

    assert_close(ours, jax.jit(lambda x: jax.jvp(jax.grad(cost), (x,), (v,))[1])(x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: jb.Attention(0), "heads must be an int of at least 1"),
        (lambda: jb.Attention(2, 0), "kv_heads must be an int of at least 1"),
        (lambda: jb.Attention(4, 3), "kv_heads must divide heads"),
        (lambda: jb.Attention(2, block=0), "block must be an int"),
        (lambda: jb.Attention(2, scale=0.0), "scale must be a finite number above 0"),
        (lambda: jb.Rotary(0), "heads must be an int"),
        (lambda: jb.Rotary(2, base=-1.0), "base must be a finite number above 0"),
        (lambda: jb.multi_head_attention(6, 4), "heads must divide width"),
        (lambda: jb.multi_head_attention(6, 3, 2), "kv_heads must divide heads"),
        (lambda: jb.multi_head_attention(True, 1), "width must be an int of at least 1"),
        (lambda: jb.cross_attention(5, 2), "cross_attention: .*heads must divide width"),
    ],
)
def test_refused_sizes(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("layer", "shapes", "match"),
    [
        (jb.Attention(2), [(3, 4)] * 2, r"needs a tuple \(q, k, v\)"),
        (jb.Attention(2), [(3, 3)] * 3, "but one example has the shapes"),
        (jb.Attention(2), [(3, 4), (3, 4), (2, 4)], "but one example has the shapes"),
        (jb.Attention(2, 1), [(3, 4)] * 3, r"k \(S, 1 d\)"),
        (jb.Attention(2), [(3, 4), (3, 4), (3, 3)], r"v \(S, 2 d_v\)"),
        (jb.Attention(2, causal=True), [(3, 4), (4, 4), (4, 4)], r"q \(S, 2 d\)"),
        (jb.Attention(2), [(3, 4), (0, 4), (0, 4)], "none of them empty"),
        (jb.Attention(2), [(4,)] * 3, "but one example has the shapes"),
    ],
)
def test_refused_inputs(layer, shapes, match):
    with pytest.raises(ValueError, match=match):
        jb.forward(layer, (), tuple(jnp.ones((2, *shape)) for shape in shapes))


def test_refused_arrays():
    x = jnp.ones((2, 3, 4))
    mask = jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"a mask \(S,\) or \(T, S\)"):
        jb.forward(jb.Attention(2), (), (x, x, x, mask[:, :2]))
    with pytest.raises(TypeError, match="mask of bool"):
        jb.forward(jb.Attention(2), (), (x, x, x, x[:, :, 0]))
    with pytest.raises(TypeError, match="one dtype"):
        jb.forward(jb.Attention(2), (), (x, x, x.astype("float32")))
    with pytest.raises(TypeError, match="floating-point"):
        jb.forward(jb.Attention(2), (), (x, x, x.astype(int)))
    with pytest.raises(ValueError, match="no parameters"):
        jb.forward(jb.Attention(2), {"w": x}, (x, x, x))
    with pytest.raises(ValueError, match="even number of features"):
        jb.forward(jb.Rotary(2), (), jnp.ones((2, 3, 6)))
    with pytest.raises(ValueError, match="a single example needs a batch axis"):
        jb.forward(jb.Rotary(2), (), x[0])


def turned(layer, x):
    """As a product of complex numbers."""
    T, features = x.shape
    x = x.reshape(T, layer.heads, features // layer.heads)
    half = x.shape[2] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if layer.interleaved else (x[..., :half], x[..., half:])
    w = np.exp(-np.log(layer.base) * 2 * np.arange(half) / x.shape[2])
    z = (a + 1j * b) * jnp.exp(1j * np.arange(T)[:, None, None] * w[None, None])
    a, b = jnp.real(z), jnp.imag(z)
    if layer.interleaved:
        return jnp.stack([a, b], -1).reshape(T, features)
    return jnp.concatenate([a, b], -1).reshape(T, features)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (jb.Rotary(1), (1, 2)),
        (jb.Rotary(2), (5, 12)),
        (jb.Rotary(3, base=7.0, interleaved=True), (4, 12)),
    ],
)
def test_rotary_against_complex_numbers(layer, shape):
    with jax.numpy_dtype_promotion("standard"):
        assert_rule(layer, lambda params, x: turned(layer, x), normal(3, *shape))


def test_rotary_is_as_exact_as_its_dtype_at_late_positions():
    x = normal(1, 5000, 2)
    exact = jb.forward(jb.Rotary(1), (), x)[0]
    assert relative(jb.forward(jb.Rotary(1), (), x.astype("float32"))[0], exact) < 1e-7
    half = jb.forward(jb.Rotary(1), (), x.astype("bfloat16"))[0]
    assert half.dtype == jnp.bfloat16
    assert relative(half, exact) < 4e-3


def test_rotary_products_depend_on_distances():
    q, k = (jnp.broadcast_to(normal(1, 1, 6, seed=i), (1, 9, 6)) for i in range(2))
    q, k = (jb.forward(jb.Rotary(1), (), a)[0][0] for a in (q, k))
    products = q @ k.T
    np.testing.assert_allclose(products[2, 5], products[4, 7], rtol=1e-12)
    np.testing.assert_allclose(products[8, 3], products[6, 1], rtol=1e-12)
    assert abs(products[2, 5] - products[5, 2]) > 1e-3


def dense(p, x):
    z = x @ p["w"]
    return z + jnp.broadcast_to(p["b"], z.shape) if "b" in p else z


def to_itself(layer, rotary=None):
    def plain(params, x):
        x, *mask = x if isinstance(x, tuple) else (x,)
        qkv = params[0][0][1] if mask else params[0]
        widths = np.cumsum([layer.heads, layer.kv_heads or layer.heads]) * (x.shape[1] // 2)
        q, k, v = jnp.split(dense(qkv, x), widths, axis=1)
        if rotary:
            q, k = turned(jb.Rotary(2), q), turned(jb.Rotary(rotary), k)
        return dense(params[-1], attend(layer, q, k, v, *mask))

    return plain


def to_memory(layer):
    def plain(params, x):
        x, memory, *mask = x
        queries, keys, *_ = params[0]
        k, v = jnp.split(dense(keys[1], memory), 2, axis=1)
        return dense(params[-1], attend(layer, dense(queries[1], x), k, v, *mask))

    return plain


def test_multi_head_attention():
    heads, x = jb.Attention(2), normal(3, 4, 4)
    assert_rule(jb.multi_head_attention(4, 2), to_itself(heads), x)
    assert_rule(
        jb.multi_head_attention(4, 2, masked=True, bias=False), to_itself(heads), masked((x,), 4)
    )
    with jax.numpy_dtype_promotion("standard"):
        assert_rule(
            jb.multi_head_attention(4, 2, 1, causal=True, rotary=True, block=3),
            to_itself(jb.Attention(2, 1, causal=True), rotary=1),
            x,
        )


def test_cross_attention():
    x, memory = normal(3, 2, 4), normal(3, 3, 5, seed=4)
    assert_rule(jb.cross_attention(4, 2, memory=5), to_memory(jb.Attention(2)), (x, memory))
    assert_rule(
        jb.cross_attention(4, 2, 1, masked=True),
        to_memory(jb.Attention(2, 1)),
        masked((x, normal(3, 3, 4)), 3),
    )


def test_multi_head_attention_with_dropout_draws():
    net = jb.multi_head_attention(4, 2, dropout=0.5)
    params, x = net.init(jax.random.key(0)), normal(2, 3, 4)
    assert net.draws
    assert not jb.multi_head_attention(4, 2).draws
    still = jb.forward(net, params, x)[0]
    drawn = jb.forward(net, params, x, jax.random.key(1))[0]
    dropped = np.asarray(drawn) == 0
    assert 0 < dropped.sum() < dropped.size
    np.testing.assert_allclose(drawn[~dropped], 2 * still[~dropped])


def test_the_keys_bias_has_no_gradient():
    net = jb.multi_head_attention(4, 2)
    params, x = random_like(net.init(jax.random.key(0))), normal(2, 3, 4)
    y, saved = jb.forward(net, params, x)
    _, found = jb.backward(net, params, net.trace(x, y, saved), y, sweep.total)
    of_q, of_k, of_v = jnp.split(found[0]["b"], 3)
    assert np.linalg.norm(of_k) < 1e-13 * np.linalg.norm(of_q)
    assert np.linalg.norm(of_v) > 0


def test_gated_units():
    def plain_glu(params, x):
        (w, (v, _)), _ = params
        return dense(w, x) * jax.nn.sigmoid(dense(v, x))

    def plain(activation):
        def unit(params, x):
            ((w, _), v), _, out = params
            return dense(out, activation(dense(w, x)) * dense(v, x))

        return unit

    assert_rule(jb.glu(3, 2), plain_glu, normal(4, 2, 3))
    assert_rule(jb.swiglu(3, 5), plain(lambda z: z / (1 + jnp.exp(-z))), normal(4, 2, 3))
    assert_rule(
        jb.geglu(1, 2, 3, bias=True),
        plain(lambda z: jax.nn.gelu(z, approximate=False)),
        normal(4, 1),
    )


def assert_as_torch(net, params, x, case, gradients_of):
    """Output, dC/dx and the gradients of the parameters, in PyTorch's layout."""
    truth = torch_truth("attention", case)
    y, saved = jb.forward(net, params, x)
    assert relative(y, truth["y"]) <= 1e-12
    back, found = jb.backward(net, params, net.trace(x, y, saved), truth["delta"], sweep.total)
    for name, value in gradients_of(back, found).items():
        assert relative(value, truth[f"{name}_gradient"]) <= 1e-12, name


@pytest.mark.parametrize("case", ["self", "causal", "padding"])
def test_multi_head_attention_against_torch(case):
    truth = torch_truth("attention", case)
    bias, pad = case != "padding", case == "padding"
    net = jb.multi_head_attention(6, 2, causal=case == "causal", masked=pad, bias=bias, block=2)

    def of(name):
        own = {"w": truth[f"{name}weight"].T}
        return own | ({"b": truth[f"{name}bias"]} if bias else {})

    qkv, out = of("in_proj_"), of("out_proj_")
    params = ((((), qkv, ()), ()), (), out) if pad else (qkv, (), (), out)

    def back(delta_x, found):
        mine = found[0][0][1] if pad else found[0]
        own = {"x": delta_x[0] if pad else delta_x, "in_proj_weight": mine["w"].T}
        own["out_proj_weight"] = found[-1]["w"].T
        return own | ({"in_proj_bias": mine["b"], "out_proj_bias": found[-1]["b"]} if bias else {})

    assert_as_torch(net, params, (truth["x"], truth["mask"]) if pad else truth["x"], case, back)


def test_cross_attention_against_torch():
    truth = torch_truth("attention", "cross")
    net = jb.cross_attention(6, 2, memory=3, masked=True)
    b_q, b_k, b_v = jnp.split(truth["in_proj_bias"], 3)
    keys = {
        "w": jnp.concatenate([truth["k_proj_weight"], truth["v_proj_weight"]]).T,
        "b": jnp.concatenate([b_k, b_v]),
    }
    queries = {"w": truth["q_proj_weight"].T, "b": b_q}
    out = {"w": truth["out_proj_weight"].T, "b": truth["out_proj_bias"]}

    def back(delta_x, found):
        (_, q), (_, kv, _), _ = found[0]
        k, v = jnp.split(kv["w"].T, 2)
        return {
            "x": delta_x[0], "memory": delta_x[1], "q_proj_weight": q["w"].T, "k_proj_weight": k,
            "v_proj_weight": v, "in_proj_bias": jnp.concatenate([q["b"], kv["b"]]),
            "out_proj_weight": found[-1]["w"].T, "out_proj_bias": found[-1]["b"],
        }  # fmt: skip

    params = ((((), queries), ((), keys, ()), ()), (), out)
    assert_as_torch(net, params, (truth["x"], truth["memory"], truth["mask"]), "cross", back)


def test_grouped_heads_against_torch():
    truth = torch_truth("attention", "grouped")

    def beside(a):
        return jnp.swapaxes(a, 1, 2).reshape(len(a), a.shape[2], -1)

    x = tuple(beside(truth[name]) for name in "qkv")
    y, back = gradients(jb.Attention(4, 2, causal=True, block=2), x, beside(truth["delta"]))
    assert relative(y, beside(truth["y"])) <= 1e-12
    for name, delta in zip("qkv", back, strict=True):
        assert relative(delta, beside(truth[f"{name}_gradient"])) <= 1e-12
