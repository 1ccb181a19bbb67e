# Every target prepares .venv by itself; a second run starts at once.
#   PYTHON=python3.12                 the interpreter for .venv (only when it is first made)
#   PIP_FLAGS="--extra-index-url ..." passed to every pip call
#   DEMO_FLAGS, PYTEST_FLAGS, BENCH_FLAGS, SPIKES_FLAGS   passed to lipcore demo, pytest, pytest bench, bench/spikes
#   PYTEST_WORKERS=2          processes that `make test` and `make test-ci` run at a time
#   LIPCORE_CUDA=AUTO|ON|OFF          see CMakeLists.txt
PYTHON ?= python3
PIP_FLAGS ?=
DEMO_FLAGS ?= --force
PYTEST_FLAGS ?=
PYTEST_WORKERS ?= 2
BENCH_FLAGS ?=
SPIKES_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
# Editable: Python sources are used where they lie, and `import lipcore` finds the compiled module from the clone's root
# too, where a plain install would be hidden by ./lipcore. No isolation: the build tools of .venv keep builds incremental.
INSTALL := $(PIP) --quiet --no-build-isolation --editable
CORE_SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f)
CPP_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(CORE_SOURCES) $(shell find tests/cuda_on_cpu -type f))

STAMPS := $(VENV)/stamps
CORE := $(STAMPS)/core
BUILD_SETTINGS := cuda=$(LIPCORE_CUDA) archs=$(LIPCORE_CUDA_ARCHS) werror=$(LIPCORE_WERROR) cxx=$(CXX)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # two pips in one .venv

.PHONY: help demo test test-ci test-all test-asan test-tsan test-sanitized test-cuda-on-cpu test-cuda-on-cpu-asan
.PHONY: wheel test-cuda-on-cpu-tsan test-peers browser mutants bench bench-peers plots gallery spikes clean distclean check FORCE
.PHONY: lint lint-ruff lint-mypy lint-cpp lint-includes lint-spelling

help: ## list the targets
	@sed -n 's/^\([a-z][a-z -]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "make %-22s %s\n", $$1, $$2 }'

demo: $(STAMPS)/demo $(CORE) ## train small networks and draw lipcore-demo/figure.png (2 minutes)
	$(BIN)/lipcore demo $(DEMO_FLAGS)

# A thread each: the pools of two processes would wait for each other's cores. Tests of several threads ask for them.
PARALLEL_PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist loadfile
test: $(STAMPS)/test $(CORE) ## run the tests (some minutes)
	$(PARALLEL_PYTEST) $(PYTEST_FLAGS)
	$(MAKE) --no-print-directory test-cuda-on-cpu

test-ci: $(STAMPS)/test $(STAMPS)/trainers $(CORE) browser ## those with the marker ci: whole models, several ranks, trainers, the demo; and sanitizers
	$(PARALLEL_PYTEST) -m "ci and not slow" $(PYTEST_FLAGS)
	$(MAKE) --no-print-directory test-cuda-on-cpu CUDA_TESTS=
	$(MAKE) --no-print-directory test-sanitized

# Debian's, where this user may install it; without one the tests of the report's page are skipped, and say so.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } > /dev/null 2>&1 || \
	echo "no chromium could be installed: the browser's tests will be skipped" >&2

test-all: $(STAMPS)/test $(STAMPS)/trainers $(CORE) browser ## those of both, and the slow ones
	$(BIN)/pytest -m "slow or not slow" $(PYTEST_FLAGS)

mutants: $(STAMPS)/test $(CORE) ## plant small faults one by one in a copy: the tests must see each
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/mutants/run.py
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/cuda_on_cpu/mutate.py

bench: $(STAMPS)/bench $(CORE) ## run the benchmarks (half an hour)
	$(BIN)/pytest bench $(BENCH_FLAGS)

bench-peers: $(STAMPS)/peers $(CORE) ## those against other published tools, which this installs
	$(BIN)/pytest bench/bench_cockpit.py bench/bench_per_sample.py bench/bench_trainscope.py $(BENCH_FLAGS)

test-peers: $(STAMPS)/peers $(CORE) ## Opacus's shipped layer tests against lipcore; counts go to bench/results
	OPACUS_RESULTS=bench/results/opacus-layer-tests.json $(BIN)/pytest -m slow tests/peers $(PYTEST_FLAGS)

