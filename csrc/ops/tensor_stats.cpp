#include "ops/tensor_stats.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "ops/sample_norms.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

bool check_table(const TensorView& table, const char* name, DType dtype, int64_t columns) {
  const bool contiguous = table.ndim == 2 && table.shape[1] == columns &&
                          (table.shape[0] <= 1 || (table.strides[0] == columns && table.strides[1] == 1));
  if (table.dtype == dtype && contiguous) return true;
  return fail({name}, "expected a contiguous %s tensor of shape [n, %lld], got %s %s", dtype_name(dtype),
              static_cast<long long>(columns), dtype_name(table.dtype), ShapeText(table).text);
}

// From the first element to the last one.
bool overlap(const TensorView& tensor, const TensorView& table) {
  if (!tensor.numel || !table.numel) return false;
  int64_t last = 0;
  for (int d = 0; d < tensor.ndim; ++d) last += (tensor.shape[d] - 1) * tensor.strides[d];
  return tensor.at(0) < table.at(table.numel) && table.at(0) < tensor.at(last + 1);
}

bool check_tables(const TensorView& rows, const TensorView& bins) {
  if (!check_table(rows, "rows", DType::kFloat64, kTensorStats) ||
      !check_table(bins, "bins", DType::kInt64, kTensorBins))
    return false;
  if (bins.shape[0] != rows.shape[0])
    return fail({"bins"}, "expected as many rows as rows has, %lld, got %s", static_cast<long long>(rows.shape[0]),
                ShapeText(bins).text);
  if (!bins.same_device(rows)) return fail({"bins"}, "is on another device than rows; put both on one");
  if (overlap(bins, rows)) return fail({"bins"}, "shares memory with rows; pass separate tensors");
  return true;
}

bool check_all(const std::vector<TensorView>& tensors, const std::vector<int64_t>& places, const TensorView& rows,
               const TensorView& bins) {
  if (places.size() != tensors.size())
    return fail({"places"}, "expected %zu places, one per tensor, got %zu", tensors.size(), places.size());
  if (!check_tables(rows, bins)) return false;
  std::vector<bool> taken(static_cast<size_t>(rows.shape[0]));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const ArgumentName name{"tensors", static_cast<int64_t>(i)};
    if (places[i] < 0 || places[i] >= rows.shape[0])
      return fail({"places", name.index}, "expected a row of rows, 0 to %lld, got %lld",
                  static_cast<long long>(rows.shape[0]) - 1, static_cast<long long>(places[i]));
    if (taken[places[i]])
      return fail({"places", name.index}, "%lld comes twice; add those tensors by two calls",
                  static_cast<long long>(places[i]));
    taken[places[i]] = true;
    if (!tensors[i].same_device(rows)) return fail(name, "is on another device than rows; put both on one");
    if (overlap(tensors[i], rows) || overlap(tensors[i], bins))
      return fail(name, "shares memory with rows or bins, which are written to; pass separate tensors");
  }
  return true;
}

// The tensor as one row of all its elements.
bool describe(const TensorView& tensor, int64_t i, Rows* rows) {
  constexpr int kDims = 64;  // torch's own limit
  int64_t shape[kDims + 1] = {1}, strides[kDims + 1] = {0};
  if (tensor.ndim > kDims) return fail({"tensors", i}, "has more than 64 dimensions");
  std::copy(tensor.shape, tensor.shape + tensor.ndim, shape + 1);
  std::copy(tensor.strides, tensor.strides + tensor.ndim, strides + 1);
  TensorView row = tensor;
  row.ndim = tensor.ndim + 1;
  row.shape = shape;
  row.strides = strides;
  if (describe_rows(row, rows)) return true;
  return fail({"tensors", i}, "has more than 8 dimensions that cannot be merged; pass a contiguous tensor");
}

// The bins up to that of a row's largest magnitude: there are no counts behind them. Subnormal magnitudes, which a
// thread may have told its processor to take for 0, are in the first few.
int used_bins(const TensorStats& row) {
  constexpr int kSubnormal = 16;
  if (row.count == 0) return 0;
  return std::max(tensor_bin_of(std::max(std::abs(row.min), std::abs(row.max))) + 1, kSubnormal);
}

// Calls add(bin, count) for the counts that are not zero among the first `used`, and sets them to zero if they are to
// go. Tables are nearly empty: whole cache lines are passed over.
template <bool kGone, class T, class Add>
void visit_counts(T* counts, int used, const Add& add) {
  constexpr int kLine = 64 / sizeof(T);
  static_assert(kTensorBins % kLine == 0, "whole lines");
  for (int begin = 0; begin < used; begin += kLine) {
    T* line = counts + begin;
    T any = 0;
    for (int k = 0; k < kLine; ++k) any |= line[k];
    if (!any) continue;
    for (int k = 0; k < kLine; ++k) {
      if (line[k]) add(begin + k, static_cast<int64_t>(line[k]));
      if (kGone) line[k] = 0;
    }
  }
}

