"""The checker on the catalogue of benchmarks/: planted errors, and right gradients."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import checker
from entries import Planted
from planted import PLANTED
from right import RIGHT

DUE = 0.8  # of the diagnoses


@pytest.mark.parametrize("entry", PLANTED, ids=lambda entry: entry.id)
def test_a_planted_error_is_found(entry):
    found = checker.report(entry)
    assert found.verdict == "wrong", f"\n{found}"


@pytest.mark.parametrize("entry", RIGHT, ids=lambda entry: entry.id)
def test_a_right_gradient_is_not_called_wrong(entry):
    found = checker.report(entry)
    allowed = ("right", "inconclusive") if entry.inconclusive else ("right",)
    assert found.verdict in allowed, f"{entry.inconclusive}\n{found}"


def test_most_planted_errors_are_diagnosed():
    due = [entry for entry in PLANTED if entry.expect]
    missed = [entry.id for entry in due if not checker.diagnosed(entry, checker.report(entry))]
    assert len(missed) <= (1 - DUE) * len(due), "\n".join(missed)


def test_the_catalogue_is_large_and_varied():
    ids = [entry.id for entry in (*PLANTED, *RIGHT)]
    assert len(set(ids)) == len(ids)
    assert len(PLANTED) >= 66
    assert len(RIGHT) >= 66
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert {isinstance(e, Planted) for e in (*PLANTED, *RIGHT) if e.dtype == dtype} == {
            True,
            False,
        }
    assert {entry.call for entry in PLANTED} == {"gradient", "vjp", "jvp", "network"}


@pytest.mark.parametrize("entry", [*PLANTED[::8], *RIGHT[::8]], ids=lambda entry: entry.id)
def test_the_catalogue_tells_the_truth(entry):
    """By finite differences in float64; `benchmarks/checker.py --prove` tries all of it."""
    assert checker.is_proved(entry), checker.departure(entry)
