# Two commands from a fresh clone: `make demo` and `make test`. Everything else is a part of them.

PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.ready

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE  # without bytecode every command compiles torch again

.PHONY: demo test check format install test-gpu clean

demo: $(SETUP)  ## the whole pipeline on the embedded model: CPU, offline, minutes
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

test: check  ## checks, then the test suite with its coverage floor
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --cov

check: $(SETUP)  ## style, types, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(SETUP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-gpu: $(SETUP)  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

install: $(SETUP)

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'nexus needs Python 3.11 or newer')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(SETUP)

clean:
	rm -rf .venv runs .coverage* .mypy_cache .ruff_cache .pytest_cache
