"""A network that knows when it does not know: Laplace approximations from the curvature.

A small network learns 300 handwritten digits, with a normal prior on its parameters (weight decay).
Shown digits that lie on their side, such as it has never seen, it is as sure of itself as ever. So
around what it has learnt, theta*, the posterior of its parameters is taken for a normal
distribution, whose precision is the curvature of the cost summed over the n examples, and tau, that
of the prior:

    p(theta | data) = N(theta*, (n G + tau I)^-1)

with the Gauss-Newton matrix G of the mean cost. Three ways to write that down: all of G for the
last layer alone, its diagonal for all layers, and Kronecker factors for all layers. In each, tau is
chosen anew, as what makes the data most probable:

    log p(data | tau) = -n C - tau |theta|^2 / 2 + P / 2 log tau - log det(n G + tau I) / 2

Outputs are then normally distributed too, with the covariance J (n G + tau I)^-1 J^T, and the
prediction is the softer the larger that is (the probit approximation).

Printed are, for digits that were held out, the share that is right, the negative log likelihood and
the mean confidence; the confidence in digits turned by 90 degrees; and how well entropy tells the
turned ones from the others. The price of the doubt is seen as well: it is there on held-out digits
too, so that their likelihood is lower than without.

Source: MacKay, A practical Bayesian framework for backpropagation networks (1992); Ritter, Botev
and Barber, A scalable Laplace approximation for neural networks (2018); Immer, Korzepa and Bauer,
Improving predictions of Bayesian neural nets via local linearization (2021).

    python examples/laplace_digits.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import jbackprop as jb
from jbackprop import curvature
from jbackprop.table import render

LOSS = jb.SoftmaxCrossEntropy()
PRIOR = 1.0
TAUS = 10.0 ** np.arange(-3, 3.01, 0.5)


def digits(train: int) -> tuple[Any, Any, Any]:
    """Examples to learn from, held-out ones, and the held-out images turned by 90 degrees."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
    turned = np.rot90(x[train:].reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64)
    return (x[:train], y[:train]), (x[train:], y[train:]), turned


def jacobians(net: Any, params: Any, x: Any) -> Any:
    """dz_nc / dtheta, a tree like params of (q, B, *shape).

    The rows are what the unit vectors become when they are swept back as deltas: the root of the
    Gauss-Newton matrix of a squared error, whose Hessian is the identity.
    """
    z = jb.forward(net, params, x)[0]
    root = curvature.ggn_root(net, jb.SquaredError(), params, x, z)
    return jax.tree.map(lambda v: v * len(x) ** 0.5, root)


def flat(tree: Any) -> Any:
    """A tree of (q, B, *shape) as (q, B, P)."""
    return jnp.concatenate([v.reshape(*v.shape[:2], -1) for v in jax.tree.leaves(tree)], axis=2)


class Posterior:
    """A Laplace approximation: its log determinant, and the variance of outputs.

    Attributes:
        size: P, the parameters that have a distribution.
        log_det: tau -> log det(n G + tau I).
        covariance: (J like params of (q, B, ...), tau) -> J (n G + tau I)^-1 J^T, (B, q, q).
    """

    def __init__(self, size: int, log_det: Callable[..., Any], covariance: Callable[..., Any]):
        self.size, self.log_det, self.covariance = size, log_det, covariance


def last_layer(net: Any, params: Any, x: Any, y: Any) -> Posterior:
    """All of the last layer's block."""
    n = len(x)
    rows = flat(curvature.ggn_root(net, LOSS, params, x, y)[-1:])
    rows = rows.reshape(-1, rows.shape[-1])
    values, vectors = jnp.linalg.eigh(n * rows.T @ rows)
    values = jnp.maximum(values, 0)

    def covariance(j: Any, tau: float) -> Any:
        turned = flat(j[-1:]) @ vectors
        return jnp.einsum("cnp,dnp->ncd", turned / (values + tau), turned)

    return Posterior(len(values), lambda tau: jnp.sum(jnp.log(values + tau)), covariance)


def diagonal(net: Any, params: Any, x: Any, y: Any) -> Posterior:
    """The diagonal."""
    found = jax.tree.leaves(curvature.diag_ggn(net, LOSS, params, x, y))
    values = len(x) * jnp.concatenate([v.ravel() for v in found])

    def covariance(j: Any, tau: float) -> Any:
        return jnp.einsum("cnp,dnp->ncd", flat(j) / (values + tau), flat(j))

    return Posterior(len(values), lambda tau: jnp.sum(jnp.log(values + tau)), covariance)


