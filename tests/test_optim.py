"""K-FAC and Hessian-free steps, against the same steps by dense matrices in float64."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from truth import mean_cost, relative

import jbackprop as jb
from jbackprop import curvature as cv

pytestmark = pytest.mark.newest
LM = jb.optim.LevenbergMarquardt
EXACT = {"roots": cv.Exact(), "key": jax.random.key(3)}
NET, LOSS = jb.mlp([4, 5, 3], jb.Tanh()), jb.SoftmaxCrossEntropy()


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.fixture(scope="module")
def problem():
    params = NET.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 4))
    y = jax.random.randint(jax.random.key(2), (8,), 0, 3)
    return params, x, y


def gradient(params, x, y):
    return jax.value_and_grad(lambda p: mean_cost(NET, LOSS, p, x, y))(params)


def update(tx, params, x, y, state=None):
    state = tx.init(params) if state is None else state
    value, grads = gradient(params, x, y)

    def value_fn(params):
        return mean_cost(NET, LOSS, params, x, y)

    return tx.update(grads, state, params, batch=(x, y), value=value, value_fn=value_fn)


def dense(matrix, params):
    """Of something with a product, (P, P)."""
    vector, back = ravel_pytree(params)
    every = jax.vmap(back)(jnp.eye(vector.size))
    return np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(matrix(every)))


def factors(params, x, y):
    found = cv.kfac(NET, LOSS, params, x, y, cv.Exact())
    return dense(found.product, params)


def test_steps_are_what_the_docstring_says(problem):
    """Three steps: averages, an inversion at the first and the third, momentum, the KL clip."""
    params, x, y = problem
    options = {"damping": 0.1, "momentum": 0.8, "decay": 0.6, "norm_constraint": 1e-4}
    tx = jb.optim.kfac(NET, LOSS, (x, y), 0.5, invert_every=2, **options, **EXACT)
    state, last, average, inverted = tx.init(params), 0, None, None
    for t in range(3):
        batch = (x[2 * t :], y[2 * t :])
        step, state = update(tx, params, *batch, state)
        share = min(1 - 1 / (t + 1), 0.6)
        new = cv.kfac(NET, LOSS, params, *batch, cv.Exact())
        average = mixed(share, new if average is None else average, new)
        inverted = average if t % 2 == 0 else inverted
        g = flat(gradient(params, *batch)[1])
        p = np.linalg.solve(dense(inverted.product, params) + 0.1 * np.eye(len(g)), g)
        p = p * min(1, np.sqrt(1e-4 / (0.25 * p @ g)))
        last = 0.8 * last - 0.5 * p
        assert relative(flat(step), last) < 1e-10
        params = optax.apply_updates(params, step)
    assert int(state.steps) == 3
    assert 1e-4 / (0.25 * p @ g) < 1.01


def mixed(share, average, new):
    """share * average + (1 - share) * new, factor by factor."""
    return jax.tree.map(lambda a, b: share * a + (1 - share) * b, average, new)


def test_factors_every_so_many_steps_and_corrected_eigenvalues(problem):
    params, x, y = problem
    tx = jb.optim.kfac(
        NET, LOSS, (x, y), 1.0, damping=0.1, factors_every=2, corrected=True, **EXACT
    )
    step, state = update(tx, params, x, y)
    ekfac = dense(cv.ekfac(NET, LOSS, params, x, y, cv.Exact()).product, params)
    g = flat(gradient(params, x, y)[1])
    assert relative(flat(step), -np.linalg.solve(ekfac + 0.1 * np.eye(len(g)), g)) < 1e-10
    _, again = update(tx, params, x[:4], y[:4], state)
    assert all(map(np.array_equal, *map(jax.tree.leaves, (state.factors, again.factors))))
    _, third = update(tx, params, x[:4], y[:4], again)
    assert not all(map(np.array_equal, *map(jax.tree.leaves, (state.factors, third.factors))))


def test_without_a_rate_the_step_minimises_the_quadratic_model(problem):
    params, x, y = problem
    tx = jb.optim.kfac(NET, LOSS, (x, y), damping=0.05, **EXACT)
    first, state = update(tx, params, x, y)
    params = optax.apply_updates(params, first)
    second, _ = update(tx, params, x, y, state)
    g = flat(gradient(params, x, y)[1])
    ggn = dense(lambda v: cv.ggn_product(NET, LOSS, params, x, y, v), params)
    model = ggn + 0.05 * np.eye(len(g))
    inverted = factors(problem[0], x, y)  # at the first step
    natural = np.linalg.solve(inverted + 0.05 * np.eye(len(g)), g)
    plane = np.stack([natural, flat(first)])
    best = plane.T @ np.linalg.solve(plane @ model @ plane.T, -plane @ g)
    assert relative(flat(second), best) < 1e-8


@pytest.mark.parametrize("kind", ["kfac", "hessian_free"])
def test_the_damping_of_levenberg_and_marquardt(problem, kind):
    params, x, y = problem
    rule = LM(initial=0.5, every=1, factor=0.9)
    if kind == "kfac":
        tx = jb.optim.kfac(NET, LOSS, (x, y), damping=rule, **EXACT)
    else:
        tx = jb.optim.hessian_free(NET, LOSS, damping=rule)
    step, state = update(tx, params, x, y)
    value, grads = gradient(params, x, y)
    ggn = dense(lambda v: cv.ggn_product(NET, LOSS, params, x, y, v), params)
    d, g = flat(step), flat(grads)
    model = g @ d + d @ ((ggn + 0.5 * np.eye(len(g))) @ d) / 2
    ratio = (mean_cost(NET, LOSS, optax.apply_updates(params, step), x, y) - value) / model
    due = 0.5 * (0.9 if ratio > 0.75 else 1 / 0.9 if ratio < 0.25 else 1)
    assert relative(state.damping, due) < 1e-12
    nowhere = state._replace(damping=jnp.asarray(1e20), step=jax.tree.map(jnp.zeros_like, params))
    _, settled = update(tx, params, x, y, nowhere)
    assert settled.damping == 1e20  # a step of next to nothing says nothing
    for ratio, factor in ((0.8, 0.9), (0.5, 1), (0.1, 1 / 0.9), (jnp.nan, 1 / 0.9)):
        assert relative(rule.adapted(jnp.asarray(0.5), jnp.asarray(ratio)), 0.5 * factor) < 1e-12
    assert rule.adapted(jnp.asarray(1e8), jnp.asarray(0.0)) == 1e8


def test_hessian_free_solves_the_damped_system(problem):
    params, x, y = problem
    tx = jb.optim.hessian_free(NET, LOSS, damping=0.1, iterations=200, tolerance=1e-12)
    step, state = update(tx, params, x, y)
    ggn = dense(lambda v: cv.ggn_product(NET, LOSS, params, x, y, v), params)
    g = flat(gradient(params, x, y)[1])
    due = -np.linalg.solve(ggn + 0.1 * np.eye(len(g)), g)
    assert relative(flat(step), due) < 1e-8
    one = jb.optim.hessian_free(NET, LOSS, 0.5, damping=0.1, iterations=1, warm_start=1.0)
    warm, _ = update(one, params, x, y, one.init(params)._replace(step=state.step))
    assert relative(flat(warm), 0.5 * due) < 1e-8  # begun where it ends


@pytest.mark.parametrize("kind", ["kfac", "hessian_free"])
def test_layers_that_draw_are_drawn_as_in_the_gradient(problem, kind):
    """Its curvature is that of the network that the gradient is of: `fit` hands the key on."""
    net = jb.Sequential(jb.Dense(4, 6), jb.Dropout(0.5), jb.Tanh(), jb.Dense(6, 3))
    params, key = net.init(jax.random.key(0)), jax.random.key(9)
    x, y = problem[1:]
    grads = jb.value_and_grad(net, LOSS)(params, x, y, key=key)[1]
    if kind == "kfac":
        tx = jb.optim.kfac(net, LOSS, (x, y), 1.0, damping=0.1, **EXACT)
        matrix = cv.kfac(net, LOSS, params, x, y, cv.Exact(), key=key).product
    else:
        tx = jb.optim.hessian_free(net, LOSS, damping=0.1, iterations=200, tolerance=1e-12)

        def matrix(v):
            return cv.ggn_product(net, LOSS, params, x, y, v, key=key)

    step, _ = tx.update(grads, tx.init(params), params, batch=(x, y), batch_key=key)
    dampened = dense(matrix, params) + 0.1 * np.eye(flat(params).size)
    assert relative(flat(step), -np.linalg.solve(dampened, flat(grads))) < 1e-7
    fit = jb.fit(
        net, LOSS, params, (np.asarray(x), np.asarray(y)), tx, epochs=2, key=jax.random.key(0),
        progress=False,
    )  # fmt: skip
    assert np.all(np.isfinite(fit.history["loss"]))


def test_without_the_gradients_key_there_is_one_draw_for_all(problem):
    """Of the factors and of the quadratic model: the second half of the state's key."""
    net = jb.Sequential(jb.Dense(4, 6), jb.Dropout(0.5), jb.Tanh(), jb.Dense(6, 3))
    params = net.init(jax.random.key(0))
    x, y = problem[1:]
    grads = jb.value_and_grad(net, LOSS)(params, x, y, key=jax.random.key(9))[1]
    tx = jb.optim.kfac(net, LOSS, (x, y), damping=0.1, **EXACT)
    state = tx.init(params)
    _, drawn = jax.random.split(state.key)
    one, _ = tx.update(grads, state, params, batch=(x, y))
    other, _ = tx.update(grads, state, params, batch=(x, y), batch_key=drawn)
    assert relative(flat(one), flat(other)) < 1e-14


