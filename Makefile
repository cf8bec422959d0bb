# make test and make demo set up everything they need, in .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
IN_PLACE = GLIBC_TUNABLES=$$(cd benchmarks && ../$(PY) -c 'import machine; print(machine.IN_PLACE)')
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: setup test test-all test-tools nvcc compat demo bench overhead cost studies gpu-check lint format clean sanitize battery mutants ptx-mutants \
	soak sweep long-tests \
	wheel wheel-cpu wheel-pure wheel-aarch64 wheel-check sdist setup-build setup-locked lock docs typecheck lint-release

setup: $(VENV)/.deps $(VENV)/.built

# pip would take one core, and compile what nobody imports; some files are of a newer Python.
BYTECODE = $(PY) -m compileall -qq -j 0 -x '/(tests|testing|models|mypyc?)/' $(VENV)/lib || true

# What the build needs. With make -j 2 the compiler works while the rest is fetched.
$(VENV)/.torch: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile -c requirements-dev.txt torch setuptools wheel ninja
	$(BYTECODE)
	touch $@

$(VENV)/.deps: $(VENV)/.torch
	$(PIP) --no-compile -r requirements-dev.txt
	$(BYTECODE)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	touch $@

# Workers of pytest, each with one thread; a file's tests stay together, and start in the order written.
JOBS ?= 2
PARALLEL = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

test: setup
	$(PARALLEL)

# And coverage, which makes every process slower.
test-all: setup
	$(PARALLEL) -m "slow or not slow" --cov --cov-report=term:skip-covered --cov-fail-under=95

# The suite under another torch, in .compat/<TORCH>: make compat TORCH=2.11.0 [QUICK=1] [COMPAT_PYTHON=python3.12]
COMPAT_PYTHON ?= $(PYTHON)
compat: setup
	test -n "$(TORCH)" || (echo "compat: expected a release of torch, such as: make compat TORCH=2.11.0" && false)
	$(PY) tools/verify/compat.py --torch $(TORCH) --python $(COMPAT_PYTHON) --jobs $(JOBS) $(if $(QUICK),--quick)

# nvcc into .venv, 270 MB, where there is no CUDA toolkit: without one the tests of the CUDA kernels' compiled code are skipped.
nvcc: | $(VENV)/.deps
	$(PIP) --no-deps -r requirements-nvcc.txt

# Other people's tools, installed on top of the pinned torch, which DeepSpeed's setup.py asks for.
$(VENV)/.tools: requirements-tools.txt $(VENV)/.deps
	$(PIP) --no-build-isolation -r requirements-dev.txt -r requirements-tools.txt
	touch $@

test-tools: setup $(VENV)/.tools
	$(PY) -m pytest -m "slow or not slow" tests/test_tools.py tests/test_adapters.py tests/test_models.py \
		tests/test_integration_*.py tests/test_trainers_guide.py

demo: setup
	$(PY) examples/digits.py

# With the Python at hand, which must have a CUDA build of torch: nothing is downloaded. ARGS="--skip sanitizer", --dry-run, ...
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

# bayesian-torch is one more peer; without it, it is listed as missing.
out/.peers: | setup
	mkdir -p out
	-$(PIP) --no-deps bayesian-torch==0.5.0
	touch $@

bench: setup out/.peers
	$(IN_PLACE) $(PY) -m pytest benchmarks -q --benchmark-json=out/bench.json --benchmark-max-time=0.5
	$(PY) benchmarks/overhead.py

overhead: setup out/.peers
	$(PY) benchmarks/overhead.py

cost: setup
	$(PY) benchmarks/cost.py

$(VENV)/.studies: requirements-studies.txt $(VENV)/.deps
	$(PIP) --no-deps -r requirements-studies.txt
	touch $@

# Every study, hours; stopped, it goes on where it was. studies/README.md says what they need.
studies: setup $(VENV)/.studies
	$(PY) studies/run_all.py

