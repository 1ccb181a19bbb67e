#include "ops/conv_norms.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "kernels.h"
#include "math/weight_cost.h"
#include "ops/devices.h"
#include "python/parallel.h"
#include "python/tensor_text.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {
namespace {

constexpr int64_t kSerialProducts = 1 << 18;  // fewer multiplications are not worth a second thread

// Float32 sums are only believed in this range: below it products and squares may have been rounded to nothing, above
// it they may have overflowed.
constexpr double kSmallest = 1e-20, kLargest = 1e36;
// A Gram result below this share of its bound has lost digits (its error there is 1e-5) and is done again directly.
constexpr double kCancelled = 5e-3;
constexpr double kSmallest64 = 1e-280, kLargest64 = 1e300;

constexpr int64_t kLanesMemory = 4 << 20;

// Memory that a thread keeps from call to call.
char* scratch(int64_t bytes) {
  struct Memory {
    char* data = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(data); }
  };
  static thread_local Memory memory;
  if (memory.size < bytes) {
    std::free(memory.data);
    memory.size = (bytes + 4095) / 4096 * 4096;
    memory.data = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(memory.size)));
    if (!memory.data) memory.size = 0;
  }
  return memory.data;
}

template <class Visit>
void for_each(const void* data, DType dtype, const int64_t* size, const int64_t* stride, const Visit& visit) {
  for (int64_t c = 0; c < size[0]; ++c)
    for (int64_t z = 0; z < size[1]; ++z)
      for (int64_t y = 0; y < size[2]; ++y)
        for (int64_t x = 0; x < size[3]; ++x) {
          const int64_t i = c * stride[0] + z * stride[1] + y * stride[2] + x * stride[3];
          switch (dtype) {
            case DType::kFloat32:
              visit(static_cast<const float*>(data)[i]);
              break;
            case DType::kFloat64:
              visit(static_cast<const double*>(data)[i]);
              break;
            case DType::kBfloat16:
              visit(bfloat16_to_float(static_cast<const uint16_t*>(data)[i]));
              break;
            default:
              visit(float16_to_float(static_cast<const uint16_t*>(data)[i]));
          }
        }
}

// The largest finite element, in absolute value; *finite says whether the others are finite as well.
double largest(const void* data, DType dtype, const int64_t* size, const int64_t* stride, bool* finite) {
  double most = 0;
  for_each(data, dtype, size, stride, [&](double x) {
    if (!std::isfinite(x)) *finite = false;
    if (std::isfinite(x) && std::abs(x) > most) most = std::abs(x);
  });
  return most;
}

int exponent_of(double x) {
  const int exponent = x > 0 ? std::ilogb(x) : 0;
  return exponent < -1000 ? -1000 : exponent;  // so that 2^-exponent is finite
}

struct Work {
  const ConvNormsKernels* kernel;
  ConvShape shape;
  ConvSample first;  // sample 0
  ConvMethod method;
  std::atomic<bool> out_of_memory{false};

  ConvSample sample(int64_t b) const {
    ConvSample s = first;
    s.x = static_cast<const char*>(first.x) + b * first.x_step * item_size(first.x_dtype);
    s.grad = static_cast<const char*>(first.grad) + b * first.grad_step * item_size(first.grad_dtype);
    return s;
  }

  // Memory for one call of a kernel; null when there is none, which conv_norms_sq() reports in the end.
  char* memory(bool in_float64, ConvMethod needed) {
    char* data = scratch(kernel->scratch(shape, in_float64, needed));
    if (!data) out_of_memory = true;
    return data;
  }

  double direct(const ConvSample& s, int64_t part, int64_t parts) {
    char* data = memory(s.in_float64, ConvMethod::kDirect);
    return data ? kernel->direct(shape, s, part, parts, data) : 0;
  }

  double gram(const ConvSample& s) {
    char* data = memory(s.in_float64, ConvMethod::kGram);
    double bound = 0;
    const double total = data ? kernel->gram(shape, s, data, &bound) : 0;
    const double smallest = s.in_float64 ? kSmallest64 : kSmallest, most = s.in_float64 ? kLargest64 : kLargest;
    const bool sound = total >= kCancelled * bound && total >= smallest && bound <= most;
    return sound ? total : direct(s, 0, 1);
  }

