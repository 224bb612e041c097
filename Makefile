# One command each: demo, test, test-slow, lint, docs, docs-serve, bench, bench-compare, floors, long-stream, shards, drift,
# examples, evaluate; fuzz, crash-test and soak, which take long; and test-gpu, sanitize-gpu and bench-gpu where there is
# a GPU. Every target makes its environment first, but those three: they run in one that has CuPy, see docs/howto/gpu.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= $(PYTHON)
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

# Releases of transformers that the tests pass on; `make test` uses the newest.
TRANSFORMERS ?= 4.57.6 5.0.0 5.5.0 5.23.0 5.24.0
# kvpress needs transformers below 5.3, and has its own environment.
BASELINES := .venv-baselines
# The site's environment and where it is built.
DOCS := .venv-docs
SITE := build/docs
PORT ?= 8000

.PHONY: demo test test-slow test-transformers lint docs docs-serve readme-plot bench bench-compare floors long-stream shards drift \
  fuzz crash-test soak examples examples-baselines evaluate evaluate-baselines evaluate-report test-gpu sanitize-gpu bench-gpu clean

demo: $(VENV)/.demo
	$(BIN)/subgen demo --plot build/demo.png

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m "not slow"

# What takes minutes: kernels compiled for every architecture, every barrier left out, pages run, JAX.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m slow

test-transformers: $(TRANSFORMERS:%=.venv-transformers-%/.done)
	@for version in $(TRANSFORMERS); do \
	  echo "transformers $$version"; \
	  .venv-transformers-$$version/bin/python -m pytest -q tests/torch_backend/test_transformers*.py || exit 1; \
	done

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs the examples, and fails on any warning, any link within the site that leads nowhere and any picture without words.
docs: $(DOCS)/.done
	rm -rf $(SITE)
	$(DOCS)/bin/python -m sphinx -W --keep-going -q -b html docs $(SITE)
	$(DOCS)/bin/python docs/check_site.py $(SITE)

docs-serve: docs
	$(DOCS)/bin/python -m http.server --bind 127.0.0.1 --directory $(SITE) $(PORT)

# The picture in the README.
readme-plot: $(VENV)/.demo
	$(BIN)/subgen compare --plot docs/_static/compare.png

# Once each, all but the long streams of `growth`; BENCH=growth runs those, BENCH=. everything.
BENCH ?= ^(?!growth)
ASV = cd asv_benchmarks && $(abspath $(BIN))/asv

bench: $(VENV)/.test
	$(ASV) machine --yes > /dev/null
	$(ASV) run --environment existing:$(abspath $(BIN))/python --quick --show-stderr --dry-run --bench '$(BENCH)'

# Each commit in an environment of its own, in turns; fails where something takes FACTOR times as long or as much.
BASE ?= main
FACTOR ?= 1.25
bench-compare: $(VENV)/.test
	$(ASV) machine --yes > /dev/null
	$(ASV) continuous --factor $(FACTOR) --interleave-rounds --show-stderr --bench '$(BENCH)' $(BASE) HEAD

floors: $(VENV)/.test
	$(BIN)/python asv_benchmarks/floors.py

long-stream: $(VENV)/.demo
	$(BIN)/python asv_benchmarks/long_stream.py

shards: $(VENV)/.demo
	$(BIN)/python asv_benchmarks/shards.py $(CAPTURE)

drift: $(VENV)/.demo
	$(BIN)/python asv_benchmarks/drift.py

# Mutated files, as many as INPUTS, and long runs of the pool of sketches: docs/experiments.md.
INPUTS ?= 100000
fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz.py --inputs $(INPUTS)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q tests/core/test_stateful.py tests/core/test_persist.py \
	  tests/torch_backend/test_transformers_refusals.py

# A process that saves, killed as often as KILLS.
KILLS ?= 1000
crash-test: $(VENV)/.test
	$(BIN)/python tests/crash_test.py kill --times $(KILLS)

