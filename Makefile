# Two commands do all the set-up on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
PORT ?= 3000
BUNDLE ?= bundles/mini
BIN := .venv/bin

.PHONY: setup run test check clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--editable '.[training,export,serving,benchmarks,cpu,dev]'
	touch $@

bundles/mini/bundle.json: models/mini/provenance.json models/mini/classifier/report.json | .venv/.complete
	$(BIN)/python -m export models/mini --out bundles/mini

run: setup $(BUNDLE)/bundle.json
	DERMAFLUX_BUNDLE=$(BUNDLE) BENTOML_DO_NOT_TRACK=true \
		$(BIN)/bentoml serve serving.service:DermaFlux --port $(PORT)

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv bundles build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
