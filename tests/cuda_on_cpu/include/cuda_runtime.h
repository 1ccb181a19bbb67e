// Stands in for CUDA's header of this name: the words of the language, loads, collectives and launching, over the
// emulator.
#pragma once

#include <math.h>

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "cuda_runtime_api.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
// In a function it makes a variable static, and after extern it declares one; what is fresh per OS thread, one block
// per OS thread, is the block's alone.
#define __shared__ thread_local

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- memory

template <class T>
inline T __ldcs(const T* from) {
  emulator::check_aligned(from, sizeof(T), "__ldcs");
  return *from;
}
template <class T>
inline T __ldg(const T* from) {
  emulator::check_aligned(from, sizeof(T), "__ldg");
  return *from;
}
template <class T>
inline void __stcs(T* to, T value) {
  emulator::check_aligned(to, sizeof(T), "__stcs");
  *to = value;
}

// ---- arithmetic

inline double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- atomics, of integers alone: sums of floating-point numbers would depend on who comes first

inline unsigned atomicAdd(unsigned* to, unsigned value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

// ---- collectives. The last parameter is where they are called from.

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATOR_SITE) {
  emulator::collective(emulator::Collective::kSyncBlock, 0, 0, nullptr, nullptr, 0, {file, line});
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
  emulator::collective(emulator::Collective::kSyncWarp, mask, 0, nullptr, nullptr, 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  const unsigned in = predicate != 0;
  unsigned out;
  emulator::collective(emulator::Collective::kBallot, mask, 0, &in, &out, sizeof out, {file, line});
  return out;
}

#define EMULATOR_SHUFFLE(name, kind)                                                                         \
  template <class T>                                                                                         \
  inline T name(unsigned mask, T value, int argument, EMULATOR_SITE) {                                       \
    static_assert(sizeof(T) <= emulator::kMostBytes);                                                        \
    T out;                                                                                                   \
    emulator::collective(emulator::Collective::kind, mask, argument, &value, &out, sizeof(T), {file, line}); \
    return out;                                                                                              \
  }
EMULATOR_SHUFFLE(__shfl_sync, kShuffle)
EMULATOR_SHUFFLE(__shfl_xor_sync, kShuffleXor)
EMULATOR_SHUFFLE(__shfl_down_sync, kShuffleDown)
EMULATOR_SHUFFLE(__shfl_up_sync, kShuffleUp)
#undef EMULATOR_SHUFFLE
#undef EMULATOR_SITE

// ---- launching

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulator {
constexpr size_t kMostParameters = 4096;  // bytes that every driver takes
template <class... Ts>
constexpr size_t parameter_bytes() {
  size_t at = 0;
  ((at = (at + alignof(Ts) - 1) / alignof(Ts) * alignof(Ts) + sizeof(Ts)), ...);
  return at;
}
}  // namespace emulator

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert(emulator::parameter_bytes<std::decay_t<Parameters>...>() <= emulator::kMostParameters);
  // By value, as the driver copies them: the host's own may be gone when the kernel runs.
  std::tuple<std::decay_t<Parameters>...> copy(std::forward<Arguments>(arguments)...);
  return static_cast<cudaError_t>(
      emulator::submit({reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                        config->dynamicSmemBytes, config->stream, [kernel, copy] { std::apply(kernel, copy); }}));
}
