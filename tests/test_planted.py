"""The checker on a sample of the catalogue of benchmarks/, and what it said of all of it."""

import json
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import checker
from planted import PLANTED, RIGHT, Planted
from planted.proof import departure, is_proved

pytestmark = pytest.mark.newest
RESULTS = Path(checker.__file__).parent / "results" / "checker.json"
DUE = 0.8  # of the diagnoses


def sample(entries):
    """One of every kind, that with the fewest arrays."""

    def size(entry):
        return entry.call == "network", len(jax.tree.leaves(entry.args))

    kinds = dict.fromkeys(entry.kind for entry in entries)
    return [min((e for e in entries if e.kind == kind), key=size) for kind in kinds]


TIES = [entry for entry in PLANTED if "ties" in entry.id]
NOT_BY_JAX = [entry for entry in RIGHT if not entry.kind.startswith("jax.grad")]


# Every second kind, as compiling takes long: benchmarks/checker.py runs all of them.
@pytest.mark.parametrize("entry", sample(PLANTED)[::2] + TIES, ids=lambda entry: entry.id)
def test_a_planted_error_is_found_and_diagnosed_as_before(entry, results):
    found = checker.report(entry)
    assert found.verdict == "wrong", f"\n{found}"
    before = next(r for r in results if r["id"] == entry.id)
    assert checker.diagnosed(entry, found) >= before["diagnosed"], f"\n{found}"


@pytest.mark.parametrize("entry", sample(NOT_BY_JAX), ids=lambda entry: entry.id)
def test_a_right_gradient_is_not_called_wrong(entry):
    found = checker.report(entry)
    allowed = ("right", "inconclusive") if entry.inconclusive else ("right",)
    assert found.verdict in allowed, f"{entry.inconclusive}\n{found}"


@pytest.fixture(scope="module")
def results():
    """What `benchmarks/checker.py --out` has saved."""
    return json.loads(RESULTS.read_text())["results"]


def test_the_results_are_those_of_this_catalogue(results):
    saved = [(r["id"], r["planted"], r["expect"]) for r in results]
    entries = [*PLANTED, *RIGHT]
    assert saved == [(e.id, isinstance(e, Planted), getattr(e, "expect", "")) for e in entries]


def test_all_planted_errors_were_caught_and_most_of_them_diagnosed(results):
    planted = [r for r in results if r["planted"]]
    assert not [r["id"] for r in planted if r["ours"] != "wrong"]
    due = [r for r in planted if r["expect"]]
    missed = [f"{r['id']}: {r['diagnosis']}" for r in due if not r["diagnosed"]]
    assert len(missed) <= (1 - DUE) * len(due), "\n".join(missed)
    assert {r["kind"] for r in planted if not r["expect"]} <= {"stale", "noise"}


def test_no_right_gradient_was_called_wrong(results):
    undecided = {e.id for e in RIGHT if e.inconclusive}
    for r in results:
        if not r["planted"]:
            assert r["ours"] in ("right", "inconclusive")[: 1 + (r["id"] in undecided)], r["id"]


def test_the_catalogue_is_large_and_varied():
    ids = [entry.id for entry in (*PLANTED, *RIGHT)]
    assert len(set(ids)) == len(ids)
    assert len(PLANTED) >= 66
    assert len(RIGHT) >= 66
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        of_dtype = [isinstance(e, Planted) for e in (*PLANTED, *RIGHT) if e.dtype == dtype]
        assert set(of_dtype) == {True, False}
    assert {entry.call for entry in PLANTED} == {"gradient", "vjp", "jvp", "network"}
    assert {entry.kind for entry in PLANTED} == {k for ks in checker.GROUPS.values() for k in ks}


@pytest.mark.parametrize("entry", [*PLANTED[::100], *RIGHT[::120]], ids=lambda entry: entry.id)
def test_the_catalogue_tells_the_truth(entry):
    """By finite differences in float64; `benchmarks/checker.py --prove` tries all of it."""
    assert is_proved(entry), departure(entry)
