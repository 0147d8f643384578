# `make` lists the targets. Each one sets itself up first: nothing but make and Python 3.11 or newer is needed.
# Another Python than the first that fits: make PYTHON=/path/to/python3.12. Flagged cells, too: make notebooks FLAGS=data
SHELL := bash
BIN := .venv/bin
READY := .venv/.installed
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo test export notebooks readme docs clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv with the pinned packages and mem_nb itself (minutes and 6 GB, once)

$(READY): settings.ini setup.py constraints.txt
	@bash scripts/setup.sh

demo: $(READY) ## simulate recordings, pretrain, finetune and report, in a few minutes
	@$(BIN)/mem_nb demo
	@echo "The results lie in runs/demo: open report.html in a browser, or read summary.json."

test: $(READY) ## check exports, notebooks and README, run the notebooks' tests, then pytest
	@bash scripts/check.sh

export: $(READY) ## write mem_nb/ from the notebooks
	@$(BIN)/nbdev_export
	@echo "mem_nb/ is what nbs/ exports."

notebooks: $(READY) ## run every notebook and store its outputs (NAMES=nbs/05_frames.ipynb only that one)
	@$(BIN)/python scripts/notebooks.py --names '$(NAMES)' --flags '$(FLAGS)'

readme: $(READY) ## write README.md and its pictures from nbs/index.ipynb
	@$(BIN)/python scripts/readme.py

docs: $(READY) ## build the documentation in _docs/ from the notebooks, and check its links
	@$(BIN)/python scripts/docs.py

clean: ## remove what is made again in seconds; .venv and runs stay
	@rm -rf _docs _proc .pytest_cache wandb build
	@find . \( -name .venv -o -name runs -o -name .git \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +
	@echo "Caches are gone."
