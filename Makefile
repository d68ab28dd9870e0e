# Development and quickstart. `make help` lists what there is.
#
# The first target that needs it makes .venv with Python 3.12 and the versions
# in constraints.txt, and again when those change. To use an environment that
# exists already, name its interpreter: `make test PYTHON=/path/to/python`.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
STAMP := $(VENV)/.installed
ifdef PYTHON
  ENVIRONMENT :=
else
  PYTHON := $(VENV)/bin/python
  ENVIRONMENT := $(STAMP)
endif

WORKDIR ?= runs/quickstart
# More flags for the quickstart: ARGS="--config.document.num_tokens=131072".
ARGS ?=
# Arguments for pytest: PYTEST_ARGS="-k sampling". A module stays in one process,
# since its tests share compiled engines. In the order of their names, modules of
# few and long tests are not the last ones, which one process would run alone.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help
help:  ## Lists the targets.
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) \
	  | awk -F ':.*## ' '{ printf "make %-12s %s\n", $$1, $$2 }'

.PHONY: quickstart
quickstart: $(ENVIRONMENT)  ## Answers from a document that fits in no instance.
	$(PYTHON) -m experiments.run --config=configs/quickstart.py \
	  --workdir=$(WORKDIR) $(ARGS)

.PHONY: test
test: lint types  ## Lint, types and the CPU tests.
	$(PYTHON) -m pytest -q $(PYTEST_ARGS)

.PHONY: test-benches
test-benches: $(ENVIRONMENT)  ## Benchmarks and their baselines, in small.
	$(PYTHON) -m pytest -q -m bench tests/experiments $(PYTEST_ARGS)

# With `transformers` and torch installed beside it, models are compared with
# theirs live; without, those tests say so and are skipped.
.PHONY: test-slow
test-slow: $(ENVIRONMENT)  ## The README's example, more combinations, transformers.
	$(PYTHON) -m pytest -q -rs -m slow tests/readme_test.py tests/models \
	  tests/engine tests/e2e tests/pallas_kernels $(PYTEST_ARGS)

.PHONY: test-multihost
test-multihost: $(ENVIRONMENT)  ## The tests that start several processes.
	$(PYTHON) -m pytest -q -m multihost tests/multihost

# CUDA's compilers go into a folder of their own: with them on the path, JAX
# would look for a GPU in every other target.
SM90A := .sm90a
SM90A_STAMP := $(SM90A)/.installed

.PHONY: test-sm90a
test-sm90a: $(ENVIRONMENT) $(SM90A_STAMP)  ## Assembles the kernels for Hopper; needs no GPU.
	JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_PTXAS=1 PYTHONPATH=$(SM90A):. \
	  $(PYTHON) -m pytest -q tests/sm90a $(PYTEST_ARGS)

.PHONY: lint
lint: $(ENVIRONMENT)  ## Style and layout; changes nothing.
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

.PHONY: types
types: $(ENVIRONMENT)  ## Strict types where pyproject.toml asks for them.
	$(PYTHON) -m basedpyright --pythonpath $(PYTHON)

.PHONY: format
format: $(ENVIRONMENT)  ## Repairs what lint finds, where a tool can.
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

.PHONY: venv
venv: $(ENVIRONMENT)  ## Only the environment.

.PHONY: clean
clean:  ## Removes the environment, results of runs, and caches.
	rm -rf $(VENV) $(SM90A) runs build *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment of another Python is not repaired but refused: somebody
# may be using it.
$(STAMP): constraints.txt pyproject.toml
	@set -e; \
	is_312='import sys; sys.exit(sys.version_info[:2] != (3, 12))'; \
	if [ -e $(VENV) ]; then \
	  $(VENV)/bin/python -c "$$is_312" 2>/dev/null || { \
	    echo "error: $(VENV) is not a Python 3.12 environment;" \
	      "remove it (make clean) and try again." >&2; exit 2; }; \
	else \
	  for base in python3.12 python3 python; do \
	    $$base -c "$$is_312" 2>/dev/null && break; \
	    base=; \
	  done; \
	  if [ -z "$$base" ]; then \
	    echo "error: needs Python 3.12; found neither python3.12 nor a" \
	      "python3 of that version on PATH." >&2; exit 2; \
	  fi; \
	  $$base -m venv $(VENV); \
	fi
	@echo "Installing the pinned dependencies into $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt setuptools
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@

$(SM90A_STAMP): constraints-sm90a.txt | $(ENVIRONMENT)
	@echo "Installing CUDA's compilers into $(SM90A) ..."
	@rm -rf $(SM90A)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target $(SM90A) --requirement constraints-sm90a.txt
	@touch $@
