"""Models of Flax, Equinox and Haiku as their users write them, and plain functions, for `capture`.

A model is a cost of one example and parameters, in float64 and small: what is tried is the program
that JAX traces. The weights are drawn here rather than by the libraries, so that biases and scales
are not zeros and ones, and nothing is compiled to make them.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

f64 = jnp.float64
KEY = jax.random.PRNGKey(0)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to be captured.

    Attributes:
        name: of the model.
        build: gives (cost, params, batch).
        every: whether every parameter has a pair, none is written out.
        tolerance: relative; where it is None, that of float64.
    """

    name: str
    build: Callable
    every: bool = True
    tolerance: float | None = None

    def __str__(self):
        return self.name


MODELS = []


def model(**flags):
    """Register what builds (cost, params, batch) of a random generator."""

    def register(build):
        def drawn():
            return build(np.random.default_rng(zlib.crc32(build.__name__.encode())))

        MODELS.append(Model(build.__name__, drawn, **flags))
        return build

    return register


def drawn(rng, shapes):
    """Weights of these shapes; what is not floating is zero."""

    def one(v):
        if not isinstance(v, jax.ShapeDtypeStruct):
            return v
        if not jnp.issubdtype(v.dtype, jnp.floating):
            return jnp.zeros(v.shape, v.dtype)
        return jnp.asarray(rng.normal(size=v.shape) * 0.5)

    return jax.tree.map(one, shapes)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


def tokens(rng, *shape, below=5):
    return jnp.asarray(rng.integers(0, below, shape))


def of_linen(rng, net, *example, method=None):
    """The parameters of a Flax linen module."""
    init = functools.partial(net.init, method=method)
    return drawn(rng, jax.eval_shape(init, KEY, *example))


def of_nnx(rng, make, *filters):
    """The definition and the parameters of a Flax nnx module, and what else it holds."""
    graph, params, rest = nnx.split(nnx.eval_shape(make), *(filters or (nnx.Param,)), ...)
    return graph, drawn(rng, params), drawn(rng, rest)


def of_equinox(rng, make):
    """An Equinox module as (arrays, what is static)."""
    net = drawn(rng, eqx.filter_eval_shape(make))
    return eqx.partition(net, eqx.is_inexact_array)


def of_haiku(rng, net, *example):
    """The parameters of a transformed Haiku function; with its state if it has one."""
    return drawn(rng, jax.eval_shape(lambda: net.init(KEY, *example)))


def squared(z, y):
    return 0.5 * jnp.sum(jnp.square(z - y))


def cross_entropy(logits, labels):
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


# Equinox


@model()
def equinox_mlp(rng):
    params, static = of_equinox(rng, lambda: eqx.nn.MLP(4, 3, 5, 2, jax.nn.gelu, key=KEY))

    def cost(params, x, y):
        return cross_entropy(eqx.combine(params, static)(x), y)

    return cost, params, (normal(rng, 4, 4), tokens(rng, 4, below=3))


class RNN(eqx.Module):
    """The recurrent network of Equinox's examples."""

    cell: eqx.Module
    linear: eqx.nn.Linear
    bias: jax.Array

    def __init__(self, kind):
        self.cell = kind(3, 4, key=KEY)
        self.linear = eqx.nn.Linear(4, 2, use_bias=False, key=KEY)
        self.bias = jnp.zeros(2)

    def __call__(self, xs):
        hidden = jnp.zeros(4)
        hidden = (hidden, hidden) if isinstance(self.cell, eqx.nn.LSTMCell) else hidden

        def turn(carry, x):
            return self.cell(x, carry), None

        out, _ = lax.scan(turn, hidden, xs)
        return self.linear(jax.tree.leaves(out)[0]) + self.bias


def equinox_rnn(rng, kind):
    params, static = of_equinox(rng, lambda: RNN(kind))

    def cost(params, xs, y):
        return squared(eqx.combine(params, static)(xs), y)

    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 2))


@model()
def equinox_gru(rng):
    return equinox_rnn(rng, eqx.nn.GRUCell)


@model()
def equinox_lstm(rng):
    return equinox_rnn(rng, eqx.nn.LSTMCell)


class Pictures(eqx.Module):
    """Convolutions of Equinox, whose examples have no axis of their own."""

    down: eqx.nn.Conv2d
    norm: eqx.nn.GroupNorm
    up: eqx.nn.ConvTranspose2d
    scale: eqx.nn.PReLU
    pool: eqx.nn.MaxPool2d

    def __init__(self):
        self.down = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, key=KEY)
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.up = eqx.nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, key=KEY)
        self.scale = eqx.nn.PReLU()
        self.pool = eqx.nn.MaxPool2d(2, 2)

    def __call__(self, x):
        return self.pool(self.up(self.scale(self.norm(self.down(x)))))


