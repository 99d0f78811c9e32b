# make demo: environment, install, the main job. make test: environment, test extra, tests. make faults: killed
# processes, full disks and the like, minutes.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test slow faults lint

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/demo.stamp
	$(BIN)/dynamo-jax demo --overwrite

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(PYTEST)

slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(PYTEST)

faults: $(VENV)/test.stamp
	$(BIN)/python -m pytest tests/faults $(PYTEST)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
