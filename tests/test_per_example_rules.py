"""Questions about single examples of every rule in the table, against vmap(jax.grad)."""

import inspect
import itertools
import re
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tabled import cases
from truth import assert_close, each_grad, relative, rows

import jbackprop as jb
from jbackprop import per_example as pe
from jbackprop import structure

CASES = [
    case for case in cases(5)
    if not case.net.couples_examples
    and jax.tree.leaves(jax.eval_shape(case.net.init, jax.random.key(0)))
]  # fmt: skip
W = np.array([0.5, 0.0, 2.0, 1.0, 0.25])


def is_deep(case):
    """Whether it is of several layers, each of which is tried alone too."""
    return len(list(structure.walk(case.net))) > 3


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


def in_turns():
    """Everything of layers and small composites, of whose kinds of pairs all else is made.

    Of losses, which make deltas alone, and of deep composites some of it. Whether pairs are kept or
    a second sweep is asked is tried by turns: a small composite always keeps them.
    """
    turns = {deep: itertools.cycle([True, False]) for deep in (True, False)}
    for case in CASES:
        deep, loss = is_deep(case), isinstance(case.rule, jb.losses.Loss)
        later = isinstance(case.rule, jb.Composite) and next(turns[deep])
        kept = not (deep and later)
        yield pytest.param(case, kept, later, deep or loss, id=case.name)


def ask(bp, vectors, weights, deep):
    """Everything at once, as one program is cheaper than many; of deep nets some of it."""
    found = {
        "norms": pe.norms(bp, weights=weights),
        "layers": pe.norms(bp, per_layer=True, weights=weights),
        "flat": pe.clipped_gradient(bp, 0.7, weights=weights).gradient,
    }
    if deep:
        return found
    return found | {
        "project": pe.project(bp, vectors, weights=weights),
        "mean": pe.mean(bp, weights=weights),
        "second_moment": pe.second_moment(bp, weights=weights),
        "variance": pe.variance(bp, weights=weights),
        "cosine": pe.cosine_to_mean(bp, weights=weights),
        "scale": pe.noise_scale(bp, weights=weights),
        "gram": pe.gram(bp),
    }


def ask_later(bp):
    """What nobody keeps pairs for, two examples at a time."""
    return {
        "flat": pe.clipped_gradient(bp, 0.7, microbatch=2).gradient,
        "layers": pe.norms(bp, per_layer=True, microbatch=2),
    }


def truth(case, each, vectors, weights):
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
def test_every_question_that_there_is_is_asked():
    here = Path(__file__).parent
    text = "".join(
        (here / f"{name}.py").read_text() for name in ("test_per_example", Path(__file__).stem)
    )
    names = [name for name, value in vars(pe).items() if inspect.isfunction(value)]
    assert len(names) > 10
    assert not [name for name in names if not re.search(rf"\b(pe|per_example)\.{name}\b", text)]


@pytest.mark.newest
@pytest.mark.parametrize(("case", "kept", "later", "few"), list(in_turns()))
def test_every_question_is_that_of_vmap_grad(case, kept, later, few):
    rng = np.random.default_rng(case.seed)
    vectors = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), case.params)

    @jax.jit
    def asked(params, x, y, vectors):
        at = case.net, case.loss, params, x, y
        found = ask(jb.backprop(*at), vectors, jnp.asarray(W), few) if kept else {}
        return found, ask_later(pe.deferred(*at)) if later else {}, each_grad(*at)

    *answers, each = asked(case.params, case.x, case.y, vectors)
    each = jax.tree.map(np.asarray, each)
    dues = [truth(case, each, vectors, weights) for weights in (W, None)]
    for found, due in zip(answers, dues, strict=True):
        for name in found.keys() - {"cosine", "scale", "gram"}:
            assert_close(found[name], due[name], 1e-12, zero=1e-14)
    if few:
        return
    found, due = answers[0], dues[0]
    np.testing.assert_allclose(found["cosine"], due["cosine"], atol=1e-12)
    np.testing.assert_allclose(found["scale"], due["scale"], rtol=1e-10, atol=1e-13)
    assert relative(found["gram"], due["gram"]) < 1e-12
