"""Networks that nobody thought of: depth 1 to 60, widths 1 to 64, every activation and loss.

The truth is autodiff: numbers confirm it for each layer, in test_rules.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import jbackprop as jb
from jbackprop import catalogue

pytestmark = pytest.mark.newest  # minutes of compiling; the rules one by one run on both

ACTIVATIONS = [
    layer
    for layer, _ in catalogue.LAYERS
    if isinstance(layer, jb.Elementwise | jb.Softmax) and not isinstance(layer, jb.Activation)
]
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.explicit, Phase.generate],  # a compilation each is too slow for shrinking
    "suppress_health_check": list(HealthCheck),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Small to print, and enough to build everything from."""

    net: jb.Sequential
    case: int
    batch: int
    seed: int
    scale: float

    @property
    def loss(self):
        return catalogue.LOSSES[self.case][0]

    def build(self):
        """(net, loss, params, x, y)."""
        keys = jax.random.split(jax.random.key(self.seed), 3)
        p = self.net.layers[0].p
        x = self.scale * jax.random.uniform(keys[1], (self.batch, p), minval=-1, maxval=1)
        y = catalogue.LOSSES[self.case][1](keys[2], (self.batch, 3))
        return self.net, self.loss, self.net.init(keys[0]), x, y


@st.composite
def problems(draw, scales=(2.0,)):
    case = draw(st.sampled_from(range(len(catalogue.LOSSES))))
    loss, _, output = catalogue.LOSSES[case]
    depth = draw(st.sampled_from([1, 2, 3, 5, 8]))
    widths = draw(st.lists(st.integers(1, 64), min_size=depth, max_size=depth))
    activations = draw(
        st.lists(st.sampled_from(ACTIVATIONS), min_size=depth - 1, max_size=depth - 1)
    )
    scale = draw(st.sampled_from(scales))
    if isinstance(loss, jb.PoissonNLL):
        scale = 1.0  # e^z has no finite value at an extreme z
    net = jb.mlp([*widths, 3], activations, output)
    return Problem(net, case, draw(st.integers(1, 33)), draw(st.integers(0, 2**31 - 1)), scale)


@given(problems(scales=(2.0, 2.0, 1e4)))
@settings(max_examples=5, **SETTINGS)
def test_float64(problem):
    verdict = jb.check.network(*problem.build(), truth="autodiff")
    assert not verdict.wrong, f"{problem}\n{verdict}"
    for leaf in verdict.failures:  # units all saturated: true gradients and ours are zero
        assert problem.scale == 1e4, f"{problem}\n{verdict}"
        assert leaf.figures.error == 0, f"{problem}\n{verdict}"


def test_sixty_layers():
    """Few different ones, so that they compile in a bearable time."""
    widths, activations = [5, 17, 2] * 20, ([jb.Elu(), jb.Softsign(), jb.Gelu()] * 20)[:59]
    problem = Problem(jb.mlp([*widths, 3], activations), 3, 9, seed=1, scale=2.0)
    verdict = jb.check.network(*problem.build(), truth="autodiff")
    assert verdict.ok, f"{problem}\n{verdict}"


@given(problems(), st.sampled_from(["float32", "bfloat16", "float16"]))
@settings(max_examples=4, **SETTINGS)
def test_low_precision(problem, dtype):
    verdict = jb.check.network(*problem.build(), dtype, "autodiff")
    assert not verdict.wrong, f"{problem}\n{verdict}"
    for leaf in verdict.failures:  # jax.grad loses as much in 16 bits, units flipping at kinks
        assert dtype != "float32", f"{problem}\n{verdict}"
        assert leaf.figures.error <= leaf.figures.tolerance, f"{problem}\n{verdict}"


@given(problems(scales=(1e4,)), st.sampled_from(["float64", "float32"]))
@settings(max_examples=3, **SETTINGS)
def test_extreme_inputs_give_finite_costs_deltas_and_gradients(problem, dtype):
    net, loss, params, x, y = problem.build()
    params, x = jax.tree.map(lambda v: v.astype(dtype), (params, x))
    bp = jb.backprop(net, loss, params, x, y)
    found = [bp.losses, *jb.deltas(bp).values(), *jax.tree.leaves(jb.gradient(bp))]
    assert all(np.all(np.isfinite(np.asarray(v))) for v in found)
