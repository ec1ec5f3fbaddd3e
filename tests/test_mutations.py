"""A few mutants of the rules; `python tests/mutate_rules.py` runs every one."""

import ast
import functools
import os
import subprocess
import sys

import pytest
from equivalent import EQUIVALENT
from mutate_rules import SOURCE, TESTS, functions, mutants

pytestmark = [pytest.mark.newest, pytest.mark.xdist_group("mutants")]
NAMES = ("backward", "slope", "delta", "value_and_delta", "error", "mean", "targets")
QUESTIONS = ("total", "each", "square_norm", "second_moment", "dot", "gram", "stacked")


@functools.cache
def every():
    """All mutants; when they are asked for, as it takes seconds."""
    return list(mutants())


def test_every_rule_has_mutants():
    rules = {
        (str(path.relative_to(SOURCE)), name)
        for folder in ("layers", "losses", "compose", "factored")
        for path in (SOURCE / folder).glob("*.py")
        for name, function in functions(ast.parse(path.read_text()))
        if name.split(".")[-1] in NAMES + QUESTIONS and isinstance(function.body[-1], ast.Return)
    }
    assert len(rules) > 20
    assert rules <= {(m.file, m.rule) for m in every()}


def test_what_computes_the_same_is_still_there():
    stated = [what for same in EQUIVALENT.values() for what in same]
    assert set(stated) <= {m.what for m in every()}
    assert len(stated) == len(set(stated))


def test_a_sample_of_mutants_is_killed():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, TESTS / "mutate_rules.py", "--sample", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutants: 2 killed" in done.stdout, done.stdout
