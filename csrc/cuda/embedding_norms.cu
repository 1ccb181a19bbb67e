// Norms of gradients of embeddings: rows of equal tokens of a sample are added up before they are squared. Tokens come
// sorted, so that these rows are runs; each is summed in float64 in the order of its rows by one warp per strip of
// columns, which leaves its sum of squares at its first row's place. Where float64 overflowed on the way, a sample is
// taken again with scaled factors. Error <= 1e-13 of the rows' absolute sums, relative.
#include "cuda/common.cuh"
#include "cuda/packed_rows.cuh"
#include "cuda/quads.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

constexpr int64_t kStrip = kQuad * kWarp;  // columns that a warp works on

struct Work {
  EmbeddingNorms norms;
  int64_t rows, strips;
  int64_t padding;
  bool padded, quads;
};

// The rows of a sample, counted from the first of all.
__device__ __forceinline__ RowRange range_of(const Work& work, int64_t sample) {
  const EmbeddingNorms& norms = work.norms;
  if (norms.offsets) return rows_of_sample(sample, work.rows, norms.offsets);
  return {sample * norms.length, norms.length};
}

__device__ int64_t sample_of(const Work& work, int64_t row) {
  const EmbeddingNorms& norms = work.norms;
  if (!norms.offsets) return row / norms.length;
  int64_t low = 0, high = norms.samples - 1;  // the last sample that begins here or before
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (norms.offsets[middle] <= row)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Places [first, last) of the sorted tokens, of one token of one sample; none where `place` is not the first of them.
struct Run {
  int64_t first, last;
};

__device__ Run run_at(const Work& work, int64_t place, RowRange rows) {
  const EmbeddingNorms& norms = work.norms;
  const int64_t token = norms.tokens[place];
  if (work.padded && token == work.padding) return {place, place};
  if (place > 0 && norms.tokens[place - 1] == token && norms.rows[place - 1] >= rows.first) return {place, place};
  int64_t last = place + 1;
  while (last < work.rows && norms.tokens[last] == token && norms.rows[last] < rows.first + rows.count) ++last;
  return {place, last};
}

template <class T>
__device__ __forceinline__ const T* element_at(const Work& work, int64_t sample, int64_t row, int64_t column) {
  const EmbeddingNorms& norms = work.norms;
  const int64_t before = norms.offsets ? row * norms.strides[1]
                                       : sample * norms.strides[0] + (row - sample * norms.length) * norms.strides[1];
  return static_cast<const T*>(norms.grad) + before + column * norms.strides[2];
}

// The squares of this thread's four columns, from `column` on.
template <class E, bool kQuads>
__device__ __forceinline__ double run_squares(const Work& work, int64_t sample, const Run& run, int64_t column) {
  const EmbeddingNorms& norms = work.norms;
  if (column >= norms.columns) return 0;
  double sums[kQuad] = {};
  for (int64_t place = run.first; place < run.last; ++place) {
    const int64_t row = norms.rows[place];
    typename E::Work of_row[kQuad];
    load_quad<E, kQuads>(element_at<typename E::Stored>(work, sample, row, column), norms.strides[2],
                         norms.columns - column, of_row);
    const double weight = norms.weights ? norms.weights[row] : 1;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) sums[k] = add_product(sums[k], static_cast<double>(of_row[k]), weight);
  }
  double squares = 0;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) squares = add_product(squares, sums[k], sums[k]);
  return squares;
}

// A warp per place and strip.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_runs(const __grid_constant__ Work work, double* partials) {
  const Lanes<kWarp> team;
  const int64_t tasks = work.rows * work.strips;
  for (int64_t task = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / kWarp; task < tasks;
       task += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t place = task / work.strips, strip = task - place * work.strips;
    const int64_t row = work.norms.rows[place], sample = sample_of(work, row);
    const Run run = run_at(work, place, range_of(work, sample));
    double squares = 0;
    if (run.first < run.last) {
      const int64_t column = strip * kStrip + kQuad * team.rank();
      with_dtype(work.norms.dtype, [&](auto element) {
        using E = decltype(element);
        squares = work.quads ? run_squares<E, true>(work, sample, run, column)
                             : run_squares<E, false>(work, sample, run, column);
      });
    }
    squares = team.sum(squares);
    if (team.rank() == 0) partials[row * work.strips + strip] = squares;
  }
}

__device__ __forceinline__ int exponent_of(double largest) {
  const int exponent = largest > 0 ? ilogb(largest) + 1 : 0;
  return exponent > -1000 ? exponent : -1000;  // its opposite must be a power of two as well
}

