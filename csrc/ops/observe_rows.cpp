#include "ops/observe_rows.h"

#include "ops/read_element.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

bool is_table(const TensorView& view, const TensorView& values, DType dtype, int64_t columns) {
  return view.dtype == dtype && view.ndim == 2 && view.shape[0] == values.shape[0] && view.shape[1] == columns &&
         (view.numel == 0 || (view.strides[0] == columns && view.strides[1] == 1)) && view.same_device(values);
}

bool check_all(const TensorView& values, Observable what, const TensorView* gradient, const TensorView& rows,
               const TensorView& bins) {
  if (values.ndim != 2) return fail({"values"}, "expected shape [places, B], got %s", ShapeText(values).text);
  const auto places = static_cast<long long>(values.shape[0]);
  if (!is_table(rows, values, DType::kFloat64, kObservedColumns))
    return fail({"rows"}, "expected a contiguous float64 tensor of shape [%lld, %d] beside values, got %s %s", places,
                kObservedColumns, dtype_name(rows.dtype), ShapeText(rows).text);
  if (!is_table(bins, values, DType::kInt64, kBins))
    return fail({"bins"}, "expected a contiguous int64 tensor of shape [%lld, %d] beside values, got %s %s", places,
                kBins, dtype_name(bins.dtype), ShapeText(bins).text);
  if (what != Observable::kRatios) return true;
  if (!gradient || gradient->dtype != DType::kFloat64 || gradient->ndim != 1 || gradient->shape[0] != values.shape[1] ||
      !gradient->same_device(values))
    return fail({"gradient"}, "expected a float64 tensor of shape [%lld] beside values",
                static_cast<long long>(values.shape[1]));
  return true;
}

void observe_on_cpu(const TensorView& values, const ObservedTable& table, ObservedRow* rows, int64_t* bins) {
  for (int64_t k = 0; k < table.places; ++k) {
    for (int64_t b = 0; b < table.count; ++b) {
      const double x = read_element(values, k * table.place_stride + b * table.stride);
      const double gradient = table.gradient ? table.gradient[b * table.gradient_stride] : 0;
      const int bin = observe(&rows[k], observable_of(table.what, x, gradient, table.smallest));
      if (bin >= 0) ++bins[k * kBins + bin];
    }
  }
}

}  // namespace

bool observe_rows(const TensorView& values, Observable what, const TensorView* gradient, double smallest,
                  const TensorView& rows, const TensorView& bins) {
  if (!check_all(values, what, gradient, rows, bins)) return false;
  if (values.numel == 0) return true;
  ObservedTable table{
      values.data, values.dtype, values.shape[0], values.shape[1], values.strides[0], values.strides[1], what, nullptr,
      0,           smallest};
  if (what == Observable::kRatios) {
    table.gradient = static_cast<const double*>(gradient->data);
    table.gradient_stride = gradient->strides[0];
  }
  auto* observed = static_cast<ObservedRow*>(rows.data);
  auto* counts = static_cast<int64_t*>(bins.data);
  if (!values.on_cpu()) {
#if defined(LIPCORE_WITH_CUDA)
    return cuda::observe_rows(table, values.device, observed, counts);
#else
    return fail({"values"},
                "are on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON or pass "
                "CPU tensors");
#endif
  }
  observe_on_cpu(values, table, observed, counts);
  return true;
}

}  // namespace lipcore
