// The memory limit for a kernel with the trajectory step's traffic: four streams read, two of them written in place,
// nothing computed but one addition each. Built by bench/stream.py for the machine it runs on.
#include <cstdint>
#include <thread>
#include <vector>

namespace {
void run(const float* w, float* prev, const float* ref, float* mean, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float x = w[i] + ref[i];
    mean[i] += prev[i];
    prev[i] = x;
  }
}
}  // namespace

extern "C" void stream_4r2w(const float* w, float* prev, const float* ref, float* mean, int64_t n, int threads) {
  std::vector<std::thread> pool;
  const int64_t share = (n + threads - 1) / threads;
  for (int t = 1; t < threads; ++t)
    pool.emplace_back(run, w, prev, ref, mean, t * share, (t + 1) * share < n ? (t + 1) * share : n);
  run(w, prev, ref, mean, 0, share < n ? share : n);
  for (auto& thread : pool) thread.join();
}
