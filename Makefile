# `make` lists the targets. Each sets up what it needs; the second time that takes a second.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PACKAGED := $(VENV)/.packages-installed
BUILT := $(VENV)/.built
SOURCES := setup.py MANIFEST.in tools/toolchain.py tools/toolchain.txt \
	$(shell find bpf proto src/clawker_cp/_fast -name '*.[ch]' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.proto')
GO ?= $(shell command -v go || ls /usr/local/go/bin/go 2>/dev/null)
PEERS := hydra kratos oathkeeper coredns
PEERS_BIN := $(CURDIR)/build/peers/bin
TAGS_hydra := sqlite,json1
TAGS_kratos := sqlite,json1
# Tests mostly wait for namespaces, daemons and proxies: as many files at once as there are cores.
JOBS ?= 2
PYTHONS := src tests benchmarks tools setup.py
REQUIREMENTS = $(BIN)/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml","rb"))["build-system"]["requires"]))'

.PHONY: help run test test-fast test-asan coverage dev build bench bench-once peers image lint types fmt ci doctor system clean bytecode

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

run: bytecode ## a tour of the main job on real traffic, in namespaces of its own
	@$(BIN)/python -m clawker_cp.demo

test: bytecode ## every test; those that need root, BPF or a tool say so when they cannot run
	@[ "$$(id -u)" != 0 ] || mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf || true
	@$(PYTHON) tools/toolchain.py doctor >&2 || true
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

test-fast: bytecode ## the tests without root, Envoy and waiting
	@$(BIN)/python -m pytest -m 'not root and not slow and not envoy and not docker' -n $(JOBS) $(TESTS)

# What decides who may pass has no line that no test has seen; the servicers lag behind and only catch up.
DECIDING := src/clawker_cp/auth/*,src/clawker_cp/_pure/*
SERVING := src/clawker_cp/rpc/*
COVERAGE = COVERAGE_FILE=build/coverage $(BIN)/python -m coverage
coverage: $(BUILT) ## the branches of authentication, the plain twins and the RPC boundary that tests have been through
	@mkdir -p build
	@$(COVERAGE) run --source=clawker_cp.auth,clawker_cp.rpc,clawker_cp._pure -m pytest -q -m 'not slow' -k 'not [hydra]' --hypothesis-profile=few \
	  tests/unit/auth tests/unit/rpc tests/fast tests/integration/test_auth*.py
	@$(COVERAGE) report --skip-covered --fail-under=100 --include='$(DECIDING)'
	@$(COVERAGE) report --skip-covered --fail-under=95 --include='$(SERVING)'

ASAN := build/asan
test-asan: $(BUILT) ## the compiled parts with address and undefined-behaviour sanitizers, under their own tests
	@rm -rf $(ASAN) && mkdir -p $(ASAN)/temp
	@cp -r src/clawker_cp $(ASAN)/ && find $(ASAN) -name '*.so' -delete
	@CLAWKER_CP_BUILD_SANITIZE=1 $(BIN)/python setup.py -q build_ext --force --build-lib $(ASAN) --build-temp $(ASAN)/temp
	@for so in $(ASAN)/clawker_cp/_fast/*.so; do ldd $$so | grep -q libasan || { echo "$$so has no sanitizer" >&2; exit 1; }; done
	@LD_PRELOAD=$$($${CC:-gcc} -print-file-name=libasan.so) PYTHONPATH=$(CURDIR)/$(ASAN) PYTHONMALLOC=malloc \
	  ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/python -m pytest -q tests/fast $(TESTS)

dev: $(BUILT) ## a working tree from nothing: system packages, virtual environment, compiled parts

build: $(BUILT) ## wheel and sdist in dist/
	@$(BIN)/python -m build -q --no-isolation

bench: bytecode ## the benchmarks, as ratios in one run
	@$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-group-by=group -q -s -o faulthandler_timeout=0

bench-once: $(BUILT) ## each benchmark once with timing off, so that none rots
	@$(BIN)/python -m pytest benchmarks --benchmark-disable -q

peers: $(PEERS:%=$(PEERS_BIN)/%) ## Hydra, Kratos, Oathkeeper and CoreDNS as Go modules, for tests and benchmarks (minutes)

$(PEERS_BIN)/%: tools/peers/%/go.mod tools/peers/%/go.sum
	@[ -n "$(GO)" ] || { echo "make peers needs Go 1.25 or later on PATH (https://go.dev/doc/install)" >&2; exit 1; }
	@echo "building $*"
	@cd tools/peers/$* && GOBIN=$(PEERS_BIN) $(GO) install -tags '$(TAGS_$*)' tool
	@touch $@

image: $(BUILT) ## the container image, from this machine's packages where no registry of images is reachable
	@$(BIN)/python tools/image.py

lint: $(BUILT) ## style, layering, sizes, missing tests
	@$(BIN)/ruff check -q $(PYTHONS)
	@$(BIN)/ruff format -q --check $(PYTHONS)
	@$(BIN)/python tools/check_layers.py

types: $(BUILT) ## mypy, strict
	@$(BIN)/mypy

fmt: $(BUILT) ## format what can be formatted
	@$(BIN)/ruff format -q $(PYTHONS)
	@$(BIN)/ruff check -q --fix $(PYTHONS)

ci: ## exactly what CI runs
	@.ci/run

doctor: ## what this machine lacks, and what that costs
	@$(PYTHON) tools/toolchain.py doctor

system: ## install the Debian packages that are missing (as root; else says which)
	@if command -v $(PYTHON) >/dev/null; then missing=$$($(PYTHON) tools/toolchain.py packages); \
	else missing=$$(grep -v '^#' tools/toolchain.txt | cut -d'|' -f3); fi; \
	if [ -z "$$missing" ]; then exit 0; \
	elif [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "missing here: "$$missing"; as root: apt-get install "$$missing >&2; \
	else echo "installing:" $$missing; apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

$(PACKAGED): pyproject.toml | system
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) install 'pip>=25.1'
	@$(REQUIREMENTS) | $(PIP) install -r /dev/stdin
	@$(PIP) install --group dev
	@touch $@

$(BUILT): $(PACKAGED) $(SOURCES) | system
	@$(PIP) install --no-build-isolation -e .
	@touch $@

# As pip does it for an installed package: where PYTHONDONTWRITEBYTECODE is set, each start would compile all of it anew.
bytecode: $(BUILT)
	@$(BIN)/python -m compileall -q src/clawker_cp

clean: ## remove everything that was made here
	@rm -rf build dist $(VENV) src/*.egg-info src/clawker_cp/_bpf src/clawker_cp/_proto src/clawker_cp/_fast/*.so
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
