# `make demo`: the main job on this machine. `make test`: lint, types, every test. Both set up what they need.
# There is deliberately no `make clean`: build/ is a source folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# a worker for each core, each with one thread; a file's tests stay together, for what they share is made once a worker
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

.PHONY: setup demo test quick lint types bench gpu oracle-vllm

setup: $(VENV)/.setup-test

$(VENV)/.setup-run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable ".[build,client,serve]"
	touch $@

$(VENV)/.setup-test: $(VENV)/.setup-run
	$(PIP) --constraint constraints.txt --editable ".[build,client,serve,test]"
	touch $@

demo: $(VENV)/.setup-run
	$(BIN)/nvlm demo

lint: $(VENV)/.setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.setup-test
	$(BIN)/mypy

test: lint types
	$(PYTEST)

quick: lint
	$(PYTEST) -m "not slow"

bench: $(VENV)/.setup-test
	set -e; for bench in tests/bench/bench_*.py; do $(BIN)/python $$bench; done

# what only a GPU can show; without one it fails
gpu: $(VENV)/.setup-test
	$(BIN)/pytest tests/gpu
	$(BIN)/python tests/bench/bench_encoder.py --device cuda
	$(BIN)/python tests/bench/bench_decoder.py --device cuda

# vLLM's own NVLM-D on the CPU, in an environment of its own, as an end-to-end oracle
oracle-vllm: $(VENV)/.setup-test
	bash tests/oracles/vllm/setup.sh .venv-vllm
	$(BIN)/pytest tests/oracles
