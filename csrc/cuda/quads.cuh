// Four neighbouring elements at a time: columns of a row, or rows of a column. The same elements whether they can be
// read at once or not, hence the same sums.
#pragma once

#include "cuda/common.cuh"

namespace lipcore::cuda {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kQuad = 4;  // neighbouring elements that a thread takes at once

// `count` elements of four, `step` apart; zeros for the others.
template <class E, bool kQuads>
__device__ __forceinline__ void load_quad(const typename E::Stored* from, int64_t step, int64_t count,
                                          typename E::Work (&to)[kQuad]) {
  using Stored = typename E::Stored;
  if (kQuads && count >= kQuad) {
    Stored four[kQuad];
    if constexpr (sizeof four == sizeof(uint2)) {
      const uint2 word = __ldg(reinterpret_cast<const uint2*>(from));
      memcpy(four, &word, sizeof four);
    } else {
      uint4 words[sizeof four / sizeof(uint4)];
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof four / sizeof(uint4)); ++i)
        words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
      memcpy(four, words, sizeof four);
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = E::widen(four[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) to[k] = k < count ? E::widen(from[k * step]) : typename E::Work{0};
  }
}

// Whether quads of neighbours, `along` apart, can be read at once wherever rows of them, and samples, begin.
inline bool reads_quads(const void* data, DType dtype, int64_t along, int64_t across, int64_t sample) {
  const auto bytes = static_cast<uintptr_t>(kQuad * item_size(dtype));
  const uintptr_t alignment = bytes < 16 ? bytes : 16;
  return along == 1 && across % kQuad == 0 && sample % kQuad == 0 && reinterpret_cast<uintptr_t>(data) % alignment == 0;
}

}  // namespace lipcore::cuda
