"""Bad input, generated: every public configuration crossed with rubbish, by the type of the field."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbackprop as jb
from jbackprop import catalogue, datasets

NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """One call that must raise.

    Attributes:
        name: of the case.
        of: the public names that it is a case of.
        call: what must raise.
        message: a pattern for the error and its notes, which has the place.
    """

    name: str
    of: tuple[str, ...]
    call: Any
    message: str


def init(key, shape, dtype):
    return jnp.zeros(shape, dtype)


CONFIGURATIONS = {
    "Dense": {"p": 4, "q": 3},
    "Activation": {"f": jnp.tanh, "derivative": jnp.cos},
    "Affine": {"features": 4},
    "Attention": {"heads": 4, "kv_heads": 2, "block": 2, "scale": 0.5},
    "Autodiff": {"apply": jnp.tanh, "init_params": jnp.zeros},
    "AveragePool": {"window": (2, 2)},
    "BatchNorm": {"channels": 4},
    "Celu": {},
    "Checkpoint": {"layer": jb.Tanh()},
    "Conv": {"c_in": 2, "c_out": 4, "kernel": (3, 3)},
    "ConvTranspose": {"c_in": 2, "c_out": 4, "kernel": (3, 3)},
    "Dropout": {"rate": 0.5},
    "Elu": {},
    "Embedding": {"vocab": 5, "width": 3},
    "Frozen": {"layer": jb.Tanh()},
    "GRU": {"p": 3, "q": 2, "truncate": 2},
    "Gain": {"features": 3},
    "Gelu": {},
    "GroupNorm": {"groups": 2, "channels": 4},
    "InstanceNorm": {"channels": 4},
    "LSTM": {"p": 3, "q": 2, "truncate": 2},
    "LayerNorm": {"features": 4},
    "LeakyRelu": {},
    "MaxPool": {"window": (2, 2)},
    "Positions": {"length": 4, "width": 3},
    "RMSNorm": {"features": 4},
    "RNN": {"p": 3, "q": 2, "truncate": 2},
    "Repeat": {"layer": jb.Dense(3, 3), "n": 2, "checkpoint_every": 1},
    "Reshape": {"shape": (2, 3)},
    "Reversible": {"f": jb.Tanh(), "g": jb.Tanh()},
    "Rotary": {"heads": 2},
    "Select": {"index": 0},
    "Skip": {"branch": jb.Tanh(), "shortcut": jb.Tanh()},
    "Take": {"index": 0},
    "Tied": {"embedding": jb.Embedding(5, 3), "body": jb.Dense(3, 3)},
    "Times": {"c": 2.0},
    "Upsample": {"factor": 2},
    "Huber": {"d": 1.0},
    "SoftmaxCrossEntropy": {"class_weights": (1.0, 2.0), "ignore_index": 0},
    "FusedSoftmaxCrossEntropy": {
        "class_weights": (1.0, 2.0),
        "ignore_index": 0,
        "logit_cap": 2.0,
        "block": 2,
        "vocab_block": 2,
    },
    "bidirectional": {"layer": jb.LSTM(3, 2)},
    "cnn": {"shape": (8, 8, 1), "channels": (2,), "classes": 3, "activation": jb.Tanh()},
    "cross_attention": {"width": 4, "heads": 2, "kv_heads": 2, "memory": 3, "block": 2},
    "geglu": {"p": 3, "hidden": 4, "q": 2},
    "glu": {"p": 3, "q": 4},
    "lstm": {"inputs": 3, "hidden": 2, "truncate": 2, "vocab": 3},
    "mlp": {"sizes": (4, 5, 3), "activation": jb.Tanh(), "output": jb.Tanh()},
    "multi_head_attention": {"width": 4, "heads": 2, "kv_heads": 2, "block": 2},
    "resnet": {
        "shape": (8, 8, 1),
        "channels": (2,),
        "blocks": 1,
        "classes": 3,
        "activation": jb.Tanh(),
    },
    "swiglu": {"p": 3, "hidden": 4, "q": 2},
    "transformer": {
        "vocab": 5,
        "width": 4,
        "depth": 1,
        "heads": 2,
        "length": 3,
        "hidden": 3,
        "kv_heads": 2,
        "activation": jb.Tanh(),
    },
    "transformer_block": {
        "width": 4,
        "heads": 2,
        "hidden": 3,
        "kv_heads": 2,
        "activation": jb.Tanh(),
    },
    "curvature.MonteCarlo": {"samples": 2},
    "credit.DifferenceTargetPropagation": {},
    "credit.EquilibriumPropagation": {},
    "credit.ForwardForward": {},
    "credit.ForwardGradient": {},
    "credit.KolenPollack": {},
    "credit.PredictiveCoding": {},
    "credit.SignSymmetry": {},
    "credit.WeightMirror": {"decay": 0.1},
    "optim.LevenbergMarquardt": {},
}
for _rule in (
    "Backpropagation",
    "FeedbackAlignment",
    "DirectFeedbackAlignment",
    "DirectRandomTargetProjection",
):
    CONFIGURATIONS[f"credit.{_rule}"] = {}

NUMBERS = ["a", None, NAN, INF, 1j, (1.0,), np.ones(3)]
SIZES = [0, -1, 2.5, "3", True, NAN, (1, 2)]
NETS = [jb.Tanh, jnp.tanh, 3, "tanh"]
RUBBISH = {
    "int": [*SIZES, None],
    "int | None": SIZES,
    "bool": ["yes", 2, None, 0.5],
    "float": NUMBERS,
    "float | None": [v for v in NUMBERS if v is not None],
    "str": ["nothing", 3, None],
    "Init": [3, "uniform", None],
    "Node": [*NETS, None],
    "Layer": [*NETS, None],
    "Elementwise": [*NETS, None, jb.Dense(2, 2)],
    "Recurrent": [*NETS, None, jb.Tanh()],
    "Node | None": NETS,
    "Node | Sequence[Node] | None": [*NETS, [jb.Tanh]],
    "tuple[int, ...]": [(-2, 2), (2.5, 2), "ab", 2.5, None, (True, 2)],
    "Sequence[int]": [(0, 2), (-2, 2), (2.5, 2), "ab", 2.5, None, (True, 2)],
    "int | Sequence[int]": [0, -1, 2.5, "ab", (2.5,), None, True],
    "int | tuple[int, ...]": [0, -1, 2.5, "ab", (0, 1), (2.5, 1), None, True],
    "int | tuple[int, ...] | None": [0, -1, 2.5, "ab", (0, 1), (2.5, 1), True],
    "tuple[float, ...] | None": [3, "ab", (), (1.0, -1.0), (1.0, NAN), {0: 1.0}, ("a", "b")],
    "windows.Padding": ["none", True, ((1, 1),), ((1,), (0, 0)), (("a", 0), (0, 0)), None],
    "Loss | None": [jb.SquaredError, jb.Tanh(), "mse", 3, jnp.tanh],
    "Callable[[Array], Array]": [3, "tanh", None],
    "Callable[[PyTree, Any], Any]": [3, "tanh", None],
    "Callable[[Array], PyTree]": [3, "tanh", None],
}
SIGNED = {"index", "ignore_index"}
"""Sizes that may be 0 or negative."""


def public(name: str) -> Any:
    found: Any = jb
    for part in name.split("."):
        found = getattr(found, part)
    return found


def shown(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value).replace("\n", " ")


def configurations():
    for name, valid in CONFIGURATIONS.items():
        target = public(name)
        for field, parameter in inspect.signature(target).parameters.items():
            kind = str(parameter.annotation)
            for value in RUBBISH[kind]:
                if field in SIGNED and value in (0, -1):
                    continue
                yield Case(
                    f"{name}, {field}={shown(value)}",
                    (name,),
                    lambda target=target, options=valid | {field: value}: target(**options),
                    (
                        rf"(?s)(\A|\W){target.__name__}\b.*\b{field}\b.*(must|needs?|which is no)\b"
                        if inspect.isclass(target)
                        else r": \w+ (must|is)\b"
                    ),
                )


BATCH = 3
FREE = (jb.Identity, jb.Select, jb.Take, jb.Flatten, jb.Reshape)
"""Layers that move entries, of whatever dtype."""
OF_ONE_RANK = (jb.Conv, jb.ConvTranspose, jb.MaxPool, jb.AveragePool, jb.Recurrent, jb.Rotary)
OF_CONSTANTS = (
    jb.LayerNorm,
    jb.RMSNorm,
    jb.GroupNorm,
    jb.InstanceNorm,
    jb.BatchNorm,
    jb.Gain,
    jb.Affine,
)
"""Layers whose parameters are not drawn."""
REMEDY = (
    r"\bmust\b|\bneed(s|ed)?\b|\bmade with init|\bmake them with init|takes what|\buse \w|\bgive \w"
)


def zeros_like(shapes):
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)


def networks():
    """Every layer of the catalogue, with parameters and inputs of zeros."""
    for layer, inputs in catalogue.LAYERS:
        if isinstance(layer, jb.Autodiff):  # a user's function raises what it likes
            continue
        x = zeros_like(catalogue._shapes(inputs, BATCH))
        params = zeros_like(jax.eval_shape(layer.init, jax.random.key(0)))
        name = f"{layer} on {catalogue._described(jax.tree.map(jnp.asarray, x))}"
        yield name[-90:], layer, params, x


def spoilt_inputs(layer, params, x):
    """Inputs that the layer cannot take, by what is wrong with them."""
    leaves, tree = jax.tree.flatten(x)
    first, weights = leaves[0], bool(jax.tree.leaves(params))
    floating = first.dtype.kind == "f"

    def changed(change):
        return jax.tree.unflatten(tree, [change(leaves[0]), *leaves[1:]])

    yield "complex numbers", changed(lambda v: v.astype(complex))
    yield "words", changed(lambda v: np.full(v.shape, "a"))
    yield "objects", changed(lambda v: np.full(v.shape, None))
    yield "a list", [1.0] * BATCH
    yield "None", None
    yield "a number", np.float64(1.0)
    yield "text", "abc"
    if len(leaves) > 1:
        yield "other numbers of examples", changed(lambda v: v[1:])
    if not isinstance(layer, FREE):
        yield (
            ("integers", changed(lambda v: v.astype(int)))
            if floating
            else ("floats", changed(lambda v: v.astype(float)))
        )
    if floating and weights:
        yield "a feature too many", changed(lambda v: np.concatenate([v, v[..., :1]], -1))
    if floating and weights and first.shape[-1] > 1:
        yield "an axis too many", changed(lambda v: v[..., None])
    if floating and ((weights and first.ndim == 2) or isinstance(layer, OF_ONE_RANK)):
        yield "no batch axis", jax.tree.map(lambda v: v[0], x)


def spoilt_params(params):
    """Parameters that are not the layer's, by what is wrong with them."""
    at, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in at]
    if not leaves:
        yield "weights where there are none", {"w": np.zeros((2, 2))}
        return
    yield "no parameters", ()
    yield "None", None
    yield "one array", np.zeros(3)
    yield "a list", [params]
    for i, (path, leaf) in list(enumerate(at))[:3]:
        name = jax.tree_util.keystr(path)

        def changed(new, i=i):
            return jax.tree.unflatten(tree, [*leaves[:i], new, *leaves[i + 1 :]])

        yield f"{name} of another size", changed(np.zeros((leaf.shape[0] + 1, *leaf.shape[1:])))
        yield f"{name} with an axis too many", changed(leaf[None])
        keys = [getattr(k, "key", getattr(k, "idx", None)) for k in path]
        yield f"no {name}", without(params, keys)


