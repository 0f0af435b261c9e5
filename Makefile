# Everything runs in .venv, which the first target that needs it creates. Python 3.11 or newer and make are all
# that must be there already. Which package index is used is pip's own configuration (PIP_INDEX_URL and so on).

PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(python) -c 'import sys; sys.version_info >= (3, 11) and print("$(python)")' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --quiet --no-input --disable-pip-version-check

# Nodes run in parallel, operations do not: more threads inside an operation would change the last bits of
# results and make runs slower.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

# Python keeps what it has compiled: else each process of the tests rewrites the assertions of all test files anew,
# half of the time that it takes to find the tests.
unexport PYTHONDONTWRITEBYTECODE

# Tests run in so many processes: one more than two cores have, since tests of peers wait for each other most of
# their time. Slow tests of short timeouts run by themselves: on busy cores they would be late.
TEST_JOBS ?= 3
SIDE_BY_SIDE := -n $(TEST_JOBS) --dist worksteal

# What is installed besides the package's own dependencies; with ray, `make test-slow` runs the tests on Ray.
EXTRAS ?= dev,docs,hf,paper

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

# Constraints first for torch: which build of it is installed depends on the index, and no later step may
# choose another.
$(INSTALLED): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
		"no Python 3.11 or newer found; set PYTHON, as in: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "[1/3] creating $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
		|| { echo "cannot create $(VENV); on Debian and Ubuntu this needs the package python3-venv" >&2; exit 1; }
	@echo "[2/3] installing torch (the largest part)"
	@$(PIP) install -c constraints.txt torch
	@echo "[3/3] installing the package and what its tests need"
	@$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

.PHONY: install
install: $(INSTALLED)  ## create .venv and install the package into it

.PHONY: demo
demo: $(INSTALLED)  ## compare five algorithms on 16 nodes; ends with a table and a figure
	@$(BIN)/jwins compare digits-compare

.PHONY: test
test: $(INSTALLED)  ## run the tests, but for those marked slow
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

.PHONY: test-slow
test-slow: $(INSTALLED)  ## run the tests marked slow
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "slow and not alone" tests
	@$(BIN)/python -m pytest -m "alone" $$(grep -lr --include='*.py' 'mark\.alone' tests)

.PHONY: simulate
simulate: $(INSTALLED)  ## play a million schedules of faults against the session of a peer, or an hour of them
	@$(BIN)/python -m benchmarks.simulate

.PHONY: format
format: $(INSTALLED)  ## rewrite the code in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix-only .

.PHONY: lint
lint: $(INSTALLED)  ## check format, style and which room imports which
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-logo --no-cache

.PHONY: types
types: $(INSTALLED)  ## check types
	@$(BIN)/mypy

.PHONY: check
check: lint types docs test test-slow  ## what CI runs: format, lint, types, documentation, tests

.PHONY: docs
docs: $(INSTALLED)  ## build the documentation site into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

.PHONY: bench
bench: $(INSTALLED)  ## measure speed and size on this machine
	@$(BIN)/python -m benchmarks

.PHONY: fuzz
fuzz: $(INSTALLED)  ## throw damaged bytes at the decoders for ten minutes
	@$(BIN)/python benchmarks/fuzz_codec.py

.PHONY: check-resume
check-resume: $(INSTALLED)  ## kill -9 runs at random instants, resume them, compare the results (some minutes)
	@$(BIN)/python -m benchmarks.check_resume

.PHONY: check-same
check-same: $(INSTALLED)  ## compare results with those of COMMIT=HEAD, bit for bit; DATA=folder for all of them
	@$(BIN)/python -m benchmarks.check_same --commit $(or $(COMMIT),HEAD) $(if $(DATA),--data $(DATA))

.PHONY: check-tests
check-tests: $(INSTALLED)  ## put deliberate bugs into copies of the package; each must fail a test (some minutes)
	@$(BIN)/python -m benchmarks.check_tests

.PHONY: clean
clean:  ## remove .venv, caches and build outputs; runs/ stays
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find src tests benchmarks experiments -name __pycache__ -prune -exec rm -rf {} +
