// CountSketch on the GPU: every element is read once. Values are widened and added in float64, in an order that depends
// on the sizes alone: no atomics, the same bits on every GPU, within 1e-12 of the CPU's.
//
// One warp works on a task and a slice of the buckets, which it keeps in shared memory and shares with nobody. It
// hashes all groups of sixteen elements of the task, 64 at a time, and reads the elements of those that fall into its
// slice: half a warp per group, two groups at a time, so that additions conflict only where both fall into the same
// sixteen buckets. With more warps on one array of buckets, atomics or a sort would be needed; with all buckets in one
// slice (512 KiB for 65536) nothing would fit. A hash costs less than a tenth of reading what it places.
#include <algorithm>
#include <limits>

#include "cuda/common.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kWarp = 32;
constexpr int kHalf = kWarp / 2;
static_assert(kHalf == kSketchGroup, "a lane of half a warp per element of a group");

// Buckets of a slice: 16 KiB, so that 13 warps fit on a multiprocessor of an H100 and 4 on one of a T4. Of 65536
// buckets twice as many, since every slice hashes all groups.
constexpr int64_t kSliceBuckets = 2048;
constexpr int64_t kMostSlices = 16;
constexpr int kBlocksOnSm = 13;  // without it ptxas saves registers for more, and spills

// Reducing the buckets of a task moves 16 bytes per bucket: an eighth of 32 float32 elements per bucket.
constexpr int64_t kTaskElements = 16384;
constexpr int64_t kTaskElementsPerBucket = 32;
constexpr int64_t kPrivateBytes = 64 << 20;  // at most, for the buckets of all tasks of a long row

// Steps of two groups that are read before any of them is added: 2 KiB in flight per warp.
template <class E>
constexpr int kSteps = sizeof(typename E::Stored) == 8 ? 8 : 16;
template <class E>
constexpr int kDrained = 2 * kSteps<E>;
constexpr int kQueue = 128;  // a power of two, >= kDrained - 1 + 64

struct QueuedGroup {
  uint32_t h;      // its hash
  uint32_t group;  // counted from the piece's first
};

struct Sums {
  double weight_sq = 0;
  int64_t nonfinite = 0;
};

// The piece of a tensor that a warp works on, and where it is with it.
template <class E>
struct Walk {
  const typename E::Stored* w;  // element 0 of the piece
  int64_t count;                // elements
  int64_t skew;                 // of element 0 within its group
  int64_t buckets, slice_first;
  double* slice;
  const QueuedGroup* queue;

  // Adds `groups` groups from the queue, two at a time. All lanes take part.
  __device__ __forceinline__ void drain(int head, int groups, Sums* sums) const {
    const int lane = static_cast<int>(threadIdx.x) % kHalf, half = static_cast<int>(threadIdx.x) / kHalf;
    typename E::Stored stored[kSteps<E>];
#pragma unroll
    for (int u = 0; u < kSteps<E>; ++u) {
      stored[u] = {};
      if (2 * u + half >= groups) continue;
      const int64_t i = static_cast<int64_t>(queue[(head + 2 * u + half) % kQueue].group) * kSketchGroup + lane - skew;
      if (i >= 0 && i < count) stored[u] = w[i];  // what is beyond the ends is 0, which adds nothing
    }
#pragma unroll
    for (int u = 0; u < kSteps<E>; ++u) {
      if (2 * u >= groups) break;
      const bool here = 2 * u + half < groups;
      const uint32_t h = queue[(head + 2 * u + half) % kQueue].h;
      const uint32_t other = queue[(head + 2 * u + 1 - half) % kQueue].h;
      const bool both = 2 * u + 1 < groups && first_bucket(h, buckets) == first_bucket(other, buckets);
      const auto value = E::widen(stored[u]);
      const uint32_t place = static_cast<uint32_t>(lane) ^ bucket_xor(h);
      double* bucket = slice + (first_bucket(h, buckets) - slice_first + place);
      const double signed_value = sign_bits(h) >> place & 1u ? -static_cast<double>(value) : static_cast<double>(value);
      if (here) {
        sums->weight_sq = add_product(sums->weight_sq, value, value);
        sums->nonfinite += !isfinite(value);
      }
      if (here && !(both && half == 1)) *bucket += signed_value;
      __syncwarp();
      if (both) {  // the same sixteen buckets: one after the other; all lanes agree
        if (half == 1) *bucket += signed_value;
        __syncwarp();
      }
    }
  }
};