def without(tree, path):
    """The tree without the leaf there: its dict has a key less, its tuple an element less."""
    head, *rest = path
    if isinstance(tree, dict):
        own = {head: without(tree[head], rest)} if rest else {}
        return {name: value for name, value in tree.items() if name != head} | own
    own = (without(tree[head], rest),) if rest else ()
    return (*tree[:head], *own, *tree[head + 1 :])


def layers():
    for name, layer, params, x in networks():
        of = ("forward", type(layer).__name__)
        for what, bad in spoilt_inputs(layer, params, x):
            yield Case(
                f"{what} into {name}", of, lambda a=(layer, params, bad): jb.forward(*a), REMEDY
            )
        for what, bad in spoilt_params(params):
            yield Case(
                f"params: {what}, for {name}", of, lambda a=(layer, bad, x): jb.forward(*a), REMEDY
            )
        if jax.tree.leaves(params) and not isinstance(layer, OF_CONSTANTS):
            for key in (3, np.zeros(2)):
                yield Case(
                    f"init({key}) of {name}",
                    (type(layer).__name__,),
                    lambda a=(layer, key): a[0].init(a[1]),
                    r"init: key must be one random key, such as jax.random.key\(0\)",
                )


def joins():
    """Inputs of joins that do not belong together."""
    one, other = np.zeros((BATCH, 2, 3)), np.zeros((BATCH, 2, 4))
    for layer in (jb.Add(), jb.Multiply(), jb.Maximum(), jb.Concatenate()):
        apart = (one, other[:, :1]) if isinstance(layer, jb.Concatenate) else (one, other)
        for what, x in {
            "one array": one,
            "other shapes": apart,
            "nothing": (),
            "integers": (one, one.astype(int)),
        }.items():
            yield Case(
                f"{layer} of {what}",
                (type(layer).__name__,),
                lambda a=(layer, (), x): jb.forward(*a),
                REMEDY,
            )


