#include "ops/trajectory_step.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "math/trajectory_row.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

const char* at(const void* base, int64_t element, DType dtype) {
  return static_cast<const char*>(base) + element * item_size(dtype);
}

}  // namespace

void TrajectoryRunner::plan(const std::vector<int64_t>& counts) {
  first_chunk_.clear();
  chunks_.clear();
  total_ = 0;
  for (int64_t item = 0; item < static_cast<int64_t>(counts.size()); ++item) {
    first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
    for (int64_t begin = 0; begin < counts[item]; begin += kChunk)
      chunks_.push_back({item, begin, std::min(kChunk, counts[item] - begin)});
    total_ += counts[item];
  }
  first_chunk_.push_back(static_cast<int64_t>(chunks_.size()));
  partials_.resize(chunks_.size());
}

void TrajectoryRunner::step(const TrajectoryItem& item, int64_t chunk) {
  const Chunk& c = chunks_[chunk];
  const DType wide = item.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  TrajectoryChunk work;
  work.w = at(item.w, c.begin, item.dtype);
  work.w_prev = const_cast<char*>(at(item.w_prev, c.begin, item.dtype));
  work.deviation = const_cast<char*>(at(item.deviation, c.begin, wide));
  work.m2 = item.m2 ? const_cast<char*>(at(item.m2, c.begin, wide)) : nullptr;
  work.count = c.count;
  work.dtype = item.dtype;
  work.restart = item.restart;
  work.share = item.share;
  kernels().trajectory_step->chunk(work, &partials_[chunk]);
}

void TrajectoryRunner::run(const TrajectoryItem* items, StepSums* sums) {
  parallel_for(static_cast<int64_t>(chunks_.size()), total_ >= kSerialElements,
               [&](int64_t chunk) { step(items[chunks_[chunk].item], chunk); });
  merge_chunks(sums);
}

void TrajectoryRunner::run(const TrajectoryItem* items, StepSums* sums, const UpdateItem* const* updates,
                           std::vector<UpdateSums>* update_sums) {
  update_partials_.resize(chunks_.size());
  parallel_for(static_cast<int64_t>(chunks_.size()), total_ >= kSerialElements, [&](int64_t chunk) {
    const Chunk& c = chunks_[chunk];
    if (updates[c.item]) sum_update_run(*updates[c.item], c.begin, c.count, &update_partials_[chunk]);
    step(items[c.item], chunk);
  });
  merge_chunks(sums);
  update_sums->assign(first_chunk_.size() - 1, {});
  for (size_t item = 0; item + 1 < first_chunk_.size(); ++item)
    for (int64_t c = first_chunk_[item]; updates[item] && c < first_chunk_[item + 1]; ++c)
      merge(&(*update_sums)[item], update_partials_[c]);
}

std::vector<int64_t> TrajectoryRunner::counts() const {
  std::vector<int64_t> counts(first_chunk_.size() - 1);
  for (const Chunk& chunk : chunks_) counts[chunk.item] += chunk.count;
  return counts;
}

void TrajectoryRunner::merge_chunks(StepSums* sums) const {
  for (size_t item = 0; item + 1 < first_chunk_.size(); ++item) {
    StepSums whole{};
    for (int64_t c = first_chunk_[item]; c < first_chunk_[item + 1]; ++c) merge(&whole, partials_[c]);
    if (std::isnan(whole.dw_sq)) whole.max_abs_dw = whole.dw_sq;  // merge's comparison drops NaN
    sums[item] = whole.nonfinite > 0 ? left_out(whole) : whole;
  }
}

namespace {

// Same elements in the same order of memory: equal strides wherever a dimension has more than one element.
bool same_layout(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.strides[d] != b.strides[d])) return false;
  return true;
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

bool check_state(const TensorView& state, const TensorView& param, ArgumentName name, DType dtype) {
  const auto index = static_cast<long long>(name.index);
  if (!same_shape(state, param))
    return fail(name, "expected shape %s of params[%lld], got %s", ShapeText(param).text, index, ShapeText(state).text);
  if (state.dtype != dtype)
    return fail(name, "expected dtype %s for params[%lld] of dtype %s, got %s", dtype_name(dtype), index,
                dtype_name(param.dtype), dtype_name(state.dtype));
  if (!state.same_device(param)) return fail(name, "is on another device than params[%lld]; put all on one", index);
  if (!same_layout(state, param))
    return fail(name, "its memory layout differs from that of params[%lld]; make both contiguous", index);
  return true;
}