def test_bfloat16_and_frozen_layers(problem):
    x, y = problem[1:]
    net = jb.Sequential(jb.Dense(4, 5), jb.Tanh(), jb.Frozen(jb.Dense(5, 4)), jb.Dense(4, 3))
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), net.init(jax.random.key(0)))
    low = x.astype(jnp.bfloat16)
    grads = jb.value_and_grad(net, LOSS)(params, low, y)[1]
    tx = jb.optim.kfac(net, LOSS, (low, y), damping=0.1, **EXACT)
    for update in (tx.update, jax.jit(tx.update)):
        step, _ = update(grads, tx.init(params), params, batch=(low, y))
        assert not np.any(flat(step[2]).astype(float))
        assert np.all(np.isfinite(flat(step).astype(float)))
        assert step[0]["w"].dtype == jnp.bfloat16


def spirals(n=300):
    """Two classes that no line parts."""
    t = np.linspace(0.3, 3.0, n // 2)
    arms = [np.stack([s * t * np.cos(3 * t), s * t * np.sin(3 * t)], 1) for s in (1, -1)]
    return np.concatenate(arms).astype("float32"), np.repeat([0, 1], n // 2).astype("int32")


def test_in_fit_it_learns_faster_than_gradient_descent():
    x, y = spirals()
    net = jb.mlp([2, 16, 16, 2], jb.Tanh())
    params = jax.tree.map(lambda v: v.astype("float32"), net.init(jax.random.key(0)))
    example = (x[:2], y[:2])

    def loss_of(tx, **options):
        fit = jb.fit(
            net, LOSS, params, (x, y), tx, key=jax.random.key(1), progress=False, **options
        )
        return fit.history["loss"][-1]

    kfac = jb.optim.kfac(net, LOSS, example, damping=LM(0.1), key=jax.random.key(2))
    free = jb.optim.hessian_free(net, LOSS, damping=LM(0.1), iterations=30)
    sgd = loss_of(optax.sgd(0.3, 0.9), epochs=25, batch_size=60)
    assert loss_of(kfac, epochs=25, batch_size=60) < 0.5 * sgd
    assert loss_of(free, epochs=40) < 0.5 * sgd
    fixed = jb.optim.kfac(
        net, LOSS, example, optax.constant_schedule(0.3), damping=1e-2, norm_constraint=1e-2,
        key=jax.random.key(2),
    )  # fmt: skip
    chain = optax.chain(optax.clip_by_global_norm(10.0), fixed)
    assert loss_of(chain, epochs=25, batch_size=60) < sgd


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(8, param_dtype=jnp.float64)(x))
        return nn.Dense(3, param_dtype=jnp.float64)(x)


def flax_model():
    module = Perceptron()
    params = module.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return lambda params, x: module.apply({"params": params}, x[None])[0], params


def equinox_model():
    module = eqx.nn.MLP(4, 3, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_inexact_array)
    params = jax.tree.map(lambda v: v.astype(jnp.float64), params)
    return lambda params, x: eqx.combine(params, static)(x), params


@pytest.mark.parametrize("make", [flax_model, equinox_model])
def test_stock_models_of_others(make, problem):
    """Diagonals, factors, spectra and the optimizer, of a model that knows nothing of this."""
    _, x, y = problem
    model, params = make()
    vector, back = ravel_pytree(params)

    def outputs(v):
        return jax.vmap(lambda x: model(back(v), x))(x)

    j = np.asarray(jax.jacobian(outputs)(vector))
    p = np.asarray(jax.nn.softmax(outputs(vector)))
    h = np.einsum("na,ab->nab", p, np.eye(3)) - np.einsum("na,nb->nab", p, p)
    ggn = np.einsum("nap,nab,nbr->pr", j, h, j) / len(j)
    assert relative(flat(cv.diag_ggn(model, LOSS, params, x, y)), np.diag(ggn)) < 1e-12
    corrected = cv.ekfac(model, LOSS, params, x, y, cv.Exact())
    assert relative(corrected.trace(), np.trace(ggn)) < 1e-12
    found = cv.kfac(model, LOSS, params, x[:1], y[:1], cv.Exact())
    assert [type(block).__name__ for block in found.blocks.values()] == ["Kronecker"] * 4
    one = np.einsum("ap,ab,br->pr", j[0], h[0], j[0])
    matrix = dense(found.product, params)
    assert relative(matrix, np.where(matrix == 0, 0, one)) < 1e-12
    assert np.count_nonzero(matrix) == sum(leaf.size**2 for leaf in jax.tree.leaves(params))
    top = cv.top_eigenvalues(model, LOSS, params, x, y, 2)
    assert relative(top, np.linalg.eigvalsh(ggn)[-1:-3:-1]) < 1e-10
    tx = jb.optim.kfac(model, LOSS, (x, y), damping=0.1, **EXACT)
    state, value_fn = tx.init(params), lambda p: jnp.mean(LOSS.value(outputs(flat_of(p)), y))

    def flat_of(params):
        return ravel_pytree(params)[0]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(value_fn)(params), state, params, batch=(x, y))
        return optax.apply_updates(params, updates), state

    before = value_fn(params)
    for _ in range(8):
        params, state = step(params, state)
    assert value_fn(params) < 0.2 * before