__device__ __forceinline__ double finite_size(double x) { return isfinite(x) ? fabs(x) : 0; }

// A sample's sum of squares with scaled factors: what is not finite then was not in the input, or is too large. Rare,
// so plain. Called by all threads of the block.
__device__ double scaled_squares(const Work& work, int64_t sample, Block team) {
  const EmbeddingNorms& norms = work.norms;
  const RowRange rows = range_of(work, sample);
  double of_grad = 0, of_weights = 0;
  with_dtype(norms.dtype, [&](auto element) {
    using E = decltype(element);
    for (int64_t i = threadIdx.x; i < rows.count * norms.columns; i += kThreads) {
      const int64_t row = i / norms.columns;
      const auto* x = element_at<typename E::Stored>(work, sample, rows.first + row, i - row * norms.columns);
      of_grad = Larger{}(of_grad, finite_size(static_cast<double>(E::widen(*x))));
    }
  });
  if (norms.weights)
    for (int64_t i = threadIdx.x; i < rows.count; i += kThreads)
      of_weights = Larger{}(of_weights, finite_size(norms.weights[rows.first + i]));
  const int grad_exponent = exponent_of(team.max(of_grad));
  const int weight_exponent = norms.weights ? exponent_of(team.max(of_weights)) : 0;
  double squares = 0;
  for (int64_t place = 0; place < work.rows; ++place) {
    if (norms.rows[place] < rows.first || norms.rows[place] >= rows.first + rows.count) continue;
    const Run run = run_at(work, place, rows);
    if (run.first == run.last) continue;
    for (int64_t column = threadIdx.x; column < norms.columns; column += kThreads) {
      double sum = 0;
      for (int64_t at = run.first; at < run.last; ++at) {
        const int64_t row = norms.rows[at];
        const double weight = norms.weights ? ldexp(norms.weights[row], -weight_exponent) : 1;
        with_dtype(norms.dtype, [&](auto element) {
          using E = decltype(element);
          const auto x = static_cast<double>(E::widen(*element_at<typename E::Stored>(work, sample, row, column)));
          sum = add_product(sum, ldexp(x, -grad_exponent), weight);
        });
      }
      squares = add_product(squares, sum, sum);
    }
  }
  return ldexp(team.sum(squares), 2 * (grad_exponent + weight_exponent));
}

// A block per sample.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    finish_runs(const __grid_constant__ Work work, const double* partials, double* out) {
  __shared__ Block::Storage storage;
  const EmbeddingNorms& norms = work.norms;
  const Block team{&storage};
  const bool valid = offsets_ascend(norms.samples, work.rows, norms.offsets, team);
  for (int64_t sample = blockIdx.x; sample < norms.samples; sample += gridDim.x) {
    const RowRange rows = range_of(work, sample);
    double squares = 0;
    for (int64_t i = threadIdx.x; i < rows.count * work.strips; i += kThreads)
      squares += partials[rows.first * work.strips + i];
    squares = team.sum(squares);
    if (!isfinite(squares) && (norms.dtype == DType::kFloat64 || norms.weights))
      squares = scaled_squares(work, sample, team);
    if (threadIdx.x == 0) out[sample] = valid ? squares : nan("");
  }
}

Work work_of(const EmbeddingNorms& norms) {
  Work work{norms, norms.offsets ? norms.length : norms.samples * norms.length, (norms.columns + kStrip - 1) / kStrip};
  work.padded = norms.padding != nullptr;
  work.padding = norms.padding ? *norms.padding : 0;
  work.quads = reads_quads(norms.grad, norms.dtype, norms.strides[2], norms.strides[1],
                           norms.offsets || norms.samples == 1 ? 0 : norms.strides[0]);
  return work;
}

}  // namespace

int64_t embedding_norms_scratch(const EmbeddingNorms& norms) {
  const Work work = work_of(norms);
  return work.rows * work.strips;
}

Status embedding_norms(const EmbeddingNorms& norms, double* out, double* scratch, void* stream) {
  if (!norms.samples) return {0, ""};
  const Work work = work_of(norms);
  const int64_t blocks = blocks_for((work.rows * work.strips + kWarps - 1) / kWarps);
  if (blocks > 0) {
    const Status status = launch("summing up rows of tokens", &sum_runs, blocks, stream, work, scratch);
    if (status.code) return status;
  }
  const double* partials = scratch;
  return launch("adding up tokens' squares", &finish_runs, blocks_for(norms.samples), stream, work, partials, out);
}

}  // namespace lipcore::cuda
