"""Bad input, generated: every public configuration crossed with rubbish, by the type of the field."""

import inspect
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jbackprop as jb

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
