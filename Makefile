# Two commands do everything: `make quickstart` trains a model, `make test` passes the tests. Both set up .venv/ first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check install clean browser

quickstart: install
	$(BIN)/python -m farspan.jobs.quickstart

test: install browser check
	$(BIN)/python -m pytest tests -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15

check: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python infra/checks/run.py

install: $(STAMP)

$(STAMP): pyproject.toml infra/constraints.txt infra/setup/install.sh
	PYTHON="$(PYTHON)" bash infra/setup/install.sh $(VENV)
	@touch $@

browser:
	@bash infra/setup/browser.sh

clean:
	rm -rf $(VENV) build dist *.egg-info
