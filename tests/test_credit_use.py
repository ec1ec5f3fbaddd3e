"""Rules of credit assignment as they are used: interface, training, angles, refusals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_credit import LOSS, NETS, degrees, flat, labels, normal, problem, started
from truth import assert_close, assert_same, relative

import jbackprop as jb
from jbackprop import credit

pytestmark = pytest.mark.newest
NET = jb.mlp([6, 5, 4, 3], activation=jb.Tanh())
GOOD = jb.Sequential(jb.Dense(6, 5), jb.Relu(), jb.Dense(5, 4), jb.Relu())
RULES = [
    credit.Backpropagation(),
    credit.FeedbackAlignment(),
    credit.SignSymmetry("uniform"),
    credit.SignSymmetry("batch"),
    credit.SignSymmetry("fixed"),
    credit.KolenPollack(decay=0.01),
    credit.WeightMirror(),
    credit.DirectFeedbackAlignment(),
    credit.DirectRandomTargetProjection(),
    credit.DifferenceTargetPropagation(),
    credit.PredictiveCoding(),
    credit.PredictiveCoding(rate=1.0, fixed_prediction=True),
    credit.EquilibriumPropagation(),
    credit.ForwardForward(classes=3),
    credit.ForwardGradient(),
    credit.ForwardGradient("weights"),
]


WIDE = jb.Sequential(jb.Dense(9, 16), jb.Relu(), jb.Dense(16, 16), jb.Relu())


def net_of(rule):
    return GOOD if isinstance(rule, credit.ForwardForward) else NET


def begun(rule, dtype=None):
    net = net_of(rule)
    params = net.init(jax.random.key(0))
    if dtype is not None:
        params = jax.tree.map(lambda w: w.astype(dtype), params)
    rule, state = started(rule, net, params)
    return net, params, rule, state


RATES = {"ForwardForward": 0.5, "ForwardGradient": 0.02, "EquilibriumPropagation": 0.02}


def clusters(n=240, seed=0):
    """Three clouds of points, which overlap somewhat."""
    y = labels(n, 3, seed)
    centres = 2 * normal(50, 3, 6)
    return np.asarray(centres[y] + normal(seed + 1, n, 6)), np.asarray(y)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_is_pure_traced_once_and_usable_in_a_scan(rule):
    _, params, rule, state = begun(rule)
    x, y = normal(1, 8, 6), labels(8)
    traces = 0

    def step(carry, batch):
        nonlocal traces
        traces += 1
        params, state = carry
        grads, info = rule.gradient(state, params, *batch)
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        updates, state = rule.update(state, params, updates, info)
        return (optax.apply_updates(params, updates), state), info.loss

    first = rule.gradient(state, params, x, y)[0]
    assert_same(rule.gradient(state, params, x, y)[0], first, 0)
    assert jax.tree.structure(first) == jax.tree.structure(params)
    stepped = jax.jit(step, donate_argnums=0)
    carry, losses = (jax.tree.map(jnp.copy, (params, state))), []
    for _ in range(3):
        carry, loss = stepped(carry, (x, y))
        losses.append(loss)
    assert traces == 1
    stacked = jax.tree.map(lambda v: jnp.stack([v] * 3), (x, y))
    scanned, in_scan = jax.lax.scan(step, (params, state), stacked)
    assert_close(scanned[0], carry[0], 1e-9)
    assert_close(in_scan, jnp.stack(losses), 1e-9)
    assert hash(rule) == hash(dataclasses.replace(rule))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_gradients_come_in_the_dtype_of_the_parameters(rule):
    _, params, rule, state = begun(rule, "bfloat16")
    x, y = normal(1, 8, 6).astype("bfloat16"), labels(8)
    grads, info = rule.gradient(state, params, x, y)
    updates, after = rule.update(state, params, grads, info)
    assert jax.tree.map(jnp.result_type, (grads, updates)) == jax.tree.map(
        jnp.result_type, (params, params)
    )
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    assert all(np.all(np.isfinite(np.asarray(g, float))) for g in jax.tree.leaves(grads))
    assert info.loss.dtype == jnp.float32
    if "Forward" not in repr(rule):  # these draw other numbers in another dtype
        wide = jax.tree.map(lambda v: v.astype("float32"), (params, state.learned, x))
        state = dataclasses.replace(state, learned=wide[1])
        truth = rule.gradient(state, wide[0], wide[2], y)[0]
        assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(truth))
        assert relative(flat(grads), flat(truth)) < 0.03


@pytest.mark.parametrize("rule", [r for r in RULES if "Forward" not in repr(r)], ids=repr)
def test_an_example_does_not_see_the_others(rule):
    """The gradient of a batch is the mean of those of its examples: nothing divides twice.

    (Forward rules draw for each example, by its place.)
    """
    if isinstance(rule, credit.PredictiveCoding | credit.EquilibriumPropagation):
        rule = dataclasses.replace(rule, tolerance=0.0)
    _, params, rule, state = begun(rule)
    x, y = normal(1, 5, 6), labels(5)
    whole = rule.gradient(state, params, x, y)[0]
    each = [rule.gradient(state, params, x[i : i + 1], y[i : i + 1])[0] for i in range(5)]
    assert_close(whole, jax.tree.map(lambda *g: sum(g) / 5, *each), 1e-10)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_training_by_a_rule(rule):
    """The loss falls; the same key gives the same, bit by bit; what is returned belongs together."""
    net, params, *_ = begun(rule)
    data, held = clusters(), clusters(60, 7)
    if isinstance(rule, credit.ForwardForward):  # room for the labels
        net = WIDE
        params = net.init(jax.random.key(0))
        data, held = ((np.pad(x, ((0, 0), (3, 0))), y) for x, y in (data, held))

    def run():
        rate = RATES.get(type(rule).__name__, 0.05)
        return jb.fit(
            net, LOSS, params, data, optax.sgd(rate), epochs=20, batch_size=48,
            key=jax.random.key(2), rule=rule, progress=False, validation=held,
            metrics={"accuracy": jb.metrics.accuracy},
        )  # fmt: skip

    fit = run()
    assert fit.history["loss"][-1] < fit.history["loss"][0]
    assert fit.history["validation_accuracy"][-1] > 0.6
    assert_same(run().params, fit.params, 0)
    assert isinstance(fit.rule_state, credit.State)
    found = jb.evaluate(
        net, LOSS, fit.params, held, {"accuracy": jb.metrics.accuracy}, rule_state=fit.rule_state
    )
    assert found["accuracy"] == fit.history["validation_accuracy"][-1]
    outputs = fit.rule_state.rule.outputs(fit.rule_state, fit.params, held[0])
    assert abs(np.mean(np.argmax(outputs, axis=1) == held[1]) - found["accuracy"]) < 1e-6


def test_fit_does_what_the_loop_in_the_docstring_does():
    rule, params = credit.KolenPollack(decay=0.01, loss=LOSS), NET.init(jax.random.key(0))
    x, y = clusters(40)
    seen = []
    fit = jb.fit(
        NET, LOSS, params, (x, y), optax.sgd(0.1, 0.9), epochs=3, key=jax.random.key(2),
        rule=credit.KolenPollack(decay=0.01), callbacks=[lambda e: seen.append(e.rule_state)],
        progress=False,
    )  # fmt: skip
    optimizer = optax.sgd(0.1, 0.9)
    state = rule.init(jax.random.fold_in(jax.random.key(2), 2**32 - 2), NET, params)
    opt_state = optimizer.init(params)
    for epoch in range(3):
        grads, info = rule.gradient(state, params, x, y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        updates, state = rule.update(state, params, updates, info)
        params = optax.apply_updates(params, updates)
        assert relative(fit.history["loss"][epoch], info.loss) < 1e-12
        assert_close(seen[epoch].learned, state.learned)
    assert_close(fit.params, params)
    assert_close(fit.opt_state, opt_state)


def test_batch_norms_are_folded_for_validation():
    net = jb.Sequential(jb.Dense(6, 5), jb.BatchNorm(5), jb.Tanh(), jb.Dense(5, 3))
    fit = jb.fit(
        net, LOSS, net.init(jax.random.key(0)), clusters(), optax.sgd(0.1), epochs=5, batch_size=24,
        key=jax.random.key(1), validation=clusters(60, 7), rule=credit.FeedbackAlignment(),
        metrics={"accuracy": jb.metrics.accuracy}, progress=False,
    )  # fmt: skip
    assert fit.history["validation_accuracy"][-1] > 0.8


def half(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, -0.5, 0.5)


@pytest.mark.parametrize("seed", [0, 1])
def test_feedback_alignment_comes_to_agree(seed):
    """The linear task of Lillicrap et al., 30-20-10, small weights: the angle falls from about 90.

    It keeps falling while the first layer aligns, and stays far below 90 degrees ever after.
    """
    net = jb.Sequential(*(jb.Dense(*pq, bias=False, w_init=half) for pq in ((30, 20), (20, 10))))
    params = jax.tree.map(lambda w: 0.02 * w, net.init(jax.random.key(seed)))
    x = normal(4, 500, 30)
    y = x @ jax.random.uniform(jax.random.key(3), (30, 10), minval=-1, maxval=1)
    rule = credit.FeedbackAlignment(loss=jb.SquaredError())
    state, angles, losses = rule.init(jax.random.key(8 + seed), net, params), [], []
    for t in range(201):
        grads, info = rule.gradient(state, params, x, y)
        if t % 20 == 0:
            found = credit.alignment(state, params, x[:200], y[:200])
            angles.append(found.delta["layers[0]"])
            losses.append(float(info.loss))
        params = jax.tree.map(lambda w, g: w - 0.002 * g, params, grads)
    assert abs(angles[0] - 90) < 8
    assert all(later < earlier for earlier, later in itertools.pairwise(angles[:5]))
    assert max(angles[4:]) < 45
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("rule", [credit.KolenPollack(decay=0.02), credit.WeightMirror(rate=0.05)])
def test_feedback_that_learns_comes_to_agree_wholly(rule):
    x, y = clusters()
    record = credit.Recorder(x[:100], y[:100], every=4)
    jb.fit(
        NET, LOSS, NET.init(jax.random.key(0)), (x, y), optax.sgd(0.05), epochs=32, batch_size=24,
        key=jax.random.key(1), rule=rule, callbacks=[record], progress=False,
    )  # fmt: skip
    for layer in ("layers[0]", "layers[2]"):
        angles = [found.delta[layer] for found in record.alignments]
        assert all(later < earlier + 2 for earlier, later in itertools.pairwise(angles)), angles
        assert angles[-1] < min(10, 0.3 * angles[0]), angles


# --- angles ------------------------------------------------------------------------------------


def test_angles_are_exact_near_0_and_180_and_undefined_for_nothing():
    u = normal(0, 50)
    at = credit.angles.angle
    across = normal(1, 50)
    across = across - (across @ u) / (u @ u) * u
    across = across / np.linalg.norm(across) * np.linalg.norm(u)
    for size in (1e-10, 1e-3, 1.0):
        for sign in (1, -1):
            wanted = np.degrees(np.arctan2(size, sign))
            found = at(u, 3 * (sign * u + size * across))
            assert abs(found - wanted) < 1e-7 * min(wanted, 180 - wanted) + 3e-14
    assert at(u, u) == 0
    assert np.isnan(at(u, 0 * u))


@pytest.mark.parametrize("name", ["perceptron", "scanned", "skips", "convolutions"])
def test_alignment_written_out(name):
    net, params, x, y = problem(name)
    rule, state = started(credit.FeedbackAlignment(), net, params)
    found = credit.alignment(state, params, x, y)
    grads, info = rule.gradient(state, params, x, y)
    truth = jb.value_and_grad(net, LOSS)(params, x, y)[1]
    true = jb.deltas(jb.backprop(net, LOSS, params, x, y))
    assert abs(found.gradient["all"] - degrees(grads, truth)) < 1e-5
    assert abs(found.gradient["layers[0]"] - degrees(grads[0], truth[0])) < 1e-5
    assert list(found.gradient) == [*true, "all"]
    assert list(found.delta) == list(true)
    for path, delta in true.items():
        each = [degrees(a, b) for a, b in zip(info.deltas[path], delta, strict=True)]
        assert abs(found.delta[path] - np.mean(each)) < 1e-5
        ratios = [
            np.linalg.norm(a) / np.linalg.norm(b)
            for a, b in zip(info.deltas[path], delta, strict=True)
        ]
        assert abs(found.delta_ratio[path] - np.mean(ratios)) < 1e-10
    last = [path for path in true if path not in found.local_delta]
    assert last == list(true)[-1:]
    assert found.gradient[last[0]] < 1e-6
    assert "layers[0]" not in found.feedback
    assert set(found.feedback) <= set(true)


def test_the_delta_with_the_true_one_above():
    """Its own: all feedback weights; with the true one above: those of the next layer alone."""
    net, params, x, y = problem("perceptron")
    _, state = started(credit.FeedbackAlignment(), net, params)
    found = credit.alignment(state, params, x, y)
    b1, b2 = state.learned[2]["w"], state.learned[4]["w"]
    true = jb.deltas(jb.backprop(net, LOSS, params, x, y))
    a1 = jnp.tanh(x @ params[0]["w"] + params[0]["b"][None])
    a2 = jnp.tanh(a1 @ params[2]["w"] + params[2]["b"][None])
    at2 = (true["layers[4]"] @ b2.T) * (1 - a2**2)
    at1 = (true["layers[2]"] @ b1.T) * (1 - a1**2)
    own = (at2 @ b1.T) * (1 - a1**2)

    def mean(path, delta):
        return np.mean([degrees(a, b) for a, b in zip(delta, true[path], strict=True)])

    assert abs(found.local_delta["layers[2]"] - mean("layers[2]", at2)) < 1e-5
    assert abs(found.local_delta["layers[0]"] - mean("layers[0]", at1)) < 1e-5
    assert abs(found.delta["layers[0]"] - mean("layers[0]", own)) < 1e-5
    assert abs(found.delta["layers[0]"] - found.local_delta["layers[0]"]) > 1
    assert abs(found.feedback["layers[2]"] - degrees(b1, params[2]["w"])) < 1e-5
    ratio = np.linalg.norm(b2) / np.linalg.norm(params[4]["w"])
    assert abs(found.feedback_ratio["layers[4]"] - ratio) < 1e-12


def test_the_copies_of_a_scan_have_angles_of_their_own():
    net, params, x, y = problem("scanned")
    rule, state = started(credit.FeedbackAlignment(), net, params)
    found = credit.alignment(state, params, x, y)
    grads = rule.gradient(state, params, x, y)[0]
    truth = jb.value_and_grad(net, LOSS)(params, x, y)[1]
    for i in range(3):
        path = f"layers[1].layer[{i}].layers[0]"
        g, t = (jax.tree.map(lambda v, i=i: v[i], tree[1]) for tree in (grads, truth))
        assert abs(found.gradient[path] - degrees(g, t)) < 1e-5
        b = state.learned[1][0]["w"][i]
        assert abs(found.feedback[path] - degrees(b, params[1][0]["w"][i])) < 1e-5
    assert len({round(a, 6) for a in found.local_delta.values()}) == 4


def test_backpropagation_has_no_angle_and_prints_a_table():
    net, params, x, y = problem("perceptron")
    _, state = started(credit.Backpropagation(), net, params)
    found = credit.alignment(state, params, x, y)
    assert max(found.gradient.values()) < 1e-6
    assert max(found.delta.values()) < 1e-6
    assert not found.feedback
    _, state = started(credit.FeedbackAlignment(), net, params)
    text = str(credit.alignment(state, params, x, y))
    assert "delta, true one above" in text
    assert len(text.splitlines()) == 2 + 4


def test_a_recorder_records_and_draws(tmp_path):
    record = credit.Recorder(*(v[:50] for v in clusters()), every=2)
    jb.fit(
        NET, LOSS, NET.init(jax.random.key(0)), clusters(), optax.sgd(0.1), epochs=5, batch_size=20,
        key=jax.random.key(1), rule=credit.WeightMirror(), callbacks=[record], progress=False,
    )  # fmt: skip
    assert record.epochs == [2, 4]
    assert record.alignments[1].feedback["layers[2]"] < record.alignments[0].feedback["layers[2]"]
    figure = record.plot()
    figure.savefig(tmp_path / "angles.png")
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")
    lines = [len(ax.get_lines()) for ax in figure.axes]
    assert lines == [5, 4, 3]  # layers, "all" among the gradients, and the line at 90 degrees
    assert list(figure.axes[2].get_lines()[0].get_ydata()) == [a.feedback["layers[2]"] for a in record.alignments]  # fmt: skip


# --- cost --------------------------------------------------------------------------------------


@pytest.mark.as_shipped
def test_the_cheap_rules_do_the_matmuls_of_backpropagation(as_jax_comes):
    """Feedback weights replace others; direct feedback saves products of width by width.

    What sign-symmetry makes beyond that is its B, and what direct feedback has room for is that
    the delta of every layer is known at once.
    """
    sizes, n = [40, 64, 64, 64, 10], 32
    net = jb.mlp(sizes, activation=jb.Tanh())
    params = net.init(jax.random.key(0))
    x, y = jnp.zeros((n, 40)), jnp.zeros(n, int)

    def costs(rule):
        rule, state = started(rule, net, params)
        compiled = (
            jax.jit(lambda *args: rule.gradient(*args)[0]).lower(state, params, x, y).compile()
        )
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    matrices = 4 * sum(p * q for p, q in itertools.pairwise(sizes[1:]))
    deltas = 4 * n * sum(sizes[1:-1])
    flops, memory = costs(credit.Backpropagation())
    for rule, more in (
        (credit.FeedbackAlignment(), 0),
        (credit.KolenPollack(), 0),
        (credit.SignSymmetry(), matrices),
        (credit.SignSymmetry("fixed"), matrices),
        (credit.DirectFeedbackAlignment(), deltas),
    ):
        found, temp = costs(rule)
        assert found <= 1.02 * flops, rule
        assert temp <= memory + more, rule
    assert found < 0.8 * flops
    plain = jax.jit(lambda p: jb.value_and_grad(net, LOSS)(p, x, y)[1]).lower(params).compile()
    assert abs(plain.cost_analysis()["flops"] / flops - 1) < 0.01


# --- refusals ----------------------------------------------------------------------------------

DENSE = jb.Dense(6, 6)


def refused(rule, net, match, x=None, loss=LOSS):
    rule = dataclasses.replace(rule, loss=loss)
    with pytest.raises(ValueError, match=match):
        rule.init(jax.random.key(0), net, net.init(jax.random.key(0)), x)


def test_layers_that_a_rule_is_not_defined_for_are_named():
    own = jb.Autodiff(lambda p, x: x @ p["w"], lambda key: {"w": jnp.eye(6)})
    net = jb.Sequential(DENSE, own, jb.Dense(6, 3))
    for rule in RULES[1:9]:
        refused(rule, net, r"is not defined for layers\[1\]")
    lstm = jb.Sequential(jb.Dense(6, 6), jb.LSTM(6, 5), jb.Take(-1), jb.Dense(5, 3))
    for rule in (
        credit.WeightMirror(),
        credit.DirectFeedbackAlignment(),
        credit.DirectRandomTargetProjection(),
    ):
        refused(rule, lstm, r"layers\[1\].*several weights", normal(0, 2, 3, 6))
    chains = [credit.DifferenceTargetPropagation(), credit.PredictiveCoding(), credit.EquilibriumPropagation(),
              credit.ForwardForward(classes=3)]  # fmt: skip
    for rule in chains:
        refused(rule, NETS["skips"][0], r"layers\[1\], Skip.* composite with weights inside")
        refused(rule, NETS["with batch norm"][0], r"layers\[1\], BatchNorm.*couples")
    refused(credit.ForwardGradient(), NETS["with batch norm"][0], r"layers\[1\].*couples")
    for rule in (chains[0], chains[2], chains[3]):
        refused(rule, NETS["dropout"][0], "draw")
    refused(
        chains[0], jb.Sequential(DENSE, jb.LayerNorm(6), DENSE), r"layers\[1\], LayerNorm.*undone"
    )
    refused(chains[2], jb.Sequential(DENSE, jb.Gelu(), DENSE), r"layers\[1\], Gelu.*decreases")
    refused(chains[2], jb.Sequential(jb.Tanh(), DENSE), r"layers\[0\], Tanh.*before")
    for bent in (jb.Softmax(), jb.LayerNorm(6, scale=False, shift=False)):
        net = jb.Sequential(DENSE, bent, DENSE)
        with pytest.raises(ValueError, match=r"layers\[1\], .*neither linear nor"):
            used_on(chains[2], net, normal(0, 4, 6))
    net = jb.Sequential(jb.Dense(6, 6), jb.RNN(6, 6), jb.Dense(6, 3))
    with pytest.raises(ValueError, match=r"layers\[1\], RNN.*neither linear nor"):
        used_on(chains[2], net, normal(0, 4, 2, 6), labels(8).reshape(4, 2))
    for rule in chains:
        frozen = jb.Sequential(jb.Frozen(DENSE), jb.Tanh(), DENSE)
        refused(rule, frozen, r"layers\[0\], Frozen.*optax.masked")
    for rule in RULES:
        rule = dataclasses.replace(rule, loss=LOSS)
        with pytest.raises(ValueError, match="no weights"):
            rule.init(jax.random.key(0), jb.Tanh(), ())
    turn = jb.Sequential(DENSE, jb.Reversible(jb.Dense(3, 3), jb.Dense(3, 3)), DENSE)
    refused(credit.DirectFeedbackAlignment(), turn, "Reversible.*recovers")


@pytest.mark.parametrize(
    "w_init", [jax.nn.initializers.zeros, lambda key, shape, dtype: jnp.eye(*shape)]
)
def test_feedback_that_is_not_drawn_is_refused(w_init):
    """Else it would be W, and the rule backpropagation."""
    same = jb.Dense(6, 3, w_init=w_init)
    refused(credit.FeedbackAlignment(), jb.Sequential(DENSE, same), r"layers\[1\].*for every key")


def used_on(rule, net, x, y=None):
    params = net.init(jax.random.key(0))
    rule, state = started(rule, net, params, x)
    return rule.gradient(state, params, x, labels(len(x)) if y is None else y)


@pytest.mark.parametrize("rule", [r for r in RULES if "Forward(" not in repr(r)], ids=repr)
def test_a_checkpoint_changes_no_rule(rule):
    """What is done again is a matter of memory; a rule that goes from unit to unit looks inside."""
    units = jb.Sequential(jb.Tanh(), jb.Dense(5, 4)), jb.Tanh(), jb.Dense(4, 3)
    net = jb.Sequential(jb.Dense(6, 5), *units)
    other = jb.Sequential(jb.Dense(6, 5), *map(jb.Checkpoint, units))
    grads, info = used_on(rule, net, normal(1, 8, 6))
    again, seen = used_on(rule, other, normal(1, 8, 6))
    assert_close(again, grads, 1e-12)
    assert_close(list(seen.deltas.values()), list(info.deltas.values()), 1e-12)


def test_a_recorder_takes_inputs_as_fit_does():
    record = credit.Recorder(*(np.asarray(v[:20]) for v in clusters()))
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), NET.init(jax.random.key(0)))
    jb.fit(
        NET, LOSS, params, clusters(40), optax.sgd(0.1), epochs=1, key=jax.random.key(1),
        rule=credit.FeedbackAlignment(), callbacks=[record], progress=False,
    )  # fmt: skip
    assert record.epochs == [1]
    assert 0 < record.alignments[0].gradient["all"] < 90


def test_many_classes_and_narrow_labels():
    """In int8 the sum of two labels would overflow, and a wrong label be the right one."""
    net = jb.Sequential(jb.Dense(120, 8), jb.Relu())
    rule, state = started(credit.ForwardForward(classes=100), net, net.init(jax.random.key(0)))
    x, y = normal(1, 600, 120), jnp.arange(600, dtype=jnp.int32) % 100
    both = rule._both(state, x, y.astype(jnp.int8))
    assert_same(both, rule._both(state, x, y))
    both, y = np.asarray(both), np.asarray(y)
    placed = np.argmax(both[:, :100], axis=1)
    assert np.array_equal(placed[:600], y)
    assert not np.any(placed[600:] == y)


def test_sizes_that_do_not_follow_are_asked_for():
    net, params, x, _ = problem("convolutions")
    refused(credit.DirectFeedbackAlignment(), net, "give init inputs")
    rule, state = started(credit.DirectFeedbackAlignment(), net, params, x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    other = rule.init(jax.random.key(3), net, params, shape)
    assert_same(other.learned, state.learned)
    rule, state = started(credit.FeedbackAlignment(), net, params)  # needs none


BAD = {
    "no loss": (lambda: credit.FeedbackAlignment().init(jax.random.key(0), NET, NET.init(jax.random.key(0))), ValueError, "has no loss"),
    "a class": (lambda: credit.FeedbackAlignment(loss=LOSS).init(jax.random.key(0), jb.Dense, ()), TypeError, "net must be"),
    "magnitudes": (lambda: credit.SignSymmetry("random"), ValueError, "'uniform', 'batch' or 'fixed'"),
    "decay": (lambda: credit.KolenPollack(decay=1.0), ValueError, "decay"),
    "NaN decay": (lambda: credit.KolenPollack(decay=float("nan")), ValueError, "decay"),
    "mirror rate": (lambda: credit.WeightMirror(rate=0), ValueError, "rate"),
    "mirror samples": (lambda: credit.WeightMirror(samples=1), ValueError, "samples"),
    "target step": (lambda: credit.DifferenceTargetPropagation(step=0), ValueError, "step must be a finite number above 0"),
    "coding rate": (lambda: credit.PredictiveCoding(rate=-1.0), ValueError, "rate must be a finite number above 0"),
    "coding steps": (lambda: credit.PredictiveCoding(steps=0), ValueError, "steps must be an int"),
    "tolerance": (lambda: credit.PredictiveCoding(tolerance=-1.0), ValueError, "tolerance"),
    "nudge": (lambda: credit.EquilibriumPropagation(nudge=0), ValueError, "nudge must be a finite number above 0"),
    "settling rate": (lambda: credit.EquilibriumPropagation(rate=1.5), ValueError, "rate must be .* at most 1"),
    "classes": (lambda: credit.ForwardForward(classes=1), ValueError, "classes must be an int"),
    "perturb": (lambda: credit.ForwardGradient("units"), ValueError, "'activities' or 'weights'"),
    "draws": (lambda: credit.ForwardGradient(draws=0), ValueError, "draws must be an int"),
    "a loss that is not canonical": (
        lambda: credit.DirectRandomTargetProjection(loss=jb.Huber()).init(jax.random.key(0), NET, NET.init(jax.random.key(0))),
        ValueError, "canonical loss",
    ),
    "class weights": (
        lambda: credit.DirectRandomTargetProjection(loss=jb.SoftmaxCrossEntropy(class_weights=(1.0, 2.0, 3.0))).init(
            jax.random.key(0), NET, NET.init(jax.random.key(0))
        ),
        ValueError, "canonical loss",
    ),
    "an empty batch": (lambda: used(x=jnp.zeros((0, 6)), y=jnp.zeros(0, int)), ValueError, "the batch is empty"),
    "labels out of range": (lambda: used(y=jnp.full(4, 3)), ValueError, "3"),
    "features": (lambda: used(x=jnp.zeros((4, 5))), ValueError, "needs 6 features"),
    "a state that is none": (lambda: used(state=()), TypeError, "what init gives"),
    "labels of forward-forward": (lambda: used(credit.ForwardForward(classes=3), y=jnp.zeros((4, 3))), ValueError, "integer labels"),
    "more labels than classes": (lambda: used(credit.ForwardForward(classes=3), y=jnp.full(4, 3)), ValueError, "from 0 to 2"),
    "labels and no room": (lambda: used(credit.ForwardForward(classes=7), y=jnp.zeros(4, int)), ValueError, "first numbers"),
    "a recorder of nothing": (lambda: credit.Recorder(np.ones((2, 2)), np.ones(2)).plot(), ValueError, "nothing has been recorded"),
    "how often to record": (lambda: credit.Recorder(np.ones((2, 2)), np.ones(2), every=0), ValueError, "every must be"),
    "how often, in parts": (lambda: credit.Recorder(np.ones((2, 2)), np.ones(2), every=1.5), ValueError, "every must be"),
    "a loss that has no labels": (lambda: fit(credit.ForwardForward(classes=3), loss=jb.SquaredError()), ValueError, "SquaredError"),
    "another rule's state": (lambda: credit.SignSymmetry(loss=LOSS).gradient(begun(credit.FeedbackAlignment())[3], (), 0, 0), ValueError, "the state is one of"),
    "another setting": (lambda: credit.KolenPollack(decay=0.5, loss=LOSS).gradient(begun(credit.KolenPollack())[3], (), 0, 0), ValueError, "the state is one of"),
    "no state": (lambda: credit.alignment((), (), 0, 0), TypeError, "must be that of a rule"),
    "a decay that is lost": (lambda: begun(credit.KolenPollack(), "bfloat16"), ValueError, "is lost in bfloat16"),
    "ids for forward-forward": (lambda: used(credit.ForwardForward(classes=3), x=jnp.zeros((4, 6), int)), TypeError, "floating-point"),
    "a search along a line": (lambda: fit(credit.FeedbackAlignment(), optimizer=optax.lbfgs()), TypeError, "asks for the cost"),
    "a need of curvature": (lambda: fit(credit.FeedbackAlignment(), optimizer=jb.optim.kfac(NET, LOSS, clusters(8), key=jax.random.key(0))), TypeError, "K-FAC needs the parameters and the mini-batch"),
    "a recorder without a rule": (lambda: fit(None, callbacks=[credit.Recorder(np.ones((2, 2)), np.ones(2))]), ValueError, "rule=rule"),
    "a rule's class": (lambda: fit(credit.FeedbackAlignment), TypeError, "rule must be a jbackprop Rule"),
    "another loss": (lambda: fit(credit.FeedbackAlignment(loss=jb.SquaredError())), ValueError, "give one of them"),
    "a rule and privacy": (
        lambda: fit(credit.FeedbackAlignment(), private=jb.Private(max_norm=1.0, noise_multiplier=1.0)),
        ValueError, "give private or rule",
    ),
}  # fmt: skip


def used(rule=None, x=None, y=None, state=None):
    _, params, rule, own = begun(rule or credit.FeedbackAlignment())
    x = normal(1, 4, 6) if x is None else x
    return rule.gradient(own if state is None else state, params, x, labels(4) if y is None else y)


def fit(rule, optimizer=None, loss=LOSS, **options):
    return jb.fit(
        NET, loss, NET.init(jax.random.key(0)), clusters(40), optimizer or optax.sgd(0.1), epochs=1,
        key=jax.random.key(0), rule=rule, progress=False, **options,
    )  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_with_the_remedy(what):
    call, error, match = BAD[what]
    with pytest.raises(error, match=match), jax.numpy_dtype_promotion("standard"):
        call()


def test_the_true_delta_above_comes_by_the_own_branch():
    net, params, x, y = problem("branches")
    _, state = started(credit.FeedbackAlignment(), net, params)
    found = credit.alignment(state, params, x, y)
    first, other = "layers[0].layers[0].layers[0]", "layers[0].layers[1]"
    b, e = state.learned[2]["w"], jb.deltas(jb.backprop(net, LOSS, params, x, y))["layers[2]"]
    truth = jb.deltas(jb.backprop(net, LOSS, params, x, y))
    each = [degrees(u, v) for u, v in zip(e @ b.T, truth[other], strict=True)]
    assert abs(found.local_delta[other] - np.mean(each)) < 1e-5
    assert abs(found.local_delta[first] - found.delta[first]) < 1e-5
    assert found.local_delta[first] > 1


def test_what_a_rule_tells_of_itself_is_in_the_history():
    fit_ = fit(credit.PredictiveCoding(steps=7))
    assert list(fit_.history) == ["loss", "residual", "steps"]
    assert fit_.history["steps"] == [7.0]
    assert 0 < fit_.history["residual"][0] < 1


def test_a_rule_that_diverges_is_named():
    with pytest.raises(
        jb.NonFiniteError, match=r"PredictiveCoding has for the gradient of layers\[0\]"
    ):
        fit(credit.PredictiveCoding(rate=50.0, steps=400))


def test_forward_forward_needs_no_outputs_for_its_classes():
    net = jb.Sequential(jb.Dense(6, 5), jb.Relu())
    params = net.init(jax.random.key(0))
    data = normal(1, 20, 6), jnp.arange(20) % 6  # the loss would have them below 5
    found = jb.fit(
        net, LOSS, params, data, optax.sgd(0.1), epochs=1, key=jax.random.key(0),
        rule=credit.ForwardForward(classes=6), validation=data, progress=False,
        metrics={"accuracy": jb.metrics.accuracy},
    )  # fmt: skip
    assert {"accuracy", "validation_accuracy"} < set(found.history)
