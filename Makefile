# One command each. Needs Python 3.11+ with venv and pip; everything else comes from the package index.
PYTHON ?= python3
VENV := .venv
ARENA_MINUTES ?= 30
BIN := $(VENV)/bin
ENGINES := .venv-engines
SGLANG := .venv-sglang
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One compute thread a process: with two, and the other core busy, training runs several times slower.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install dev demo check format test test-full test-engines test-sglang coverage golden bench chaos docs tiny-target clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "SpecForge needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# PyTorch first and by its exact pin: a range would pull another build in.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.core: pyproject.toml | $(VENV)/.torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.core
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(VENV)/.core ## create .venv and install specforge
dev: $(VENV)/.dev ## the same with the development tools

demo: $(VENV)/.core ## train, evaluate and export a real draft here
	$(BIN)/specforge demo $(ARGS)

check: $(VENV)/.dev ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## reformat and apply safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(VENV)/.dev ## the test suite (a few minutes)
	$(BIN)/python -m pytest -m 'not full' --numprocesses 2 --dist loadfile $(ARGS)

test-full: $(VENV)/.dev $(ENGINES)/.vllm ## what is slow: the whole demo, killed and resumed; vLLM
	$(BIN)/python -m pytest -m full --numprocesses 2 --dist loadfile $(ARGS)

test-engines: $(VENV)/.dev $(ENGINES)/.vllm ## exported drafts in a real vLLM, in an environment of its own
	$(BIN)/python -m pytest -m full tests/engines $(ARGS)

# Its dependencies contradict ours, so it has an environment of its own. PyTorch first, with its dependencies.
$(ENGINES)/.vllm: constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints-engines.txt)"
	$(ENGINES)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement constraints-engines.txt
	@touch $@

test-sglang: $(VENV)/.dev $(SGLANG)/.sglang ## capture in a real SGLang, in an environment of its own
	SPECFORGE_SGLANG_PYTHON=$(CURDIR)/$(SGLANG)/bin/python $(BIN)/python -m pytest -m full tests/live_sglang $(ARGS)

# Kernels that exist for CUDA alone are stubs here, see tests/engines/sglang_shims. Our plug-in is found by its entry point.
$(SGLANG)/.sglang: constraints-sglang.txt pyproject.toml
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet "$$(grep '^torch==' constraints-sglang.txt)"
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --requirement constraints-sglang.txt
	$(SGLANG)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --editable .
	@touch $@

coverage: $(VENV)/.dev ## lines and branches that the unit tests reach
	$(BIN)/python -m pytest tests/unit --cov --cov-report=term $(ARGS)

golden: $(VENV)/.core ## every reference vector below GOLDEN
	$(BIN)/python -m specforge.testing.golden $(or $(GOLDEN),../shared/golden)

bench: $(VENV)/.core ## the benchmarks
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

chaos: $(VENV)/.dev ## fifty random kills of the processes of a run, then half an hour of them around one arena
	PYTHONPATH=tests/integration $(BIN)/python tests/chaos/fifty.py --json benchmarks/results/chaos.json $(ARGS)
	$(BIN)/python tests/chaos/arena_chaos.py --minutes $(ARENA_MINUTES) --json benchmarks/results/arena_chaos.json

docs: $(VENV)/.core ## regenerate the reference pages
	$(BIN)/python -m specforge.config.reference docs/reference/run-config.md

tiny-target: $(VENV)/.core ## retrain the demo's target from scratch (about an hour on two cores)
	$(BIN)/python -m specforge.demo.target $(or $(OUT),src/specforge/demo/target_model)

clean: ## remove the environment and caches
	rm -rf $(VENV) $(ENGINES) $(SGLANG) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/*.egg-info
