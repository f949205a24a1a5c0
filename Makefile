# Everything here makes .venv and installs into it when that is needed, and only then.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
# Of `make accuracy`.
ACCURACY := build/accuracy
METHODS := average-linkage scc scc-windows uniform random l2norm evs vidcom2
RATIOS := 1.0 0.25 0.1 0.05
NUM_PER_SKILL := 10
WANTED := pyproject.toml $(wildcard deploy/cpu/*.py deploy/cpu/*.txt)

.PHONY: demo serve bench accuracy test test-all lint docs clean

demo: $(INSTALLED)  ## serve the small model, send it a clip at four ratios, stop
	@$(BIN)/scissor-vllm demo

serve: $(INSTALLED)  ## serve the small model until interrupted
	$(BIN)/scissor-vllm serve demo

bench: $(INSTALLED_DEV)  ## load the small model's server at three ratios; table, CSV and plots
	@$(BIN)/scissor-vllm bench --demo --retention-ratio 1.0 0.25 0.1 --max-concurrency 1 4 \
	  --num-prompts 6 --num-warmups 2 --num-frames 16 --fps 8 --output-len 16 \
	  --output build/bench/result.json --overwrite
	@$(BIN)/scissor-vllm bench plot build/bench/result.json

accuracy: $(INSTALLED_DEV)  ## ask the small model about held-out clips, compressed by eight methods
	@$(BIN)/python -m bench.world.heldout $(ACCURACY)/clips --num-per-skill $(NUM_PER_SKILL)
	@$(BIN)/python -m bench.accuracy methods --methods $(METHODS) --retention-ratio $(RATIOS) \
	  --questions $(ACCURACY)/clips --output $(ACCURACY)/result.json
	@$(BIN)/python -m bench.accuracy plot $(ACCURACY)/result.json

# Servers in one process of pytest, engines in the other, then file by file, the longest first.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder \
  --durations 40

test: $(INSTALLED_DEV) lint  ## lint, types, and tests on real engines and servers
	$(PYTEST)

test-all: $(INSTALLED_DEV) lint  ## also what is slow or rare, with ten times the examples
	$(PYTEST) --slow

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED_DEV)  ## build the docs into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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
