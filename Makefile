# One command each: demo, test, lint, bench, long-stream, drift. Every target makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test lint bench long-stream drift clean

demo: $(VENV)/.demo
	$(BIN)/subgen demo --plot build/demo.png

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test
	cd asv_benchmarks && $(abspath $(BIN))/asv run --environment existing:$(abspath $(BIN))/python --quick --show-stderr --dry-run

long-stream: $(VENV)/.demo
	$(BIN)/python asv_benchmarks/long_stream.py

drift: $(VENV)/.demo
	$(BIN)/python asv_benchmarks/drift.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[cli]"
	@touch $@

# PyTorch first and by itself: a pinned build, so that nothing else chooses one.
$(VENV)/.test: $(BIN)/python pyproject.toml requirements/torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/torch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
