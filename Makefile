# make run    set up, then learn handwritten digits by the delta rule, with the proof beside it
# make test   set up, then lint, types and every test, on the newest JAX and the oldest supported
# make bench  manual against automatic gradients on this machine

PYTHON ?= python3
VENV = .venv
OLDEST = .venv-oldest
JOBS ?= 2

.PHONY: run test lint types tests tests-oldest bench clean

run: $(VENV)/ready
	$(VENV)/bin/jbackprop demo

test: lint types tests tests-oldest

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

tests: $(VENV)/ready
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "not oldest"
	XLA_FLAGS= $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup -m as_shipped \
		$$(grep -l as_shipped tests/test_*.py)

# The oldest supported JAX: every layer and loss in float64, capture, the calls, the checker and training.
tests-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest -n $(JOBS) --dist loadgroup -m "not newest"

bench: $(VENV)/ready
	$(VENV)/bin/python benchmarks/gradient.py

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

$(OLDEST)/ready: pyproject.toml oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c oldest.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .cache output
