# Every target runs the set-up first; once it is done, that takes a fraction of a second.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# The files whose tests take longest come first, so that both processes end at about the same time.
SERVERS := tests/faults tests/hosts tests/fuzz tests/triton
SLOWEST := --durations=15

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-full fuzz lint format bench bench-transfer bench-scheduling
.PHONY: bench-control control-model gpu-wheels gpu-setup test-gpu bench-gpu clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install environment, Triton, perf_analyzer and model, if they are missing
	@$(PYTHON) tools/bootstrap.py

demo: setup ## Start the servers, stream one answer with its timeline, stop
	@$(BIN)/pdctl demo $(ARGS)

serve: setup ## Start the servers and stay until Ctrl-C
	@$(BIN)/pdctl serve $(ARGS)

test: setup ## Run every test that is not marked full; ARGS=... are passed to pytest
ifeq ($(strip $(ARGS)),)
	@$(BIN)/pytest -m "not full" --numprocesses 2 --dist worksteal tests/unit tests/simulation tests/control_model
	@$(BIN)/pytest -m "not full and not alone" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(SLOWEST) $(SERVERS)
	@$(BIN)/pytest -m "not full and alone" $(SLOWEST) $(SERVERS)
else
	@$(BIN)/pytest -m "not full" $(ARGS)
endif

test-full: setup ## Run every test
	@$(BIN)/pytest $(ARGS)

fuzz: setup ## Send random requests and messages to a server; ARGS="--fuzz-count 20000 --fuzz-seconds 900"
	@$(BIN)/pytest tests/fuzz --fuzz-seconds 900 $(ARGS)

control-model: setup ## Live through 200 seeds of the control plane's trials in a queue model
	@$(BIN)/python -m tests.control_model --seeds 0:200 --jobs 2 $(ARGS)
	@$(BIN)/python -m tests.control_model --regret --seeds 0:20 --jobs 2

lint: setup ## Run ruff, mypy, the contracts on imports, hadolint on the Dockerfile, docs/benchmarks.md
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m perf.benchmarks_page --check

format: setup ## Format and fix the code with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## Measure every budget; results are in perf/results
	@$(BIN)/python -m perf.bench $(ARGS)

bench-transfer: setup ## Measure KV transfers by every strategy, against memcpy and NIXL
	@$(BIN)/python -m perf.transfer $(ARGS)
	@$(BIN)/python -m perf.exposure
	@$(BIN)/python -m perf.arrivals

bench-scheduling: setup ## Compare scheduling policies, on servers with emulated engines
	@$(BIN)/python -m perf.scheduling $(ARGS)

bench-control: setup ## Compare the ratio controller with fixed ratios, on servers with emulated engines
	@$(BIN)/python -m perf.control $(ARGS)

gpu-wheels: setup ## Gather what the GPU suite needs where there is torch, and no package index
	@$(BIN)/python tools/gpu_wheels.py $(ARGS)

gpu-setup: # As setup; with the archives of gpu-wheels on a machine without an index
	@$(PYTHON) tools/gpu_setup.py

test-gpu: gpu-setup ## Check the parts that need a GPU, or smaller ones on a CPU; ARGS="--part exact"
	@$(BIN)/python -m perf.gpu test $(ARGS)

bench-gpu: gpu-setup ## Measure on a GPU (transfers, engine, serving), or in small sizes on a CPU
	@$(BIN)/python -m perf.gpu bench $(ARGS)

clean: ## Stop the servers, then remove all generated files
	@if [ -x $(BIN)/pdctl ]; then $(BIN)/pdctl down; fi
	rm -rf .venv .cache .run .mypy_cache .ruff_cache .pytest_cache .hypothesis
