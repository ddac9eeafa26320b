# `make help` is the manual. Every target works on a fresh clone: it sets up what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13,$(if $(shell $(name) --version 2>/dev/null),$(name))))
VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv
READY := $(VENV)/.ready-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c1-16)
PROTOS := $(wildcard protos/latentflow/v1/*.proto)
COMPILE := $(UV) pip compile --quiet --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate pyproject.toml
# Two processes: tests that wait run beside tests that compute. Those of one file run in one process, as they share servers.
TEST ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder tests --ignore=tests/kube --ignore=tests/chart
# Programs of Kubernetes: built once, unless KUBEBUILDER_ASSETS names a folder that contains them.
KUBE = KUBEBUILDER_ASSETS=$${KUBEBUILDER_ASSETS:-$$(tools/build etcd kubernetes)} PATH=$$(tools/build helm kubeconform):$$PATH
# The cluster of `make e2e`: node, made from these programs, or kind, which brings its own.
CLUSTER ?= node
PROGRAMS_node = KUBEBUILDER_ASSETS=$$(tools/build etcd kubernetes kubernetes-node) PATH=$$(tools/build helm):$$PATH

##@ Use
.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Install everything into .venv (once; again when the lock changes)

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found; install one, or run make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing everything into $(VENV): 6 GB, most of it torch with CUDA."
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip
	$(PY) -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) pip install --quiet --compile-bytecode --requirement requirements.lock
	$(UV) pip install --quiet --no-deps --editable .
	rm -f $(VENV)/.ready-*
	touch $@

.PHONY: demo
demo: setup ## Serve examples/shapes.yaml, make one image with a ControlNet and a LoRA, write out/demo.png
	$(PY) examples/demo.py

##@ Develop
# Branch coverage of a whole run. Processes that tests start are not measured. It adds 19 s of CPU time to the 51 s of the
# tests of client, API, scheduler, engine and parity, and 8 s to the 22 s of those of gateway and reconciler; the other
# tests wait for processes or compute in torch, which is not traced.
COVERAGE = $(if $(filter file,$(origin TEST)),--cov --cov-report=term)

.PHONY: test
test: setup ## Run the tests, with branch coverage (one file, without: make test TEST=tests/api)
	$(PY) -m pytest --durations=20 $(COVERAGE) $(TEST)

.PHONY: test-all
test-all: setup ## Run the tests and also the exhaustive products of parameters, of which `make test` runs pairs
	$(PY) -m pytest --durations=20 -m "" $(TEST)

.PHONY: test-api
test-api: setup ## Run the tests against a real Kubernetes API server (builds it once, with Go; or set KUBEBUILDER_ASSETS)
	$(KUBE) $(PY) -m pytest tests/kube

.PHONY: chart
chart: setup ## Check the Helm chart: lint, values, golden files, schemas, and whether an API server accepts its objects
	$(KUBE) $(PY) -m pytest tests/chart

.PHONY: e2e
e2e: setup ## Run the tests on a real cluster of one node, created on this machine (Linux, root, Go, containerd, buildah; or CLUSTER=kind)
	$(PROGRAMS_$(CLUSTER)) CLUSTER=$(CLUSTER) $(PY) -m pytest e2e

.PHONY: cluster
cluster: setup ## Create the cluster of `make e2e` and keep it running until Ctrl-C
	@KUBEBUILDER_ASSETS=$$(tools/build etcd kubernetes kubernetes-node) PYTHONPATH=tests $(PY) e2e/node.py

.PHONY: images
images: setup ## Build the images latentflow-control and latentflow-node (docker or buildah; BASE=… names the base image)
	tools/images

.PHONY: golden
golden: setup ## Rewrite the golden files of the chart tests
	$(KUBE) PYTHONPATH=tests $(PY) -m support.chart

.PHONY: lint
lint: setup ## Check style, types, import directions and protos
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/buf lint
	$(PY) scripts/wire.py check

.PHONY: hooks
hooks: setup ## Make git run the checks of `make lint` before each commit (pre-commit)
	$(VENV)/bin/pre-commit install

.PHONY: fmt
fmt: setup ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: check
check: lint ## Lint, and check that generated files are up to date
	$(PY) scripts/drift.py

.PHONY: proto
proto: setup ## Generate the gRPC stubs from protos/
	$(PY) -m grpc_tools.protoc -I protos --python_out=client --pyi_out=client --grpc_python_out=client $(PROTOS)

.PHONY: wire-release
wire-release: setup ## Keep the wire's descriptors of a release (VERSION=0.2.0); later changes are compared with them
	$(PY) scripts/wire.py release $(VERSION)

.PHONY: docs
docs: setup ## Generate docs/workflow-reference.md, docs/status.md, docs/metrics.md and docs/errors.md
	$(PY) scripts/reference.py

.PHONY: crds
crds: setup ## Generate the CustomResourceDefinitions from the typed API
	$(PY) -m latentflow_operator.crds crds charts/latentflow/files/crds

.PHONY: lock
lock: setup ## Resolve requirements.lock from pyproject.toml again, and the lock files of the images from it
	$(COMPILE) --extra dev -o requirements.lock
	$(COMPILE) --constraint requirements.lock --extra gateway --extra operator -o requirements-control.lock
	$(COMPILE) --constraint requirements.lock --extra nodes -o requirements-node.lock

##@ Measure
.PHONY: bench
bench: setup ## Measure the overhead of serving compared with plain diffusers (needs an idle machine)
	$(PY) bench/overhead.py

.PHONY: bench-engine
bench-engine: setup ## Run all benches of the engine: the next seven and `make bench` (half an hour, on an idle machine)
	$(PY) bench/engine.py

.PHONY: bench-batching
bench-batching: setup ## Measure what sharing forward passes is worth (needs an idle machine)
	$(PY) bench/batching.py

.PHONY: bench-arrivals
bench-arrivals: setup ## Measure joining at step boundaries, beside static batches (needs an idle machine)
	$(PY) bench/arrivals.py

.PHONY: bench-merge
bench-merge: setup ## Measure merging and undoing a LoRA, beside PEFT (needs an idle machine and 16 GB of memory)
	$(PY) bench/merging.py

.PHONY: bench-loras
bench-loras: setup ## Measure concurrent requests with four LoRAs, by row and merged in turn (needs an idle machine)
	$(PY) bench/loras.py

.PHONY: bench-latent
bench-latent: setup ## Measure two replicas that share a request, beside one (needs an idle machine with two cores)
	$(PY) bench/parallelism.py

.PHONY: bench-tensor
bench-tensor: setup ## Measure weights that two processes share, beside one process (needs an idle machine with two cores)
	$(PY) bench/tensor.py

.PHONY: bench-controlnet
bench-controlnet: setup ## Measure a ControlNet on a server of its own, beside one in line (needs an idle machine with two cores)
	$(PY) bench/steering.py

.PHONY: bench-sleep
bench-sleep: setup ## Measure putting a server to sleep and waking it (needs an idle machine and 6 GB of memory)
	$(PY) bench/sleeping.py

.PHONY: bench-operator
bench-operator: setup ## Measure the cost of the operator on a real API server
	$(KUBE) $(PY) bench/reconciling.py

.PHONY: gpu-bundle
gpu-bundle: setup ## Pack out/gpu-bundle.tar.xz: what tools/gpu-check needs on a machine with a GPU and no network
	$(PY) tools/gpu/bundle

.PHONY: pack
pack: setup ## Train the shapes pack from scratch (hours on a CPU, minutes on a GPU; resumes an interrupted run)
	PYTHONPATH=models $(PY) -m latentflow_pack train

.PHONY: pack-eval
pack-eval: setup ## Score the shapes pack and draw its contact sheet
	PYTHONPATH=models $(PY) -m latentflow_pack eval
