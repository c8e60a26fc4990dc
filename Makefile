# Every target makes its own virtual environment in .venv and installs what it needs.
#
#   make demo    a notebook kernel works, is evicted when idle, and wakes on a larger node
#   make test    style, types, import contract and all tests (some 15 minutes on two cores)
#   make lint    style, types and import contract only
#   make bench   the figures of docs/performance.md, measured here
#   make soak    what takes long: sessions live on while whoever serves them is killed; long fuzzing
#   make clean   remove what the others made

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
PIP := $(RUN)/python -m pip install --quiet --quiet --disable-pip-version-check
# `make soak SOAK_ROUNDS=1000 SOAK_SUITES=50` goes on for a day: all quick tests fifty times before.
SOAK_ROUNDS ?= 20
SOAK_SUITES ?= 0
# `make test PYTEST="-k dump -x"` hands options to pytest.
PYTEST ?=

.PHONY: demo test lint bench soak clean compiled
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo compiled
	@$(RUN)/python bench/demo.py

# Each check runs whatever the ones before it said, so one run tells everything; pytest is last.
test: $(VENV)/.test
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	$(RUN)/python -m pytest -m "not slow" --ignore=tests/soak $(PYTEST) || status=1; \
	exit $$status

lint: $(VENV)/.test
	@status=0; \
	$(RUN)/ruff check . || status=1; \
	$(RUN)/ruff format --check . || status=1; \
	$(RUN)/mypy -p lzy.checkpoint -p lzy.agent -p lzy.migrator -p lzy.cli || status=1; \
	MYPYPATH=bench $(RUN)/mypy --explicit-package-bases bench/*.py || status=1; \
	$(RUN)/lint-imports --no-logo || status=1; \
	exit $$status

bench: $(VENV)/.demo compiled
	@$(RUN)/python bench/run.py

# What takes long, after the engine's tests as often as is wanted; the first failure stops it. It
# may run beside anything else: what it waits for may take minutes.
soak: $(VENV)/.test
	@for round in $$(seq $(SOAK_SUITES)); do \
	    echo "round $$round of $(SOAK_SUITES)"; \
	    $(RUN)/python -m pytest -q -x -p no:cacheprovider -m "not slow" --ignore=tests/soak \
	        --ignore=tests/cli --ignore=tests/test_packaging.py $(PYTEST) tests || exit 1; \
	done
	@LZY_SOAK_ROUNDS=$(SOAK_ROUNDS) LZY_TEST_PATIENCE_S=300 $(RUN)/python -m pytest -x -p no:cacheprovider -m slow \
	    --timeout=3600 $(PYTEST) tests

# pip compiles what it installs; without this a tree under PYTHONDONTWRITEBYTECODE would be compiled
# anew at every start of lzy, 60 ms of it, and the figures would be those of the compiler.
compiled: $(VENV)/.demo
	@$(RUN)/python -m compileall -q __init__.py \
	    $(filter-out tests/ bench/ docs/ build/ dist/,$(wildcard */))

# lzy itself and what the demo shows, without torch and the checkers: a newcomer's first command
# should be quick.
$(VENV)/.demo: pyproject.toml
	@echo "making $(VENV) (a minute, once)"
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(call install,demo)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@echo "installing what the tests need (some minutes, once)"
	$(call install,test)
	@touch $@

# Where the root of a tree is the package itself, setuptools' editable install works by an import
# hook, which costs every start of lzy 20 ms and which mypy does not follow. So the hook is replaced
# by what works everywhere: a folder (hidden, lest the tree seem to contain itself) in which a link
# gives the tree its name, and a line that puts this folder on the path.
define install
	@$(PIP) --editable '.[$(1)]'
	@mkdir -p $(VENV)/tree && ln -sfn ../.. $(VENV)/tree/lzy
	@site=$$($(RUN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	    rm -f "$$site"/__editable__*lzy* && echo "$(CURDIR)/$(VENV)/tree" > "$$site/lzy.pth"
endef

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	    .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
