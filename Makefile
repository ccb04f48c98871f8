# Two commands do all the set-up on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
PORT ?= 3000
BUNDLE ?= bundles/mini
BIN := .venv/bin

.PHONY: setup run test test-optimum kit test-kit check clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--editable '.[training,export,serving,batch,formats,ray,benchmarks,cpu,dev]'
	touch $@

# A new bundle wherever the weights or the form of bundles change. Eight prompts are compared here,
# to be quick; `python -m export models/mini` compares sixty-four.
bundles/mini/bundle.json: models/mini/provenance.json models/mini/classifier/report.json \
		models/mini/classifier/intake.json \
		dermaflux/manifest.py | .venv/.complete
	$(BIN)/python -m export models/mini --out bundles/mini --prompts 8

run: setup $(BUNDLE)/bundle.json
	DERMAFLUX_BUNDLE=$(BUNDLE) BENTOML_DO_NOT_TRACK=true \
		$(BIN)/bentoml serve serving.service:DermaFlux --host 127.0.0.1 --port $(PORT)

# Trainers have a process of their own, as in use.
test: setup
	$(BIN)/python -m pytest --ignore=tests/training
	$(BIN)/python -m pytest tests/training

# Optimum needs transformers 4, so an environment of its own; not part of `make test`.
.venv-optimum/.complete: pyproject.toml constraints-optimum.txt
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install --quiet --constraint constraints-optimum.txt '.[optimum]'
	touch $@

test-optimum: .venv-optimum/.complete $(BUNDLE)/bundle.json
	DERMAFLUX_TEST_BUNDLE=$(BUNDLE) .venv-optimum/bin/python -m pytest tests/optimum

# Servers to compare with. Apart, since they bring another event loop, which uvicorn would take for our
# service too; all else is that of .venv.
.venv-rivals/.complete: .venv/.complete constraints-rivals.txt
	$(PYTHON) -m venv .venv-rivals
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-rivals/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	.venv-rivals/bin/pip install --quiet --constraint constraints.txt \
		--constraint constraints-rivals.txt litserve fastapi uvicorn
	touch $@

# Everything that a machine without a network needs, in one folder; SIGN=site.key signs its sums. For
# another BUNDLE, FIGURES names its checkpoint and evaluation for the model cards, or is empty.
KIT ?= dist/kit
FIGURES ?= --reports models/mini --evaluation docs/classifier.md
kit: setup $(BUNDLE)/bundle.json
	$(BIN)/python -m deploy.kit $(BUNDLE) --out $(KIT) $(FIGURES) $(if $(SIGN),--sign $(SIGN))

# Installs it in an empty environment with the network off, and serves from there; takes minutes, so
# not part of `make test`.
test-kit: kit
	DERMAFLUX_TEST_KIT=$(KIT) $(BIN)/python -m pytest tests/deploy/airgap.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-optimum bundles build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
