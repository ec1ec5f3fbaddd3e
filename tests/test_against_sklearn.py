"""Against a truth that is not JAX: the gradient of scikit-learn's own multilayer perceptrons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import LabelBinarizer
from truth import relative

import jbackprop as jb

pytestmark = pytest.mark.newest

ACTIVATIONS = {
    "identity": jb.Identity(),
    "logistic": jb.Sigmoid(),
    "tanh": jb.Tanh(),
    "relu": jb.Relu(),
}


def their_gradient(model, x, y, sizes):
    """scikit-learn's loss, gradients of W and of b (mean over the batch, no penalty)."""
    activations = [x] + [np.empty((len(x), size)) for size in sizes[1:]]
    deltas = [np.empty_like(a) for a in activations[1:]]
    ws = [np.empty_like(w) for w in model.coefs_]
    bs = [np.empty_like(b) for b in model.intercepts_]
    ones = np.ones(len(x))
    return model._backprop(x, y, ones, activations, deltas, ws, bs)


def compare(model, x, y, targets, net, loss, labels):
    params = net.init(jax.random.key(1))
    weighted = [i for i, p in enumerate(params) if p]
    model.coefs_ = [np.asarray(params[i]["w"]) for i in weighted]
    model.intercepts_ = [np.asarray(params[i]["b"]) for i in weighted]
    sizes = [x.shape[1], *(params[i]["w"].shape[1] for i in weighted)]
    cost, ws, bs = their_gradient(model, x, targets, sizes)
    value, grads = jb.value_and_grad(net, loss)(params, jnp.asarray(x), jnp.asarray(labels))
    assert relative(value, cost) < 1e-13
    for i, w, b in zip(weighted, ws, bs, strict=True):
        assert relative(grads[i]["w"], w) < 1e-12
        assert relative(grads[i]["b"], b) < 1e-12


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_digits_classifier(name):
    data = load_digits()
    x, y = data.data[:150] / 16, data.target[:150]
    model = MLPClassifier(hidden_layer_sizes=(20, 15), activation=name, alpha=0.0, max_iter=1)
    model.partial_fit(x, y, classes=range(10))
    hot = LabelBinarizer().fit(range(10)).transform(y)
    net = jb.mlp([64, 20, 15, 10], ACTIVATIONS[name])
    compare(model, x, y, hot, net, jb.SoftmaxCrossEntropy(), y)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_binary_classifier(name):
    data = load_digits(n_class=2)
    x, y = data.data[:100] / 16, data.target[:100]
    model = MLPClassifier(hidden_layer_sizes=(7,), activation=name, alpha=0.0, max_iter=1)
    model.partial_fit(x, y, classes=[0, 1])
    column = y.reshape(-1, 1)
    net = jb.mlp([64, 7, 1], ACTIVATIONS[name])
    compare(model, x, y, column, net, jb.SigmoidCrossEntropy(), column.astype(float))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_diabetes_regressor(name):
    data = load_diabetes()
    x, y = data.data[:120] * 20, data.target[:120].reshape(-1, 1) / 100
    model = MLPRegressor(hidden_layer_sizes=(9, 4), activation=name, alpha=0.0, max_iter=1)
    model.partial_fit(x, y.ravel())
    net = jb.mlp([10, 9, 4, 1], ACTIVATIONS[name])
    compare(model, x, y, y, net, jb.SquaredError(), y)
