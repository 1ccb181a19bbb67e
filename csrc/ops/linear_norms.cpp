#include "ops/linear_norms.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
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

struct Buffer {
  void* memory = nullptr;
  ~Buffer() { std::free(memory); }
};

// Returns the scratch memory of this thread, made once and large enough for every instruction set.
void* scratch() {
  static thread_local Buffer buffer;
  if (!buffer.memory) {
    const auto size = static_cast<size_t>(kernels().linear_norms->scratch);
    buffer.memory = std::aligned_alloc(64, (size + 4095) / 4096 * 4096);
  }
  return buffer.memory;
}

struct Job {
  LinearSample sample;
  int64_t index;  // of the sample in the batch
  bool gram;
};

struct Batch {
  int64_t inputs, outputs;
  std::vector<LinearSample> samples;
};

int64_t blocks(int64_t n) { return (n + kernels().linear_norms->block - 1) / kernels().linear_norms->block; }

LinearBlock block_at(const Batch& batch, int64_t rows, int64_t columns, int64_t i, int64_t j) {
  const int64_t size = kernels().linear_norms->block;
  return {i * size,     std::min(size, rows - i * size), j * size, std::min(size, columns - j * size), batch.inputs,
          batch.outputs};
}

// Blocks are fixed by shape and their sums added in order: the same bits for any number of threads.
std::vector<GramSums> run(const Batch& batch, const std::vector<Job>& jobs) {
  const LinearNormsKernels& kernel = *kernels().linear_norms;
  std::vector<int64_t> first{0};
  double work = 0;
  for (const Job& job : jobs) {
    const int64_t side = blocks(job.sample.tokens);
    first.push_back(first.back() + (job.gram ? side * (side + 1) / 2 : blocks(batch.outputs) * blocks(batch.inputs)));
    work += static_cast<double>(job.sample.tokens) * static_cast<double>(batch.inputs + batch.outputs);
  }
  std::vector<GramSums> partials(static_cast<size_t>(first.back()));
  parallel_for(first.back(), work >= kSerialElements, [&](int64_t task) {
    const auto job = std::upper_bound(first.begin(), first.end(), task) - first.begin() - 1;
    const LinearSample& sample = jobs[job].sample;
    int64_t rest = task - first[job];
    if (jobs[job].gram) {
      int64_t i = 0;
      for (; rest > i; ++i) rest -= i + 1;
      kernel.gram(sample, block_at(batch, sample.tokens, sample.tokens, i, rest), scratch(), &partials[task]);
    } else {
      const int64_t per_row = blocks(batch.inputs);
      const LinearBlock block = block_at(batch, batch.outputs, batch.inputs, rest / per_row, rest % per_row);
      partials[task] = {kernel.direct(sample, block, scratch()), 0, 0, 0};
    }
  });
  std::vector<GramSums> sums(jobs.size());
  for (size_t job = 0; job < jobs.size(); ++job)
    for (int64_t task = first[job]; task < first[job + 1]; ++task) {
      sums[job].total += partials[task].total;
      sums[job].diagonal += partials[task].diagonal;
      sums[job].x += partials[task].x;
      sums[job].grad += partials[task].grad;
    }
  return sums;
}

// Smallest sum of squares that products of float32 (float64) numbers give without losing digits to underflow, and what
// one such product may lose.
double safe_sum(const Batch& batch, bool in_float64) {
  return static_cast<double>(batch.inputs) * static_cast<double>(batch.outputs) * (in_float64 ? 1e-290 : 1e-29);
}

bool trust_gram(const Batch& batch, const LinearSample& sample, const GramSums& sums) {
  return gram_holds(sums, static_cast<double>(sample.tokens), static_cast<double>(batch.inputs),
                    static_cast<double>(batch.outputs), sample.in_float64);
}

// A power of two that brings the largest element near 1; 0 for zeros, 1 where there are elements that are not finite.
double scale_for(double largest) {
  if (largest == 0) return 0;
  if (!std::isfinite(largest)) return 1;
  return std::ldexp(1.0, std::max(-1000, std::min(1000, -std::ilogb(largest))));
}

// Computes samples whose float32 sums left their range once more, in float64 and scaled.
void redo(const Batch& batch, const std::vector<int64_t>& which, double* out) {
  const auto largest = kernels().linear_norms->largest;
  std::vector<Job> jobs;
  for (int64_t b : which) {
    LinearSample sample = batch.samples[b];
    sample.x_scale = scale_for(largest(sample.x, sample.dtype, sample.x_stride, sample.tokens, batch.inputs));
    sample.grad_scale = scale_for(largest(sample.grad, sample.dtype, sample.grad_stride, sample.tokens, batch.outputs));
    sample.in_float64 = true;
    out[b] = 0;
    const bool finite_zero = (sample.x_scale == 0 && sample.grad_scale != 1) ||
                             (sample.grad_scale == 0 && sample.x_scale != 1) ||
                             (sample.x_scale == 0 && sample.grad_scale == 0);
    if (finite_zero) continue;
    if (sample.x_scale == 0) sample.x_scale = 1;
    if (sample.grad_scale == 0) sample.grad_scale = 1;
    jobs.push_back({sample, b, false});
  }
  const std::vector<GramSums> sums = run(batch, jobs);
  for (size_t i = 0; i < jobs.size(); ++i) {
    const int exponent = std::ilogb(jobs[i].sample.x_scale) + std::ilogb(jobs[i].sample.grad_scale);
    out[jobs[i].index] = std::ldexp(sums[i].total, -2 * exponent);
  }
}

void norms(const Batch& batch, LinearMethod method, double* out) {
  std::vector<Job> jobs;
  for (size_t b = 0; b < batch.samples.size(); ++b) {
    const LinearSample& sample = batch.samples[b];
    out[b] = 0;
    const LinearMethod chosen =
        method == LinearMethod::kChoose ? linear_method(sample.tokens, batch.inputs, batch.outputs, true) : method;
    if (sample.tokens && batch.inputs && batch.outputs)
      jobs.push_back({sample, static_cast<int64_t>(b), chosen == LinearMethod::kGram});
  }
  std::vector<int64_t> suspicious;
  for (int round = 0; round < 2 && !jobs.empty(); ++round) {
    const std::vector<GramSums> sums = run(batch, jobs);
    std::vector<Job> again;
    for (size_t i = 0; i < jobs.size(); ++i) {
      Job& job = jobs[i];
      const double total = sums[i].total;
      out[job.index] = total;
      if (job.gram) {
        if (trust_gram(batch, job.sample, sums[i])) continue;
        job.gram = false;
        again.push_back(job);
      } else if (!(std::isfinite(total) && total >= safe_sum(batch, job.sample.in_float64))) {
        suspicious.push_back(job.index);
      }
    }
    jobs = std::move(again);
  }
  redo(batch, suspicious, out);
}

void weight_grad(const Batch& batch, void* total, size_t total_item_size, double* out) {
  const LinearNormsKernels& kernel = *kernels().linear_norms;
  const auto count = static_cast<int64_t>(batch.samples.size());
  if (!count) {  // a kernel takes its dtype from the first sample
    std::memset(total, 0, static_cast<size_t>(batch.inputs * batch.outputs) * total_item_size);
    return;
  }
  const int64_t per_row = blocks(batch.inputs), tasks = blocks(batch.outputs) * per_row;
  std::vector<double> partials(static_cast<size_t>(count * tasks));
  parallel_for(tasks, count > 0, [&](int64_t task) {
    const LinearBlock block = block_at(batch, batch.outputs, batch.inputs, task / per_row, task % per_row);
    kernel.weight_grad(batch.samples.data(), count, block, scratch(), total, partials.data() + task, tasks);
  });
  std::vector<int64_t> suspicious;
  for (int64_t b = 0; b < count; ++b) {
    out[b] = 0;
    for (int64_t task = 0; task < tasks; ++task) out[b] += partials[b * tasks + task];
    const bool fine = std::isfinite(out[b]) && out[b] >= safe_sum(batch, batch.samples[b].in_float64);
    if (batch.samples[b].tokens && tasks && !fine) suspicious.push_back(b);
  }
  redo(batch, suspicious, out);
}

// Of any strides and dtypes; kRedo takes what is in out, made of float32 sums.
bool on_device(const TensorView& x, const TensorView& grad, Offsets offsets, LinearMethod method, const TensorView& out,
               const TensorView* total) {
#if defined(LIPCORE_WITH_CUDA)
  const bool packed = offsets.begin != nullptr;
  const int token = packed ? 0 : 1;
  const int64_t tokens = x.shape[token], inputs = x.shape[token + 1], outputs = grad.shape[token + 1];
  const auto factor = [&](const TensorView& view) {
    return cuda::Factor{
        view.data, view.dtype, packed ? 0 : view.strides[0], view.strides[token + 1], {0, 0, view.strides[token]}};
  };
  const LinearMethod chosen = method == LinearMethod::kChoose ? linear_method(tokens, inputs, outputs, false) : method;
  cuda::WeightNorms norms{
      {1, inputs, outputs, {1, 1, tokens}, {1, 1, tokens}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
      factor(x),
      factor(grad),
      packed ? offsets.samples : x.shape[0],
      offsets.begin,
      !packed && !total && chosen == LinearMethod::kGram,
      total ? total->data : nullptr,
      total ? total->strides[0] : 0,
      false};
  auto* to = static_cast<double*>(out.data);
  return method == LinearMethod::kRedo ? cuda::redo_weight_norms(norms, x.device, to)
                                       : cuda::weight_norms(norms, x.device, to);
#else
  (void)x, (void)grad, (void)offsets, (void)method, (void)out, (void)total;
  return refuse_device("x");
#endif
}

}  // namespace

LinearMethod linear_method(int64_t tokens, int64_t inputs, int64_t outputs, bool on_cpu) {
  return gram_is_cheaper(tokens, inputs, outputs, on_cpu) ? LinearMethod::kGram : LinearMethod::kDirect;
}

bool linear_norms(const TensorView& x, const TensorView& grad, Offsets offsets, LinearMethod method,
                  const TensorView& out, const TensorView* total) {
  const bool packed = offsets.begin != nullptr;
  const int last = packed ? 1 : 2;
  const auto samples = packed ? offsets.samples : x.shape[0];
  for (int side = 0; side < 2; ++side) {
    const TensorView& view = side ? grad : x;
    const char* name = side ? "grad" : "x";
    if (!view.same_device(x)) return fail({name}, "is on another device than x; put both on one");
    if (view.ndim != last + 1) return fail({name}, "expected %d dimensions, got %s", last + 1, ShapeText(view).text);
    if (view.on_cpu() && view.shape[last] > 1 && view.strides[last] != 1)
      return fail({name}, "expected a contiguous last dimension; pass a contiguous tensor");
  }
  for (int d = 0; d < last; ++d)
    if (x.shape[d] != grad.shape[d])
      return fail({"grad"}, "expected the samples and tokens of x, %s, got %s", ShapeText(x).text,
                  ShapeText(grad).text);
  if (x.on_cpu() && x.dtype != grad.dtype) return fail({"grad"}, "expected the dtype of x, %s", dtype_name(x.dtype));
  if (out.dtype != DType::kFloat64 || out.ndim != 1 || out.shape[0] != samples || !out.same_device(x))
    return fail({"out"}, "expected float64 [%lld] on the device of x, got %s", static_cast<long long>(samples),
                ShapeText(out).text);
  const bool wide = x.dtype == DType::kFloat64 || grad.dtype == DType::kFloat64;
  if (total && (total->ndim != 2 || total->shape[0] != grad.shape[last] || total->shape[1] != x.shape[last] ||
                !total->same_device(x) || total->dtype != (wide ? DType::kFloat64 : DType::kFloat32) ||
                (total->numel && total->shape[1] > 1 && total->strides[1] != 1)))
    return fail({"total"}, "expected a contiguous %s tensor [outputs, inputs], got %s", wide ? "float64" : "float32",
                ShapeText(*total).text);
  if (!x.on_cpu()) return on_device(x, grad, offsets, method, out, total);
  if (method == LinearMethod::kRedo) return fail({"method"}, "redoes what was made on a CUDA device");
  Batch batch{x.shape[last], grad.shape[last], {}};
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t first = packed ? offsets.begin[b] : b;
    batch.samples.push_back({x.at(first * x.strides[0]), grad.at(first * grad.strides[0]),
                             packed ? offsets.begin[b + 1] - first : x.shape[1], x.strides[last - 1],
                             grad.strides[last - 1], x.dtype, wide, 1, 1});
  }
  PyThreadState* state = x.numel + grad.numel >= kSerialElements ? PyEval_SaveThread() : nullptr;
  if (total) {
    weight_grad(batch, total->data, static_cast<size_t>(item_size(total->dtype)), static_cast<double*>(out.data));
  } else {
    norms(batch, method, static_cast<double*>(out.data));
  }
  if (state) PyEval_RestoreThread(state);
  return true;
}

}  // namespace lipcore
