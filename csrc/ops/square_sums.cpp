#include "ops/square_sums.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "python/parallel.h"

namespace lipcore {
namespace {

StepSums sums_of(double square, double nonfinite) {
  if (std::isfinite(square)) return {square, 0, 0, 0, square, 0};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return {nan, nan, nan, nan, nan, nonfinite};
}

}  // namespace

bool square_sums(const std::vector<TensorView>& tensors, StepSums* out) {
  struct Chunk {
    const char* data;
    DType dtype;
    int64_t count;
    double square, nonfinite;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& t = tensors[i];
    if (!t.on_cpu()) return fail({"tensors", static_cast<int64_t>(i)}, "is not on the CPU");
    if (!t.is_dense()) return fail({"tensors", static_cast<int64_t>(i)}, "is not dense memory; pass a contiguous copy");
    for (int64_t begin = 0; begin < t.numel; begin += kChunk)
      chunks.push_back({static_cast<const char*>(t.data) + begin * item_size(t.dtype), t.dtype,
                        std::min(kChunk, t.numel - begin), 0, 0});
    total += t.numel;
  }
  const auto run = [&] {
    parallel_for(static_cast<int64_t>(chunks.size()), total >= kSerialElements, [&](int64_t i) {
      Chunk& c = chunks[static_cast<size_t>(i)];
      c.square = kernels().sample_norms->sum_squares(c.data, c.dtype, c.count);
      if (!std::isfinite(c.square))
        c.nonfinite = static_cast<double>(kernels().sample_norms->count_nonfinite(c.data, c.dtype, c.count));
    });
  };
  if (total >= kSerialElements) {
    PyThreadState* state = PyEval_SaveThread();
    run();
    PyEval_RestoreThread(state);
  } else {
    run();
  }
  size_t at = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    double square = 0, nonfinite = 0;
    for (int64_t begin = 0; begin < tensors[i].numel; begin += kChunk, ++at) {
      square += chunks[at].square;
      nonfinite += chunks[at].nonfinite;
    }
    out[i] = sums_of(square, nonfinite);
  }
  return true;
}

}  // namespace lipcore