# Ten million tokens: memory, drift and error must not grow.
soak: $(VENV)/.demo
	$(BIN)/python asv_benchmarks/drift.py --tokens 10000000 --rows 10 --streams 1 --window 512

examples: $(VENV)/.test
	$(BIN)/python examples/generate.py --baselines build/baselines.json --plot build/generate.png

examples-baselines: $(BASELINES)/.done
	$(BASELINES)/bin/python examples/baselines.py --out build/baselines.json

# A real model on RULER's tasks: a few samples take 15 minutes on two cores. More of them: SAMPLES=50 TASKS=single_2,turns.
# Answers stay in build/real, so a run continues where it was stopped; `make evaluate-report` needs no model.
REAL := build/real
ANSWERS = $(REAL)/subgen.jsonl $(REAL)/presses.jsonl
SAMPLES ?= 4
TASKS ?= single_2,prose
EVALUATE = $(REAL)/model $(REAL)/essays --samples $(SAMPLES) --tasks $(TASKS)

evaluate: $(REAL)/.done
	OMP_NUM_THREADS=2 $(BIN)/python examples/real_model/evaluate.py $(EVALUATE) --out $(REAL)/subgen.jsonl
	$(MAKE) evaluate-report

# The methods of kvpress on the same samples, and the question before and after the compression.
evaluate-baselines: $(REAL)/.done $(BASELINES)/.done
	OMP_NUM_THREADS=2 $(BIN)/python examples/real_model/evaluate.py $(EVALUATE) --protocols excluded,included \
	  --out $(REAL)/subgen.jsonl
	OMP_NUM_THREADS=2 $(BASELINES)/bin/python examples/real_model/presses.py $(EVALUATE) --protocols excluded,included \
	  --out $(REAL)/presses.jsonl
	$(MAKE) evaluate-report

evaluate-report:
	$(BIN)/python examples/real_model/report.py $(ANSWERS) --plot $(REAL)/report.svg --summary $(REAL)/report.json

$(REAL)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check gguf
	$(BIN)/python examples/real_model/fetch.py $(REAL)
	@touch $@

# Warnings of whatever releases are there are no errors here.
test-gpu:
	$(GPU_PYTHON) -m pytest -W default -m gpu tests/cuda

# Stray accesses, and races in shared memory; takes compute-sanitizer of the CUDA toolkit.
SANITIZED ?= costs_equal or any_number or appended or gathered or rounded or leaders_decide or matched
sanitize-gpu:
	for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 9 $(GPU_PYTHON) -m pytest -W default -q -m gpu \
	    tests/cuda -k "$(SANITIZED)" || exit 1; \
	done

bench-gpu:
	$(GPU_PYTHON) asv_benchmarks/gpu.py --output build/gpu

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

# An environment for each release, which borrows all else, PyTorch above all, from that of the tests.
.venv-transformers-%/.done: $(VENV)/.test
	$(PYTHON) -m venv .venv-transformers-$*
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > $$(.venv-transformers-$*/bin/python -c "import site; print(site.getsitepackages()[0])")/borrowed.pth
	.venv-transformers-$*/bin/python -m pip install --quiet --disable-pip-version-check transformers==$*
	@touch $@

$(BASELINES)/.done: $(VENV)/.test
	$(PYTHON) -m venv $(BASELINES)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > $$($(BASELINES)/bin/python -c "import site; print(site.getsitepackages()[0])")/borrowed.pth
	$(BASELINES)/bin/python -m pip install --quiet --disable-pip-version-check kvpress==0.5.5 "transformers<5.3"
	@touch $@

# The examples on the site read a model, so they need PyTorch and transformers: borrowed, as above.
$(DOCS)/.done: $(VENV)/.test
	$(PYTHON) -m venv $(DOCS)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
	  > $$($(DOCS)/bin/python -c "import site; print(site.getsitepackages()[0])")/borrowed.pth
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-transformers-* $(BASELINES) $(DOCS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
