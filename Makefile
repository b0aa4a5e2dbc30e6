# Everything that is done with this checkout. Needs Python 3.11 or newer and make; the rest is set up in .venv.
# Variables: PYTHON=python3.12 makes .venv with that one; ARGS="..." goes to pytest, the checks, the demo or the benchmarks.

SHELL = /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup generate check test faults bench run lock clean

# Only where it was given: an environment that is whole stays as it is whatever Python made it.
ifneq ($(PYTHON),)
export PYTHON
endif

# A second Postgres that the storage tests run against where it is installed: the oldest supported one.
OLDEST_POSTGRES_BIN ?= /usr/lib/postgresql/15/bin

help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: ## Make .venv from the hash-locked files (with uv if there is one, else pip).
	@sh tools/setup.sh dev

generate: ## Write the stubs in client/ anew from protos/.
	@sh tools/setup.sh dev generate
	@.venv/bin/python protos/generate.py

check: ## Format, lint, types, rooms, protos, stubs, locks. ARGS="types lint" runs only those.
	@sh tools/setup.sh dev generate
	@.venv/bin/python tools/check.py $(ARGS)

test: setup ## Run every test against real Postgres. ARGS="tests/unit -k lane" runs fewer.
	@sh tools/test.sh "$(OLDEST_POSTGRES_BIN)" $(ARGS)

faults: setup ## Every fault in its long form, 200 kills in each kill loop: one to two hours. ARGS="NAME --seed 3" runs one.
ifeq ($(ARGS),)
	@.venv/bin/python -m tests.simulation --planted --seeds 50
	@.venv/bin/python -m tests.simulation --seeds 0-2000
	@.venv/bin/python -m tests.simulation --seeds 0-1000 --stormy
endif
	@.venv/bin/python -m tests.faults --long --kills 200 $(ARGS)

bench: setup ## Measure on this machine: batched, single, latency at a fixed rate.
	@.venv/bin/python -m benchmarks suite $(ARGS)

run: setup ## Run the service on its embedded Postgres with a demo, until Ctrl-C.
	@.venv/bin/outrider-server demo $(ARGS)

lock: setup ## Make the requirements files anew. ARGS=--upgrade takes the newest versions.
	@.venv/bin/python tools/lock.py $(ARGS)

clean: ## Remove what was made here: environments, caches, build. No data of the service.
	rm -rf .venv .venv-generate build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find client server tests tools benchmarks protos -name __pycache__ -prune -exec rm -rf {} +
