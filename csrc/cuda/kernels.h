// What the .cu files offer: plain data and pointers, no Python and no CUDA headers, so that either side compiles
// without the other's. Every pointer to memory is a device pointer unless it says host; a stream is a cudaStream_t.
// Nothing here allocates, synchronises or changes the current device.
#pragma once

#include <cstdint>
#include <vector>

#include "math/conv_shape.h"
#include "math/gram_sums.h"
#include "math/observed.h"
#include "math/tensor_stats.h"
#include "math/trajectory_row.h"
#include "math/update.h"
#include "ops/rows.h"
#include "ops/sketch_schedule.h"

namespace lipcore::cuda {

// One block of threads works on one chunk. A quarter of the CPU's: at 65536 a million parameters would keep 16 of a
// large GPU's 132 multiprocessors busy. Fixed, so that results do not depend on the GPU.
constexpr int64_t kCudaChunk = 16384;

// What a CUDA call said. code is a cudaError_t, 0 for success; doing completes "failed while ...".
struct Status {
  int code;
  const char* doing;
};

// ---- sample_norms

// How many float64 of scratch memory the call needs.
int64_t sample_norms_scratch(const Rows& rows);
Status sample_norms(const Rows& rows, double* out, double* scratch, void* stream);

// ---- row_sum_norms

// Rows of g, and of x where it is not null, whose columns are summed up per sample. Strides are in elements: from
// sample to sample, row to row, column to column.
struct RowSums {
  const void *g, *x;
  DType dtype;
  int64_t samples, rows, columns;  // rows of one sample, or with offsets of all together
  int64_t g_strides[3], x_strides[3];
  const int64_t* offsets;  // of packed rows, [samples + 1]; null: every sample has its own rows
  bool shift, scale;       // of which sums the norms are wanted: of g, of g * x
};

// How many float64 of scratch memory the call needs.
int64_t row_sum_norms_scratch(const RowSums& sums);
// out [samples], or where both are wanted [2, samples]: of the scale, then of the shift.
Status row_sum_norms(const RowSums& sums, double* out, double* scratch, void* stream);

// ---- weight_norms

// One side of a product over positions: strides in elements, from sample to sample, channel to channel, and along
// depth, height and width.
struct Factor {
  const void* data;
  DType dtype;
  int64_t sample, channel, along[3];
};

// Squared norms of sums over positions t of grad[o, t] * x[patch (i, tap), t]: of convolutions, and of Linear layers as
// convolutions with kernels of one element whose tokens lie along the width.
struct WeightNorms {
  ConvShape shape;
  Factor x, grad;
  int64_t samples;
  const int64_t* offsets;  // of packed tokens, [samples + 1], of shape.out[2] rows; null: samples of their own
  bool gram;               // by the Gram matrices of positions: not of packed tokens
  void* total;             // of a Linear the batch's gradient as well, directly: rows of inputs, one per output, in
  int64_t total_stride;    // float32, or in float64 if an input is; null: not wanted
  bool tensor_cores;       // has_tensor_cores() of the device: they multiply where both factors are of one 16-bit dtype
};

// Whether this build's kernels use them on the current device.
bool has_tensor_cores();

// Whether this build has kernels that the current device can run.
Status find_kernels();

// How many float64 of scratch memory the call needs.
int64_t weight_norms_scratch(const WeightNorms& norms);
Status weight_norms(const WeightNorms& norms, double* out, double* scratch, void* stream);

// Samples whose out[b], made elsewhere of float32 sums, left their range are made again in float64.
Status redo_weight_norms(const WeightNorms& norms, double* out, void* stream);

// ---- embedding_norms

struct EmbeddingNorms {
  const int64_t *tokens, *rows;  // tokens in ascending order, and the row of each: of equal ones in ascending order too
  const void* grad;
  DType dtype;
  int64_t strides[3];                // from sample to sample, row to row, column to column
  const double* weights;             // by row; may be null
  const int64_t* padding;            // host: the token that does not count; may be null
  int64_t samples, length, columns;  // rows of one sample, or with offsets of all together
  const int64_t* offsets;            // of packed rows, [samples + 1], or null
};

// How many float64 of scratch memory the call needs.
int64_t embedding_norms_scratch(const EmbeddingNorms& norms);
Status embedding_norms(const EmbeddingNorms& norms, double* out, double* scratch, void* stream);

// ---- trajectory_step

struct TensorEntry {
  const void* w;
  void* w_prev;
  void* deviation;
  void* m2;  // may be null
  int64_t count;
  int64_t first_chunk;  // of its row of chunks in the chunk table
  DType dtype;
};

struct ChunkEntry {
  int32_t tensor;
  int32_t index;  // elements from index * kCudaChunk on
};

struct StepTables {
  TensorEntry* tensors;
  ChunkEntry* chunks;
  StepSums* partials;  // per chunk
  StepSums* sums;      // per tensor: the result
  int64_t tensor_count, chunk_count;
  LedgerTables ledger;  // rows == null for the stateless form
};

// Writes the tensor table from host memory, which may be reused at once: the entries travel as kernel parameters. With
// lay_out, the chunk table too. That needs no pinned memory and no event, orders itself in the stream, and a captured
// graph carries its own copy.
Status upload_tensors(const StepTables& tables, const TensorEntry* host, bool lay_out, void* stream);

// One step into sums, by chunks and then by tensors in fixed order, and into the ledger if there is one. Restart and
// the share of the points before come from the ledger, or without one are false and `share`.
Status run_step(const StepTables& tables, double share, void* stream);

// One step of all tensors into the ledger, from sums that were made elsewhere.
Status observe_sums(const LedgerTables& ledger, const StepSums* sums, void* stream);

// ---- sketch

struct SketchTensor {
  const void* w;
  int64_t first_index;
  int64_t first_piece, last_piece;  // [first, last), all its own
  int64_t dtype;
};

struct SketchRow {
  int64_t first_place, last_place;  // of its tasks but the first
  int64_t empty;                    // 1: it has no task
};

struct SketchTables {
  SketchTensor* tensors;
  SketchPiece* pieces;
  SketchTask* tasks;
  SketchRow* row_table;
  SketchWeight* partials;  // per piece and slice
  double* private_;        // per place, `buckets` each
  int64_t* not_finite;     // per row: 1 once a NaN or infinite element was seen in this step; 0 between steps
  double* sketches;        // [rows, buckets]: the result
  SketchWeight* weights;   // per tensor: the result
  int64_t tensor_count, piece_count, task_count, place_count, rows, buckets, slices;
  uint64_t key;
};

// Into how many slices the buckets are cut, each of which fits into a block's shared memory.
int64_t sketch_slices(int64_t buckets);

// Elements per task: fixed by the sizes alone.
int64_t sketch_task_elements(int64_t total, int64_t buckets);

// Copies from host memory, which may be reused at once: the words travel as kernel parameters, see upload_tensors.
Status upload_words(const void* host, int64_t bytes, void* device, void* stream);

Status run_sketch(const SketchTables& tables, void* stream);

// ---- square_sums, update_sums, fold_means: sums of many tensors, chunk by chunk, then tensor by tensor. The tensors
// travel as kernel parameters, a few dozen per launch: nothing is kept of them between calls, so they may lie elsewhere
// in each, and a captured graph carries its own.

// Chunks of a tensor. An empty one has one too, which says that it is there.
LIPCORE_INLINE int64_t chunks_of(int64_t count) { return count > 0 ? (count + kCudaChunk - 1) / kCudaChunk : 1; }

// Where the chunks of a tensor are: written by its first one, for the launch that adds them up.
struct ChunkSpan {
  int64_t first, count;
  double elements;  // of the tensor, where a mean is made
};

struct SquareTensor {
  const void* x;
  int64_t count;
  int64_t first_chunk;  // those of the tensor before it are right before
  DType dtype;
};
struct SquarePartial {
  double square, nonfinite;
};
struct SquareTables {
  SquarePartial* partials;  // per chunk
  ChunkSpan* spans;         // per tensor
  StepSums* rows;           // per tensor: the result
};
Status square_sums(const SquareTables& tables, const std::vector<SquareTensor>& tensors, void* stream);

constexpr int kUpdateScalars = 6;  // of UpdateCoefficients, in its order
struct UpdateScalar {
  double value;
  const void* at;  // on the device; null where the value is known
  DType dtype;     // of what is there
};
struct UpdateTensor {
  const void *w, *first, *second;  // null where the form reads none
  const void *gradient, *previous;
  int64_t count;
  int64_t first_chunk;
  DType dtype, first_dtype, second_dtype, gradient_dtype, previous_dtype;
  UpdateForm form;
  bool has_momentum, has_gradient, has_previous;
  UpdateScalar scalars[kUpdateScalars];
};
struct UpdateTables {
  UpdateSums* partials;
  ChunkSpan* spans;
  StepSums* rows;   // the results
  double* squares;  // [kUpdateSquares, tensors]
};
Status update_sums(const UpdateTables& tables, const std::vector<UpdateTensor>& tensors, void* stream);

// Takes the squares of a step into the table [kRootRows, columns].
Status observe_squares(const double* squares, int64_t columns, double* table, void* stream);

struct FoldTensor {
  const void *last, *reference;  // of dtype
  const void* deviation;         // float32, or float64 for float64
  double* earlier;
  int64_t count;
  int64_t first_chunk;
  DType dtype;
};
struct FoldTables {
  double* partials;
  ChunkSpan* spans;
  const double* share;  // per tensor
  double* gap_sq;       // the result
};
Status fold_means(const FoldTables& tables, const std::vector<FoldTensor>& tensors, void* stream);

// ---- observe_rows

struct ObserveTables {
  ObservedRow* rows;      // per place
  int64_t* bins;          // [places, kBins]
  ObservedRow* partials;  // per place and chunk; null for one chunk
  int64_t chunks;         // of the values of a place
};
Status observe_rows(const ObservedTable& table, const ObserveTables& out, void* stream);
// ---- tensor_stats

struct StatsTensor {
  const void* x;  // dense
  int64_t count;
  int64_t first_chunk;  // of its run of partials
  int64_t place;        // its row of rows and bins; no other tensor's
  int64_t dtype;
};

struct StatsTables {
  StatsTensor* tensors;
  TensorStats* partials;  // per chunk
  TensorStats* rows;      // the result, added to
  int64_t* bins;          // [rows, kTensorBins], added to
  int64_t tensor_count, chunk_count;
};

Status run_tensor_stats(const StatsTables& tables, void* stream);

}  // namespace lipcore::cuda
