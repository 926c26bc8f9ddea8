# Everything a newcomer needs: `make demo`, `make demo-image`, `make demo-dpo`, `make demo-grpo`, `make wan-digits`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo demo-image demo-dpo demo-grpo wan-digits static test slow nightly lint parity docs clean

install: $(VENV)/.ready

# torch first and by exact version: a plain range may pull another build
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep -E '^(torch|torchvision)==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $@

demo: install
	$(BIN)/python examples/digits/demo.py --dir runs/demo

demo-image: install
	$(BIN)/python examples/digits-image/demo.py --dir runs/demo-image

demo-dpo: install
	$(BIN)/python examples/digits-dpo/demo.py --dir runs/demo-dpo

demo-grpo: install
	$(BIN)/python examples/digits-grpo/demo.py --dir runs/demo-grpo

wan-digits: install
	$(BIN)/python examples/wan-digits/demo.py --dir runs/wan-digits

# what needs neither torch nor a model: seconds
static: install
	$(BIN)/python -m pytest tests/static

test: install
	$(BIN)/python -m pytest -n 2

slow: install
	$(BIN)/python -m pytest -n 2 -m slow

nightly: install
	$(BIN)/python -m pytest -n 2 -m nightly

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

parity: install
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/parity.py --dtype float32

docs: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site
