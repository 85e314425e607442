# `make demo` and `make test` each do their whole set-up in .venv; nothing else is needed but Python 3.11 or newer.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test check docs bench soak clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.ready
# Two test dependencies that must stay outside the environment's own packages; the lock file says why.
VISION := .venv/vision/.ready
# Linux only; the tests of the Triton kernels look for it there, and nothing else does.
TRITON := .venv/triton/.ready
# The tools of the documentation site; `make demo` does without them.
SITE := .venv/site/.ready
CORE := esper.blueprints esper.kasmina esper.leyline esper.tamiyo
COVERAGE_FLOOR := 95
# Compiling every file of torch and scipy takes minutes; Python compiles what is imported.
PIP_FLAGS := --quiet --no-compile --disable-pip-version-check

# One thread per process: the tests and the small models are faster so, and results do not depend on the machine.
export OMP_NUM_THREADS ?= 1

help:
	@echo "make setup   create .venv from requirements.lock"
	@echo "make demo    train, distil and grow a small mixture of experts (about five minutes)"
	@echo "make test    run every test"
	@echo "make check   lint, formatting, types, import arrows"
	@echo "make docs    the documentation site, in build/site"
	@echo "make bench   speed of messages and seeds, against their budgets (about an hour)"
	@echo "make soak    fuzzing, kills, faults, chaos, and what growth buys at equal compute (hours; the last part resumable)"
	@echo "make clean   remove .venv, caches and build output; results in outputs/ stay"

setup: $(STAMP) $(VISION) $(TRITON) $(SITE)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; set PYTHON=/path/to/python3."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	@touch $(STAMP)

$(VISION): tests/compat/vision.lock | $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target .venv/vision -r tests/compat/vision.lock
	@touch $(VISION)

$(TRITON): tests/kasmina/triton.lock | $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target .venv/triton -r tests/kasmina/triton.lock
	@mkdir -p .venv/triton && touch $(TRITON)

$(SITE): docs/site.lock | $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --upgrade --target .venv/site -r docs/site.lock
	@touch $(SITE)

demo: $(STAMP)
	$(BIN)/python train.py +experiment=moe_distill

test: $(STAMP) $(VISION) $(TRITON) $(SITE)
	$(BIN)/python -m pytest -q -n 2 --dist=worksteal --durations=25 $(CORE:%=--cov=%) --cov-report=term:skip-covered --cov-fail-under=$(COVERAGE_FLOOR)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP) $(SITE)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=.venv/site $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html; to search in it: $(BIN)/python -m http.server -d build/site"

bench: $(STAMP)
	$(BIN)/esper bench speed --compile
	$(BIN)/python benchmarks/leyline.py
	$(BIN)/python benchmarks/kasmina.py
	$(BIN)/python benchmarks/attach.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/triton_kernels.py
	$(BIN)/python benchmarks/oona.py
	$(BIN)/python benchmarks/urza.py
	$(BIN)/python benchmarks/kernels.py --write benchmarks/results/kernels.md
	$(BIN)/python benchmarks/disruption.py --write benchmarks/results/disruption.md

soak: $(STAMP)
	$(BIN)/python benchmarks/fuzz.py --cases 1000000 --write benchmarks/results/fuzz.md
	ESPER_SOAK=50 $(BIN)/python -m pytest -q tests/oona tests/urza tests/workers tests/tezzeret tests/urabrask tests/distributed
	$(BIN)/python benchmarks/kills.py --kills 50 --steps 90 --write benchmarks/results/kills.md
	$(BIN)/python benchmarks/faults.py --write benchmarks/results/faults.md
	$(BIN)/python benchmarks/chaos.py --rounds 50 --write benchmarks/results/chaos.md
	$(BIN)/python benchmarks/kernels.py --write benchmarks/results/kernels_all.md all
	$(BIN)/python benchmarks/growth.py --write benchmarks/results/growth.md
	$(BIN)/python benchmarks/sequence.py --write benchmarks/results/sequence.md
	$(BIN)/esper bench stability --jobs 2
	$(BIN)/python benchmarks/windows.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage *.egg-info
	find esper tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
