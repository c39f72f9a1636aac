# make serve        everything from a fresh clone to a server on http://127.0.0.1:8000 (PORT=9000 changes the port)
# make setup        virtual environment in .venv, packages, sample images; quick when nothing changed
# make test         the tests; make test-slow adds those that take minutes or gigabytes
# make fuzz         seeded fuzzing of untrusted bytes, minutes
# make docs         the site from docs/ into site/, every warning an error
# make test-faults  hundreds of kills with SIGKILL, of server, training, scoring and stores; FAULT_SEED=... repeats a run
# make test-gpu     the tests on a CUDA device, a minute; they skip with a reason without one. Then: python benchmarks/gpu.py
# make test-browser the tests in a real browser; needs chromium, nodejs and npm (Debian's), skips with a reason without them
# make pacs         Orthanc (Debian's) on 127.0.0.1:8042 with the sample images in it; then make serve STUDIES=http://127.0.0.1:8042/dicom-web
# make s3-tools     an S3 server (moto) for the tests, in an environment of its own; `make test` brings it
# make wheel        the wheel into dist/: package, app, pages, weights and MONAI Label itself, for `pip install`
# make test-wheel   the wheel in an empty environment: serve, a prompt over HTTP, predict, evaluate; minutes
# make test-image   the steps of the Dockerfile without a container engine, and the server as the image starts it; minutes
# make lock         requirements.lock from requirements.txt, after a pin has changed
# make sbom         the bill of materials of what is installed, CycloneDX, into dist/
# make check-files  Dockerfile, compose files, shell scripts, workflows and forms of GitHub
# make check        ruff, mypy, import-linter; the types of the pages where npm is
# make audit        what is installed against the known advisories; those that were looked at are in .ci/advisories.toml
# make api-types    the types of the server's answers for the pages, after a route has changed; needs npm
#
# PYTHON=...        the interpreter for .venv (3.11, 3.12 or 3.13)
# TORCH=...         what to hand to `pip install` for PyTorch. The default takes PyPI's build, which brings CUDA on Linux;
#                   for another one, e.g.  make setup TORCH="torch==2.13.0 --index-url <the PyTorch index of your CUDA version>"
# STUDIES=...       the folder of images or DICOMweb address to serve
# CONF="--conf device cuda --conf backbone <folder or hub id>"   options of the app, see docs/reference/options.md

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
TORCH   ?= torch==2.13.0
HOST    ?= 127.0.0.1
PORT    ?= 8000
STUDIES ?= sample_datastore
CONF    ?=

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.setup-done
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: setup serve test fuzz docs test-slow test-faults test-gpu test-browser pacs check check-pages page-tools api-types audit
.PHONY: wheel test-wheel test-image lock sbom check-files packaging-tools s3-tools

setup: $(STAMP)
	@$(BIN)/python sample_datastore/prepare.py

$(STAMP): requirements.txt requirements-host.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} was found, and 3.11, 3.12 or 3.13 is needed. Install one and name it: make setup PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing packages into $(VENV) (a few minutes the first time)"
	@$(PIP) install --upgrade pip
	@$(PIP) install $(TORCH)
	@$(PIP) install -r requirements.txt -r requirements-dev.txt
	@$(PIP) install --no-deps -r requirements-host.txt
	@$(PIP) install --no-deps --editable .
	@touch $(STAMP)

serve: setup
	@echo "Serving $(STUDIES) on http://$(HOST):$(PORT) (stop with Ctrl-C)"
	@$(BIN)/python -m progidiff.cli serve --studies "$(STUDIES)" --host $(HOST) --port $(PORT) $(CONF)

# Two at a time, one file of tests never in both: what a file starts (a server, a training) it starts once.
TESTERS ?= 2

test: setup s3-tools
	$(BIN)/python -m pytest -n $(TESTERS) --dist loadfile

fuzz: setup
	$(BIN)/python -m pytest -m fuzz tests/fuzz

docs: setup
	@$(PIP) install -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-slow: setup s3-tools
	$(BIN)/python -m pytest -m "not fuzz and not browser and not gpu"

FAULT_SEED          ?= $(shell date +%s)
FAULT_ROUNDS        ?= 400
FAULT_SERVER_ROUNDS ?= 24

test-faults: setup
	FAULT_SEED=$(FAULT_SEED) FAULT_ROUNDS=$(FAULT_ROUNDS) FAULT_SERVER_ROUNDS=$(FAULT_SERVER_ROUNDS) $(BIN)/python -m pytest -s tests/faults

test-gpu: setup
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

test-browser: setup
	@command -v npm > /dev/null && npm ci --prefix tests/browser --no-audit --no-fund --silent || echo "Without npm the browser tests are skipped."
	$(BIN)/python -m pytest -m browser -rs tests/browser

pacs: setup
	@$(BIN)/python pacs/run.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=lib $(BIN)/lint-imports
	@$(MAKE) --no-print-directory check-pages

audit: setup
	@$(PIP) install -r requirements-audit.txt
	@$(BIN)/python .ci/audit.py

page-tools:
	@command -v npm > /dev/null && npm ci --prefix tests/pages --no-audit --no-fund --silent || echo "There is no npm (Debian: nodejs npm), or it reaches no registry."

check-pages: page-tools
	@if test -x tests/pages/node_modules/.bin/tsc; then npm run --prefix tests/pages --silent check; else echo "Without the tools of npm the types of the pages are not checked."; fi

api-types: setup page-tools
	PYTHONPATH=lib:tests $(BIN)/python -m support.api_types

wheel: setup
	@rm -f dist/progidiff-*.whl
	@$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --wheel-dir dist .
	@ls -l dist/progidiff-*.whl

test-wheel: setup
	@$(BIN)/python packaging/check_wheel.py --torch "$(TORCH)"

test-image: setup
	@$(BIN)/python packaging/check_image.py --torch "$(TORCH)"

# Tools with requirements of their own, away from the packages that are tested.
TOOLS := $(VENV)/packaging-tools

packaging-tools: $(TOOLS)/.done

$(TOOLS)/.done: requirements-packaging.txt | $(STAMP)
	@$(BIN)/python -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements-packaging.txt
	@touch $@

# Amazon's own packages want an older python-dateutil than the one that is tested with, so the server has a place apart.
S3_TOOLS := $(VENV)/s3-tools

s3-tools: $(S3_TOOLS)/.done

$(S3_TOOLS)/.done: requirements-s3.txt | $(STAMP)
	@$(BIN)/python -m venv $(S3_TOOLS)
	@$(S3_TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install -r requirements-s3.txt
	@touch $@

lock: packaging-tools
	@packaging/lock.sh $(TOOLS)/bin/uv

sbom: packaging-tools
	@mkdir -p dist
	@$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json $(BIN)/python
	@ls -l dist/sbom.cdx.json

check-files: packaging-tools
	@PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" packaging/check_files.sh