@model()
def equinox_convolutions(rng):
    params, static = of_equinox(rng, Pictures)

    def cost(params, x, y):
        return squared(eqx.combine(params, static)(x), y)

    return cost, params, (normal(rng, 3, 2, 6, 6), normal(rng, 3, 2, 3, 3))


class Transformer(eqx.Module):
    """One layer of a BERT, as in Equinox's example, with rotary positions and dropout."""

    embed: eqx.nn.Embedding
    place: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    rotary: eqx.nn.RotaryPositionalEmbedding
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self):
        self.embed = eqx.nn.Embedding(5, 4, key=KEY)
        self.place = eqx.nn.Embedding(6, 4, key=KEY)
        self.attention = eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, key=KEY)
        self.rotary = eqx.nn.RotaryPositionalEmbedding(2, dtype=f64)
        self.norm = eqx.nn.LayerNorm(4)
        self.mlp = eqx.nn.MLP(4, 4, 6, 1, key=KEY)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, ids, key):
        x = jax.vmap(self.embed)(ids) + jax.vmap(self.place)(jnp.arange(len(ids)))
        x = jax.vmap(self.norm)(self.dropout(x, key=key))

        def turned(q, k, v):
            return jax.vmap(self.rotary, 1, 1)(q), jax.vmap(self.rotary, 1, 1)(k), v

        mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
        x = x + self.attention(x, x, x, mask, process_heads=turned)
        return jax.vmap(self.embed.weight.__matmul__)(x + jax.vmap(self.mlp)(x))


@model()
def equinox_transformer_dropout_keys(rng):
    params, static = of_equinox(rng, Transformer)

    def cost(params, ids, key):
        return cross_entropy(eqx.combine(params, static)(ids[:-1], key), ids[1:])

    return cost, params, (tokens(rng, 3, 5), jax.random.split(jax.random.key(1), 3))


@model()
def equinox_ensemble(rng):
    def make():
        keys = jax.random.split(KEY, 3)
        return eqx.filter_vmap(lambda key: eqx.nn.MLP(3, 2, 4, 1, key=key))(keys)

    params, static = of_equinox(rng, make)

    @functools.partial(eqx.filter_vmap, in_axes=(eqx.if_array(0), None))
    def answers(net, x):
        return net(x)

    def cost(params, x, y):
        return squared(jnp.mean(answers(eqx.combine(params, static), x), axis=0), y)

    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 2))


@model()
def equinox_siamese(rng):
    params, static = of_equinox(rng, lambda: eqx.nn.MLP(3, 2, 4, 1, key=KEY))

    def cost(params, one, two, same):
        net = eqx.combine(params, static)
        distance = jnp.sum(jnp.square(net(one) - net(two)))
        return jnp.where(same, distance, jnp.square(jax.nn.relu(2.0 - distance)))

    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 3), jnp.arange(4) % 2 == 0)


@model()
def equinox_shared_layer(rng):
    """A tree with a shared part, which `eqx.nn.Shared` ties."""

    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            embed = eqx.nn.Embedding(5, 3, key=KEY)
            head = eqx.nn.Linear(3, 5, key=KEY)
            self.shared = eqx.nn.Shared(
                (embed, head), where=lambda p: p[1].weight, get=lambda p: p[0].weight
            )

        def __call__(self, ids):
            embed, head = self.shared()
            return jax.vmap(head)(jnp.tanh(jax.vmap(embed)(ids)))

    params, static = of_equinox(rng, Tied)

    def cost(params, ids):
        return cross_entropy(eqx.combine(params, static)(ids[:-1]), ids[1:])

    return cost, params, (tokens(rng, 3, 5),)


@model(every=False)
def equinox_weight_norm(rng):
    params, static = of_equinox(
        rng, lambda: eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY), weight_name="weight")
    )

    def cost(params, x, y):
        return squared(eqx.combine(params, static)(x), y)

    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 4))


# Flax nnx


class Cnn(nnx.Module):
    """Convolutions with strides, groups and holes; norms; pools."""

    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.apart = nnx.Conv(4, 4, (3, 3), feature_group_count=4, use_bias=False, rngs=rngs)
        self.holes = nnx.Conv(4, 3, (2, 2), kernel_dilation=2, padding="VALID", rngs=rngs)
        self.groups = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.last = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.groups(self.first(x)))
        x = nnx.max_pool(self.apart(x), (2, 2))
        x = nnx.silu(self.norm(self.holes(x)))
        x = nnx.avg_pool(x, (2, 2), strides=(1, 1), padding="SAME")
        return self.last(jnp.mean(x, axis=(1, 2)))


