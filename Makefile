# make quickstart              corrected GRPO on a CPU, end to end; options as in KL_TYPE=k3_as_loss
# make doctor                  klplug doctor in the quickstart's environment; HOST=verl for that one
# make test                    everything, cheap checks first; KLPLUG_TEST_HOSTS=openrlhf,verl (empty: the core)
# make test-runs               every other whole training run, about an hour: before a release
# make test-latest             the newest release of each host that the registry has: a line each
# make lint                    ruff and mypy
# make docs                    the documentation into site/, strictly
# make pages                   tables, curves and output in README and docs made anew
# make reproduce               the runs behind docs/evidence.md (GRID=tier1); FAST=1: two of them, 15 minutes
# make bench                   the KL term beside each host's own: time and memory, as ratios
# make clean                   what can be made again: caches and builds (never runs/)
# make clean-all               the environments too

.DEFAULT_GOAL := help
.PHONY: help
help:
	@sed '/^$$/q; s/^# //' Makefile

PYTHON ?= python3
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu

# Some shells export the machine's name as HOST.
ifeq ($(origin HOST),environment)
HOST := $(filter openrlhf verl,$(HOST))
endif
ifneq ($(HOST),$(firstword $(filter openrlhf verl,$(HOST))))
$(error HOST=$(HOST): there is openrlhf and verl)
endif

QUICKSTART_ENV = .venv-$(if $(and $(filter verl,$(HOST)),$(wildcard requirements/verl.txt)),verl,openrlhf)
QUICKSTART_OPTIONS = \
	$(if $(HOST),--host '$(HOST)') \
	$(if $(KL_TYPE),--kl-type '$(KL_TYPE)') \
	$(if $(KL_COEF),--kl-coef='$(KL_COEF)') \
	$(if $(STEPS),--steps='$(STEPS)') \
	$(if $(SEED),--seed='$(SEED)') \
	$(if $(MODEL),--model '$(MODEL)') \
	$(if $(DATA),--data '$(DATA)') \
	$(if $(GSM8K),--gsm8k '$(GSM8K)') \
	$(if $(RANKS),--ranks='$(RANKS)') \
	$(if $(UPDATES),--updates='$(UPDATES)') \
	$(if $(OUT),--out '$(OUT)') \
	$(if $(filter 1 yes true,$(OVERWRITE)),--overwrite)

.PHONY: quickstart clean clean-all

quickstart: $(QUICKSTART_ENV)
	@$(QUICKSTART_ENV)/bin/python -m recipes.quickstart $(QUICKSTART_OPTIONS)

.PHONY: doctor
doctor: $(QUICKSTART_ENV)
	@$(QUICKSTART_ENV)/bin/python -m recipes.cpu_shim $(QUICKSTART_ENV:.venv-%=%) $(QUICKSTART_ENV)/bin/klplug doctor

.PHONY: reproduce
# HOST=verl: the environment for a grid of verl's.
reproduce: $(QUICKSTART_ENV)
	@OMP_NUM_THREADS=1 $(QUICKSTART_ENV)/bin/python -m recipes.reproduce \
		$(if $(filter 1 yes true,$(FAST)),fast,$(or $(GRID),tier1)) $(if $(OUT),--out '$(OUT)')

KLPLUG_TEST_HOSTS ?= openrlhf,verl
comma := ,
TEST_HOSTS = $(subst $(comma), ,$(KLPLUG_TEST_HOSTS))

.PHONY: test lint docs test-core test-mathematics test-tools test-openrlhf test-verl test-cluster bench
# Small tensors, and runs of many processes: a second thread each would only contend.
test-mathematics test-tools test-openrlhf test-verl test-cluster bench: export OMP_NUM_THREADS := 1

# Cheap checks first. The hosts' run side by side; what each prints comes together at its end.
test: lint test-core
ifneq ($(strip $(TEST_HOSTS)),)
	$(call say,$(TEST_HOSTS): real training steps$(comma) then two whole runs each; about 15 minutes)
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(TEST_HOSTS:%=test-%) test-cluster
endif

lint: .venv
	$(call say,ruff and mypy; under a minute)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv
	.venv/bin/python -m docs.build --check
	.venv/bin/mkdocs build --strict --quiet

PYTEST = .venv$(1)/bin/python -m pytest -q
say = @echo "make $@: $(1)"

.PHONY: pages
pages: .venv
	.venv/bin/python -m docs.build

test-core: .venv
	$(call say,mathematics$(comma) contract$(comma) command line$(comma) audit$(comma) wheel$(comma) links; about 2 minutes)
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-mathematics test-tools

