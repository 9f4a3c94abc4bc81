# The whole project in a few words: `make demo` to see it work, `make test` to check it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test test-cluster test-pages lint fuzz bench docs

venv: .venv/installed

# constraints.txt names exact versions, so that the same commit installs the same packages.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: venv
	$(BIN)/python launch/demo.py

test: lint
	$(BIN)/python -m pytest

# Faults by the dozen, and a cluster's own programs where they are installed.
test-cluster: venv
	$(BIN)/python -m pytest -m cluster

# The long commands of README.md and docs/, on small inputs.
test-pages: venv
	$(BIN)/python -m pytest -m pages

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.house
	$(BIN)/mypy l2e model data configs launch bench

fuzz: venv
	$(BIN)/python -m tests.configs.fuzz

bench: venv
	$(BIN)/python bench/run.py

docs: venv
	$(BIN)/python docs/build.py
