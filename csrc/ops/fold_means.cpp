#include "ops/fold_means.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "python/parallel.h"

namespace lipcore {
namespace {

// Returns sum (mean - earlier)^2; earlier becomes their mean, `mean` with this share.
template <class T>
double fold(const T* mean, double* earlier, int64_t count, double share) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double gap = mean[i] - earlier[i];
    sum += gap * gap;
    // From the nearer end, so that a share of one gives the mean itself.
    earlier[i] = share < 0.5 ? earlier[i] + share * gap : mean[i] - gap * (1 - share);
  }
  return sum;
}

}  // namespace

bool fold_means(const std::vector<TensorView>& mean, const std::vector<TensorView>& earlier, const double* share,
                double* gap_sq) {
  struct Chunk {
    size_t tensor;
    int64_t begin;
    double sum;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < mean.size(); ++i) {
    if (earlier[i].dtype != DType::kFloat64 || mean[i].numel != earlier[i].numel || !mean[i].on_cpu() ||
        (mean[i].dtype != DType::kFloat32 && mean[i].dtype != DType::kFloat64))
      return fail({"earlier", static_cast<int64_t>(i)}, "does not fit mean[%zu]", i);
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
