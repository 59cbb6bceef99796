# The project's own commands; CI runs these same targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
.PHONY: install demo check format test test-slow fuzz dist dist-quick benchmark benchmark-train benchmark-infer benchmark-gpu docs clean

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

# Tests run in one process a core, four at most. Threads that wait must not spin: the other processes need the cores.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: install  ## the whole suite but the slow tests
	$(PYTEST)

SECONDS ?= 600
fuzz: install  ## the readers of images, forms and weights, for SECONDS each
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[fuzz]"
	for target in images forms weights; do $(BIN)/python tests/faults/fuzz.py $$target $(SECONDS) || exit 1; done

dist: install  ## the wheel and the sdist, in dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist

dist-quick: dist  ## the wheel installed away from the checkout, tried with the packages of this environment
	$(BIN)/python tools/install_matrix.py quick

test-slow: install  ## the tests that take minutes
	$(PYTEST) -m slow

# The README's rows of speed, measured on this machine, which has to be idle: an hour or more.
ROW = $(BIN)/convmixer benchmark $(1) --record build/benchmark.jsonl $(OPTIONS)
benchmark: benchmark-train benchmark-infer

benchmark-train: install
	$(call ROW,train --model convmixer_256_8_p2_k5 --batch-size 64)
	$(call ROW,train --model convmixer_256_8_p1_k9 --batch-size 64)
	$(call ROW,train --model convmixer_768_32 --batch-size 4)
	$(call ROW,train --model convmixer_1536_20 --batch-size 2)

benchmark-infer: install
	for model in convmixer_256_8_p2_k5 convmixer_768_32 convmixer_1536_20; do for batch in 1 16; do \
	  $(call ROW,infer --model $$model --batch-size $$batch) || exit 1; done; done
	$(call ROW,infer --model convmixer_768_32 --batch-size 1 --precision int8)

benchmark-gpu:  ## parity, speed, curves, resume and a run on a GPU, within ten minutes, into build/gpu
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --out build/gpu $(OPTIONS)

docs: install  ## the API's pages, built from the docstrings, in build/docs
	$(BIN)/python docs/build_api.py build/docs

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
