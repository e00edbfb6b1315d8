# Each target sets up what it needs on a machine that has Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip would compile on one core what no command imports: each module is compiled when it is first imported.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-workbench test-runs test-pages test-others test-slow test-lens4 test-python other-pythons lint \
        style types notebooks docs dist app clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo   set up, then harvest, train and evaluate an SAE on the bundled model (5 minutes on 2 cores)"
	@echo "make app    set up, then open the web app on the demo's workspace"
	@echo "make test   set up, then run linters, type checker and tests"
	@echo "make test-slow   set up, then run the tests that take long: all notebooks, many kills (ONLY=WORDS for some)"
	@echo "make test-lens4   set up, then run what TransformerLens 4 could change under it"
	@echo "make test-python PYTHON=python3.13 VENV=.venv-3.13   install the wheel there, then run what another Python could change"
	@echo "make lint   set up, then run ruff and mypy"
	@echo "make notebooks   set up, then run the notebooks from nothing and store their outputs (needs Chrome or Chromium)"
	@echo "make docs   set up, then build the documentation into docs/_build/html; a warning is an error"
	@echo "make dist   set up, then build and check the wheel and the sdist in dist/"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, found $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11."; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Could not create a virtual environment: install your system's python3-venv package."; exit 2; }

# torch goes first and pinned: an open range would pull in a newer build and gigabytes of libraries.
$(VENV)/.runtime: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing the workbench into $(VENV) (a minute or more)"
	@$(PIP) --constraint constraints.txt torch
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) --constraint constraints.txt --editable '.[dev]'
	@$(PIP) --constraint constraints.txt --no-deps dictionary-learning circuit-tracer  # ask for what nothing here uses
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; packages hold some files of Python 2
	@touch $@

demo: $(VENV)/.runtime
	$(BIN)/workbench demo

app: $(VENV)/.runtime
	$(BIN)/workbench app --workspace demo-workspace

lint: style types

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Four targets beside each other: most keep one core busy, the tests of the pages often wait. The longest come first, and
# ALSO="docs other-pythons" puts further targets behind them.
test: style
	@$(MAKE) --no-print-directory --jobs=4 types test-pages test-others test-workbench test-runs $(ALSO)

PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
PAGES := tests/app tests/browser tests/notebooks
RUNS := tests/workbench/cli tests/workbench/saes tests/workbench/harvest

test-workbench: $(VENV)/.dev
	$(PYTEST) -m "not slow" tests/workbench $(addprefix --ignore=,$(RUNS))

test-runs: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(RUNS)

test-pages: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(PAGES)

test-others: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(addprefix --ignore=,tests/workbench $(PAGES))

# ONLY="1_quickstart or small_benchmark" runs those whose names hold the words.
test-slow: $(VENV)/.dev
	$(PYTEST) -m slow $(if $(ONLY),-k "$(ONLY)")

# TransformerLens 4 stands before 3.9 on the path: what reads models through it, from loading to circuits.
LENS4 := tests/workbench/models/test_models.py tests/workbench/models/test_variants.py \
         tests/workbench/models/test_mixtures.py tests/circuits/test_splice.py

test-lens4: $(VENV)/.dev
	@$(PIP) --no-deps --upgrade --target $(VENV)/lens4 --requirement constraints-lens4.txt
	PYTHONPATH=$(abspath $(VENV)/lens4) $(PYTEST) -m "not slow" $(LENS4)

# What another Python could change, with the wheel of this tree and the pins: that every module imports, and some tests.
OTHER := tests/workbench/text tests/workbench/disk tests/workbench/harvest tests/workbench/models/test_models.py \
         tests/workbench/models/test_own_models.py tests/workbench/catalog/test_sql.py tests/workbench/cli/test_cli.py \
         tests/sae/test_model.py tests/sae/test_training.py tests/circuits/test_splice.py

test-python: $(VENV)/.runtime
	@$(PIP) --constraint constraints.txt pytest pytest-timeout hypothesis
	@$(PIP) --no-deps --force-reinstall .
	cd tests && ../$(BIN)/python -P import_everything.py
	$(PYTEST) -m "not slow" $(OTHER)

# The part of that which takes seconds, on each of these that is at hand: every file compiles without a warning, and the
# command line says what it does, with the plain Python packages that it needs for that from the environment of make test.
PYTHONS ?= python3.12 python3.13

other-pythons: $(VENV)/.runtime
	@for python in $(PYTHONS); do \
	  $$python -c '' 2>/dev/null || { echo "$$python: skipped, there is none here"; continue; }; \
	  $$python -W error -m compileall -q -f sae circuits workbench app tests benchmarks data && \
	  PYTHONPATH=.:$$($(BIN)/python -c 'import typer; print(typer.__path__[0] + "/..")') $$python -m workbench --help \
	    >/dev/null && echo "$$($$python --version): every file compiles, the command line answers" || exit 1; \
	done

notebooks: $(VENV)/.dev
	rm -rf notebooks/workspace notebooks/own
	$(BIN)/python notebooks/execute.py

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist docs/_build docs/reference .pytest_cache .mypy_cache .ruff_cache