@model()
def nnx_cnn(rng):
    graph, params, _ = of_nnx(rng, lambda: Cnn(nnx.Rngs(0)))

    def cost(params, x, y):
        return cross_entropy(nnx.merge(graph, params)(x[None])[0], y)

    return cost, params, (normal(rng, 3, 12, 12, 2), tokens(rng, 3, below=3))


class Block(nnx.Module):
    """A block of a transformer."""

    def __init__(self, rngs):
        self.before = nnx.LayerNorm(4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 4, dropout_rate=0.1, deterministic=True, decode=False, rngs=rngs
        )  # without dropout JAX's own attention is taken, whose softmax is in float32
        self.between = nnx.RMSNorm(4, rngs=rngs)
        self.up = nnx.Linear(4, 6, rngs=rngs)
        self.down = nnx.Linear(6, 4, rngs=rngs)

    @nnx.remat
    def __call__(self, x, mask):
        x = x + self.attention(self.before(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class Gpt(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, param_dtype=f64, rngs=rngs)
        self.places = nnx.Param(jnp.zeros((6, 4)))
        self.blocks = nnx.List([Block(rngs) for _ in range(1)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids) + self.places[: len(ids)]
        mask = nnx.make_causal_mask(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


@model()
def nnx_transformer(rng):
    graph, params, rest = of_nnx(rng, lambda: Gpt(nnx.Rngs(0)))

    def cost(params, ids):
        return cross_entropy(nnx.merge(graph, params, rest, copy=True)(ids[:-1]), ids[1:])

    return cost, params, (tokens(rng, 3, 6),)


class Recurrent(nnx.Module):
    def __init__(self, kind, rngs, **options):
        self.rnn = nnx.RNN(kind(3, 4, rngs=rngs, param_dtype=f64), rngs=rngs, **options)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, xs):
        return self.head(self.rnn(xs))


def nnx_rnn(rng, kind, **options):
    graph, params, rest = of_nnx(rng, lambda: Recurrent(kind, nnx.Rngs(0), **options))

    def cost(params, xs, y):
        return squared(nnx.merge(graph, params, rest, copy=True)(xs[None])[0], y)

    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 5, 2))


@model()
def nnx_lstm(rng):
    return nnx_rnn(rng, nnx.LSTMCell)


@model()
def nnx_optimized_lstm(rng):
    return nnx_rnn(rng, nnx.OptimizedLSTMCell, reverse=True, keep_order=True)


@model()
def nnx_scanned_stack(rng):
    """Layers made by `nnx.vmap` and run by `nnx.scan`, as Flax's guide has it."""

    class Stack(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.layers = make(rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return x + jnp.tanh(layer(x))

            return self.head(run(x, self.layers))

    graph, params, rest = of_nnx(rng, lambda: Stack(nnx.Rngs(0)))

    def cost(params, x, y):
        return squared(nnx.merge(graph, params, rest)(x), y)

    return cost, params, (normal(rng, 4, 4), normal(rng, 4, 2))


@model()
def nnx_lora(rng):
    """Adapters learn; what they are added to is closed over."""

    class Adapted(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
            self.last = nnx.LoRA(4, 2, 2, base_module=nnx.Linear(4, 2, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    graph, params, rest = of_nnx(rng, lambda: Adapted(nnx.Rngs(0)), nnx.LoRAParam)

    def cost(params, x, y):
        return squared(nnx.merge(graph, params, rest)(x), y)

    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 2))


@model()
def nnx_batch_norm_as_it_stands(rng):
    """A batch norm that uses its averages."""

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3,), rngs=rngs)
            self.norm = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)
            self.up = nnx.ConvTranspose(3, 2, (3,), strides=2, rngs=rngs)

        def __call__(self, x):
            return self.up(nnx.relu(self.norm(self.conv(x))))

    graph, params, rest = of_nnx(rng, lambda: Normed(nnx.Rngs(0)))
    rest = jax.tree.map(lambda v: jnp.abs(v) + 0.5, rest)

    def cost(params, x, y):
        return squared(nnx.merge(graph, params, rest)(x[None])[0], y)

    return cost, params, (normal(rng, 3, 5, 2), normal(rng, 3, 10, 2))


@model()
def nnx_einsum(rng):
    class Mixed(nnx.Module):
        def __init__(self, rngs):
            self.heads = nnx.Einsum("th,hgd->tgd", (3, 2, 4), (2, 4), rngs=rngs)
            self.spread = nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            return self.spread(jnp.tanh(self.heads(x)))

    graph, params, rest = of_nnx(rng, lambda: Mixed(nnx.Rngs(0)))

    def cost(params, x, y):
        return squared(nnx.merge(graph, params, rest)(x), y)

    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 5, 3))


