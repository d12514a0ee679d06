# make demo    install, learn ten tasks of permuted digits with HALRP and STL, print both
# make test    install with the test extra, lint, format check, type check, pytest
# make test-all    test, then the slow tests, then those that need an extra (.venv-all)
# make test-newest    pytest with the newest releases that setup.cfg admits (.venv-newest)
# make test-oldest    pytest with the oldest ones (.venv-oldest)
# make wheel    dist/: sdist and wheel; learns digits with the wheel outside of this folder
# make reproduction    docs/reproduction.md and its figures from docs/records
# make docs    site/: the documents and the reference of the code, as a site
# make accelerator-wheels    .whl/: what a machine with jax, flax, optax, orbax and chex may lack
# PYTHON=python3.12 make ...    another interpreter for an environment that is made
# HALRP_TEST_CACHE=DIR make test    keeps compiled programs from one run of the tests to the next
NEWEST := $(or $(PYTHON),python3.13)
OLDEST := $(or $(PYTHON),python3.11)
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

.PHONY: demo test test-all test-newest test-oldest forget-old-programs wheel reproduction docs \
  accelerator-wheels environment test-environment clean

demo: environment
	$(BIN)/python -m halrp_jax.main --config=configs/digits.py --workdir=$(RUNS)/digits-halrp --overwrite
	$(BIN)/python -m halrp_jax.main --config=configs/digits.py:stl --workdir=$(RUNS)/digits-stl --overwrite
	$(BIN)/python -m halrp_jax compare $(RUNS)/digits-halrp $(RUNS)/digits-stl

test: test-environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest

# An import fails where an extra is not installed, instead of skipping its tests. One process each:
# TensorFlow and PyTorch crash together.
test-all: test .venv-all/installed
	$(BIN)/python -m pytest -m slow -rP
	for package in grain huggingface_hub tensorflow timm; do .venv-all/bin/python -c "import $$package" || exit 1; done
	.venv-all/bin/python -m pytest -m extra

test-newest: .venv-newest/created
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[test]'
	.venv-newest/bin/python -m pytest

test-oldest: .venv-oldest/created
	.venv-oldest/bin/python -m pip install --quiet 'uv >= 0.13, < 1'
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python \
	  --resolution lowest-direct --editable '.[test]'
	.venv-oldest/bin/python -m pytest

wheel: environment
	$(BIN)/python -m pip install --quiet --editable '.[release]'
	.ci/wheel $(BIN)/python

# Of compiled programs that HALRP_TEST_CACHE keeps, those that no run of the last month has used.
forget-old-programs:
	[ ! -d "$(HALRP_TEST_CACHE)" ] || \
	  find "$(HALRP_TEST_CACHE)" -type f -name '*-cache' -mtime +30 -atime +30 -delete

reproduction: environment
	$(BIN)/python -m halrp_jax report --runs=docs/records --out=$(RUNS)/report --docs=docs

# site/: the documents and the reference of the code; a link that leads nowhere is an error
docs: .venv/installed-docs
	$(BIN)/zensical build --clean --strict
	$(BIN)/python .ci/check_site.py site

# Pillow: one that reads AVIF, as the packed images of benchmarks/accelerator.py are
accelerator-wheels:
	rm -rf .whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
	  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
	  --dest .whl 'ml-collections >= 1.1, < 2' 'Pillow >= 11.3, < 14' 'platformdirs >= 4.3, < 6'

environment: .venv/installed
test-environment: .venv/installed-test

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

.venv-all/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-all
	.venv-all/bin/python -m pip install --quiet --upgrade pip
	.venv-all/bin/python -m pip install --quiet --editable '.[test,tfds,bench,hub,images]'
	touch $@

.venv-newest/created:
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	touch $@

.venv-oldest/created:
	$(OLDEST) -m venv .venv-oldest
	touch $@

clean:
	rm -rf .venv .venv-all .venv-newest .venv-oldest build dist *.egg-info
