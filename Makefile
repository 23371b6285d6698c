# The house's front door: `make` alone lists what there is. Everything that is downloaded or built goes into one
# directory outside the tree; remove it and the next target makes it again.
export CSI_QUOBYTE_CACHE ?= /var/cache/csi-quobyte
export CSI_QUOBYTE_QEMU_DIR ?= $(CSI_QUOBYTE_CACHE)/qemu/bin

VENV := $(CSI_QUOBYTE_CACHE)/venv/bin
PYTHON := $(VENV)/python
# The tree's own code comes first, also when another tree was installed into the same cache since.
export PYTHONPATH := $(CURDIR)
export PATH := $(VENV):$(PATH)
# Compiled once, and not by each of the hundreds of processes that the tests start.
export PYTHONPYCACHEPREFIX := $(CSI_QUOBYTE_CACHE)/pycache
unexport PYTHONDONTWRITEBYTECODE

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The parts of `test` run one after the other, in the order of the list, also with -j.
.NOTPARALLEL:
.PHONY: crash faults power-loss soak cluster-test cluster-bench cluster-up cluster-down cluster-parts help setup setup-demo demo test lint lint-steps format docs unit integration sanity bench scale image lock proto clean

# Runs one part with a time limit, prints its time, and leaves nothing of it behind: processes, mounts, loop devices.
CONTAINED = $(PYTHON) tests/tools/contained.py --timeout-s
STARTED := $(shell date +%s)

##@ Start here
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\ncache: %s (set CSI_QUOBYTE_CACHE to change it)\n' '$(CSI_QUOBYTE_CACHE)'

demo: setup-demo ## see the driver at work: a story of a minute, on a stand-in for Quobyte (Debian 12 or 13, root)
	@$(CONTAINED) 600 demo -- $(PYTHON) deploy/lab/demo.py

test: setup lint unit integration sanity ## everything that proves the driver: lint, unit, integration, sanity (10 to 20 minutes)
	@printf '== test: every part passed (%d s)\n' $$(($$(date +%s) - $(STARTED)))

##@ Single parts of test
lint: setup ## ruff, mypy, layer contract, dependency locks
	@$(CONTAINED) 300 lint -- $(MAKE) --no-print-directory lint-steps

unit: setup ## pure code, no processes
	@$(CONTAINED) 300 unit -- $(PYTHON) -m pytest tests/unit

integration: setup ## real qemu-img, storage daemons, loop devices, file systems
	@$(CONTAINED) 1800 integration -- $(PYTHON) -m pytest --numprocesses 2 --dist loadfile -m "not alone" tests/integration
	@$(CONTAINED) 300 alone -- $(PYTHON) -m pytest -m alone tests/integration/test_loop.py

sanity: setup ## csi-sanity over two sockets, for mount and for block volumes
	@$(CONTAINED) 600 sanity -- $(PYTHON) tests/sanity/run.py

##@ Longer suites
faults: setup ## every operation, merge and node call with every call on the pool's files failing, its FUSE server killed or stopped, its space used up (hours)
	@CSI_QUOBYTE_FAULTS_CALLS=0 $(CONTAINED) 21600 faults -- \
	  $(PYTHON) -m pytest --numprocesses 2 --dist worksteal -q -rP tests/integration/test_faults_each_step.py \
	  tests/integration/test_faults_node.py tests/integration/test_faults_of_the_server.py \
	  tests/integration/test_faults_full_pool.py tests/integration/test_faults_in_merges.py

crash: setup ## every operation, merge and node call killed before each durable step, and 30 times in each kind of merge
	@CSI_QUOBYTE_CRASH_EVERY=1 CSI_QUOBYTE_CRASH_IN_JOB=30 $(CONTAINED) 7200 crash -- \
	  $(PYTHON) -m pytest --timeout 1200 -q -s tests/integration/test_crash_steps.py \
	  tests/integration/test_crash_twice.py tests/integration/test_crash_states.py tests/integration/test_crash_merges.py tests/integration/test_crash_node.py \
	  tests/integration/test_repair.py::test_repair_that_is_killed_before_a_step_is_ended_by_the_next_one \
	  tests/integration/test_export.py::test_killed_before_any_step

