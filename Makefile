# What one may do here; `make` alone lists it. Every target sets up what it needs, in .venv.
# Targets call `grn` and the checkers; whatever has to be decided is decided in Python.

PYTHON  ?= python3
VENV    ?= .venv
INSTALL ?= $(VENV)/bin/python -m pip install
BASE    ?= experiments/_base/cpu.yaml
DIGITS   = data/digits
RUNS     = runs

# What text to video is asked for, and the steps and guidance of experiments/t2v/digits.yaml.
PROMPTS  = ["the digit seven moves left", "the digit two moves up", "the digit three moves down"]
DRAW     = --refine.num_steps 16 --refine.guidance_scale 3.0

GRN = $(VENV)/bin/grn
FIT = $(GRN) fit $(addprefix -c ,$(BASE)) -c

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup data train-tokenizer train-c2i train-t2i train-t2v sample evaluate tensorboard
.PHONY: demo notebooks docs tables test test-scale lint check format

help: ## list the targets
	@printf 'make TARGET [CONFIG=experiment.yaml] [ARGS="--trainer.max_steps=20"]\n\n'
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
		while IFS='|' read -r target text; do printf '  %-16s %s\n' "$$target" "$$text"; done
	@printf '\nVariables:\n'
	@printf '  %-16s %s\n' \
		CONFIG= 'experiment to train instead of the one on the embedded set' \
		ARGS= 'further options for the command behind the target' \
		BASE= 'settings below CONFIG; $(BASE) by default, may be empty' \
		RUN= 'run folder or checkpoint of sample and evaluate' \
		DATA= 'folder of shards of evaluate; $(DIGITS)/clips by default' \
		PYTHON= 'interpreter that makes $(VENV), 3.11 or newer' \
		INSTALL= 'installer; for instance "uv pip install --python $(VENV)/bin/python"'

# --- environment and data -----------------------------------------------------------------------

setup: $(VENV)/.installed ## create the environment in .venv and install the package

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make setup PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	@touch $@

data: setup ## write the embedded data set to data/digits (once)
	$(GRN) digits $(DIGITS)

# --- training -----------------------------------------------------------------------------------

train-tokenizer: $(if $(CONFIG),setup,data) ## train a tokenizer on images and clips
	$(if $(CONFIG),,$(FIT) experiments/tokenizer/digits_frames.yaml $(ARGS))
	$(FIT) $(or $(CONFIG),experiments/tokenizer/digits.yaml) $(ARGS)

train-c2i: $(if $(CONFIG),setup,data) ## train a generator, class to image
	$(FIT) $(or $(CONFIG),experiments/c2i/digits.yaml) $(ARGS)

train-t2i: $(if $(CONFIG),setup,data) ## train a generator, text to image
	$(FIT) $(or $(CONFIG),experiments/t2i/digits.yaml) $(ARGS)

train-t2v: $(if $(CONFIG),setup,data) ## train a generator, text to video
	$(FIT) $(or $(CONFIG),experiments/t2v/digits.yaml) $(ARGS)

# --- what a run has learned ---------------------------------------------------------------------

sample: setup ## draw from the newest checkpoint of RUN (ARGS='--prompts ...')
	$(GRN) sample $(or $(RUN),$(RUNS)/t2v-digits) $(or $(ARGS),--prompts '$(PROMPTS)' $(DRAW))

evaluate: $(if $(DATA),setup,data) ## judge the newest checkpoint of RUN on held-out data
	$(GRN) evaluate $(or $(RUN),$(RUNS)/t2v-digits) $(or $(DATA),$(DIGITS)/clips) $(if $(RUN),,$(DRAW)) $(ARGS)

tensorboard: setup ## look at all runs in the browser
	$(VENV)/bin/tensorboard --logdir $(RUNS) $(ARGS)

demo: data ## digits to captioned video: train both stages, judge them, write a report
	$(FIT) experiments/tokenizer/digits_frames.yaml $(ARGS)
	$(FIT) experiments/tokenizer/digits.yaml $(ARGS)
	$(GRN) evaluate $(RUNS)/tokenizer-digits $(DIGITS)/clips
	$(FIT) experiments/t2v/digits.yaml $(ARGS)
	$(GRN) evaluate $(RUNS)/t2v-digits $(DIGITS)/clips $(DRAW)
	$(GRN) report '[$(RUNS)/tokenizer-digits, $(RUNS)/t2v-digits]' --out $(RUNS)/demo/report.html
	@printf '\nThe report is %s; open it in a browser.\n' '$(RUNS)/demo/report.html'

notebooks: setup ## run all notebooks, with pictures to runs/notebooks/*.html
	$(VENV)/bin/jupyter nbconvert --execute --to html --output-dir $(RUNS)/notebooks notebooks/*.ipynb

docs: setup ## build the documentation site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

tables: setup ## make the tables of the pages from experiments, sizes and results
	$(VENV)/bin/python docs/_tables.py

# --- checks -------------------------------------------------------------------------------------

test: setup ## run all tests but those of test-scale
	$(VENV)/bin/python -m pytest -n auto --dist loadfile -m 'not scale' $(ARGS)

test-scale: setup ## run the tests of many processes, kills and notebooks
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m scale $(ARGS)

lint: setup ## format, lint, types and import contracts, without changing a file
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check: lint test test-scale ## everything that has to hold before a commit

format: setup ## format the code and repair what can be repaired
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
