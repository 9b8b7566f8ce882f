# `make demo`: the main job on this machine. `make test`: lint, types, every test. Both set up what they need.
# `make quick-3.12`, `make core-3.13`: other Pythons, each in an environment of its own.
# There is deliberately no `make clean`: build/ is a source folder.

# the preferred one first; PYTHON=3.12 or PYTHON=/path/to/python chooses another of these
SERVER_PYTHONS := 3.11 3.12
CORE_PYTHONS := 3.11 3.12 3.13
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
# a worker for each core, each with one thread; a file's tests stay together, for what they share is made once a worker
PYTEST_OPTIONS := --numprocesses auto --dist loadfile
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_OPTIONS)

.PHONY: setup demo test quick lint types bench gpu oracle-vllm always
.SECONDARY:

setup: $(VENV)/.setup-test

# looked at by every run, changed only when the environment is made anew
$(VENV)/.python: always
	@tools/make_venv.sh "$(VENV)" server "$(SERVER_PYTHONS)" "$(PYTHON)"

$(VENV)/.setup-run: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python $(PIP) --constraint constraints.txt torch
	$(BIN)/python $(PIP) --constraint constraints.txt --editable ".[build,client,serve]"
	touch $@

$(VENV)/.setup-test: $(VENV)/.setup-run
	$(BIN)/python $(PIP) --constraint constraints.txt --editable ".[build,client,serve,test]"
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

# the quick tests on another Python that the server runs on
$(SERVER_PYTHONS:%=quick-%): quick-%:
	$(MAKE) quick VENV=.venv-$* PYTHON=$*

# the core, the client and the planner without the server, with numpy 2
.venv-core-%/.python: always
	@tools/make_venv.sh .venv-core-$* core "$(CORE_PYTHONS)" "$*"

.venv-core-%/.setup: .venv-core-%/.python pyproject.toml constraints.txt constraints-core.txt
	.venv-core-$*/bin/python $(PIP) --constraint constraints-core.txt --editable ".[client,sign,test-core]"
	touch $@

$(CORE_PYTHONS:%=core-%): core-%: .venv-core-%/.setup
	OMP_NUM_THREADS=1 .venv-core-$*/bin/pytest $(PYTEST_OPTIONS) --core

bench: $(VENV)/.setup-test
	set -e; for bench in tests/bench/bench_*.py; do $(BIN)/python $$bench; done

# what only a GPU can show; without one it fails
gpu: $(VENV)/.setup-test
	$(BIN)/pytest tests/gpu
	$(BIN)/python tests/bench/bench_encoder.py --device cuda
	$(BIN)/python tests/bench/bench_decoder.py --device cuda

# vLLM's own NVLM-D on the CPU, in an environment of its own, as an end-to-end oracle
oracle-vllm: $(VENV)/.setup-test
	PYTHON=$(BIN)/python bash tests/oracles/vllm/setup.sh .venv-vllm
	$(BIN)/pytest tests/oracles
