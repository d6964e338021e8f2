# `make` or `make help` lists what there is.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-cluster check format bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.14.*" "torchvision==0.29.*" numpy
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

setup: $(STAMP)  ## make .venv and install everything into it

weights/mini/vision weights/mini/language: | $(STAMP)
	@$(BIN)/osm weights fetch mini --out weights

demo: $(STAMP) | weights/mini/vision weights/mini/language  ## name a real photograph's masks, then train and validate (15 minutes on two CPU cores)
	@$(BIN)/python examples/demo.py

test: $(STAMP)  ## the suite (a quarter of an hour)
	@$(BIN)/python -m pytest -m "not slow and not gpu and not cluster" $(PYTEST_ARGS)

test-slow: $(STAMP) | weights/mini/vision weights/mini/language  ## what takes longer
	@$(BIN)/python -m pytest -m "slow" $(PYTEST_ARGS)

test-cluster: $(STAMP)  ## every strategy on two processes, jobs on a real Slurm, which it installs (Debian, as root)
	@command -v slurmctld slurmd munged > /dev/null || { apt-get update && apt-get install --yes slurm-wlm munge; }
	@$(BIN)/python -m pytest -m "cluster" $(PYTEST_ARGS)

check: $(STAMP)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## mend what lint and format can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## masks/s of the data stream, of training and of naming, and where the time goes
	@$(BIN)/python benchmarks/bench_data.py
	@$(BIN)/python benchmarks/bench_model.py

clean:  ## remove .venv, caches and runs; weights and shards stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache runs build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
