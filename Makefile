# make course    install into .venv (once), run notebooks 00-05 without a screen into runs/course; run again, it resumes
# make test      install into .venv (once), run the whole test suite
# make lab       open JupyterLab on copies of the notebooks, in runs/lab
# make mutants   break the formulas on purpose, one at a time, and see that the tests notice
# make bench     time rollout, scoring, PPO update and DPO step, each beside its baselines
# make docs      run the notebooks once and build the documentation site in docs/_build/html, offline
# make clean     remove .venv and caches; runs/ stays
#
# ARGS is passed on:  make course ARGS="-p seed=1"     make test ARGS="tests/test_ppo.py -x"
# PYTHON picks the Python that .venv is made from:  make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: help install course test lab mutants bench docs clean

help:
	@sed -n 's/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"alignkit needs Python 3.11 or later; $(PYTHON) is {v}. Another one: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/pip || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV): once, some minutes ..."
	@$(BIN)/python -m pip install -qq --progress-bar off --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

course: $(INSTALLED)
	@$(BIN)/alignkit course --out runs/course $(ARGS)

test: $(INSTALLED)
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile $(ARGS)

lab: $(INSTALLED)
	@$(BIN)/alignkit lab -- $(ARGS)

mutants: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ARGS)

bench: $(INSTALLED)
	@mkdir -p runs
	@$(BIN)/python -m benchmarks.steps --json runs/steps.json $(ARGS)

docs: $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python docs/site/build.py $(ARGS)

clean:
	rm -rf $(VENV) build dist docs/_build/html docs/_build/source docs/_build/doctrees .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
