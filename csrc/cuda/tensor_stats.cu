// Statistics and histograms of tensors. A block of threads takes a chunk, which it reads twice, from the cache the
// second time: for the mean, extremes and bins, then for the powers of deviations from that mean. All sums are float64
// in an order that depends on the sizes alone (error of the powers' sums <= 1e-13 of what they would be without signs);
// chunks are merged in order by the formulas the CPU has. Atomics add integers, whose sums are the same in any order.
#include <limits>

#include "cuda/common.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What is known after the first reading.
struct First {
  double sum, min, max;
  int64_t count, zeros, nonfinite;
};
struct JoinFirst {
  __device__ First operator()(First a, const First& b) const {
    a.sum += b.sum;
    a.min = b.min < a.min ? b.min : a.min;
    a.max = b.max > a.max ? b.max : a.max;
    a.count += b.count;
    a.zeros += b.zeros;
    a.nonfinite += b.nonfinite;
    return a;
  }
};

struct Powers {
  double m2, m3, m4;
};
struct AddPowers {
  __device__ Powers operator()(Powers a, const Powers& b) const { return {a.m2 + b.m2, a.m3 + b.m3, a.m4 + b.m4}; }
};

using ReduceFirst = ReduceBlock<First>;
using ReducePowers = ReduceBlock<Powers>;
using ReduceRows = ReduceBlock<TensorStats>;

// Calls visit(x) for this thread's share of a chunk: the same elements whether they are aligned or not.
template <class E, bool kAligned, class Visit>
__device__ __forceinline__ void visit_run(const typename E::Stored* x, int count, const Visit& visit) {
  const int packs = count / kLanes<E>;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < packs; i += kThreads) {
    Pack<typename E::Stored, kLanes<E>> pack;
    load_pack<kAligned, Keep::kCached>(x + i * kLanes<E>, &pack);
#pragma unroll
    for (int k = 0; k < kLanes<E>; ++k) visit(E::widen(pack.lane[k]));
  }
  const int rest = packs * kLanes<E> + static_cast<int>(threadIdx.x);
  if (rest < count) visit(E::widen(x[rest]));
}

template <class Visit>
__device__ __forceinline__ void visit_chunk(const StatsTensor& tensor, int64_t begin, int count, const Visit& visit) {
  with_dtype(static_cast<DType>(tensor.dtype), [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(tensor.x) + begin;
    if (is_aligned(x))
      visit_run<E, true>(x, count, visit);
    else
      visit_run<E, false>(x, count, visit);
  });
}

// One block per chunk. Two per multiprocessor: with kBlocksPerSm registers are spilled on some architectures.
__global__ void __launch_bounds__(kThreads, 2) observe_chunks(const __grid_constant__ StatsTables tables) {
  __shared__ typename ReduceFirst::TempStorage first_storage;
  __shared__ typename ReducePowers::TempStorage powers_storage;
  __shared__ unsigned counts[kTensorBins];
  __shared__ double shared_mean;
  const int64_t chunk = blockIdx.x;
  const StatsTensor tensor = tables.tensors[holder_of(tables.tensors, tables.tensor_count, chunk)];
  const int64_t begin = (chunk - tensor.first_chunk) * kCudaChunk, left = tensor.count - begin;
  const int count = static_cast<int>(left < kCudaChunk ? left : kCudaChunk);
  for (int b = static_cast<int>(threadIdx.x); b < kTensorBins; b += kThreads) counts[b] = 0;
  __syncthreads();
  First mine{0, kInfinity, -kInfinity, 0, 0, 0};
  visit_chunk(tensor, begin, count, [&](auto x) {
    if (!isfinite(x)) {
      ++mine.nonfinite;
      return;
    }
    const auto value = static_cast<double>(x);
    mine.sum += value;
    mine.min = value < mine.min ? value : mine.min;
    mine.max = value > mine.max ? value : mine.max;
    ++mine.count;
    mine.zeros += value == 0;
    atomicAdd(&counts[tensor_bin_of(x)], 1u);
  });
  const First all = ReduceFirst(first_storage).Reduce(mine, JoinFirst{});
  if (threadIdx.x == 0) {
    const bool same = all.count == 0 || all.min == all.max;
    shared_mean = all.count == 0 ? 0 : same ? all.min : all.sum / static_cast<double>(all.count);
  }
  __syncthreads();  // for the mean and the counts
  const double mean = shared_mean;
  Powers own{0, 0, 0};
  visit_chunk(tensor, begin, count, [&](auto x) {
    if (!isfinite(x)) return;
    const double d = static_cast<double>(x) - mean, square = d * d;
    own.m2 += square;
    own.m3 = add_product(own.m3, square, d);
    own.m4 = add_product(own.m4, square, square);
  });
  const Powers powers = ReducePowers(powers_storage).Reduce(own, AddPowers{});
  if (threadIdx.x == 0) {
    const bool any = all.count > 0;
    // + 0 makes 0 of -0: which of them is the least or greatest depends on their order.
    tables.partials[chunk] = {static_cast<double>(all.count),
                              mean + 0.0,
                              powers.m2,
                              powers.m3,
                              powers.m4,
                              any ? all.min + 0.0 : 0,
                              any ? all.max + 0.0 : 0,
                              static_cast<double>(all.zeros),
                              static_cast<double>(all.nonfinite)};
  }
  int64_t* bins = tables.bins + tensor.place * kTensorBins;
  for (int b = static_cast<int>(threadIdx.x); b < kTensorBins; b += kThreads)
    if (counts[b])
      atomicAdd(reinterpret_cast<unsigned long long*>(bins + b), static_cast<unsigned long long>(counts[b]));
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) merge_chunks(const __grid_constant__ StatsTables tables) {
  __shared__ typename ReduceRows::TempStorage storage;
  const StatsTensor tensor = tables.tensors[blockIdx.x];
  const int64_t chunks = (tensor.count + kCudaChunk - 1) / kCudaChunk;
  TensorStats mine{};
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) merge(&mine, tables.partials[tensor.first_chunk + i]);
  const TensorStats all = ReduceRows(storage).Reduce(mine, Merge{});
  if (threadIdx.x == 0) merge(&tables.rows[tensor.place], all);
}

}  // namespace

Status run_tensor_stats(const StatsTables& tables, void* stream) {
  if (tables.chunk_count) {
    const Status status = launch("observing the tensors", &observe_chunks, tables.chunk_count, stream, tables);
    if (status.code) return status;
  }
  return launch("merging the tensors' statistics", &merge_chunks, tables.tensor_count, stream, tables);
}

}  // namespace lipcore::cuda
