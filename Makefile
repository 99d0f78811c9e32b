# make demo: environment, install, the main job. make bench: a recipe and its thresholds (RECIPE=tiny_moe).
# make test: environment, test extra, tests. make faults: killed processes, full disks and the like, minutes.
# make serve-test: the servers of engines, in an environment of their own (Python 3.12, PYTHON312=..), minutes.
# make docs: the site, into site/; python3 -m http.server -d site shows it, with search.
# make fuzz: twenty times as many damaged files as in make test, from another seed: make fuzz FUZZ_SEED=7
PYTHON ?= python3
VENV ?= .venv
PYTHON312 ?= python3.12
SERVE ?= .venv-serve
BIN = $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo bench test slow faults fuzz serve-test lint docs

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

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CONTRIBUTING.md docs

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
