#include "ops/sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "ops/ops.h"
#include "parallel.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

// Enough that setting a task's buckets to zero and adding them up costs a tenth of reading its elements, few enough
// that two threads finish together.
constexpr int64_t kTaskElements = 1 << 20;
constexpr int64_t kTaskElementsPerBucket = 32;
constexpr size_t kWave = 64;               // tasks with buckets of their own at a time: bounds the memory
constexpr int64_t kReducedTogether = 512;  // buckets, added up by one thread

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

SketchSchedule schedule_sketch(const std::vector<SketchItem>& items, int64_t task_elements) {
  SketchSchedule schedule;
  std::vector<int64_t> order(items.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return items[a].row < items[b].row; });
  for (size_t first = 0, last = 0; first < order.size(); first = last) {
    const int64_t row = items[order[first]].row;
    int64_t total = 0;
    for (last = first; last < order.size() && items[order[last]].row == row; ++last) total += items[order[last]].count;
    const int64_t tasks = std::max<int64_t>((total + task_elements - 1) / task_elements, 1);
    const int64_t size = round_up((total + tasks - 1) / tasks, kSketchPair);
    int64_t room = 0;
    bool opens = true;
    for (size_t i = first; i < last; ++i) {
      const SketchItem& item = items[order[i]];
      for (int64_t begin = 0, count; begin < item.count; begin += count) {
        if (room <= 0) {
          const auto next = static_cast<int64_t>(schedule.pieces.size());
          schedule.tasks.push_back({row, next, next, opens});
          opens = false;
          room = size;
        }
        // Cut between pairs of groups, so that only a tensor's own ends are partial.
        const int64_t cut = round_up(item.first_index % kSketchPair + begin + room, kSketchPair);
        count = std::min(cut - item.first_index % kSketchPair, item.count) - begin;
        schedule.pieces.push_back({order[i], begin, count});
        ++schedule.tasks.back().last_piece;
        room -= count;
      }
    }
  }
  return schedule;
}

void SketchRunner::plan(const std::vector<SketchItem>& items, int64_t rows, int64_t buckets, uint64_t seed) {
  buckets_ = buckets;
  key_ = sketch_key(seed);
  item_count_ = items.size();
  total_ = 0;
  for (const SketchItem& item : items) total_ += item.count;
  schedule_ = schedule_sketch(items, std::max(kTaskElements, kTaskElementsPerBucket * buckets));
  partials_.resize(schedule_.pieces.size());
  places_.clear();
  int64_t places = 0, most = 0;
  std::vector<bool> seen(static_cast<size_t>(rows));
  for (const SketchTask& task : schedule_.tasks) {
    if (places_.size() % kWave == 0) places = 0;
    places_.push_back(task.opens_row ? -1 : places++);
    most = std::max(most, places);
    seen[task.row] = true;
  }
  empty_rows_.clear();
  for (int64_t row = 0; row < rows; ++row)
    if (!seen[row]) empty_rows_.push_back(row);
  constexpr size_t kLine = 64;
  memory_.assign(most ? static_cast<size_t>(most * buckets) + kLine / sizeof(double) : 0, 0.0);
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

void SketchRunner::reduce(size_t first, size_t last, double* sketches) {
  int64_t work = 0;
  for (size_t t = first; t < last; ++t) work += places_[t] >= 0 ? buckets_ : 0;
  if (!work) return;
  const int64_t together = std::min(kReducedTogether, buckets_);
  parallel_for(buckets_ / together, work >= kSerialElements, [&](int64_t part) {
    for (size_t t = first; t < last; ++t) {
      if (places_[t] < 0) continue;
      double* to = sketches + schedule_.tasks[t].row * buckets_ + part * together;
      const double* from = private_ + places_[t] * buckets_ + part * together;
      for (int64_t i = 0; i < together; ++i) to[i] += from[i];
    }
  });
}

void SketchRunner::run(const SketchItem* items, double* sketches, SketchWeight* weights) {
  const size_t tasks = schedule_.tasks.size();
  for (size_t first = 0; first < tasks; first += kWave) {
    const size_t last = std::min(first + kWave, tasks);
    parallel_for(static_cast<int64_t>(last - first), total_ >= kSerialElements, [&](int64_t i) {
      const size_t t = first + static_cast<size_t>(i);
      const SketchTask& task = schedule_.tasks[t];
      sketch(items, task, places_[t] < 0 ? sketches + task.row * buckets_ : private_ + places_[t] * buckets_);
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
