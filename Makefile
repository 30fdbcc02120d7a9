# make demo: synthetic voices, training, evaluation.  make test: lint and tests.  Both install exact versions:
# requirements.lock and requirements-dev.lock. `make lock` refreshes them from the ranges of requirements*.txt.
PYTHON ?= python3
VENV := .venv
BINARIES := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(BINARIES)
TESTS :=

.PHONY: demo test lint docs lock test-newest test-oldest clean

demo: $(VENV)/.installed
	$(BIN)/python make_demo_data.py --out data/demo
	$(BIN)/python trainSpeakerNet.py --config configs/demo.yaml

test: lint
	$(BIN)/python -m pytest -q -n auto $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed
	$(BIN)/python -m settings.reference > docs/configuration.md

$(VENV)/.installed: requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r $<
	touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r $<
	touch $@

# ------------------------------------------------------------------------------------------------- the lock
# The newest pair that loads together and has wheels for every Python from 3.10 to 3.14; the packages' metadata do not
# say which pairs load. The CUDA libraries are left out: torch's CUDA wheel asks for its own by exact version, and its
# CPU wheel needs none. There are no hashes, since the CPU wheel of the same version has another.
TORCH := torch==2.14.1 torchaudio==2.11.1
COMPILE = cd .venv-lock && $(BINARIES)/python -m uv pip compile --quiet --universal --python-version 3.10 --upgrade \
	--no-header --no-annotate --constraints pair.txt

lock:
	test -x .venv-lock/$(BINARIES)/python || $(PYTHON) -m venv .venv-lock
	.venv-lock/$(BINARIES)/python -m pip install --quiet --upgrade uv
	printf '%s\n' $(TORCH) > .venv-lock/pair.txt
	$(COMPILE) ../requirements.txt --output-file all.lock
	$(COMPILE) ../requirements-dev.txt --constraints all.lock --output-file all-dev.lock
	for name in '' -dev; do { echo "# Made by \`make lock\` from requirements$$name.txt, for Python 3.10 to 3.14."; \
		grep -vE '^(nvidia|cuda|triton)' .venv-lock/all$$name.lock | sed 's|\.\./||g'; } > requirements$$name.lock; done

# ------------------------------------------------------------------------- the ends of the range, each in its own folder
# The newest of everything that requirements*.txt allows and this Python can have, and the oldest, for which Python 3.10
# to 3.12 is needed. TESTS="tests/scoring tests/test_export.py" runs a part.
OLDEST_PYTHON ?= python3.10

test-newest: .venv-newest/.installed
	.venv-newest/$(BINARIES)/python -m pytest -q -n auto $(TESTS)

test-oldest: .venv-oldest/.installed
	.venv-oldest/$(BINARIES)/python -m pytest -q -n auto $(TESTS)

.venv-newest/.installed: requirements.txt requirements-dev.txt
	test -x .venv-newest/$(BINARIES)/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/$(BINARIES)/python -m pip install --quiet --upgrade --upgrade-strategy eager -r requirements-dev.txt
	touch $@

.venv-oldest/.installed: requirements.txt requirements-dev.txt
	test -x .venv-oldest/$(BINARIES)/python || $(OLDEST_PYTHON) -m venv .venv-oldest
	.venv-oldest/$(BINARIES)/python -m pip install --quiet --upgrade uv
	.venv-oldest/$(BINARIES)/python -m uv pip compile --quiet --resolution lowest-direct requirements-dev.txt \
		--python .venv-oldest/$(BINARIES)/python --output-file .venv-oldest/oldest.txt
	.venv-oldest/$(BINARIES)/python -m pip install --quiet -r .venv-oldest/oldest.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-lock .venv-newest .venv-oldest data/demo exps/demo
