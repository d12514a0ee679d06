# make demo    install, learn ten tasks of permuted digits with HALRP and STL, print both
# make test    install with the test extra, lint, format check, pytest
# make reproduction    docs/reproduction.md and its figures from docs/records
# make test-slow    the tests that take minutes: thirty kills
# make accelerator-wheels    .whl/: what a machine with jax, flax, optax, orbax and chex may lack
PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

.PHONY: demo test test-slow reproduction accelerator-wheels environment test-environment clean

demo: environment
	$(BIN)/python -m halrp_jax.main --config=configs/digits.py --workdir=$(RUNS)/digits-halrp --overwrite
	$(BIN)/python -m halrp_jax.main --config=configs/digits.py:stl --workdir=$(RUNS)/digits-stl --overwrite
	$(BIN)/python -m halrp_jax compare $(RUNS)/digits-halrp $(RUNS)/digits-stl

test: test-environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

test-slow: test-environment
	$(BIN)/python -m pytest -m slow -rP

reproduction: environment
	$(BIN)/python -m halrp_jax report --runs=docs/records --out=$(RUNS)/report --docs=docs

# site/: the documents and the reference of the code; a link that leads nowhere is an error
.PHONY: docs
docs: .venv/installed-docs
	$(BIN)/zensical build --clean --strict
	$(BIN)/python .ci/check_site.py site

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

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

clean:
	rm -rf .venv build *.egg-info
