# Everything a person does with a checkout: `make help` lists it. Needs make and, where packages are missing, root or sudo.
#
# What is missing is installed first: mosquitto and Python's venv module from Debian (deploy/setup/debian-packages),
# CometBFT built into .tools (deploy/setup/cometbft), the rest into .venv. A stamp file remembers what .venv holds;
# changing setup.cfg or pyproject.toml installs again.

PYTHON ?= python3
LEDGER ?= embedded
VENV   := .venv
BIN    := $(VENV)/bin
PACKAGE_FILES := setup.cfg pyproject.toml
# In the order of the folders: units come last, so that no worker is left alone with a long file of few tests.
PYTEST_OPTIONS ?= -n 2 --dist loadfile --no-loadscope-reorder
FUZZ_SECONDS ?= 600

.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long fuzz mutate lint bench clean system cometbft

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: $(VENV)/.stamp-dev system ## install everything that the demo, the tests and the benchmarks need
	@deploy/setup/cometbft $(BIN)/python || echo "going on without CometBFT: the tests of a ledger network will be skipped"

cometbft: $(BIN)/python ## build CometBFT, which a ledger network runs on
	@deploy/setup/cometbft $(BIN)/python

demo: $(VENV)/.stamp-runtime system $(if $(filter cometbft,$(LEDGER)),cometbft) ## the main job on real readings (LEDGER=cometbft, SERVE=1 stays up)
	$(BIN)/python deploy/demo/run.py --ledger $(LEDGER) $(if $(filter-out 0,$(SERVE)),--serve)

test: setup lint ## lint, types, import walls and all tests but the long ones
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -m "not long"

test-long: setup lint ## all tests at their full counts
	DENGEN_FULL=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS)

fuzz: setup ## fuzz everything that reads bytes off a wire, FUZZ_SECONDS each (TARGETS=… for some of them)
	PYTHONPATH=tests $(BIN)/python -m fuzz --runs 1000000000 --seconds $(FUZZ_SECONDS) $(TARGETS)

mutate: setup ## delete each guard of the ledger rules in turn; prints what no test notices (OPTIONS=… for fewer)
	PYTHONPATH=.:tests $(BIN)/python -m mutate $(OPTIONS)

lint: $(VENV)/.stamp-dev ## ruff, mypy --strict, the walls between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## measure; a table, and bench-out/bench.json
	PYTHONPATH=tests $(BIN)/python -m bench.run

clean: ## remove .venv and everything that demo, tests and benchmarks wrote
	rm -rf $(VENV) .tools .venv-oracle .venv-oracle.lock .venv-scitt .venv-scitt.lock demo-out demo-out-embedded bench-out fuzz-out build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

system:
	@PYTHON="$(PYTHON)" deploy/setup/debian-packages

# One rule a stamp: the environment itself, what the programs need, and what the tests and checks need on top.
$(BIN)/python: | system
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-runtime: $(PACKAGE_FILES) | $(BIN)/python
	@echo "installing dengen into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[broker]'
	@touch $@

$(VENV)/.stamp-dev: $(PACKAGE_FILES) | $(BIN)/python
	@echo "installing dengen with its test tools into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[broker,testing,dev]'
	@touch $@ $(VENV)/.stamp-runtime
