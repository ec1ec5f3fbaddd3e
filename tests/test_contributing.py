"""CONTRIBUTING tells the truth: what it names is there, and its quantity is one."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Form(jb.Layer):
    """y_o = sum_ij x_i x_j w_ijo, written as a newcomer would."""

    f: Any = lambda x: x
    steps: tuple = ()
    reads = ("x",)

    def init(self, key):
        return jax.random.normal(key, (3, 3, 2))

    def forward(self, w, x, key=None):
        return jnp.einsum("i,j,ijo->o", x, x, w), None

    def backward(self, w, trace, delta):
        x = trace.x
        delta_x = jnp.einsum("j,ijo,o->i", x, w, delta) + jnp.einsum("i,ijo,o->j", x, w, delta)
        return delta_x, jb.Outer.of(jnp.outer(x, x).ravel(), delta, self.steps)


def test_a_weight_of_another_shape_says_which_steps_it_needs() -> None:
    x = jax.random.normal(jax.random.key(1), (4, 3))
    with pytest.raises(ValueError, match="operands swapped") as found:
        jb.check.layer(Form(), x=x)
    (steps,) = re.findall(r"steps=(.*,\))", str(found.value))
    right = Form(steps=ast.literal_eval(steps))
    assert jb.check.layer(right, x=x).ok


def test_a_name_that_differs_in_every_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "LAYERS", ((Form(), (3,)),))
    with pytest.raises(ValueError, match=r"give Form a __repr__ without addresses"):
        catalogue.cases()
