# Every target sets up what it needs first; once done, that takes a fraction of a second.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
SERVERS := tests/triton tests/faults tests/fuzz tests/hosts

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-full fuzz lint format bench bench-transfer bench-scheduling clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Environment, Triton, perf_analyzer and model, as far as they are missing
	@$(PYTHON) tools/bootstrap.py

demo: setup ## Start the servers, stream one answer with its timeline, stop
	@$(BIN)/pdctl demo $(ARGS)

serve: setup ## Start the servers and stay until Ctrl-C
	@$(BIN)/pdctl serve $(ARGS)

test: setup ## Every test that is not marked full; ARGS=...: those that pytest is told
ifeq ($(strip $(ARGS)),)
	@$(BIN)/pytest -m "not full" --numprocesses 2 --dist worksteal tests/unit tests/simulation
	@$(BIN)/pytest -m "not full and not alone" --numprocesses 2 --dist loadfile $(SERVERS)
	@$(BIN)/pytest -m "not full and alone" $(SERVERS)
else
	@$(BIN)/pytest -m "not full" $(ARGS)
endif

test-full: setup ## Every test
	@$(BIN)/pytest $(ARGS)

fuzz: setup ## Random requests and messages at a server; ARGS="--fuzz-count 20000 --fuzz-seconds 900"
	@$(BIN)/pytest tests/fuzz --fuzz-seconds 900 $(ARGS)

lint: setup ## ruff, mypy, the contracts on imports, hadolint on the Dockerfile, docs/benchmarks.md
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m perf.benchmarks_page --check

format: setup ## Let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup ## Every budget measured, results in perf/results
	@$(BIN)/python -m perf.bench $(ARGS)

bench-transfer: setup ## KV caches from process to process, every way, against memcpy and NIXL
	@$(BIN)/python -m perf.transfer $(ARGS)
	@$(BIN)/python -m perf.exposure
	@$(BIN)/python -m perf.arrivals

bench-scheduling: setup ## Scheduling policies side by side, on servers with emulated engines
	@$(BIN)/python -m perf.scheduling $(ARGS)

clean: ## Stop the servers, then remove all that was made here
	@if [ -x $(BIN)/pdctl ]; then $(BIN)/pdctl down; fi
	rm -rf .venv .cache .run .mypy_cache .ruff_cache .pytest_cache .hypothesis
