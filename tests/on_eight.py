"""What a mesh of eight devices computes, sends and holds: printed as JSON, for test_mesh.py.

A program of its own, because the number of devices is fixed when JAX starts:
XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/on_eight.py
"""

import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent.parent))

import jbackprop as jb
from jbackprop.factored import base

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
base.AT_ONCE = 1 << 11  # so that a few examples are taken at a time, as in large networks

B, BOUND = 16, 0.7
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
WEIGHTS = np.concatenate([RNG.uniform(0.1, 2, 12), [0, 0, 0, 0]])  # two shards of eight are empty
WEIGHTS[4] = 0
SHAPES = {"8x1": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
TOKENS = RNG.integers(0, 32, (B, 8)), RNG.integers(0, 32, (B, 8))
GPT = jb.transformer(32, 16, 3, 4, 8)
NETS = {
    "mlp": (jb.mlp([6, 16, 16, 4]), jb.SoftmaxCrossEntropy(), RNG.normal(size=(B, 6)),
            RNG.integers(0, 4, B)),
    "cnn": (jb.cnn((8, 8, 2), (8, 16), 5), jb.SoftmaxCrossEntropy(),
            RNG.normal(size=(B, 8, 8, 2)), RNG.integers(0, 5, B)),
    "tied": (jb.transformer(32, 16, 3, 4, 8, tied=True),
             jb.FusedSoftmaxCrossEntropy(vocab_block=8), *TOKENS),
}  # fmt: skip


def mesh_of(shape, explicit=False):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    devices = np.array(jax.devices()).reshape(SHAPES[shape])
    return Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def sharding_of(shape, net):
    if shape == "8x1":
        return jb.sharding.fsdp("data", smallest=64)
    fsdp = "data" if shape == "2x4" else None
    return jb.sharding.tensor_parallel(net, fsdp=fsdp, smallest=64)


def with_nan(x):
    """The examples of weight 0 hold NaN, where they can."""
    if not np.issubdtype(x.dtype, np.floating):
        return x
    return np.where((WEIGHTS == 0).reshape(-1, *(1,) * (x.ndim - 1)), np.nan, x)


def answers(net, loss, params, x, clean, y, weights):
    """Cost, gradient, norms, clipped sum and K-FAC factors of a mini-batch."""
    value, grads = jb.value_and_grad(net, loss)(params, x, y, weights)
    pairs = jb.per_example.deferred(net, loss, params, x, y)
    clipped = jb.per_example.clipped_gradient(pairs, BOUND, weights=weights)
    factors = jb.curvature.kfac(net, loss, params, clean, y, key=KEY)
    return {
        "value": value, "gradient": grads, "clipped": clipped.gradient, "norms": clipped.norms,
        "factors": jax.tree.leaves(factors), "fraction": clipped.clipped_fraction,
    }  # fmt: skip


def truth(net, loss, params, x, y, weights):
    """The same but for the factors, by autodiff, of one example at a time."""

    def cost(params, x, y):
        outputs = jb.forward(net, params, x[None])[0]
        return jb.SoftmaxCrossEntropy().value(outputs, y[None])[0]

    costs, each = jax.vmap(jax.value_and_grad(cost), in_axes=(None, 0, 0))(params, x, y)
    squares = (jnp.sum(jnp.square(g.reshape(B, -1)), axis=1) for g in jax.tree.leaves(each))
    norms = weights * jnp.sqrt(sum(squares))
    factors = weights * jnp.minimum(1, BOUND / jnp.where(norms == 0, 1, norms))

    def summed(w):
        return jax.tree.map(lambda g: jnp.tensordot(w, g, 1), each)

    return {
        "value": jnp.sum(weights * costs), "gradient": summed(weights),
        "clipped": summed(factors), "norms": norms,
        "fraction": jnp.sum(norms > BOUND) / jnp.sum(weights != 0),
    }  # fmt: skip


def apart(found, due):
    """The largest difference, over the largest entry, of two trees."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True)
    return max(
        float(np.max(np.abs(np.asarray(a) - np.asarray(b))) / max(np.max(np.abs(b)), 1e-300))
        if np.all(np.isfinite(a))
        else math.inf
        for a, b in pairs
    )


def numbers(name, meshes):
    """How far every answer on every mesh is from one device's, and that from autodiff's."""
    net, loss, x, y = NETS[name]
    params = net.init(jax.random.key(0))
    batch = (with_nan(x), x, y, WEIGHTS)

    def ask(params, *batch):
        return answers(net, loss, params, *batch)

    one = jax.jit(ask)(params, *batch)
    due = jax.jit(lambda *args: truth(net, loss, *args))(params, x, y, WEIGHTS)
    found = {"autodiff": {key: apart(one[key], due[key]) for key in due}}
    for shape, explicit in meshes:
        mesh, sharding = mesh_of(shape, explicit), sharding_of(shape, net)
        placed = jb.sharding.place(net, params, mesh, sharding)
        batches = jb.sharding.put(batch, sharding.examples, mesh)
        got = jax.jit(ask)(placed, *batches)
        label = f"{shape} {'explicit' if explicit else 'automatic'}"
        found[label] = {key: apart(got[key], one[key]) for key in one}
        if explicit:
            places = zip(jax.tree.leaves(got["gradient"]), jax.tree.leaves(placed), strict=True)
            same = all(g.sharding.is_equivalent_to(p.sharding, p.ndim) for g, p in places)
            found[label]["places"] = bool(same and got["norms"].sharding.spec == P("data"))
    return found


KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
INSIDE = "body|branch_computations|true_computation|false_computation"
BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "s64": 8, "u64": 8, "pred": 1}


def size_of(shape):
    """The bytes of an HLO shape, or of a tuple of them."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        BYTES[kind] * math.prod(int(d) for d in dims.split(",") if d) for kind, dims in found
    )


