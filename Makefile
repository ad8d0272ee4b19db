# Each target sets up its own virtual environment first. Override: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_FLAGS ?= --quiet --disable-pip-version-check
# A lock file whose versions are installed, e.g. LOCK=requirements.lock; empty: the newest versions that
# pyproject.toml allows. Not used on another Python or platform than the lock's own.
LOCK ?=
# Makes the engines' environments; needs 3.11 or newer.
ENGINE_PYTHON ?= $(PYTHON)
ENVIRONMENT := $(ENGINE_PYTHON) src/qwen3_distill/environments/make.py

# Where it is set, every process of a test compiles PyTorch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo engines test test-engines test-vllm test-vllm-teacher test-sglang test-unsloth test-engines-together test-transformers4 test-cluster test-cluster-engines test-cluster-contracts test-gpu gpu-check fuzz check format hooks docs evidence evidence-cpu evidence-page clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1|\2/' | column -t -s '|'

demo: $(VENV)/installed ## distil the lab student from the lab teacher (two CPU cores, minutes)
	$(BIN)/qwen3-distill run --config configs/demo.yaml

engines: $(VENV)/installed ## the environments of vLLM, SGLang and unsloth: CUDA builds where there is an NVIDIA driver
	$(BIN)/qwen3-distill engines install --python $(ENGINE_PYTHON)

# One more than the cores: many tests wait, for processes that start and for limits that pass. In the
# order of the folders the files with few long tests are not the last, when workers run out of files.
WORKERS ?= $$(( $$(getconf _NPROCESSORS_ONLN) + 1 ))
test: $(VENV)/installed-dev ## the test suite a laptop can run
	OMP_NUM_THREADS=1 $(BIN)/pytest tests -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# One pytest for each engine, concurrently: each waits much, for starts and for its own processes. Tests of
# vLLM as the rollout engine look at what it is doing, so the others leave it the processor; three at a time
# keep two cores busy. The later suites follow one by one.
ENGINE_SUITES := test-vllm test-sglang test-unsloth
LEAVE_OUT :=
LATER_SUITES := test-engines-together test-vllm-teacher test-cluster test-cluster-engines
test-engines: $(VENV)/installed-dev ## the tests of the real engines on a CPU, in environments it makes, and of Ray
	@set -e; for engine in transformers4 vllm sglang unsloth; do $(ENVIRONMENT) $$engine-cpu > /dev/null; done
	@$(MAKE) --no-print-directory test-transformers4
	@echo "$(ENGINE_SUITES) concurrently; each is shown when it is done (some minutes)"
	@$(MAKE) --no-print-directory --output-sync=target -j3 $(ENGINE_SUITES)
	@$(MAKE) --no-print-directory $(LATER_SUITES)

VLLM_TEACHER := $(addprefix tests/,$(addprefix contract/,test_served_server.py test_served_faults.py \
  test_served_sampler.py test_teacher_scorer.py) pipeline/test_vllm_teacher.py)
test-vllm test-vllm-teacher: MARKERS := vllm and not (sglang or unsloth)
test-sglang: MARKERS := sglang and not (vllm or unsloth)
test-unsloth: MARKERS := unsloth and not (vllm or sglang)
test-engines-together: MARKERS := (vllm and sglang) or (vllm and unsloth) or (sglang and unsloth)
test-cluster-engines: MARKERS := cluster and (vllm or sglang or unsloth)
test-vllm: FILES := tests $(addprefix --ignore=,$(VLLM_TEACHER))
test-vllm-teacher: FILES := $(VLLM_TEACHER)
test-sglang test-unsloth test-engines-together: FILES := tests
test-cluster-engines: FILES := tests/cluster
test-sglang test-unsloth: BEHIND := nice -n 5
test-cluster-engines: WITH := --cluster
test-vllm test-vllm-teacher test-sglang test-unsloth test-engines-together test-cluster-engines: $(VENV)/installed-dev
	$(BEHIND) $(BIN)/pytest $(FILES) -m "($(MARKERS)) $(LEAVE_OUT)" $(WITH) --engine vllm=$$($(ENVIRONMENT) vllm-cpu) \
	  --engine sglang=$$($(ENVIRONMENT) sglang-cpu) --engine unsloth=$$($(ENVIRONMENT) unsloth-cpu)

# Trained students read by the older generation of transformers.
test-transformers4: $(VENV)/installed-dev
	$(BIN)/pytest tests/contract -m transformers4 --engine transformers4=$$($(ENVIRONMENT) transformers4-cpu)

test-cluster: $(VENV)/installed-dev ## the tests of fleets on a Ray cluster of three nodes on this machine
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/cluster -m cluster --cluster -W default

# `make test` runs the same contract suites over fleets whose members are processes of this machine.
test-cluster-contracts: $(VENV)/installed-dev ## the contract suites over fleets on that cluster (longer)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/contract -m cluster --cluster -W default

test-gpu: $(VENV)/installed-dev ## the same suite with the tests that need a CUDA device
	$(BIN)/pytest tests -m "gpu or not gpu" --require-gpu

# A GPU machine may bring its own interpreters, and folders for their PYTHONPATH. Where they are unset,
# src/qwen3_distill/environments/make.py makes the environments.
VLLM_PYTHON ?=
SGLANG_PYTHON ?=
UNSLOTH_PYTHON ?=
VLLM_PYTHONPATH ?=
SGLANG_PYTHONPATH ?=
UNSLOTH_PYTHONPATH ?=
# The interpreter that runs the project itself on that machine; set it where $(VENV) cannot be made.
GPU_PYTHON ?= $(BIN)/python
# Settings of a machine's engines. SGLang has no float32 kernels on CUDA, which the lab config asks for.
LAB_SETTINGS ?= scoring.dtype=bfloat16 scoring.float32_head=true
STAGES_CONFIG ?= configs/h200.yaml
STAGES_SETTINGS ?=

