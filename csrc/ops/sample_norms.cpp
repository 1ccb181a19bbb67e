#include "ops/sample_norms.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "ops/devices.h"
#include "ops/read_element.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {

bool describe_rows(const TensorView& x, Rows* rows) {
  rows->data = static_cast<const char*>(x.data);
  rows->dtype = x.dtype;
  rows->count = x.shape[0];
  rows->length = rows->count ? x.numel / rows->count : 0;
  rows->stride = x.strides[0];
  TensorView row = x;
  row.ndim = x.ndim - 1;
  row.shape = x.shape + 1;
  row.strides = x.strides + 1;
  row.numel = rows->length;
  rows->dense = row.is_dense();
  rows->ndim = 0;
  if (rows->dense) return true;
  for (int d = 0; d < row.ndim; ++d) {
    if (row.shape[d] == 1) continue;
    const int last = rows->ndim - 1;
    if (last >= 0 && rows->strides[last] == row.strides[d] * row.shape[d]) {
      rows->shape[last] *= row.shape[d];
      rows->strides[last] = row.strides[d];
      continue;
    }
    if (rows->ndim == kRowDims) return false;
    rows->shape[rows->ndim] = row.shape[d];
    rows->strides[rows->ndim++] = row.strides[d];
  }
  return true;
}

