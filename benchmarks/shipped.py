"""`jb.check.vjp` over custom derivative rules that ship in JAX, Optax and Flax.

Every function at ordinary points, at points where it has a kink or an edge (0, ties, saturation),
in float32. Prints what is not right, and a count. Flax is left out where it is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbackprop as jb

KEY = np.random.default_rng(0)
PLAIN = KEY.standard_normal((4, 6)).astype("float32")
EDGES = np.array([[-30.0, -6.0, -1.0, 0.0, 1.0, 6.0]], "float32")
POSITIVE = np.exp(PLAIN)
LABELS = np.array([0, 3, 5, 1])
WHOLE = np.eye(6, dtype="float32")[LABELS]
SQUARE = (PLAIN[:, :4] @ PLAIN[:, :4].T + 4 * np.eye(4)).astype("float32")

ACTIVATIONS = (
    "relu relu6 softplus silu gelu elu celu selu leaky_relu log_sigmoid log_softmax softmax "
    "standardize hard_tanh hard_sigmoid hard_silu mish squareplus sparse_plus sparse_sigmoid "
    "sigmoid soft_sign glu logsumexp logmeanexp tanh"
)
SPECIAL = "entr expit gammaln digamma i0 i0e i1 i1e log_ndtr ndtr erf erfc exp1 sici spence"


def functions() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(name, function, arguments), each at one point."""
    for name in ACTIVATIONS.split():
        if f := getattr(jax.nn, name, None):
            yield f"jax.nn.{name}", f, (PLAIN,)
            yield f"jax.nn.{name} at edges", f, (EDGES,)
    for name in SPECIAL.split():
        f = getattr(jax.scipy.special, name, None)
        if f is not None and name != "sici":
            yield f"jax.scipy.special.{name}", f, (POSITIVE,)
    probabilities = np.asarray(jax.nn.sigmoid(PLAIN))
    for name in ("logit", "ndtri", "erfinv"):
        yield f"jax.scipy.special.{name}", getattr(jax.scipy.special, name), (probabilities,)
    for name in ("xlogy", "xlog1py", "rel_entr", "kl_div", "betaln"):
        yield (
            f"jax.scipy.special.{name}",
            getattr(jax.scipy.special, name),
            (POSITIVE, POSITIVE[::-1].copy()),
        )
    yield "jax.scipy.special.xlogy at 0", jax.scipy.special.xlogy, (0 * POSITIVE, POSITIVE)
    yield "jnp.sinc", jnp.sinc, (PLAIN,)
    yield "jnp.sinc at 0", jnp.sinc, (EDGES,)
    yield "jnp.logaddexp", jnp.logaddexp, (PLAIN, PLAIN[::-1].copy())
    yield "jnp.logaddexp at ties", jnp.logaddexp, (PLAIN, PLAIN)
    yield "jnp.linalg.norm", jnp.linalg.norm, (PLAIN,)
    for name in ("inv", "cholesky", "slogdet", "det"):
        yield f"jnp.linalg.{name}", getattr(jnp.linalg, name), (SQUARE,)
    yield "jnp.linalg.solve", jnp.linalg.solve, (SQUARE, PLAIN)
    yield "jax.scipy.linalg.expm", jax.scipy.linalg.expm, (0.3 * SQUARE,)
    yield from losses()
    if importlib.util.find_spec("flax"):
        yield from of_flax()


def losses() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Optax's losses and safe functions."""
    found = optax.losses
    p = np.asarray(jax.nn.softmax(PLAIN))
    for name in ("squared_error", "l2_loss", "huber_loss", "log_cosh", "cosine_similarity"):
        yield f"optax.losses.{name}", getattr(found, name), (PLAIN, PLAIN[::-1].copy())
    yield "optax.losses.huber_loss at 0", found.huber_loss, (PLAIN, PLAIN)
    yield "optax.losses.hinge_loss", found.hinge_loss, (PLAIN, np.sign(PLAIN[::-1]))
    for name in (
        "sigmoid_binary_cross_entropy",
        "softmax_cross_entropy",
        "safe_softmax_cross_entropy",
        "sigmoid_focal_loss",
        "poly_loss_cross_entropy",
        "sparsemax_loss",
        "multiclass_sparsemax_loss",
        "kl_divergence",
        "convex_kl_divergence",
    ):
        f = getattr(found, name, None)
        if f is None or name == "multiclass_sparsemax_loss":
            continue
        first = np.log(p) if "divergence" in name else PLAIN
        second = p[::-1].copy() if "divergence" in name else WHOLE
        yield f"optax.losses.{name}", lambda z, y, f=f: f(z, y), (first, second)
    labelled = found.softmax_cross_entropy_with_integer_labels
    yield "optax.losses.softmax_cross_entropy_with_integer_labels", labelled, (PLAIN, LABELS)
    for name in ("perceptron_loss", "multiclass_hinge_loss", "multiclass_perceptron_loss",
                 "multiclass_logistic_loss"):  # fmt: skip
        if f := getattr(found, name, None):
            yield f"optax.losses.{name}", f, (PLAIN, LABELS if "multi" in name else np.sign(PLAIN))
    yield "optax.safe_norm", lambda x: optax.safe_norm(x, 1e-6), (PLAIN,)
    yield "optax.safe_norm at 0", lambda x: optax.safe_norm(x, 1e-6), (0 * PLAIN,)
    yield "optax.global_norm", optax.global_norm, ({"a": PLAIN, "b": EDGES},)
    for name in ("projection_simplex", "projection_l1_ball", "projection_l2_ball",
                 "projection_non_negative"):  # fmt: skip
        if f := getattr(optax.projections, name, None):
            yield f"optax.projections.{name}", f, (PLAIN[0],)


def of_flax() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Flax's activations that are not JAX's, attention, and its float8 operations."""
    import flax.linen as nn
    from flax.linen import fp8_ops

    heads = KEY.standard_normal((3, 2, 5, 2, 4)).astype("float32")
    yield "flax.linen.dot_product_attention", nn.dot_product_attention, tuple(heads)
    norm = nn.LayerNorm(epsilon=1e-6)
    params = {"params": {"scale": PLAIN[0], "bias": PLAIN[1]}}
    yield "flax.linen.LayerNorm", lambda p, x: norm.apply(p, x), (params, PLAIN)
    for name in ("in_qdq", "out_qdq"):
        if f := getattr(fp8_ops, name, None):
            one, past = np.ones(1, "float32"), np.zeros(8, "float32")
            kinds = jnp.float32, jnp.float8_e4m3fn if name == "in_qdq" else jnp.float8_e5m2
            rule = functools.partial(f, *kinds)
            yield f"flax.linen.fp8_ops.{name}", rule, (PLAIN, one, past)


def main() -> None:
    """Check all of them, and print what is not right."""
    counts = {"right": 0, "inconclusive": 0, "wrong": 0, "refused": 0}
    for name, f, primals in functions():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jb.check.TruthWarning)
            try:
                report = jb.check.vjp(f, *primals)
            except (TypeError, ValueError, NotImplementedError) as error:
                print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}\n")
                counts["refused"] += 1
                continue
        counts[report.verdict] += 1
        if not report.ok:
            print(f"{name}\n{report}\n")
    print(counts)


if __name__ == "__main__":
    main()