TARGETS = {
    "of another shape": np.zeros((BATCH, 2)),
    "with an axis too many": np.zeros((BATCH, 3, 1)),
    "of another number": np.zeros((BATCH + 1, 3)),
    "without a batch axis": np.zeros(()),
    "complex": np.zeros((BATCH, 3), complex),
    "words": np.full((BATCH, 3), "a"),
    "objects": np.full((BATCH, 3), None),
    "in a list": [0.0] * BATCH,
    "None": None,
}
LABELS = {
    "negative": np.array([0, -1, 2]),
    "too large": np.array([0, 1, 3]),
    "floats": np.zeros(BATCH),
    "in two columns": np.zeros((BATCH, 2), int),
}
RANGES = {
    "SigmoidCrossEntropy": (-0.5, 1.5),
    "PoissonNLL": (-1.0,),
    "CrossEntropy": (-0.5,),
    "SoftmaxCrossEntropy": (-0.5,),
}


def losses():
    """Every loss of the catalogue behind an MLP of three outputs."""
    x = np.zeros((BATCH, 4))
    for loss, _, output in catalogue.LOSSES:
        name = type(loss).__name__
        net = jb.mlp([4, 5, 3], jb.Tanh(), output)
        params = zeros_like(jax.eval_shape(net.init, jax.random.key(0)))
        bad = dict(TARGETS)
        if isinstance(loss, jb.SoftmaxCrossEntropy):
            bad |= LABELS
        bad |= {f"of {v}": np.full((BATCH, 3), v) for v in RANGES.get(name, ())}
        for what, y in bad.items():
            for of, call in {
                "backprop": jb.backprop,
                "value_and_grad": lambda net, loss, *a: jb.value_and_grad(net, loss)(*a),
            }.items():
                yield Case(
                    f"{of}: targets {what} for {loss}",
                    (of, name),
                    lambda a=(net, loss, params, x, y), call=call: call(*a),
                    r"y must|y\[|targets|labels",
                )


NET = jb.mlp([4, 5, 3])
LOSS = jb.SoftmaxCrossEntropy()
KEY = jax.random.key(0)
PARAMS = zeros_like(jax.eval_shape(NET.init, KEY))
OTHER = zeros_like(jax.eval_shape(jb.mlp([4, 6, 3]).init, KEY))
X, Y = np.zeros((BATCH, 4)), np.zeros(BATCH, int)
CALL = {"net": NET, "loss": LOSS, "params": PARAMS, "x": X, "y": Y}
NORMED = jb.Sequential(jb.BatchNorm(4), jb.Dense(4, 3))
PAIRS = ({"w": jb.Outer.of(np.zeros((BATCH, 4)), np.zeros((BATCH, 3)))},)


def transposed(params):
    return jax.tree.map(np.transpose, params)


def several(params):
    return jax.tree.map(lambda w: np.zeros((2, *w.shape)), params)


TREES = {
    "of another net": OTHER,
    "too short": PARAMS[:1],
    "empty": (),
    "transposed": transposed(PARAMS),
    "one array": np.zeros(3),
    "a number": 3.0,
}
ARGUMENTS = {
    "net": {"a class": jb.Tanh, "params": PARAMS, "None": None, "text": "net", "a loss": LOSS},
    "loss": {
        "a class": jb.SquaredError,
        "a function": jnp.square,
        "text": "mse",
        "None": None,
        "a rule": jb.credit.Backpropagation(loss=LOSS),
        "a layer": jb.Softmax(),
    },
    "params": TREES
    | {
        "None": None,
        "a list": [PARAMS],
        "integers": jax.tree.map(lambda w: w.astype(int), PARAMS),
        "complex": jax.tree.map(lambda w: w.astype(complex), PARAMS),
        "words": jax.tree.map(lambda w: np.full(w.shape, "a"), PARAMS),
        "text": "params",
    },
    "x": {
        "a feature too few": X[:, :3],
        "one example": X[0],
        "integers": X.astype(int),
        "complex": X.astype(complex),
        "words": np.full((BATCH, 4), "a"),
        "objects": np.full((BATCH, 4), None),
        "a list": X.tolist(),
        "None": None,
        "a number": 3.0,
        "text": "x",
    },
    "y": {
        "too few": Y[:2],
        "negative": Y - 1,
        "too large": Y + 3,
        "floats": Y.astype(float),
        "in columns": np.zeros((BATCH, 2), int),
        "words": np.full(BATCH, "a"),
        "a list": Y.tolist(),
        "None": None,
    },
    "empty": {"no examples": None},
    "key": {"a number": 5, "floats": np.ones(2), "several": jax.random.split(KEY, 3), "text": "a"},
    "transport": {k: v for k, v in TREES.items() if k != "empty"} | {"text": "a"},
    "vector": TREES | {"None": None, "text": "a"},
    "weights": {
        "too few": np.ones(BATCH - 1),
        "in columns": np.ones((BATCH, 1)),
        "one number": 1.0,
        "text": "a",
        "complex": np.ones(BATCH, complex),
        "words": np.full(BATCH, "a"),
    },
    "count": {str(v): v for v in (0, -1, 2.5, "3", True, NAN)},
    "positive": {shown(v): v for v in (0.0, -1.0, NAN, INF, "a", None, np.ones(3), 1j)},
    "flag": {str(v): v for v in ("yes", 2, None)},
    "name": {str(v): v for v in ("nothing", 3, None)},
    "bp": {
        "params": PARAMS,
        "None": None,
        "text": "bp",
        "an array": X,
        "what capture gives": (np.zeros(BATCH), PAIRS),
    },
    "state": {"None": None, "params": PARAMS, "a rule": jb.credit.Backpropagation(loss=LOSS)},
    "roots": {"a class": jb.curvature.Exact, "text": "exact", "a number": 3},
}
KINDS = {
    "vectors": "vector", "grads": "vector", "microbatch": "count", "chunk": "count",
    "size": "count", "number": "count", "steps": "count", "samples": "count", "points": "count",
    "per_layer": "flag", "per_example": "flag", "joint_bias": "flag", "corrected": "flag",
    "method": "name", "scheme": "name", "matrix": "name", "sharing": "name", "truth": "name",
    "max_norm": "positive", "divisor": "positive", "width": "positive", "threshold": "positive",
    "directions": "count", "every": "count", "iterations": "count", "factors_every": "count",
    "invert_every": "count", "batch": "count",
}  # fmt: skip
"""What kind of rubbish an argument is given, where that is not its name."""