  // What float32 could not hold is done again in float64, where the product of four float32 numbers always fits;
  // float64 samples are scaled to about 1 by a power of two.
  double again(int64_t b, double sum) {
    ConvSample s = sample(b);
    const int64_t x_size[4] = {shape.groups * shape.inputs, shape.size[0], shape.size[1], shape.size[2]};
    const int64_t grad_size[4] = {shape.groups * shape.outputs, shape.out[0], shape.out[1], shape.out[2]};
    bool finite = true;
    const double x_largest = largest(s.x, s.x_dtype, x_size, s.x_stride, &finite);
    const double grad_largest = largest(s.grad, s.grad_dtype, grad_size, s.grad_stride, &finite);
    if (finite && (x_largest == 0 || grad_largest == 0)) return 0;
    if (!s.in_float64) {
      s.in_float64 = true;
      return direct(s, 0, 1);
    }
    if (!finite && !std::isfinite(sum)) return sum;
    const int x_exponent = exponent_of(x_largest), grad_exponent = exponent_of(grad_largest);
    s.x_scale = std::ldexp(1.0, -x_exponent);
    s.grad_scale = std::ldexp(1.0, -grad_exponent);
    return std::ldexp(direct(s, 0, 1), 2 * (x_exponent + grad_exponent));
  }

  double settle(int64_t b, double sum) {
    const bool fine = first.in_float64 ? sum >= kSmallest64 && sum <= kLargest64 : sum >= kSmallest && sum <= kLargest;
    return fine ? sum : again(b, sum);
  }
};

bool check(const TensorView& x, const TensorView& grad, const ConvGeometry& g, const TensorView& out) {
  const int n = x.ndim - 2;
  if (n < 1 || n > 3)
    return fail({"x"}, "expected shape [B, C, ...] with one to three spatial dimensions, got %s", ShapeText(x).text);
  for (const auto* sizes : {&g.kernel, &g.stride, &g.padding, &g.dilation})
    if (static_cast<int>(sizes->size()) != n)
      return fail({"kernel_size"},
                  "expected %d numbers in kernel_size, stride, padding and dilation, as x of shape %s "
                  "has spatial dimensions",
                  n, ShapeText(x).text);
  for (int d = 0; d < n; ++d)
    if (g.kernel[d] < 1 || g.stride[d] < 1 || g.padding[d] < 0 || g.dilation[d] < 1)
      return fail({"kernel_size"}, "expected kernel_size, stride and dilation of at least 1 and padding of at least 0");
  if (g.groups < 1 || x.shape[1] % g.groups != 0)
    return fail({"groups"}, "expected a divisor of the %lld channels of x, got %lld",
                static_cast<long long>(x.shape[1]), static_cast<long long>(g.groups));
  if (grad.ndim != x.ndim || grad.shape[0] != x.shape[0] || grad.shape[1] % g.groups != 0)
    return fail({"grad"}, "expected shape [%lld, O, ...] with O a multiple of groups for x of shape %s, got %s",
                static_cast<long long>(x.shape[0]), ShapeText(x).text, ShapeText(grad).text);
  for (int d = 0; d < n; ++d) {
    const int64_t room = x.shape[d + 2] + 2 * g.padding[d] - g.dilation[d] * (g.kernel[d] - 1) - 1;
    const int64_t full = room < 0 ? 0 : room / g.stride[d] + 1;
    if (grad.shape[d + 2] > full)
      return fail({"grad"}, "expected at most %lld positions in dimension %d, the convolution's output, got shape %s",
                  static_cast<long long>(full), d + 2, ShapeText(grad).text);
  }
  if (out.dtype != DType::kFloat64 || out.ndim != 1 || out.shape[0] != x.shape[0])
    return fail({"out"}, "expected float64 [%lld], got %s %s", static_cast<long long>(x.shape[0]),
                dtype_name(out.dtype), ShapeText(out).text);
  if (!x.same_device(grad) || !x.same_device(out)) return fail({"x"}, "is on another device; put all on one");
  return true;
}

void describe(const TensorView& x, const TensorView& grad, const ConvGeometry& g, Work* work) {
  ConvShape& shape = work->shape;
  ConvSample& sample = work->first;
  shape.groups = g.groups;
  shape.inputs = x.shape[1] / g.groups;
  shape.outputs = grad.shape[1] / g.groups;
  const bool in_float64 = x.dtype == DType::kFloat64 || grad.dtype == DType::kFloat64;
  sample = {x.data,          grad.data,  x.dtype, grad.dtype, {x.strides[1]}, {grad.strides[1]}, x.strides[0],
            grad.strides[0], in_float64, 1,       1};
  const int missing = 5 - x.ndim;
  for (int d = 0; d < 3; ++d) {
    const bool there = d >= missing;
    const int from = d - missing;
    shape.size[d] = there ? x.shape[from + 2] : 1;
    shape.out[d] = there ? grad.shape[from + 2] : 1;
    shape.kernel[d] = there ? g.kernel[from] : 1;
    shape.stride[d] = there ? g.stride[from] : 1;
    shape.padding[d] = there ? g.padding[from] : 0;
    shape.dilation[d] = there ? g.dilation[from] : 1;
    sample.x_stride[d + 1] = there ? x.strides[from + 2] : 0;
    sample.grad_stride[d + 1] = there ? grad.strides[from + 2] : 0;
  }
}

