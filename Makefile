# One environment for every target: .venv, made on first use and mended whenever its requirements change.
#
#   make demo     parts in, concepts out: a first run, with pictures to look at
#   make test     the tests
#   make test-scale    those on Ray, with the packages that they need (about 150 MB)
#   make check    format, lint, types and import rules
#   make bench    the benchmarks, in their quick form
#   make clean    remove the environment and the tools' caches
#
# PYTHON=python3.12 picks the interpreter, TORCH_INDEX=URL the torch build. Without an NVIDIA GPU,
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# saves gigabytes of CUDA packages; an index given once stays chosen.

PYTHON ?= python3
TORCH_INDEX ?=

PY := .venv/bin/python
# Compiling every module of every package would take longer than everything that is ever imported.
INSTALL := $(PY) -m pip -qq --disable-pip-version-check install --no-compile -c constraints.txt
KEY := $(shell { pwd; cat pyproject.toml requirements.txt constraints.txt; } | cksum | cut -d ' ' -f 1)
READY := .venv/.ready-$(KEY)

# The index of the installed torch is read before anything may delete .venv, so that a new one has the same build.
# Another build asked for than the one installed: the same version number would not make pip replace it.
CHOSEN := $(shell cat .venv/.torch-index 2>/dev/null)
INDEX := $(or $(TORCH_INDEX),$(CHOSEN))
TORCH_SOURCE := $(if $(INDEX),--index-url $(INDEX))
ifneq ($(INDEX),$(CHOSEN))
TORCH_SOURCE += --force-reinstall
.PHONY: $(READY)
endif

.PHONY: demo test test-scale check bench clean
.DEFAULT_GOAL := demo

demo: $(READY)
	@.venv/bin/pit demo

# Two processes with one thread each beat one process with two threads, on tensors this small.
test: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

# Once its packages are there, "make test" runs these tests, too.
test-scale: $(READY)
	@$(PY) -c "import pyarrow, ray.data" 2>/dev/null || $(INSTALL) -e ".[scale]"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_part_embed_ray.py

check: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-logo

bench: $(READY)
	@$(PY) benchmarks/run.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# The marker is written last, so an installation that was broken off is taken up again. The pip script names the
# folder that its environment was made in: where it is missing or another, the environment cannot be mended.
$(READY):
	@if [ -d .venv ] && ! { $(PY) -m pip --version && grep -F "$(CURDIR)/.venv" .venv/bin/pip; } >/dev/null 2>&1; then \
		echo "The environment in .venv is broken or was moved here: making a new one."; rm -rf .venv; fi
	@[ -d .venv ] || $(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || { \
		echo "Python 3.10 or newer is needed; name one that is: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing into .venv (once; about a minute, longer on a slow line) ..."
	@[ -d .venv ] || $(PYTHON) -m venv .venv
	@rm -f .venv/.ready-*
	@echo "  1/2 torch"
	@$(INSTALL) torch $(TORCH_SOURCE)
	@if [ -n "$(INDEX)" ]; then echo "$(INDEX)" > .venv/.torch-index; fi
	@echo "  2/2 everything else"
	@$(INSTALL) -e ".[headless,train,dev]"
	@$(PY) -c "import accelerate, diffusers, importlinter, pit_core, pytest, torch, transformers, typer" || { \
		echo "The environment is incomplete. Run 'make clean', then the same command again." >&2; exit 1; }
	@touch $@