def collectives(program):
    """By kind of collective, the bytes that come out of it and how often it runs, in loops too.

    What is in a branch counts as if it were taken.
    """
    bodies, name = {}, None
    for line in program.as_text().splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = "ENTRY" if head[1] else head[2]
        bodies.setdefault(name, []).append(line)
    found = {kind: [0, 0] for kind in KINDS}

    def visit(name, times):
        for line in bodies[name]:
            op = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if not op:
                continue
            kind = op[2].removesuffix("-start")
            if kind in KINDS:
                found[kind][0] += size_of(op[1]) * times
                found[kind][1] += times
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            called = re.findall(rf"(?:{INSIDE})=\{{?((?:%[\w.\-]+,? ?)+)", line)
            if kind == "call":
                called += re.findall(r"to_apply=(%[\w.\-]+)", line)
            for one in re.findall(r"%([\w.\-]+)", " ".join(called)):
                visit(one, times * (int(trips[1]) if trips else 1))

    visit("ENTRY", 1)
    return {kind: v for kind, v in found.items() if v[1]}


def by_autodiff(net, loss):
    def mean(params, x, y):
        return jnp.mean(loss.value(jb.forward(net, params, x)[0], y))

    return jax.value_and_grad(mean)


def rematerialised(params, x, y):
    """GPT by autodiff, as one writes it: a scan of blocks, each half under `jax.checkpoint`."""
    embedding, positions, repeat, norm, head = GPT.layers
    halves = [half.layer for half in repeat.layer.layers]

    def block(h, own):
        for half, part in zip(halves, own, strict=True):
            h = jax.checkpoint(lambda p, h, half=half: jb.forward(half, p, h)[0])(part, h)
        return h, None

    def mean(params):
        h = jb.forward(jb.Sequential(embedding, positions), params[:2], x)[0]
        h = jax.lax.scan(block, h, params[2])[0]
        z = jb.forward(jb.Sequential(norm, head), params[3:], h)[0]
        return jnp.mean(jb.SoftmaxCrossEntropy().value(z, y))

    return jax.value_and_grad(mean)(params)


def program(f, net, x, y, shape, sharding, explicit=False, out=True):
    """f(params, x, y) compiled for a mesh; with `out` it gives a cost and a gradient."""
    mesh = mesh_of(shape, explicit)
    params = net.init(jax.random.key(0))
    specs = sharding.specs(net, params, mesh)
    where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    out_shardings = {"out_shardings": (NamedSharding(mesh, P()), where)} if out else {}
    args = (
        jb.sharding.put(params, specs, mesh),
        *jb.sharding.put((x, y), sharding.examples, mesh),
    )
    return jax.jit(f, **out_shardings).lower(*args).compile()


def questions(net, loss):
    """About single examples, and what is summed over them."""
    pe = jb.per_example

    def asked(question):
        return lambda params, x, y: question(pe.deferred(net, loss, params, x, y))

    return {
        "norms": asked(pe.norms),
        "clipped": asked(lambda bp: pe.clipped_gradient(bp, 1.0)),
        "factors": lambda *batch: jb.curvature.kfac(net, loss, *batch, key=KEY),
    }


def sent():
    """Collectives and bytes of programs on a mesh: ours, and those of autodiff."""
    loss = jb.SoftmaxCrossEntropy()
    nets = {name: NETS[name] for name in ("mlp", "cnn")} | {"gpt": (GPT, loss, *TOKENS)}
    found = {}
    ways = {
        "data": ("8x1", lambda net: jb.sharding.data_parallel()),
        "fsdp": ("8x1", lambda net: jb.sharding.fsdp(smallest=1)),
        "tensor": ("1x8", jb.sharding.tensor_parallel),
    }
    for way, (shape, make) in ways.items():
        for name, (net, _, x, y) in nets.items():
            if way != "data" and name == "cnn":
                continue
            plain = rematerialised if name == "gpt" else by_autodiff(net, loss)
            for who, f in (("ours", jb.value_and_grad(net, loss)), ("autodiff", plain)):
                made = program(f, net, x, y, shape, make(net))
                memory = made.memory_analysis()
                found[f"{way} {name} {who}"] = {
                    "sent": collectives(made),
                    "held": memory.argument_size_in_bytes + memory.output_size_in_bytes,
                }
    for name in ("mlp", "gpt"):
        net, _, x, y = nets[name]
        params = net.init(KEY)
        for what, f in questions(net, loss).items():
            made = program(f, net, x, y, "8x1", jb.sharding.data_parallel(), out=False)
            shapes = jax.tree.leaves(jax.eval_shape(f, params, x, y))
            size = sum(v.size * v.dtype.itemsize for v in shapes)
            found[f"{what} {name}"] = {"sent": collectives(made), "bytes": size}
        found[f"gradient {name}"] = sum(v.nbytes for v in jax.tree.leaves(params))
    found["gradient cnn"] = sum(v.nbytes for v in jax.tree.leaves(NETS["cnn"][0].init(KEY)))
    if "explicit" in sys.argv:
        net, _, x, y = nets["mlp"]
        f = jb.value_and_grad(net, loss)
        made = program(f, net, x, y, "8x1", jb.sharding.data_parallel(), explicit=True, out=False)
        found["data mlp explicit"] = {"sent": collectives(made)}
    return found


def main(meshes):
    found = {"sent": sent()}
    for name in NETS:
        both = name != "cnn"  # of explicit axes too; there nothing is about a layer
        found[name] = numbers(name, [m for m in meshes if both or not m[1]])
    print(json.dumps(found))


if __name__ == "__main__":
    every = [(shape, False) for shape in SHAPES]
    if "explicit" in sys.argv:
        every += [("2x4", True)]
    main(every)
