# Everything from a fresh clone: `make demo`, `make test`. Needs make and Python 3.11 or newer; the rest goes into .venv.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# More arguments for pytest: make test ARGS="-k config -x"; ARGS="-n 0 --pdb" runs in one process.
ARGS ?=
# A file's tests share its servers and run one after the other; files run side by side, as they are
# found: the benchmarks', which take longest, come first.
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo up test bench check format deploy-files lock images-test clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml tools/install.sh
	@tools/install.sh $(VENV)
	@touch $@

# A directory's date changes with its content; the stamp's only when an installation is through.
$(VENV): $(INSTALLED)

demo: $(INSTALLED) ## start a fleet, run real jobs on every model, show the answers, stop
	@$(BIN)/cortex demo

up: $(INSTALLED) ## run the fleet (Procfile) until Ctrl-C
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/honcho -f Procfile start || [ $$? -eq 130 ]

test: $(INSTALLED) ## run the whole test suite
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

bench: $(INSTALLED) ## measure the speed, renew the README's table and the plot (8 minutes)
	@$(BIN)/python -m benchmarks

check: $(INSTALLED) ## formatting, lint, types, import contracts, Dockerfile, compose file
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PYTHONPATH=. $(BIN)/lint-imports
	@$(BIN)/hadolint docker/Dockerfile
	@tools/check-compose.sh

format: $(INSTALLED) ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

deploy-files: $(INSTALLED) ## make the files of deployments from queues.yaml
	@$(BIN)/python -m deploy.generate

lock: $(INSTALLED) ## resolve the images' packages anew; UPGRADE=1 takes the newest
	@PATH="$(CURDIR)/$(BIN):$$PATH" tools/lock.sh

images-test: $(INSTALLED) ## build the images and run them (20 minutes the first time)
	@$(BIN)/python -m pytest -rP tests/images $(ARGS)

clean: ## remove caches and build products
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	@rm -rf $(VENV)