def swept(**changed):
    """What backprop gives of the net at zeros, without running it."""
    call = CALL | changed
    return jax.tree.map(
        lambda s: np.zeros(s.shape, s.dtype),
        jax.eval_shape(
            lambda p, x: jb.backprop(call["net"], call["loss"], p, x, Y), call["params"], call["x"]
        ),
    )


BP = swept()
COUPLED = swept(net=NORMED, params=zeros_like(jax.eval_shape(NORMED.init, KEY)))
STATES = {
    name: getattr(jb.credit, name)(loss=LOSS)
    for name in (
        "Backpropagation", "DifferenceTargetPropagation", "DirectFeedbackAlignment",
        "DirectRandomTargetProjection", "EquilibriumPropagation", "FeedbackAlignment",
        "ForwardForward", "ForwardGradient", "KolenPollack", "PredictiveCoding", "SignSymmetry",
        "WeightMirror",
    )
}  # fmt: skip
STATES["ForwardForward"] = jb.credit.ForwardForward(3, loss=LOSS)


def state_of(rule):
    return jax.eval_shape(lambda: rule.init(KEY, NET, PARAMS))


def only(*names):
    return {name: CALL[name] for name in names}


def of_value_and_grad(net, loss, **rest):
    return jb.value_and_grad(net, loss)(**rest)


def of_as_function(net, **rest):
    return jb.as_function(net)(**rest)


def of_capture(params, x, **options):
    return jb.capture(model_cost, **options)(params, x)


def model_cost(params, x):
    return jnp.sum(jnp.square(x @ params["w"]))


def of_kfac(grads=PARAMS, params=PARAMS, x=X, y=Y, **options):
    optimizer = jb.optim.kfac(**options)
    return optimizer.init(params)


def of_hessian_free(**options):
    return jb.optim.hessian_free(**options)


def of_update(**batch):
    optimizer = jb.optim.hessian_free(NET, LOSS, damping=1.0)
    return optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, batch=tuple(batch.values()))


def of_check_gradient(candidate, **options):
    return jb.check.gradient(lambda w: jnp.sum(w * w), np.ones(3), candidate=candidate, **options)


def of_check_jvp(**options):
    return jb.check.jvp(jnp.sin, np.ones(3), **options)


def of_check_vjp(**options):
    return jb.check.vjp(jnp.sin, np.ones(3), **options)


def chunks(**options):
    return list(jb.per_example.gradient_chunks(**options))