# Flax linen


class TiedGpt(nn.Module):
    """A decoder that reads with the table that it embeds with."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(5, 4)
        places = self.param("places", nn.initializers.normal(), (6, 4))
        x = embed(ids) + places[: len(ids)]
        mask = nn.make_causal_mask(ids)
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h, mask=mask)
        x = x + nn.SelfAttention(2, use_bias=False)(nn.LayerNorm(use_bias=False)(x), mask)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


@model()
def linen_transformer(rng):
    net = TiedGpt()
    params = of_linen(rng, net, jnp.zeros(5, int))

    def cost(params, ids):
        return cross_entropy(net.apply(params, ids[:-1]), ids[1:])

    return cost, params, (tokens(rng, 3, 6),)


@model()
def linen_lstm(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, xs):
            forth = nn.RNN(nn.OptimizedLSTMCell(3, param_dtype=f64))
            back = nn.RNN(nn.SimpleCell(3, param_dtype=f64))
            return nn.Dense(2)(nn.Bidirectional(forth, back)(xs))

    net = Net()
    params = of_linen(rng, net, jnp.zeros((1, 5, 3)))

    def cost(params, xs, y):
        return squared(net.apply(params, xs[None])[0], y)

    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 5, 2))


class Layer(nn.Module):
    """A block with a carry, as `nn.scan` wants it."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(5)(nn.LayerNorm()(x))))
        return x, None


class Plain(nn.Module):
    """A block, as `nn.remat_scan` wants it."""

    @nn.compact
    def __call__(self, x):
        return x + nn.tanh(nn.Dense(4)(x))


@model()
def linen_scan_of_remat(rng):
    """Blocks in a scan as in Flax's large language models; then scans in scans."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                nn.remat(Layer, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = stack()(x, None)
            return nn.remat_scan(Plain, lengths=(2, 2))()(x)

    net = Net()
    params = of_linen(rng, net, jnp.zeros((5, 4)))

    def cost(params, x, y):
        return squared(net.apply(params, x), y)

    return cost, params, (normal(rng, 3, 5, 4), normal(rng, 3, 5, 4))


@model()
def linen_ensemble(rng):
    """Weights with an axis of their own by `nn.vmap`, and `nn.DenseGeneral` with one by name."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
            x = many(4)(x)
            return nn.DenseGeneral(2, axis=-1, batch_dims=(0,))(nn.tanh(x))

    net = Net()
    params = of_linen(rng, net, jnp.zeros((3, 4, 3)))

    def cost(params, x, y):
        return squared(net.apply(params, x), y)

    return cost, params, (normal(rng, 3, 3, 4, 3), normal(rng, 3, 3, 4, 2))


class Vit(nn.Module):
    """A vision transformer: patches, a token of the class, learned positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), strides=(2, 2), padding="VALID")(x)
        x = x.reshape(1, -1, 4)
        token = self.param("cls", nn.initializers.zeros, (1, 1, 4))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("places", nn.initializers.normal(), (1, 5, 4))
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(h, h)
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


@model()
def linen_vit(rng):
    net = Vit()
    params = of_linen(rng, net, jnp.zeros((1, 4, 4, 2)))

    def cost(params, x, y):
        return cross_entropy(net.apply(params, x[None])[0], y)

    return cost, params, (normal(rng, 3, 4, 4, 2), tokens(rng, 3, below=3))


@model()
def linen_convolutions(rng):
    """In one dimension and in three, transposed, circular and local; a batch norm as it stands."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, v):
            x = nn.Conv(3, (3,), padding="CIRCULAR")(x)
            x = nn.BatchNorm(use_running_average=True)(x)
            x = nn.ConvTranspose(2, (3,), strides=(2,), transpose_kernel=False)(nn.relu(x))
            x = nn.ConvTranspose(3, (4,), strides=(2,), transpose_kernel=True, padding="VALID")(x)
            x = nn.ConvLocal(2, (3,), strides=(3,))(x)
            v = nn.Conv(2, (2, 3, 2), kernel_dilation=(1, 1, 2))(v)
            v = nn.InstanceNorm()(v)
            return jnp.sum(x, axis=(0, 1)) + jnp.mean(jnp.square(v), axis=(0, 1, 2, 3))

    net = Net()
    found = of_linen(rng, net, jnp.zeros((1, 5, 2)), jnp.zeros((1, 3, 3, 3, 2)))
    params, stats = found["params"], jax.tree.map(lambda v: jnp.abs(v) + 0.5, found["batch_stats"])

    def cost(params, x, v, y):
        out = net.apply({"params": params, "batch_stats": stats}, x[None], v[None])
        return squared(out, y)

    return cost, params, (normal(rng, 3, 5, 2), normal(rng, 3, 3, 3, 3, 2), normal(rng, 3, 2))


