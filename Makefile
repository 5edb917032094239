# Each verb creates .venv and installs what it needs; nothing outside this folder is touched.
.PHONY: install check test acceptance torture observers fuzz demo docs bench bench-growth bench-plans bench-data bench-merge bench-nf4

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

install: $(VENV)/.dev        ## the development environment

check: $(VENV)/.dev          ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check                  ## everything but the gate's long runs, on two processors, of which an idle one takes over tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not long"

acceptance: $(VENV)/.dev     ## the acceptance runbook, every row and sign-off, with a receipt
	$(BIN)/python -m mens_core gate --profile ci_full --keep-going

torture: $(VENV)/.dev        ## 208 kills at random moments, every run to end with the same bytes, ten to forty minutes
	$(BIN)/python tests/torture.py

observers: $(VENV)/.dev      ## the tests of W&B and MLflow, whose 200 MB the other tests do without
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,observers]'
	$(BIN)/python -m pytest tests/test_observers.py

fuzz: $(VENV)/.dev           ## the three parsers of foreign files, ten minutes; FUZZ_SECONDS=60 for less
	$(BIN)/python tests/fuzz.py

demo: $(VENV)/.torch         ## corpus → LoRA on the lab base → before and after, in a minute or two
	$(BIN)/python examples/01_quickstart.py

docs: $(VENV)/.docs          ## the pages as a site in site/, every link checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/.dev          ## against PEFT, Trainer, bitsandbytes and the loaders: benchmarks/results.json and .png, half an hour
	$(BIN)/python benchmarks/suite.py

bench-growth: $(VENV)/.dev   ## time and memory from a thousand rows to a million, ten minutes
	$(BIN)/python benchmarks/growth.py --picture benchmarks/growth.png

bench-plans: $(VENV)/.dev    ## what a plan says against what a run takes, twenty minutes
	$(BIN)/python benchmarks/plan_accuracy.py

bench-data: $(VENV)/.bench   ## rows to batches, against the tokenizer alone and against datasets, five minutes
	$(BIN)/python benchmarks/data_pipeline.py

bench-merge: $(VENV)/.dev     ## a merge against PEFT's and against a copy of the file, two minutes
	$(BIN)/python benchmarks/merge.py

bench-nf4: $(VENV)/.dev      ## NF4 against bitsandbytes and against memory itself, three minutes
	$(BIN)/python benchmarks/nf4.py

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/.torch: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.torch $@