soak: setup ## 500 random histories, one and two controllers; a minute of eight concurrent callers (SEED=... as printed)
	@CSI_QUOBYTE_HISTORIES=500 CSI_QUOBYTE_CONCURRENCY_S=60 CSI_QUOBYTE_SEED=$(or $(SEED),0) $(CONTAINED) 7200 soak -- \
	  $(PYTHON) -m pytest --timeout 3600 -q -s tests/integration/test_histories.py tests/integration/test_concurrency.py

power-loss: setup ## a power cut after every write, fsync and rename of every operation, what was not synced lost or torn
	@CSI_QUOBYTE_POWER_CUTS=0 $(CONTAINED) 5400 power-loss -- \
	  $(PYTHON) -m pytest --timeout 1800 -q -s tests/integration/test_power_loss.py tests/integration/test_power_loss_after_death.py \
	  tests/integration/test_growth_cut.py

##@ On a real Kubernetes (two nodes on this machine, without a registry; the first time builds it: 15 to 20 minutes)
cluster-test: cluster-parts ## install the chart and follow volumes through their life, crashes and upgrades included
	@$(CONTAINED) 3600 cluster -- tests/cluster/run.sh $(PYTHON) -m pytest --timeout 600 tests/cluster

cluster-bench: cluster-parts ## figures of the same cluster, alternating with a reference driver
	@$(CONTAINED) 3600 cluster-bench -- tests/cluster/run.sh $(PYTHON) -m tests.cluster.bench --images $(CSI_QUOBYTE_CACHE)/cluster/images

cluster-up: cluster-parts ## start it, with the driver installed, to work by hand
	@tests/cluster/cluster.sh up
	@tests/cluster/cluster.sh install
	@tests/cluster/cluster.sh welcome

cluster-down: ## end it
	@tests/cluster/cluster.sh down

cluster-parts:
	@tests/tools/setup.sh cluster

##@ Measure
bench: setup ## the table of figures in docs/measurements.md
	@$(CONTAINED) 1800 bench -- $(PYTHON) bench/run.py

scale: setup ## a pool of 100 000 volumes against one of 100 (5 to 10 minutes, 3 GB of disk)
	@$(CONTAINED) 1800 scale -- $(PYTHON) bench/scale.py
	@CSI_QUOBYTE_INCREMENTS=5000 $(CONTAINED) 600 increments -- \
	  $(PYTHON) -m pytest -q tests/integration/test_store.py -k two_processes

##@ Ship
image: ## build the container image and write it to a file (IMAGE=name, BASE_IMAGE=trixie of a registry, FRESH=1)
	@deploy/lab/image.sh

##@ Develop
setup: ## install what the tests need (run by every target that needs it)
	@tests/tools/setup.sh test

setup-demo:
	@tests/tools/setup.sh demo

format: setup ## let ruff put the code into its form
	@ruff check --fix-only --quiet .
	@ruff format .

docs: setup ## make docs/parameters.md again from the code
	@$(PYTHON) tests/tools/parameters_page.py --write

lint-steps:
	@ruff check .
	@ruff format --check .
	@mypy
	@MYPYPATH=deploy mypy --explicit-package-bases --package lab
	@MYPYPATH=deploy:bench mypy --strict --explicit-package-bases tests/tools/contained.py \
	  tests/tools/parameters_page.py tests/sanity/run.py bench/run.py bench/scale.py bench/filling.py bench/speed.py bench/floor.py bench/behind_grpc.py bench/disk.py bench/eof.py
	@MYPYPATH=deploy:tests/tools mypy --strict --explicit-package-bases tests/cluster
	@$(PYTHON) tests/tools/parameters_page.py --check
	@lint-imports
	@tests/tools/lock.sh --check

lock: ## make the dependency locks again after a change of ranges in pyproject.toml (UPGRADE=1: newest versions)
	@tests/tools/lock.sh $(if $(UPGRADE),--upgrade)

proto: setup ## generate csi_quobyte/pb from proto/ again
	@$(PYTHON) proto/build_stubs.py

clean: ## remove what was generated in the tree (not the cache)
	@rm -rf csi_quobyte/pb build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
