# make demo    fine-tune on Hopper (pass options with ARGS="--seeds 0 1 2 --denoiser mlp")
# make test    ruff, mypy and the tests
# make lint    ruff and mypy only
# make clean   remove caches and build products; the environment stays
#
# demo, test and lint make their own environment in .venv on first use: 1.5 GB with a CPU build of torch, one to two minutes.
# PYTHON=python3.12 chooses the interpreter it is made with.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Two threads: the networks are small, and more would only wait for each other.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS

VENV_PYTHON = $(VENV)/bin/python
HAS_PIP = 'import pip, sys; sys.exit(sys.version_info < (3, 11))'
INSTALL = $(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed
	$(VENV_PYTHON) examples/finetune_hopper.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find modip_sb3 examples tests -type d -name __pycache__ -exec rm -rf {} +

# Stale: the dependencies changed since the stamp, or the environment's Python does not run here.
STALE := $(shell $(VENV_PYTHON) -c $(HAS_PIP) 2>/dev/null || echo force)

$(VENV)/.installed: pyproject.toml constraints.txt $(STALE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "modip_sb3 needs Python 3.11 or newer, and '$(PYTHON)' is '$$($(PYTHON) --version 2>&1)': name a newer one, as in 'make demo PYTHON=python3.11'." >&2; exit 1; }
	@if [ -e $(VENV) ] && [ ! -f $(VENV)/pyvenv.cfg ]; then \
	  echo "'$(VENV)' exists and is no virtual environment: move it away, or name another, as in 'make demo VENV=.venv-demo'." >&2; exit 1; fi
	@$(VENV_PYTHON) -c $(HAS_PIP) 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing modip_sb3 and its dependencies into $(VENV) (one to two minutes the first time)"
	$(INSTALL) -e ".[plots]"
	@touch $@

# On top of the other stamp, so that 'make -j demo test' never installs twice at once.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e ".[dev,plots,zoo,benchmark,ray,kitchen,robomimic]"
	$(INSTALL) --no-deps robosuite==1.4.1 robomimic==0.3.0  # why without dependencies: pyproject.toml
	@touch $@

force:

.PHONY: help demo test lint clean force
