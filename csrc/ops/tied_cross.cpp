// sum_v <E_v, H_v> of a sample over its tokens v: E_v is the sum of the embedding gradient's rows with that token, H_v
// = sum_s G[s, v] x_s. H is made tile by tile, [64 tokens] x [256 rows] x [16 lanes], and never written.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "ops/token_groups.h"
#include "python/parallel.h"
#include "python/tensor_text.h"

namespace lipcore {
namespace {

constexpr int64_t kTileRows = 256;
static_assert(kGroupBlock % kCrossTokens == 0);

double widened(const char* p, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return *reinterpret_cast<const double*>(p);
    case DType::kFloat32:
      return *reinterpret_cast<const float*>(p);
    case DType::kBfloat16:
      return bfloat16_to_float(*reinterpret_cast<const uint16_t*>(p));
    default:
      return float16_to_float(*reinterpret_cast<const uint16_t*>(p));
  }
}

const char* row_of(const TensorView& t, int64_t sample, int64_t row) {
  return static_cast<const char*>(t.data) + (sample * t.strides[0] + row * t.strides[1]) * item_size(t.dtype);
}

bool check(const TensorView& t, const char* name, int64_t samples, int64_t rows) {
  const bool flat = !t.numel || t.shape[2] <= 1 || t.strides[2] == 1;  // the strides of an empty tensor mean nothing
  if (t.ndim == 3 && t.on_cpu() && t.shape[0] == samples && t.shape[1] == rows && flat) return true;
  return fail({name}, "expected [%lld, %lld, ...] with flat rows on the CPU, got %s", static_cast<long long>(samples),
              static_cast<long long>(rows), ShapeText(t).text);
}

}  // namespace

bool tied_cross(const TensorView& ids, const TensorView& grad_embedding, const TensorView& x,
                const TensorView& grad_head, const int64_t* padding, const TensorView& out) {
  const TensorView& e = grad_embedding;
  if (ids.ndim != 2 || x.ndim != 3 || e.ndim != 3) return fail({"x"}, "expected [B, S, D], got %s", ShapeText(x).text);
  const int64_t samples = ids.shape[0], length = ids.shape[1], rows = x.shape[1], width = x.shape[2];
  if (!check(e, "grad_embedding", samples, length) || !check(x, "x", samples, rows) ||
      !check(grad_head, "grad_head", samples, rows))
    return false;
  if (e.shape[2] != width)
    return fail({"x"}, "expected %lld features, as grad_embedding has, got %s", static_cast<long long>(e.shape[2]),
                ShapeText(x).text);
  const int64_t vocabulary = grad_head.shape[2];
  const auto* tokens = static_cast<const int64_t*>(ids.data);
  for (int64_t i = 0; i < ids.numel; ++i)
    if ((tokens[i] < 0 || tokens[i] >= vocabulary) && !(padding && tokens[i] == *padding))
      return fail({"indices"}, "expected tokens in [0, %lld), the columns of grad_head, got %lld",
                  static_cast<long long>(vocabulary), static_cast<long long>(tokens[i]));
  static thread_local TokenGroups group_memory;
  static thread_local std::vector<GroupBlock> block_memory;
  static thread_local std::vector<double> partial_memory;
  auto& groups = group_memory;  // the threads of the pool must see this thread's
  auto& blocks = block_memory;
  auto& partials = partial_memory;
  const int64_t padded = (width + kCrossLanes - 1) / kCrossLanes * kCrossLanes;
  const bool narrow = x.dtype != DType::kFloat64 && grad_head.dtype != DType::kFloat64;
  const auto run = [&](int64_t i) {
    static thread_local std::vector<double> memory;
    memory.resize(static_cast<size_t>(kGroupBlock * (padded + kTileRows) + kTileRows * kCrossLanes));
    double* sums = memory.data();                       // [kGroupBlock][padded]
    double* factors = sums + kGroupBlock * padded;      // [kGroupBlock / kCrossTokens][kTileRows][kCrossTokens]
    double* lanes = factors + kGroupBlock * kTileRows;  // [kTileRows][kCrossLanes]
    const GroupBlock& block = blocks[i];
    const int64_t count = block.end - block.begin;
    const int64_t octets = (count + kCrossTokens - 1) / kCrossTokens;
    std::fill(memory.begin(), memory.end(), 0.0);
    int64_t token[kGroupBlock];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t first = groups.first(block.sample, block.begin + j);
      token[j] = tokens[groups.rows[first]];
      for (int64_t at = first; at < groups.last(block.sample, block.begin + j); ++at)
        kernels().token_sums->add_row(row_of(e, block.sample, groups.rows[at] - block.sample * length), e.dtype, width,
                                      1, sums + j * padded);
    }
    double total = 0;
    const int64_t size = item_size(grad_head.dtype);
    for (int64_t s0 = 0; s0 < rows; s0 += kTileRows) {
      const int64_t height = std::min(kTileRows, rows - s0);
      for (int64_t s = 0; s < height; ++s) {
        const char* g = row_of(grad_head, block.sample, s0 + s);
        for (int64_t j = 0; j < count; ++j)
          factors[(j / kCrossTokens * kTileRows + s) * kCrossTokens + j % kCrossTokens] =
              widened(g + token[j] * size, grad_head.dtype);
      }
      for (int64_t d = 0; d < width; d += kCrossLanes) {
        std::memset(lanes, 0, sizeof(double) * kTileRows * kCrossLanes);
        for (int64_t s = 0; s < height; ++s)
          kernels().token_sums->add_row(row_of(x, block.sample, s0 + s) + d * item_size(x.dtype), x.dtype,
                                        std::min<int64_t>(kCrossLanes, width - d), 1, lanes + s * kCrossLanes);
        for (int64_t o = 0; o < octets; ++o)
          total += kernels().token_sums->cross(factors + o * kTileRows * kCrossTokens, lanes, height,
                                               sums + o * kCrossTokens * padded + d, padded, narrow);
      }
    }
    partials[i] = total;
  };
  const bool parallel = ids.numel * width >= kSerialElements / 16;
  PyThreadState* state = parallel ? PyEval_SaveThread() : nullptr;
  groups.make(tokens, padding, {}, samples, length);
  cut_groups(groups, &blocks);
  partials.resize(blocks.size());
  parallel_for(static_cast<int64_t>(blocks.size()), parallel, run);
  if (state) PyEval_RestoreThread(state);
  auto* result = static_cast<double*>(out.data);
  std::fill(result, result + out.numel, 0.0);
  for (size_t i = 0; i < blocks.size(); ++i) result[blocks[i].sample] += partials[i];
  return true;
}

}  // namespace lipcore
