// Norms of sums over a sample's rows, of g and of g * x, in one reading of both. Products and sums are float64: sums
// over a sequence cancel, and float32 partial sums would lose what is left. Rows are cut into pieces by their number
// alone; every piece's sums are added up in order. Where float64 overflowed on the way, a sample is taken again with
// both factors scaled by powers of two. Error <= 1e-13 of the terms' absolute sum, relative.
#include "cuda/common.cuh"
#include "cuda/packed_rows.cuh"
#include "cuda/quads.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

// A block's piece where columns are neighbours in memory: each warp takes every eighth row, each lane four columns.
constexpr int64_t kPieceRows = 128, kPieceColumns = kQuad * kWarp;
// And where rows are neighbours: each warp takes a column, its lanes four rows in turn.
constexpr int64_t kRunRows = 4096, kRunColumns = kWarps;

struct Work {
  RowSums sums;
  bool runs;         // rows are neighbours, not columns
  bool quads;        // four neighbours of g, and of x, can be read at once
  int64_t per_row;   // pieces of a sample's rows; 0 where they are packed
  int64_t pieces;    // of all samples' rows
  int64_t per_side;  // blocks of columns
};

int64_t cut(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

// A run of rows of one sample, and where its sums go.
struct Piece {
  int64_t sample, rows;
  int64_t first;  // its first row; of packed rows counted from the first of all
};

// Pieces of packed rows begin at each sample's first row, and their number is known to the device alone. Sample b has
// places from offsets[b] / kPieceRows + b on, which is room enough; some of them stay empty.
__device__ __forceinline__ int64_t first_place(int64_t first_row, int64_t sample) {
  return first_row / kPieceRows + sample;
}

__device__ Piece packed_piece(const RowSums& sums, int64_t place) {
  int64_t low = 0, high = sums.samples - 1;  // the last sample whose places begin here or before
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (first_place(sums.offsets[middle], middle) <= place)
      low = middle;
    else
      high = middle - 1;
  }
  const RowRange rows = rows_of_sample(low, sums.rows, sums.offsets);
  const int64_t begin = (place - first_place(rows.first, low)) * kPieceRows, left = rows.count - begin;
  if (begin < 0 || left <= 0) return {low, 0, 0};
  return {low, left < kPieceRows ? left : kPieceRows, rows.first + begin};
}

__device__ __forceinline__ Piece piece_at(const Work& work, int64_t place) {
  if (work.sums.offsets) return packed_piece(work.sums, place);
  const int64_t sample = place / work.per_row, size = work.runs ? kRunRows : kPieceRows;
  const int64_t begin = (place - sample * work.per_row) * size, left = work.sums.rows - begin;
  return {sample, left < size ? left : size, begin};
}

template <class T>
__device__ __forceinline__ const T* element_at(const void* data, const int64_t (&strides)[3], const RowSums& sums,
                                               int64_t sample, int64_t row, int64_t column) {
  return static_cast<const T*>(data) +
         ((sums.offsets ? 0 : sample * strides[0]) + row * strides[1] + column * strides[2]);
}

struct Sums {
  double shift[kQuad], scale[kQuad];
};

template <class E, bool kShift, bool kScale, bool kQuads>
__device__ __forceinline__ void add_quad(const typename E::Stored* g, const typename E::Stored* x, int64_t g_step,
                                         int64_t x_step, int64_t count, Sums* sums) {
  typename E::Work of_g[kQuad], of_x[kQuad];
  load_quad<E, kQuads>(g, g_step, count, of_g);
  if constexpr (kScale) load_quad<E, kQuads>(x, x_step, count, of_x);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if constexpr (kShift) sums->shift[k] += static_cast<double>(of_g[k]);
    if constexpr (kScale) sums->scale[k] = add_product(sums->scale[k], of_g[k], of_x[k]);
  }
}

// This thread's share of a piece: four columns of every eighth row, or four rows in turn of its warp's column.
template <class E, bool kShift, bool kScale, bool kQuads>
__device__ __forceinline__ Sums add_up(const Work& work, const Piece& piece, int64_t column) {
  using Stored = typename E::Stored;
  const RowSums& sums = work.sums;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t mine = column + (work.runs ? warp : kQuad * lane);
  Sums found{};
  if (mine >= sums.columns) return found;
  const Stored* g = element_at<Stored>(sums.g, sums.g_strides, sums, piece.sample, piece.first, mine);
  const Stored* x =
      kScale ? element_at<Stored>(sums.x, sums.x_strides, sums, piece.sample, piece.first, mine) : nullptr;
  if (work.runs) {
    for (int64_t row = kQuad * lane; row < piece.rows; row += kQuad * kWarp)
      add_quad<E, kShift, kScale, kQuads>(g + row * sums.g_strides[1], kScale ? x + row * sums.x_strides[1] : nullptr,
                                          sums.g_strides[1], sums.x_strides[1], piece.rows - row, &found);
  } else {
    const int64_t count = sums.columns - mine;
#pragma unroll 2
    for (int64_t row = warp; row < piece.rows; row += kWarps)
      add_quad<E, kShift, kScale, kQuads>(g + row * sums.g_strides[1], kScale ? x + row * sums.x_strides[1] : nullptr,
                                          sums.g_strides[2], sums.x_strides[2], count, &found);
  }
  return found;
}

