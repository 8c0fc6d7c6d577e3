PYTHON ?= python3
VENV ?= .venv
NPROC ?= 8
ARGS ?=
AMD = --transport mori --experts aiter --device cuda
export PYTHON VENV

.PHONY: help setup run test test-long test-cluster test-browser check drift bench bench-gpu selftest mutants amd-smoke amd clean

##@ Run

help: ## Show this list
	@awk -F ':.*## ' '/^##@ / { print substr($$0, 5) ":" } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Make the environment; a torch that PYTHON can import is used as it is

run: setup ## Run a case on NPROC ranks; ARGS="--limit max-recv-1" and so on
	@$(VENV)/bin/distbench run --nproc $(NPROC) $(ARGS)

selftest: setup ## Inject every known fault and run clean cases; ARGS=--quick takes under a minute
	@$(VENV)/bin/distbench selftest --nproc $(NPROC) $(ARGS)

mutants: setup ## Run the corpus of broken kernels, transports, cuts and combines on two ranks
	@$(VENV)/bin/distbench mutants $(ARGS)

##@ On AMD nodes

amd-smoke: setup ## On an AMD node: look at it, then a tiny layer through mori and aiter (docs/amd.md)
	@$(VENV)/bin/distbench doctor --for mori --nproc $(NPROC) || test $$? -eq 1
	@$(VENV)/bin/distbench run --nproc $(NPROC) $(AMD) --model tiny --hidden-size 512 --tokens 8 $(ARGS)

amd: ## On a new AMD node: every step, whatever fails, and one archive to send (docs/amd.md)
	@$(PYTHON) scripts/amd.py --nproc $(NPROC) --venv $(VENV) $(ARGS)

##@ Develop

check: $(VENV)/.ready-dev ## Lint, types, import direction, spelling, prose, shell
	@scripts/check

test: $(VENV)/.ready-dev ## Run the tests; ARGS goes to pytest
	@scripts/test $(ARGS)

test-long: $(VENV)/.ready-dev ## The long counts of docs/: every fault, kill and signal, 3,000 clean cases, all mutants; an hour or two
	@DISTBENCH_SOAK=1 scripts/test --timeout 3600 $(ARGS)
	@$(VENV)/bin/python scripts/clean_cases.py --nproc $(NPROC)
	@$(VENV)/bin/python scripts/clean_cases.py --profiles all --cases 3600 --nproc 4
	@$(VENV)/bin/python scripts/advised_limits.py --nproc $(NPROC)
	@$(VENV)/bin/distbench mutants --out distbench-out/mutants-long

test-cluster: $(VENV)/.ready-dev ## Emulated hosts and a real Slurm; needs root, iproute2, slurmctld, slurmd, munge
	@DISTBENCH_CLUSTER=1 TEST_WORKERS=0 scripts/test tests/cluster $(ARGS)

test-browser: $(VENV)/.ready-browser ## Pages of HTML in a headless Chromium; skipped with a reason where there is none
	@DISTBENCH_BROWSER=1 TEST_WORKERS=0 scripts/test -rs tests/browser $(ARGS)

drift: $(VENV)/.ready-dev ## What no longer matches in the newest mori, SGLang, aiter (docs/drift.md); downloads 100 MB
	@$(VENV)/bin/python -m scripts.drift $(ARGS)

clean: ## Remove the environment, caches and results
	@rm -rf $(VENV) build distbench-out *.egg-info .hypothesis .*_cache

##@ Measure

bench: setup ## Measure start-up, memory and the cost of a case against their bounds
	@$(VENV)/bin/python scripts/bench.py --nproc $(NPROC) $(ARGS); first=$$?; \
	$(VENV)/bin/python scripts/bench_suite.py --nproc $(NPROC) && exit $$first

bench-gpu: setup ## Measure the Triton experts on a GPU, beside its limits and torch's grouped_mm
	@$(VENV)/bin/python scripts/bench_gpu.py $(ARGS)

$(VENV)/.ready: pyproject.toml scripts/setup
	@scripts/setup

$(VENV)/.ready-dev: pyproject.toml scripts/setup
	@scripts/setup --dev

$(VENV)/.ready-browser: pyproject.toml scripts/setup
	@scripts/setup --browser
