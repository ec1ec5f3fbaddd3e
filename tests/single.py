"""One layer against a plain function of one example, written independently of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from truth import assert_close

import jbackprop as jb
from jbackprop import sweep
from jbackprop.factored import is_factored


def random_like(tree, seed=0):
    """Numbers in the place of floating-point leaves; the others stay as they are."""
    rng = np.random.default_rng(seed)

    def fresh(v):
        if not jnp.issubdtype(v.dtype, jnp.floating):
            return v
        return jnp.asarray(0.2 + rng.standard_normal(v.shape), v.dtype)

    return jax.tree.map(fresh, tree)


def normal(*shape, seed=1):
    return jnp.asarray(0.3 + 2 * np.random.default_rng(seed).standard_normal(shape))


def assert_rule(layer, plain, x, key=None, tolerance=1e-12):
    """y, dC/dx, and every question about one example's gradient, of C_n = <delta_n, y_n>.

    `plain` is (params, x of one example) -> y.
    """
    params = random_like(layer.init(jax.random.key(0)))
    y = jax.jit(jax.vmap(plain, in_axes=(None, 0)))(params, x)
    delta = random_like(y, 2)

    def cost(params, moving, x, delta):
        leaves, tree = jax.tree.flatten(x)
        left = iter(moving)
        leaves = [next(left) if is_float(v) else v for v in leaves]
        products = jax.tree.map(
            jnp.multiply, delta, plain(params, jax.tree.unflatten(tree, leaves))
        )
        return sum(jnp.sum(p) for p in jax.tree.leaves(products))

    moving = [v for v in jax.tree.leaves(x) if is_float(v)]
    truth = jax.jit(jax.vmap(jax.grad(cost, argnums=(0, 1)), in_axes=(None, 0, 0, 0)))
    each, delta_x = truth(params, moving, x, delta)
    n = len(jax.tree.leaves(x)[0])
    weights = jnp.linspace(0.5, 2, n).at[0].set(0)

    @jax.jit
    def ours(params, x, delta):
        found, saved = jb.forward(layer, params, x, key)
        back, factored = jb.backward(layer, params, layer.trace(x, found, saved), delta, sweep.keep)
        pairs = jax.tree.leaves(factored, is_leaf=is_factored)
        return found, back, [answers(pair, weights) for pair in pairs]

    found, back, answered = ours(params, x, delta)
    assert_close(found, y, tolerance)
    is_none = [leaf is None for leaf in jax.tree.leaves(back, is_leaf=lambda v: v is None)]
    assert is_none == [not is_float(v) for v in jax.tree.leaves(x)]
    assert_close(jax.tree.leaves(back), delta_x, tolerance)
    for answer, g in zip(answered, jax.tree.leaves(each), strict=True):
        flat = g.reshape(n, -1)
        due = (g, g.sum(0), jnp.tensordot(weights, g, 1), (flat**2).sum(1), (g**2).sum(0),
               flat @ flat.T)  # fmt: skip
        assert_close(answer, due, tolerance)


def answers(pair, weights):
    """What a pair says of the gradients of single examples, all in one program."""
    return (pair.each(), pair.total(), pair.total(weights), pair.square_norm(),
            pair.second_moment(), pair.gram(pair))  # fmt: skip


def is_float(v):
    return jnp.issubdtype(v.dtype, jnp.floating)


def torch_truth(family, case):
    """What PyTorch computed: a dict of arrays."""
    with np.load(Path(__file__).parent / "torch_truth" / f"{family}.npz") as file:
        return {
            name.removeprefix(f"{case}."): jnp.asarray(file[name])
            for name in file.files
            if name.startswith(f"{case}.")
        }
