// Row norms. Every element is squared in float64 (a float32 square is exact there and neither overflows nor underflows,
// so a gradient of 1e-24 keeps its norm); float64 rows whose squares leave float64's range are scaled by a power of two
// first. Error <= 1e-13 relative. On devices that take 16 or more times as long in float64, eight 16-bit numbers are
// squared exactly and added in float32 where their squares fit, and only their sum is taken on in float64: error <=
// 1e-7. The order of additions depends on a row's length and dtype alone.
#include "cuda/common.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

// A row is summed by a team of threads: a few lanes, a warp or a block, by its length.
constexpr int64_t kLanesRow = 32;
constexpr int64_t kWarpRow = 2048;
// Outside, the sum of float64 squares has overflowed or lost digits to subnormals. A float32 square never gets there.
constexpr double kSmallestSum = 1e-280;
constexpr double kLargestSum = 1e300;
// Outside, a float32 sum of eight squares has overflowed or may have lost digits to subnormals.
constexpr float kSmallestGroup = 0x1p-80f, kLargestGroup = 0x1p120f;
constexpr int kSlowFloat64 = 16;  // float32 operations in the time of one in float64

// Rows of few elements, one behind the other, are read into shared memory, some of them at a time.
constexpr int64_t kStage = 16 << 10;

// A quotient and what is left, with the divisor's reciprocal at hand: a 64-bit division is a call of 70 instructions,
// around which registers spill. Exact for 0 <= a < 2^53: the product is off by less than one.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t divisor, double reciprocal, int64_t* rest) {
  auto quotient = static_cast<int64_t>(static_cast<double>(a) * reciprocal);
  *rest = a - quotient * divisor;
  if (*rest < 0) {
    *rest += divisor;
    --quotient;
  } else if (*rest >= divisor) {
    *rest -= divisor;
    ++quotient;
  }
  return quotient;
}

struct Work {
  Rows rows;
  int64_t per_row;  // chunks
  double per_row_reciprocal;
  double reciprocals[kRowDims];  // of the shape
  bool in_groups;                // 16-bit numbers are squared in float32
  int64_t staged;                // rows that a block takes at a time
};

__device__ __forceinline__ int64_t strided_offset(const Work& work, int64_t element) {
  int64_t offset = 0;
  for (int d = work.rows.ndim - 1; d > 0; --d) {
    int64_t index;
    element = divide(element, work.rows.shape[d], work.reciprocals[d], &index);
    offset += index * work.rows.strides[d];
  }
  return offset + element * work.rows.strides[0];
}

// Calls fold(elements) for this thread's share of elements [begin, begin + count) of a row: a pack for each thread in
// turn, then one element each. The same share whether the row is aligned, dense or strided.
template <class E, int kUnroll, bool kAligned, class Team, class Fold>
__device__ __forceinline__ void fold_dense(const typename E::Stored* x, int64_t count, Team team, const Fold& fold) {
  const int64_t packs = count / kLanes<E>;
#pragma unroll kUnroll
  for (int64_t i = team.rank(); i < packs; i += team.size()) {
    Pack<typename E::Stored, kLanes<E>> pack;
    load_pack<kAligned, Keep::kCached>(x + i * kLanes<E>, &pack);
    fold(pack.lane);
  }
  for (int64_t i = packs * kLanes<E> + team.rank(); i < count; i += team.size()) {
    const typename E::Stored one[1] = {x[i]};
    fold(one);
  }
}

template <class E, int kUnroll, class Team, class Fold>
__device__ __forceinline__ void fold_row(const Work& work, int64_t row, int64_t begin, int64_t count, Team team,
                                         const Fold& fold) {
  const Rows& rows = work.rows;
  const auto* x = reinterpret_cast<const typename E::Stored*>(rows.data) + row * rows.stride;
  if (!rows.dense) {
    const int64_t packs = count / kLanes<E>;
    for (int64_t i = team.rank(); i < packs; i += team.size()) {
      typename E::Stored pack[kLanes<E>];
      for (int k = 0; k < kLanes<E>; ++k) pack[k] = x[strided_offset(work, begin + i * kLanes<E> + k)];
      fold(pack);
    }
    for (int64_t i = packs * kLanes<E> + team.rank(); i < count; i += team.size()) {
      const typename E::Stored one[1] = {x[strided_offset(work, begin + i)]};
      fold(one);
    }
  } else if (is_aligned(x + begin)) {
    fold_dense<E, kUnroll, true>(x + begin, count, team, fold);
  } else {
    fold_dense<E, kUnroll, false>(x + begin, count, team, fold);
  }
}

