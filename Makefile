# Two commands matter: `make demo` (raw text to a trained, exported model) and `make test`.
# Each makes .venv and fills it when something is missing or requirements/ changed.
#   PYTHON=python3.12   interpreter of a new .venv
#   TORCH=torch==2.11.0 another release of torch for a new .venv
#   JOBS=8              processes of the test suite

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-for-demo
# Downloads break off: three tries, of which the later ones find in pip's cache what came through before.
install = for try in 1 2 3; do $(BIN)/python -m pip --disable-pip-version-check install $(1) && exit; done; exit 1
# What only GPUs use is left out: no test here can run it, and its newest releases bring 500 MB along.
REQUIREMENTS := $(filter-out requirements/gpu.txt,$(wildcard requirements/*.txt))
DEMO_REQUIREMENTS := $(foreach name,runtime export tensorboard plot,requirements/$(name).txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO_STAMP) ## train, evaluate, kill, resume and export a small model on this machine
	$(BIN)/python tools/demo.py

# The tests of a file share fixtures and references, hence a process; tests/conftest.py puts the files in order.
test: lint ## style, types and the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove caches and build outputs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv and runs/ too
	rm -rf $(VENV) runs

# A half-made .venv has no pip, so the next try starts over.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' here; name a Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or newer is needed: make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "python cannot make a .venv here (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# torch first and pinned: a range would take the newest release, tested or not.
$(DEMO_STAMP): $(DEMO_REQUIREMENTS) requirements/constraints.txt setup.py pyproject.toml | $(BIN)/pip
	@echo "installing requirements into $(VENV) (only when they changed; torch is some 200 MB on a CPU)"
	$(call install,"$(TORCH)")
	$(call install,-c requirements/constraints.txt "$(TORCH)" "setuptools>=77" $(DEMO_REQUIREMENTS:%=-r %))
	$(call install,--no-deps --no-build-isolation -e .)
	@touch $@

$(STAMP): $(REQUIREMENTS) $(DEMO_STAMP)
	$(call install,-c requirements/constraints.txt "$(TORCH)" $(patsubst %,-r %,$(filter-out %constraints.txt,$(REQUIREMENTS))))
	@touch $@
