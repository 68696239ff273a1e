PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Extra arguments: make demo ARGS="--parent PATH_OR_HUB_ID --data FILE.jsonl --out runs/mine"
ARGS ?=

.PHONY: help demo test demo-parent check clean

help:
	@echo "make demo         one checkpoint, three models, a report: runs/demo/report.md"
	@echo "make test         linters, types, tests"
	@echo "make demo-parent  train the demo's parent again (about 20 minutes on two cores)"

# torch first and alone: the constraints pin it, and CPU-only indexes serve it by exact version
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m demo.run --recipe recipes/demo.yaml $(ARGS)

demo-parent: $(BIN)/.installed
	$(BIN)/python -m demo.parent --recipe recipes/demo-parent.yaml $(ARGS)

check: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: check
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs
