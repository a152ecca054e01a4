# Two commands: `make demo` sets everything up and runs the whole pipeline on a simulated marketplace; `make test` sets up and tests.

PROFILE ?= demo
SHELL := /bin/bash
UV := $(shell command -v uv 2>/dev/null || echo .cache/uv/bin/uv)
EXTRA := $(shell if [ -e /dev/nvidia0 ]; then echo gpu; else echo cpu; fi)
RUN := $(UV) run --no-sync

.PHONY: help setup demo run test lint bench clean

help:  ## Say what there is
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

setup: .cache/ready  ## Install the locked environment and fetch the Delta jars, once

.cache/ready: pyproject.toml uv.lock
	@bash conf/require.sh
	@[ -x "$(UV)" ] || command -v uv >/dev/null || (python3 -m venv .cache/uv && .cache/uv/bin/pip install --quiet uv)
	$(UV) sync --frozen --quiet --compile-bytecode --extra $(EXTRA)
	$(RUN) python -m spark_jobs.jars
	@touch .cache/ready

demo: setup  ## The whole pipeline on a simulated marketplace
	$(RUN) gr2 run --profile demo

run: setup  ## A profile: make run PROFILE=beauty
	$(RUN) gr2 run --profile $(PROFILE)

test: setup  ## All tests, two files at a time, each on one thread
	OMP_NUM_THREADS=1 $(RUN) pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: demo  ## Benchmarks of speed, at sizes that end within an hour (of ranking: see docs/results.md)
	$(RUN) python -m benchmarks.training
	$(RUN) python -m benchmarks.beams
	$(RUN) python -m benchmarks.tokenizers --items 1000000
	$(RUN) python -m benchmarks.scoring --root var/demo --profile demo
	$(RUN) python -m benchmarks.compressor --root var/demo --profile demo
	$(RUN) python -m benchmarks.data_plane --work var/bench --millions 1

lint: setup  ## ruff, format and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

clean:  ## Remove what runs wrote under var/
	rm -rf var