// The sum of squares of eight 16-bit numbers in float32, in which each square is exact: the error is that of three
// additions, 1.8e-7. False where they do not fit.
template <class E>
__device__ __forceinline__ bool add_group(const typename E::Stored (&x)[8], double* sum) {
  float squares[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) squares[k] = E::widen(x[k]) * E::widen(x[k]);
#pragma unroll
  for (int distance = 1; distance < 8; distance *= 2)
#pragma unroll
    for (int k = 0; k < 8; k += 2 * distance) squares[k] += squares[k + distance];
  *sum += static_cast<double>(squares[0]);
  return squares[0] >= kSmallestGroup && squares[0] <= kLargestGroup;
}

// Whether all are zeros, of either sign.
template <int kCount>
__device__ __forceinline__ bool are_zeros(const uint16_t (&x)[kCount]) {
  unsigned any = 0;
#pragma unroll
  for (int k = 0; k < kCount; ++k) any |= x[k];
  return (any & 0x7fffu) == 0;
}

template <class E>
struct Squares {
  bool in_groups;
  double* sum;

  template <int kCount>
  __device__ __forceinline__ void operator()(const typename E::Stored (&x)[kCount]) const {
    if constexpr (sizeof(typename E::Stored) == 2 && kCount == 8) {
      if (in_groups) {
        double with = *sum;
        const bool fits = add_group<E>(x, &with);
        if (fits || are_zeros(x)) {
          if (fits) *sum = with;
          return;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) *sum = add_product(*sum, E::widen(x[k]), E::widen(x[k]));
  }
};

template <class E, class Team>
__device__ __forceinline__ double sum_squares(const Work& work, int64_t row, int64_t begin, int64_t count, Team team) {
  constexpr int kUnroll = Team::size() < 32 ? 1 : 4;  // short rows have nothing to unroll
  double sum = 0;
  fold_row<E, kUnroll>(work, row, begin, count, team, Squares<E>{work.in_groups, &sum});
  return team.sum(sum);
}

// The norm from the sum of squares of the whole row. Called by all threads of the team.
template <class E, class Team>
__device__ __forceinline__ double norm_of(const Work& work, int64_t row, double sum, Team team) {
  if constexpr (sizeof(typename E::Work) == 8) {
    if (!(sum >= kSmallestSum && sum <= kLargestSum)) {
      if (sum != sum) return sum;  // an element is NaN
      double largest = 0;
      fold_row<E, 1>(work, row, 0, work.rows.length, team, [&](const auto& elements) {
        for (const double x : elements) largest = Larger{}(largest, fabs(x));
      });
      largest = team.max(largest);
      if (largest == 0 || !isfinite(largest)) return largest;
      const int exponent = ilogb(largest);
      double scaled = 0;
      fold_row<E, 1>(work, row, 0, work.rows.length, team, [&](const auto& elements) {
        for (const double element : elements) {
          const double x = ldexp(element, -exponent);
          scaled = add_product(scaled, x, x);
        }
      });
      return ldexp(sqrt(team.sum(scaled)), exponent);
    }
  }
  return sqrt(sum);
}

// A team of lanes per row.
template <int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) lane_norms(const __grid_constant__ Work work, double* out) {
  const Lanes<kSize> team;
  const int64_t teams = kThreads / kSize;
  for (int64_t row = blockIdx.x * teams + threadIdx.x / kSize; row < work.rows.count; row += gridDim.x * teams) {
    with_dtype(work.rows.dtype, [&](auto element) {
      using E = decltype(element);
      const double norm = norm_of<E>(work, row, sum_squares<E>(work, row, 0, work.rows.length, team), team);
      if (team.rank() == 0) out[row] = norm;
    });
  }
}

// As lane_norms of four lanes, of dense rows one behind the other: a block reads some of them at once, neighbours by
// neighbours, however short they are.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) staged_norms(const __grid_constant__ Work work, double* out) {
  alignas(16) __shared__ unsigned char stage[kStage];
  const Lanes<4> team;
  const Rows& rows = work.rows;
  const auto thread = static_cast<int>(threadIdx.x);
  for (int64_t first = blockIdx.x * work.staged; first < rows.count; first += gridDim.x * work.staged) {
    const int64_t left = rows.count - first, count = left < work.staged ? left : work.staged;
    __syncthreads();  // what was there before has been read
    with_dtype(rows.dtype, [&](auto element) {
      using Stored = typename decltype(element)::Stored;
      const auto* from = reinterpret_cast<const Stored*>(rows.data) + first * rows.length;
      auto* to = reinterpret_cast<Stored*>(stage);
      constexpr int kPack = kLanes<decltype(element)>;
      const auto packs = static_cast<int>(is_aligned(from) ? count * rows.length / kPack : 0);
      for (int i = thread; i < packs; i += kThreads)
        reinterpret_cast<uint4*>(to)[i] = __ldcs(reinterpret_cast<const uint4*>(from) + i);
      for (int i = packs * kPack + thread; i < count * rows.length; i += kThreads) to[i] = from[i];
    });
    __syncthreads();
    for (int row = thread / 4; row < count; row += kThreads / 4)
      with_dtype(rows.dtype, [&](auto element) {
        using E = decltype(element);
        const auto* x = reinterpret_cast<const typename E::Stored*>(stage) + row * rows.length;
        double sum = 0;
        fold_dense<E, 1, false>(x, rows.length, team, Squares<E>{work.in_groups, &sum});
        const double norm = norm_of<E>(work, first + row, team.sum(sum), team);
        if (team.rank() == 0) out[first + row] = norm;
      });
  }
}

