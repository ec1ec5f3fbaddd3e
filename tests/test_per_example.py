"""Questions about single examples: against vmap(jax.grad), written out by NumPy."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import assert_close, each_grad, relative

import jbackprop as jb
from jbackprop import catalogue, structure
from jbackprop import per_example as pe

CASES = [c for c in catalogue.cases(5) if not c.net.couples_examples]
DEEP = [c for c in CASES if isinstance(c.net, jb.Composite)]
W = np.array([0.5, 0.0, 2.0, 1.0, 0.25])


def rows(tree):
    """The leaves of a tree of (B, ...) side by side, (B, P)."""
    leaves = [np.asarray(v).reshape(len(v), -1) for v in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1) if leaves else np.zeros((5, 0))


def learn(case, tree):
    """Zeros where parameters are frozen: autodiff of what stops gradients has them already."""
    return jax.tree.map(jnp.asarray, tree)


def by_layer(case, each):
    """|g_n| of every layer and copy, from gradients that are written out."""
    found = OrderedDict()
    mask = structure.trainable_mask(case.net, case.params)
    learns = {p for p, _, part in structure.walk(case.net, mask) if any(jax.tree.leaves(part))}
    axes = structure.stack_axes(case.net)
    for path, _, part in structure.walk(case.net, each):
        if path in learns:
            squares = 0
            for g in jax.tree.leaves(part):
                own = tuple(range(1 + axes_of(axes, path), g.ndim))
                squares += np.sum(np.square(np.asarray(g)), axis=own)
            found[path] = np.moveaxis(np.sqrt(squares), 0, -1)
    return structure.by_copy(case.net, found)


def axes_of(axes, path):
    return max((n for shown, n in axes.items() if shown == path), default=0)


def ask(bp, vectors, microbatch, weights):
    """Everything at once: one program is cheaper than many."""
    options = {"microbatch": microbatch, "weights": weights}
    found = {
        "norms": pe.norms(bp, **options),
        "layers": pe.norms(bp, per_layer=True, **options),
        "project": pe.project(bp, vectors, **options),
        "flat": pe.clipped_gradient(bp, 0.7, **options),
        "layered": pe.clipped_gradient(bp, 0.7, "per_layer", **options),
        "mean": pe.mean(bp, **options),
        "second_moment": pe.second_moment(bp, **options),
        "variance": pe.variance(bp, **options),
        "cosine": pe.cosine_to_mean(bp, **options),
        "scale": pe.noise_scale(bp, **options),
        "scales": pe.noise_scale(bp, per_layer=True, **options),
    }
    if not isinstance(bp, pe.Deferred):
        found["gram"] = pe.gram(bp, microbatch=microbatch)
    return found


def truth(case, vectors, weights):
    each = each_grad(case.net, case.loss, case.params, case.x, case.y)
    w = np.ones(5) if weights is None else np.asarray(weights)
    g = rows(each)
    norms, layers = w * np.linalg.norm(g, axis=1), by_layer(case, each)
    v = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(vectors)])
    factors = w * np.minimum(1, 0.7 / np.maximum(norms, 1e-300))
    p = w / w.sum()
    mean = p @ g

    def like(flat):
        leaves, tree = jax.tree.flatten(case.params)
        cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]
        parts = np.split(flat, cuts)
        return jax.tree.unflatten(
            tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
        )

    def scale(squares, mean_square):
        trace = (p @ squares - mean_square) / (1 - np.sum(p**2))
        return trace, p @ squares - trace

    return {
        "norms": norms,
        "layers": OrderedDict((path, w * norm) for path, norm in layers.items()),
        "project": w * (g @ v),
        "flat": like(factors @ g),
        "mean": like(mean),
        "second_moment": like(p @ g**2),
        "variance": like(p @ (g - mean) ** 2),
        "cosine": (w != 0) * (g @ mean) / np.maximum(
            np.linalg.norm(g, axis=1) * np.linalg.norm(mean), 1e-300),
        "scale": scale(np.sum(g**2, axis=1), mean @ mean),
        "gram": g @ g.T,
    }  # fmt: skip


@pytest.mark.newest
@pytest.mark.parametrize("case", [c for c in CASES if jax.tree.leaves(c.params)],
                         ids=lambda case: case.name)  # fmt: skip
def test_every_question_is_that_of_vmap_grad(case):
    rng = np.random.default_rng(case.seed)
    vectors = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), case.params)

    @jax.jit
    def asked(params, x, y, vectors):
        bp = jb.backprop(case.net, case.loss, params, x, y)
        later = pe.deferred(case.net, case.loss, params, x, y)
        return [
            (ask(bp, vectors, None, jnp.asarray(W)), W),
            (ask(later, vectors, 2, None), None),
        ], pe.gradients(later)

    answers, each = asked(case.params, case.x, case.y, vectors)
    for found, weights in answers:
        due = truth(case, vectors, weights)
        for name in ("norms", "layers", "project", "flat", "mean", "second_moment", "variance"):
            got = found[name].gradient if name == "flat" else found[name]
            assert_close(got, due[name], 1e-12, zero=1e-14)
        np.testing.assert_allclose(found["cosine"], due["cosine"], atol=1e-12)
        np.testing.assert_allclose(found["scale"][1:], due["scale"], rtol=1e-10, atol=1e-13)
        if "gram" in found:
            assert relative(found["gram"], due["gram"]) < 1e-12
    assert_close(each, each_grad(case.net, case.loss, case.params, case.x, case.y), zero=1e-14)