template <class E>
__device__ __forceinline__ Sums add_piece(const SketchTables& tables, const SketchTensor& tensor,
                                          const SketchPiece& piece, int64_t slice, int64_t slice_buckets,
                                          double* buckets, QueuedGroup* queue) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = tensor.first_index + piece.begin, last = first + piece.count - 1;
  const int64_t first_group = first / kSketchGroup, last_group = last / kSketchGroup;
  const Walk<E> walk{static_cast<const typename E::Stored*>(tensor.w) + piece.begin,
                     piece.count,
                     first % kSketchGroup,
                     tables.buckets,
                     slice * slice_buckets,
                     buckets,
                     queue};
  const auto mine = [&](int64_t group, uint32_t h) {
    return group >= first_group && group <= last_group && first_bucket(h, tables.buckets) / slice_buckets == slice;
  };
  Sums sums;
  int head = 0, queued = 0;
  for (int64_t base = first_group / 2; base <= last_group / 2; base += kWarp) {
    const int64_t group = 2 * (base + thread);
    const uint64_t bits = sketch_bits(tables.key, base + thread);
    const auto low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
    const bool low_mine = mine(group, low), high_mine = mine(group + 1, high);
    const unsigned lows = __ballot_sync(~0u, low_mine), highs = __ballot_sync(~0u, high_mine);
    const unsigned below = (1u << thread) - 1;
    int at = head + queued + __popc(lows & below) + __popc(highs & below);
    if (low_mine) queue[at++ % kQueue] = {low, static_cast<uint32_t>(group - first_group)};
    if (high_mine) queue[at % kQueue] = {high, static_cast<uint32_t>(group + 1 - first_group)};
    queued += __popc(lows) + __popc(highs);
    __syncwarp();
    for (; queued >= kDrained<E>; queued -= kDrained<E>, head = (head + kDrained<E>) % kQueue)
      walk.drain(head, kDrained<E>, &sums);
  }
  walk.drain(head, queued, &sums);
  return sums;
}

// One warp per task and slice.
__global__ void __launch_bounds__(kWarp, kBlocksOnSm) sketch_tasks(const __grid_constant__ SketchTables tables) {
  extern __shared__ double buckets[];
  __shared__ QueuedGroup queue[kQueue];
  const int thread = static_cast<int>(threadIdx.x);
  const SketchTask task = tables.tasks[blockIdx.x / tables.slices];
  const int64_t slice = blockIdx.x % tables.slices, slice_buckets = tables.buckets / tables.slices;
  for (int64_t b = thread; b < slice_buckets; b += kWarp) buckets[b] = 0;
  __syncwarp();
  for (int64_t p = task.first_piece; p < task.last_piece; ++p) {
    const SketchPiece piece = tables.pieces[p];
    const SketchTensor tensor = tables.tensors[piece.item];
    Sums sums;
    with_dtype(static_cast<DType>(tensor.dtype), [&](auto element) {
      using E = decltype(element);
      sums = add_piece<E>(tables, tensor, piece, slice, slice_buckets, buckets, queue);
    });
    for (int by = kHalf; by > 0; by /= 2) {
      sums.weight_sq += __shfl_down_sync(~0u, sums.weight_sq, by);
      sums.nonfinite += __shfl_down_sync(~0u, sums.nonfinite, by);
    }
    if (thread == 0) {
      tables.partials[p * tables.slices + slice] = {sums.weight_sq, static_cast<double>(sums.nonfinite)};
      if (sums.nonfinite) tables.not_finite[task.row] = 1;  // every task that finds some writes the same
    }
    __syncwarp();  // the queue is used again
  }
  double* to =
      task.place < 0 ? tables.sketches + task.row * tables.buckets : tables.private_ + task.place * tables.buckets;
  for (int64_t b = thread; b < slice_buckets; b += kWarp) to[slice * slice_buckets + b] = buckets[b];
}

