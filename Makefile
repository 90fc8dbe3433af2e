# Everything runs in .venv, which these targets create.  MOESAIC_TORCH picks another torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
STAMP := .make

.PHONY: build
build:
	MOESAIC_BUILD_DIR=build $(BIN)/pip install -q -e . --no-build-isolation --no-deps
