# make quickstart              corrected GRPO on a CPU, end to end; options as in KL_TYPE=k3_as_loss
# make test                    everything, cheap checks first; KLPLUG_TEST_HOSTS=openrlhf,verl (empty: the core)
# make test-releases           whole training runs in verl's releases before the tested one, some minutes
# make test-latest             the newest release of each host that the registry has: a line each
# make lint                    ruff and mypy
# make docs                    the documentation into site/, strictly
# make bench                   the KL term beside each host's own: time and memory, as ratios
# make clean                   what can be made again: caches and builds (never runs/)
# make clean-all               the environments too

PYTHON ?= python3
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu

# Some shells export the machine's name as HOST.
ifeq ($(origin HOST),environment)
HOST := $(filter openrlhf verl,$(HOST))
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

KLPLUG_TEST_HOSTS ?= openrlhf,verl
comma := ,
TEST_HOSTS = $(subst $(comma), ,$(KLPLUG_TEST_HOSTS))

.PHONY: test lint docs test-core test-openrlhf test-verl bench
# Small tensors, and runs of many processes: a second thread each would only contend.
test-core test-openrlhf test-verl bench: export OMP_NUM_THREADS := 1

# One after the other, also under -j: each fills the machine.
test: lint test-core
	@for host in $(TEST_HOSTS); do $(MAKE) --no-print-directory test-$$host || exit 1; done

lint: .venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

docs: .venv
	.venv/bin/mkdocs build --strict --quiet

test-core: .venv
	KLPLUG_TEST_HOSTS= .venv/bin/python -m pytest -q tests/core tests/packaging tests/cli tests/audit tests/face

test-openrlhf: .venv-openrlhf
	KLPLUG_TEST_HOSTS=openrlhf .venv-openrlhf/bin/python -m pytest -q -m 'not slow' tests/recipes tests/openrlhf
	KLPLUG_TEST_HOSTS=openrlhf .venv-openrlhf/bin/python -m pytest -q -m slow tests/openrlhf tests/cluster

test-verl: .venv-verl
	KLPLUG_TEST_HOSTS=verl .venv-verl/bin/python -m pytest -q -m 'not slow and not release' tests/verl
	KLPLUG_TEST_HOSTS=verl .venv-verl/bin/python -m pytest -q -m slow tests/verl tests/cluster

.PHONY: test-releases test-latest
test-releases: .venv-verl
	KLPLUG_TEST_HOSTS=verl OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -q -m release tests/verl

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
	@echo "making $(1) from $(2) (minutes, once)"
	$$(PYTHON) -m venv $(1)
	$(1)/bin/pip install -q --no-deps $$$$(grep '^torch==' $(2)) || \
		$(1)/bin/pip install -q --no-deps $$$$(grep '^torch==' $(2)) --extra-index-url $$(TORCH_CPU_INDEX)
	DS_BUILD_OPS=0 $(1)/bin/pip install -q --no-deps -r $(2)
	@touch $$@

$(1)/.klplug: $(1)/.lock pyproject.toml
	$(1)/bin/pip install -q --no-deps -e .
	@touch $$@
endef

$(eval $(call environment,.venv,requirements/dev.txt))
$(eval $(call environment,.venv-openrlhf,requirements/openrlhf.txt))
$(eval $(call environment,.venv-verl,requirements/verl.txt))

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks .cache/torch_extensions
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

clean-all: clean
	rm -rf .venv* .cache
