// Stands in for CUDA's header of this name. Widens float16 by arithmetic, not by lipcore's own code, which it checks.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half half) {
  const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  float size;
  if (exponent == 31)
    size = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  else
    size = std::ldexp(static_cast<float>(exponent ? 1024 + fraction : fraction), exponent ? exponent - 25 : -24);
  return half.bits >> 15 ? -size : size;
}
