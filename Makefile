# The project's own commands; CI runs these same targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.PHONY: install demo check format test test-slow docs clean

install: $(VENV)/.installed  ## the environment, with the development extras

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one with: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install  ## train, evaluate and predict on the bundled real data
	@set -e; run=runs/demo-$$(date +%Y%m%d-%H%M%S); \
	$(BIN)/convmixer train digits --recipe digits --out $$run; \
	$(BIN)/convmixer val $$run; \
	$(BIN)/convmixer predict $$run $$run/samples; \
	echo "Run folder: $$run"; echo "Pictures:   $$run/pictures"

check: install  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: install  ## the whole suite but the slow tests
	$(BIN)/python -m pytest

test-slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

docs: install  ## the API's pages, built from the docstrings, in build/docs
	$(BIN)/python docs/build_api.py build/docs

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
