# make venv    .venv with everything the tests need, at the versions of constraints.txt
# make demo    set up, then a first verdict on this machine
# make test    set up, then every test that this machine can run
# make check   set up, then formatting, lint, types and import rules
# make clean   remove .venv and every cache

PYTHON ?= python3
PY := .venv/bin/python

.PHONY: venv demo test check clean

venv: .venv/.installed

.venv/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Assay needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make venv PYTHON=python3.11" >&2; \
	  exit 1; }
	@echo "Setting up .venv (the first time downloads torch: a minute or more)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[models,dev]'
	@touch $@

demo: venv
	@scripts/demo

test: venv
	@scripts/test

check: venv
	@scripts/check

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist src/*.egg-info
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
