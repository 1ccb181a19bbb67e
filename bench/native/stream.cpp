// The memory limit for kernels with the traffic of the trajectory step (three streams read, two of them written in
// place) and of update_sums (three read): nothing computed but one addition each. Built by bench/stream.py for the
// machine it runs on.
#include <cstdint>
#include <thread>
#include <vector>

namespace {
void run(const float* w, float* prev, float* deviation, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float x = w[i];
    deviation[i] += prev[i];
    prev[i] = x;
  }
}

// As many sums as keep the additions from being the limit.
void read_three(const float* w, const float* first, const float* second, int64_t begin, int64_t end, float* out) {
  float sums[128] = {};
  for (int64_t i = begin; i + 128 <= end; i += 128)
    for (int k = 0; k < 128; ++k) sums[k] += (w[i + k] + first[i + k]) + second[i + k];
  for (float sum : sums) *out += sum;
}
}  // namespace

extern "C" void stream_3r2w(const float* w, float* prev, float* deviation, int64_t n, int threads) {
  std::vector<std::thread> pool;
  const int64_t share = (n + threads - 1) / threads;
  for (int t = 1; t < threads; ++t)
    pool.emplace_back(run, w, prev, deviation, t * share, (t + 1) * share < n ? (t + 1) * share : n);
  run(w, prev, deviation, 0, share < n ? share : n);
  for (auto& thread : pool) thread.join();
}

extern "C" float stream_3r(const float* w, const float* first, const float* second, int64_t n, int threads) {
  std::vector<std::thread> pool;
  std::vector<float> sums(static_cast<size_t>(threads) * 64);  // a cache line or more between them
  const int64_t share = (n + threads - 1) / threads;
  for (int t = 1; t < threads; ++t)
    pool.emplace_back(read_three, w, first, second, t * share, (t + 1) * share < n ? (t + 1) * share : n,
                      &sums[static_cast<size_t>(t) * 64]);
  read_three(w, first, second, 0, share < n ? share : n, &sums[0]);
  for (auto& thread : pool) thread.join();
  return sums[0];
}