spikes: $(STAMPS)/test $(CORE) ## inject faults into three small models and count what each alarm finds (some minutes)
	$(BIN)/python bench/spikes $(SPIKES_FLAGS)
	$(BIN)/python bench/evidence_page.py

plots: $(STAMPS)/bench ## draw bench/results/*.png from the results there
	$(BIN)/python bench/plots.py

gallery: $(STAMPS)/test $(CORE) browser ## draw the pictures of docs/gallery.md, which needs chromium; NAMES= for some of them
	$(BIN)/python docs/figures/gallery.py $(NAMES)

# The instrumented module takes the place of the ordinary one until the next build; Python and torch themselves are not
# instrumented, so the sanitizer has to be loaded before them, and Python's own leaks are left out.
test-asan test-tsan: test-%: $(STAMPS)/test $(CORE) ## run the tests with sanitizers in the core
	PATH="$(abspath $(BIN)):$$PATH" && cmake --preset $* && cmake --build --preset $* && rm -f $(CORE) && \
	cmake --install build/$* --prefix "$$(python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')"
	@rm -f build/$*/report.*
	LD_PRELOAD="$$($(CXX) -print-file-name=lib$*.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:log_path=build/$*/report UBSAN_OPTIONS=print_stacktrace=1:log_path=build/$*/report \
	TSAN_OPTIONS=suppressions=tests/tsan.supp:log_path=build/$*/report \
	$(BIN)/pytest $(PYTEST_FLAGS) || { cat build/$*/report.* >&2; exit 1; }

# The tests that call the core most: every kernel, refusal and plan; and whatever runs in several threads.
ASAN_TESTS := core functional metric trajectory/test_trajectory.py trajectory/test_update_sources.py \
  capture/test_shortcut.py per_sample/test_per_sample_single.py
TSAN_TESTS := project/test_determinism.py capture/test_shortcut.py functional/test_outer_norms.py

test-sanitized: ## a part of the tests, with one sanitizer after the other
	$(MAKE) --no-print-directory test-asan PYTEST_FLAGS="$(addprefix tests/,$(ASAN_TESTS))"
	$(MAKE) --no-print-directory test-tsan PYTEST_FLAGS="$(addprefix tests/,$(TSAN_TESTS))"
	$(MAKE) --no-print-directory test-cuda-on-cpu-asan test-cuda-on-cpu-tsan

# The GPU tests on the emulator of tests/cuda_on_cpu; with a sanitizer in the kernels those that call each of them. An
# empty CUDA_TESTS is all of them. Nothing of what was asked for with -k may be among them: pytest's 5.
CUDA_TESTS_OF_LAYERS := $(patsubst %,functional/test_%_norms.py::test_races_on_cuda,row_sum linear conv embedding)
CUDA_TESTS := cuda_on_cpu project/test_cuda.py $(patsubst %,functional/test_%.py,sketch update_sums tensor_stats) tensor_stats core $(CUDA_TESTS_OF_LAYERS)
CUDA_SANITIZED_TESTS := cuda_on_cpu project/test_cuda.py functional/test_tensor_stats.py core $(CUDA_TESTS_OF_LAYERS) \
  $(addprefix functional/test_update_sums.py::test_,mixtures_on_cuda values_that_are_not_finite_on_cuda) \
  $(addprefix functional/test_sketch.py::test_,many_tensors_on_cuda plan_on_cuda)
CUDA_BUILD = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/cuda_on_cpu/build.py
test-cuda-on-cpu: $(STAMPS)/test $(CORE) ## the GPU tests on the CPU: the .cu files over an emulator
	core="$$($(CUDA_BUILD) plain)" && export LIPCORE_CUDA_ON_CPU="$$core" && \
	$(PARALLEL_PYTEST) -m gpu $(addprefix tests/,$(CUDA_TESTS)) $(PYTEST_FLAGS) || [ $$? = 5 ]

