# The two commands for a fresh machine with Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test coverage faults floors newest check format docs bench clean

demo: .venv/lab.done
	$(BIN)/fwlora demo

test: .venv/dev.done
	$(BIN)/pytest -n auto --dist loadfile

# The tests once more with branch coverage; fails below the bound in pyproject.toml.
coverage: .venv/dev.done
	$(BIN)/pytest -n auto --dist loadfile --cov --cov-report=term

# The core's tests on the oldest torch, peft and transformers that pyproject.toml claims, and on the newest on PyPI, each in
# a virtual environment of its own. `make test` runs on the versions of constraints.txt.
floors: .venv-oldest/core.done
	.venv-oldest/bin/pytest tests/fwlora

newest: .venv-newest/core.done
	.venv-newest/bin/pytest tests/fwlora

.venv-%/core.done: pyproject.toml constraints.txt scripts/core_versions.py
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python scripts/core_versions.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/pip install --quiet --requirement .venv-$*/requirements.txt --editable .
	touch $@

# Breaks training in many ways, many times, and prints what survived; about half an hour on two cores, not part of `make test`.
faults: .venv/dev.done
	$(BIN)/python scripts/faults.py

# Linter, formatting and types.
check: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What README and docs link to and name exists.
docs: .venv/dev.done
	$(BIN)/pytest tests/test_docs.py

bench: .venv/dev.done
	$(BIN)/fwlora bench

# torch comes first and by its exact version: resolved among the rest it may drag in another build.
.venv/%.done: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "fwlora needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist src/*.egg-info