// A block per chunk of a row; a row of one chunk is finished here, the chunks of longer ones go to partials.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    chunk_norms(const __grid_constant__ Work work, double* partials, double* out) {
  __shared__ Block::Storage storage;
  const Block team{&storage};
  for (int64_t task = blockIdx.x; task < work.rows.count * work.per_row; task += gridDim.x) {
    int64_t index;
    const int64_t row = divide(task, work.per_row, work.per_row_reciprocal, &index);
    const int64_t begin = index * kCudaChunk, left = work.rows.length - begin;
    const int64_t count = left < kCudaChunk ? left : kCudaChunk;
    with_dtype(work.rows.dtype, [&](auto element) {
      using E = decltype(element);
      const double sum = sum_squares<E>(work, row, begin, count, team);
      const double result = work.per_row == 1 ? norm_of<E>(work, row, sum, team) : sum;
      if (threadIdx.x == 0) (work.per_row == 1 ? out : partials)[task] = result;
    });
  }
}

// A block per row.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    finish_norms(const __grid_constant__ Work work, const double* partials, double* out) {
  __shared__ Block::Storage storage;
  const Block team{&storage};
  for (int64_t row = blockIdx.x; row < work.rows.count; row += gridDim.x) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < work.per_row; i += kThreads) sum += partials[row * work.per_row + i];
    sum = team.sum(sum);
    with_dtype(work.rows.dtype, [&](auto element) {
      const double norm = norm_of<decltype(element)>(work, row, sum, team);
      if (threadIdx.x == 0) out[row] = norm;
    });
  }
}

int64_t chunks_of(const Rows& rows) { return (rows.length + kCudaChunk - 1) / kCudaChunk; }

template <int kSize>
Status launch_lanes(const Work& work, double* out, void* stream) {
  constexpr int64_t kTeams = kThreads / kSize;
  const int64_t blocks = blocks_for((work.rows.count + kTeams - 1) / kTeams);
  return launch("taking row norms", &lane_norms<kSize>, blocks, stream, work, out);
}

// Whether an operation in float64 takes much longer than one in float32 on the current device.
bool is_slow_in_float64() {
  int device = 0, times = 0;
  if (cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&times, cudaDevAttrSingleToDoublePrecisionPerfRatio, device) == cudaSuccess)
    return times >= kSlowFloat64;
  cudaGetLastError();  // the launch that follows will say it
  return false;
}

}  // namespace

int64_t sample_norms_scratch(const Rows& rows) { return rows.length > kCudaChunk ? rows.count * chunks_of(rows) : 0; }

Status sample_norms(const Rows& rows, double* out, double* scratch, void* stream) {
  if (rows.count == 0) return {0, ""};
  const int64_t row_bytes = rows.length * item_size(rows.dtype);
  Work work{rows, chunks_of(rows), 1.0 / static_cast<double>(chunks_of(rows)), {}, false, 0};
  work.in_groups = item_size(rows.dtype) == 2 && is_slow_in_float64();
  for (int d = 0; d < rows.ndim; ++d) work.reciprocals[d] = 1.0 / static_cast<double>(rows.shape[d]);
  if (rows.length <= kLanesRow && rows.dense && rows.stride == rows.length && rows.length > 0) {
    constexpr int64_t kTeams = kThreads / 4;
    work.staged = kStage / row_bytes / kTeams * kTeams;
    if (work.staged > 4 * kTeams) work.staged = 4 * kTeams;
    const int64_t blocks = blocks_for((rows.count + work.staged - 1) / work.staged);
    return launch("taking norms of short rows", &staged_norms, blocks, stream, work, out);
  }
  if (rows.length <= kLanesRow) return launch_lanes<4>(work, out, stream);
  if (rows.length <= kWarpRow) return launch_lanes<32>(work, out, stream);
  const int64_t blocks = blocks_for(rows.count * work.per_row);
  const Status status = launch("taking row norms", &chunk_norms, blocks, stream, work, scratch, out);
  if (status.code || work.per_row == 1) return status;
  const double* partials = scratch;
  return launch("adding up row norms", &finish_norms, blocks_for(rows.count), stream, work, partials, out);
}

}  // namespace lipcore::cuda