# path(engine): pytest's option for an engine's PYTHONPATH. setting(section,engine): the same for a config.
path = $(if $($(2)_PYTHONPATH),--engine-variable $(1):PYTHONPATH=$($(2)_PYTHONPATH))
setting = $(if $($(2)_PYTHONPATH),$(1).environment.PYTHONPATH=$($(2)_PYTHONPATH))

gpu-check: $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(VENV)/installed-dev) ## on a GPU machine: the real engines' contract suites, a lab run, throughput
	@set -e; rm -rf runs/gpu-check; failed=0; \
	vllm=$(or $(VLLM_PYTHON),$$($(ENVIRONMENT) vllm-cuda)); \
	sglang=$(or $(SGLANG_PYTHON),$$($(ENVIRONMENT) sglang-cuda)); \
	unsloth=$(or $(UNSLOTH_PYTHON),$$($(ENVIRONMENT) unsloth-cuda)); \
	set -- -W default --engine-device cuda \
	  --engine vllm=$$vllm --engine sglang=$$sglang --engine unsloth=$$unsloth \
	  $(call path,vllm,VLLM) $(call path,sglang,SGLANG) $(call path,unsloth,UNSLOTH); \
	for engine in vllm sglang unsloth; do \
	  $(GPU_PYTHON) -m pytest tests/contract -m $$engine "$$@" \
	    --junit-xml runs/gpu-check/$$engine.xml || failed=1; \
	done; \
	$(GPU_PYTHON) -m pytest tests/unit/modeling/test_modeling.py tests/unit/training/test_learner.py -m gpu \
	  --require-gpu || failed=1; \
	$(GPU_PYTHON) -m pytest tests/pipeline/test_real_engines.py -k die_once "$$@" \
	  --junit-xml runs/gpu-check/together.xml || failed=1; \
	set -- generation.python=$$vllm scoring.python=$$sglang training.python=$$unsloth \
	  $(call setting,generation,VLLM) $(call setting,scoring,SGLANG) $(call setting,training,UNSLOTH); \
	$(GPU_PYTHON) -m benchmarks.robustness.gpu_check --config configs/lab-vllm.yaml "$$@" $(LAB_SETTINGS) \
	  --suites runs/gpu-check/*.xml; \
	$(GPU_PYTHON) -m benchmarks.speed.stages --config $(STAGES_CONFIG) "$$@" $(STAGES_SETTINGS); \
	exit $$failed

# FUZZ: further arguments, e.g. make fuzz FUZZ="--seed 7 --kinds replies --out runs/fuzz.json"
FUZZ ?= --out runs/fuzz.json
fuzz: $(VENV)/installed-dev ## odd configs, replies, files and model directories in great numbers
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.robustness.fuzz $(FUZZ)

check: $(VENV)/installed-dev ## ruff, pyright, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/installed-dev ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/installed-dev ## let git run the fast checks before every commit
	$(BIN)/pre-commit install

docs: $(VENV)/installed-dev ## regenerate docs/configuration.md and the list of commands in docs/reference/cli.md
	$(BIN)/qwen3-distill config reference > docs/configuration.md
	$(BIN)/python -m qwen3_distill.cli.reference docs/reference/cli.md

# The interpreter of a GPU machine, as for gpu-check. Every stage goes on where it was interrupted.
EVIDENCE := $(GPU_PYTHON) -m benchmarks.evidence
EVIDENCE_NEEDS := $(if $(filter $(BIN)/%,$(GPU_PYTHON)),$(VENV)/installed-dev)
EVIDENCE_CPU := --models runs/evidence-cpu/models --settings short --device cpu

evidence: $(EVIDENCE_NEEDS) ## what distillation costs: all settings, arms and seeds on one GPU
	$(EVIDENCE).make_models
	$(EVIDENCE).run --trials --log runs/evidence/trials.jsonl
	$(EVIDENCE).run
	$(EVIDENCE).analyse

evidence-cpu: $(VENV)/installed-dev ## the same for one setting with smaller models, on two cores
	$(EVIDENCE).make_models --out runs/evidence-cpu/models --sizes cpu --settings short --device cpu
	$(EVIDENCE).run $(EVIDENCE_CPU) --workers 2 --trials --steps 20 --problems 500 --log runs/evidence-cpu/trials.jsonl
	$(EVIDENCE).run $(EVIDENCE_CPU) --workers 2 --seeds 2 --steps 35 --problems 500 \
	  --log runs/evidence-cpu/runs.jsonl --trials-log runs/evidence-cpu/trials.jsonl
	$(EVIDENCE).analyse --models runs/evidence-cpu/models --log runs/evidence-cpu/runs.jsonl --results runs/evidence-cpu

evidence-page: $(VENV)/installed-dev ## the tables and pictures of docs/evidence.md, from its JSON
	$(BIN)/python -m benchmarks.evidence.page

clean: ## remove the virtual environment and caches; runs are kept
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python >= 3.10 is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/locked: $(VENV)/bin/python $(LOCK)
	@echo "installing $(LOCK) into $(VENV) (a minute or two)"
	PYTHONPATH=src $(BIN)/python scripts/install_lock.py $(LOCK)
	@touch $@

$(VENV)/installed: $(VENV)/bin/python pyproject.toml $(if $(LOCK),$(VENV)/locked)
	@echo "installing into $(VENV) (a minute or two)"
	$(BIN)/pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements.txt
	$(BIN)/pip install $(PIP_FLAGS) -r requirements.txt
	@touch $@
