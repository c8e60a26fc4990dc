# Every target makes its own virtual environment in .venv and installs what it needs.
#
#   make demo    a living notebook kernel is dumped, ended, and brought back
#   make test    style, types, import contract and all tests (under 15 minutes on two cores)
#   make lint    style, types and import contract only
#   make bench   the figures of docs/performance.md, measured here
#   make soak    what takes long: engine tests many times over, long fuzzing
#   make clean   remove what the others made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
SOAK_ROUNDS ?= 50
# `make test PYTEST="-k dump -x"` hands options to pytest.
PYTEST ?=

.PHONY: demo test lint bench soak clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	@$(RUN)/python bench/demo.py

# Each check runs whatever the ones before it said, so one run tells everything; pytest is last.
test: $(VENV)/.test
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(RUN)/python -m pytest -m "not slow" $(PYTEST) || status=1; \
	exit $$status

lint: $(VENV)/.test
	@status=0; \
	$(RUN)/ruff check . || status=1; \
	$(RUN)/ruff format --check . || status=1; \
	(cd $(VENV)/tree && ../bin/mypy -p lzy --config-file ../../pyproject.toml) || status=1; \
	$(RUN)/lint-imports || status=1; \
	exit $$status

bench: $(VENV)/.demo
	@$(RUN)/python bench/run.py

# Every test of the engine again and again, then the long ones; the first failure stops it.
soak: $(VENV)/.test
	@for round in $$(seq $(SOAK_ROUNDS)); do \
	    echo "round $$round of $(SOAK_ROUNDS)"; \
	    $(RUN)/python -m pytest -q -x -p no:cacheprovider $(PYTEST) tests || exit 1; \
	done

# lzy itself without torch and the checkers, so that a newcomer's first command is quick.
$(VENV)/.demo: pyproject.toml
	@echo "making $(VENV) (a minute, once)"
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

# mypy and import-linter want to find the tree under the name `lzy` whatever its folder is called;
# a link in a hidden folder gives it that name without the tree seeming to contain itself.
$(VENV)/.test: $(VENV)/.demo
	@echo "installing what the tests need (some minutes, once)"
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@mkdir -p $(VENV)/tree && ln -sfn ../.. $(VENV)/tree/lzy
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
