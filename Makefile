# make train   distil the built-in teacher to one step and print the table
# make test    run the tests
# make lint | bench | figures | clean
# PYTHON chooses the interpreter that makes .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := runs/digits
INSTALLED := $(VENV)/installed

.PHONY: train test lint bench figures clean

# A run that is there already is continued; one that is finished is only evaluated again.
train: $(INSTALLED)
	$(PY) -m tbcm train --teacher digits --fused --output_dir $(RUN) \
		$(if $(wildcard $(RUN)/config.yaml),--resume_from_checkpoint latest)
	$(PY) -m tbcm sample $(RUN) --steps 1 --out $(RUN)/samples.png
	$(PY) -m tbcm eval $(RUN) --json $(RUN)/eval.json

test: $(INSTALLED)
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(INSTALLED)
	mkdir -p runs
	$(PY) -m bench --shape digits --json runs/bench_ops.jsonl
	$(PY) -m tbcm bench step --json runs/bench_step.json

figures: $(INSTALLED)
	$(PY) -m bench.figures

# torch comes first and alone: the extension is built against it, so build isolation is off.
$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 10) and sys.exit("Python 3.10 or newer is \
	needed; name one with make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install torch==2.13.0 'setuptools>=77' wheel
	$(PY) -m pip install --no-build-isolation -e '.[train,dev]'
	touch $@

# Everything that was built or installed; runs/ stays.
clean:
	rm -rf $(VENV) build *.egg-info tbcm_kernels/*.so .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +
