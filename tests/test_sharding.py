"""Where parameters go on a mesh: rules by path, what FSDP adds, the rules that are shipped.

Specs are asked of the sizes of a mesh; what meshes of eight devices compute is in test_mesh.py.
"""

import dataclasses
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jbackprop as jb
from jbackprop.sharding import Sharding, paths, specs_like, tensor_parallel

MESH = SimpleNamespace(shape={"data": 2, "model": 4})
GPT = jb.transformer(32, 16, 3, 4, 8)
BLOCK = "layers[2].layer.layers[{half}].layer.branch.layers[1]{rest}"


def shapes(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def by_path(net, sharding, mesh=MESH):
    params = shapes(net)
    specs = jax.tree.leaves(
        sharding.specs(net, params, mesh), is_leaf=lambda node: isinstance(node, P)
    )
    return dict(zip(paths(net, params), map(tuple, specs), strict=True))


def test_the_first_rule_counts_and_belongs_to_the_last_axes():
    sharding = Sharding(
        ((r"branch\.layers\[1\]\.w$", P("model", None)), (r"\.w$", P(None, "model")),
         (r"layers\[2\]\..*\.b$", P("model")))
    )  # fmt: skip
    found = by_path(GPT, sharding)
    assert found[BLOCK.format(half=1, rest=".w")] == (None, "model", None)  # copies in front
    assert found[BLOCK.format(half=0, rest=".layers[0].w")] == (None, None, "model")
    assert found[BLOCK.format(half=0, rest=".layers[0].b")] == (None, "model")
    assert found["layers[0].w"] == (None, "model")
    assert found["layers[4].b"] == (None,)


def test_fsdp_takes_the_longest_axis_that_is_whole_and_divides():
    net = jb.Sequential(jb.Repeat(jb.Dense(6, 6), 8), jb.Dense(6, 12), jb.Dense(12, 5))
    found = by_path(net, jb.sharding.fsdp("model", smallest=1))
    assert found["layers[0].layer.w"] == (None, None, None)  # not the 8 copies; 6 no multiple of 4
    assert found["layers[1].w"] == (None, "model")
    assert found["layers[2].w"] == ("model", None)
    assert found["layers[2].b"] == (None,)
    found = by_path(net, jb.sharding.fsdp("data", smallest=70))
    assert found["layers[0].layer.w"] == (None, "data", None)  # of equal ones the first
    assert found["layers[1].w"] == (None, "data")  # 72 entries
    assert found["layers[2].w"] == (None, None)  # 60
    both = Sharding(((r"layers\[1\]\.w", P(None, "model")),), fsdp=("data", "model"), smallest=1)
    assert by_path(net, both)["layers[1].w"] == (None, "model")  # the axis is used already
    assert by_path(net, dataclasses.replace(both, fsdp="data"))["layers[1].w"] == ("data", "model")
    many = SimpleNamespace(shape={"data": 2, "model": 2})
    assert by_path(net, both, many)["layers[2].w"] == (("data", "model"), None)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (r"nowhere", ["'nowhere'", "layers[0].w", "layers[2].b"]),
        (r"layers\[2\]\.w", ["layers[2].w", "(16, 6)", "axis 1", "6 is no multiple of 4", "'^layers"]),
        (r"layers\[2\]\.b", ["splits 2 axes", "layers[2].b", "(6,)"]),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_be_is_an_error_that_says_what_to_do(rule, words):
    net = jb.mlp([8, 16, 6])
    with pytest.raises(ValueError, match=re.escape(words[0])) as info:
        Sharding(((rule, P(None, "model")),)).specs(net, shapes(net), MESH)
    assert all(word in str(info.value) for word in words), info.value
    if "'^layers" in words:  # the rule that the message names mends it
        mended = Sharding(((r"^layers\[2\]\.w$", P()), (rule, P(None, "model"))))
        assert by_path(net, mended)["layers[2].w"] == (None, None)


@pytest.mark.parametrize(
    "sharding",
    [Sharding(batch="dada"), Sharding(fsdp=("data", "dada")), Sharding(((".", P("dada")),))],
    ids=["batch", "fsdp", "rule"],
)
def test_an_axis_that_the_mesh_has_not_is_an_error_with_those_it_has(sharding):
    net = jb.Dense(4, 4)
    with pytest.raises(ValueError, match=r"'dada', but .* 'data' of 2, 'model' of 4"):
        sharding.specs(net, shapes(net), MESH)


def test_how_examples_are_split():
    assert Sharding().examples == P("data")
    assert Sharding(batch=("data", "model")).examples == P(("data", "model"))
    assert Sharding(batch=None).examples == Sharding(batch=()).examples == P(None)


def columns_and_rows(net, mesh=MESH):
    found = by_path(net, tensor_parallel(net), mesh)
    return {path: spec for path, spec in found.items() if any(spec)}


def test_pairs_of_dense_are_split_by_columns_and_rows():
    columns, rows, bias = (None, "model"), ("model", None), ("model",)
    assert columns_and_rows(jb.mlp([8, 16, 8, 16, 3])) == {
        "layers[0].w": columns, "layers[0].b": bias, "layers[2].w": rows,
        "layers[4].w": columns, "layers[4].b": bias, "layers[6].w": rows,
    }  # fmt: skip
    assert set(columns_and_rows(jb.mlp([8, 16, 8, 3]))) == {
        "layers[0].w", "layers[0].b", "layers[2].w",  # the third has no partner
    }  # fmt: skip
    norm = jb.Sequential(jb.Dense(8, 16), jb.LayerNorm(16), jb.Tanh(), jb.Dense(16, 8))
    assert columns_and_rows(norm) == {}
    assert columns_and_rows(jb.swiglu(8, 16)) == {
        "layers[0].layers[0].layers[0].w": columns, "layers[0].layers[1].w": columns,
        "layers[2].w": rows,
    }  # fmt: skip
    assert columns_and_rows(jb.lstm(3, 8, 4)) == {}


def test_a_transformer_is_split_by_heads_hidden_units_and_vocabulary():
    stacked_columns, stacked_rows = (None, None, "model"), (None, "model", None)
    half = {half: BLOCK.format(half=half, rest="{}") for half in (0, 1)}
    assert columns_and_rows(GPT) == {
        "layers[0].w": ("model", None),
        half[0].format(".layers[0].w"): stacked_columns,
        half[0].format(".layers[0].b"): (None, "model"),
        half[0].format(".layers[3].w"): stacked_rows,
        half[1].format(".w"): stacked_columns,
        half[1].format(".b"): (None, "model"),
        BLOCK.format(half=1, rest="")[:-3] + "[3].w": stacked_rows,
        "layers[4].w": (None, "model"),
        "layers[4].b": ("model",),
    }
    tied = columns_and_rows(jb.transformer(32, 16, 3, 4, 8, tied=True, rotary=True))
    assert tied["embedding.w"] == ("model", None)
    assert len(tied) == 7


def test_convolutions_are_split_by_channels_in_pairs():
    pair = {(None,) * 3 + ("model",), (None, None, "model", None)}
    found = columns_and_rows(jb.resnet((8, 8, 3), (8, 16), 1, 10))
    assert list(found) == [f"layers[{i}].branch.layers[{j}].w" for i in (1, 2) for j in (2, 5)]
    assert set(found.values()) == pair
    found = columns_and_rows(jb.cnn((8, 8, 3), (8, 16), 10))
    assert {found["layers[0].w"], found["layers[3].w"]} == pair
    assert list(found) == ["layers[0].b", "layers[0].w", "layers[3].w"]


def test_the_state_of_an_optimizer_is_split_as_its_parameters():
    net = jb.mlp([8, 16, 16])  # two weights are told apart by their paths, w and count by theirs
    params = shapes(net)
    sharding = Sharding(((r"layers\[0\]\.w", P(None, "model")), (r"layers\[2\]\.b", P("data"))))
    specs = sharding.specs(net, params, MESH)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(optimizer.init, params)
    found = specs_like(state, params, specs)
    assert found[1][0].mu == found[1][0].nu == specs
    assert found[1][0].count == P()
    masked = optax.masked(optax.trace(0.9), (True, False, False))
    inner = specs_like(jax.eval_shape(masked.init, params), params, specs).inner_state.trace
    assert inner[0] == specs[0]
    assert specs_like({"w": jnp.zeros((8, 16)), "v": params}, params, specs)["w"] == P()
    other = specs_like(params[0], params[0] | {"w": jnp.zeros((3, 3))}, specs[0])
    assert other["w"] == P()  # of another shape
    assert other["b"] == specs[0]["b"]


def test_parameters_are_placed_where_the_specs_say():
    net = jb.mlp([8, 16, 6])
    params = net.init(jax.random.key(0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    placed = jb.sharding.place(net, params, mesh, jb.sharding.fsdp(smallest=64))
    assert placed[0]["w"].sharding == jax.sharding.NamedSharding(mesh, P(None, "data"))
    assert placed[2]["b"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    x, y = jb.sharding.put((np.ones((4, 8)), np.ones(4)), P("data"), mesh)
    assert x.sharding.spec == y.sharding.spec == P("data")


@pytest.mark.newest
def test_the_table_of_scaling_is_what_the_formulas_give():
    root = Path(__file__).parent.parent
    space = runpy.run_path(str(root / "benchmarks" / "scaling.py"))
    assert space["table"]() in (root / "docs" / "scaling.md").read_text()
    net, machine = space["Net"](1000, 2, 5, 7), space["Machine"](flops=100.0, near=10.0, far=1.0)
    step = space["data_parallel"](net, machine, 2, 3)
    assert (step.sent, step.sending) == (4000, 400)  # 2 * 1/2 * 4 * 1000, near
    assert step.computing == 4 * (2000 + 4 * 2 * 7 * 5) * 3 / 100
    both = space["fsdp"](net, machine, 16, 3, tensor=8)
    assert both.sent == 3 / 2 * 4 * 1000 / 8 + 5 * 2 * 2 * 7 / 8 * 8 * 3 * 5 * 2
    assert both.held == 16 * 1000 / 16 + 2 * 24 * 5 * 2