// One block per row and 32 buckets: eight warps share the places, each in order.
constexpr int kWarps = kThreads / kWarp;
__global__ void __launch_bounds__(kThreads) reduce_rows(const __grid_constant__ SketchTables tables) {
  __shared__ double sums[kWarps][kWarp];
  const int thread = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t parts = tables.buckets / kWarp, row = blockIdx.x / parts;
  const int64_t bucket = blockIdx.x % parts * kWarp + thread;
  const SketchRow places = tables.row_table[row];
  double sum = 0;
  for (int64_t p = places.first_place + warp; p < places.last_place; p += kWarps)
    sum += tables.private_[p * tables.buckets + bucket];
  sums[warp][thread] = sum;
  __syncthreads();
  if (warp != 0) return;
  double* result = tables.sketches + row * tables.buckets + bucket;
  double total = places.empty ? 0.0 : *result;  // what the row's first task left there
  for (int i = 0; i < kWarps; ++i) total += sums[i][thread];
  *result = tables.not_finite[row] ? kNaN : total;
}

struct Merge {
  __device__ SketchWeight operator()(const SketchWeight& a, const SketchWeight& b) const {
    return {a.weight_sq + b.weight_sq, a.nonfinite + b.nonfinite};
  }
};
using Reduce = ReduceBlock<SketchWeight>;

// One block per tensor; together they also forget which rows were not finite.
__global__ void __launch_bounds__(kThreads) finish_weights(const __grid_constant__ SketchTables tables) {
  __shared__ typename Reduce::TempStorage storage;
  const SketchTensor tensor = tables.tensors[blockIdx.x];
  SketchWeight weight{};
  for (int64_t i = tensor.first_piece * tables.slices + threadIdx.x; i < tensor.last_piece * tables.slices;
       i += kThreads)
    weight = Merge{}(weight, tables.partials[i]);
  weight = Reduce(storage).Reduce(weight, Merge{});
  if (threadIdx.x == 0) tables.weights[blockIdx.x] = weight;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < tables.rows;
       row += static_cast<int64_t>(gridDim.x) * kThreads)
    tables.not_finite[row] = 0;
}

// As many words as fit into the 4 KiB that every driver allows for a kernel's parameters.
constexpr int64_t kWords = 480;
struct Words {
  uint64_t word[kWords];
};

__global__ void __launch_bounds__(kThreads)
    write_words(const __grid_constant__ Words words, uint64_t* to, int64_t count) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) to[i] = words.word[i];
}

}  // namespace

int64_t sketch_slices(int64_t buckets) {
  const int64_t slices = buckets / kSliceBuckets;
  return slices < 1 ? 1 : slices > kMostSlices ? kMostSlices : slices;
}

int64_t sketch_task_elements(int64_t total, int64_t buckets) {
  const int64_t places = kPrivateBytes / (buckets * static_cast<int64_t>(sizeof(double)));
  return std::max({kTaskElements, kTaskElementsPerBucket * buckets, (total + places - 1) / places});
}

Status upload_words(const void* host, int64_t bytes, void* device, void* stream) {
  static_assert(sizeof(SketchTensor) % 8 == 0 && sizeof(SketchPiece) % 8 == 0 && sizeof(SketchTask) % 8 == 0 &&
                    sizeof(SketchRow) % 8 == 0,
                "whole words");
  const int64_t total = bytes / static_cast<int64_t>(sizeof(uint64_t));
  for (int64_t first = 0; first < total; first += kWords) {
    const int64_t count = std::min(kWords, total - first);
    Words words{};
    std::memcpy(words.word, static_cast<const uint64_t*>(host) + first, static_cast<size_t>(count) * sizeof(uint64_t));
    const Status status =
        launch("writing the tables", &write_words, 1, stream, words, static_cast<uint64_t*>(device) + first, count);
    if (status.code) return status;
  }
  return {0, ""};
}

Status run_sketch(const SketchTables& tables, void* stream) {
  if (tables.task_count) {
    const int64_t shared = tables.buckets / tables.slices * static_cast<int64_t>(sizeof(double));
    const Status status = launch_shaped("sketching the tensors", &sketch_tasks, tables.task_count * tables.slices,
                                        kWarp, shared, stream, tables);
    if (status.code) return status;
  }
  if (tables.rows) {
    const Status status =
        launch("adding up the sketches", &reduce_rows, tables.rows * (tables.buckets / kWarp), stream, tables);
    if (status.code) return status;
  }
  if (!tables.tensor_count) return {0, ""};
  return launch("adding up the weights", &finish_weights, tables.tensor_count, stream, tables);
}

}  // namespace lipcore::cuda
