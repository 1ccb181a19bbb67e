// Observes values of many places: moments by Welford's update per thread and Chan's merge, in float64 and in a fixed
// order, a histogram by counting, whose order does not matter. All that is kept lies on the device and is changed in
// place, so that every replay of a captured launch counts.

#include "cuda/common.cuh"
#include "cuda/teams.cuh"

namespace lipcore::cuda {
namespace {

using Reduce = ReduceBlock<ObservedRow>;

// One block per chunk of a place's values. A chunk that is all of them is merged at once; nobody else writes there.
__global__ void __launch_bounds__(kThreads)
    observe_chunks(const __grid_constant__ ObservedTable table, const __grid_constant__ ObserveTables out) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t place = blockIdx.x / out.chunks, begin = blockIdx.x % out.chunks * kCudaChunk;
  const int64_t left = table.count - begin;
  const int count = static_cast<int>(left < kCudaChunk ? left : kCudaChunk);
  int64_t* bins = out.bins + place * kBins;
  ObservedRow row;
  with_dtype(table.dtype, [&](auto element) {
    using E = decltype(element);
    const auto* values = static_cast<const typename E::Stored*>(table.values) + place * table.place_stride;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const int64_t b = begin + i;
      const double x = E::widen(values[b * table.stride]);
      const double gradient = table.gradient ? table.gradient[b * table.gradient_stride] : 0;
      const int bin = observe(&row, observable_of(table.what, x, gradient, table.smallest));
      if (bin >= 0) atomicAdd(reinterpret_cast<unsigned long long*>(&bins[bin]), 1ull);
    }
  });
  row = Reduce(storage).Reduce(row, Merge{});
  if (threadIdx.x != 0) return;
  if (out.chunks == 1)
    merge(&out.rows[place], row);
  else
    out.partials[blockIdx.x] = row;
}

// One block per place. Left to itself ptxas keeps to 64 registers for sm_75, and spills.
__global__ void __launch_bounds__(kThreads, 1) merge_chunks(const __grid_constant__ ObserveTables out) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t place = blockIdx.x;
  ObservedRow row;
  for (int64_t i = threadIdx.x; i < out.chunks; i += kThreads) merge(&row, out.partials[place * out.chunks + i]);
  row = Reduce(storage).Reduce(row, Merge{});
  if (threadIdx.x == 0) merge(&out.rows[place], row);
}

}  // namespace

Status observe_rows(const ObservedTable& table, const ObserveTables& out, void* stream) {
  const Status status = launch("observing values", &observe_chunks, table.places * out.chunks, stream, table, out);
  if (status.code || out.chunks == 1) return status;
  return launch("merging what was observed", &merge_chunks, table.places, stream, out);
}

}  // namespace lipcore::cuda
