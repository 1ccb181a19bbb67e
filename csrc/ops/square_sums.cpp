#include "ops/square_sums.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "python/parallel.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/tensor_sums.h"
#endif

namespace lipcore {
namespace {

StepSums sums_of(double square, double nonfinite) {
  if (std::isfinite(square)) return {square, 0, 0, square, 0};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return {nan, nan, nan, nan, nonfinite};
}

bool check_all(const std::vector<TensorView>& tensors, dlpack::Device device) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorView& t = tensors[i];
    const ArgumentName name = {"tensors", static_cast<int64_t>(i)};
    if (t.device.type != device.type || t.device.id != device.id)
      return fail(name, device.type == dlpack::kCPU ? "is not on the CPU" : "is on another device than the result");
    if (!t.is_dense()) return fail(name, "is not dense memory; pass a contiguous copy");
  }
  return true;
}

}  // namespace

bool square_sums(const std::vector<TensorView>& tensors, StepSums* out, dlpack::Device device) {
  if (!check_all(tensors, device)) return false;
  if (device.type != dlpack::kCPU) {
#if defined(LIPCORE_WITH_CUDA)
    return tensors.empty() || cuda::square_sums(tensors, device, out);
#else
    return fail({"tensors"},
                "are on a CUDA device, but this lipcore was built without CUDA; rebuild with "
                "LIPCORE_CUDA=ON or pass CPU tensors");
#endif
  }
  struct Chunk {
    const char* data;
    DType dtype;
    int64_t count;
    double square, nonfinite;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (const TensorView& t : tensors) {
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
