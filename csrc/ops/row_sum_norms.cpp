#include "ops/row_sum_norms.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "ops/devices.h"
#include "ops/offsets.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

constexpr int64_t kFewUnits = 16;         // fewer than this many (sample, block of columns), and rows are cut as well
constexpr int64_t kTaskElements = 16384;  // small samples share a task

// A sample's block of columns, or one of the parts of its rows.
struct Unit {
  int64_t sample, first_row, rows, column, columns;
};

constexpr int64_t kGroup = 4;  // rows that are normalised together, into the first-level cache

void find_statistics(const TensorView& x, const Normalizer& normalizer, std::vector<RowStatistics>* found) {
  const int64_t length = x.shape[1];
  found->resize(static_cast<size_t>(x.shape[0] * length));
  parallel_for(x.shape[0], x.numel >= kSerialElements, [&](int64_t b) {
    RowSumBlock sample{nullptr, x.at(b * x.strides[0]), x.dtype, length, x.shape[2], 0, x.strides[1], true};
    kernels().row_sum_norms->statistics(sample, normalizer.eps, normalizer.center, found->data() + b * length);
  });
}

// Adds a block of flat rows, normalised; half precision becomes float32, as in the layer.
void add_normalized(const RowSumBlock& block, const RowStatistics* rows, double* shift, double* scale) {
  alignas(64) char x[kGroup * kRowSumColumns * sizeof(double)], g[kGroup * kRowSumColumns * sizeof(float)];
  constexpr RowStatistics kAsItIs[kGroup] = {{0, 1}, {0, 1}, {0, 1}, {0, 1}};
  const auto& kernel = *kernels().row_sum_norms;
  const bool narrow = block.dtype != DType::kFloat32 && block.dtype != DType::kFloat64;
  for (int64_t row = 0; row < block.rows; row += kGroup) {
    RowSumBlock group = block;
    group.rows = std::min(kGroup, block.rows - row);
    group.g = static_cast<const char*>(block.g) + row * block.g_step * item_size(block.dtype);
    group.x = static_cast<const char*>(block.x) + row * block.x_step * item_size(block.dtype);
    kernel.normalize(group, rows + row, x);
    if (narrow) {
      RowSumBlock gradients = group;
      gradients.x = group.g;
      gradients.x_step = group.g_step;
      kernel.normalize(gradients, kAsItIs, g);
      group.g = g;
      group.g_step = block.columns;
      group.dtype = DType::kFloat32;
    }
    group.x = x;
    group.x_step = block.columns;
    kernel.add(group, shift, scale);
  }
}

double sum_squares(const double* x, int64_t count) {
  return kernels().sample_norms->sum_squares(x, DType::kFloat64, count);
}

// Of any strides.
bool on_device(const TensorView& grad, const TensorView* x, Offsets offsets, Terms terms, const TensorView& out) {
#if defined(LIPCORE_WITH_CUDA)
  const bool packed = offsets.begin != nullptr;
  cuda::RowSums sums{grad.data, terms != Terms::kShift ? x->data : nullptr, grad.dtype};
  sums.samples = packed ? offsets.samples : grad.shape[0];
  sums.rows = grad.shape[1];
  sums.columns = grad.shape[2];
  for (int d = 0; d < 3; ++d) {
    sums.g_strides[d] = grad.strides[d];
    sums.x_strides[d] = x ? x->strides[d] : 0;
  }
  sums.offsets = offsets.begin;
  sums.shift = terms != Terms::kScale;
  sums.scale = terms != Terms::kShift;
  return cuda::row_sum_norms(sums, grad.device, static_cast<double*>(out.data));
#else
  (void)grad, (void)x, (void)offsets, (void)terms, (void)out;
  return refuse_device("grad");
#endif
}

}  // namespace

