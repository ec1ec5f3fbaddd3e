"""Training on eight devices, compared with one: prints the largest relative difference of each.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/trained_on_eight.py
"""

import json
import sys
import tempfile
import warnings

import jax
import numpy as np
import optax
from jax.sharding import AxisType

import jbackprop as jb
from jbackprop import sharding

warnings.simplefilter("error")
jax.config.update("jax_enable_x64", True)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(84, 16)), RNG.integers(0, 8, 84)
LOSS = jb.SoftmaxCrossEntropy()
NET = jb.mlp([16, 32, 16, 8])
TOKENS = RNG.integers(0, 16, (40, 8))
SMALL = {"smallest": 1}


def fit(net=NET, data=(X, Y), loss=LOSS, **options):
    usual = {
        "optimizer": optax.adam(0.01), "epochs": 2, "batch_size": 20 if data is not None else None,
        "key": jax.random.key(1), "progress": False, "validation": data,
    }  # fmt: skip
    return jb.fit(net, loss, net.init(jax.random.key(0)), data, **(usual | options))


def accuracy(outputs, y):
    return jb.metrics.accuracy(outputs, y).astype("float64")


def difference(one, two):
    """The largest of the differences of parameters, states, averages and history, over their size.

    Not of the bases of K-FAC: those of equal eigenvalues may be any.
    """
    worst = 0.0
    parts = [[r.params, r.rule_state, r.averages, r.history] for r in (one, two)]
    if not isinstance(one.opt_state, jb.optim.KfacState):
        parts = [[*part, r.opt_state] for part, r in zip(parts, (one, two), strict=True)]
    for a, b in zip(*map(jax.tree.leaves, parts), strict=True):
        if jax.dtypes.issubdtype(getattr(a, "dtype", float), jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-3)))
    return worst


def meshes():
    both = ("data", "model")
    yield "8", jax.make_mesh((8,), ("data",)), ("data_parallel", "fsdp")
    yield "2x4", jax.make_mesh((2, 4), both), ("data_parallel", "fsdp", "tensor", "both")
    automatic = (AxisType.Auto, AxisType.Auto)
    yield "8x1", jax.make_mesh((8, 1), both, axis_types=automatic), ("both",)
    yield "1x8", jax.make_mesh((1, 8), both), ("tensor",)


def layouts(net):
    return {
        "data_parallel": sharding.data_parallel(),
        "fsdp": sharding.fsdp(**SMALL),
        "tensor": sharding.tensor_parallel(net),
        "both": sharding.tensor_parallel(net, fsdp="data", **SMALL),
    }


def plain(found):
    one = fit()
    for name, mesh, kinds in meshes():
        for kind in kinds:
            many = fit(mesh=mesh, sharding=layouts(NET)[kind])
            found[f"{name}, {kind}"] = difference(one, many)
            assert all(p.sharding.mesh == mesh for p in jax.tree.leaves(many.params)), name
    assert jax.tree.leaves(many.params)[1].sharding.shard_shape((16, 32)) == (16, 4)
    state = jax.tree.leaves(many.opt_state)[2]
    assert state.sharding.shard_shape(state.shape) == (16, 4), "the state is split as its parameter"


def others(found):
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    eight = jax.make_mesh((8,), ("data",))
    normed = jb.Sequential(jb.Dense(16, 8), jb.BatchNorm(8), jb.Tanh(), jb.Dense(8, 8))
    drops = jb.Sequential(jb.Dense(16, 8), jb.Dropout(0.5), jb.Dense(8, 8))
    gpt = jb.transformer(16, 8, depth=2, heads=2, length=8, tied=True)
    head = jb.FusedSoftmaxCrossEntropy()
    cases = {
        "batch norm": (
            {"net": normed, "batch_size": 24, "optimizer": optax.sgd(0.1)}, eight, None,
        ),
        "layers that draw, skipping": ({"net": drops, "nonfinite": "skip"}, mesh, None),
        "whole batches": ({"batch_size": None, "metrics": {"accuracy": accuracy}}, eight, None),
        "a rule": (
            {"rule": jb.credit.KolenPollack(), "batch_size": 24}, eight, sharding.fsdp(**SMALL)
        ),
        "private": ({"private": jb.Private(0.5, noise_multiplier=1.0)}, mesh, sharding.fsdp(**SMALL)),
        "transformer": (
            {
                "net": gpt, "loss": head, "data": (TOKENS, np.roll(TOKENS, -1, 1)),
                "batch_size": 11, "optimizer": optax.sgd(0.1),  # Adam makes much of rounded zeros
            },
            mesh, sharding.tensor_parallel(gpt, fsdp="data", **SMALL),
        ),
        "K-FAC": (
            {
                "optimizer": jb.optim.kfac(NET, LOSS, (X, Y), 0.1, key=jax.random.key(2)),
                "epochs": 1, "batch_size": 24,
            },
            eight, None,
        ),
    }  # fmt: skip
    for name, (options, on, split) in cases.items():
        found[name] = difference(fit(**options), fit(mesh=on, sharding=split, **options))


