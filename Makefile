# make demo | test | test-browser | lab | book | bench | lint: each sets up .venv first if it is not there, and a
# second call installs nothing.
# PYTHON= names the interpreter, TORCH_INDEX= the index torch comes from, JOBS= the number of test processes.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.complete

# Processes, not threads: the tests' matrices are small. More than eight only crowd the memory.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
TESTS ?=

# Arguments of the benchmark.
BENCH ?=

# What the demo continues, and how many held-out bytes it compares on.
PROMPT ?= class Reader:
DEMO_BYTES ?= 2000

.PHONY: help demo test test-browser lab book bench lint setup

help:
	@echo "make demo   quantize the shipped model, decode text, compare bf16 with NVFP4"
	@echo "make test   all tests and notebooks (TESTS=tests/test_cli.py for some of them)"
	@echo "make test-browser  every notebook in JupyterLab in Chromium, pictures in build/browser"
	@echo "make lab    JupyterLab on the notebooks"
	@echo "make book   HTML pages of the notebooks with outputs, in build/book"
	@echo "make bench  time the operations, each checked first (BENCH='--shapes flash:1' for other shapes)"
	@echo "make lint   ruff check and format check"

setup: $(READY)

$(READY): pyproject.toml constraints.txt .ci/setup
	@VENV=$(VENV) .ci/setup

demo: $(READY)
	@dir=$$(mktemp -d) && trap 'rm -rf "$$dir"' EXIT && set -ex && \
	$(BIN)/python -m dsv4lab quantize data/nano "$$dir/nano-nvfp4" && \
	$(BIN)/python -m dsv4lab decode --model "$$dir/nano-nvfp4" --prompt '$(PROMPT)' --max-new-tokens 250 && \
	$(BIN)/python -m dsv4lab evaluate --max-bytes $(DEMO_BYTES)

# Not `python -m pytest`, which puts this folder on the path, and its kernels/ in the place of other packages'.
test: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n $(JOBS) $(TESTS)

# Apart from `test`: it needs a browser, Playwright, and some minutes. TESTS="-k 01_" takes one notebook.
test-browser: $(READY)
	@.ci/chromium
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[browser]'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/pytest -n 0 -m browser -rs tests/test_browser.py $(TESTS)

lab: $(READY)
	$(BIN)/python -m dsv4lab lab

book: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m dsv4lab notebooks --html build/book

bench: $(READY)
	$(BIN)/python -m dsv4lab bench $(BENCH)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
