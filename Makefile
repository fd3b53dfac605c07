# Every target does its own set-up: a virtual environment in .venv, made once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# Figures and colours that do not depend on how many cores the machine has.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

# torch first, by its pinned build: whatever asks for plain torch afterwards is content with it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable . --group dev
	@touch $@

.PHONY: setup
setup: $(READY) ## make the virtual environment

.PHONY: demo
demo: $(READY) ## train a small GPT under watch, then its broken twin
	$(BIN)/gradscope demo --force

.PHONY: test
test: lint ## everything that has to pass: style, types, layers, all tests
	$(BIN)/python -m pytest -n 2

.PHONY: quick
quick: $(READY) ## the tests without the slow ones, in two minutes
	$(BIN)/python -m pytest -n 2 -m "not slow"

.PHONY: faults
faults: $(READY) ## let gradscope fail at every point, one after the other; half an hour
	GRADSCOPE_ALL_FAULTS=1 $(BIN)/python -m pytest -s tests/contract/test_faults.py

.PHONY: frameworks
frameworks: $(READY) ## the programs on Lightning, transformers and accelerate, which it installs
	$(BIN)/python -m pip install --quiet -c constraints.txt --group frameworks
	$(BIN)/python -m pytest tests/frameworks

.PHONY: matrix
matrix: $(READY) ## every optimizer in every loop, watched and unwatched; prints how many, writes docs/matrix.md
	$(BIN)/python tests/matrix

.PHONY: lint
lint: $(READY) ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: $(READY) ## write the generated pages of the documentation anew
	$(BIN)/python docs/generate.py

.PHONY: bench
bench: $(READY) ## what watching costs, beside other tools, which it installs; writes docs/benchmarks.md
	$(BIN)/python tests/benchmarks/watch_overhead.py --peers build/peers --write docs/benchmarks.md
	$(BIN)/python tests/benchmarks/scaling.py --append docs/benchmarks.md
	$(BIN)/python tests/benchmarks/graphs.py

.PHONY: clean
clean: ## remove the virtual environment and everything generated
	rm -rf $(VENV) build dist gradscope-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
