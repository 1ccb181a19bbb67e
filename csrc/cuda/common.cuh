// Shared by the CUDA kernels: element types, 128-bit packs of them, launching.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <limits>
#include <utility>

#include "cuda/kernels.h"

namespace lipcore::cuda {

constexpr int kThreads = 256;    // per block, for every kernel
constexpr int kBlocksPerSm = 3;  // at least, for the kernels that stream memory: 80 registers per thread
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr int64_t kMaxBlocks = 1 << 20;  // where there is more to do, blocks take several turns
inline int64_t blocks_for(int64_t work) { return work < kMaxBlocks ? work : kMaxBlocks; }

// Stored: as in memory. Work: differences and means. Squares and sums are float64 for all.
struct Float32 {
  using Stored = float;
  using Work = float;
  __device__ static Work widen(Stored x) { return x; }
};
struct Float64 {
  using Stored = double;
  using Work = double;
  __device__ static Work widen(Stored x) { return x; }
};
struct Bfloat16 {
  using Stored = uint16_t;
  using Work = float;
  __device__ static Work widen(Stored x) { return bfloat16_to_float(x); }
};
struct Float16 {
  using Stored = uint16_t;
  using Work = float;
  __device__ static Work widen(Stored x) { return __half2float(__ushort_as_half(x)); }
};

template <class Body>
__device__ __forceinline__ void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Float32{});
    case DType::kFloat64:
      return body(Float64{});
    case DType::kBfloat16:
      return body(Bfloat16{});
    default:
      return body(Float16{});
  }
}

// sum + a * b in float64. The product of two float32 is exact there, so fusing changes no bit and saves an instruction
// that consumer GPUs run at 1/64 of the float32 rate; float64 products are rounded first, as on the CPU.
__device__ __forceinline__ double add_product(double sum, float a, float b) {
  return __fma_rn(static_cast<double>(a), static_cast<double>(b), sum);
}
__device__ __forceinline__ double add_product(double sum, double a, double b) { return sum + a * b; }

// Of entries that begin at ascending chunks, the last one that begins at this chunk or before. Empty ones, which begin
// where the next one does, come before it.
template <class Entry>
__device__ __forceinline__ int64_t holder_of(const Entry* entries, int64_t count, int64_t chunk) {
  int64_t low = 0, high = count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (entries[middle].first_chunk <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// As many elements as one 128-bit access moves.
template <class E>
constexpr int kLanes = 16 / static_cast<int>(sizeof(typename E::Stored));

template <class T, int kCount>
struct alignas(16) Pack {
  T lane[kCount];
};

__device__ __forceinline__ bool is_aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// How long the cache should keep what is read: kStream for what nobody reads again soon.
enum class Keep { kCached, kStream };

// From memory that need not be aligned unless kAligned says so: the same elements either way, hence the same sums.
template <bool kAligned, Keep kKeep, class T, int kCount>
__device__ __forceinline__ void load_pack(const T* from, Pack<T, kCount>* pack) {
  if constexpr (kAligned) {
    constexpr int kWords = static_cast<int>(sizeof(*pack) / sizeof(uint4));
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint4* word = reinterpret_cast<const uint4*>(from) + i;
      words[i] = kKeep == Keep::kStream ? __ldcs(word) : *word;
    }
    memcpy(pack, words, sizeof *pack);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack->lane[i] = from[i];
  }
}

template <bool kAligned, class T, int kCount>
__device__ __forceinline__ void store_pack(const Pack<T, kCount>& pack, T* to) {
  if constexpr (kAligned) {
    constexpr int kWords = static_cast<int>(sizeof(pack) / sizeof(uint4));
    uint4 words[kWords];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<uint4*>(to) + i, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = pack.lane[i];
  }
}

// `shared_bytes` of dynamic shared memory per block.
template <class... Parameters, class... Arguments>
Status launch_shaped(const char* doing, void (*kernel)(Parameters...), int64_t blocks, int threads,
                     int64_t shared_bytes, void* stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: the next one who asks must not find it
  return {static_cast<int>(error), doing};
}

template <class... Parameters, class... Arguments>
Status launch(const char* doing, void (*kernel)(Parameters...), int64_t blocks, void* stream,
              Arguments&&... arguments) {
  return launch_shaped(doing, kernel, blocks, kThreads, 0, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace lipcore::cuda
