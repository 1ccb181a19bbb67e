// The arithmetic limit: fused multiply-adds of float32 vectors on registers, with as many independent sums as hide
// their latency. Built by bench/stream.py for the machine it runs on.
#include <cstdint>
#include <thread>
#include <vector>

namespace {
typedef float Vector __attribute__((vector_size(64)));

float run(int64_t rounds) {
  constexpr int kSums = 24;  // with a factor and a term within the 32 registers of AVX-512
  Vector sums[kSums], factor, term;
  for (int lane = 0; lane < 16; ++lane) {
    factor[lane] = 0.999999f;
    term[lane] = 1e-6f * static_cast<float>(lane);
  }
  for (auto& sum : sums) sum = factor;
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24  // else the sums are kept in memory
    for (int k = 0; k < kSums; ++k) sums[k] = sums[k] * factor + term;
  float total = 0;
  for (auto& sum : sums) total += sum[0] + sum[15];
  return total;
}
}  // namespace

// Multiplications and additions done: 2 * 16 * 24 a round and thread.
extern "C" double fma_rounds(int64_t rounds, int threads) {
  std::vector<std::thread> pool;
  std::vector<float> sums(static_cast<size_t>(threads) * 16);
  for (int t = 1; t < threads; ++t) pool.emplace_back([&, t] { sums[static_cast<size_t>(t) * 16] = run(rounds); });
  sums[0] = run(rounds);
  for (auto& thread : pool) thread.join();
  return static_cast<double>(sums[0]) * 0 + 2.0 * 16 * 24 * static_cast<double>(rounds) * threads;
}
