"""Settings are taken as Python, NumPy and JAX give them."""

import jax.numpy as jnp
import numpy as np
import pytest

import jbackprop as jb

NET, LOSS = jb.mlp([4, 5, 3]), jb.SoftmaxCrossEntropy()


@pytest.mark.parametrize(
    "number", [1, 0.5, np.float32(0.5), np.int64(1), jnp.float32(0.5)], ids=repr
)
def test_a_damping_and_a_rate_are_any_real_number(number):
    params = {"w": jnp.ones(3)}
    for setting in ("damping", "learning_rate"):
        optimizer = jb.optim.hessian_free(NET, LOSS, **{setting: number})
        if setting == "damping":
            assert float(optimizer.init(params).damping) == float(number)
