# Every target makes .venv first, with the versions that requirements/constraints.txt pins.
PYTHON ?= python3
# More arguments for installing torch, such as an index of CPU or CUDA builds.
TORCH_ARGS ?=
# Arguments of examples/byte_lm.py, such as --seconds 60.
DEMO_ARGS ?=
# What a process has compiled, the next one reads: pytest's own form of the tests, and the package.
export PYTHONDONTWRITEBYTECODE :=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint requirements/constraints.txt
APART := examples/byte_lm.py examples/byte_lm_report.py examples/tensor_parallel.py \
	examples/fp8_training.py
EXAMPLES := $(filter-out $(APART),$(wildcard examples/*.py))
VERSIONS ?= 2.9 2.11 2.14 2.15
SMOKE := $(patsubst %,tests/%.py,test_versions base/test_errors test_main guards/test_torch_private \
	plan/test_planner replay/test_calling replay/test_host ops/test_transposed ops/test_scaled_add \
	run/test_sequential run/test_autograd features/test_compile precision/test_recipe \
	precision/test_recipes_compile precision/test_delayed precision/test_weights \
	layernorm_mlp/test_module layernorm_mlp/test_interface fusers/cublaslt/test_products ops/test_ops \
	ops/test_extra_ops ops/test_lora ops/test_dequantized kernels/test_reference_quantize \
	kernels/test_scaled_mm kernels/test_cpu_kernels)
TORCHRUN := $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 2

.DEFAULT_GOAL := help
.PHONY: help venv test lint types floors unit slow soak gpu tools versions test-torch demo examples bench docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' Makefile | expand -t 16

venv: $(VENV)/installed  ## make .venv and install opsgraph in it

# torch comes first, so that no other package can choose its version.
$(VENV)/installed: pyproject.toml requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) --editable '.[test,examples,transformers]'
	touch $@

test: lint types floors unit  ## lint, types, floors and tests

lint: $(VENV)/installed  ## ruff: rules and format; the line budget
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python .ci/lines.py

types: $(VENV)/installed  ## mypy, strict
	$(BIN)/mypy

floors: $(VENV)/installed  ## import-linter: who may import whom
	$(BIN)/lint-imports

unit: $(VENV)/installed  ## pytest, two processes
	$(BIN)/python -m pytest -n 2 --dist loadgroup

tools: $(VENV)/installed  ## the tests of other tools, which are installed first (300 MB)
	$(PIP) --editable '.[tools]'
	$(BIN)/python -m pytest tests/tools -m "not gpu"

versions:  ## the smoke set with each PyTorch of VERSIONS, in .venvs (gigabytes)
	for torch in $(VERSIONS); do \
		$(PYTHON) -m venv .venvs/$$torch || exit 1; \
		.venvs/$$torch/bin/python -m pip install --quiet $(TORCH_ARGS) "torch==$$torch.*" || exit 1; \
		.venvs/$$torch/bin/python -m pip install --quiet --editable '.[test]' || exit 1; \
		.venvs/$$torch/bin/python -m pytest -q $(SMOKE) || exit 1; \
	done

test-torch:  ## the smoke set with the PyTorch of VERSION=, as 2.11, in .venvs
	@test -n "$(VERSION)" || { echo "name a PyTorch: make test-torch VERSION=2.11"; exit 2; }
	$(MAKE) versions VERSIONS="$(VERSION)"

slow: $(VENV)/installed  ## the tests that are not run every day, two processes
	$(BIN)/python -m pytest -m slow -n 2 --dist loadgroup

soak: $(VENV)/installed  ## train for an hour while everything changes; nothing may grow
	$(BIN)/python -m benchmarks.soak

gpu: $(VENV)/installed  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

demo: $(VENV)/installed  ## train a small byte-level language model; writes demo/
	$(BIN)/python examples/byte_lm.py $(DEMO_ARGS)

examples: $(VENV)/installed  ## run every example but the two that train
	for example in $(EXAMPLES); do echo "== $$example"; $(BIN)/python $$example || exit 1; done
	$(TORCHRUN) examples/tensor_parallel.py --steps 20

bench: $(VENV)/installed  ## host cost against nn.Sequential
	$(BIN)/python -m benchmarks.overhead

docs: $(VENV)/docs  ## build the documentation as a site, in site/
	$(BIN)/python -m mkdocs build --strict

$(VENV)/docs: $(VENV)/installed
	$(PIP) --editable '.[docs]'
	touch $@

clean:  ## remove .venv, .venvs, caches and everything built
	rm -rf $(VENV) .venvs build dist site demo *.egg-info .mypy_cache .pytest_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
