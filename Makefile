# Each target does its own set-up: a virtual environment in .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-faults coverage results lint format schema docs clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard pipelines/transport/native/*.cpp pipelines/transport/native/*.h)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with: make PYTHON=python3.11 …"; exit 1; }
	@echo "installing into $(VENV): some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## the whole way on cats and dogs: fetch, shard, train, register, serve, call
	@$(BIN)/monge demo

test: $(INSTALLED) ## every test
	@$(BIN)/python -m pytest

test-fast: $(INSTALLED) ## the tests that take less than a few seconds each
	@$(BIN)/python -m pytest -m 'not slow'

test-faults: $(INSTALLED) ## kill, stop and cut off the processes of a platform, for three quarters of an hour
	@$(BIN)/python -m pytest -m faults

coverage: $(INSTALLED) ## branch coverage of pipelines by the tests that need no service
	@$(BIN)/python -m pytest tests/unit tests/golden tests/property --cov --cov-report=term --cov-fail-under=90

results: $(INSTALLED) ## the figures of README.md's table, in hours; ARGS="--only perceptron" for one row
	@$(BIN)/python -m benchmarks.measured $(ARGS)

lint: $(INSTALLED) ## format, lint, types and import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(INSTALLED) ## rewrite the code in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

schema: $(INSTALLED) ## rewrite configs/job.schema.json
	@$(BIN)/monge schema > configs/job.schema.json

docs: $(INSTALLED) ## build the documentation site into site/, strictly
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and all that Monge wrote here
	@-test -x $(BIN)/monge && $(BIN)/monge down
	rm -rf $(VENV) .monge build site *.egg-info
