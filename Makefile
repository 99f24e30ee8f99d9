# make quickstart   set up and run the main job
# make test         set up, lint, check types, run every test
# make lint         lint and types alone
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test lint venv

quickstart: venv
	$(PY) -m cfm_train recipe=quickstart

test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy cfm_train

venv: $(INSTALLED)

# torch comes first and alone: everything else then takes the build that is there.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	touch $@
