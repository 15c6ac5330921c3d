# Two commands from a fresh clone: `make demo` and `make test`. The rest is for those who work here.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RECIPE ?= recipes/quickstart.yaml
WHEELS ?= build/wheels
WHEELS_PYTHON ?= 3.12

.PHONY: demo test test-full lint format bench wheels evidence docs pages clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, then run $(RECIPE): KD, expert, DAE, evaluation, report"
	@echo "make test       set up, then lint, types, import contracts and tests"
	@echo "make test-full  everything, with what is slow or needs an extra"
	@echo "make lint       format check, lint, types, import contracts"
	@echo "make docs       the documentation as a site, site/index.html"
	@echo "make bench      every benchmark, quickly"
	@echo "make wheels     what benchmarks/gpu.sh needs where no package index can be reached"
	@echo "make evidence   every method beside every baseline, at most two hours"

# torch first and alone: the pinned build, not the newest one another package would pull in.
$(VENV)/.demo: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.demo
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.full: $(VENV)/.dev
	$(PIP) -e '.[dev,full]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/dominie run $(RECIPE)

test: lint
	$(BIN)/python -m pytest -n 2 --durations=20 -m "not full"

test-full: $(VENV)/.full lint
	$(BIN)/python -m pytest -n 2 --durations=20

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	@for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --quick || exit 1; done

# Python 3.12 on x86-64 Linux; pip matches each platform exactly.
wheels:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version $(WHEELS_PYTHON) --implementation cp \
		$(foreach glibc,1 2014 _2_17 _2_27 _2_28,--platform manylinux$(glibc)_x86_64) \
		-d $(WHEELS) -r benchmarks/wheels.txt

evidence: $(VENV)/.demo
	$(BIN)/python benchmarks/evidence.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What a program knows better than a person; tests compare.
pages: $(VENV)/.dev
	@for page in file_map recipe_reference cli_reference error_reference; do \
		$(BIN)/python docs/$$page.py --write || exit 1; done

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