REFUSED = {
    "damping": (lambda e: jb.optim.kfac(NET, LOSS, e, 0.1, damping=0, **EXACT), "damping must be"),
    "decay": (lambda e: jb.optim.kfac(NET, LOSS, e, 0.1, decay=1.0, **EXACT), "decay must be"),
    "momentum": (lambda e: jb.optim.kfac(NET, LOSS, e, 0.1, momentum=-1, **EXACT), "momentum must"),
    "rate": (lambda e: jb.optim.kfac(NET, LOSS, e, -1.0, **EXACT), "learning_rate must"),
    "a word": (lambda e: jb.optim.hessian_free(NET, LOSS, "a"), "learning_rate must"),
    "found": (lambda e: jb.optim.kfac(NET, LOSS, e, momentum=0.3, **EXACT), "given learning"),
    "clip": (lambda e: jb.optim.kfac(NET, LOSS, e, norm_constraint=1.0, **EXACT), "given learning"),
    "norm": (lambda e: jb.optim.kfac(NET, LOSS, e, 1.0, norm_constraint=0, **EXACT), "above 0"),
    "invert": (lambda e: jb.optim.kfac(NET, LOSS, e, 1.0, invert_every=0, **EXACT), "invert_every"),
    "iterations": (lambda e: jb.optim.hessian_free(NET, LOSS, iterations=0), "iterations must"),
    "warm": (lambda e: jb.optim.hessian_free(NET, LOSS, warm_start=2), "warm_start must"),
    "LM": (lambda e: LM(initial=1e9), "least <= initial"),
    "every": (lambda e: LM(every=0), "every must be"),
    "factor": (lambda e: LM(factor=1.0), "factor must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused(problem, name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        make(problem[1:])


def test_an_update_without_its_batch_says_what_is_missing(problem):
    params, x, y = problem
    grads = gradient(params, x, y)[1]
    for tx in (jb.optim.kfac(NET, LOSS, (x, y), 0.1, **EXACT), jb.optim.hessian_free(NET, LOSS)):
        with pytest.raises(TypeError, match=r"batch=\(x, y\)"):
            tx.update(grads, tx.init(params), params)
    with pytest.raises(TypeError, match="value_fn"):
        jb.optim.hessian_free(NET, LOSS).update(
            grads, jb.optim.hessian_free(NET, LOSS).init(params), params, batch=(x, y)
        )
    with pytest.raises(TypeError, match="mini-batch"):
        jb.optim.kfac(NET, LOSS, x, 0.1, **EXACT)


def test_a_private_fit_refuses_it(problem):
    """The curvature of a mini-batch is of the private data."""
    params, x, y = problem
    tx = jb.optim.kfac(NET, LOSS, (x, y), 0.1, **EXACT)
    with pytest.raises(TypeError, match="batch"):
        jb.fit(
            NET, LOSS, params, (np.asarray(x), np.asarray(y)), tx, epochs=1, batch_size=4,
            key=jax.random.key(0), private=jb.Private(1.0, noise_multiplier=1.0), progress=False,
        )  # fmt: skip
