# Everything builds its own .venv from pyproject.toml and constraints.txt; a second run finds it made.
PYTHON ?= python3.11
PY := .venv/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

.PHONY: help demo demo-torch demo-keras test test-slow lint types readme clean

help:  ## Show the targets.
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

demo: demo-torch demo-keras  ## Set up, then the main job on real data in both frameworks (writes out/demo/).

demo-torch: .venv/.torch  ## The PyTorch -> ONNX Runtime half, with only its extras.
	@$(PY) examples/demo_torch.py

demo-keras: .venv/.keras  ## The Keras 3 -> LiteRT half, with only its extras.
	@$(PY) examples/demo_keras.py

test: .venv/.dev  ## Set up, then the tests, a file on each of two processes.
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.dev  ## The tests that take longer than a minute.
	$(PY) -m pytest -m slow

lint: .venv/.dev  ## ruff: rules and format.
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.dev  ## mypy --strict on src.
	.venv/bin/mypy

readme: demo  ## Write the measured tables of README.md from the demo's reports.
	.venv/bin/whet report out/demo/torch/report.json --into README.md --marker demo-torch --made-by "make demo-torch"
	.venv/bin/whet report out/demo/keras/report.json --into README.md --marker demo-keras --made-by "make demo-keras"

clean:  ## Remove what the targets made.
	rm -rf .venv out

.venv/.made:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.made pyproject.toml constraints.txt
	@echo "Setting up .venv with PyTorch and ONNX Runtime (once) ..."
	$(PIP_INSTALL) '.[torch,onnx,demo]'
	@touch $@

.venv/.keras: .venv/.made pyproject.toml constraints.txt
	@echo "Setting up .venv with Keras, TensorFlow and LiteRT (once) ..."
	$(PIP_INSTALL) '.[keras,litert,demo]'
	@touch $@

.venv/.dev: .venv/.made pyproject.toml constraints.txt
	@echo "Setting up .venv with everything the tests need (once) ..."
	$(PIP_INSTALL) '.[dev]'
	@touch $@ .venv/.torch .venv/.keras