// The power of two that brings the largest finite element of a sample below 1.
__device__ int exponent_of(const void* data, const int64_t (&strides)[3], const RowSums& sums, int64_t sample,
                           RowRange rows, Block team) {
  double largest = 0;
  for (int64_t row = 0; row < rows.count; ++row)
    for (int64_t column = threadIdx.x; column < sums.columns; column += kThreads) {
      const double x = fabs(*element_at<double>(data, strides, sums, sample, rows.first + row, column));
      if (isfinite(x)) largest = Larger{}(largest, x);
    }
  largest = team.max(largest);
  const int exponent = largest > 0 ? ilogb(largest) + 1 : 0;
  return exponent > -1000 ? exponent : -1000;  // its opposite must be a power of two as well
}

// The sum of squares of a sample of float64, with scaled factors: what is not finite then was not in the input, or is
// too large. Rare, so plain. Called by all threads of the block.
__device__ double scaled_squares(const RowSums& sums, bool scale, int64_t sample, Block team) {
  const RowRange rows = rows_of_sample(sample, sums.rows, sums.offsets);
  const int of_g = exponent_of(sums.g, sums.g_strides, sums, sample, rows, team);
  const int of_x = scale ? exponent_of(sums.x, sums.x_strides, sums, sample, rows, team) : 0;
  double squares = 0;
  for (int64_t column = threadIdx.x; column < sums.columns; column += kThreads) {
    double total = 0;
    for (int64_t row = 0; row < rows.count; ++row) {
      double term = ldexp(*element_at<double>(sums.g, sums.g_strides, sums, sample, rows.first + row, column), -of_g);
      if (scale)
        term *= ldexp(*element_at<double>(sums.x, sums.x_strides, sums, sample, rows.first + row, column), -of_x);
      total += term;
    }
    squares = add_product(squares, total, total);
  }
  return ldexp(team.sum(squares), 2 * (of_g + of_x));
}

// Writes a sample's norm from the squares that the threads of the block have summed up.
__device__ __forceinline__ void finish(const RowSums& sums, bool scale, int64_t sample, double squares, bool valid,
                                       Block team, double* out) {
  squares = team.sum(squares);
  if (sums.dtype == DType::kFloat64 && !isfinite(squares)) squares = scaled_squares(sums, scale, sample, team);
  if (threadIdx.x == 0) out[(scale ? 0 : sums.scale) * sums.samples + sample] = valid ? squares : nan("");
}

// A block per piece and block of columns. What is one piece and one block of columns is finished here; the sums of the
// others go to partials, [piece, term, column].
template <bool kShift, bool kScale>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_rows(const __grid_constant__ Work work, double* partials, double* out) {
  constexpr int kTerms = kShift + kScale;
  __shared__ double by_warp[kTerms][kWarps][kPieceColumns];
  __shared__ Block::Storage storage;
  const RowSums& sums = work.sums;
  const Lanes<kWarp> warp_team;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const bool whole = work.per_row == 1 && work.per_side == 1;
  for (int64_t task = blockIdx.x; task < work.pieces * work.per_side; task += gridDim.x) {
    const int64_t place = task / work.per_side, side = task - place * work.per_side;
    const int64_t column = side * (work.runs ? kRunColumns : kPieceColumns);
    const Piece piece = piece_at(work, place);
    if (!piece.rows) continue;  // of packed rows
    Sums found{};
    with_dtype(sums.dtype, [&](auto element) {
      using E = decltype(element);
      found = work.quads ? add_up<E, kShift, kScale, true>(work, piece, column)
                         : add_up<E, kShift, kScale, false>(work, piece, column);
    });
    if (work.runs) {
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const double (&quad)[kQuad] = kScale && term == 0 ? found.scale : found.shift;
        const double total = warp_team.sum((quad[0] + quad[1]) + (quad[2] + quad[3]));
        if (lane == 0) by_warp[term][0][warp] = total;
      }
    } else {
#pragma unroll
      for (int term = 0; term < kTerms; ++term)
#pragma unroll
        for (int k = 0; k < kQuad; ++k)
          by_warp[term][warp][kQuad * lane + k] = (kScale && term == 0 ? found.scale : found.shift)[k];
    }
    __syncthreads();
    const int64_t most = work.runs ? kRunColumns : kPieceColumns, left = sums.columns - column;
    const int64_t columns = left < most ? left : most;
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      double squares = 0;
      if (static_cast<int64_t>(threadIdx.x) < columns) {
        double total = by_warp[term][0][threadIdx.x];
        if (!work.runs)
          for (int k = 1; k < kWarps; ++k) total += by_warp[term][k][threadIdx.x];
        if (whole)
          squares = total * total;
        else
          partials[(place * kTerms + term) * sums.columns + column + threadIdx.x] = total;
      }
      if (whole) finish(sums, kScale && term == 0, piece.sample, squares, true, Block{&storage}, out);
    }
    __syncthreads();  // the sums' memory is used again
  }
}