struct Chunk {
  size_t item;
  int64_t begin, count;
};

void observe(const std::vector<TensorStatsItem>& items, int64_t total, TensorStats* rows, int64_t* bins) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t begin = 0; begin < items[i].rows.length; begin += kChunk)
      chunks.push_back({i, begin, std::min(kChunk, items[i].rows.length - begin)});
  std::vector<TensorStats> partials(chunks.size());
  parallel_for(static_cast<int64_t>(chunks.size()), total >= kSerialElements, [&](int64_t c) {
    static thread_local uint32_t counts[kTensorBins] = {};  // zeros between calls
    const Chunk& chunk = chunks[static_cast<size_t>(c)];
    const TensorStatsItem& item = items[chunk.item];
    TensorStats* partial = &partials[static_cast<size_t>(c)];
    kernels().tensor_stats->chunk(row_run(item.rows, 0, chunk.begin, chunk.count), item.rows.dtype, chunk.count,
                                  partial, counts);
    int64_t* to = bins + item.place * kTensorBins;
    // Chunks of one tensor run at a time. Sums of integers are the same in any order.
    if (item.rows.length > kChunk)
      visit_counts<true>(counts, used_bins(*partial),
                         [&](int b, int64_t count) { __atomic_fetch_add(to + b, count, __ATOMIC_RELAXED); });
    else
      visit_counts<true>(counts, used_bins(*partial), [&](int b, int64_t count) { to[b] += count; });
  });
  size_t c = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    TensorStats all{};
    for (; c < chunks.size() && chunks[c].item == i; ++c) merge(&all, partials[c]);
    merge(rows + items[i].place, all);
  }
}

}  // namespace

bool tensor_stats(const std::vector<TensorView>& tensors, const std::vector<int64_t>& places, const TensorView& rows,
                  const TensorView& bins) {
  if (!check_all(tensors, places, rows, bins)) return false;
  std::vector<TensorStatsItem> items(tensors.size());
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!describe(tensors[i], static_cast<int64_t>(i), &items[i].rows)) return false;
    items[i].place = places[i];
    if (!rows.on_cpu() && !items[i].rows.dense)
      return fail({"tensors", static_cast<int64_t>(i)}, "is not dense memory; pass a contiguous copy");
    total += tensors[i].numel;
  }
  auto* stats = static_cast<TensorStats*>(rows.data);
  auto* counts = static_cast<int64_t*>(bins.data);
#if defined(LIPCORE_WITH_CUDA)
  if (!rows.on_cpu()) return cuda::tensor_stats(items, rows.device, stats, counts);
#endif
  if (!rows.on_cpu())
    return fail({"rows"}, "is on a CUDA device; lipcore.functional.tensor_stats takes it, this CPU kernel cannot");
  // The caller's lists hold the tensors, so their memory stays while other threads of Python run.
  PyThreadState* state = total >= kSerialElements ? PyEval_SaveThread() : nullptr;
  observe(items, total, stats, counts);
  if (state) PyEval_RestoreThread(state);
  return true;
}

bool merge_tensor_stats(const TensorView& other_rows, const TensorView& other_bins, const std::vector<int64_t>& places,
                        const TensorView& rows, const TensorView& bins, bool gone) {
  if (!check_tables(other_rows, other_bins) || !check_tables(rows, bins)) return false;
  if (!rows.on_cpu() || !other_rows.on_cpu()) return fail({"rows"}, "tables are merged on the CPU");
  if (overlap(rows, other_rows) || overlap(bins, other_bins))
    return fail({"rows"}, "is written to but shares memory with the other table; pass separate tensors");
  const auto n = static_cast<int64_t>(places.size());
  if (n != other_rows.shape[0])
    return fail({"places"}, "expected %lld places, one per row, got %lld", static_cast<long long>(other_rows.shape[0]),
                static_cast<long long>(n));
  for (int64_t i = 0; i < n; ++i)
    if (places[i] >= rows.shape[0])
      return fail({"places", i}, "expected less than %lld, got %lld", static_cast<long long>(rows.shape[0]),
                  static_cast<long long>(places[i]));
  auto* from = static_cast<TensorStats*>(other_rows.data);
  for (int64_t i = 0; i < n; ++i) {
    if (places[i] < 0 || (from[i].count == 0 && from[i].nonfinite == 0)) continue;
    merge(static_cast<TensorStats*>(rows.data) + places[i], from[i]);
    int64_t* counts = static_cast<int64_t*>(other_bins.data) + i * kTensorBins;
    int64_t* into = static_cast<int64_t*>(bins.data) + places[i] * kTensorBins;
    const auto add = [&](int b, int64_t count) { into[b] += count; };
    if (gone)
      visit_counts<true>(counts, used_bins(from[i]), add);
    else
      visit_counts<false>(counts, kTensorBins, add);
    if (gone) from[i] = TensorStats{};
  }
  return true;
}

}  // namespace lipcore
