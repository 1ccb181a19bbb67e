#include "ops/update_sums.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/tensor_sums.h"
#endif

namespace lipcore {
namespace {

struct Chunk {
  int64_t item, begin, count;
};

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

bool same_strides(const TensorView& a, const TensorView& b) {
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// Both are dense.
bool overlap(const TensorView& a, const TensorView& b) {
  const auto* a_begin = static_cast<const char*>(a.data);
  const auto* b_begin = static_cast<const char*>(b.data);
  return a_begin < b_begin + b.numel * item_size(b.dtype) && b_begin < a_begin + a.numel * item_size(a.dtype);
}

bool check_state(const TensorView& state, const TensorView& w, ArgumentName name) {
  const auto index = static_cast<long long>(name.index);
  if (!same_shape(state, w))
    return fail(name, "expected shape %s of params[%lld], got %s", ShapeText(w).text, index, ShapeText(state).text);
  if (!state.same_device(w)) return fail(name, "is on another device than params[%lld]; put all on one", index);
  if (!same_strides(state, w))
    return fail(name, "its memory layout differs from that of params[%lld]; make both contiguous", index);
  return true;
}

bool check_written(const TensorView& out, ArgumentName name, const std::vector<UpdateItem>& items) {
  for (size_t i = 0; i < items.size(); ++i) {
    const UpdateItem& item = items[i];
    const char* with = overlap(out, item.w)                               ? "params"
                       : item.has_first && overlap(out, item.first)       ? "first"
                       : item.has_second && overlap(out, item.second)     ? "second"
                       : item.has_gradient && overlap(out, item.gradient) ? "gradients"
                       : item.has_previous && overlap(out, item.previous) ? "previous"
                                                                          : nullptr;
    if (with) return fail(name, "is written to but shares memory with %s[%zu]; pass separate tensors", with, i);
  }
  return true;
}

bool check_all(const std::vector<UpdateItem>& items, const TensorView& rows, const TensorView& squares) {
  if (!check_update_items(items)) return false;
  const auto n = static_cast<int64_t>(items.size());
  const auto beside = [&](const TensorView& out) { return n ? out.same_device(items[0].w) : out.on_cpu(); };
  if (rows.dtype != DType::kFloat64 || rows.ndim != 2 || rows.shape[0] != n || rows.shape[1] != kStepSums ||
      (n > 1 && rows.strides[0] != kStepSums) || (n && rows.strides[1] != 1) || !beside(rows))
    return fail({"rows"}, "expected a contiguous float64 tensor of shape [%lld, %d] on the params' device, got %s %s",
                static_cast<long long>(n), kStepSums, dtype_name(rows.dtype), ShapeText(rows).text);
  if (squares.dtype != DType::kFloat64 || squares.ndim != 2 || squares.shape[0] != kUpdateSquares ||
      squares.shape[1] != n || (n && squares.strides[0] != n) || (n > 1 && squares.strides[1] != 1) || !beside(squares))
    return fail({"squares"},
                "expected a contiguous float64 tensor of shape [%d, %lld] on the params' device, got %s %s",
                kUpdateSquares, static_cast<long long>(n), dtype_name(squares.dtype), ShapeText(squares).text);
  if (n && overlap(rows, squares))
    return fail({"squares"}, "is written to but shares memory with rows; pass separate tensors");
  return check_written(rows, {"rows"}, items) && check_written(squares, {"squares"}, items);
}

const void* at(const TensorView& view, int64_t element) {
  return static_cast<const char*>(view.data) + element * item_size(view.dtype);
}

std::vector<Chunk> chunks_of(const std::vector<UpdateItem>& items) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t begin = 0; begin < items[i].w.numel; begin += kChunk)
      chunks.push_back({static_cast<int64_t>(i), begin, std::min(kChunk, items[i].w.numel - begin)});
  return chunks;
}

}  // namespace

bool check_update_items(const std::vector<UpdateItem>& items) {
  const auto n = static_cast<int64_t>(items.size());
  for (int64_t i = 0; i < n; ++i) {
    const UpdateItem& item = items[i];
    if (!item.w.same_device(items[0].w))
      return fail({"params", i}, "is on another device than params[0]; put all on one");
    if (!item.w.is_dense()) return fail({"params", i}, "is not dense memory; pass a contiguous copy");
    if (item.has_first && !check_state(item.first, item.w, {"first", i})) return false;
    if (item.has_second && !check_state(item.second, item.w, {"second", i})) return false;
    if (item.has_gradient && !check_state(item.gradient, item.w, {"gradients", i})) return false;
    if (item.has_previous && !check_state(item.previous, item.w, {"previous", i})) return false;
    for (const TensorView& scalar : item.scalar_at)
      if (scalar.data && !scalar.same_device(item.w))
        return fail({"rules", i}, "has a number on another device than params[%lld]; put all on one",
                    static_cast<long long>(i));
  }
  return true;
}

