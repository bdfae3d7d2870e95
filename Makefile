# make quickstart · make test · make test-gpu · make lint: each sets up .venv by itself, the first time and when
# pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# For test-gpu: processes at a time, and when to stop and show what failed until then.
WORKERS ?= 10
LIMIT ?= 30m

.PHONY: quickstart test test-gpu lint format

quickstart: $(INSTALLED)
	$(VENV)/bin/python -m mamba3_train +recipe=quickstart

test: $(INSTALLED)
	CUDA_VISIBLE_DEVICES= $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Each test is named as it begins and as it ends: a run that is killed has said what failed.
test-gpu: $(INSTALLED)
	timeout --signal=INT --kill-after=30 $(LIMIT) $(VENV)/bin/python -m pytest -m "gpu or multi_gpu" \
	  -n $(WORKERS) --maxschedchunk 1 -vv --tb=short

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
