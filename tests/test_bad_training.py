"""Bad input of training, evaluation and meshes: each refused by name, before anything is done.

Loaders are in test_training_data.py, checkpoints of other runs in test_checkpoints.py.
"""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jbackprop as jb

NET, LOSS = jb.mlp([4, 5, 3]), jb.SoftmaxCrossEntropy()
PARAMS = NET.init(jax.random.key(0))
X, Y = np.ones((6, 4)), np.zeros(6, int)
MESH = jax.make_mesh((1,), ("data",))
S = jb.sharding


def fit(net=NET, loss=LOSS, params=PARAMS, data=(X, Y), optimizer=None, **options):
    usual = {"epochs": 1, "key": jax.random.key(0), "progress": False}
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return jb.fit(net, loss, params, data, optimizer, **(usual | options))


def evaluate(net=NET, loss=LOSS, params=PARAMS, data=(X, Y), metrics=None, **options):
    return jb.evaluate(net, loss, params, data, metrics, **options)


CASES = {
    # fit
    "a class of a net": (lambda: fit(net=jb.Dense), TypeError, "net must be a layer or a composite"),
    "a class of a loss": (lambda: fit(loss=jb.SquaredError), TypeError, "loss must be a jbackprop Loss"),
    "text for parameters": (lambda: fit(params="w"), TypeError, "params.*floating-point"),
    "whole parameters": (lambda: fit(params=jax.tree.map(lambda p: p.astype(int), PARAMS)), TypeError, r"params\[0\]\['b'\] has the dtype int"),
    "no optimizer": (lambda: fit(optimizer=0.1), TypeError, "optimizer must be one of Optax's"),
    "no key": (lambda: fit(key=None), TypeError, "key must be one random key"),
    "an int for a key": (lambda: fit(key=0), TypeError, "key must be one random key, such as jax.random.key"),
    "several keys": (lambda: fit(key=jax.random.split(jax.random.key(0), 3)), TypeError, "one random key.*shape"),
    "no epoch": (lambda: fit(epochs=0), ValueError, "epochs must be an int of at least 1"),
    "half an epoch": (lambda: fit(epochs=0.5), ValueError, "epochs must be an int"),
    "a flag of epochs": (lambda: fit(epochs=True), ValueError, "epochs must be an int"),
    "no batch": (lambda: fit(batch_size=0), ValueError, "batch_size must be an int of at least 1"),
    "a batch of text": (lambda: fit(batch_size="all"), ValueError, "batch_size must be an int.*None for the whole"),
    "too large a batch": (lambda: fit(batch_size=7), ValueError, "batch_size is 7, but there are only 6"),
    "validation of a number": (lambda: fit(validation=3), TypeError, "validation must be a pair"),
    "validation of other lengths": (lambda: fit(validation=(X, Y[:5])), ValueError, "validation: x has 6 examples, but y has 5"),
    "a callback that is none": (lambda: fit(callbacks=[3]), TypeError, "each of callbacks must be a function"),
    "early stopping by a number": (lambda: fit(early_stopping=3), TypeError, "early_stopping must be a jbackprop EarlyStopping"),
    "early stopping by what is not there": (lambda: fit(early_stopping=jb.EarlyStopping()), ValueError, "watches 'validation_loss', but the history will have loss; give validation"),
    "no patience": (lambda: jb.EarlyStopping(0), ValueError, "patience must be an int of at least 1"),
    "patience of text": (lambda: jb.EarlyStopping("a"), ValueError, "patience must be an int"),
    "better by a word": (lambda: jb.EarlyStopping(higher_is_better="no"), TypeError, "higher_is_better must be True or False, not 'no'"),
    "a noise of text": (lambda: jb.Private(1.0, noise_multiplier="a"), ValueError, "noise_multiplier must be a finite number of at least 0, not 'a'"),
    "a negative improvement": (lambda: jb.EarlyStopping(min_delta=-1.0), ValueError, "min_delta must be a finite number of at least 0"),
    "private by a number": (lambda: fit(private=1.0), TypeError, "private must be a jbackprop Private"),
    "a rule of another kind": (lambda: fit(rule=LOSS), TypeError, "rule must be a jbackprop Rule"),
    "private and a rule": (lambda: fit(private=jb.Private(1.0, noise_multiplier=1.0), rule=jb.credit.FeedbackAlignment()), ValueError, "give private or rule"),
    "private and what is private watched": (lambda: fit(private=jb.Private(1.0, noise_multiplier=1.0), early_stopping=jb.EarlyStopping(monitor="loss")), ValueError, "which is of the private data"),
    "a policy that is none": (lambda: fit(nonfinite=None), ValueError, 'nonfinite must be "raise", "skip" or "rollback"'),
    "resume of nothing": (lambda: fit(resume=True), ValueError, "say where, checkpoints=folder"),
    "resume as text": (lambda: fit(resume="yes", checkpoints="nowhere"), TypeError, "resume must be True or False"),
    "progress as text": (lambda: fit(progress="no"), TypeError, "progress must be True or False"),
    "checkpoints in a number": (lambda: fit(checkpoints=3), TypeError, "folder must be a path"),
    "checkpoints: a flag as text": (lambda: jb.Checkpoints("f", higher_is_better="no"), TypeError, "higher_is_better must be True or False"),
    "checkpoints: none kept": (lambda: jb.Checkpoints("f", keep=0), ValueError, "keep must be an int of at least 1"),
    "checkpoints: every 1.5 steps": (lambda: jb.Checkpoints("f", every=1.5), ValueError, "every must be an int of at least 1"),
    "metrics without names": (lambda: fit(metrics=[jb.metrics.accuracy]), TypeError, "metrics must be functions by name"),
    "a metric that is none": (lambda: fit(metrics={"a": 3}), TypeError, "metric 'a' must be a function"),
    "a metric called loss": (lambda: fit(metrics={"loss": jb.metrics.accuracy}), ValueError, "cannot be called 'loss': in the history"),
    "a metric called skipped": (lambda: fit(metrics={"skipped": jb.metrics.accuracy}), ValueError, "cannot be called 'skipped'"),
    "a metric called time": (lambda: fit(metrics={"time": jb.metrics.accuracy}), ValueError, "cannot be called 'time': in a log"),
    "a metric of the validation data": (lambda: fit(metrics={"validation_a": jb.metrics.accuracy}), ValueError, "one of the validation data"),
    "a metric of the whole batch": (lambda: fit(metrics={"a": lambda z, y: z.sum()}), ValueError, r"one number for each example, \(B,\)"),
    # evaluate
    "evaluate: a class of a net": (lambda: evaluate(net=jb.Dense), TypeError, "net must be a layer or a composite"),
    "evaluate: text for a loss": (lambda: evaluate(loss="softmax"), TypeError, "loss must be a jbackprop Loss"),
    "evaluate: no parameters": (lambda: evaluate(params=None), (TypeError, ValueError), "not the parameters of|tuple of 3"),
    "evaluate: metrics without names": (lambda: evaluate(metrics=[jb.metrics.accuracy]), TypeError, "metrics must be functions by name"),
    "evaluate: a metric called loss": (lambda: evaluate(metrics={"loss": jb.metrics.accuracy}), ValueError, "cannot be called 'loss'"),
    "evaluate: a number for data": (lambda: evaluate(data=3), TypeError, "data must be a pair"),
    "evaluate: no mesh": (lambda: evaluate(mesh=3), TypeError, "mesh must be a jax.sharding.Mesh"),
    # meshes
    "no mesh": (lambda: fit(mesh=3), TypeError, "mesh must be a jax.sharding.Mesh"),
    "a sharding without a mesh": (lambda: fit(sharding=S.fsdp()), ValueError, "give mesh= too"),
    "text for a sharding": (lambda: fit(mesh=MESH, sharding="fsdp"), TypeError, "sharding must be one of jbackprop.sharding"),
    "an axis that is not there": (lambda: fit(mesh=MESH, sharding=S.fsdp("model")), ValueError, "names the axis 'model', but the axes of the mesh are 'data' of 1"),
    "no axis data": (lambda: fit(mesh=jax.make_mesh((1,), ("x",))), ValueError, "batch names the axis 'data', but the axes of the mesh are 'x'"),
    "rules that are none": (lambda: S.Sharding(rules=3), TypeError, "rules must be a tuple of pairs"),
    "a rule without a spec": (lambda: S.Sharding(rules=(("w", "data"),)), TypeError, "a rule must be a pair of a regular expression and a PartitionSpec"),
    "no regular expression": (lambda: S.Sharding(rules=(("layers[(", P()),)), ValueError, "is no regular expression.*re.escape"),
    "a rule about nothing": (lambda: S.Sharding(rules=(("v$", P()),)).specs(NET, PARAMS, MESH), ValueError, r"'v\$' is about no parameter.*layers\[0\].b"),
    "an axis that is no name": (lambda: S.data_parallel(3), TypeError, "batch must be the name of an axis"),
    "fsdp over a number": (lambda: S.Sharding(fsdp=3), TypeError, "fsdp must be the name of an axis"),
    "a negative size": (lambda: S.fsdp(smallest=-1), ValueError, "smallest must be an int of at least 0"),
    "tensor parallel of no net": (lambda: S.tensor_parallel(3), TypeError, "net must be a layer"),
    "tensor parallel over a number": (lambda: S.tensor_parallel(NET, axis=3), TypeError, "axis must be the name of an axis"),
    "place: no net": (lambda: S.place(3, PARAMS, MESH, S.fsdp()), TypeError, "net must be a layer"),
    "place: other parameters": (lambda: S.place(NET, PARAMS[:1], MESH, S.fsdp()), ValueError, "tuple of 3, not a tuple of 1"),
    "place: no mesh": (lambda: S.place(NET, PARAMS, 3, S.fsdp()), TypeError, "mesh must be a jax.sharding.Mesh"),
    "place: no sharding": (lambda: S.place(NET, PARAMS, MESH, "fsdp"), TypeError, "sharding must be a Sharding"),
    "put: specs of another tree": (lambda: S.put(PARAMS, (P(),), MESH), ValueError, "specs must be a tree of PartitionSpec like the tree"),
    "put: no mesh": (lambda: S.put(PARAMS, P(), 3), TypeError, "mesh must be a jax.sharding.Mesh"),
    "specs_like: specs of another tree": (lambda: S.specs_like(PARAMS, PARAMS, (P(),)), ValueError, "specs must be a tree of PartitionSpec like params"),
    "paths: no net": (lambda: S.paths(3, PARAMS), TypeError, "net must be a layer"),
    "check_mesh": (lambda: S.check_mesh("data"), TypeError, "mesh must be a jax.sharding.Mesh"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()
    assert not list(tmp_path.iterdir()), "nothing is begun"
