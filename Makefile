# Everything here makes .venv and installs into it when that is needed, and only then.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
WANTED := pyproject.toml $(wildcard deploy/cpu/*.py deploy/cpu/*.txt)

.PHONY: demo serve test lint clean

demo: $(INSTALLED)  ## serve the small model, send it a clip at four ratios, stop
	@$(BIN)/scissor-vllm demo

serve: $(INSTALLED)  ## serve the small model until interrupted
	$(BIN)/scissor-vllm serve demo

test: $(INSTALLED_DEV) lint  ## all tests, on a real engine and server
	$(BIN)/python -m pytest

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# $(call install,FLAGS)
define install
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) not found: install Python 3.11, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) deploy/cpu/install.py $(VENV) $(1)
endef

$(INSTALLED): $(WANTED)
	$(call install,)
	@touch $@

$(INSTALLED_DEV): $(WANTED)
	$(call install,--dev)
	@touch $(INSTALLED) $@

clean:
	rm -rf $(VENV)
