#include "ops/fold_means.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "math/fold.h"
#include "python/parallel.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/tensor_sums.h"
#endif

namespace lipcore {
namespace {

template <class T>
double fold(const T* mean, double* earlier, int64_t count, double share) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += fold_mean(mean[i], &earlier[i], share);
  return sum;
}

}  // namespace

bool fold_means(const std::vector<TensorView>& mean, const std::vector<TensorView>& earlier, const double* share,
                double* gap_sq, dlpack::Device device) {
  for (size_t i = 0; i < mean.size(); ++i) {
    const bool there = mean[i].device.type == device.type && mean[i].device.id == device.id;
    if (earlier[i].dtype != DType::kFloat64 || mean[i].numel != earlier[i].numel || !there ||
        !mean[i].same_device(earlier[i]) || (mean[i].dtype != DType::kFloat32 && mean[i].dtype != DType::kFloat64))
      return fail({"earlier", static_cast<int64_t>(i)}, "does not fit mean[%zu]", i);
  }
  if (device.type != dlpack::kCPU) {
#if defined(LIPCORE_WITH_CUDA)
    return mean.empty() || cuda::fold_means(mean, earlier, device, share, gap_sq);
#else
    return fail({"mean"}, "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON");
#endif
  }
  struct Chunk {
    size_t tensor;
    int64_t begin;
    double sum;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < mean.size(); ++i) {
    for (int64_t begin = 0; begin < mean[i].numel; begin += kChunk) chunks.push_back({i, begin, 0});
    total += mean[i].numel;
  }
  const auto run = [&](int64_t index) {
    Chunk& c = chunks[static_cast<size_t>(index)];
    const int64_t count = std::min(kChunk, mean[c.tensor].numel - c.begin);
    const auto of = [&](auto type) {
      using T = decltype(type);
      c.sum = fold(static_cast<const T*>(mean[c.tensor].data) + c.begin,
                   static_cast<double*>(earlier[c.tensor].data) + c.begin, count, share[c.tensor]);
    };
    mean[c.tensor].dtype == DType::kFloat32 ? of(0.0f) : of(0.0);
  };
  parallel_for(static_cast<int64_t>(chunks.size()), total >= kSerialElements, run);
  std::fill(gap_sq, gap_sq + mean.size(), 0.0);
  for (const Chunk& c : chunks) gap_sq[c.tensor] += c.sum;
  return true;
}

}  // namespace lipcore
