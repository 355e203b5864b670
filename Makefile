# make train   distil the built-in teacher to one step and print the table
# make test    run the tests
# make lint | audit | bench | rows | figures | clean
# PYTHON chooses the interpreter that makes .venv.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := runs/digits
INSTALLED := $(VENV)/installed

.PHONY: train test lint audit bench rows figures clean

# A run that is there already is continued; one that is finished is only evaluated again.
train: $(INSTALLED)
	$(PY) -m tbcm train --teacher digits --fused --output_dir $(RUN) \
		$(if $(wildcard $(RUN)/config.yaml),--resume_from_checkpoint latest)
	$(PY) -m tbcm sample $(RUN) --steps 1 --out $(RUN)/samples.png
	$(PY) -m tbcm eval $(RUN) --json $(RUN)/eval.json

# Up to four processes share the tests; their threads do not spin: they are more than the cores.
test: $(INSTALLED)
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# Compiles the configs of Triton's kernels that bench/results/audit.jsonl does not have, and puts them there.
AUDIT := bench/results/audit.jsonl
audit: $(INSTALLED)
	$(PY) -W ignore -m tbcm_kernels.testing.audit '^(?!cuda)' --known $(AUDIT) > $(AUDIT).new
	mv $(AUDIT).new $(AUDIT)

bench: $(INSTALLED)
	mkdir -p runs
	$(PY) -m bench --shape digits --json runs/bench_ops.jsonl
	$(PY) -m tbcm bench step --json runs/bench_step.json

# Measures again what docs/benchmarks.md shows of a CPU, twenty minutes on a quiet machine.
CPU := bench/results/cpu-2-cores
MODEL := $(PY) -m bench.model --device cpu --seconds 10 --json
rows: $(INSTALLED)
	$(PY) -m bench --save --device cpu --shape sana-0.6b-1024 --batch 1 --compile
	$(PY) -m bench --save --device cpu --shape dit-b-512 --op attention --compile
	for n in 256 512 1024 2048; do $(PY) -m bench --device cpu --shape dit-b-512 --op attention --tokens $$n \
		--pass forward --pass jvp --pass step --sets 2 --json $(CPU)/length.jsonl || exit 1; done
	$(MODEL) $(CPU)/model.jsonl
	for size in "" "--latent 8" "--latent 32" "--layers 2" "--layers 4" "--batch 2" "--batch 4" "--model sana-1.6b"; do \
		$(MODEL) $(CPU)/growth.jsonl --seed 1 --layers 1 --latent 16 $$size || exit 1; done
	$(PY) -m bench.others --device cpu --seconds 20 --json $(CPU)/others.jsonl
	$(PY) -m tbcm bench step --json $(CPU)/digits-step.json --methods tbcm scm sana_sprint \
		--modes eager compile fused
	$(PY) -m tbcm bench step --json $(CPU)/sana-step.json --model sana-0.6b --steps 4

# The README's figures, docs/benchmarks.md and its plots, from the rows in bench/results.
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
