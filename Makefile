# `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON := .venv/bin/python
AWAN := .venv/bin/awan

.PHONY: help demo up down sim sim-down lint check test guests faults proofs packets fuzz one shell map bench lock openapi fmt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## from a bare Debian 12 to a VPS you can SSH into
	@./bootstrap
	@$(PYTHON) -m lab.demo up

up: ## start the demo again, with its data
	@./bootstrap
	@$(PYTHON) -m lab.demo start

down: ## end exactly what `make demo` started; data are kept
	@$(PYTHON) -m lab.demo down

sim: ## the whole cloud with simulated engines, no root (DETACH=1: in the background)
	@./bootstrap --no-apt
	@$(PYTHON) -m lab.sim up $(if $(DETACH),--detach)

sim-down: ## end `make sim`
	@$(PYTHON) -m lab.sim down

lint: ## ruff, types, import contract
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports

check: lint ## lint and the fast tests
	@$(PYTHON) -m pytest -q -n 2 -m "not lab and not faults and not fuzz"

test: ## all suites, in one run; no test begins after 24 minutes
	@$(PYTHON) -m pytest -q -n 2 --minutes 24

guests: ## every test with real guests, where `make test` has a sample
	@$(PYTHON) -m pytest -q -n 2 --full tests/lab

faults: ## the full counts of crashes and faults, with a printed seed
	@$(PYTHON) -m pytest tests/faults tests/lab/test_reconcile.py --full

proofs: ## the fast tests with every call of every workflow's proof, instead of a sample
	@$(PYTHON) -m pytest -q -n 2 --full -m "not lab and not fuzz"

fuzz: ## 100,000 random calls over the whole API, with a printed seed
	@$(PYTHON) -m pytest tests/fuzz --full

packets: ## packets on real ports of both hypervisors: forged, rogue, and the whole matrix of the firewall
	@$(PYTHON) -m pytest -q --full tests/engines/fabric_contract -k packets

one: ## one test: make one T=tests/runtime/test_postgres.py
	@$(PYTHON) -m pytest -p no:randomly -x -vv $(T)

shell: ## Python with a session and the rooms' services at hand
	@$(AWAN) shell

map: ## routes, tables, workflows
	@$(AWAN) map

bench: ## the benchmarks; results in benchmarks/RESULTS.md
	@$(PYTHON) -m benchmarks

lock: ## resolve the dependencies anew into requirements.lock
	@printf 'setuptools>=75\nuv\n' | .venv/bin/uv pip compile --quiet --upgrade --python $(PYTHON) --generate-hashes \
	  --no-annotate --no-header --no-emit-index-url --extra dev --extra embedded pyproject.toml - -o requirements.lock

openapi: ## write openapi.json
	@$(AWAN) openapi > openapi.json

fmt: ## format the code
	@$(PYTHON) -m ruff check --fix --select I .
	@$(PYTHON) -m ruff format .
