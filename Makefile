# Two commands: `make serve` to read and write, `make test` to check everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help serve build diagrams test bench lint mutate clean browser
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## serve   the site on http://127.0.0.1:8000, rebuilt at each change
serve: $(VENV)/installed
	$(BIN)/mkdocs serve

## build   the site into site/, strict
build: $(VENV)/installed
	$(BIN)/mkdocs build --strict

## diagrams  render the diagrams that were added or edited, delete the unused ones
diagrams: browser
	$(BIN)/python -m theme.diagrams

## test    install what the tests need, then run all of them
test: lint browser
	$(BIN)/python -m pytest

## lint    style of the Python files
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## bench   the engine and the modules against their peers, as ratios of interleaved runs
bench: $(VENV)/installed
	$(BIN)/python -m bench

## mutate  break the blocks in every small way; lists what no test notices
mutate: $(VENV)/installed
	$(BIN)/mutmut run
	$(BIN)/mutmut results

## clean   everything that was generated, not the environment
clean:
	rm -rf build mutants site .site.* .pytest_cache .ruff_cache

browser: $(VENV)/installed
	$(BIN)/python -m tests.browser

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile -r requirements.txt  # compiled when imported
	@touch $@
