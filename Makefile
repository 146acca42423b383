# Every target makes its own environment in .venv the first time and installs nothing the second.
PYTHON ?= python3
# The pair that development and CI use. The package itself asks for torch>=2.5 only.
TORCH ?= torch==2.14.1 torchvision==0.29.1
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?=
# Tests of one file share what they have trained, so a file stays with one worker.
TEST_JOBS ?= 2
MATRIX_ARGS ?=
KILL_ARGS ?=
GPU_ARGS ?=
OPTIMIZERS_ARGS ?=
FUZZ_ARGS ?=
STUDY_TESTS := $(addprefix tests/examples/,test_hydra.py test_study.py test_study_on_ray.py test_optuna_study.py)
# Network namespaces take root; a user who is not root is the root of a user namespace.
AS_ROOT = $(if $(filter 0,$(shell id -u)),,unshare --map-root-user --mount --net sh -c 'mount -t tmpfs tmpfs /run && exec "$$0" "$$@"')

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench gpu matrix optimizers kill-and-resume fuzz study docs dist test-lowest test-deepspeed test-hosts test-ray test-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

demo: $(VENV)/.examples ## train baseline and revisited networks on digits, print the paired comparison, draw it (DEMO_ARGS="--seeds 5")
	$(BIN)/python examples/digits.py $(DEMO_ARGS)

test: $(VENV)/.examples $(VENV)/.test ## run the tests that need no GPU, DeepSpeed, Ray or second host (TEST_ARGS="-k resume", TEST_JOBS=4)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(TEST_ARGS)

lint: $(VENV)/.examples $(VENV)/.test $(VENV)/.lint ## ruff (lint, format) and pyright (strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(VENV)/.lint ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.examples $(VENV)/.test ## measure what the callback costs, as ratios taken in one run
	$(BIN)/python benchmarks/optimizer_step.py
	$(BIN)/python benchmarks/rewrite.py
	$(BIN)/python benchmarks/monitor.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/input_norm.py
	$(BIN)/python benchmarks/scale.py

gpu: ## test and measure on one GPU in four minutes, with what $(PYTHON) has: nothing is installed (GPU_ARGS="--device cpu --small")
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu --output build/gpu $(GPU_ARGS)

matrix: $(VENV)/.examples $(VENV)/.test ## train with every strategy, precision and loop, and print what became of each combination
	$(BIN)/python benchmarks/matrix.py $(MATRIX_ARGS)

optimizers: ## try every optimizer of many packages against hand-made groups, and write docs/optimizers.md (an hour; it goes on where it was)
	$(MAKE) .venv-optimizers/.optimizers VENV=.venv-optimizers
	OMP_NUM_THREADS=1 .venv-optimizers/bin/python benchmarks/optimizer_zoo.py --results build/optimizer_zoo.json --page docs/optimizers.md $(OPTIMIZERS_ARGS)

kill-and-resume: $(VENV)/.examples $(VENV)/.test ## kill training at random moments and resume it, 200 times (KILL_ARGS="--trials 20 --seed 1")
	$(BIN)/python tests/processes/scripts/kill_and_resume.py $(KILL_ARGS)

fuzz: $(VENV)/.examples $(VENV)/.test ## try the command with random targets and logs, and random values of LIGHTNING_REVBN (FUZZ_ARGS="--targets 2000 --seed 500")
	PYTHONPATH=.:tests $(BIN)/python tests/processes/scripts/fuzz_command.py $(FUZZ_ARGS)
	PYTHONPATH=.:tests $(BIN)/python tests/helpers/fuzzed_logs.py 500

study: ## run the tests of studies: joblib, submitit, Ray, interrupted studies, failed runs, the search with Optuna
	$(MAKE) .venv-study/.study test VENV=.venv-study TEST_ARGS="-m 'not gpu' $(STUDY_TESTS)"

docs: $(VENV)/.examples $(VENV)/.docs ## build the documentation in docs/_build
	$(BIN)/sphinx-build -W -E --keep-going -b html docs docs/_build

dist: $(VENV)-dist/.dist ## build sdist and wheel in dist/, check them, and use the wheel in an environment that has nothing else
	rm -rf dist
	$(VENV)-dist/bin/python -m build --no-isolation
	$(VENV)-dist/bin/python -m twine check --strict dist/*
	PYTHONPATH=.:tests $(VENV)-dist/bin/python tests/helpers/installed_package.py dist/*.whl $(firstword $(TORCH))

test-lowest: ## run the tests at the lowest versions the package states
	$(MAKE) test VENV=.venv-lowest TORCH="torch==2.5.0 torchvision==0.20.0 lightning==2.5.0 torchmetrics==1.4.0 numpy<2.3"

test-deepspeed: ## run the tests with DeepSpeed, on the CPU
	$(MAKE) .venv-deepspeed/.deepspeed test VENV=.venv-deepspeed TEST_ARGS="-m deepspeed tests/processes/test_deepspeed.py"

test-hosts: $(VENV)/.examples $(VENV)/.test ## run the tests with two hosts: network namespaces on this machine (Linux, iproute2)
	$(AS_ROOT) $(BIN)/python -m pytest -m two_hosts tests/processes/test_two_hosts.py $(TEST_ARGS)

test-ray: ## run the tests with Ray Train, on two CPU workers
	$(MAKE) .venv-ray/.ray test VENV=.venv-ray TEST_ARGS="-m ray tests/processes/test_ray_train.py" TEST_JOBS=0

test-gpu: $(VENV)/.examples $(VENV)/.test $(VENV)/.deepspeed ## run the tests that need a GPU, also those that need two
	$(BIN)/python -m pytest -m gpu tests/gpu tests/research/test_paper_protocol.py $(TEST_ARGS)

clean: ## remove what the targets made
	rm -rf .venv .venv-lowest .venv-deepspeed .venv-ray .venv-optimizers .venv-study .venv-dist docs/_build dist demo_output fashion_mnist_output protocol_output ablation_output runs digits_cli_output optuna_output outputs multirun studies examples/*_output

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -qq $(foreach requirement,$(TORCH),"$(requirement)")
	@touch $@

$(VENV)/.examples: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -qq --editable ".[examples]"
	@touch $@

$(VENV)/.test $(VENV)/.lint $(VENV)/.docs $(VENV)/.deepspeed $(VENV)/.study $(VENV)/.ray: $(VENV)/.%: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -qq --group $*
	@touch $@

$(VENV)-dist/.dist: pyproject.toml
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install -qq --upgrade "pip>=25.1"
	$(VENV)-dist/bin/python -m pip install -qq --group dist
	@touch $@

$(VENV)/.optimizers: $(VENV)/.examples $(VENV)/.test benchmarks/optimizer_zoo.txt
	$(BIN)/python -m pip install -qq --no-deps -r benchmarks/optimizer_zoo.txt
	@touch $@
