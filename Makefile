# Each target sets up its own virtual environment first. Override: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= --quiet --disable-pip-version-check

.PHONY: help demo test test-gpu check format docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

demo: $(VENV)/installed ## distil the lab student from the lab teacher (two CPU cores, minutes)
	$(BIN)/qwen3-distill run --config configs/demo.yaml

test: $(VENV)/installed-dev ## the test suite a laptop can run
	$(BIN)/pytest tests

test-gpu: $(VENV)/installed-dev ## the same suite with the tests that need a CUDA device
	$(BIN)/pytest tests -m "gpu or not gpu" --require-gpu

check: $(VENV)/installed-dev ## ruff, pyright, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-dev ## regenerate docs/configuration.md
	$(BIN)/qwen3-distill config reference > docs/configuration.md

clean: ## remove the virtual environment and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	@echo "installing into $(VENV) (a minute or two)"
	$(BIN)/pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements.txt
	$(BIN)/pip install $(PIP_FLAGS) -r requirements.txt
	@touch $@
