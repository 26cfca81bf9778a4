# Each target sets itself up: .venv is made when it is missing. LORA_FUSE_VENV names another place for it. Where nothing
# can be fetched: `make TARGET PY=python3 STAMP=`, after `python3 setup.py build_ext --inplace`.
VENV ?= $(or $(LORA_FUSE_VENV),.venv)
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CSRC := $(wildcard csrc/*)

.PHONY: demo test test-kernels test-gpu test-all lint types bench bench-gpu clean install

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(CSRC)
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools wheel
	PIP_CONSTRAINT=constraints.txt $(PY) -m pip install --quiet --constraint constraints.txt torch
	PIP_CONSTRAINT= $(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(VENV)/bin/lora-fuse demo

test: $(STAMP) test-kernels
	$(PY) -m pytest -m "not slow and not gpu" --ignore tests/kernels

# Triton kernels in its CPU interpreter, which is chosen when Triton is imported; then what is compiled ahead of time.
# Processes do it side by side where pytest-xdist is installed.
BESIDE = -p no:benchmark $$($(PY) -c "import xdist" 2>/dev/null && echo "-n $(1)")
WHICH ?= not slow and not gpu
test-kernels: $(STAMP)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -m "$(WHICH)" $(call BESIDE,2) tests/kernels
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "$(WHICH)" $(call BESIDE,2) tests/kernels

test-gpu: $(STAMP)
	$(PY) -m pytest -m gpu $(call BESIDE,8) tests/kernels

test-all: $(STAMP)
	$(MAKE) test-kernels WHICH="not gpu"
	$(PY) -m pytest -m "not gpu" --ignore tests/kernels

lint: $(STAMP)
	$(VENV)/bin/ruff check .

types: $(STAMP)
	$(VENV)/bin/mypy

bench: $(STAMP)
	$(PY) -m benchmarks

bench-gpu: $(STAMP)
	$(PY) -m benchmarks.gpu

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache lora_fuse/_cpu*.so
