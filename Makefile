# Everything runs in the environment that scripts/setup_env.py makes; 'make help' lists the targets.

VENV ?= .venv
NP ?= 2
KIT ?= .kit
ARGS ?=

BIN := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin
# The programs of the environment (mpirun, horovodrun, pytest, ...) come first.
IN_VENV := PATH="$(BIN):$$PATH"
# Options of 'make experiments'.
EXPERIMENTS := $(if $(ONLY),--only '$(ONLY)') $(if $(SEEDS),--seeds $(SEEDS)) $(if $(LIST),--list) $(if $(QUICK),--quick)

# Open MPI refuses to work for root unless it is told twice; in a container, root is often the only user.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

# Images of containers like to set it; then every start of every rank would compile torch's modules again.
unexport PYTHONDONTWRITEBYTECODE

# For the set-up and the kit, which run outside of the environment.
define FIND_PYTHON
python="$(PYTHON)"; \
for candidate in python3.11 python3.12 python3.13 python3; do \
    test -z "$$python" || break; \
    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; fi; \
done; \
if ! command -v "$$python" >/dev/null; then \
    echo "setup: Python 3.11 or newer is needed and $${python:-none} was not found: install it (for example" \
        "'apt install python3.11 python3.11-venv' or 'module load python') or name it with PYTHON=." >&2; \
    exit 2; \
fi
endef

.DEFAULT_GOAL := help
.PHONY: help setup gpu-kit demo experiments test test-unit test-parallel test-gpu test-cluster lint ruff mypy format clean distclean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "Variables: VENV=.venv  NP=2 (ranks of the demo)  ARGS=... (more arguments for the demo or pytest)"
	@echo "           PYTHON=python3.11  MPI=wheel|system|none  GPU=0|1  TORCH=x.y.z TORCHVISION=a.b.c  TORCH=installed"
	@echo "           OFFLINE=folder (of the set-up)"
	@echo "           KIT=.kit  PYTHON_VERSION=3.12  INSTALLED=list (of 'pip list --format=freeze' there; of the kit)"
	@echo "'python3 scripts/setup_env.py --help' explains those of the set-up."

setup: ## Make the environment, or complete it: venv, packages, MPI and Horovod
	@$(FIND_PYTHON); \
	VENV="$(VENV)" "$$python" scripts/setup_env.py

gpu-kit: ## Collect a folder for 'make setup OFFLINE=' on a GPU machine without a package index
	@$(FIND_PYTHON); \
	"$$python" scripts/offline_kit.py --folder "$(KIT)" $(if $(PYTHON_VERSION),--python $(PYTHON_VERSION)) \
	    $(if $(INSTALLED),--installed "$(INSTALLED)") $(if $(MPI),--mpi $(MPI))

demo: setup ## Train a small detector on a synthetic data set with NP ranks
	$(IN_VENV) horovodrun -np $(NP) "$(BIN)/python" train.py --config configs/demo.yaml $(ARGS)

experiments: setup ## Make the missing runs of docs/findings.md, and the page (ONLY='k08_*' SEEDS=1 LIST=1 QUICK=1)
	$(IN_VENV) python -m experiments $(EXPERIMENTS)

test: test-unit test-parallel ## Run the unit tests and the tests with several ranks

test-unit: setup ## Run the unit tests, several at a time
	$(IN_VENV) python -m pytest tests/unit -n auto --maxprocesses 8 $(ARGS)

test-parallel: setup ## Run the tests with several ranks, several files at a time
	$(IN_VENV) python -m pytest tests/parallel -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-gpu: setup ## Run the tests that need an NVIDIA GPU
	$(IN_VENV) python -m pytest tests/gpu $(ARGS)

test-cluster: setup ## Run the tests that need several hosts, on two sets of hosts at a time
	$(IN_VENV) python -m pytest tests/cluster -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: ruff mypy ## Check style, format and types

ruff: setup ## Check style and format only
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .

mypy: setup ## Check types only
	$(IN_VENV) mypy

format: setup ## Format the sources and sort the imports
	$(IN_VENV) ruff check --select I --fix .
	$(IN_VENV) ruff format .

clean: ## Remove what was built, cached, trained and generated, but not the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs data/synthetic
	find . -path "./$(VENV)" -prune -o -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean ## Remove the environment as well
	@if test -e "$(VENV)/.setup"; then echo "rm -rf $(VENV)"; rm -rf "$(VENV)"; fi
