# Every target works in .venv, which `make venv` builds once and again when the dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.petiole-ready
WORKERS ?= 2
# All but `timm`: it brings torchvision, whose builds want CUDA and break `import transformers` beside a CPU torch.
# Nor torchao, which makes every import of a Transformers model slower and noisy; its tests run where it is installed.
# Nor ray, which takes 240 MB; its tests are skipped where it is not installed: `pip install -c constraints.txt -e .[ray]`.
EXTRAS := demo,audio,retrieval,peft,trl,diffusers,dev,docs

# One thread a process: with several threads beside other work a step can be many times slower.
export OMP_NUM_THREADS ?= 1

.PHONY: help venv test lint types pytest format demo docs support proofs bench constraints clean

help:
	@echo "make venv    build .venv with everything the other targets need"
	@echo "make test    ruff, mypy and the whole test suite"
	@echo "make demo    petiole demo: a small comparison, from data to HTML page, on one core"
	@echo "make lint    ruff and mypy alone"
	@echo "make format  let ruff rewrite the code"
	@echo "make docs    write the tables of methods, and build the documentation into site/"
	@echo "make support try every method on every model family, and write docs/support.md"
	@echo "make proofs  run every script in proofs/"
	@echo "make bench   run every script in benchmarks/"

venv: $(READY)

# torch comes first, alone and pinned: the CPU build where pip finds one, and no newer release that a later step might prefer.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

test: lint pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: venv
	$(BIN)/python -m pytest -n $(WORKERS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: venv
	$(BIN)/petiole demo

docs: venv
	$(BIN)/python tools/make_docs.py
	$(BIN)/zensical build --clean --strict

support: venv
	$(BIN)/python tools/make_support.py

proofs: venv
	@set -e; for script in $(sort $(wildcard proofs/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

bench: venv
	@set -e; for script in $(sort $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

# Pin what .venv holds now; the local part of a version ("+cpu") is left out, so that any build of it will do.
constraints: $(BIN)/python
	$(BIN)/python -m pip freeze --exclude-editable | grep '==' | sed 's/+[a-z0-9.]*$$//' > constraints.txt
	touch $(READY)

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