@model()
def linen_conv_lstm(rng):
    net = nn.RNN(nn.ConvLSTMCell(2, (2,), param_dtype=f64))
    params = of_linen(rng, net, jnp.zeros((1, 4, 3, 2)))

    def cost(params, xs, y):
        return squared(net.apply(params, xs[None])[0], y)

    return cost, params, (normal(rng, 3, 4, 3, 2), normal(rng, 3, 4, 3, 2))


@model(every=False)
def linen_weight_and_spectral_norm(rng):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.WeightNorm(nn.Dense(4))(x)
            return nn.SpectralNorm(nn.Dense(3))(nn.tanh(x), update_stats=False)

    net = Net()
    found = of_linen(rng, net, jnp.zeros(3))
    rest = {"batch_stats": found["batch_stats"]}

    def cost(params, x, y):
        return squared(net.apply({"params": params, **rest}, x), y)

    return cost, found["params"], (normal(rng, 4, 3), normal(rng, 4, 3))


@model()
def linen_relative_positions(rng):
    """A table of biases for each distance and head, as in T5."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            n = x.shape[0]
            q, k, v = jnp.split(nn.DenseGeneral((2, 6))(x), 3, axis=-1)
            distance = jnp.clip(jnp.arange(n)[:, None] - jnp.arange(n)[None], -2, 2) + 2
            bias = nn.Embed(5, 2)(distance).transpose(2, 0, 1)
            weights = nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) + bias)
            heads = jnp.einsum("hqk,khd->qhd", weights, v)
            return nn.DenseGeneral(3, axis=(-2, -1))(heads)

    net = Net()
    params = of_linen(rng, net, jnp.zeros((5, 3)))

    def cost(params, x, y):
        return squared(net.apply(params, x), y)

    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 5, 3))


@model(tolerance=2e-2)
def linen_mixed_precision(rng):
    """Parameters in float32, computed with in bfloat16, whose numbers have 8 bits.

    Both are the same numbers in another order: sums over positions are rounded here and not there.
    """

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(8, dtype=jnp.bfloat16)(x)
            x = nn.LayerNorm(dtype=jnp.bfloat16)(nn.gelu(x))
            return nn.Dense(3, dtype=jnp.bfloat16)(x)

    net = Net()
    params = of_linen(rng, net, jnp.zeros((4, 3), jnp.float32))
    params = jax.tree.map(lambda v: v.astype(jnp.float32), params)

    def cost(params, x, y):
        return squared(net.apply(params, x).astype(jnp.float32), y)

    x, y = normal(rng, 3, 4, 3), normal(rng, 3, 4, 3)
    return cost, params, (x.astype(jnp.float32), y.astype(jnp.float32))


# Haiku


@model()
def haiku_mlp(rng):
    def forward(x):
        return hk.nets.MLP([5, 4, 3], activation=jnp.tanh)(x)

    net = hk.without_apply_rng(hk.transform(forward))
    params = of_haiku(rng, net, jnp.zeros(4))

    def cost(params, x, y):
        return cross_entropy(net.apply(params, x), y)

    return cost, params, (normal(rng, 4, 4), tokens(rng, 4, below=3))


def haiku_rnn(rng, make):
    def forward(xs):
        cell = make()
        out, _ = hk.dynamic_unroll(cell, xs, cell.initial_state(None))
        return hk.Linear(2)(out)

    net = hk.without_apply_rng(hk.transform(forward))
    params = of_haiku(rng, net, jnp.zeros((5, 3)))

    def cost(params, xs, y):
        return squared(net.apply(params, xs), y)

    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 5, 2))


@model()
def haiku_gru(rng):
    return haiku_rnn(rng, lambda: hk.GRU(4))


@model()
def haiku_deep_rnn(rng):
    def make():
        return hk.DeepRNN([hk.LSTM(3), jnp.tanh, hk.VanillaRNN(4)])

    return haiku_rnn(rng, make)


@model()
def haiku_layer_stack_of_attention(rng):
    """Haiku's own scan over layers, with its attention and a forward pass that is recomputed."""

    def forward(x):
        def block(x):
            init = hk.initializers.VarianceScaling()
            h = hk.LayerNorm(-1, True, True)(x)
            x = x + hk.MultiHeadAttention(2, 2, w_init=init, model_size=4)(h, h, h)
            return x + hk.remat(hk.Linear(4))(jax.nn.silu(hk.RMSNorm(-1)(x)))

        return hk.experimental.layer_stack(2)(block)(x)

    net = hk.without_apply_rng(hk.transform(forward))
    params = of_haiku(rng, net, jnp.zeros((4, 4)))

    def cost(params, x, y):
        return squared(net.apply(params, x), y)

    return cost, params, (normal(rng, 3, 4, 4), normal(rng, 3, 4, 4))


