# Two commands are enough: `make demo` and `make test`. Both build the environment from its lock.
#   make test ENV=tfc   the same tests with TensorFlow and the official tensorflow-compression ops
#   make test ARGS="tests/test_codecs.py -x"
#   make demo ARGS="--config.train.batch_size=64"
ENV ?= core
ARGS ?=
PYTHON ?= python3
VENV := $(if $(filter core,$(ENV)),.venv,.venv-$(ENV))
BIN := $(VENV)/bin
# A lock leaves nothing to resolve; uv writes its files three times as fast as pip does. It does not
# read pip's settings: where only those know the way to an index, pip installs the same.
UV := uv==0.9.13
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
LOCKED = --no-deps -r requirements/$(ENV).txt

.PHONY: demo test lint format conformance benchmark clean

demo: $(VENV)/.ready
	$(BIN)/python -m icm_jax.main --config=configs/omni_icm.py $(ARGS)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.ready
	$(BIN)/python benchmarks/bench_range_coder.py
	$(BIN)/python benchmarks/bench_codec.py
	$(BIN)/python benchmarks/bench_scalable.py
	$(BIN)/python benchmarks/bench_without_decoding.py

# TensorFlow 2.14 has no wheels for Python 3.12 and newer.
conformance:
	$(MAKE) .venv-conformance/.ready ENV=conformance PYTHON=python3.11
	.venv-conformance/bin/python -m pytest -W default --noconftest tests/conformance $(ARGS)

$(VENV)/.ready: requirements/$(ENV).txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "icm_jax needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(UV) && $(BIN)/uv pip install --quiet --python $(BIN)/python $(LOCKED) || $(PIP) $(LOCKED)
	$(PIP) --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis
