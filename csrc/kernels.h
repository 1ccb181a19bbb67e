// The kernel inventory. One struct of function pointers per CPU instruction set; cuda/launch.h has the CUDA twins.
// A kernel sees flat runs of memory: shapes, strides, threads and errors are dealt with above it (csrc/ops).
#pragma once

#include <cstdint>

#include "math/conv_shape.h"
#include "math/dtype.h"
#include "math/gram_sums.h"
#include "math/sketch.h"
#include "math/tensor_stats.h"
#include "math/trajectory.h"
#include "math/update.h"

namespace lipcore {

// Work is cut into runs of at most this many elements. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kChunk = 65536;

struct TrajectoryChunk {
  const void* w;    // the parameter
  void* w_prev;     // in the parameter's dtype: lossless; overwritten with w
  void* deviation;  // w_prev - mean of the points so far: float32 (float64 for a float64 parameter); updated
  void* m2;         // per element, in the deviation's type: sum of squared deviations; updated. May be null
  int64_t count;
  DType dtype;
  bool restart;  // the first step of a block: nothing lies before w_prev
  double share;  // of the points before in the mean, see share_before()
};

struct SketchRun {
  const void* w;        // consecutive elements of a parameter
  int64_t first_index;  // global index of the first, >= 0
  int64_t count;
  DType dtype;
  uint64_t key;     // sketch_key(seed)
  int64_t buckets;  // a power of two, kMinBuckets ... kMaxBuckets
};

struct UpdateScalars {  // of update_of(), see math/update.h
  double rate, mix, decay, first_scale, second_scale, eps;
};

struct UpdateChunk {
  const void* w;      // the parameter after the step
  const void* first;  // the optimizer's tensors, of any dtype; null where the form reads none
  const void* second;
  const void* gradient;  // null where they are not asked for
  const void* previous;  // the parameter before the step
  DType dtype, first_dtype, second_dtype, gradient_dtype, previous_dtype;
  int64_t count;
  UpdateForm form;
  UpdateScalars scalars;
};

// What fills a vector: outputs of one group, groups of some samples, or pairs of pixels.
enum class ConvMethod { kDirect, kLanes, kGram };

struct ConvSample {
  const void *x, *grad;  // inputs and output gradients of one sample
  DType x_dtype, grad_dtype;
  int64_t x_stride[4], grad_stride[4];  // in elements: channel, depth, height, width
  int64_t x_step, grad_step;            // to the next sample, in elements
  bool in_float64;                      // always where one of them is float64
  double x_scale, grad_scale;           // powers of two that the elements are multiplied with; in float64 only
};

struct SampleNormsKernels {
  double (*sum_squares)(const void* x, DType dtype, int64_t count);       // in float64
  int64_t (*count_nonfinite)(const void* x, DType dtype, int64_t count);  // NaN or infinite
};

struct TrajectoryStepKernels {
  void (*chunk)(const TrajectoryChunk& chunk, StepSums* sums);
};

struct SketchKernels {
  double (*add)(const SketchRun& run, double* buckets);  // adds the run to its buckets; returns sum w^2
};

struct UpdateSumsKernels {
  void (*chunk)(const UpdateChunk& chunk, UpdateSums* sums);  // writes all but nonfinite and m2_increment
  int64_t (*count_nonfinite)(const UpdateChunk& chunk);       // elements whose parameter or update is not finite
};

struct LinearSample {                     // the tokens of one sample at a Linear layer
  const void *x, *grad;                   // rows of inputs and outputs elements, each row contiguous
  int64_t tokens, x_stride, grad_stride;  // strides between tokens, in elements
  DType dtype;                            // of both
  bool in_float64;                        // always for float64
  double x_scale, grad_scale;             // powers of two that the elements are multiplied with; in float64 only
};

struct LinearBlock {
  int64_t row, rows, column, columns;  // of the weight gradient [outputs, inputs], or of the Gram matrix of tokens
  int64_t inputs, outputs;
};

struct LinearNormsKernels {
  int64_t block;    // rows and columns of a LinearBlock at most
  int64_t scratch;  // bytes that a call needs
  double (*direct)(const LinearSample& sample, const LinearBlock& block, void* scratch);  // sum of squares
  void (*gram)(const LinearSample& sample, const LinearBlock& block, void* scratch, GramSums* sums);
  // out [outputs, inputs] in float32 (float64 when the samples are) and norms[b * norms_stride]: of the block
  void (*weight_grad)(const LinearSample* samples, int64_t count, const LinearBlock& block, void* scratch, void* out,
                      double* norms, int64_t norms_stride);
  double (*largest)(const void* rows, DType dtype, int64_t stride, int64_t count, int64_t length);  // |element|, or NaN
};

// A block of a sample's rows: columns are summed over rows, for g itself (shift) and for g * x (scale).
struct RowSumBlock {
  const void* g;
  const void* x;  // of g's dtype; null when only the shift is wanted
  DType dtype;
  int64_t rows, columns;  // columns <= kRowSumColumns
  // In elements; columns follow each other when row_runs is set (then g_step, x_step lead from row to row), else rows
  // do (then they lead from column to column).
  int64_t g_step, x_step;
  bool row_runs;
};
constexpr int kRowSumColumns = 1024;

struct RowStatistics {
  double mean, factor;
};

struct RowSumNormsKernels {
  // Adds to the sums of kRowSumColumns columns; either may be null.
  void (*add)(const RowSumBlock& block, double* shift, double* scale);
  // Of each row of a norm layer's input (x, x_step): its mean, 0 where it is not to be centred, and 1 / sqrt(the mean
  // square about it + eps); `columns` may be any number.
  void (*statistics)(const RowSumBlock& block, double eps, bool center, RowStatistics* rows);
  // out[r][i] = (x[r][i] - mean) factor, as float32, or float64 for float64; out has rows of `columns`.
  void (*normalize)(const RowSumBlock& block, const RowStatistics* rows, void* out);
};

struct TensorStatsKernels {
  // Writes the statistics of at most kChunk elements and adds these to the histogram, kTensorBins counts.
  void (*chunk)(const void* x, DType dtype, int64_t count, TensorStats* stats, uint32_t* bins);
};

constexpr int kCrossTokens = 8, kCrossLanes = 16;

struct TokenSumsKernels {
  void (*add_row)(const void* row, DType dtype, int64_t count, double weight, double* sums);  // sums += weight * row
  // sum_{j,d} e[j][d] sum_s c[s][j] a[s][d], c [rows][kCrossTokens], a [rows][kCrossLanes], e [kCrossTokens] rows of
  // kCrossLanes, e_step apart. `narrow`: c and a were widened from float32 or less.
  double (*cross)(const double* c, const double* a, int64_t rows, const double* e, int64_t e_step, bool narrow);
};

struct ConvNormsKernels {
  int64_t lanes;      // of a float32 vector: units that lanes_direct() takes, half as many in float64
  int64_t tile_rows;  // rows of the weight gradient [inputs x kernel, outputs] that are worked on together, at most
  // Bytes that a call needs, on a 64-byte boundary.
  int64_t (*scratch)(const ConvShape& shape, bool in_float64, ConvMethod method);
  // Sum of squares of the weight gradient of one sample; of part `part` of its rows, where they are cut in parts.
  double (*direct)(const ConvShape& shape, const ConvSample& sample, int64_t part, int64_t parts, void* scratch);
  // sums[u], of units [first, first + count) of all samples from `sample` on: of group u % groups of sample u / groups.
  void (*lanes_direct)(const ConvShape& shape, const ConvSample& sample, int64_t first, int64_t count, void* scratch,
                       double* sums);
  // The same as direct by the Gram matrices of pixels and gradients. Rounding errors are relative to *bound, the sum of
  // |patch_t|^2 |grad_t|^2 and what float32 may have lost.
  double (*gram)(const ConvShape& shape, const ConvSample& sample, void* scratch, double* bound);
};

// The list of families: X(type of the table, its name, which is also that of its file in csrc/cpu). The declarations of
// every instruction set and its row in csrc/dispatch.cpp follow from it.
#define LIPCORE_KERNELS(X)                  \
  X(SampleNormsKernels, sample_norms)       \
  X(TrajectoryStepKernels, trajectory_step) \
  X(SketchKernels, sketch)                  \
  X(UpdateSumsKernels, update_sums)         \
  X(LinearNormsKernels, linear_norms)       \
  X(RowSumNormsKernels, row_sum_norms)      \
  X(TensorStatsKernels, tensor_stats)       \
  X(TokenSumsKernels, token_sums)           \
  X(ConvNormsKernels, conv_norms)

struct Kernels {
  const char* name;  // "base", "avx2" or "avx512"
#define LIPCORE_MEMBER_OF_TABLE(type, family) const type* family;
  LIPCORE_KERNELS(LIPCORE_MEMBER_OF_TABLE)
#undef LIPCORE_MEMBER_OF_TABLE
};

// The table in use: the best one this CPU runs, or the one LIPCORE_ISA names.
const Kernels& kernels();

// Selects by name; null on success, else what is wrong with the name (static storage, lists the choices).
const char* select_isa(const char* name);

// Reads LIPCORE_ISA; called once when the module is loaded. Same result as select_isa.
const char* select_isa_from_environment();

}  // namespace lipcore
