# `make demo` and `make test` do all the set-up: a .venv beside this file, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fast lint format

demo: .venv/installed
	$(BIN)/manyicl demo

test: .venv/installed-dev
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

fast: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

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