def loaders(found):
    batches = [(X[i : i + 12], Y[i : i + 12]) for i in range(0, 84, 12)]  # 12 among 8: to all whole
    one = fit(data=batches, batch_size=None)
    many = fit(data=batches, batch_size=None, mesh=jax.make_mesh((8,), ("data",)))
    found["a loader"] = difference(one, many)


def resumed(found):
    """Begun on one mesh, gone on with on others."""
    one = fit(epochs=3)
    with tempfile.TemporaryDirectory() as folder:
        kept = jb.Checkpoints(folder, every=2)
        eight = jax.make_mesh((8,), ("data",))
        fit(mesh=eight, sharding=sharding.fsdp(**SMALL), checkpoints=kept, epochs=1)
        mesh = jax.make_mesh((2, 4), ("data", "model"))
        own = layouts(NET)["both"]
        fit(mesh=mesh, sharding=own, checkpoints=kept, epochs=2, resume=True)
        back = fit(checkpoints=kept, epochs=3, resume=True)
        assert back.resumed_from == 10
    found["resumed elsewhere"] = difference(one, back)


def within(found):
    """Inside a mesh of explicit axes that the user has set, and with the results outside."""
    normed = jb.Sequential(jb.Dense(16, 8), jb.BatchNorm(8), jb.Tanh(), jb.Dense(8, 8))
    options = {"net": normed, "batch_size": 28, "optimizer": optax.sgd(0.1)}
    mesh, seen = jax.make_mesh((4, 2), ("data", "model")), []
    one = fit(**options)
    with jax.set_mesh(mesh):
        many = fit(
            mesh=mesh, callbacks=[lambda epoch: seen.append(epoch.params[0]["w"])], **options
        )
        folded = jb.fold_batch_norm(normed, many.params, many.averages)
    assert all(w.sharding.mesh == mesh for w in seen), "callbacks see the mesh that was given"
    found["within a mesh"] = difference(one, many)
    net, params = jb.fold_batch_norm(normed, one.params, one.averages)
    a = jb.evaluate(net, LOSS, params, (X, Y))["loss"]
    b = jb.evaluate(folded[0], LOSS, folded[1], (X, Y), mesh=mesh)["loss"]
    found["folded"] = abs(a - b) / a


def refused(found):
    """Parameters that are spread, and no mesh to train on."""
    on = jax.make_mesh((8,), ("data",))
    params = sharding.place(NET, NET.init(jax.random.key(0)), on, sharding.fsdp(**SMALL))
    try:
        jb.fit(NET, LOSS, params, (X, Y), optax.sgd(0.1), epochs=1, key=jax.random.key(1))
    except ValueError as error:
        found["refused"] = 0.0 if "lie on 8 devices: give the mesh" in str(error) else 1.0
    alone = jb.evaluate(NET, LOSS, NET.init(jax.random.key(0)), (X, Y))["loss"]
    found["evaluated where they are"] = abs(jb.evaluate(NET, LOSS, params, (X, Y))["loss"] - alone)


def evaluated(found):
    params, mesh = NET.init(jax.random.key(0)), jax.make_mesh((2, 4), ("data", "model"))
    one = jb.evaluate(NET, LOSS, params, (X, Y))["loss"]
    split = sharding.tensor_parallel(NET)
    many = jb.evaluate(NET, LOSS, params, (X, Y), mesh=mesh, sharding=split)["loss"]
    found["evaluate"] = abs(one - many) / one


if __name__ == "__main__":
    found = {}
    for part in (plain, others, loaders, resumed, within, refused, evaluated):
        if len(sys.argv) < 2 or part.__name__ in sys.argv[1:]:
            part(found)
    print(json.dumps(found))
