// One optimizer step of every parameter: reads w, w_prev and the deviation from the mean, writes w_prev and the
// deviation, 20 bytes per float32 element and nothing twice.
// Differences and deviations in the working type (float32, or float64 for float64 parameters), no product added to
// anything, so w_prev, the deviation and max |dw| have the CPU's bits. Every product and sum is float64 (error of a sum
// <= 1e-13 relative): float32 squares would lose everything below 1e-19. Even a GPU with 1/64 of the float64 rate does
// those 7 operations in less time than it moves the 20 bytes. Chunks, threads and reductions come in a fixed order, so
// results do not depend on the GPU or on alignment.
#include <algorithm>

#include "cuda/common.cuh"
#include "cuda/teams.cuh"
#include "math/trajectory_row.h"

namespace lipcore::cuda {
namespace {

// Packs of each array in flight per thread: 96 bytes in all (64 for 16-bit elements). With three blocks per
// multiprocessor that hides the latency of memory; twice as many spill.
template <class E>
constexpr int kUnroll = sizeof(typename E::Stored) == 2 ? 1 : 2;

using Reduce = ReduceBlock<StepSums>;

template <class E>
struct Sums {
  double dw_sq = 0, m2 = 0, weight_sq = 0;
  typename E::Work max_dw = 0;
  int nonfinite = 0;
};

// Takes the old deviation and w_prev, gives the new ones: w_prev is w, or where that is not finite what it was.
template <class E>
__device__ __forceinline__ void step_element(typename E::Stored w, typename E::Stored* w_prev,
                                             typename E::Work* deviation, bool restart, typename E::Work share,
                                             Sums<E>* sums, typename E::Work* m2 = nullptr) {
  const auto before = E::widen(*w_prev);
  auto now = E::widen(w);
  const bool finite = isfinite(now);
  *w_prev = finite ? w : *w_prev;
  now = finite ? now : before;
  sums->nonfinite += !finite;
  const auto m = observe_movement(now, before, restart ? typename E::Work{0} : *deviation, share);
  *deviation = m.deviation_after;
  sums->dw_sq = add_product(sums->dw_sq, m.step, m.step);
  sums->m2 = add_product(sums->m2, m.deviation, m.deviation_after);
  sums->weight_sq = add_product(sums->weight_sq, now, now);
  const typename E::Work size = fabs(m.step);
  if (size > sums->max_dw) sums->max_dw = size;
  if (m2) *m2 = (restart ? typename E::Work{0} : *m2) + m.deviation * m.deviation_after;
}

template <class E, bool kAligned>
__device__ __forceinline__ void step_run(const typename E::Stored* w, typename E::Stored* w_prev,
                                         typename E::Work* deviation, int count, bool restart, typename E::Work share,
                                         Sums<E>* sums) {
  constexpr int kLane = kLanes<E>, kPacks = kAligned ? kUnroll<E> : 1;
  const int packs = count / kLane;
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kPacks * kThreads) {
    Pack<typename E::Stored, kLane> now[kPacks], before[kPacks];
    Pack<typename E::Work, kLane> deviations[kPacks];
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int at = (i + u * kThreads) * kLane;
      if (i + u * kThreads >= packs) break;
      load_pack<kAligned, Keep::kStream>(w + at, &now[u]);
      load_pack<kAligned, Keep::kStream>(w_prev + at, &before[u]);
      if (!restart) load_pack<kAligned, Keep::kStream>(deviation + at, &deviations[u]);
    }
#pragma unroll
    for (int u = 0; u < kPacks; ++u) {
      const int at = (i + u * kThreads) * kLane;
      if (i + u * kThreads >= packs) break;
#pragma unroll
      for (int k = 0; k < kLane; ++k)
        step_element<E>(now[u].lane[k], &before[u].lane[k], &deviations[u].lane[k], restart, share, sums);
      store_pack<kAligned>(before[u], w_prev + at);
      store_pack<kAligned>(deviations[u], deviation + at);
    }
  }
  const int rest = packs * kLane + static_cast<int>(threadIdx.x);
  if (rest < count) {
    auto own = restart ? typename E::Work{0} : deviation[rest];
    step_element<E>(w[rest], &w_prev[rest], &own, restart, share, sums);
    deviation[rest] = own;
  }
}

// With a variance per element: one element at a time, which is enough for what is asked rarely.
template <class E>
__device__ __forceinline__ void step_elements(const typename E::Stored* w, typename E::Stored* w_prev,
                                              typename E::Work* deviation, typename E::Work* m2, int count,
                                              bool restart, typename E::Work share, Sums<E>* sums) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    auto own = restart ? typename E::Work{0} : deviation[i];
    step_element<E>(w[i], &w_prev[i], &own, restart, share, sums, &m2[i]);
    deviation[i] = own;
  }
}