CURVATURE = {**CALL, "key": KEY}
ASKED = {"bp": BP, "microbatch": 1}
WEIGHTED = {**ASKED, "weights": np.ones(BATCH)}
ANSWERS = {
    "norms": {"per_layer": False, "method": "auto", **WEIGHTED},
    "gradients": ASKED,
    "gram": {"method": "auto", **ASKED},
    "dots": {"method": "auto", **ASKED},
    "gram_between": {"method": "auto", "other": BP, **ASKED},
    "project": {"vectors": PARAMS, **WEIGHTED},
    "weighted_gradient": WEIGHTED,
    "clipped_gradient": {"max_norm": 1.0, "scheme": "flat", "method": "auto", **WEIGHTED},
    "noisy_gradient": {
        "key": KEY, "max_norm": 1.0, "noise_multiplier": 1.0, "scheme": "flat", "divisor": 2,
        "method": "auto", **WEIGHTED,
    },
    "mean": WEIGHTED,
    "second_moment": WEIGHTED,
    "variance": {"ddof": 0, **WEIGHTED},
    "snr": {"ddof": 0, **WEIGHTED},
    "noise_scale": {"per_layer": False, **WEIGHTED},
    "cosine_to_mean": WEIGHTED,
}  # fmt: skip
MATRICES = {
    "hessian_product": {"vector": PARAMS},
    "ggn_product": {"vector": PARAMS},
    "ggn_inner": {"vectors": several(PARAMS)},
    "fisher_product": {"vector": PARAMS, "roots": jb.curvature.Exact()},
    "ggn_block_product": {"vector": PARAMS, "roots": jb.curvature.Exact(), "chunk": 1},
    "ggn_root": {"roots": jb.curvature.Exact()},
    "hessian_operator": {"damping": 0.1},
    "ggn_operator": {"damping": 0.1, "roots": jb.curvature.Exact()},
    "diag_ggn": {"roots": jb.curvature.Exact(), "per_example": False, "chunk": 1},
    "diag_fisher": {"per_example": False},
    "diag_hessian": {"chunk": 1},
    "estimate_diag_hessian": {"samples": 1, "chunk": 1},
    "kfac": {"roots": jb.curvature.Exact(), "sharing": "expand", "joint_bias": True, "chunk": 1},
    "ekfac": {"roots": jb.curvature.Exact(), "sharing": "expand", "joint_bias": True, "chunk": 1},
    "trace_ggn": {"roots": jb.curvature.Exact(), "per_layer": False, "chunk": 1},
    "trace_hessian": {"samples": 1, "per_layer": False, "chunk": 1},
    "top_eigenvalues": {"number": 1, "matrix": "ggn", "per_layer": False, "tolerance": 1e-3},
    "spectral_density": {
        "matrix": "ggn", "steps": 2, "samples": 1, "per_layer": False, "points": 3, "width": 0.1,
    },
}  # fmt: skip
NEEDS_KEY = {"estimate_diag_hessian", "trace_hessian", "spectral_density", "noisy_gradient"}
OPTIONS = {"truth": "both", "tolerance": 0.1, "directions": 1, "seed": 0}
CALLS = {
    "forward": (jb.forward, only("net", "params", "x") | {"key": KEY}),
    "backprop": (jb.backprop, CALL | {"key": KEY, "transport": PARAMS}),
    "value_and_grad": (of_value_and_grad, CALL | {"key": KEY, "weights": np.ones(BATCH)}),
    "as_function": (of_as_function, only("net", "params", "x") | {"key": KEY}),
    "predict": (jb.predict, only("net", "loss", "params", "x")),
    "activations": (jb.activations, only("net", "params", "x") | {"key": KEY}),
    "batch_averages": (jb.batch_averages, only("net", "params", "x") | {"key": KEY}),
    "trainable_mask": (jb.trainable_mask, only("net", "params")),
    "summary": (jb.summary, only("net", "x")),
    "gradient": (jb.gradient, {"bp": BP, "weights": np.ones(BATCH)}),
    "deltas": (jb.deltas, {"bp": BP}),
    "per_example.deferred": (jb.per_example.deferred, CALL | {"key": KEY}),
    "capture": (of_capture, {"has_aux": False}),
    "diagnose.delta_norms": (jb.diagnose.delta_norms, {"bp": BP}),
    "diagnose.first_nonfinite": (jb.diagnose.first_nonfinite, CALL | {"key": KEY}),
    "diagnose.saturation": (
        jb.diagnose.saturation, only("net", "params", "x") | {"threshold": 0.1},
    ),
    "check.network": (jb.check.network, CALL | {"key": KEY} | OPTIONS),
    "check.assert_network": (jb.check.assert_network, dict(CALL)),
    "check.layer": (jb.check.layer, {"layer": NET, "x": X, "params": PARAMS, "key": KEY, **OPTIONS}),
    "check.assert_layer": (jb.check.assert_layer, {"layer_": NET, "x": X, "params": PARAMS}),
    "check.gradient": (of_check_gradient, {"candidate": np.ones(3), **OPTIONS}),
    "check.jvp": (of_check_jvp, OPTIONS),
    "check.vjp": (of_check_vjp, OPTIONS),
    "credit.alignment": (
        jb.credit.alignment,
        only("params", "x", "y") | {"state": state_of(STATES["FeedbackAlignment"]), "key": KEY},
    ),
    "optim.kfac": (
        of_kfac,
        {"net": NET, "loss": LOSS, "example": (X, Y), "key": KEY, "factors_every": 1,
         "invert_every": 1, "roots": jb.curvature.Exact(), "sharing": "expand",
         "joint_bias": True, "corrected": False, "params": PARAMS},
    ),
    "optim.hessian_free": (of_hessian_free, {"net": NET, "loss": LOSS, "iterations": 1}),
}  # fmt: skip
CALLS |= {
    f"per_example.{name}": (getattr(jb.per_example, name), given) for name, given in ANSWERS.items()
}
CALLS["per_example.gradient_chunks"] = (chunks, {"bp": BP, "size": 1})
CALLS |= {
    f"curvature.{name}": (getattr(jb.curvature, name), CURVATURE | given)
    for name, given in MATRICES.items()
}


MEANT = {
    ("summary", "x", "None"),  # nothing is known of the inputs
    ("trainable_mask", "params", "of another net"),  # only their structure counts
    ("trainable_mask", "params", "transposed"),
    ("trainable_mask", "params", "integers"),
    ("trainable_mask", "params", "complex"),
    ("trainable_mask", "params", "words"),
    ("check.layer", "params", "None"),  # fresh ones
    ("check.assert_layer", "params", "None"),
}
"""What is no rubbish there."""
EMPTY = {"backprop", "per_example.deferred", "diagnose.first_nonfinite"}
"""These take a mini-batch of nothing: it has no mean, but nothing else is wrong with it."""


def functions():
    """Every call of `CALLS`, each argument in turn replaced by all rubbish of its kind."""
    for name, (target, given) in CALLS.items():
        for argument in given:
            kind = ARGUMENTS.get(KINDS.get(argument, argument))
            if kind is None:
                continue
            for what, bad in kind.items():
                if (name, argument, what) in MEANT:
                    continue
                yield Case(
                    f"{name}: {argument} {what}",
                    (name,),
                    lambda target=target, given=given | {argument: bad}: target(**given),
                    REMEDY,
                )
            if argument == "key" and name.split(".")[-1] in NEEDS_KEY:
                yield Case(
                    f"{name}: no key",
                    (name,),
                    lambda target=target, given=given | {"key": None}: target(**given),
                    "key",
                )
        if {"params", "x", "y"} <= set(given) and name not in EMPTY:
            yield Case(
                f"{name}: no examples",
                (name,),
                lambda t=target, given=given | {"x": X[:0], "y": Y[:0]}: t(**given),
                "empty|weights",
            )


