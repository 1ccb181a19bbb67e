#include "ops/sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

// Enough that setting a task's buckets to zero and adding them up costs a tenth of reading its elements, few enough
// that two threads finish together.
constexpr int64_t kTaskElements = 1 << 20;
constexpr int64_t kTaskElementsPerBucket = 64;
// Tasks at a time, and what their buckets may take: small enough to stay in the shared cache until they are added up.
constexpr int64_t kWave = 64;
constexpr int64_t kWaveBytes = 8 << 20;
constexpr int64_t kReducedTogether = 512;  // buckets, added up by one thread

}  // namespace

void SketchRunner::plan(const std::vector<SketchItem>& items, int64_t rows, int64_t buckets, uint64_t seed) {
  buckets_ = buckets;
  key_ = sketch_key(seed);
  item_count_ = items.size();
  total_ = 0;
  for (const SketchItem& item : items) total_ += item.count;
  wave_ = std::min(kWave, kWaveBytes / (buckets * static_cast<int64_t>(sizeof(double))));
  schedule_ = schedule_sketch(items, std::max(kTaskElements, kTaskElementsPerBucket * buckets), wave_);
  partials_.resize(schedule_.pieces.size());
  std::vector<bool> seen(static_cast<size_t>(rows));
  for (const SketchTask& task : schedule_.tasks) seen[task.row] = true;
  empty_rows_.clear();
  for (int64_t row = 0; row < rows; ++row)
    if (!seen[row]) empty_rows_.push_back(row);
  constexpr size_t kLine = 64;
  memory_.assign(static_cast<size_t>(schedule_.places * buckets) + kLine / sizeof(double), 0.0);
  private_ = memory_.data() + (kLine - reinterpret_cast<uintptr_t>(memory_.data()) % kLine) % kLine / sizeof(double);
}

void SketchRunner::sketch(const SketchItem* items, const SketchTask& task, double* buckets) {
  std::memset(buckets, 0, static_cast<size_t>(buckets_) * sizeof *buckets);
  for (int64_t p = task.first_piece; p < task.last_piece; ++p) {
    const SketchPiece& piece = schedule_.pieces[p];
    const SketchItem& item = items[piece.item];
    const void* w = static_cast<const char*>(item.w) + piece.begin * item_size(item.dtype);
    const SketchRun run{w, item.first_index + piece.begin, piece.count, item.dtype, key_, buckets_};
    partials_[p] = {kernels().sketch->add(run, buckets), 0};
    // A float64 sum of float32 squares cannot overflow, so it is finite exactly when every element is; of float64 it
    // can, and then the count is 0 and the infinite sum is the truth.
    if (!std::isfinite(partials_[p].weight_sq))
      partials_[p].nonfinite = static_cast<double>(kernels().sample_norms->count_nonfinite(w, item.dtype, piece.count));
  }
}

void SketchRunner::reduce(int64_t first, int64_t last, double* sketches) {
  int64_t work = 0;
  for (int64_t t = first; t < last; ++t) work += schedule_.tasks[t].place >= 0 ? buckets_ : 0;
  if (!work) return;
  const int64_t together = std::min(kReducedTogether, buckets_);
  parallel_for(buckets_ / together, work >= kSerialElements, [&](int64_t part) {
    for (int64_t t = first; t < last; ++t) {
      const SketchTask& task = schedule_.tasks[t];
      if (task.place < 0) continue;
      double* to = sketches + task.row * buckets_ + part * together;
      const double* from = private_ + task.place * buckets_ + part * together;
      for (int64_t i = 0; i < together; ++i) to[i] += from[i];
    }
  });
}