// One chunk of a tensor.
struct Chunk {
  const TensorEntry& tensor;
  int64_t begin;
  int count;

  __device__ Chunk(const StepTables& tables, const ChunkEntry& entry)
      : tensor(tables.tensors[entry.tensor]), begin(entry.index * kCudaChunk) {
    const int64_t left = tensor.count - begin;
    count = static_cast<int>(left < kCudaChunk ? left : kCudaChunk);
  }
};

__device__ __forceinline__ StepSums step(const Chunk& chunk, bool restart, double share) {
  StepSums result{};
  with_dtype(chunk.tensor.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* w = static_cast<const typename E::Stored*>(chunk.tensor.w) + chunk.begin;
    auto* w_prev = static_cast<typename E::Stored*>(chunk.tensor.w_prev) + chunk.begin;
    auto* deviation = static_cast<typename E::Work*>(chunk.tensor.deviation) + chunk.begin;
    const auto factor = static_cast<typename E::Work>(share);
    Sums<E> sums;
    if (chunk.tensor.m2)
      step_elements<E>(w, w_prev, deviation, static_cast<typename E::Work*>(chunk.tensor.m2) + chunk.begin, chunk.count,
                       restart, factor, &sums);
    else if (is_aligned(w) && is_aligned(w_prev) && is_aligned(deviation))
      step_run<E, true>(w, w_prev, deviation, chunk.count, restart, factor, &sums);
    else
      step_run<E, false>(w, w_prev, deviation, chunk.count, restart, factor, &sums);
    result = {sums.dw_sq, sums.m2, static_cast<double>(sums.max_dw), sums.weight_sq,
              static_cast<double>(sums.nonfinite)};
  });
  return result;
}

// One block per chunk.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    step_chunks(const __grid_constant__ StepTables tables, double share) {
  __shared__ typename Reduce::TempStorage storage;
  const ChunkEntry entry = tables.chunks[blockIdx.x];
  const TrajectoryRow* row = tables.ledger.rows ? tables.ledger.rows + entry.tensor : nullptr;
  const bool restart = row && starts_block(*row);
  if (row) share = share_before(points_after_step(*row));
  const StepSums sums = Reduce(storage).Reduce(step(Chunk(tables, entry), restart, share), Merge{});
  if (threadIdx.x == 0) tables.partials[blockIdx.x] = sums;
}

__device__ __forceinline__ RecentStep* recent_of(const LedgerTables& ledger, double step) {
  return ledger.recent + static_cast<int64_t>(step) % ledger.ring * ledger.row_count();
}

// The cursor is read by every thread of this launch and by every one of the next, so neither may move what it reads:
// this one copies it, the next one counts it on.
__device__ __forceinline__ void observe_tensor(const LedgerTables& ledger, int64_t tensor, const StepSums& sums) {
  observe_row(&ledger.rows[tensor], &recent_of(ledger, ledger.cursor[0])[tensor], sums);
  if (tensor == 0) ledger.cursor[1] = ledger.cursor[0];
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) finish_tensors(const __grid_constant__ StepTables tables) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t tensor = blockIdx.x;
  const int64_t first = tables.tensors[tensor].first_chunk;
  const int64_t last = first + (tables.tensors[tensor].count + kCudaChunk - 1) / kCudaChunk;
  StepSums sums{};
  for (int64_t i = first + threadIdx.x; i < last; i += kThreads) merge(&sums, tables.partials[i]);
  sums = Reduce(storage).Reduce(sums, Merge{});
  if (threadIdx.x != 0) return;
  if (sums.dw_sq != sums.dw_sq) sums.max_abs_dw = sums.dw_sq;  // comparisons drop NaN
  if (sums.nonfinite > 0) sums = left_out(sums);
  tables.sums[tensor] = sums;
  if (tables.ledger.rows) observe_tensor(tables.ledger, tensor, sums);
}

// One thread per tensor.
__global__ void __launch_bounds__(kThreads)
    observe_tensors(const __grid_constant__ LedgerTables ledger, const StepSums* sums) {
  const int64_t tensor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tensor < ledger.tensors) observe_tensor(ledger, tensor, sums[tensor]);
}

__device__ __forceinline__ bool is_member(const LedgerTables& ledger, int64_t tensor, int64_t group) {
  return group == ledger.groups || ledger.rows[tensor].group == static_cast<double>(group);
}

// One block per group, and one for the total.
__global__ void __launch_bounds__(kThreads)
    finish_groups(const __grid_constant__ LedgerTables ledger, const StepSums* tensors) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t group = blockIdx.x;
  StepSums sums = no_member();
  for (int64_t i = threadIdx.x; i < ledger.tensors; i += kThreads)
    if (is_member(ledger, i, group)) merge_member(&sums, tensors[i]);
  sums = Reduce(storage).Reduce(sums, Merge{});
  if (threadIdx.x != 0) return;
  const int64_t row = ledger.tensors + group;
  observe_group(&ledger.rows[row], &recent_of(ledger, ledger.cursor[1])[row], sums);
  if (group == ledger.groups) ledger.cursor[0] = ledger.cursor[1] + 1;
}

