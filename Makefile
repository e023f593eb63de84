# Every target makes its own virtual environment, once, and installs everything into it.
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment's place, ARGS is handed to the program that runs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

export OMP_NUM_THREADS ?= 1

# The oldest version of triton that the kernels support; the environment has the newest.
OLD_TRITON_VERSION := 3.6.0
OLD_TRITON := .triton-3.6

.PHONY: help install quickstart test test-slurm lint parity mutants fuzz fuzz-checkpoints kill-loop fault-storage malicious \
	reshard-pairs ledger bench kernels-compile kernels-bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## make the environment and install megalm into it

quickstart: $(STAMP)  ## text, tokenizer, training on four processes, evaluation, a sample
	$(BIN)/megalm quickstart $(ARGS)

test: lint  ## lint, types and all tests that need neither GPU nor cluster; last those that measure time
	$(BIN)/python -m pytest -m "not alone and not slurm" --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)
	$(BIN)/python -m pytest -m "alone and not slurm" $(ARGS)

test-slurm: $(STAMP)  ## batch jobs on a Slurm cluster that is started on this machine (needs root and apt)
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

parity: $(STAMP)  ## every layout against one plain process, as a table
	$(BIN)/python -m tests.parity $(ARGS)

fuzz: $(STAMP)  ## 500 random recipes in random layouts, trained as one plain process does or refused
	$(BIN)/python -m tests.parity.fuzz $(ARGS)

mutants: $(STAMP)  ## planted faults, each of which the parity gate must catch, as a table
	$(BIN)/python -m tests.parity.mutants $(ARGS)

fuzz-checkpoints: $(STAMP)  ## 10,000 flipped bits and 1,000 cuts in every region of a run's files: none loads in silence
	$(BIN)/python -m tests.checkpoint.fuzz $(ARGS)

kill-loop: $(STAMP)  ## 100 SIGKILLs, most of them inside saves: each run ends with the unbroken one's bits
	$(BIN)/python -m tests.end_to_end.kill $(ARGS)

fault-storage: $(STAMP)  ## full, read-only, vanishing and failing disks: no checkpoint is lost, none claimed
	$(BIN)/python -m tests.checkpoint.fault_storage $(ARGS)

malicious: $(STAMP)  ## checkpoints that attackers made: nothing runs, memory stays bounded
	$(BIN)/python -m tests.checkpoint.malicious

reshard-pairs: $(STAMP)  ## checkpoints of 14 layouts in each of the others, bit for bit, and ten losses, as a matrix
	$(BIN)/python -m tests.checkpoint.reshard_pairs $(ARGS)

ledger: $(STAMP)  ## the samples of a run over 50 resumes in changing layouts: none repeated, none skipped
	$(BIN)/python -m tests.checkpoint.ledger $(ARGS)

bench: $(STAMP)  ## our training step against a plain PyTorch loop
	$(BIN)/python benchmarks/train_step.py $(ARGS)

kernels-compile: $(STAMP) $(OLD_TRITON)/.installed  ## every kernel for six GPU architectures and two tritons, as tables
	$(BIN)/python -m tests.kernels.compile_check $(ARGS)
	$(BIN)/python -m tests.kernels.compile_check --triton $(OLD_TRITON) $(ARGS)

kernels-bench: $(STAMP)  ## every kernel against what else is installed, on a GPU
	$(BIN)/python benchmarks/kernels.py $(ARGS)

clean:  ## remove the environment and build products
	rm -rf $(VENV) $(OLD_TRITON) build dist *.egg-info

# torch first and with its exact version, so that no other build of it is resolved on the way.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is missing or older than Python 3.11; give a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,mpi]'
	@touch $@

$(OLD_TRITON)/.installed: | $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --target $(OLD_TRITON) --no-deps triton==$(OLD_TRITON_VERSION)
	@touch $@
