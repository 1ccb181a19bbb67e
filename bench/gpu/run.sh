#!/usr/bin/env bash
# Builds lipcore with CUDA from what is installed, runs the GPU tests and the benchmarks, writes
# bench/results/gpu-<name>.json. Needs no network: torch >= 2.10 with CUDA, nvcc, cmake, ninja, pybind11, pytest, and
# scikit-build-core and pytest-xdist if they are there. About 10 minutes at most.
#
#   bench/gpu/run.sh [--name NAME] [--seconds N] [--compile-only]
#
# --name: of the result file, by default the GPU's. --seconds: for the benchmarks, 240 by default. --compile-only: build and
# import only; needs no GPU. PYTHON=, LIPCORE_CUDA_ARCHS= and LIPCORE_COMMIT= are honoured.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=$(command -v "${PYTHON:-python3}")
name= seconds=240 compile_only=
while (($#)); do
  case $1 in
    --name) name=$2 && shift ;;
    --seconds) seconds=$2 && shift ;;
    --compile-only) compile_only=yes ;;
    *) echo "run.sh: unknown argument '$1'; see the top of $0" >&2 && exit 2 ;;
  esac
  shift
done

for folder in "$(dirname "$python")" /usr/local/cuda/bin /opt/cuda/bin; do PATH=$PATH:$folder; done
for tool in nvcc cmake; do
  command -v $tool > /dev/null || { echo "run.sh: no $tool on PATH" >&2 && exit 1; }
done
for module in torch pybind11 pytest; do
  "$python" -c "import $module" 2> /dev/null || { echo "run.sh: no $module for $python; install it there" >&2 && exit 1; }
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export LIPCORE_CUDA=ON
if [ -z "${LIPCORE_CUDA_ARCHS:-}" ]; then
  LIPCORE_CUDA_ARCHS=$([ $compile_only ] && echo 90-real || echo native)
fi
export LIPCORE_CUDA_ARCHS
: "${LIPCORE_COMMIT:=$(git -C "$root" describe --always --dirty 2> /dev/null || echo unknown)}"
export LIPCORE_COMMIT

build_with_pip() {
  "$python" -c 'import scikit_build_core, pip' 2> /dev/null &&
    "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --no-warn-conflicts \
      --config-settings=build-dir="$work/build" --target "$work/site" "$root"
}

build_with_cmake() {
  local generator=()
  command -v ninja > /dev/null && generator=(-G Ninja)
  cmake -S "$root" -B "$work/cmake" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
    -DLIPCORE_CUDA=ON -DLIPCORE_CUDA_ARCHS="$LIPCORE_CUDA_ARCHS" > "$work/cmake.log" || { cat "$work/cmake.log" && return 1; }
  cmake --build "$work/cmake" --parallel || return 1
  mkdir -p "$work/site"
  cp -r "$root/lipcore" "$work/site/"
  rm -f "$work"/site/lipcore/_core*.so
  cp "$work"/cmake/_core*.so "$work/site/lipcore/"
}

echo "== build ($LIPCORE_CUDA_ARCHS)"
build_with_pip || build_with_cmake
nvcc -O3 -std=c++17 -arch="$([ $compile_only ] && echo sm_90 || echo native)" -shared -Xcompiler=-fPIC \
  -o "$work/libstream.so" "$root/bench/gpu/stream.cu"
cd "$work" # so that the clone's lipcore/ does not hide the one just built
"$python" -c 'from lipcore import _core; assert _core.cuda_built; print("CUDA devices:", _core.cuda_device_count())'
[ $compile_only ] && exit

checks=()
pytest=("$python" -m pytest -q -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider)
export LIPCORE_REQUIRE_CUDA=1

echo "== GPU tests"
parallel=()
"$python" -c 'import xdist' 2> /dev/null && parallel=(-n 8 --dist loadfile)
timeout 300 "${pytest[@]}" "${parallel[@]}" -m gpu "$root/tests"
checks+=(--check tests=passed)

# A few tests that between them launch every kernel, because the tool makes everything slow.
small='(special_values and float32) or agrees_with_the_cpu or races_on_cuda or many_tensors_on_cuda or mixtures_on_cuda'
few=("$root"/tests/project/test_cuda.py "$root"/tests/functional "$root"/tests/core)
for tool in memcheck racecheck; do
  if ! command -v compute-sanitizer > /dev/null; then
    echo "== $tool: no compute-sanitizer here"
    checks+=(--check "$tool=not available")
    continue
  fi
  echo "== $tool"
  status=0
  # Without torch's cache every tensor is an allocation of its own, and an access beside it is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 90 compute-sanitizer --tool $tool --error-exitcode 9 \
    "${pytest[@]}" -m gpu "${few[@]}" -k "$small" > "$work/$tool.log" 2>&1 || status=$?
  case $status in
    0) checks+=(--check "$tool=passed") ;;
    124) echo "not finished after 90 s" && checks+=(--check "$tool=not finished") ;;
    *) tail -n 60 "$work/$tool.log" && exit 1 ;;
  esac
done

echo "== benchmarks"
mkdir -p "$root/bench/results"
"$python" "$root/bench/gpu/bench_gpu.py" --stream "$work/libstream.so" --results "$root/bench/results" \
  --seconds "$seconds" ${name:+--name "$name"} "${checks[@]}"
