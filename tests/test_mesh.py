"""Meshes of eight devices: the numbers of one, what goes over the links, what a device holds.

All is computed by one run of `on_eight.py`, which has eight devices: meshes 8x1 (FSDP), 2x4 (FSDP
by tensor parallel) and 1x8 (tensor parallel), of automatic and of explicit axes. Costs differ from
device to device, and two devices have no example that counts; some of those hold NaN.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from conftest import QUICK

from jbackprop import mesh

pytestmark = pytest.mark.xdist_group("mesh")
FLAGS = f"{QUICK} --xla_force_host_platform_device_count=8"
EXPLICIT = ["explicit"] if mesh.EXPLICIT else []
EXACT = 1e-12


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).parent / "on_eight.py"
    run = subprocess.run(
        [sys.executable, str(script), *EXPLICIT],
        env=os.environ | {"XLA_FLAGS": FLAGS}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def sent(found):
    return found["sent"]


@pytest.mark.parametrize("net", ["mlp", "cnn", "tied"])
def test_every_mesh_has_the_numbers_of_one_device_and_that_those_of_autodiff(found, net):
    meshes = [f"{shape} automatic" for shape in ("8x1", "2x4", "1x8")]
    meshes += [f"2x4 {kind}" for kind in EXPLICIT if net != "cnn"]
    assert set(found[net]) == {"autodiff", *meshes}
    for label, errors in found[net].items():
        due = {"value", "gradient", "clipped", "norms", "fraction"}
        assert set(errors) - {"factors", "places"} == due
        assert ("factors" in errors) == (label != "autodiff")
        for what, error in errors.items():
            if what != "places":
                assert error < EXACT, (label, what, error)
        if "explicit" in label:
            assert errors["places"], "gradients lie where the parameters do, norms as the examples"


@pytest.mark.parametrize("net", ["mlp", "cnn", "gpt"])
def test_data_parallel_sends_the_gradient_and_the_cost_once_and_nothing_else(sent, net):
    ours = sent[f"data {net} ours"]["sent"]
    assert set(ours) == {"all-reduce"}
    assert ours["all-reduce"][0] == sent[f"gradient {net}"] + 8
    assert ours["all-reduce"][1] <= sent[f"data {net} autodiff"]["sent"]["all-reduce"][1]


@pytest.mark.skipif(not mesh.EXPLICIT, reason="explicit axes need a newer JAX")
def test_explicit_axes_send_no_more(sent):
    assert sent["data mlp explicit"]["sent"] == sent["data mlp ours"]["sent"]


@pytest.mark.newest  # what XLA makes of a program differs from one to the next
@pytest.mark.parametrize("net", ["mlp", "gpt"])
def test_fsdp_gathers_no_more_than_autodiff(sent, net):
    ours, plain = (sent[f"fsdp {net} {who}"] for who in ("ours", "autodiff"))
    for k in (0, 1):  # bytes, and how often
        assert ours["sent"]["all-gather"][k] <= plain["sent"]["all-gather"][k]
    for kind in ours["sent"]:
        assert ours["sent"][kind][0] <= plain["sent"][kind][0], kind


@pytest.mark.newest
def test_tensor_parallel_sums_as_often_as_autodiff(sent):
    assert sent["tensor mlp ours"]["sent"] == sent["tensor mlp autodiff"]["sent"]
    ours, plain = (sent[f"tensor gpt {who}"]["sent"] for who in ("ours", "autodiff"))
    assert ours["all-reduce"][1] <= plain["all-reduce"][1]
    whole = [sum(size for size, _ in way.values()) for way in (ours, plain)]
    assert whole[0] < 1.1 * whole[1]


@pytest.mark.parametrize("net", ["mlp", "gpt"])
def test_questions_about_single_examples_send_their_sums_only(sent, net):
    norms, clipped, factors = (sent[f"{what} {net}"] for what in ("norms", "clipped", "factors"))
    # Whether Gram matrices are precise enough is decided by all devices together: a bool a matrix.
    bits, times = norms["sent"].get("all-reduce", (0, 0))
    assert bits <= 2 * times  # bytes
    assert set(norms["sent"]) <= {"all-reduce"}
    assert set(clipped["sent"]) == set(factors["sent"]) == {"all-reduce"}
    assert clipped["sent"]["all-reduce"][0] == sent[f"gradient {net}"] + 8 + bits
    assert factors["sent"]["all-reduce"][0] == factors["bytes"]


@pytest.mark.parametrize(("way", "net", "share"), [("fsdp", "mlp", 0.25), ("fsdp", "gpt", 0.15), ("tensor", "mlp", 0.45), ("tensor", "gpt", 0.2)])  # fmt: skip
def test_a_device_holds_less_where_parameters_are_split(sent, way, net, share):
    """Arguments and results, of which the parameters and the gradient are the most."""
    held = sent[f"{way} {net} ours"]["held"]
    assert held < share * sent[f"data {net} ours"]["held"]
    assert held == sent[f"{way} {net} autodiff"]["held"]


def test_one_device_asks_nothing_of_a_mesh():
    assert jax.device_count() == 1, "these tests are for one device; on_eight.py has eight"
    calls = []

    @mesh.on_mesh(lambda *_: calls.append("split"))
    def twice(x):
        return 2 * x

    assert twice(3.0) == 6.0
    assert float(jax.jit(twice)(jax.numpy.ones(()))) == 2
    assert calls == []