def rules():
    """Every rule: what init and gradient are given."""
    for name, rule in STATES.items():
        for argument in ("net", "params", "key"):
            for what, bad in ARGUMENTS[argument].items():
                yield Case(
                    f"{name}.init: {argument} {what}",
                    (f"credit.{name}",),
                    lambda rule=rule, a={"key": KEY, "net": NET, "params": PARAMS} | {argument: bad}: (
                        rule.init(**a)
                    ),
                    REMEDY,
                )
        state = state_of(rule)
        given = only("params", "x", "y") | {"state": state, "key": None}
        for argument in ("state", "params", "x", "y", "key"):
            for what, bad in ARGUMENTS[argument].items():
                yield Case(
                    f"{name}.gradient: {argument} {what}",
                    (f"credit.{name}",),
                    lambda rule=rule, given=given | {argument: bad}: rule.gradient(**given),
                    REMEDY,
                )


NORMED_PARAMS = zeros_like(jax.eval_shape(NORMED.init, KEY))
STATS = {"layers[0]": jb.Averages(np.zeros(4), np.ones(4))}
OUTPUTS = np.zeros((BATCH, 3))


def backward(delta=OUTPUTS, net=NET, params=PARAMS, trace=None, collect=jb.sweep.total, **more):
    trace = jb.Trace(None, None, jax.eval_shape(lambda: jb.forward(NET, PARAMS, X)[1]))
    return jax.eval_shape(lambda d: jb.backward(net, params, trace, d, collect, **more), delta)


def capture(params, x, cost=model_cost, **options):
    return jb.capture(cost, **options)(params, x)


