# make test         the checks to run before each commit, after all set-up
# make test-full    all checks: also those that are slow, or repeat others at more sizes
# make test-oldest  the tests of models with the oldest transformers and peft that pyproject.toml allows
# make properties   the property tests with a hundred times the inputs, drawn at random
# make coverage     how much of the package the tests of `make test` run, and where it is under 90%
# make demo         a planted poison found, start to end
# make docs         the documentation site in build/site, with the report of a query of the demo; all its links are checked
# Set-up makes .venv (PYTHON=... picks the interpreter, 3.10 or newer) and is skipped while nothing has changed.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Processes of the tests; each takes up to 2 GB.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 4 ? n : 4)))
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# Installed in place: Python started in this folder finds the checkout first, so that is where the extension must be.
SOURCES := $(shell find csrc -type f -not -path "csrc/rapidin_cuda/*")

# The libraries are compiled by the first process that imports them, since pip does not: else by each anew.
unexport PYTHONDONTWRITEBYTECODE

# Two steps at a time, of set-up and of checks.
MAKEFLAGS += --jobs=2

.PHONY: test test-full test-oldest style tests tests-full properties coverage demo docs clean

test: style tests

test-full: style tests-full test-oldest

style: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

tests: .venv/installed .venv/emulated
	$(PYTEST) -m "not full"
	@echo "make test left out the tests marked 'full': GPU kernels at more sizes and under sanitizers, processes that"
	@echo "are killed or share work, whole trainings, whole runs of studies, and the page in a browser. make test-full"
	@echo "runs them, too."

# Property tests draw twice the inputs, the same in each run (tests/support/properties.py).
tests-full: .venv/installed .venv/emulated
	RAPIDIN_EXAMPLES=2 $(PYTEST)

properties: .venv/installed .venv/emulated
	RAPIDIN_EXAMPLES=100 $(PYTEST) -m hypothesis

# Which lines and branches the tests of `make test` run, in this process and not in those that they start.
coverage: .venv/installed .venv/emulated
	mkdir -p build
	$(PYTEST) -m "not full" --cov=rapidin --cov-branch --cov-report=json:build/coverage.json --cov-report=
	$(BIN)/python .ci/coverage.py build/coverage.json

test-oldest: .venv/oldest/installed
	OMP_NUM_THREADS=1 .venv/oldest/bin/python -m pytest -q -m "not full" tests/models

demo: .venv/installed
	$(BIN)/rapidin demo

# The demo keeps its model, data and cache in build/demo, and docs/guide/report.md shows the report.
docs: .venv/installed
	rm -rf build/demo
	$(BIN)/rapidin demo --out build/demo
	cd build/demo && ../../$(BIN)/rapidin query cache --data query.jsonl --by poisoned \
		--report example-report.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml

clean:
	rm -rf .venv build *.egg-info rapidin/ops/_cpu*.so rapidin/ops/_cuda*.so

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 or newer found; install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/builders: .venv/bin/python constraints.txt
	$(PIP) setuptools pybind11
	$(BIN)/python -c "import tomllib" 2>/dev/null || $(PIP) tomli
	touch $@

# The dependencies alone, named by pyproject.toml: this is the long part, and changes seldom.
.venv/dependencies: .venv/builders pyproject.toml
	@echo "installing dependencies into .venv (the first time takes minutes)"
	$(PIP) $$($(BIN)/python -c "$$LIST_DEPENDENCIES")
	touch $@

# Compiled while pip unpacks the dependencies, each of which takes minutes.
# Warnings of nvcc are errors here, not where a user builds with a version that warns of more.
.venv/extensions: export RAPIDIN_CUDA ?= $(shell command -v nvcc >/dev/null 2>&1 && echo on || echo off)
.venv/extensions: export RAPIDIN_CUDA_FLAGS = -Werror all-warnings
.venv/extensions: export RAPIDIN_BUILD_JOBS = $(shell nproc 2>/dev/null || echo 1)
.venv/extensions: .venv/builders setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace --force
	touch $@

# The CUDA kernels for the CPU, which tests would otherwise wait for.
.venv/emulated: .venv/builders $(SOURCES) $(wildcard tests/support/emulator/*)
	$(BIN)/python tests/support/emulator/build.py
	touch $@

.venv/installed: .venv/dependencies .venv/extensions
	RAPIDIN_EXTENSIONS=built $(PIP) --no-build-isolation --no-deps --force-reinstall --editable .
	touch $@

# All packages of .venv, except those that are older here.
.venv/oldest/installed: .venv/installed constraints-oldest.txt
	rm -rf .venv/oldest
	$(BIN)/python -m venv .venv/oldest
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$(.venv/oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth
	.venv/oldest/bin/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps --requirement constraints-oldest.txt
	touch $@

define LIST_DEPENDENCIES
try: import tomllib
except ImportError: import tomli as tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*(name.replace(" ", "") for name in project["dependencies"] + extras["dev"] + extras["docs"]))
endef
export LIST_DEPENDENCIES
