# Every target first makes .venv with everything the project needs; a second call costs nothing.
PYTHON ?= python3
BIN := .venv/bin

# Programs start several times faster with their bytecode on disk, and the tests start many.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo up test lint style pyright pytest format audit bench bench-receiver soak fuzz clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: .venv/.installed ## create .venv and install everything

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install ## everything at once: Redis, receiver and Dagster, fed with generated records
	$(BIN)/d2p demo $(ARGS)

up: install ## Redis, receiver and Dagster in the foreground
	$(BIN)/d2p up $(ARGS)

test: style ## lint, types and all tests; FULL_SIZE=1 for more records and batches where the number matters
	$(MAKE) --jobs=2 pyright pytest

lint: style pyright ## ruff and pyright

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

pyright: install
	$(BIN)/pyright

pytest: install
	$(BIN)/pytest -n 4 --dist worksteal $(ARGS)

format: install ## let ruff rewrite the tree
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: install ## known vulnerabilities of the pinned dependencies; needs the network
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

bench: install ## time the engine against others
	$(BIN)/python -m benchmarks $(ARGS)

bench-receiver: install ## time the HTTP receiver against a plain one (needs wrk), and the other doors
	$(BIN)/python -m benchmarks.receiver $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m benchmarks.doors)

soak: install ## schedules of faults, their books as lines of JSON; ARGS="FIRST COUNT", "--real" or "--hours H"
	$(BIN)/python -m d2p_pipeline_tests.faults $(ARGS)

fuzz: install ## fuzz every decoder of strangers' bytes, SECONDS=30 each; installs atheris
	$(BIN)/pip install --quiet --disable-pip-version-check atheris || { echo "atheris does not install here"; exit 1; }
	for target in body record frames compressed chunks document message letter http; do \
		$(BIN)/python -m d2p_pipeline_tests.fuzz $$target -max_total_time=$${SECONDS:-30} -timeout=20 || exit 1; done

clean: ## remove the environment and all local state
	rm -rf .venv .d2p out
