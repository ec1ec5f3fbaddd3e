"""Truths that the library has no part in, and how the tests compare with them."""

import jax
import jax.numpy as jnp
import numpy as np

import jbackprop as jb


def relative(candidate, truth):
    """|candidate - truth| / |truth| over all entries; 0 where both are zero."""
    candidate, truth = (np.asarray(v).astype(np.float64) for v in (candidate, truth))
    assert candidate.shape == truth.shape, (candidate.shape, truth.shape)
    error, size = np.linalg.norm(candidate - truth), np.linalg.norm(truth)
    return error if size == 0 else error / size


def assert_close(candidate, truth, tolerance=1e-12, zero=0.0):
    """Every leaf of two trees of one structure.

    Of a leaf that is zero by nature rounding errors are left: as much as `zero` is no error,
    relative to all that is in the truth.
    """
    assert jax.tree.structure(candidate) == jax.tree.structure(truth)
    paths = jax.tree_util.tree_flatten_with_path(truth)[0]
    nothing = zero * np.sqrt(sum(np.sum(np.square(t, dtype=float)) for _, t in paths))
    for (path, t), c in zip(paths, jax.tree.leaves(candidate), strict=True):
        error = relative(c, t)
        gap = np.linalg.norm(np.ravel(np.asarray(c, float) - np.asarray(t, float)))
        if not (error <= tolerance or gap <= nothing):  # NaN is not close
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error:.2e} > {tolerance:.0e}")


def assert_same(candidate, truth, tolerance=1e-13):
    """Two trees of one structure, relative to all that is in the truth."""
    assert jax.tree.structure(candidate) == jax.tree.structure(truth)
    found, due = (
        np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)])
        for tree in (candidate, truth)
    )
    assert relative(found, due) <= tolerance


def costs(net, loss, params, x, y, key=None):
    """C_n of every example, by the forward sweep and the loss's value alone."""
    return loss.value(jb.forward(net, params, x, key)[0], y)


def mean_cost(net, loss, params, x, y, key=None):
    return jnp.mean(costs(net, loss, params, x, y, key))


def each_grad(net, loss, params, x, y):
    """The gradient of every example's cost, by vmap(grad)."""

    def one(params, x, y):
        return costs(net, loss, params, *jax.tree.map(lambda v: v[None], (x, y)))[0]

    return jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(params, x, y)


def rows(tree):
    """The leaves of a tree of (B, ...) side by side, (B, P)."""
    leaves = [np.asarray(v).reshape(len(v), -1) for v in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=1) if leaves else np.zeros((0, 0))


def verdict(fun, *args, candidate=None, **options):
    """What `jb.check.gradient` says of a candidate; by default of `jax.grad`'s."""
    candidate = jax.grad(fun)(*args) if candidate is None else candidate
    return jb.check.gradient(fun, *args, candidate=candidate, **options).verdict