test-mathematics: .venv
	KLPLUG_TEST_HOSTS= $(call PYTEST) tests/core
test-tools: .venv
	KLPLUG_TEST_HOSTS= $(call PYTEST) tests/hosting tests/packaging tests/cli tests/audit tests/face

# Ends of whole runs come last: they cost minutes each, mostly of imports in Ray's workers.
HOST_TESTS_openrlhf = tests/recipes tests/openrlhf
HOST_TESTS_verl = tests/verl
# What holds of both is tried once, in the first one's environment.
RUN_TESTS_openrlhf = $(HOST_TESTS_openrlhf) tests/face
RUN_TESTS_verl = $(HOST_TESTS_verl)
test-openrlhf test-verl: test-%: .venv-%
	KLPLUG_TEST_HOSTS=$* $(call PYTEST,-$*) -m 'not slow' $(HOST_TESTS_$*)
	KLPLUG_TEST_HOSTS=$* $(call PYTEST,-$*) -m smoke tests/$*

# Both hosts' runs over two nodes: the third job, taken up by whichever host is done first.
test-cluster: $(TEST_HOSTS:%=.venv-%)
	@$(foreach host,$(TEST_HOSTS),\
		KLPLUG_TEST_HOSTS=$(host) $(call PYTEST,-$(host)) -m smoke tests/cluster && ) true

RUNS = $(TEST_HOSTS:%=test-runs-%) test-runs-cluster
.PHONY: test-runs test-runs-openrlhf test-runs-verl test-runs-cluster test-latest
test-runs-openrlhf test-runs-verl test-runs-cluster: export OMP_NUM_THREADS := 1
# As in test: the hosts' side by side, what needs two nodes in a third job.
test-runs: $(TEST_HOSTS:%=.venv-%)
	$(call say,every whole run that make test leaves out; about an hour)
	@$(MAKE) --no-print-directory --keep-going -j2 --output-sync=target $(RUNS)

WHOLE_RUNS = KLPLUG_TEST_HOSTS=$(1) $(call PYTEST,-$(1)) --durations=0 -m 'slow and not smoke' $(2)

test-runs-openrlhf test-runs-verl: test-runs-%: .venv-%
	$(call WHOLE_RUNS,$*,$(RUN_TESTS_$*) tests/faults)

test-runs-cluster: $(TEST_HOSTS:%=.venv-%)
	@status=0; $(foreach host,$(TEST_HOSTS),\
		$(call WHOLE_RUNS,$(host),tests/cluster) || status=1; ) exit $$status

test-latest: $(TEST_HOSTS:%=.venv-%)
	@status=0; for host in $(TEST_HOSTS); do \
		.venv-$$host/bin/python -m tests.latest $$host || status=1; done; exit $$status

# glibc keeps freed memory, as CUDA's allocator does: else page faults are what is measured.
bench: export MALLOC_MMAP_THRESHOLD_ := 33554432
bench: export MALLOC_TRIM_THRESHOLD_ := 4294967296
bench: $(addprefix .venv-,$(TEST_HOSTS))
	@for host in $(TEST_HOSTS); do \
		KLPLUG_TEST_HOSTS=$$host .venv-$$host/bin/python -m pytest -q -s benchmarks || exit 1; \
	done

# Environments: each from its lock, then klplug itself as it lies here. A lock's torch is a CPU
# build; PyTorch's own index is asked only where the configured registries lack it.
define environment
.PHONY: $(1)
$(1): $(1)/.klplug

$(1)/.lock: $(2)
	@$$(PYTHON) requirements/check.py $(2) . $(3)
	@echo "making $(1) from $(2) ($(3) GB, minutes, once)"
	$$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q --no-deps $$$$(grep '^torch==' $(2)) || \
		$(1)/bin/pip install -q --no-deps $$$$(grep '^torch==' $(2)) --extra-index-url $$(TORCH_CPU_INDEX)
	DS_BUILD_OPS=0 $(1)/bin/pip install -q --no-deps -r $(2)
	@touch $$@

$(1)/.klplug: $(1)/.lock pyproject.toml
	$(1)/bin/pip install -q --no-deps -e .
	@touch $$@
endef

# Gigabytes as measured, and what pip needs on the way.
$(eval $(call environment,.venv,requirements/dev.txt,2))
$(eval $(call environment,.venv-openrlhf,requirements/openrlhf.txt,6))
$(eval $(call environment,.venv-verl,requirements/verl.txt,3))

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .cache/torch_extensions
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

clean-all: clean
	rm -rf .venv* .cache
