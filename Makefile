# `make demo` is the whole of it: platform, training, serving, samples. `make` alone lists the commands.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo up status down check test test-long

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1	/p' Makefile | expand -t 20

demo: $(STAMP) ## start the platform, train a model, serve it and sample it
	@$(BIN)/python -m infra.demo

up: $(STAMP) ## start the local platform: Ray, MLflow, Serve
	@$(BIN)/python -m infra up

status: $(STAMP) ## say what of it runs where
	@$(BIN)/python -m infra status

down: $(STAMP) ## end the local platform; data stay
	@$(BIN)/python -m infra down

check: $(STAMP) ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Three files at a time, also on two cores, because tests mostly wait for processes; then the slow ones, which start
# clusters, two at a time. In the order of the folders: the usual one leaves what is long to the end.
PYTEST := $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder --durations=10
test: $(STAMP) ## all tests but the long ones
	$(PYTEST) -n 3 -m "not slow and not long"
	$(PYTEST) -n 2 -m "slow and not long"

test-long: $(STAMP) ## comparisons, AWS's launcher, Postgres and backups, the autoscaler: minutes each
	$(PYTEST) -m long

# PyTorch first and by pip: with `pip.conf` or PIP_INDEX_URL you choose the build for your machine (CPU or CUDA), and
# the second step keeps it. The rest is ten times faster with uv, which does not read `pip.conf`: behind a package
# mirror that only pip knows, pip does it. Compiled here once, because a platform is twenty processes that import it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: gdl_ray needs Python 3.11 or later; name one: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/pip || { echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "installing torch (the first time, a large download)"
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt torch uv
	@echo "installing the rest"
	@$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[platform,dev]' \
	  || $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[platform,dev]'
	@touch $@