void SketchRunner::run(const SketchItem* items, double* sketches, SketchWeight* weights) {
  const auto tasks = static_cast<int64_t>(schedule_.tasks.size());
  for (int64_t first = 0; first < tasks; first += wave_) {
    const int64_t last = std::min(first + wave_, tasks);
    parallel_for(last - first, total_ >= kSerialElements, [&](int64_t i) {
      const SketchTask& task = schedule_.tasks[first + i];
      sketch(items, task, task.place < 0 ? sketches + task.row * buckets_ : private_ + task.place * buckets_);
    });
    reduce(first, last, sketches);
  }
  for (const int64_t row : empty_rows_) std::fill_n(sketches + row * buckets_, buckets_, 0.0);
  std::fill_n(weights, item_count_, SketchWeight{});
  for (const SketchTask& task : schedule_.tasks) {
    double nonfinite = 0;
    for (int64_t p = task.first_piece; p < task.last_piece; ++p) {
      SketchWeight& weight = weights[schedule_.pieces[p].item];
      weight.weight_sq += partials_[p].weight_sq;
      weight.nonfinite += partials_[p].nonfinite;
      nonfinite += partials_[p].nonfinite;
    }
    if (nonfinite > 0) std::fill_n(sketches + task.row * buckets_, buckets_, std::numeric_limits<double>::quiet_NaN());
  }
}

bool check_buckets(int64_t buckets) {
  if (buckets >= kMinBuckets && buckets <= kMaxBuckets && (buckets & (buckets - 1)) == 0) return true;
  return fail({"buckets"}, "expected a power of two from %lld to %lld, got %lld", static_cast<long long>(kMinBuckets),
              static_cast<long long>(kMaxBuckets), static_cast<long long>(buckets));
}

bool check_first_index(int64_t first_index, int64_t count, int64_t i) {
  if (first_index >= 0 && first_index <= std::numeric_limits<int64_t>::max() - count) return true;
  return fail({"first_index", i},
              "expected the global index of the first of %lld elements, >= 0 and below 2^63, got %lld",
              static_cast<long long>(count), static_cast<long long>(first_index));
}

bool sketch(const std::vector<TensorView>& tensors, const std::vector<int64_t>& first_index, uint64_t seed,
            const TensorView& out) {
  if (first_index.size() != tensors.size())
    return fail({"first_index"}, "expected %zu indices, one per tensor, got %zu", tensors.size(), first_index.size());
  if (out.dtype != DType::kFloat64 || out.ndim != 1)
    return fail({"out"}, "expected a float64 tensor of shape [buckets], got %s %s", dtype_name(out.dtype),
                ShapeText(out).text);
  if (!check_buckets(out.numel)) return false;
  std::vector<SketchItem> items;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    const TensorView& w = tensors[i];
    if (!w.is_dense())
      return fail(
          {"tensors", index},
          "is a strided view, not dense memory, so its elements have no order in memory; pass a contiguous copy");
    if (!w.same_device(out)) return fail({"tensors", index}, "is on another device than out; put all on one");
    if (!check_first_index(first_index[i], w.numel, index)) return false;
    const auto* begin = static_cast<const char*>(w.data);
    const auto* out_begin = static_cast<const char*>(out.data);
    if (begin < out_begin + out.numel * 8 && out_begin < begin + w.numel * item_size(w.dtype))
      return fail({"out"}, "is written to but shares memory with tensors[%zu]; pass separate tensors", i);
    items.push_back({w.data, w.dtype, w.numel, first_index[i], 0});
  }
  auto* buckets = static_cast<double*>(out.data);
  if (!out.on_cpu()) {
#if defined(LIPCORE_WITH_CUDA)
    return cuda::sketch(items, out.device, out.numel, seed, buckets);
#else
    return fail({"tensors"},
                "are on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON "
                "or pass CPU tensors");
#endif
  }
  SketchRunner runner;
  runner.plan(items, 1, out.numel, seed);
  std::vector<SketchWeight> weights(items.size());
  PyThreadState* state = runner.total() >= kSerialElements ? PyEval_SaveThread() : nullptr;
  runner.run(items.data(), buckets, weights.data());
  if (state) PyEval_RestoreThread(state);
  return true;
}

}  // namespace lipcore