def haiku_pictures(rng, make):
    def forward(x, is_training=False):
        return make()(x, is_training)

    net = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = of_haiku(rng, net, jnp.zeros((1, 8, 8, 2)), True)
    state = jax.tree.map(lambda v: jnp.abs(v) + 0.5, state)

    def cost(params, x, y):
        return cross_entropy(net.apply(params, state, x[None])[0][0], y)

    return cost, params, (normal(rng, 3, 8, 8, 2), tokens(rng, 3, below=3))


@model()
def haiku_resnet(rng):
    """Haiku's ResNet of few layers and channels, as it is asked after training."""

    def make():
        return hk.nets.ResNet(
            (1, 1, 0, 0), 3, bottleneck=False, channels_per_group=(4, 4, 4, 4),
            use_projection=(True, True, False, False),
        )  # fmt: skip

    return haiku_pictures(rng, make)


@model(every=False)
def haiku_vq_vae(rng):
    """A quantised code; the table learns from the cost of its own, the decoder straight through."""

    def forward(x):
        z = hk.Linear(3)(x)
        code = hk.nets.VectorQuantizer(3, 5, 0.25)(z, is_training=True)
        return hk.Linear(4)(code["quantize"]), code["loss"]

    net = hk.without_apply_rng(hk.transform(forward))
    params = of_haiku(rng, net, jnp.zeros((6, 4)))

    def cost(params, x):
        out, own = net.apply(params, x)
        return squared(out, x) + own

    return cost, params, (normal(rng, 3, 6, 4),)


# Plain functions


def weights(rng, **shapes):
    return {name: normal(rng, *shape) for name, shape in shapes.items()}


@model()
def stack_inside_time(rng):
    """A scan over layers in a scan over time, and a read-out in both."""

    def cost(params, xs, y):
        def step(h, x):
            def layer(x, own):
                w, u, h = own
                h = jnp.tanh(w @ x + u @ h)
                return h, h

            top, h = lax.scan(layer, x, (params["w"], params["u"], h))
            return h, params["out"] @ top

        _, out = lax.scan(step, jnp.zeros((2, 3)), xs)
        return squared(out, y)

    params = weights(rng, w=(2, 3, 3), u=(2, 3, 3), out=(2, 3))
    return cost, params, (normal(rng, 3, 5, 3), normal(rng, 3, 5, 2))


@model()
def time_inside_stack(rng):
    """A scan over time in a scan over layers in a scan over stages."""

    def cost(params, xs, y):
        def layer(xs, own):
            w, b = own

            def step(h, x):
                h = jnp.tanh(w @ jnp.concatenate([x, h]) + b + params["shared"])
                return h, h

            return lax.scan(step, jnp.zeros(3), xs)[1], None

        def stage(xs, own):
            return lax.scan(layer, xs, own)

        out, _ = lax.scan(stage, xs, (params["w"], params["b"]))
        return squared(out, y)

    params = weights(rng, w=(2, 2, 3, 6), b=(2, 2, 3), shared=(3,))
    return cost, params, (normal(rng, 3, 4, 3), normal(rng, 3, 4, 3))


@model()
def ensemble_of_vmap(rng):
    def net(params, x):
        return params["v"] @ jnp.tanh(params["w"] @ x + params["b"])

    def cost(params, x, y):
        return squared(jnp.mean(jax.vmap(net, (0, None))(params, x), axis=0), y)

    params = weights(rng, w=(3, 4, 2), b=(3, 4), v=(3, 2, 4))
    return cost, params, (normal(rng, 4, 2), normal(rng, 4, 2))


@model()
def autoencoder_of_one_matrix(rng):
    def cost(params, x):
        code = jnp.tanh(x @ params["w"] + params["b"])
        return squared(code @ params["w"].T + params["c"], x)

    return cost, weights(rng, w=(5, 3), b=(3,), c=(5,)), (normal(rng, 4, 5),)


@model()
def slices_of_one_matrix(rng):
    """Gates side by side, rows put together with others, every second column from the back."""

    def cost(params, x, y):
        w = params["w"]
        gate, value = jnp.split(x @ w[:3] + w[3], 2)
        z = jax.nn.sigmoid(gate) * value
        both = jnp.concatenate([w[:2, :4], params["u"]], axis=0)
        return squared(both @ z + w[:4, ::-2] @ jnp.ones(4) + w[0, :4].reshape(2, 2)[0, 0], y)

    params = weights(rng, w=(4, 8), u=(2, 4))
    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 4))


