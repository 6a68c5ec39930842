# `make demo` and `make test` need nothing but Python >= 3.11: both build .venv first.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
PARALLEL := -n auto --maxprocesses 4
STAMP := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fault-test lint

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python >= 3.11 is needed, and $(PYTHON) is older or missing. Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing torch and the other requirements into $(VENV) (once; 1 or 2 minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[test]'
	@touch $@

demo: $(STAMP)  ## train on real digits, compare samplers, report bits/dim (about 5 minutes)
	@$(BIN)/score-sde

test: $(STAMP)  ## the default tests (under 6 minutes on 2 cores)
	@$(BIN)/python -m pytest -q $(PARALLEL)

test-all: $(STAMP)  ## every test, the slow ones too
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "slow or not slow"

fault-test: $(STAMP)  ## a training killed 30 times at random moments, against an undisturbed one (minutes)
	@PYTHONPATH=. $(BIN)/python tests/fault_run.py

lint: $(STAMP)  ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