struct Interval {
  const char* begin;
  const char* end;
  bool written;
  ArgumentName name;
};

// What is written must not overlap anything else that is read or written.
bool check_overlap(std::vector<Interval>& intervals) {
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  Interval reach{nullptr, nullptr, false, {"", -1}}, reach_written = reach;
  for (const Interval& now : intervals) {
    for (const Interval* other : {&reach, &reach_written}) {
      if (other->end <= now.begin || !(other->written || now.written)) continue;
      return fail(now.written ? now.name : other->name,
                  "is written to but shares memory with %s[%lld]; pass separate "
                  "tensors (clone one of them)",
                  now.written ? other->name.name : now.name.name,
                  static_cast<long long>(now.written ? other->name.index : now.name.index));
    }
    if (now.end > reach.end) reach = now;
    if (now.written && now.end > reach_written.end) reach_written = now;
  }
  return true;
}

}  // namespace

bool trajectory_step(const std::vector<TensorView>& params, const std::vector<TensorView>& prev,
                     const std::vector<TensorView>& deviation, int64_t count, const TensorView& out) {
  const size_t n = params.size();
  if (count < 1)
    return fail({"count"}, "expected the number of points averaged, this one included, >= 1, got %lld",
                static_cast<long long>(count));
  for (const auto& [name, list] : {std::pair{"prev", &prev}, {"deviation", &deviation}})
    if (list->size() != n) return fail({name}, "expected %zu tensors, one per parameter, got %zu", n, list->size());
  if (out.dtype != DType::kFloat64 || out.ndim != 2 || out.shape[0] != static_cast<int64_t>(n) ||
      out.shape[1] != kStepSums || (n > 1 && out.strides[0] != kStepSums) || (n && out.strides[1] != 1))
    return fail({"out"}, "expected a contiguous float64 tensor of shape [%zu, %d], got %s %s", n, kStepSums,
                dtype_name(out.dtype), ShapeText(out).text);
  std::vector<TrajectoryItem> items(n);
  std::vector<int64_t> counts(n);
  std::vector<Interval> intervals;
  for (size_t i = 0; i < n; ++i) {
    const auto index = static_cast<int64_t>(i);
    const TensorView& w = params[i];
    const DType wide = w.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    if (!w.is_dense()) return fail({"params", index}, "is not dense memory; pass a contiguous copy");
    if (!w.same_device(params[0]))
      return fail({"params", index}, "is on another device than params[0]; put all on one");
    if (!check_state(prev[i], w, {"prev", index}, w.dtype) || !check_state(deviation[i], w, {"deviation", index}, wide))
      return false;
    items[i] = {w.data,
                prev[i].data,
                deviation[i].data,
                nullptr,
                w.numel,
                w.dtype,
                false,
                share_before(static_cast<double>(count))};
    counts[i] = w.numel;
    if (!w.numel) continue;
    auto add = [&](const TensorView& view, bool written, const char* name) {
      const auto* begin = static_cast<const char*>(view.data);
      intervals.push_back({begin, begin + view.numel * item_size(view.dtype), written, {name, index}});
    };
    add(w, false, "params");
    add(prev[i], true, "prev");
    add(deviation[i], true, "deviation");
  }
  if (n && !out.same_device(params[0])) return fail({"out"}, "is on another device than params; put all on one device");
  if (n) {
    const auto* begin = static_cast<const char*>(out.data);
    intervals.push_back({begin, begin + out.numel * 8, true, {"out", 0}});
  }
  if (!check_overlap(intervals)) return false;
  auto* sums = static_cast<StepSums*>(out.data);
  if (n && !params[0].on_cpu()) {
#if defined(LIPCORE_WITH_CUDA)
    return cuda::trajectory_step(items, params[0].device, sums);
#else
    return fail({"params"},
                "are on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON "
                "or pass CPU tensors");
#endif
  }
  TrajectoryRunner runner;
  runner.plan(counts);
  PyThreadState* state = runner.total() >= kSerialElements ? PyEval_SaveThread() : nullptr;
  runner.run(items.data(), sums);
  if (state) PyEval_RestoreThread(state);
  return true;
}

}  // namespace lipcore
