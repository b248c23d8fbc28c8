# Every target works on a fresh machine with Python 3.11 or later, pip and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The demo, the tests and the checks only use the embedded server, never a production database.
EMBEDDED := env -u DATABASE_URL CRM_DOTENV=off CRM_EMBEDDED_DATA=.postgres
MANAGE := $(EMBEDDED) $(BIN)/python manage.py
# Many tests wait for a lock, a kill or a server, so several processes are faster even with few cores.
PYTEST := $(EMBEDDED) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
NEXT := $(if $(or $(DATABASE_URL),$(wildcard .env)),$(EMBEDDED),CRM_EMBEDDED_DATA=.postgres) $(BIN)/python manage.py

PEOPLE ?= 10000
GENERATION ?= 2025_10
SEED ?= 1
MINUTES ?= 600

# The PostgreSQL that Debian installs, in addition to the newer embedded one.
INSTALLED_SERVER ?= $(lastword $(wildcard /usr/lib/postgresql/*/bin))
MAIN_PATHS := tests/property/test_backfill.py tests/property/test_orders.py tests/integration/hostile \
	tests/integration/test_runbook.py

.PHONY: help install demo test test-unit test-installed check soak bench lock clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

install: $(VENV)/.installed ## Create .venv with everything for development and the demo

$(VENV)/.installed: requirements-dev.txt requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make install PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

demo: install ## Load sample data into a new embedded database and run the backfill (PEOPLE=10000)
	@$(EMBEDDED) $(BIN)/python -m config.embedded drop
	$(MANAGE) load_sample_data --people $(PEOPLE) --generation $(GENERATION) --seed $(SEED)
	$(MANAGE) migrate --verbosity 0
	$(MANAGE) backfill_crm_contacts || test $$? -eq 1
	@printf '%s\n' '' 'The rows in error are part of the sample data. Next commands:' '' \
		'  # run again: only the rows in error are retried' \
		'  $(NEXT) backfill_crm_contacts' \
		'  # create an account for the admin, then open http://127.0.0.1:8000/admin/' \
		'  $(NEXT) createsuperuser' \
		'  DEBUG=on $(NEXT) runserver'

test: install ## Run the tests (ARGS="-k mapping" selects some)
	$(PYTEST) $(ARGS)

test-unit: install ## Run the tests of the pure modules, without a server
	$(EMBEDDED) $(BIN)/python -m pytest -q tests/unit $(ARGS)

test-installed: install ## Run the tests of the main paths on an installed PostgreSQL, such as Debian's
	@if [ -n "$(INSTALLED_SERVER)" ]; then \
		echo "On $$($(INSTALLED_SERVER)/postgres --version):"; \
		CRM_TEST_SERVER=$(INSTALLED_SERVER) $(PYTEST) $(MAIN_PATHS) $(ARGS); \
	else \
		echo 'No PostgreSQL is installed in /usr/lib/postgresql: skipping these tests.' >&2; \
	fi

check: install ## Lint, types, migrations and tests: all must pass
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(EMBEDDED) $(BIN)/mypy --no-incremental .
	$(MANAGE) makemigrations --check --dry-run
	$(PYTEST)
	$(MAKE) test-installed

soak: install ## Run the property tests with thousands of examples, and the longest tests (MINUTES=600)
	$(EMBEDDED) HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -p tests.support.soak --minutes $(MINUTES) \
		-m "hypothesis or soak or sampled" --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: install ## Measure the backfill on the embedded server
	env -u DATABASE_URL CRM_DOTENV=off $(BIN)/python -m bench $(ARGS)

PIP_COMPILE := CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/pip-compile --quiet --generate-hashes --strip-extras \
	--allow-unsafe --no-emit-index-url --no-emit-find-links

lock: install ## Compile requirements*.in into pinned and hashed requirements*.txt (ARGS=--upgrade)
	$(PIP_COMPILE) $(ARGS) --output-file requirements.txt requirements.in
	$(PIP_COMPILE) $(ARGS) --output-file requirements-dev.txt requirements-dev.in

clean: ## Remove .venv, the embedded databases and every cache
	@for data in .postgres*; do \
		if [ -x $(BIN)/python ] && [ -f "$$data/postmaster.pid" ]; then \
			$(EMBEDDED) CRM_EMBEDDED_DATA="$$data" $(BIN)/python -m config.embedded stop || true; \
		fi; \
	done
	rm -rf $(VENV) .postgres* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