void sum_update_run(const UpdateItem& item, int64_t begin, int64_t count, UpdateSums* sums) {
  UpdateChunk work{};
  work.w = at(item.w, begin);
  work.dtype = item.w.dtype;
  if (item.has_first) work.first = at(item.first, begin), work.first_dtype = item.first.dtype;
  if (item.has_second) work.second = at(item.second, begin), work.second_dtype = item.second.dtype;
  if (item.has_gradient) work.gradient = at(item.gradient, begin), work.gradient_dtype = item.gradient.dtype;
  if (item.has_previous) work.previous = at(item.previous, begin), work.previous_dtype = item.previous.dtype;
  work.count = count;
  work.form = form_of(item);
  work.scalars = item.scalars;
  const auto& kernel = *kernels().update_sums;
  *sums = {};
  kernel.chunk(work, sums);
  // A float64 sum of float32 squares cannot overflow, so it is finite exactly when every element is; of float64 it can,
  // and then the count is 0 and the infinite sum is the truth.
  if (!std::isfinite(sums->step.weight_sq) || !std::isfinite(sums->step.dw_sq))
    sums->step.nonfinite = static_cast<double>(kernel.count_nonfinite(work));
}

StepSums update_row(const UpdateSums& sums) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  return sums.step.nonfinite == 0 ? sums.step : StepSums{nan, nan, nan, nan, sums.step.nonfinite};
}

UpdateForm form_of(const UpdateItem& item) {
  if (item.adaptive) return UpdateForm::kAdaptive;
  return item.has_second ? UpdateForm::kTwo : item.has_first ? UpdateForm::kOne : UpdateForm::kHeld;
}

bool update_sums(const std::vector<UpdateItem>& items, const TensorView& rows, const TensorView& squares) {
  if (!check_all(items, rows, squares)) return false;
  auto* row = static_cast<StepSums*>(rows.data);
  auto* square = static_cast<double*>(squares.data);
  if (!items.empty() && !items[0].w.on_cpu()) {
#if defined(LIPCORE_WITH_CUDA)
    return cuda::update_sums(items, items[0].w.device, row, square);
#else
    return fail({"params"},
                "are on a CUDA device, but this lipcore was built without CUDA; rebuild with "
                "LIPCORE_CUDA=ON or pass CPU tensors");
#endif
  }
  const std::vector<Chunk> chunks = chunks_of(items);
  std::vector<UpdateSums> partials(chunks.size());
  int64_t total = 0;
  for (const UpdateItem& item : items) total += item.w.numel;
  const bool parallel = total >= kSerialElements;
  // The caller's lists hold the tensors, so their memory stays while other threads of Python run.
  PyThreadState* state = parallel ? PyEval_SaveThread() : nullptr;
  parallel_for(static_cast<int64_t>(chunks.size()), parallel, [&](int64_t i) {
    sum_update_run(items[chunks[i].item], chunks[i].begin, chunks[i].count, &partials[i]);
  });
  if (state) PyEval_RestoreThread(state);

  size_t c = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    UpdateSums sums{};
    for (; c < chunks.size() && chunks[c].item == static_cast<int64_t>(i); ++c) merge(&sums, partials[c]);
    row[i] = update_row(sums);
    leave_unknown(form_of(items[i]), items[i].has_momentum, items[i].has_gradient, items[i].has_previous, &sums);
    take_squares(sums, static_cast<double>(items[i].w.numel), square, static_cast<int64_t>(items.size()),
                 static_cast<int64_t>(i));
  }
  return true;
}

bool observe_squares(const TensorView& squares, const TensorView& table) {
  const int64_t n = squares.numel;
  if (squares.dtype != DType::kFloat64 || squares.ndim != 1 || (n > 1 && squares.strides[0] != 1))
    return fail({"squares"}, "expected a contiguous float64 tensor of shape [squares], got %s %s",
                dtype_name(squares.dtype), ShapeText(squares).text);
  if (table.dtype != DType::kFloat64 || table.ndim != 2 || table.shape[0] != kRootRows || table.shape[1] != n ||
      (n && (table.strides[0] != n || table.strides[1] != 1)) || !table.same_device(squares))
    return fail({"table"}, "expected a contiguous float64 tensor of shape [%d, %lld] beside squares, got %s %s",
                kRootRows, static_cast<long long>(n), dtype_name(table.dtype), ShapeText(table).text);
  const auto* values = static_cast<const double*>(squares.data);
  auto* rows = static_cast<double*>(table.data);
  if (!table.on_cpu()) {
#if defined(LIPCORE_WITH_CUDA)
    return n == 0 || cuda::observe_squares(values, n, table.device, rows);
#else
    return fail({"table"},
                "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON");
#endif
  }
  for (int64_t i = 0; i < n; ++i) observe_square(rows, n, i, values[i]);
  return true;
}

}  // namespace lipcore
