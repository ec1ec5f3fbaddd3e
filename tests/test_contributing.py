"""CONTRIBUTING tells the truth: what it names is there, and its quantity is one."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbackprop as jb
from jbackprop import catalogue

pytestmark = pytest.mark.newest
ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_what_it_names_is_there() -> None:
    named = re.findall(r"\]\(([^)]+)\)|`([\w/]+\.py)`|(tests/\w+\.py)", TEXT)
    paths = {path for groups in named for path in groups if path}
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists(), path
    assert catalogue.LAYERS
    assert catalogue.LOSSES
    rules = (ROOT / "tests" / "test_per_example_rules.py").read_text()
    assert "def ask(" in rules
    assert "def truth(" in rules
    assert re.findall(r"^(\d+)\.", TEXT, re.MULTILINE) == [str(i) for i in range(1, 11)]


def test_its_quantity_is_that_of_vmap_grad() -> None:
    space: dict = {}
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, "CONTRIBUTING.md", "exec"), space)
    net, loss = jb.mlp([3, 4, 2]), jb.SquaredError()
    params = net.init(jax.random.key(0))
    x, y = (jax.random.normal(jax.random.key(i), (5, n)) for i, n in ((1, 3), (2, 2)))

    def cost(params, x, y):
        return loss.value(jb.forward(net, params, x[None])[0], y[None])[0]

    each = jax.vmap(jax.grad(cost), in_axes=(None, 0, 0))(params, x, y)
    rows = [jnp.abs(g).reshape(5, -1) for g in jax.tree.leaves(each)]
    found = space["largest"](jb.backprop(net, loss, params, x, y).factored)
    np.testing.assert_allclose(found, jnp.concatenate(rows, axis=1).max(axis=1), rtol=1e-12)
