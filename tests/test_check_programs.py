"""The checker on functions that are not the same in float64: random draws, loops of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from truth import verdict

import jbackprop as jb

pytestmark = pytest.mark.usefixtures("as_jax_comes")
KEY = jax.random.key(3)
X = np.random.default_rng(0).standard_normal(8).astype("float32")


def noisy(x, key):
    return jnp.sum((x * jax.random.bernoulli(key, 0.5, x.shape) + jax.random.normal(key)) ** 2)


@pytest.mark.parametrize("truth", ["both", "numerical", "autodiff"])
@pytest.mark.parametrize(("factor", "due"), [(1, "right"), (-1, "wrong"), (1.01, "wrong")])
def test_random_draws_are_the_same_in_float64(factor, due, truth):
    candidate = factor * jax.grad(noisy)(X, KEY)
    assert verdict(noisy, X, KEY, candidate=candidate, truth=truth) == due


def test_a_rule_with_random_draws():
    @jax.custom_vjp
    def drop(x, key):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    drop.defvjp(lambda x, key: (drop(x, key), None), lambda _, u: (u * 7, None))
    assert jb.check.vjp(drop, X, KEY).verdict == "wrong"
    assert jb.check.vjp(lambda x, key: x * jax.random.normal(key, x.shape), X, KEY).ok


def loops(x):
    def body(c, a):
        m = jnp.zeros(3, jnp.float32).at[jnp.argmax(c)].add(a)
        s = jnp.linalg.solve(2 * jnp.eye(3, dtype=jnp.float32) + jnp.outer(m, m), c)
        ones = jnp.ones(3, jnp.float32)
        return jax.lax.cond(a > 0, lambda: jax.nn.softplus(c + a) + s, lambda: a * ones), jnp.sort(
            c
        )

    c, y = jax.lax.scan(body, jnp.zeros(3, jnp.float32), x)
    c = jax.lax.while_loop(lambda s: s[1] < 3, lambda s: (s[0], s[1] + 1), (c, 0))[0] * c
    return y.sum() + jax.nn.logsumexp(c) + jnp.fft.rfft(x).real.sum()


def fixed_loops(x):
    return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c) + jnp.sum(x), jnp.float32(1)) + (
        jax.lax.scan(lambda c, a: (jnp.tanh(c + a), c), jnp.float32(0), x)[1].sum()
    )


def test_loops_that_carry_float32():
    assert verdict(fixed_loops, X) == "right"
    assert verdict(fixed_loops, X, candidate=1.01 * jax.grad(fixed_loops)(X)) == "wrong"
    assert jb.check.vjp(fixed_loops, X).ok
    assert jb.check.jvp(loops, X).ok


def test_a_wrong_rule_within_a_while_loop():
    @jax.custom_jvp
    def bad(x):
        return jnp.tanh(x)

    bad.defjvp(lambda p, t: (jnp.tanh(p[0]), t[0] * 1.5))

    def twice(x):
        return jax.lax.while_loop(lambda s: s[1] < 2, lambda s: (bad(s[0]), s[1] + 1), (x, 0))[0]

    assert jb.check.jvp(twice, X, truth="autodiff").verdict == "wrong"
