# make test and make demo set up everything they need, in .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: setup test test-all demo bench overhead cost gpu-check lint format clean

setup: $(VENV)/.built

$(VENV)/.deps: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

test: setup
	$(PY) -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=95

test-all: setup
	$(PY) -m pytest -m "slow or not slow"

demo: setup
	$(PY) examples/digits.py

# With the Python at hand, which must have a CUDA build of torch: nothing is downloaded.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py

# bayesian-torch is one more peer; without it, it is listed as missing.
out/.peers: | setup
	mkdir -p out
	-$(PY) -m pip install --quiet --disable-pip-version-check --no-deps bayesian-torch==0.5.0
	touch $@

bench: setup out/.peers
	$(PY) -m pytest benchmarks -q --benchmark-json=out/bench.json --benchmark-max-time=0.5 --benchmark-columns=median,iqr,rounds
	$(PY) benchmarks/overhead.py

overhead: setup out/.peers
	$(PY) benchmarks/overhead.py

cost: setup
	$(PY) benchmarks/cost.py

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf build dist out *.egg-info dipkernels/_C*.so