bool row_sum_norms(const TensorView& grad, const TensorView* x, Offsets offsets, Terms terms, const TensorView& out,
                   const Normalizer* normalizer) {
  if (grad.ndim != 3 || (x && (x->ndim != 3 || x->dtype != grad.dtype || !x->same_device(grad))))
    return fail({"grad"}, "expected [B, T, F] and x of the same dtype on the same device, got %s",
                ShapeText(grad).text);
  if (!grad.on_cpu()) return on_device(grad, x, offsets, terms, out);
  auto* norms = static_cast<double*>(out.data);
  std::fill(norms, norms + out.numel, 0.0);
  if (!grad.numel) return true;  // its strides mean nothing
  const int64_t length = grad.shape[1], features = grad.shape[2];
  const int64_t samples = offsets.begin ? offsets.samples : grad.shape[0];
  const auto flat = [&](int d) {
    return (grad.shape[d] <= 1 || grad.strides[d] == 1) && (!x || x->shape[d] <= 1 || x->strides[d] == 1);
  };
  const bool row_runs = flat(2);
  if (!row_runs && (normalizer || !flat(1)))
    return fail({"grad"}, "expected flat rows or columns, and those of x alike; of a norm layer rows");
  static thread_local std::vector<Unit> unit_memory;
  static thread_local std::vector<double> partial_memory;
  static thread_local std::vector<RowStatistics> statistics_memory;
  auto& units = unit_memory;  // the threads of the pool must see this thread's
  auto& partials = partial_memory;
  auto& statistics = statistics_memory;
  units.clear();
  const int64_t blocks = (features + kRowSumColumns - 1) / kRowSumColumns;
  // The cuts depend on shapes alone, so that any number of threads adds in the same order.
  const bool few = samples * blocks < kFewUnits;
  int64_t total = 0;
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t begin = offsets.begin ? offsets.begin[b] : 0;
    const int64_t rows = offsets.begin ? offsets.begin[b + 1] - begin : length;
    for (int64_t column = 0; column < features; column += kRowSumColumns) {
      const int64_t columns = std::min<int64_t>(kRowSumColumns, features - column);
      const int64_t parts = few ? std::clamp<int64_t>(rows * columns / kChunk, 1, kFewUnits) : 1;
      const int64_t per_part = std::max<int64_t>(1, (rows + parts - 1) / parts);
      int64_t row = 0;
      do {
        units.push_back({b, begin + row, std::min(per_part, rows - row), column, columns});
        row += per_part;
      } while (row < rows);
    }
    total += rows * features;
  }
  const bool shifts = terms != Terms::kScale, scales = terms != Terms::kShift;
  const auto count = static_cast<int64_t>(units.size());
  // With cut rows the sums of all parts are kept, else only the squares of a unit's columns.
  partials.resize(static_cast<size_t>(few ? 2 * count * kRowSumColumns : 2 * count));
  const auto* g_data = static_cast<const char*>(grad.data);
  const auto* x_data = x ? static_cast<const char*>(x->data) : nullptr;
  const int64_t size = item_size(grad.dtype), run_dim = row_runs ? 1 : 2;
  const auto do_unit = [&](int64_t i) {
    const Unit& unit = units[i];
    double local[2 * kRowSumColumns];
    double* shift = few ? &partials[2 * i * kRowSumColumns] : local;
    double* scale = shift + kRowSumColumns;
    const auto start = [&](const TensorView& t) {
      const int64_t sample = offsets.begin ? 0 : unit.sample * t.strides[0];
      return (sample + unit.first_row * t.strides[1] + unit.column * t.strides[2]) * size;
    };
    if (!few && !scales && unit.rows == 1 && row_runs) {  // a row is its own sum: the same bits, five times as fast
      partials[2 * i + 1] = kernels().sample_norms->sum_squares(g_data + start(grad), grad.dtype, unit.columns);
      return;
    }
    const auto padded = static_cast<size_t>((unit.columns + 15) / 16 * 16) * sizeof(double);
    std::memset(shift, 0, padded);
    std::memset(scale, 0, padded);
    if (unit.rows) {
      const RowSumBlock block = {
          g_data + start(grad),  x ? x_data + start(*x) : nullptr, grad.dtype, unit.rows, unit.columns,
          grad.strides[run_dim], x ? x->strides[run_dim] : 0,      row_runs};
      const int64_t row = (offsets.begin ? 0 : unit.sample * length) + unit.first_row;
      if (normalizer) {
        add_normalized(block, &statistics[row], shifts ? shift : nullptr, scales ? scale : nullptr);
      } else {
        kernels().row_sum_norms->add(block, shifts ? shift : nullptr, scales ? scale : nullptr);
      }
    }
    if (few) return;
    partials[2 * i] = sum_squares(scale, unit.columns);
    partials[2 * i + 1] = sum_squares(shift, unit.columns);
  };
  const int64_t each = std::max<int64_t>(1, total / std::max<int64_t>(1, count));
  const int64_t per_task = few ? 1 : std::max<int64_t>(1, kTaskElements / each);
  const bool parallel = total >= kSerialElements;
  PyThreadState* state = parallel ? PyEval_SaveThread() : nullptr;
  if (normalizer) find_statistics(*x, *normalizer, &statistics);
  parallel_for((count + per_task - 1) / per_task, parallel, [&](int64_t task) {
    for (int64_t i = task * per_task; i < std::min(count, (task + 1) * per_task); ++i) do_unit(i);
  });
  if (state) PyEval_RestoreThread(state);
  double* scale_norms = scales ? norms : nullptr;
  double* shift_norms = shifts ? norms + (scales ? samples : 0) : nullptr;
  for (int64_t i = 0; i < count;) {
    const int64_t first = i, b = units[i].sample;
    double squares[2] = {0, 0};
    if (few) {
      double* sums = &partials[2 * first * kRowSumColumns];
      for (++i; i < count && units[i].sample == b && units[i].column == units[first].column; ++i)
        for (int64_t c = 0; c < 2 * kRowSumColumns; ++c)
          if (c % kRowSumColumns < units[i].columns) sums[c] += partials[2 * i * kRowSumColumns + c];
      squares[0] = sum_squares(sums + kRowSumColumns, units[first].columns);
      squares[1] = sum_squares(sums, units[first].columns);
    } else {
      squares[0] = partials[2 * i];
      squares[1] = partials[2 * i + 1];
      ++i;
    }
    if (scale_norms) scale_norms[b] += squares[0];
    if (shift_norms) shift_norms[b] += squares[1];
  }
  return true;
}

}  // namespace lipcore
