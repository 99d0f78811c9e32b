# make demo: environment, install, the main job. make bench: a recipe and its thresholds (RECIPE=tiny_moe).
# make test: environment, test extra, tests. make faults: killed processes, full disks and the like, minutes.
# make serve-test: the servers of engines, in an environment of their own (Python 3.12, PYTHON312=..), minutes.
# make vllm-test: vLLM's backend for TPUs on a CPU, with stand-ins, in an environment of its own (Python 3.11,
# PYTHON311=..), about 15 minutes. pip must find torch 2.13.0+cpu (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL).
# make docs: the site, into site/; python3 -m http.server -d site shows it, with search.
# make fuzz: twenty times as many damaged files as in make test, from another seed: make fuzz FUZZ_SEED=7
PYTHON ?= python3
VENV ?= .venv
PYTHON312 ?= python3.12
SERVE ?= .venv-serve
PYTHON311 ?= python3.11
VLLM ?= .venv-vllm
VLLM_FROM = --no-deps --only-binary :all: --python-version 3.12 --platform manylinux_2_24_x86_64
BIN = $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo bench test slow faults fuzz serve-test vllm-test lint docs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/docs.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(SERVE)/serve.stamp: pyproject.toml
	$(PYTHON312) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --editable '.[sglang]' 'jax[cpu]==0.10.2' pytest
	touch $@

# vllm-tpu has wheels for Python 3.12 alone; what is compiled in them is not used on TPUs
$(VLLM)/vllm.stamp: pyproject.toml tests/engines/vllm_on_cpu.txt tests/engines/vllm_on_cpu.py
	$(PYTHON311) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement tests/engines/vllm_on_cpu.txt
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_FROM) --upgrade --target $(VLLM)/lib/python3.11/site-packages vllm-tpu==0.26.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	$(VLLM)/bin/python tests/engines/vllm_on_cpu.py $(VLLM)/stand-ins
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/dynamo-jax demo --overwrite

bench: $(VENV)/demo.stamp
	$(BIN)/dynamo-jax bench $(or $(RECIPE),tiny_moe)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(PYTEST)

slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(PYTEST)

faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST) tests/faults

fuzz: $(VENV)/test.stamp
	FUZZ_SEED=$(or $(FUZZ_SEED),1) FUZZ_SCALE=$(or $(FUZZ_SCALE),20) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST) tests/fuzz

serve-test: $(SERVE)/serve.stamp
	$(SERVE)/bin/python -m pytest $(PYTEST) tests/engines

vllm-test: $(VLLM)/vllm.stamp
	PYTHONPATH=$(abspath $(VLLM))/stand-ins TPU_NAME=none TPU_ACCELERATOR_TYPE=v6e-1 TPU_WORKER_ID=0 \
	    $(VLLM)/bin/python -m pytest $(PYTEST) tests/engines/test_vllm.py tests/engines/test_steps.py

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CONTRIBUTING.md docs

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
