# make demo: a first result on any machine. make test: lint, types and the whole test suite.
PYTHON ?= python3
.PHONY: demo test test-gpu lint clean

demo: .venv/demo.stamp
	.venv/bin/podsim simulate azure-conv-like --attention pod --out results/demo

test: .venv/test.stamp lint
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile

# Where the GPU is; PYTHON must have torch, triton, pytest and podsim's dependencies.
test-gpu:
	$(PYTHON) -m pytest tests/test_kernels_attention.py tests/test_kernels_elementwise.py \
		tests/test_kernels_llama.py tests/test_kernels_paged_engine.py tests/test_offloaded_layers.py

lint: .venv/test.stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "podsim needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet --editable .
	touch $@

.venv/test.stamp: .venv/bin/python pyproject.toml
	.venv/bin/python -m pip install --quiet --editable '.[test]'
	touch $@ .venv/demo.stamp

clean:
	rm -rf .venv results build dist *.egg-info
