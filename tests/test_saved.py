"""Networks in files: what comes back, what is refused, and that no damage goes unseen."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jbackprop as jb
from jbackprop import catalogue
from jbackprop.saved import archive, network
from jbackprop.saved.configuration import Encoder, configuration, construct, difference
from jbackprop.structure import parameter_paths

OF_CATALOGUE = [
    catalogue._cubic,
    catalogue._cubic_slope,
    catalogue._bilinear,
    catalogue._bilinear_params,
]


@dataclasses.dataclass(frozen=True)
class Gains(jb.Layer):
    """A user's own layer."""

    p: int
    dtype: object = np.dtype("float32")
    reads = ("x",)

    def init(self, key):
        return jnp.ones(self.p, self.dtype)

    def forward(self, g, x, key=None):
        return g * x, None

    def backward(self, g, trace, delta):
        return delta * g, jb.Scale.of(trace.x, delta)


def swish(z):
    return z * jax.nn.sigmoid(z)


def swish_slope(z):
    return jax.grad(lambda v: swish(v).sum())(z)


def parameters(shapes):
    """Numbers for them, without a program being compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: np.asarray(rng.standard_normal(s.shape) * 3).astype(s.dtype), shapes
    )


def shapes_of(net):
    return jax.eval_shape(net.init, jax.random.key(0))


def bits(array):
    array = np.asarray(jax.random.key_data(array) if network._is_key(array) else array)
    return array.shape, array.dtype, array.tobytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return [bits(leaf) for leaf in jax.tree.leaves(a)] == [
        bits(leaf) for leaf in jax.tree.leaves(b)
    ]


@pytest.fixture
def small(tmp_path):
    """A net, its parameters, and the file it is in."""
    net, path = jb.mlp([2, 3, 1]), tmp_path / "net.npz"
    params = parameters(shapes_of(net))
    jb.save(path, net, params, loss=jb.Huber(0.3), notes={"classes": ["a", "b"]})
    return net, params, path


def changed(path, change=lambda config: config, arrays=lambda entries: entries, **more):
    """Write the file anew, its JSON or its arrays changed."""
    with zipfile.ZipFile(path) as file:
        config = json.loads(file.read("config.json"))
        entries = {n: file.read(n) for n in file.namelist() if n != "config.json"}
    config = change(config) or config
    with zipfile.ZipFile(path, "w", **more) as file:
        file.writestr("config.json", json.dumps(config))
        for name, data in arrays(entries).items():
            file.writestr(name, data)


def refused(path, match, **kwargs):
    with pytest.raises(jb.FormatError, match=match) as caught:
        jb.load(path, **kwargs)
    assert str(path) in str(caught.value)
    return str(caught.value)


# What comes back


def test_every_layer_of_the_catalogue_comes_back(tmp_path):
    path = tmp_path / "net"
    for net, _ in catalogue.LAYERS:
        params = parameters(shapes_of(net))
        jb.save(path, net, params)
        known = OF_CATALOGUE if "_" in str(configuration(net)) else None
        found = jb.load(path, known=known)
        assert found.net == net
        assert type(found.net) is type(net)
        assert hash(found.net) == hash(net)
        assert same(found.params, params)


def test_every_loss_of_the_catalogue_comes_back(tmp_path):
    net = jb.Tanh()
    for loss, _, _ in catalogue.LOSSES:
        jb.save(tmp_path / "net", net, (), loss=loss)
        assert jb.load(tmp_path / "net").loss == loss


def test_no_public_layer_or_loss_is_unknown():
    from jbackprop.saved.configuration import PUBLIC

    for name, value in vars(jb).items():
        if isinstance(value, type) and issubclass(value, jb.sweep.Node | jb.Loss):
            abstract = getattr(value, "__abstractmethods__", ()) or value is jb.Recurrent
            assert abstract or PUBLIC[f"jbackprop.{name}"] is value


def test_notes_loss_and_version_come_back(small):
    net, params, path = small
    found = jb.load(path)
    assert (found.net, found.loss) == (net, jb.Huber(0.3))
    assert found.notes == {"classes": ["a", "b"]}
    assert found.version == jb.__version__
    assert same(found.params, params)
    jb.save(path, net, params)
    found = jb.load(path)
    assert found.loss is None
    assert found.notes is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.loss = jb.Huber()


def test_numpy_reads_the_file_and_the_json_is_text(small):
    _, params, path = small
    with np.load(path, allow_pickle=False) as found:
        assert bits(found["layers[2].w"]) == bits(params[2]["w"])
        assert json.loads(found["config.json"])["format"] == "jbackprop network"


def test_equal_networks_make_equal_files(small, tmp_path):
    net, params, path = small
    jb.save(tmp_path / "b", net, params, loss=jb.Huber(0.3), notes={"classes": ["a", "b"]})
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "dtype",
    [
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float32",
        "float64",
        "complex64",
    ],
)
def test_every_bit_pattern_of_every_dtype_comes_back(tmp_path, dtype):
    net, dtype = jb.Dense(16, 16, bias=False), jnp.dtype(dtype)
    raw = np.random.default_rng(0).integers(0, 256, 256 * dtype.itemsize, dtype=np.uint8)
    if dtype.itemsize == 1:
        raw = np.arange(256, dtype=np.uint8)
    w = raw.view(dtype).reshape(16, 16)
    w[0, :4] = np.array([np.nan, np.inf, -0.0, 1], np.float32).astype(dtype)
    for given_ in ({"w": w}, {"w": jnp.asarray(w)}, {"w": np.asfortranarray(w)}):
        jb.save(tmp_path / "a", net, given_)
        found = jb.load(tmp_path / "a").params["w"]
        assert isinstance(found, jax.Array)
        assert bits(found) == bits(np.ascontiguousarray(w))


def test_odd_parameters_come_back(tmp_path):
    """Scalars, empty arrays, keys, whole numbers, names that no zip entry can have, big-endian."""
    made = {
        "a scalar/../é\0": 2.5, "empty": np.zeros((0, 3), "float32"), "many": (np.arange(3),),
        "key": jax.random.key(3, impl="rbg"), "big": np.arange(2.0).astype(">f8"),
    }  # fmt: skip
    net = jb.Autodiff(_first, functools.partial(_odd, ()))
    jb.save(tmp_path / "a", net, made)
    found = jb.load(tmp_path / "a", known={"partial": net.init_params, "_first": _first})
    assert found.net == net
    made = made | {"a scalar/../é\0": jnp.asarray(2.5), "big": np.arange(2.0)}
    assert same(found.params, made)
    with zipfile.ZipFile(tmp_path / "a") as file:  # names that every system takes
        assert all(name.isascii() and not {*"/\\"} & {*name} for name in file.namelist())
    assert jax.random.key_impl(found.params["key"]) == "rbg"


def _first(params, x):
    return x


def _odd(nothing, key):
    return {
        "a scalar/../é\0": jnp.zeros(()), "empty": jnp.zeros((0, 3), "float32"),
        "many": (jnp.arange(3),), "key": jax.random.key(0, impl="rbg"), "big": jnp.zeros(2),
    }  # fmt: skip


def test_parameters_are_found_by_path_in_all_composites():
    tied = jb.Tied(jb.Embedding(5, 3), jb.Sequential(jb.Dense(3, 3), jb.Skip(jb.Gain(3))))
    net = jb.Sequential(tied, jb.Repeat(jb.Dense(5, 5, bias=False), 2), jb.Frozen(jb.Gain(5)))
    assert parameter_paths(net, shapes_of(net)) == [
        "layers[0].embedding.w" if isinstance(shapes_of(tied)[0], dict) else "layers[0].embedding",
        "layers[0].body.layers[0].b",
        "layers[0].body.layers[0].w",
        *_gain("layers[0].body.layers[1].branch"),
        "layers[1].layer.w",
        *_gain("layers[2].layer"),
    ]
    assert parameter_paths(jb.Dense(2, 2), shapes_of(jb.Dense(2, 2))) == ["net.b", "net.w"]


def test_a_composite_with_parameters_of_its_own_comes_back(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Scaled(jb.Frozen):
        def init(self, key):
            return {"inner": self.layer.init(key), "own": jnp.ones(2)}

        def split(self, tree):
            return (tree["inner"],)

    net = Scaled(jb.Dense(2, 2))
    params = parameters(shapes_of(net))
    jb.save(tmp_path / "a", net, params)
    found = jb.load(tmp_path / "a", known=[Scaled])
    assert found.net == net
    assert same(found.params, params)


def _gain(path):
    shapes = shapes_of(jb.Gain(3))
    return [path + "".join(f".{k.key}" for k in w) for w, _ in jax.tree.leaves_with_path(shapes)]


@pytest.mark.skipif(jax.device_count() > 1, reason="the devices are made in a process of its own")
def test_sharded_arrays_are_gathered(tmp_path):
    code = """
    import jax, numpy as np, jbackprop as jb
    from jax.sharding import NamedSharding, PartitionSpec
    assert jax.device_count() == 4
    mesh = jax.make_mesh((4,), ("m",))
    w = np.arange(32, dtype="float32").reshape(8, 4)
    split = jax.device_put(w, NamedSharding(mesh, PartitionSpec("m")))
    jb.save("a.npz", jb.Dense(8, 4, bias=False), {"w": split})
    found = jb.load("a.npz").params["w"]
    assert len(split.sharding.device_set) == 4 and found.tobytes() == w.tobytes()
    """
    run(code, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=4")


def run(code, folder, **env):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True,
        timeout=300, check=False, env=os.environ | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_arrays_of_other_processes_are_refused_by_name(tmp_path, monkeypatch):
    net = jb.Dense(2, 2)
    params = jax.tree.map(jnp.asarray, parameters(shapes_of(net)))
    kind = type(params["w"])
    monkeypatch.setattr(kind, "is_fully_addressable", property(lambda self: self.ndim == 1))
    with pytest.raises(ValueError, match=r"net\.w is partly on other processes.*checkpoints"):
        jb.save(tmp_path / "a", net, params)
    assert not list(tmp_path.iterdir())


# Configurations


def test_configurations_keep_everything():
    value = (
        None, True, -3, 0.1, -0.0, 1e-320, "é\ud800", (), (1,), [1, (2,)], {"a": 1, 2: (3,)},
        frozenset({3, 1}), {"x"}, 1 + 2j, np.dtype("bfloat16"), np.dtype("float32"), np.float32(0.1),
        np.bool_(True), jnp.bfloat16(1.5).dtype.type(1.5), jax.lax.Precision.HIGHEST,
        float("inf"), -float("inf"), jnp.float32, jnp.tanh, jax.nn.silu, jax.nn.relu, jb.Tanh(),
    )  # fmt: skip
    encoder = Encoder()
    config = json.loads(json.dumps(encoder.encode(value), allow_nan=False))
    found = construct(config, encoder.known, "it")
    assert not encoder.known
    assert found == value
    assert str(found) == str(value)  # also the sign of 0
    assert list(map(type, found)) == list(map(type, value))
    (nan,) = construct(configuration((float("nan"),)), {}, "it")
    assert nan != nan


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
        ),
        max_leaves=20,
    )
)
def test_plain_values_come_back(value):
    found = construct(json.loads(json.dumps(configuration(value))), {}, "it")
    assert found == value
    assert repr(found) == repr(value)


def test_configurations_of_anything_are_made_and_tell_settings_apart():
    def recursive(n):
        return recursive(n - 1)

    def empty():
        return later

    if len(sys.argv) < 0:
        later = 1
    mutual = [lambda: (a, b, c, d) for _ in range(4)]
    a, b, c, d = mutual
    import optax

    class Strange:
        __name__ = 3

    for value in (
        recursive,
        a,
        empty,
        Strange(),
        jnp.ones(2),
        object(),
        iter(()),
        b"x",
        slice(2),
        jax,
    ):
        assert json.dumps(configuration(value))
    normal = jax.nn.initializers.normal
    nets = [jb.Dense(2, 2, w_init=normal(s)) for s in (0.1, 0.2)]
    adams = [optax.adam(rate) for rate in (0.1, 0.2)]
    partials = [functools.partial(jax.nn.leaky_relu, negative_slope=s) for s in (0.1, 0.2)]
    for first, second in (nets, adams, partials):
        assert configuration(first) != configuration(second)
        assert "0.1" in difference(configuration(first), configuration(second))
    assert configuration(optax.adam(0.1)) == configuration(adams[0])


def test_a_configuration_is_the_same_in_every_process(tmp_path):
    code = """
    import json, jax, jbackprop as jb
    from jbackprop.saved import configuration
    net = jb.Sequential(jb.Activation(jax.nn.silu, lambda z: z), jb.lstm(2, 3, 1))
    print(json.dumps([configuration(net), configuration(frozenset("abc"))]))
    """
    assert run(code, tmp_path, PYTHONHASHSEED="1") == run(code, tmp_path, PYTHONHASHSEED="2")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (jb.mlp([2, 3, 1]), jb.mlp([2, 3, 1]), None),
        (jb.mlp([2, 3, 1]), jb.mlp([2, 4, 1]), "net.layers[0].q is 3 there, 4 here"),
        (jb.mlp([2, 3, 1]), jb.mlp([2, 3, 1], jb.Relu()), "net.layers[1] is Tanh() there, Relu() here"),
        (jb.Sequential(jb.Tanh()), jb.Sequential(jb.Tanh(), jb.Relu()), "net.layers has 1 items there, 2 here"),
        (jb.Elu(), jb.Elu(0.5), "net.alpha is 1.0 there, 0.5 here"),
        (jb.Skip(jb.Elu()), jb.Skip(jb.Elu(), jb.Gain(2)), "net.shortcut is None there, Gain(features=2, init_value=1.0) here"),
        (jb.Activation(swish, jnp.sign), jb.Activation(swish, swish), "net.derivative is jax.numpy.sign there, swish here"),
        ((1, True), (1, 1), "net[1] is True there, 1 here"),
        (0.0, -0.0, "net is 0.0 there, -0.0 here"),
    ],
)  # fmt: skip
def test_differences_are_told_in_words(first, second, expected):
    found = difference(configuration(first), configuration(second), ("there", "here"))
    assert found == expected


# What is the user's


def test_what_is_the_users_is_handed_in(tmp_path):
    path = tmp_path / "a"
    net = jb.Sequential(jb.Activation(swish, swish_slope), Gains(3), jb.Activation(swish, jnp.sign))
    params = ((), np.ones(3, "float32"), ())
    jb.save(path, net, params)
    assert jb.load(path, known=[Gains, swish, swish_slope, len]).net == net
    assert jb.load(path, known=iter([Gains, swish, swish_slope])).net == net
    text = refused(path, "known=.swish, swish_slope, Gains.")
    assert "swish (net.layers[0].f)" in text
    assert "Gains (net.layers[1])" in text
    refused(path, r"Gains \(net.layers\[1\]\).*known=\[Gains\]", known=[swish, swish_slope])
    moved = {"Gains": Gains, "swish": jnp.tanh, "swish_slope": swish_slope}
    assert jb.load(path, known=moved).net.layers[2] == jb.Activation(jnp.tanh, jnp.sign)
    refused(path, "Gains must be a dataclass", known=moved | {"Gains": swish})
    refused(path, "Gains cannot be made of these", known=moved | {"Gains": jb.Elu})
    with pytest.raises(TypeError, match="known must be a list or a dict"):
        jb.load(path, known=Gains)


def test_two_things_of_one_name_are_told_apart(tmp_path):
    f, g = (lambda z: z), (lambda z: 2 * z)
    net = jb.Sequential(jb.Activation(f, g), jb.Activation(g, f))
    jb.save(tmp_path / "a", net, ((), ()))
    text = refused(tmp_path / "a", "<lambda> ")
    assert "known={'<lambda>': ..., '<lambda>#2': ...}" in text
    known = {"<lambda>": f, "<lambda>#2": g}
    assert jb.load(tmp_path / "a", known=known).net == net
    with pytest.raises(ValueError, match="two are called <lambda>; give a dict"):
        jb.load(tmp_path / "a", known=[f, g])


def test_a_subclass_is_the_users_even_where_it_has_our_name(tmp_path):
    class Dense(jb.Dense):
        pass

    net = Dense(2, 2)
    jb.save(tmp_path / "a", net, parameters(shapes_of(net)))
    refused(tmp_path / "a", r"Dense \(net\)")
    assert type(jb.load(tmp_path / "a", known=[Dense]).net) is Dense


def test_what_could_not_be_made_again_is_not_saved(tmp_path):
    class Block(jb.Sequential):
        def __init__(self, width):
            super().__init__(jb.Dense(width, width), jb.Tanh())

    net = Block(2)
    with pytest.raises(ValueError, match=r"Block cannot be made of these.*write a function"):
        jb.save(tmp_path / "a", net, parameters(shapes_of(net)))

    @dataclasses.dataclass(frozen=True)
    class Doubled(jb.Elu):
        def __post_init__(self):
            object.__setattr__(self, "alpha", 2 * self.alpha)

    with pytest.raises(ValueError, match=r"net\.alpha is 2\.0 now, 4\.0 when made again"):
        jb.save(tmp_path / "a", Doubled(1.0), ())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"net": jb.Dense}, TypeError, r"make an instance: add \(\)"),
        ({"net": "mlp"}, TypeError, "must be a layer or a composite"),
        ({"loss": jb.Huber}, TypeError, "loss must be a jbackprop Loss"),
        ({"notes": {"scale": np.ones(2)}}, TypeError, r"take \.tolist\(\)"),
        ({"params": {"w": np.ones((2, 3))}}, ValueError, r"params\['b'\] is missing"),
        ({"params": {"w": 1, "b": 2, "c": 3}}, ValueError, r"params\['c'\] is too many"),
        ({"params": {"w": np.ones((3, 2)), "b": np.ones(3)}}, ValueError, r"net\.w has the shape \(3, 2\), but \(2, 3\)"),
        ({"params": {"w": np.ones((2, 3), int), "b": np.ones(3)}}, ValueError, r"net\.w is int64, but float64"),
        ({"params": {"w": "text", "b": np.ones(3)}}, TypeError, "must be an array of numbers"),
        ({"params": {"w": np.ones((2, 3), object), "b": np.ones(3)}}, TypeError, "must be an array of numbers"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_not_saved(tmp_path, kwargs, error, match):
    net = jb.Dense(2, 3)
    given_ = {"net": net, "params": parameters(shapes_of(net))} | kwargs
    with pytest.raises(error, match=match):
        jb.save(tmp_path / "a", **given_)
    assert not list(tmp_path.iterdir())


def test_saving_inside_jit_is_refused(tmp_path):
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda p: jb.save(tmp_path / "a", jb.Dense(1, 1, bias=False), p))(
            {"w": np.ones((1, 1))}
        )


def test_tuples_and_lists_are_not_mixed_up(tmp_path):
    net = jb.Sequential(jb.Tanh())
    with pytest.raises(ValueError, match="tuples, lists or dicts"):
        jb.save(tmp_path / "a", net, [()])


# What is refused


def test_no_flipped_bit_is_read_as_other_numbers(tmp_path):
    """Each bit of a whole file: either it is refused, or the very same comes back."""
    path = tmp_path / "a"
    net = jb.Dense(1, 1, bias=False, w_init=jax.nn.initializers.zeros)
    jb.save(path, net, {"w": np.full((1, 1), 0.7, "float32")}, notes=[1])
    whole, right = path.read_bytes(), jb.load(path)
    passed = set()
    for i in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[i] ^= 1 << bit
            try:
                file = archive.Archive(io.BytesIO(data))  # for most the end: it is quick
                _ = [file.array(name, (1, 1), np.dtype("float32")) for name in file.entries]
                path.write_bytes(data)
                found = jb.load(path)
            except jb.FormatError:
                pass
            else:
                passed.add(i)
                assert (found.net, found.loss, found.notes, found.version) == (
                    net,
                    None,
                    [1],
                    right.version,
                ), (i, bit)
                assert same(found.params, right.params), (i, bit)
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        for name in file.namelist():
            start = whole.index(file.read(name))
            assert not passed & {*range(start, start + len(file.read(name)))}


def test_a_file_cut_off_anywhere_is_refused(small):
    _, _, path = small
    whole = path.read_bytes()
    for n in range(len(whole)):
        with pytest.raises(jb.FormatError, match="damaged or cut off" if n else "empty"):
            archive.Archive(io.BytesIO(whole[:n]))
    path.write_bytes(whole[:-1])
    refused(path, "copy the file again")


def test_other_files_are_refused(small, tmp_path):
    _, _, path = small
    path.write_text("name,age\n")
    refused(path, "no file of jb.save")
    path.write_bytes(b"")
    refused(path, "the file is empty")
    np.savez(path, x=np.ones(2))
    refused(path, "no network of jb.save but another archive")
    refused(tmp_path, "it is a folder")
    with pytest.raises(FileNotFoundError, match="nothing"):
        jb.load(tmp_path / "nothing")


def test_what_may_not_be_read_is_an_os_error(small):
    _, _, path = small
    path.chmod(0)
    own = os.geteuid()
    try:
        if own == 0:  # who may read everything
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=str(path)):
            jb.load(path)
    finally:
        os.seteuid(own)


def set_(*where, to):
    def change(config):
        inner = config
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_("format", to="safetensors"), "another format"),
        (lambda c: [1], "another format"),
        (set_("version", to=2), r"written by jbackprop 0\.1\.0 in version 2 .* upgrade"),
        (set_("version", to="1"), "upgrade"),
        (lambda c: c.pop("notes") and None, "not complete"),
        (set_("parameters", to=[]), "not complete"),
        (set_("parameters", "layers[0].w", to={"dtype": "float32", "shape": [2, -3]}), r"no sense at layers\[0\]\.w"),
        (set_("parameters", "layers[0].w", "shape", to=[2, 10**15]), r"layers\[0\]\.w has the shape"),
        (set_("parameters", "layers[0].w", "dtype", to="float46"), "which NumPy does not know"),
        (set_("parameters", "layers[0].w", "dtype", to="O"), "object"),
        (set_("parameters", "layers[0].w", "dtype", to="int64"), "is int64, but float64 is needed"),
        (set_("parameters", "layers[0].w", "dtype", to="float32"), r"layers\[0\]\.w\.npy has float64"),
        (set_("parameters", "layers[0].w", "dtype", to="key:dice"), "does not know"),
        (set_("net", "class", to="jbackprop.Hologram"), "needs jbackprop.Hologram, which jbackprop .* has not"),
        (set_("net", "class", to="os.system"), r"os\.system.*Files hold no code"),
        (set_("net", "class", to="jax.numpy.tanh"), "must be a dataclass"),
        (set_("net", to={"name": "jax.numpy.load"}), "it names what is not jbackprop's: jax.numpy.load"),
        (set_("net", to={"pickle": "gASVBg=="}), "is nothing that is known here"),
        (set_("net", to={"class": "jbackprop.SquaredError", "fields": {}}), "makes no network"),
        (set_("net", to=None), "makes no network"),
        (set_("loss", to={"class": "jbackprop.Tanh", "fields": {}}), "loss must be a jbackprop Loss"),
        (set_("net", "fields", "layers", 0, "fields", "q", to=-1), r"net\.layers\[0\]: jbackprop\.Dense cannot be made of these: .*at least 1"),
        (set_("net", "fields", "layers", 0, "fields", "q", to=4), r"layers\[0\]\.b has the shape \(3,\), but \(4,\) is needed"),
        (set_("net", "fields", "layers", 0, "fields", "new", to=4), "unexpected keyword argument 'new'"),
        (set_("net", "fields", "layers", 0, "fields", "bias", to=False), r"it has layers\[0\]\.b, which the network does not have"),
        (set_("net", "fields", "layers", 1, to={"class": "jbackprop.Gain", "fields": {"features": 3}}), "which the network needs"),
        (set_("net", "fields", "layers", 0, "fields", "w_init", to={"name": "jax.numpy.tanh"}), "makes no network"),
        (set_("net", "fields", "layers", to={"list": [{"member": "X", "of": "jax.lax.Precision"}]}), "has no member X"),
        (set_("net", "fields", "layers", to=[{"member": "X", "of": "jax.numpy.tanh"}]), "tanh.* has no member X"),
        (set_("net", "fields", "layers", to={"dtype": "nonsense"}), "no dtype"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense_are_refused(small, change, match):
    _, _, path = small
    changed(path, change)
    refused(path, match)


def test_fields_that_are_new_take_their_defaults(small):
    net, _, path = small
    changed(path, lambda c: c["net"]["fields"]["layers"][0]["fields"].pop("b_init") and None)
    assert jb.load(path).net == net


def npy(array, **kwargs):
    data = io.BytesIO()
    np.lib.format.write_array(data, array, **kwargs)
    return data.getvalue()


def test_arrays_that_are_not_the_networks_are_refused(small):
    _, params, path = small
    whole, name = path.read_bytes(), "layers[0].w.npy"

    def with_(data, match):
        path.write_bytes(whole)
        changed(path, arrays=lambda entries: entries | {name: data})
        refused(path, match)

    with_(npy(np.array([[{}] * 3] * 2, object), allow_pickle=True), "Python objects .* never read")
    with_(npy(params[0]["w"].T.copy()), r"float64 of shape \(3, 2\)")
    with_(npy(params[0]["w"].astype("float32")), "has float32 of shape")
    with_(npy(params[0]["w"].astype(">f8")), "has >f8")
    with_(npy(np.asfortranarray(params[0]["w"])), "changed after")
    with_(npy(params[0]["w"])[:-8], "in 40 bytes")
    with_(npy(params[0]["w"]) + b"more", "in 52 bytes")
    with_(npy(params[0]["w"], version=(2, 0)), "version")
    with_(b"not an array", "magic")
    with_(npy(params[0]["w"]).replace(b"(2, 3)", b"(2, 9)"), "is needed")
    path.write_bytes(whole)
    changed(path, arrays=lambda entries: {k: v for k, v in entries.items() if k != name})
    refused(path, r"layers\[0\]\.w\.npy is missing")
    path.write_bytes(whole)
    changed(path, arrays=lambda entries: entries | {"layers[7].w.npy": b""})
    refused(path, r"layers\[7\]\.w\.npy is missing or too many")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_jb_save_never_writes_are_refused(small):
    _, _, path = small
    whole = path.read_bytes()
    changed(path, compression=zipfile.ZIP_DEFLATED)
    refused(path, "is compressed or encrypted")
    bomb = bytearray(whole)
    at = bomb.index(b"PK\1\2") + 20  # the sizes of config.json
    bomb[at : at + 8] = 2 * (2**31).to_bytes(4, "little")
    path.write_bytes(bomb)
    refused(path, "2147483648 bytes, more than the whole file")
    encrypted = bytearray(whole)
    encrypted[encrypted.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(encrypted)
    refused(path, "is compressed or encrypted")
    for name in ("config.json", "layers[0].w.npy"):
        path.write_bytes(whole)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, b"{}")
        refused(path, "is there twice")
    path.write_bytes(whole)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "[" * 100_000)
    refused(path, "is no JSON")


def test_float64_is_not_cut_to_float32(small, as_jax_comes):
    refused(small[2], r"layers\[0\]\.b is float64, .*jax_enable_x64")


# Whole or not at all


def test_a_full_disk_leaves_the_old_file(small, tmp_path):
    before = small[2].read_bytes()
    code = """
    import resource, numpy as np, jbackprop as jb
    net = jb.Dense(100, 100)
    params = {"w": np.ones((100, 100), "float32"), "b": np.ones(100, "float32")}
    for limit in (0, 100, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            jb.save("net.npz", net, params)
        except OSError as error:
            print(error.errno, end=" ")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    jb.save("other.npz", net, params)
    """
    assert run(code, tmp_path).split() == ["27"] * 3
    assert small[2].read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["net.npz", "other.npz"]


@pytest.mark.parametrize("step", ["open", "writestr", "write_array", "fsync", "replace"])
def test_whatever_fails_the_old_file_is_there_alone(small, monkeypatch, step):
    net, params, path = small
    before = path.read_bytes()
    of = {"open": archive.zipfile.ZipFile, "writestr": archive.zipfile.ZipFile,
          "write_array": np.lib.format}.get(step, os)  # fmt: skip

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(of, step, stop)
        with pytest.raises(KeyboardInterrupt):
            jb.save(path, net, jax.tree.map(lambda a: a + 1, params))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_kill_at_any_write_leaves_the_old_file_or_the_new(tmp_path):
    """The process ends, without any cleaning up, at its n-th call to the operating system."""
    code = """
    import os, sys, zipfile, numpy as np, jbackprop as jb
    net = jb.Dense(2, 1, bias=False)
    params = lambda value: {"w": np.full((2, 1), value, "float32")}

    def counted(f):
        def call(*args, **kwargs):
            sys.audit("jbackprop.before")
            found = f(*args, **kwargs)
            sys.audit("jbackprop.after")
            return found
        return call

    def child(n):
        calls = []
        def hook(event, args):
            calls.extend([event] if event.startswith(("open", "os.rename", "jbackprop")) else [])
            if len(calls) == n:
                os._exit(9)
        sys.addaudithook(hook)
        zipfile.ZipFile.writestr = counted(zipfile.ZipFile.writestr)
        np.lib.format.write_array = counted(np.lib.format.write_array)
        os.fsync = counted(os.fsync)
        jb.save("a", net, params(2.0))
        os._exit(0)

    seen, n, status = [], 0, None
    while status != 0:
        jb.save("a", net, params(1.0))
        n += 1
        pid = os.fork()
        if pid == 0:
            child(n)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen.append((status, float(jb.load("a").params["w"][0, 0])))
    print(seen)
    """
    seen = json.loads(run(code, tmp_path).replace("(", "[").replace(")", "]"))
    assert seen[0] == [9, 1]
    assert seen[-2:] == [[9, 2], [0, 2]]  # after the rename, and without a kill
    assert len(seen) > 10


def test_where_it_is_written(small, tmp_path):
    net, params, path = small
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*no; make it first"):
        jb.save(tmp_path / "no" / "a", net, params)
    with pytest.raises(IsADirectoryError, match="give the name of a file"):
        jb.save(tmp_path, net, params)
    if os.path.exists("/dev/null"):
        with pytest.raises(IsADirectoryError, match="a device"):
            jb.save("/dev/null", net, params)
    link = tmp_path / "link"
    link.symlink_to(path.name)
    path.chmod(0o640)
    jb.save(str(link), net, jax.tree.map(lambda a: a + 1, params))
    assert link.is_symlink()
    assert same(jb.load(path).params, jax.tree.map(lambda a: a + 1, params))
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o440)
    if not os.access(path, os.W_OK):
        with pytest.raises(PermissionError, match="may not be written"):
            jb.save(path, net, params)
