# xcloud: `make train` and `make test` are all a newcomer needs; `make help` lists the rest.
#
#   PYTHON=python3.12      the interpreter the environment is made with (3.10 to 3.13)
#   TORCH_INDEX=URL        a package index to take torch from. The default torch for Linux brings
#                          gigabytes of CUDA libraries with it; on a machine without a GPU, give the
#                          address of the CPU wheel index named on PyTorch's "Get started" page.
#   JOB=jobs/other.yaml    the job `make train` runs
#   ARGS="..."             passed on to `make train`, `test`, `bench` and `lock`

PYTHON ?= python3
JOB ?= jobs/three_clouds.yaml
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
TORCH := $(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)

# DeepSpeed is installed from source: never compile its CUDA operators for that.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help train test test-all check fix lock bench install install-dev clean distclean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1	/' | expand -t 20

train: $(VENV)/.installed  ## set up (once) and train one model across three clouds
	@$(BIN)/xcloud train $(JOB) $(ARGS)

test: $(VENV)/.installed-dev  ## set up (once) and run the tests
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/.installed-dev  ## the tests, slow ones included
	@$(BIN)/python -m pytest -m "slow or not slow" $(ARGS)

check: $(VENV)/.installed-dev  ## lint, format, types, layers, security lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --output-format concise .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/bandit --quiet --recursive --configfile pyproject.toml xcloud

fix: $(VENV)/.installed-dev  ## fix what the linter and the formatter can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## run one benchmark: make bench NAME=round_overhead (no NAME: list them)
	@$(BIN)/python -m benchmarks $(NAME) $(ARGS)

lock: $(VENV)/.installed-dev  ## write constraints.txt anew (ARGS=--upgrade takes newer versions)
	@$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --all-extras \
		--no-annotate --quiet --output-file constraints.txt $(ARGS)

install: $(VENV)/.installed  ## only set up what training needs

install-dev: $(VENV)/.installed-dev  ## set up, with the tools for tests and checks

clean:  ## remove caches and build outputs (keeps .venv and runs)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . \( -name .venv -o -name .git -o -name runs \) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean  ## remove the environment too
	@rm -rf $(VENV)

# Each stamp below is touched last, so an interrupted installation is taken up again.

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || \
		{ echo "$(PYTHON): not found. Install Python 3.10 to 3.13 (Debian: apt-get install python3 python3-venv), or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1); xcloud needs Python 3.10 to 3.13. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module. Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version 2>&1)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# torch on its own and without its dependencies: an index that has only torch will do, and the
# step below adds just what the installed build of torch asks for.
$(VENV)/.torch-$(TORCH): $(VENV)/.created
	@echo "Installing torch $(TORCH) ... (once, a few minutes)"
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch==$(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch-$(TORCH)
	@echo "Installing the locked dependencies ... (once, a few minutes)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests and checks ... (once, less than a minute)"
	@$(PIP) --editable '.[dev]'
	@touch $@
