# `make` lists the targets. Every target sets up what it needs; the second time that takes a second.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
STAMP := $(VENV)/.clawker-stamp
BIN := $(VENV)/bin
PACKAGES := clang llvm libbpf-dev libelf-dev zlib1g-dev pkg-config build-essential python3-dev python3-venv \
	bubblewrap nftables iproute2 util-linux curl ca-certificates procps
SOURCES := pyproject.toml setup.py $(wildcard src/clawker_cp/_fast/*.pyx src/clawker_cp/_fast/*.[ch] src/clawker_cp/_fast/*.pxd bpf/*.[ch] bpf/lib/*.h bpf/tests/*.c)

.PHONY: help run test dev build bench lint types fmt ci clean system

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

system: ## install the Debian packages that are missing (needs root)
	@missing=$$(for p in $(PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" != 0 ]; then echo "missing Debian packages: $$missing; run as root: apt-get install $$missing" >&2; exit 3; fi; \
	  echo "installing:" $$missing; apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	fi

$(STAMP): $(SOURCES) | system
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'pip>=25.1' 'setuptools>=77' 'cython>=3.1,<4' 'grpcio-tools>=1.70' wheel
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e .
	@$(BIN)/python -m pip install -q --disable-pip-version-check --group test --group lint
	@touch $(STAMP)

dev: $(STAMP) ## a working tree: packages, virtual environment, compiled parts

run: $(STAMP) ## a tour of the main job on real traffic, in namespaces of its own (needs root)
	@$(BIN)/python -m clawker_cp.demo

test: $(STAMP) ## every test (those that need root or BPF say so when they cannot run)
	@mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf || true
	@$(BIN)/python -m pytest

build: $(STAMP) ## wheel and sdist in dist/
	@$(BIN)/python -m pip install -q --disable-pip-version-check build
	@$(BIN)/python -m build -q --no-isolation

bench: $(STAMP) ## benchmarks, as ratios in one run
	@$(BIN)/python -m pytest benchmarks -o testpaths=benchmarks --benchmark-only --benchmark-group-by=group -q

lint: $(STAMP) ## style and layering
	@$(BIN)/ruff check src tests benchmarks setup.py
	@$(BIN)/python tools/check_layers.py

types: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

fmt: $(STAMP) ## format
	@$(BIN)/ruff format src tests benchmarks setup.py

ci: lint test ## what CI runs

clean: ## remove what was built
	@rm -rf build dist $(VENV) src/*.egg-info src/clawker_cp/_bpf src/clawker_cp/_proto src/clawker_cp/_fast/*.so
