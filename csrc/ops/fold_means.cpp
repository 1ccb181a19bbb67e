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

struct AsItIs {
  template <class T>
  double operator()(T x) const {
    return x;
  }
};

template <class Stored, class Wide, class Widen>
double fold(const BlockMeans& block, const TensorView& earlier, size_t tensor, int64_t begin, int64_t count,
            double share, Widen widen) {
  const auto* last = static_cast<const Stored*>(block.last[tensor].data) + begin;
  const auto* reference = static_cast<const Stored*>(block.reference[tensor].data) + begin;
  const auto* deviation = static_cast<const Wide*>(block.deviation[tensor].data) + begin;
  auto* before = static_cast<double*>(earlier.data) + begin;
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += fold_mean(mean_offset(widen(last[i]), widen(reference[i]), deviation[i]), &before[i], share);
  return sum;
}

double fold(const BlockMeans& block, const TensorView& earlier, size_t tensor, int64_t begin, int64_t count,
            double share) {
  switch (block.last[tensor].dtype) {
    case DType::kFloat64:
      return fold<double, double>(block, earlier, tensor, begin, count, share, AsItIs{});
    case DType::kFloat32:
      return fold<float, float>(block, earlier, tensor, begin, count, share, AsItIs{});
    case DType::kBfloat16:
      return fold<uint16_t, float>(block, earlier, tensor, begin, count, share,
                                   [](uint16_t bits) -> double { return bfloat16_to_float(bits); });
    default:
      return fold<uint16_t, float>(block, earlier, tensor, begin, count, share,
                                   [](uint16_t bits) -> double { return float16_to_float(bits); });
  }
}

bool fits(const BlockMeans& block, const TensorView& earlier, size_t i, dlpack::Device device) {
  const TensorView& last = block.last[i];
  const DType wide = last.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto beside = [&](const TensorView& other, DType dtype) {
    return other.dtype == dtype && other.numel == last.numel && other.same_device(last);
  };
  return last.device.type == device.type && last.device.id == device.id && last.dtype != DType::kInt64 &&
         beside(block.reference[i], last.dtype) && beside(block.deviation[i], wide) && beside(earlier, DType::kFloat64);
}

}  // namespace

bool fold_means(const BlockMeans& block, const std::vector<TensorView>& earlier, const double* share, double* gap_sq,
                dlpack::Device device) {
  const size_t tensors = earlier.size();
  for (size_t i = 0; i < tensors; ++i)
    if (!fits(block, earlier[i], i, device))
      return fail({"earlier", static_cast<int64_t>(i)}, "does not fit last, reference and deviation[%zu]", i);
  if (device.type != dlpack::kCPU) {
#if defined(LIPCORE_WITH_CUDA)
    return earlier.empty() || cuda::fold_means(block, earlier, device, share, gap_sq);
#else
    return fail({"last"}, "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON");
#endif
  }
  struct Chunk {
    size_t tensor;
    int64_t begin;
    double sum;
  };
  std::vector<Chunk> chunks;
  int64_t total = 0;
  for (size_t i = 0; i < tensors; ++i) {
    for (int64_t begin = 0; begin < earlier[i].numel; begin += kChunk) chunks.push_back({i, begin, 0});
    total += earlier[i].numel;
  }
  const auto run = [&](int64_t index) {
    Chunk& c = chunks[static_cast<size_t>(index)];
    const int64_t count = std::min(kChunk, earlier[c.tensor].numel - c.begin);
    c.sum = fold(block, earlier[c.tensor], c.tensor, c.begin, count, share[c.tensor]);
  };
  parallel_for(static_cast<int64_t>(chunks.size()), total >= kSerialElements, run);
  std::fill(gap_sq, gap_sq + tensors, 0.0);
  for (const Chunk& c : chunks) gap_sq[c.tensor] += c.sum;
  return true;
}

}  // namespace lipcore
