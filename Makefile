# Two commands do everything on a fresh machine: `make quickstart` and `make test`. Both make the environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed

.PHONY: install quickstart test test-gpu test-oldest faults lint types bench bench-gpu measure-gpu bench-check study mutation clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "diffdistill needs Python 3.11 or newer; $$($(PYTHON) --version) was found. Run make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $(STAMP)

quickstart: install  ## from teacher to report and verified export, about four minutes on two cores
	$(BIN)/diffdistill quickstart

test-gpu: install  ## what only a GPU shows
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m gpu

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile --no-loadscope-reorder

faults: install  ## kill -9, 50 times each, of training, caching, evaluating and exporting (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults/test_kills.py --kills 50 -s -rA

# The newest torch, and of these four libraries the oldest version that pyproject.toml allows. Not [dev], whose torchao needs a later diffusers.
$(OLDEST_STAMP): pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -e . pytest \
		$$(sed -nE 's/^ *"(diffusers|peft|transformers|accelerate)>=(.*)",$$/\1~=\2.0/p' pyproject.toml)
	@touch $(OLDEST_STAMP)

test-oldest: install $(OLDEST_STAMP)  ## tests with the oldest libraries, and exports of old and new read by each other
	OMP_NUM_THREADS=1 $(BIN)/python eval/oldest_versions.py $(OLDEST)/bin/python

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

bench: install  ## steps, sampling, starts and overhead over what they must cost, into docs/performance.md (50 minutes on one thread; goes on where it was)
	OMP_NUM_THREADS=1 $(BIN)/diffdistill bench cpu --resume --output eval/bench
	mv eval/bench/performance.md docs/performance.md

bench-gpu: install  ## the same on Stable Diffusion 1.5's network with random weights, in about five minutes on an H100
	$(BIN)/diffdistill bench gpu --resume --output eval/bench
	mv eval/bench/performance.md docs/performance.md

measure-gpu: bench-gpu  ## and every other number that only a GPU gives: attention and its tangents, compute settings, memory of the recipes
	$(BIN)/python eval/bench_forward_attention.py --gpu
	$(BIN)/python eval/attention.py --gpu
	$(BIN)/python eval/compute.py --gpu
	$(BIN)/python eval/memory.py --gpu

bench-check: install  ## whether they got worse than eval/bench/cpu.json, or gpu.json, says
	OMP_NUM_THREADS=1 $(BIN)/diffdistill bench --check

study: install  ## quality of every method on digits and shapes (hours on two cores; goes on where it was), into docs/results.md and docs/shapes.md
	$(BIN)/python eval/study.py
	$(BIN)/python eval/shapes_study.py

mutation: install  ## systematic mutants of mathematics, losses and engine, into docs/mutation.md
	$(BIN)/python eval/mutation.py

clean:
	rm -rf $(VENV) $(OLDEST) runs build dist *.egg-info
