# Six words: setup train test check notebooks bench. Each sets up what it needs.
# In an activated conda environment named trinity its own python is used instead of .venv.

ifeq ($(CONDA_DEFAULT_ENV),trinity)
PY := python
READY :=
else
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready
endif
PIP := $(PY) -m pip --disable-pip-version-check -q
CODE := trinity_lib tests notebooks benchmarks

.PHONY: setup train test check notebooks bench gpu megablocks plugin

setup: $(READY)

.venv/.ready: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(MAKE) megablocks plugin
	touch $@

# Lets lm_eval know `--model trinity` (one line in site-packages; plugin.remove() takes it back).
plugin:
	$(PY) -c "from trinity_lib import plugin; plugin.install()"

# MegaBlocks pins an old torch, so it is installed without its dependencies; and as pure
# Python, because its CUDA parts do not compile with CUDA 13 (its setup.py offers no switch).
MEGABLOCKS := megablocks==0.10.0 stanford-stk==0.7.1
megablocks:
	@$(PY) -c "from importlib.metadata import version as v; assert v('megablocks') == '0.10.0' and v('stanford-stk') == '0.7.1' and v('triton') == '3.7.1'" 2>/dev/null || { \
	set -e; echo "installing $(MEGABLOCKS)"; \
	$(PIP) install -c constraints.txt triton; \
	rm -rf build/megablocks && mkdir -p build/megablocks; \
	TORCH_CUDA_ARCH_LIST=9.0 $(PIP) download --no-deps --no-build-isolation --no-binary :all: -d build/megablocks $(MEGABLOCKS); \
	for sdist in build/megablocks/*.tar.gz; do tar -xzf $$sdist -C build/megablocks; done; \
	for source in build/megablocks/*/; do $(PY) -W ignore -c "import os; os.chdir('$$source'); import torch.utils.cpp_extension as e; e.CUDA_HOME = None; from setuptools import build_meta as b; b.build_wheel('..')" >build/megablocks/log 2>&1 || { cat build/megablocks/log; exit 1; }; done; \
	$(PIP) install --no-deps build/megablocks/*.whl; }

train: setup
	$(PY) -m papermill notebooks/train.ipynb runs/train.ipynb --progress-bar --log-output

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile
	TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreter

check: setup
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m mypy trinity_lib

notebooks: setup
	$(PY) -m pytest -m slow tests

bench: setup
	set -e; for program in benchmarks/[a-z]*.py; do $(PY) $$program; done

gpu: setup
	$(PY) -m pytest -m gpu tests
	$(PY) benchmarks/layer.py
	$(PY) -m papermill notebooks/kernels.ipynb runs/kernels.ipynb --progress-bar
