// Element types and their widening to float, for host and device. Everything is forced inline: these functions are
// compiled into objects of several instruction sets, and a shared out-of-line copy could run on the wrong machine.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LIPCORE_INLINE __host__ __device__ __forceinline__ static
#define LIPCORE_MEMBER __host__ __device__ __forceinline__
#else
#define LIPCORE_INLINE __attribute__((always_inline)) static inline
#define LIPCORE_MEMBER __attribute__((always_inline)) inline
#endif

namespace lipcore {

// Kernels see the floating types alone. int64 is for what counts elements: ids and offsets.
enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBfloat16 = 2, kFloat16 = 3, kInt64 = 4 };

LIPCORE_INLINE int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 || dtype == DType::kInt64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

LIPCORE_INLINE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

LIPCORE_INLINE float bfloat16_to_float(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

// By integer arithmetic, because the base instruction set has no half conversion. Exact for all 65536 values,
// subnormals, infinities and NaN payloads (made quiet, as hardware does) included.
LIPCORE_INLINE float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return float_from_bits(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24, exact in float.
  const float value = static_cast<float>(magnitude) * 5.9604644775390625e-08f;
  return sign ? -value : value;
}

}  // namespace lipcore
