// The limit that trajectory_step is measured against: the same arrays read and written in the same widths, with nothing
// computed. Three streams read, two written; 20 bytes per float32 element, 14 per 16-bit element (whose deviation from
// the mean is float32).
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

template <int kWideWords>
__global__ void __launch_bounds__(kThreads, 3)
    stream(const uint4* __restrict__ w, uint4* __restrict__ prev, uint4* __restrict__ deviation, int64_t words) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kThreads;
    if (i >= words) return;
    uint4 a = __ldcs(w + i);
    const uint4 b = __ldcs(prev + i);
    a.x ^= b.x;
    __stcs(prev + i, a);
#pragma unroll
    for (int k = 0; k < kWideWords; ++k) {
      uint4 d = __ldcs(deviation + i * kWideWords + k);
      d.x ^= a.y;
      __stcs(deviation + i * kWideWords + k, d);
    }
  }
}

}  // namespace

// words: 16-byte words in w. Returns the cudaError_t.
extern "C" int stream_limit(const void* w, void* prev, void* deviation, int64_t words, int wide_words,
                            void* cuda_stream) {
  const auto blocks = static_cast<unsigned>((words + kThreads * kUnroll - 1) / (kThreads * kUnroll));
  const auto run = [&](auto kernel) {
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
        static_cast<const uint4*>(w), static_cast<uint4*>(prev), static_cast<uint4*>(deviation), words);
  };
  if (wide_words == 1)
    run(&stream<1>);
  else
    run(&stream<2>);
  return static_cast<int>(cudaGetLastError());
}