__device__ __forceinline__ StepSums merge_warp(const StepSums& own) {
  double sums[kStepSums];
  memcpy(sums, &own, sizeof sums);
  StepSums merged = own;
  for (int distance = 16; distance; distance /= 2) {
    double others[kStepSums];
#pragma unroll
    for (int i = 0; i < kStepSums; ++i) others[i] = __shfl_down_sync(0xffffffffu, sums[i], distance);
    StepSums other;
    memcpy(&other, others, sizeof others);
    merge(&merged, other);
    memcpy(sums, &merged, sizeof sums);
  }
  return merged;
}

// By one block, a warp per group: of few tensors this takes no longer than one launch more does.
constexpr int64_t kMostMembers = 1 << 14;  // tensors times groups
__global__ void __launch_bounds__(kThreads)
    observe_all(const __grid_constant__ LedgerTables ledger, const StepSums* tensors) {
  RecentStep* recent = recent_of(ledger, ledger.cursor[0]);
  for (int64_t i = threadIdx.x; i < ledger.tensors; i += kThreads) observe_row(&ledger.rows[i], &recent[i], tensors[i]);
  constexpr int kWarp = 32;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t group = threadIdx.x / kWarp; group <= ledger.groups; group += kThreads / kWarp) {
    StepSums sums = no_member();
    for (int64_t i = lane; i < ledger.tensors; i += kWarp)
      if (is_member(ledger, i, group)) merge_member(&sums, tensors[i]);
    sums = merge_warp(sums);
    const int64_t row = ledger.tensors + group;
    if (lane == 0) observe_group(&ledger.rows[row], &recent[row], sums);
  }
  __syncthreads();  // everybody has read the cursor
  if (threadIdx.x == 0) ledger.cursor[0] += 1;
}

// As many entries as fit into the 4 KiB that every driver allows for a kernel's parameters.
constexpr int kBatch = 56;
struct Batch {
  TensorEntry entries[kBatch];
};
static_assert(sizeof(Batch) + sizeof(StepTables) + 16 <= 4096, "kernel parameters");

// One block per entry.
__global__ void __launch_bounds__(kThreads)
    write_entries(const __grid_constant__ StepTables tables, const __grid_constant__ Batch batch, int64_t first,
                  bool lay_out) {
  const int64_t tensor = first + blockIdx.x;
  const TensorEntry& entry = batch.entries[blockIdx.x];
  if (threadIdx.x == 0) tables.tensors[tensor] = entry;
  if (!lay_out) return;
  const int64_t chunks = (entry.count + kCudaChunk - 1) / kCudaChunk;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads)
    tables.chunks[entry.first_chunk + i] = {static_cast<int32_t>(tensor), static_cast<int32_t>(i)};
}

}  // namespace

Status upload_tensors(const StepTables& tables, const TensorEntry* host, bool lay_out, void* stream) {
  for (int64_t first = 0; first < tables.tensor_count; first += kBatch) {
    const int64_t left = tables.tensor_count - first;
    const int64_t count = left < kBatch ? left : kBatch;
    Batch batch{};
    std::copy(host + first, host + first + count, batch.entries);
    const Status status =
        launch("writing the tensor table", &write_entries, count, stream, tables, batch, first, lay_out);
    if (status.code) return status;
  }
  return {0, ""};
}

Status run_step(const StepTables& tables, double share, void* stream) {
  if (tables.chunk_count) {
    const Status status = launch("stepping the tensors", &step_chunks, tables.chunk_count, stream, tables, share);
    if (status.code) return status;
  }
  if (tables.tensor_count) {
    const Status status = launch("adding up the tensors", &finish_tensors, tables.tensor_count, stream, tables);
    if (status.code) return status;
  }
  if (!tables.ledger.rows) return {0, ""};
  return launch("adding up the groups", &finish_groups, tables.ledger.groups + 1, stream, tables.ledger, tables.sums);
}

Status observe_sums(const LedgerTables& ledger, const StepSums* sums, void* stream) {
  if (ledger.tensors * (ledger.groups + 1) <= kMostMembers)
    return launch("taking in a step", &observe_all, 1, stream, ledger, sums);
  const int64_t blocks = (ledger.tensors + kThreads - 1) / kThreads;
  const Status status = launch("taking in the tensors", &observe_tensors, blocks, stream, ledger, sums);
  if (status.code) return status;
  return launch("adding up the groups", &finish_groups, ledger.groups + 1, stream, ledger, sums);
}

}  // namespace lipcore::cuda