test-cuda-on-cpu-asan test-cuda-on-cpu-tsan: test-cuda-on-cpu-%: $(STAMPS)/test $(CORE)
	@rm -f build/cuda_on_cpu/$*/report.*
	core="$$($(CUDA_BUILD) $*)" && LIPCORE_CUDA_ON_CPU="$$core" \
	LD_PRELOAD="$$($(CXX) -print-file-name=lib$*.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:log_path=build/cuda_on_cpu/$*/report \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=build/cuda_on_cpu/$*/report \
	TSAN_OPTIONS=suppressions=tests/tsan.supp:log_path=build/cuda_on_cpu/$*/report \
	$(BIN)/pytest -m gpu $(addprefix tests/,$(CUDA_SANITIZED_TESTS)) $(PYTEST_FLAGS) || \
	{ cat build/cuda_on_cpu/$*/report.* >&2; exit 1; }

# Whatever C library this machine has says the tag; those that are published come from cibuildwheel (pyproject.toml).
wheel: $(STAMPS)/wheel $(CORE) ## build a manylinux wheel for this Python, in dist/
	rm -rf build/wheel && PATH="$(abspath $(BIN)):$$PATH" LIPCORE_CUDA=OFF \
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --quiet --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/lipcore-*.whl

lint: lint-ruff lint-mypy lint-cpp lint-includes lint-spelling ## everything CI checks apart from the tests

lint-ruff: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-mypy: $(STAMPS)/dev
	$(BIN)/mypy

lint-cpp: $(STAMPS)/dev
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

# One build of the core serves every torch: its headers stay out of csrc/, and pybind11 stays in one folder.
lint-includes:
	@! grep -nE '#[[:space:]]*include[[:space:]]*[<"](torch|ATen|c10|caffe2)/' $(CPP_SOURCES) || \
	{ echo "torch headers are not allowed in csrc/" >&2; exit 1; }
	@! grep -nE '#[[:space:]]*include[[:space:]]*[<"]pybind11/' $(filter-out csrc/bindings/%,$(CPP_SOURCES)) || \
	{ echo "pybind11 is allowed in csrc/bindings/ only" >&2; exit 1; }

lint-spelling: $(STAMPS)/dev
	$(BIN)/codespell

clean: ## remove what was built; the packages in .venv stay
	rm -rf build dist $(STAMPS)/core .pytest_cache .mypy_cache .ruff_cache .benchmarks

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# ---- set-up. A stamp is written after its step has succeeded, so an interrupted step is simply taken again.
$(STAMPS)/venv:
	@$(MAKE) --no-print-directory check
	$(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=22.3"
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/base: $(STAMPS)/venv constraints.txt
	$(PIP) torch numpy scikit-build-core pybind11 cmake ninja
	@touch $@

$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/trainers $(STAMPS)/bench $(STAMPS)/peers $(STAMPS)/wheel $(STAMPS)/dev: $(STAMPS)/%: $(STAMPS)/base pyproject.toml | $(STAMPS)/settings
	$(INSTALL) ".[$*]"
	@touch $@ $(CORE)

$(CORE): $(STAMPS)/base $(STAMPS)/settings $(CORE_SOURCES)
	$(INSTALL) . --no-deps
	@touch $@

# Changes when the build settings do, and with it the core.
$(STAMPS)/settings: FORCE | $(STAMPS)/venv
	@echo '$(BUILD_SETTINGS)' | cmp -s - $@ || echo '$(BUILD_SETTINGS)' > $@

check: ## say what is missing on this machine
	@missing=; note() { missing=yes; echo "missing: $$1" >&2; }; \
	has() { $(PYTHON) -c "$$1" > /dev/null 2>&1; }; \
	if ! command -v $(firstword $(PYTHON)) > /dev/null; then note "Python 3.10 or later ($(PYTHON) is not a command)"; \
	elif ! has 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	  note "Python 3.10 or later ($(PYTHON) is $$($(PYTHON) -V 2>&1); another one: make PYTHON=python3.12)"; \
	else \
	  has 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' || \
	    note "the headers of $(PYTHON) (Python.h)"; \
	  has 'import venv, ensurepip' || note "the venv module of $(PYTHON)"; \
	fi; \
	command -v $(firstword $(CXX)) > /dev/null || note "a C++17 compiler ($(CXX); another one: make CXX=clang++)"; \
	if [ "$$missing" ]; then \
	  echo "Debian, Ubuntu:  sudo apt install python3 python3-dev python3-venv g++ make" >&2; \
	  echo "Fedora:          sudo dnf install python3 python3-devel gcc-c++ make" >&2; \
	  exit 1; \
	fi
