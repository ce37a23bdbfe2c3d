# SPDX-License-Identifier: BSD-3-Clause
# make bench | make bench FULL=1 | make test | make lint | make clean. Everything is installed into .venv, once.
# make gpu | gpu-build | gpu-test | gpu-bench: on a machine with a GPU, with its python3 as it is (docs/gpu-benchmarks.md);
# RESULTS=DIR for another place than bench/results.
# PYTHON: a Python 3.11 or 3.12; the first of python3, python3.12, python3.11 that is one, if not given.
IS_FIT := import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c '$(IS_FIT)' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
CXX_FILES := $(sort $(shell find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'))
# On a GPU machine: what was given, else python3.
GPU_PYTHON = $(if $(filter file,$(origin PYTHON)),python3,$(PYTHON))
REQUIREMENTS := .venv/requirements.stamp
INSTALLED := .venv/installed.stamp

.PHONY: bench test lint clean gpu gpu-build gpu-test gpu-bench
.DELETE_ON_ERROR:

bench: $(INSTALLED)
	$(BIN)/python -m fastrnn bench $(if $(FULL),--full)

test: $(INSTALLED)
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES) $(wildcard bench/probes/cuda/*)
	$(BIN)/python tools/check_arrows.py
	$(BIN)/python tools/check_budget.py
	$(BIN)/python tools/check_spills.py
	$(BIN)/python tools/check_isa_symbols.py
	$(BIN)/python tools/check_cuda.py

gpu-build gpu-test gpu-bench: gpu-%:
	$(GPU_PYTHON) tools/gpu.py $* $(if $(RESULTS),--results $(RESULTS))

# One after the other, also under -j; measured is also what a test finds wrong.
gpu:
	$(MAKE) gpu-build
	$(MAKE) gpu-test; tests=$$?; $(MAKE) gpu-bench && exit $$tests

# The packages: again only when requirements.txt changed.
$(REQUIREMENTS): requirements.txt
	$(if $(PYTHON),,$(error no Python 3.11 or 3.12 found: type `make PYTHON=/path/to/python3.12`))
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

# The extension and the entry in .venv: again when a source changed; ninja compiles what the change touches.
$(INSTALLED): $(REQUIREMENTS) setup.py pyproject.toml $(CXX_FILES)
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist fastrnn.egg-info fastrnn/_build.py fastrnn/_C.*.so