@model(every=False)
def masked_weights(rng):
    mask = jnp.tril(jnp.ones((4, 4)), -1)

    def cost(params, x, y):
        return squared((params["w"] * mask) @ x + jnp.where(mask[0] > 0, params["b"], 0.0), y)

    return cost, weights(rng, w=(4, 4), b=(4,)), (normal(rng, 4, 4), normal(rng, 4, 4))


@model(every=False)
def adapters_merged(rng):
    """W + B A, of which only B and A learn; then beside W, as pairs."""
    base = normal(rng, 4, 3)

    def cost(params, x, y):
        merged = base + 0.5 * params["b"] @ params["a"]
        beside = base @ x + 0.5 * params["d"] @ (params["c"] @ x)
        return squared(merged @ x + beside, y)

    params = weights(rng, b=(4, 2), a=(2, 3), d=(4, 2), c=(2, 3))
    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 4))


@model()
def dropout_of_keys(rng):
    def cost(params, x, y, key):
        h = jnp.tanh(params["w"] @ x)
        keep = jax.random.bernoulli(key, 0.7, h.shape)
        return squared(params["v"] @ jnp.where(keep, h / 0.7, 0.0), y)

    params = weights(rng, w=(5, 3), v=(2, 5))
    keys = jax.random.split(jax.random.key(2), 4)
    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 2), keys)


@model()
def soft_mixture_of_experts(rng):
    def cost(params, x, y):
        gate = jax.nn.softmax(x @ params["gate"])
        h = jax.nn.relu(jnp.einsum("ti,eih->teh", x, params["up"]))
        out = jnp.einsum("te,teh,eho->to", gate, h, params["down"])
        return squared(out, y)

    params = weights(rng, gate=(3, 2), up=(2, 3, 4), down=(2, 4, 3))
    return cost, params, (normal(rng, 3, 4, 3), normal(rng, 3, 4, 3))


@model()
def mixture_of_experts_by_index(rng):
    """Each token's expert is looked up, weights and all."""

    def cost(params, x, y):
        gate = jax.nn.softmax(x @ params["gate"])
        best = jnp.argmax(gate, axis=-1)
        w = params["experts"][best]
        return squared(jnp.max(gate, axis=-1)[:, None] * jnp.einsum("ti,tio->to", x, w), y)

    params = weights(rng, gate=(3, 2), experts=(2, 3, 3))
    return cost, params, (normal(rng, 3, 4, 3), normal(rng, 3, 4, 3))


@model(every=False)
def choice_by_the_data(rng):
    def cost(params, x, y):
        z = lax.cond(x[0] > 0, lambda: params["a"] @ x, lambda: params["b"] @ jnp.sin(x))
        return squared(params["c"] * z, y)

    params = weights(rng, a=(3, 3), b=(3, 3), c=(3,))
    return cost, params, (normal(rng, 4, 3), normal(rng, 4, 3))


@model(every=False)
def penalties(rng):
    """Weight decay, a norm and an entropy of weights within the cost of one example."""

    def cost(params, x, y):
        z = params["w"] @ x / jnp.linalg.norm(params["w"])
        decay = 0.1 * sum(jnp.sum(jnp.square(p)) for p in params.values())
        return squared(z + params["b"], y) + decay + jnp.sum(jax.nn.softmax(params["b"]) ** 2)

    return cost, weights(rng, w=(2, 3), b=(2,)), (normal(rng, 4, 3), normal(rng, 4, 2))


@model(every=False)
def weight_norm_by_hand(rng):
    """g v / |v|: g has a pair, v is within a norm."""

    def cost(params, x, y):
        direction = params["v"] / jnp.linalg.norm(params["v"], axis=1, keepdims=True)
        return squared(params["g"][:, None] * direction @ x + params["g"], y)

    return cost, weights(rng, v=(2, 3), g=(2,)), (normal(rng, 4, 3), normal(rng, 4, 2))


@model()
def learned_queries(rng):
    """A token and queries that are learned, beside those of the example."""

    def cost(params, x, y):
        x = jnp.concatenate([params["token"][None], x @ params["in"]])
        keys, values = jnp.split(x @ params["kv"], 2, axis=-1)
        scores = jnp.einsum("qd,kd->qk", params["queries"], keys) / jnp.sqrt(2.0)
        return squared(jax.nn.softmax(scores) @ values, y)

    params = weights(rng, token=(3,), kv=(3, 4), queries=(2, 2)) | {"in": normal(rng, 2, 3)}
    return cost, params, (normal(rng, 3, 4, 2), normal(rng, 3, 2, 2))


