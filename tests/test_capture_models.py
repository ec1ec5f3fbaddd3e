"""Captured pairs of real models of other libraries, against vmap(jax.grad)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from captured_models import MODELS

import jbackprop as jb
from jbackprop import per_example as pe
from jbackprop.factored import is_factored

pytestmark = [
    pytest.mark.newest,
    pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning"),
]
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def as_they_promote():
    """Other libraries add a float32 to a float64, and a vector to a matrix."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def flat(factored):
    """The pairs of a tree, those inside sums too, with the parameters' names."""
    for pair in jax.tree.leaves(factored, is_leaf=is_factored):
        yield from [pair, *getattr(pair, "parts", ())]


def compare(name, ours, truth, tolerance, scale):
    assert ours.shape == truth.shape, name
    error = np.max(np.abs(ours - truth), initial=0)
    assert error <= tolerance * scale, f"{name}: {error / scale:.1e} off"


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_is_exact(case):
    cost, params, batch = case.build()
    tolerance = case.tolerance or TOLERANCE
    axes = (None, *(0 for _ in batch))
    costs, each = jax.jit(jax.vmap(jax.value_and_grad(cost), axes))(params, *batch)
    costs, each = jax.device_get((costs, each))
    wide = [np.asarray(g, np.float64) for g in jax.tree.leaves(each)]
    norms = np.sqrt(sum(np.sum(np.square(g.reshape(len(g), -1)), axis=1) for g in wide))
    bound = np.median(norms)
    kinds = []

    @jax.jit
    def ask(params, batch, bound):
        costs, factored = jb.capture(cost)(params, *batch)
        kinds.extend(flat(factored))
        return (
            costs,
            pe.gradients(factored),
            pe.norms(factored),
            pe.clipped_gradient(factored, bound).gradient,
        )

    ours = jax.device_get(ask(params, batch, jnp.asarray(bound, jax.tree.leaves(params)[0].dtype)))
    compare("costs", ours[0], costs, tolerance, np.max(np.abs(costs)))
    assert jax.tree.structure(ours[1]) == jax.tree.structure(each)
    largest = max(np.max(np.abs(g)) for g in wide)
    factors = np.minimum(1, bound / norms)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = zip(names, wide, *map(jax.tree.leaves, (ours[1], ours[3])), strict=True)
    for name, truth, mine, clipped in found:
        scale = np.max(np.abs(truth))
        scale = scale if scale > 1e-10 * largest else largest  # zero by nature
        compare(name, mine, truth, tolerance, scale)
        compare(f"clipped {name}", clipped, np.tensordot(factors, truth, 1), tolerance, scale)
    compare("norms", ours[2], norms, tolerance, np.max(norms))
    written = {f"{pair.home.path}: {pair.why}" for pair in kinds if isinstance(pair, jb.Full)}
    unused = {pair.home.path for pair in kinds if isinstance(pair, jb.Nothing)}
    assert not (case.every and written)
    assert not unused