def kronecker(net: Any, params: Any, x: Any, y: Any) -> Posterior:
    """Kronecker factors of every layer."""
    n = len(x)
    factors = curvature.kfac(net, LOSS, params, x, y, curvature.Exact()).decomposed()

    def covariance(j: Any, tau: float) -> Any:
        q, b = jax.tree.leaves(j)[0].shape[:2]
        several = jax.tree.map(lambda v: v.reshape(q * b, *v.shape[2:]), j)
        solved = factors.apply(lambda e: 1 / (n * e + tau), several)
        solved = jax.tree.map(lambda v: v.reshape(q, b, *v.shape[1:]), solved)
        return jnp.einsum("cnp,dnp->ncd", flat(solved), flat(j))

    size = sum(v.size for v in jax.tree.leaves(params))

    def log_det(tau: float) -> Any:  # of n (G + tau/n I)
        return size * jnp.log(n) + factors.log_determinant(tau / n)

    return Posterior(size, log_det, covariance)


def evidence(posterior: Posterior, cost: float, params: Any, tau: float) -> float:
    """log p(data | tau) up to a constant; `cost` is summed over the data."""
    square = sum(float(jnp.sum(v**2)) for v in jax.tree.leaves(params))
    prior = 0.5 * posterior.size * np.log(tau) - 0.5 * tau * square
    return float(-cost + prior - 0.5 * posterior.log_det(tau))


def predict(net: Any, params: Any, x: Any, posterior: Posterior | None, tau: float) -> Any:
    """Probabilities of the classes, (B, q)."""
    found = []
    for part in np.array_split(x, max(1, len(x) // 100)):
        z = jb.forward(net, params, part)[0]
        if posterior is not None:
            variance = posterior.covariance(jacobians(net, params, part), tau)
            z = z / jnp.sqrt(1 + jnp.pi / 8 * jnp.diagonal(variance, axis1=1, axis2=2))
        found.append(jax.nn.softmax(z))
    return np.concatenate(found)


def entropy(p: Any) -> Any:
    return -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=1)


def main(train: int = 300, width: int = 50, epochs: int = 1500, seed: int = 0) -> dict[str, Any]:
    """Learn, approximate, and print a table."""
    data, (x_test, y_test), turned = digits(train)
    net = jb.mlp([64, width, 10], jb.Tanh())
    params = net.init(jax.random.key(seed))
    optimizer = optax.chain(
        optax.add_decayed_weights(PRIOR / train),  # the mean cost has 1/n of the prior
        optax.adam(optax.cosine_decay_schedule(1e-2, epochs)),
    )
    fit = jb.fit(
        net, LOSS, params, data, optimizer, epochs=epochs, key=jax.random.key(seed),
        metrics={"accuracy": jb.metrics.accuracy}, progress=False,
    )  # fmt: skip
    params = fit.params
    cost = train * jb.evaluate(net, LOSS, params, data)["loss"]
    print(f"{train} digits learnt: {fit.history['accuracy'][-1]:.1%} of them are right\n")
    ways: dict[str, Any] = {
        "none": None,
        "last layer": last_layer,
        "diagonal": diagonal,
        "Kronecker": kronecker,
    }
    rows, results = [], {}
    for name, way in ways.items():
        posterior, tau = None, 0.0
        if way is not None:
            posterior = way(net, params, *data)
            tau = float(max(TAUS, key=lambda tau: evidence(posterior, cost, params, tau)))
        p, off = (predict(net, params, x, posterior, tau) for x in (x_test, turned))
        seen = np.r_[np.zeros(len(p)), np.ones(len(off))]
        results[name] = {
            "tau": tau,
            "accuracy": float(np.mean(p.argmax(1) == y_test)),
            "nll": -float(np.mean(np.log(np.maximum(p[np.arange(len(p)), y_test], 1e-30)))),
            "confidence": float(p.max(1).mean()),
            "confidence, turned": float(off.max(1).mean()),
            "auc": float(roc_auc_score(seen, np.r_[entropy(p), entropy(off)])),
        }
        tau_, right, nll, sure, sure_off, auc = results[name].values()
        rows.append(
            (name, f"{tau_:.2g}" if way else "-", f"{right:.1%}", f"{nll:.3f}", f"{sure:.1%}",
             f"{sure_off:.1%}", f"{auc:.3f}")
        )  # fmt: skip
    columns = (
        "posterior", ">tau", ">accuracy", ">-log lik.", ">confidence", ">turned",
        ">AUC by entropy",
    )  # fmt: skip
    print(
        render(columns, rows, f"{len(x_test)} held-out digits, and the same turned by 90 degrees")
    )
    return results


if __name__ == "__main__":
    main()