// A block per sample.
template <bool kShift, bool kScale>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    finish_sums(const __grid_constant__ Work work, const double* partials, double* out) {
  constexpr int kTerms = kShift + kScale;
  __shared__ Block::Storage storage;
  const RowSums& sums = work.sums;
  const Block team{&storage};
  const bool valid = offsets_ascend(sums.samples, sums.rows, sums.offsets, team);
  for (int64_t sample = blockIdx.x; sample < sums.samples; sample += gridDim.x) {
    const RowRange rows = rows_of_sample(sample, sums.rows, sums.offsets);
    const int64_t size = work.runs ? kRunRows : kPieceRows;
    const int64_t first = sums.offsets ? first_place(rows.first, sample) : sample * work.per_row;
    const int64_t count = valid ? (rows.count + size - 1) / size : 0;
    for (int term = 0; term < kTerms; ++term) {
      double squares = 0;
      for (int64_t column = threadIdx.x; column < sums.columns; column += kThreads) {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += partials[((first + i) * kTerms + term) * sums.columns + column];
        squares = add_product(squares, total, total);
      }
      finish(sums, kScale && term == 0, sample, squares, valid, team, out);
    }
  }
}

bool reads_quads(const void* data, const int64_t (&strides)[3], const RowSums& sums, int along) {
  return cuda::reads_quads(data, sums.dtype, strides[along], strides[along == 1 ? 2 : 1],
                           sums.offsets || sums.samples == 1 ? 0 : strides[0]);
}

Work work_of(const RowSums& sums) {
  Work work{sums, false, false, 0, 0, 0};
  // Packed rows are never taken as runs: their first one need not be aligned, nor are they long.
  const auto runs = [&](const int64_t (&strides)[3]) { return strides[1] == 1 && strides[2] != 1; };
  work.runs = !sums.offsets && sums.columns > 1 && runs(sums.g_strides) && (!sums.x || runs(sums.x_strides));
  work.runs = work.runs ||
              (!sums.offsets && sums.columns == 1 && sums.g_strides[1] == 1 && (!sums.x || sums.x_strides[1] == 1));
  const int along = work.runs ? 1 : 2;
  work.quads =
      reads_quads(sums.g, sums.g_strides, sums, along) && (!sums.x || reads_quads(sums.x, sums.x_strides, sums, along));
  work.per_row = sums.offsets ? 0 : cut(sums.rows, work.runs ? kRunRows : kPieceRows);
  work.pieces = sums.offsets ? sums.rows / kPieceRows + sums.samples : sums.samples * work.per_row;
  work.per_side = cut(sums.columns, work.runs ? kRunColumns : kPieceColumns);
  return work;
}

template <bool kShift, bool kScale>
Status run(const Work& work, double* out, double* partials, void* stream) {
  const char* doing = "summing up rows";
  const int64_t tasks = work.pieces * work.per_side;
  if (tasks > 0) {
    const int64_t blocks = blocks_for(tasks);
    const Status status = launch(doing, &sum_rows<kShift, kScale>, blocks, stream, work, partials, out);
    if (status.code || (work.per_row == 1 && work.per_side == 1)) return status;
  }
  const double* sums = partials;
  return launch("adding up sums of rows", &finish_sums<kShift, kScale>, blocks_for(work.sums.samples), stream, work,
                sums, out);
}

}  // namespace

int64_t row_sum_norms_scratch(const RowSums& sums) {
  const Work work = work_of(sums);
  if (work.per_row == 1 && work.per_side == 1) return 0;
  return work.pieces * (sums.shift + sums.scale) * sums.columns;
}

Status row_sum_norms(const RowSums& sums, double* out, double* scratch, void* stream) {
  if (!sums.samples) return {0, ""};
  const Work work = work_of(sums);
  if (sums.shift && sums.scale) return run<true, true>(work, out, scratch, stream);
  return sums.shift ? run<true, false>(work, out, scratch, stream) : run<false, true>(work, out, scratch, stream);
}

}  // namespace lipcore::cuda