def others():
    """What is left: calls by public name, with the place that their messages must have."""
    w = {"w": np.zeros((4, 3))}
    table = {
        "update_averages": [
            (lambda: jb.update_averages(STATS, {}), "different networks"),
            (lambda: jb.update_averages(STATS, STATS, 2.0), "momentum.* must"),
            (lambda: jb.update_averages(STATS, STATS, NAN), "momentum.* must"),
            (lambda: jb.update_averages(STATS, STATS, "a"), "momentum.* must"),
            (lambda: jb.update_averages(STATS, None), "batch_averages"),
            (lambda: jb.update_averages(PARAMS, STATS), "batch_averages"),
        ],
        "mean_averages": [
            (lambda: jb.mean_averages(NORMED, NORMED_PARAMS, []), "no mini-batch"),
            (lambda: jb.mean_averages(NORMED, NORMED_PARAMS, [X[:0]]), "empty"),
            (lambda: jb.mean_averages(NORMED, NORMED_PARAMS, None), "batches must"),
            (lambda: jb.mean_averages(NORMED, NORMED_PARAMS, X), "batches must"),
            (lambda: jb.mean_averages(jb.Tanh, (), [X]), "net must"),
        ],
        "fold_batch_norm": [
            (lambda: jb.fold_batch_norm(NORMED, NORMED_PARAMS, {}), "make it with batch_averages"),
            (lambda: jb.fold_batch_norm(NORMED, NORMED_PARAMS, None), "state must"),
            (lambda: jb.fold_batch_norm(NORMED, PARAMS, STATS), "must|made with init"),
            (lambda: jb.fold_batch_norm(jb.BatchNorm, NORMED_PARAMS, STATS), "net must"),
            (
                lambda: jb.fold_batch_norm(
                    NORMED, NORMED_PARAMS, {"layers[0]": jb.Averages(np.zeros(3), np.ones(3))}
                ),
                "another network",
            ),
        ],
        "metrics.accuracy": [
            (lambda: jb.metrics.accuracy(OUTPUTS, Y[:2]), "targets need the shape"),
            (lambda: jb.metrics.accuracy(OUTPUTS, np.zeros((3, 3, 1))), "targets need the shape"),
            (lambda: jb.metrics.accuracy(OUTPUTS.tolist(), Y), "outputs must"),
            (lambda: jb.metrics.accuracy(OUTPUTS, Y.tolist()), "targets must"),
            (lambda: jb.metrics.accuracy(np.zeros(()), Y), "outputs must"),
        ],
        "metrics.binary_accuracy": [
            (lambda: jb.metrics.binary_accuracy(OUTPUTS, Y), "targets need the shape"),
            (lambda: jb.metrics.binary_accuracy(OUTPUTS, "a"), "targets must"),
            (lambda: jb.metrics.binary_accuracy(OUTPUTS.astype(complex), OUTPUTS), "outputs must"),
        ],
        "metrics.absolute_error": [
            (lambda: jb.metrics.absolute_error(OUTPUTS, Y), "targets need the shape"),
            (lambda: jb.metrics.absolute_error(OUTPUTS, None), "targets must"),
            (lambda: jb.metrics.absolute_error("a", OUTPUTS), "outputs must"),
        ],
        "summary": [
            (lambda: jb.summary(NET, (4,), x=X), "not both"),
            (lambda: jb.summary(NET, (3,)), "needs 4 features"),
            (lambda: jb.summary(NET, "abc"), "x_shape must"),
            (lambda: jb.summary(NET, (-4,)), "x_shape must"),
            (lambda: jb.summary(NET, (4.5,)), "x_shape must"),
            (lambda: jb.summary(NET, 4), "x_shape must"),
        ],
        "backward": [
            (lambda: backward(net=jb.Tanh), "net must"),
            (lambda: backward(params=OTHER), "must|made with init"),
            (lambda: backward(params=PARAMS[:1]), "made with init"),
            (lambda: backward(transport=OTHER), "transport must"),
            (lambda: backward(delta=OUTPUTS[:, :2]), "delta must"),
            (lambda: backward(delta=OUTPUTS[:2]), "delta must"),
            (lambda: backward(delta=OUTPUTS.astype(int)), "delta must"),
        ],
        "capture": [
            (lambda: capture(w, 3.0), "has no axis of examples"),
            (lambda: capture({"w": np.zeros((4, 3), complex)}, X), "must|real"),
            (lambda: capture({"w": np.full((4, 3), "a")}, X), "must|real"),
            (lambda: capture(w, np.full((BATCH, 4), "a")), "must|real"),
            (lambda: jb.capture("model"), "cost must be a function"),
            (lambda: jb.capture(None), "cost must be a function"),
            (lambda: capture(w, X, lambda p, x: x @ p["w"]), "must|one number"),
            (lambda: capture(w, X, lambda p, x: None), "must|one number"),
            (lambda: capture(w, X, lambda p, x: "a"), "must|one number"),
            (lambda: capture(w, X, lambda p, x: jnp.sum(x @ p["w"]), has_aux=True), "has_aux"),
            (lambda: capture(w, X, has_aux="yes"), "has_aux must"),
            (lambda: jb.capture.deferred("model"), "cost must be a function"),
            (lambda: jb.capture.explain("model"), "cost must be a function"),
            (lambda: jb.capture.deferred(model_cost, has_aux="yes"), "has_aux must"),
            (lambda: jb.capture.explain(model_cost, has_aux="yes"), "has_aux must"),
        ],
        "diagnose.plot": [
            (lambda: jb.diagnose.plot(None), "flow must"),
            (lambda: jb.diagnose.plot(BP), "flow must"),
            (lambda: jb.diagnose.plot(jb.diagnose.DeltaFlow({}, {}), BP), "units must"),
        ],
        "credit.Recorder": [
            (lambda: jb.credit.Recorder(X, Y, 0), "every must"),
            (lambda: jb.credit.Recorder(X, Y[:2]), "targets y have"),
            (lambda: jb.credit.Recorder(X, None), "y must"),
            (lambda: jb.credit.Recorder(X, Y).plot(), "nothing has been recorded"),
            (lambda: jb.credit.Recorder(X, Y)(None), "needs a rule"),
        ],
        "credit.map_feedback": [
            (lambda: jb.credit.map_feedback("f", PARAMS), "f must be a function"),
        ],
        "credit.State": [
            (lambda: jb.credit.State(NET, jb.credit.Backpropagation(), KEY).loss, "loss"),
        ],
        "credit.Rule": [
            (lambda: jb.credit.Backpropagation().init(KEY, NET, PARAMS), "has no loss"),
            (
                lambda: STATES["KolenPollack"].gradient(
                    state_of(STATES["FeedbackAlignment"]), PARAMS, X, Y
                ),
                "not of KolenPollack",
            ),
        ],
        "optim.hessian_free": [
            (lambda: of_hessian_free(net=NET, loss=LOSS, damping=-1.0), "damping must"),
            (lambda: of_hessian_free(net=NET, loss=LOSS, damping="a"), "damping must"),
            (lambda: of_hessian_free(net=NET, loss=LOSS, learning_rate=0.0), "learning_rate must"),
            (lambda: of_hessian_free(net=NET, loss=LOSS, learning_rate=NAN), "learning_rate must"),
            (lambda: of_hessian_free(net=NET, loss=LOSS, warm_start=2.0), "warm_start must"),
            (lambda: of_hessian_free(net=NET, loss=LOSS, tolerance="a"), "tolerance must"),
            (lambda: of_update(), "batch=\\(x, y\\)"),
            (lambda: of_update(x=X), "batch=\\(x, y\\)"),
            (lambda: of_update(x=X, y=Y[:2]), "targets y have"),
        ],
        "optim.kfac": [
            (lambda: jb.optim.kfac(NET, LOSS, (X, Y), 0.1, key=KEY, decay=1.0), "decay must"),
            (lambda: jb.optim.kfac(NET, LOSS, (X, Y), 0.1, key=KEY, decay="a"), "decay must"),
            (
                lambda: jb.optim.kfac(NET, LOSS, (X, Y), 0.1, key=KEY, momentum=-1),
                "momentum.* must",
            ),
            (lambda: jb.optim.kfac(NET, LOSS, X, 0.1, key=KEY), "example must"),
            (lambda: jb.optim.kfac(NET, LOSS, (X, Y), -0.1, key=KEY), "learning_rate must"),
            (
                lambda: jb.optim.kfac(NET, LOSS, (X, Y), 0.1, key=KEY, norm_constraint=NAN),
                "norm_constraint must",
            ),
        ],
        "per_example.noisy_gradient": [
            (
                lambda v=v: jb.per_example.noisy_gradient(KEY, BP, 1.0, v),
                "noise_multiplier must",
            )
            for v in (-1.0, NAN, INF, "a", None, np.ones(3), 1j)
        ],
        "per_example.clipped_gradient": [
            (lambda: jb.per_example.clipped_gradient(BP, {"layers[0]": 1.0}), "per_layer"),
            (
                lambda: jb.per_example.clipped_gradient(BP, {"layers[0]": 1.0}, "per_layer"),
                "missing: layers\\[2\\]",
            ),
            (
                lambda: jb.per_example.clipped_gradient(
                    BP, {"layers[0]": -1.0, "layers[2]": 1.0}, "per_layer"
                ),
                "max_norm\\['layers\\[0\\]'\\] must",
            ),
            (lambda: jb.per_example.clipped_gradient(BP, 1.0, lambda n: n[None]), "one factor"),
        ],
        "per_example.variance": [
            (lambda v=v: jb.per_example.variance(BP, ddof=v), "ddof") for v in (3, "a", 0.5, -1)
        ],
        "per_example.snr": [(lambda: jb.per_example.snr(BP, ddof=0.5), "ddof")],
        "per_example.gram_between": [
            (lambda: jb.per_example.gram_between(BP, None), "needed|must"),
            (
                lambda: jb.per_example.gram_between(BP, swept(params=OTHER, net=jb.mlp([4, 6, 3]))),
                "different networks",
            ),
            (
                lambda: jb.per_example.gram_between(
                    BP, jb.per_example.Deferred(PARAMS, X, Y, None, NET, LOSS)
                ),
                "needs the pairs",
            ),
        ],
        "per_example.Deferred": [
            (
                lambda: jb.per_example.gram(
                    jb.per_example.Deferred(PARAMS, X, Y, None, NET, LOSS), microbatch=1
                ),
                "leave microbatch out",
            ),
        ],
        "curvature.update_average": [
            (lambda: jb.curvature.update_average(None, None, 0.5), "average must"),
            (lambda: jb.curvature.update_average(PARAMS, PARAMS, 0.5), "average must"),
        ],
        "check.gradient": [
            (lambda: of_check_gradient(None), "no gradient for"),
            (lambda: of_check_gradient(np.ones(3, int)), "must be floating-point"),
            (lambda: of_check_gradient(np.full(3, "a")), "candidate for"),
            (lambda: of_check_gradient(np.ones(3), argnums=2), "argnums 2"),
            (lambda: of_check_gradient(np.ones(3), argnums="a"), "argnums"),
            (lambda: of_check_gradient(np.ones(3), tolerance=NAN), "tolerance must"),
            (lambda: of_check_gradient(np.ones(3), tolerance="a"), "tolerance must"),
            (lambda: of_check_gradient(np.ones(3), seed=-1), "seed must"),
            (lambda: of_check_gradient(np.ones(3), seed=1.5), "seed must"),
            (lambda: of_check_gradient(np.ones(3), exact="no"), "exact.* must"),
            (lambda: jb.check.gradient(jnp.sin, np.ones(3), candidate=np.ones(3)), "one scalar"),
            (lambda: jb.check.gradient("f", np.ones(3), candidate=np.ones(3)), "fun must"),
        ],
        "check.assert_gradient": [
            (lambda: jb.check.assert_gradient("f", np.ones(3), candidate=np.ones(3)), "fun must"),
        ],
        "check.jvp": [
            (lambda: jb.check.jvp("f", np.ones(3)), "fun must"),
            (lambda: of_check_jvp(exact="no"), "exact.* must"),
            (lambda: jb.check.jvp(jnp.sin, np.ones(3, int)), "no floating-point"),
            (lambda: jb.check.jvp(jnp.sin, np.ones(3, complex)), "complex"),
        ],
        "check.assert_jvp": [(lambda: jb.check.assert_jvp("f", np.ones(3)), "fun must")],
        "check.vjp": [
            (lambda: jb.check.vjp("f", np.ones(3)), "fun must"),
            (lambda: jb.check.vjp(jnp.sin), "no floating-point"),
            (lambda: of_check_vjp(exact="no"), "exact.* must"),
            (lambda: jb.check.vjp(jnp.sin, "a"), "no floating-point"),
        ],
        "check.assert_vjp": [(lambda: jb.check.assert_vjp("f", np.ones(3)), "fun must")],
        "check.layer": [
            (lambda: jb.check.layer(jb.Tanh(), (4,), x=X), "either x_shape"),
            (lambda: jb.check.layer(jb.Tanh(), (4,), batch=0), "batch must"),
            (lambda: jb.check.layer(jb.Tanh(), (4,), batch="a"), "batch must"),
            (lambda: jb.check.layer(jb.Tanh(), "ab"), "x_shape must"),
            (lambda: jb.check.layer(jb.Tanh, (4,)), "layer must"),
            (lambda: jb.check.layer(jb.Tanh(), (4,), dtype="words"), "dtype must"),
            (lambda: jb.check.layer(jb.Tanh(), (4,), dtype=int), "dtype must"),
        ],
        "check.network": [
            (lambda: jb.check.network(*CALL.values(), dtype="words"), "dtype must"),
            (lambda: jb.check.network(*CALL.values(), dtype=int), "dtype must"),
        ],
        "CSVLogger": [
            (lambda v=v: jb.CSVLogger("log.csv", overwrite=v), "CSVLogger: overwrite must")
            for v in ("no", 1, None)
        ],
        "JSONLinesLogger": [
            (lambda: jb.JSONLinesLogger("log.jsonl", overwrite="no"), "overwrite must")
        ],
        "TensorBoardLogger": [
            (lambda: jb.TensorBoardLogger("runs", overwrite="no"), "overwrite must")
        ],
        "Sequential": [(lambda v=v: jb.Sequential(v), "which is no layer") for v in NETS]
        + [(lambda: jb.Sequential(), "at least one layer")],
        "FanOut": [(lambda v=v: jb.FanOut(v), "which is no layer|at least") for v in NETS],
        "Parallel": [(lambda v=v: jb.Parallel(v), "which is no layer|at least") for v in NETS],
        "Split": [(lambda v=v: jb.Split(v), "sizes must") for v in SIZES]
        + [(lambda: jb.Split(), "sizes must")],
        "transformer": [
            (lambda: jb.transformer(5, 5, 1, 2, 3), "heads must divide width"),
            (lambda: jb.transformer(5, 4, 1, 4, 3, rotary=True), "multiple of"),
        ],
        "multi_head_attention": [
            (
                lambda: jb.multi_head_attention(4, 2, dropout=1.0),
                "multi_head_attention: dropout must",
            )
        ],
        "cross_attention": [
            (lambda: jb.cross_attention(4, 2, dropout=-0.1), "cross_attention: dropout must")
        ],
        "lstm": [(lambda: jb.lstm(), "give inputs")],
        "resnet": [(lambda: jb.resnet((8, 8, 1), (2,), (1, 1), 3), "one for each")],
        "Outer": [
            (lambda: jb.Outer.of(np.zeros(4), np.zeros((2, 3))), "must"),
            (lambda: jb.gradient({"w": np.zeros((4, 3))}), "takes what"),
        ],
        "as_function": [(lambda: jb.as_function([NET]), "net must")],
        "datasets.load": [
            (lambda: datasets.load("nothing.csv"), "no such file"),
            (lambda: datasets.load(__file__), "only .csv and .npz"),
            (lambda: datasets.load(3), "source must"),
            (lambda: datasets.load(None), "source must"),
        ],
    }
    for name, given in table.items():
        for i, (call, message) in enumerate(given):
            yield Case(f"{name}, {i}: {message}", (name,), call, message)


DATA = {
    "no pair": X,
    "of three": (X, Y, Y),
    "of other lengths": (X, Y[:2]),
    "of nothing": (X[:0], Y[:0]),
    "None": None,
    "words": (np.full((BATCH, 4), "a"), Y),
    "NaN": (X * NAN, Y),
    "labels too large": (X, Y + 3),
    "a feature too few": (X[:, :3], Y),
}


def evaluations():
    """`evaluate`, whose data are a pair."""
    given = only("net", "loss", "params") | {"data": (X, Y), "metrics": None}
    bad = {"data": DATA}
    for argument, values in bad.items():
        for what, value in values.items():
            yield Case(
                f"evaluate: {argument} {what}",
                ("evaluate",),
                lambda given=given | {argument: value}: jb.evaluate(**given),
                REMEDY + "|but y has|is empty|Fill",
            )
