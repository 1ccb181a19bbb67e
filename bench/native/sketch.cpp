// What the sketch is held against: reading the parameters once for a sum of squares, as fast as this machine can, and
// the textbook CountSketch, which hashes and scatters every element by itself. Built by bench/stream.py for the machine
// it runs on.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

float widen(float x) { return x; }
float widen(uint16_t bits) {  // bfloat16
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

template <class Run>
void on_threads(int64_t n, int threads, const Run& run) {
  std::vector<std::thread> pool;
  const int64_t share = (n / threads + 63) / 64 * 64;
  auto part = [&](int t) {
    run(t, t * share < n ? t * share : n, (t + 1) * share < n && t + 1 < threads ? (t + 1) * share : n);
  };
  for (int t = 1; t < threads; ++t) pool.emplace_back(part, t);
  part(0);
  for (auto& thread : pool) thread.join();
}

constexpr int kLanes = 64;
constexpr int64_t kRun = 65536;  // float32 sums are flushed to float64 after so many elements

template <class T>
double sum_run(const T* x, int64_t count) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) sums[j] += widen(x[i + j]) * widen(x[i + j]);
  double sum = 0;
  for (; i < count; ++i) sum += static_cast<double>(widen(x[i])) * widen(x[i]);
  for (int j = 0; j < kLanes; ++j) sum += sums[j];
  return sum;
}

template <class T>
double sum_squares(const T* x, int64_t begin, int64_t end) {
  double sum = 0;
  for (int64_t i = begin; i < end; i += kRun) sum += sum_run(x + i, end - i < kRun ? end - i : kRun);
  return sum;
}

template <class T>
double read_all(const T* x, int64_t n, int threads) {
  std::vector<double> sums(static_cast<size_t>(threads) * 8);
  on_threads(n, threads, [&](int t, int64_t begin, int64_t end) { sums[t * 8] = sum_squares(x, begin, end); });
  double sum = 0;
  for (double s : sums) sum += s;
  return sum;
}

template <class T>
void scatter(const T* x, int64_t begin, int64_t end, uint32_t seed, int64_t buckets, double* y) {
  constexpr int kBlock = 256;  // the hashes of a block are vectors; what follows cannot be
  uint32_t hashes[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int count = end - i < kBlock ? static_cast<int>(end - i) : kBlock;
    for (int j = 0; j < count; ++j) {
      uint32_t h = static_cast<uint32_t>(i + j) ^ seed;
      h = (h ^ h >> 16) * 0x85ebca6bu;
      h = (h ^ h >> 13) * 0xc2b2ae35u;
      hashes[j] = h ^ h >> 16;
    }
    for (int j = 0; j < count; ++j) {
      const double sign = 1 - 2 * static_cast<double>(hashes[j] >> 31);  // a branch would be mispredicted half the time
      y[hashes[j] & (buckets - 1)] += sign * widen(x[i + j]);
    }
  }
}

template <class T>
void scatter_all(const T* x, int64_t n, uint32_t seed, int64_t buckets, double* y, int threads) {
  std::vector<double> parts(static_cast<size_t>(threads * buckets));
  on_threads(n, threads, [&](int t, int64_t begin, int64_t end) {
    scatter(x, begin, end, seed, buckets, parts.data() + t * buckets);
  });
  for (int64_t b = 0; b < buckets; ++b) {
    y[b] = 0;
    for (int t = 0; t < threads; ++t) y[b] += parts[static_cast<size_t>(t * buckets + b)];
  }
}

}  // namespace

extern "C" {
double read_float32(const float* x, int64_t n, int threads) { return read_all(x, n, threads); }
double read_bfloat16(const uint16_t* x, int64_t n, int threads) { return read_all(x, n, threads); }
void scatter_float32(const float* x, int64_t n, uint32_t seed, int64_t buckets, double* y, int threads) {
  scatter_all(x, n, seed, buckets, y, threads);
}
void scatter_bfloat16(const uint16_t* x, int64_t n, uint32_t seed, int64_t buckets, double* y, int threads) {
  scatter_all(x, n, seed, buckets, y, threads);
}
}