namespace {

template <class T>
void gather_as(const Rows& rows, const char* row, int64_t begin, int64_t count, T* to) {
  const T* from = reinterpret_cast<const T*>(row);
  const int inner = rows.ndim - 1;
  int64_t index[kRowDims], rest = begin;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % rows.shape[d];
    rest /= rows.shape[d];
  }
  for (int64_t done = 0; done < count;) {
    int64_t offset = 0;
    for (int d = 0; d <= inner; ++d) offset += index[d] * rows.strides[d];
    const int64_t left = rows.shape[inner] - index[inner];
    const int64_t run = left < count - done ? left : count - done;
    for (int64_t i = 0; i < run; ++i) to[done + i] = from[offset + i * rows.strides[inner]];
    done += run;
    index[inner] += run;
    for (int d = inner; d > 0 && index[d] == rows.shape[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

}  // namespace

const void* row_run(const Rows& rows, int64_t row, int64_t begin, int64_t count) {
  const char* start = rows.data + row * rows.stride * item_size(rows.dtype);
  if (rows.dense) return start + begin * item_size(rows.dtype);
  static thread_local std::vector<double> buffer;
  buffer.resize(kChunk);
  switch (item_size(rows.dtype)) {
    case 8:
      gather_as(rows, start, begin, count, buffer.data());
      break;
    case 4:
      gather_as(rows, start, begin, count, reinterpret_cast<uint32_t*>(buffer.data()));
      break;
    default:
      gather_as(rows, start, begin, count, reinterpret_cast<uint16_t*>(buffer.data()));
  }
  return buffer.data();
}

namespace {

template <class Visit>
void for_each_in_row(const Rows& rows, int64_t row, const Visit& visit) {
  for (int64_t begin = 0; begin < rows.length; begin += kChunk) {
    const int64_t count = rows.length - begin < kChunk ? rows.length - begin : kChunk;
    const auto* x = static_cast<const double*>(row_run(rows, row, begin, count));
    for (int64_t i = 0; i < count; ++i) visit(x[i]);
  }
}

// For float64 rows whose squares overflow or underflow: scaled by a power of two first. Rare, so plain. NaN wins over
// infinity, as in a sum of squares.
double scaled_norm(const Rows& rows, int64_t row) {
  double largest = 0;
  bool has_nan = false;
  for_each_in_row(rows, row, [&](double x) {
    has_nan = has_nan || std::isnan(x);
    largest = std::fmax(largest, std::abs(x));
  });
  if (has_nan) return std::numeric_limits<double>::quiet_NaN();
  if (largest == 0 || std::isinf(largest)) return largest;
  const int exponent = std::ilogb(largest);
  double sum = 0;
  for_each_in_row(rows, row, [&](double x) {
    const double scaled = std::ldexp(x, -exponent);
    sum += scaled * scaled;
  });
  return std::ldexp(std::sqrt(sum), exponent);
}

double finish_norm(const Rows& rows, int64_t row, double sum) {
  // Not std::isfinite alone: a subnormal sum has lost digits too. A float32 square never gets there.
  if (rows.dtype == DType::kFloat64 && !(sum >= 1e-280 && sum <= 1e300)) return scaled_norm(rows, row);
  return std::sqrt(sum);
}

}  // namespace

double sum_squares_of_row(const Rows& rows, int64_t row) {
  double sum = 0;
  for (int64_t begin = 0; begin < rows.length; begin += kChunk) {
    const int64_t count = rows.length - begin < kChunk ? rows.length - begin : kChunk;
    sum += kernels().sample_norms->sum_squares(row_run(rows, row, begin, count), rows.dtype, count);
  }
  return sum;
}

double norm_of_row(const Rows& rows, int64_t row, double sum) { return finish_norm(rows, row, sum); }

namespace {

void norms_of_rows(const Rows& rows, double* out) {
  const auto& kernel = *kernels().sample_norms;
  const bool parallel = rows.count * rows.length >= kSerialElements;
  if (rows.length <= kChunk) {
    const int64_t per_task = rows.length ? (kChunk + rows.length - 1) / rows.length : rows.count + 1;
    parallel_for((rows.count + per_task - 1) / per_task, parallel, [&](int64_t task) {
      const int64_t end = (task + 1) * per_task < rows.count ? (task + 1) * per_task : rows.count;
      for (int64_t row = task * per_task; row < end; ++row)
        out[row] =
            finish_norm(rows, row, kernel.sum_squares(row_run(rows, row, 0, rows.length), rows.dtype, rows.length));
    });
    return;
  }
  const int64_t per_row = (rows.length + kChunk - 1) / kChunk;
  std::vector<double> partials(static_cast<size_t>(rows.count * per_row));
  parallel_for(rows.count * per_row, parallel, [&](int64_t task) {
    const int64_t row = task / per_row, begin = task % per_row * kChunk;
    const int64_t count = rows.length - begin < kChunk ? rows.length - begin : kChunk;
    partials[task] = kernel.sum_squares(row_run(rows, row, begin, count), rows.dtype, count);
  });
  for (int64_t row = 0; row < rows.count; ++row) {
    double sum = 0;
    for (int64_t k = 0; k < per_row; ++k) sum += partials[row * per_row + k];
    out[row] = finish_norm(rows, row, sum);
  }
}

// Returns the stride between the single elements of B samples, whose shape has one dimension of size B and others of
// size 1: [B], [B, 1], [1, B]. -1 where more than one dimension has several elements.
int64_t sample_stride(const TensorView& view) {
  int64_t stride = 0;
  for (int d = 0, found = 0; d < view.ndim; ++d) {
    if (view.shape[d] <= 1) continue;
    if (found++) return -1;
    stride = view.strides[d];
  }
  return stride;
}

bool check_result(const TensorView& out, const char* name, int64_t rows, const TensorView& input) {
  if (out.dtype != DType::kFloat64)
    return fail({name}, "expected dtype float64, got %s; lipcore's results are float64", dtype_name(out.dtype));
  const bool fits = (out.ndim == 1 || (out.ndim == 2 && out.shape[0] == 1)) && out.shape[out.ndim - 1] == rows;
  if (!fits)
    return fail({name}, "expected shape [%lld], one value per row, got %s", static_cast<long long>(rows),
                ShapeText(out).text);
  if (!out.same_device(input)) return fail({name}, "is on another device than the input; put both on one device");
  if (!input.numel || !out.numel) return true;  // no memory: a null pointer takes no offset
  const char* begin = static_cast<const char*>(out.data);
  const char* end = begin + out.numel * 8;
  const char* first = static_cast<const char*>(input.data);
  int64_t last = 0;
  for (int d = 0; d < input.ndim; ++d) last += (input.shape[d] - 1) * input.strides[d];
  const char* input_end = first + (last + 1) * item_size(input.dtype);
  if (begin < input_end && first < end) return fail({name}, "shares memory with the input; pass separate tensors");
  return true;
}

bool check_rows(const TensorView& x, const char* name) {
  if (x.ndim >= 1) return true;
  return fail({name},
              "expected shape [B, ...] with one row per sample, got a 0-dimensional tensor; use x.reshape(1) for "
              "one sample");
}

bool refuse_dimensions(const char* name) {
  return fail({name}, "has more than 8 dimensions that cannot be merged; pass a contiguous tensor");
}

// Runs without the GIL when there is enough work for another thread to gain from it. The tensors stay alive: the caller
// of the Python function holds them.
template <class Body>
void without_gil(int64_t elements, const Body& body) {
  if (elements < kSerialElements) {
    body();
    return;
  }
  PyThreadState* state = PyEval_SaveThread();
  body();
  PyEval_RestoreThread(state);
}

}  // namespace

bool sample_norms(const TensorView& x, const TensorView& out) {
  if (!check_rows(x, "x") || !check_result(out, "out", x.shape[0], x)) return false;
  Rows rows;
  if (!describe_rows(x, &rows)) return refuse_dimensions("x");
#if defined(LIPCORE_WITH_CUDA)
  if (!x.on_cpu()) return cuda::sample_norms(rows, x.device, static_cast<double*>(out.data));
#endif
  if (!x.on_cpu()) return refuse_device("x");
  without_gil(x.numel, [&] { norms_of_rows(rows, static_cast<double*>(out.data)); });
  return true;
}

bool normalized_norms(const TensorView& delta, const TensorView& output_grad, const TensorView& r, int64_t* skipped) {
  if (!check_rows(delta, "delta") || !check_result(r, "r", delta.shape[0], delta)) return false;
  const int64_t stride = sample_stride(output_grad);
  if (output_grad.numel != delta.shape[0] || stride < 0)
    return fail({"output_grad"},
                "expected one value per sample, %lld for delta of shape %s, got shape %s; for outputs "
                "with several values per sample pass the row norms of their gradient (the one-sided quantity)",
                static_cast<long long>(delta.shape[0]), ShapeText(delta).text, ShapeText(output_grad).text);
  if (!output_grad.same_device(delta)) return fail({"output_grad"}, "is on another device than delta; put both on one");
  Rows rows;
  if (!describe_rows(delta, &rows)) return refuse_dimensions("delta");
  if (!delta.on_cpu())
    return fail({"delta"},
                "normalized_norms' core runs on the CPU; lipcore.functional divides on the "
                "device");
  without_gil(delta.numel, [&] {
    auto* out = static_cast<double*>(r.data);
    norms_of_rows(rows, out);
    *skipped = 0;
    for (int64_t b = 0; b < rows.count; ++b) {
      const double eps = std::abs(read_element(output_grad, b * stride));
      const bool usable = eps > 0 && std::isfinite(eps);
      out[b] = usable ? out[b] / eps : std::numeric_limits<double>::quiet_NaN();
      *skipped += !usable;
    }
  });
  return true;
}

}  // namespace lipcore