# The wheel of this machine with CPU and CUDA kernels: needs nvcc, no GPU. TOOLKIT=12.8 refuses another nvcc than that.
wheel: | $(VENV)/.deps
	$(PY) tools/release/build_wheel.py $(if $(TOOLKIT),--toolkit $(TOOLKIT))

wheel-cpu: | $(VENV)/.deps
	$(PY) tools/release/build_wheel.py --cuda 0

wheel-pure: | $(VENV)/.deps
	$(PY) tools/release/build_wheel.py --cpu 0 --cuda 0

wheel-aarch64: | $(VENV)/.deps
	$(PY) tools/release/build_wheel.py --cuda 0 --machine aarch64

sdist: | $(VENV)/.deps
	$(PY) tools/release/build_wheel.py --sdist-only

# The wheel alone, without dependencies, in an environment that has torch only, run outside the source tree.
# EXPECT=cpu after wheel-cpu; EXPECT=none WHEEL=... after wheel-pure.
WHEEL ?= $(lastword $(wildcard dist/dipkernels-*-manylinux*_$(shell uname -m).whl))
EXPECT ?= cuda
wheel-check:
	test -n "$(WHEEL)" || (echo "wheel-check: there is no wheel in dist/: make wheel" && false)
	rm -rf build/clean
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(WHEEL)
	cp tools/release/smoke.py build/clean/smoke.py
	root=$$PWD && cd / && "$$root/build/clean/bin/python" "$$root/build/clean/smoke.py" --expect $(EXPECT) --import-share 0.08

# What building the wheel needs, and no more.
setup-build:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) setuptools==84.2.1 wheel==0.48.0 ninja==1.13.2 numpy
	touch $(VENV)/.torch $(VENV)/.deps

# The development environment with every file's hash checked. torch apart: which build of it is the machine's choice (TORCH_INDEX).
setup-locked:
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) --require-hashes --no-deps -r requirements-dev.lock
	touch $(VENV)/.torch $(VENV)/.deps

# Every package of the development environment at one version, with the hash of each of its files; but torch, as above, and what only
# its CUDA build needs. For Python 3.11 and newer. uv asks the index for hashes without downloading the files.
lock: | $(VENV)/.deps
	mkdir -p out && rm -f out/lock
	uv pip compile --quiet --no-config --no-header --no-annotate --generate-hashes --python $(PY) --output-file out/lock \
		requirements-dev.txt requirements-docs.txt requirements-release.txt > /dev/null
	(echo "# Written by \`make lock\` from requirements-*.txt. Install with --require-hashes --no-deps." && \
		awk '/^[a-z]/ { keep = !/^(torch==|nvidia-|cuda-)/ } keep' out/lock) > requirements-dev.lock

docs: setup
	$(PIP) -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

typecheck: setup
	$(PY) -m mypy
	$(PY) -m mypy --strict --follow-imports=silent tests/typing_use.py

C_SOURCES := $(shell find csrc tests tools -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# What docs/reliability.md reports; each takes a --record that writes its figures there.
sanitize battery mutants ptx-mutants: setup
	$(PY) tools/verify/$(subst -,_,$@).py

soak: setup
	OMP_NUM_THREADS=1 $(PY) tools/verify/soak.py

long-tests: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(addprefix tests/test_,properties.py fuzz.py fuzz_examples.py lifecycle.py cluster_example.py)

# docs/models.md has its table.
sweep: setup
	OMP_NUM_THREADS=1 $(PY) tools/verify/sweep.py --jobs $(JOBS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(C_SOURCES)

# The workflows by GitHub's schema and for security, and the Dockerfile; tests/test_release.py checks the targets that they call.
lint-release: setup
	$(PIP) -r requirements-release.txt
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/zizmor --offline --quiet .github/workflows
	$(VENV)/bin/hadolint Dockerfile

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(C_SOURCES)

clean:
	rm -rf build dist out site .compat *.egg-info dipkernels/_C*.so $(VENV)/.built
