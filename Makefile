# Every target sets itself up: from a fresh clone, `make quickstart` or `make test` is all there is to type.
#   PYTHON=python3.12 make test      another interpreter (3.11 or newer)
#   PIP_ARGS="..." make test          more arguments for pip, such as an index that has torch without CUDA

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-slow check format bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

.venv: $(READY)

# The editable installation compiles csrc/ as well, so a change there builds it again.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "abyssal needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	@touch $@

quickstart: $(READY)  ## train a tiny model on this machine, look at it, let it write
	$(BIN)/abyssal quickstart

test: $(READY)  ## the tests, but the slow ones and those for a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(READY)  ## the slow tests alone
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(READY)  ## style and layout (`make format` mends both), types, and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY)  ## let ruff lay out the code and mend what it can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY)  ## every benchmark: prints tables, saves data under benchmarks/results
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:  ## remove the virtual environment and whatever was built
	rm -rf .venv build dist src/*.egg-info src/abyssal/kernels/_native.so .pytest_cache .ruff_cache .hypothesis .import_linter_cache