// Whether lanes are filled with groups and samples. The rearranged images should stay in a core's cache.
bool lanes_pay(const Work& work, int64_t samples) {
  const ConvShape& s = work.shape;
  const int64_t lanes = work.first.in_float64 ? work.kernel->lanes / 2 : work.kernel->lanes;
  return lanes_are_cheaper(s.outputs, samples * s.groups, lanes) &&
         work.kernel->scratch(s, work.first.in_float64, ConvMethod::kLanes) <= kLanesMemory;
}

// A few samples are cut in parts, as many as their shape says and not as there are threads.
int64_t parts_of(int64_t tiles, int64_t samples) {
  const int64_t most = tiles / 4;
  return samples >= 8 || most < 2 ? 1 : most < 8 ? most : 8;
}

bool on_device(const TensorView& x, const Work& work, bool gram, const TensorView& out) {
#if defined(LIPCORE_WITH_CUDA)
  const ConvSample& first = work.first;
  const auto factor = [](const void* data, DType dtype, int64_t step, const int64_t* stride) {
    return cuda::Factor{data, dtype, step, stride[0], {stride[1], stride[2], stride[3]}};
  };
  const cuda::WeightNorms norms{work.shape,
                                factor(first.x, first.x_dtype, first.x_step, first.x_stride),
                                factor(first.grad, first.grad_dtype, first.grad_step, first.grad_stride),
                                x.shape[0],
                                nullptr,
                                gram,
                                nullptr,
                                0,
                                false};
  return cuda::weight_norms(norms, x.device, static_cast<double*>(out.data));
#else
  (void)x, (void)work, (void)gram, (void)out;
  return refuse_device("x");
#endif
}

}  // namespace

bool conv_norms_sq(const TensorView& x, const TensorView& grad, const ConvGeometry& geometry, bool gram,
                   const TensorView& out) {
  if (!check(x, grad, geometry, out)) return false;
  Work work;
  work.kernel = kernels().conv_norms;
  describe(x, grad, geometry, &work);
  if (!x.on_cpu()) return on_device(x, work, gram, out);
  auto* norms = static_cast<double*>(out.data);
  const int64_t samples = x.shape[0];
  if (x.numel == 0 || grad.numel == 0) {
    for (int64_t b = 0; b < samples; ++b) norms[b] = 0;
    return true;
  }
  const ConvShape& shape = work.shape;
  const int64_t rows = shape.inputs * shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  const bool parallel = rows * grad.numel >= kSerialProducts;
  work.method = gram ? ConvMethod::kGram : lanes_pay(work, samples) ? ConvMethod::kLanes : ConvMethod::kDirect;
  const int64_t lanes = work.first.in_float64 ? work.kernel->lanes / 2 : work.kernel->lanes;
  const int64_t parts = work.method == ConvMethod::kLanes    ? shape.groups
                        : work.method == ConvMethod::kDirect ? parts_of(rows / work.kernel->tile_rows, samples)
                                                             : 1;
  std::vector<double> sums(static_cast<size_t>(samples * parts));
  PyThreadState* state = parallel ? PyEval_SaveThread() : nullptr;
  if (work.method == ConvMethod::kLanes) {
    parallel_for((samples * parts + lanes - 1) / lanes, parallel, [&](int64_t block) {
      const int64_t first = block * lanes, left = samples * parts - first;
      if (char* data = work.memory(work.first.in_float64, ConvMethod::kLanes))
        work.kernel->lanes_direct(shape, work.first, first, left < lanes ? left : lanes, data, &sums[first]);
    });
  } else {
    parallel_for(samples * parts, parallel, [&](int64_t task) {
      const ConvSample sample = work.sample(task / parts);
      sums[task] = gram ? work.gram(sample) : work.direct(sample, task % parts, parts);
    });
  }
  parallel_for(samples, parallel, [&](int64_t b) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[b * parts + part];
    norms[b] = work.settle(b, sum);
  });
  if (state) PyEval_RestoreThread(state);
  if (work.out_of_memory) return PyErr_NoMemory() != nullptr;
  return true;
}

}  // namespace lipcore