@model(every=False)
def diagonal_recurrence(rng):
    """An S5-like layer: exp(log_a) along time by an associative scan."""

    def cost(params, u, y):
        a = jnp.exp(-jnp.exp(params["log_a"]))
        inputs = u @ params["b"].T
        both = (jnp.broadcast_to(a, inputs.shape), inputs)
        _, x = lax.associative_scan(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), both)
        return squared(jax.nn.gelu(x @ params["c"].T + u * params["d"]), y)

    params = weights(rng, log_a=(3,), b=(3, 2), c=(2, 3), d=(2,))
    return cost, params, (normal(rng, 3, 5, 2), normal(rng, 3, 5, 2))


@model()
def film_and_hyper_network(rng):
    """The condition makes scales and shifts of one layer, and the weights of the next."""

    def cost(params, x, condition, y):
        scale, shift = jnp.split(params["film"] @ condition, 2)
        h = jnp.tanh((params["w"] @ x) * (1 + scale) + shift)
        made = (params["hyper"] @ condition + params["base"]).reshape(2, 3)
        return squared(made @ h, y)

    params = weights(rng, film=(6, 2), w=(3, 2), hyper=(6, 2), base=(6,))
    return cost, params, (normal(rng, 4, 2), normal(rng, 4, 2), normal(rng, 4, 2))


@model()
def windows_of_a_table(rng):
    """A table of positions from where the example begins, one weight of many by its number."""

    def cost(params, x, start, which, y):
        places = lax.dynamic_slice(params["places"], (start, 0), (4, 3))
        w = lax.dynamic_index_in_dim(params["w"], which, keepdims=False)
        return squared((x + places) @ w + params["b"][which], y)

    params = weights(rng, places=(7, 3), w=(3, 3, 2), b=(3, 2))
    rest = (tokens(rng, 4), tokens(rng, 4, below=3), normal(rng, 4, 4, 2))
    return cost, params, (normal(rng, 4, 4, 3), *rest)


@model()
def loop_of_fixed_length(rng):
    def cost(params, x, y):
        def turn(k, z):
            return jnp.tanh(params["w"] @ z + params["b"] * k)

        return squared(lax.fori_loop(0, 4, turn, x), y)

    return cost, weights(rng, w=(3, 3), b=(3,)), (normal(rng, 4, 3), normal(rng, 4, 3))


@jax.custom_vjp
def clipped_dot(w, x):
    """A product whose delta is bounded on its way back."""
    return w @ x


clipped_dot.defvjp(
    lambda w, x: (w @ x, (w, x)),
    lambda saved, d: (jnp.outer(jnp.clip(d, -1, 1), saved[1]), saved[0].T @ jnp.clip(d, -1, 1)),
)


@jax.custom_jvp
def steep(b, x):
    """A step with a slope that it does not have."""
    return jnp.where(x > b, 1.0, 0.0)


@steep.defjvp
def steep_slope(primals, tangents):
    (b, x), (db, dx) = primals, tangents
    return steep(b, x), (dx - db) * jax.nn.sigmoid(x - b) * jax.nn.sigmoid(b - x)


@model(every=False)
def rules_of_its_own(rng):
    def cost(params, x, y):
        spikes = steep(params["b"], clipped_dot(params["w"], x))
        return squared(params["v"] @ spikes, y)

    return cost, weights(rng, w=(3, 2), b=(3,), v=(2, 3)), (normal(rng, 4, 2), normal(rng, 4, 2))


@model(every=False)
def spectral_convolution(rng):
    """A Fourier layer: complex weights of two real ones, and the transform of another."""

    def cost(params, x, y):
        spectrum = jnp.fft.rfft(x) * lax.complex(params["re"], params["im"])
        z = jnp.fft.irfft(spectrum, 6) + params["skip"] * x
        long = jnp.fft.irfft(jnp.fft.rfft(params["filter"]) * jnp.fft.rfft(x), 6)
        return squared(jnp.tanh(z) + long, y)

    params = weights(rng, re=(4,), im=(4,), skip=(1,), filter=(6,))
    return cost, params, (normal(rng, 3, 6), normal(rng, 3, 6))


@model()
def einsums(rng):
    """Groups; a weight of three axes in a chain: a bilinear form."""

    def cost(params, x, y):
        z = jnp.einsum("ghi,gi->gh", params["groups"], x)
        z = z + jnp.einsum("gi,jhi,gj->gh", x, params["bilinear"], x)
        return squared(z, y)

    params = weights(rng, groups=(2, 4, 3), bilinear=(3, 4, 3))
    return cost, params, (normal(rng, 4, 2, 3), normal(rng, 4, 2, 4))
