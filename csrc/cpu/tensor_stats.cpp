// Statistics of a run of elements in one reading of memory. Built once per instruction set.
// A block of elements stays in the first cache for three passes: over the bits, for extremes, zeros and bins; over the
// values, for the mean; over the deviations from that mean, for their powers. Blocks are merged by Pebay's formulas. A
// mean that were carried along from element to element would take a division each; power sums about one point for the
// whole run would cancel where the mean moves. All in float64, multiplied then added, in 16 lanes that are added in a
// fixed order: every instruction set gives the same bits, and the sums of powers have an error of 1e-13 of what they
// would be without signs.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

constexpr int64_t kBlock = 1024;          // elements, 4 KiB of float32; a multiple of 16
constexpr int64_t kSeveralTables = 4096;  // from so many elements on
constexpr int kTables = 4;                // histograms, so that neighbours of one bin do not wait for each other

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Unsigned = uint32_t;
  using Signed = int32_t;
  static constexpr uint32_t kInfinity = 0x7f800000u;
};
template <>
struct Bits<double> {
  using Unsigned = uint64_t;
  using Signed = int64_t;
  static constexpr uint64_t kInfinity = 0x7ff0000000000000u;
};

// Of a block. Keys order floating numbers as integers, for which compilers have vector instructions on every
// instruction set, and which no NaN disturbs.
template <class T>
struct Look {
  typename Bits<T>::Signed least, greatest;
  int64_t zeros, nonfinite;
};

template <class T>
LIPCORE_INLINE Look<T> look(const T* x, int64_t count, uint16_t* bins) {
  using U = typename Bits<T>::Unsigned;
  using S = typename Bits<T>::Signed;
  constexpr U kMagnitude = ~U{0} >> 1;
  constexpr int kSign = 8 * sizeof(T) - 1;
  S least = static_cast<S>(kMagnitude), greatest = -static_cast<S>(kMagnitude) - 1;
  U zeros = 0, nonfinite = 0;
  for (int64_t i = 0; i < count; ++i) {
    U bits;
    memcpy(&bits, x + i, sizeof bits);
    const U size = bits & kMagnitude;
    const S key = static_cast<S>(bits) ^ static_cast<S>(static_cast<U>(static_cast<S>(bits) >> kSign) & kMagnitude);
    least = key < least ? key : least;
    greatest = key > greatest ? key : greatest;
    zeros += size == 0;
    nonfinite += size >= Bits<T>::kInfinity;
    bins[i] = static_cast<uint16_t>(tensor_bin_of(x[i]));
  }
  return {least, greatest, static_cast<int64_t>(zeros), static_cast<int64_t>(nonfinite)};
}

template <class T>
LIPCORE_INLINE double value_of_key(typename Bits<T>::Signed key) {
  using U = typename Bits<T>::Unsigned;
  using S = typename Bits<T>::Signed;
  const U bits = static_cast<U>(key) ^ (static_cast<U>(key >> (8 * sizeof(T) - 1)) & (~U{0} >> 1));
  T value;
  memcpy(&value, &bits, sizeof value);
  static_assert(sizeof(U) == sizeof(S) && sizeof(U) == sizeof(T));
  return static_cast<double>(value) + 0.0;  // -0 becomes 0: which of them it is depends on their order
}

LIPCORE_INLINE F64x16 wide(const float* x) { return widen(load(x)); }
LIPCORE_INLINE F64x16 wide(const double* x) { return load(x); }

// The last elements, fewer than 16, go into sums of their own.
template <class T>
LIPCORE_INLINE double sum_of(const T* x, int64_t count) {
  F64x16 a = f64(0), b = f64(0);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    a = a + wide(x + i);
    b = b + wide(x + i + 16);
  }
  if (i + 16 <= count) {
    a = a + wide(x + i);
    i += 16;
  }
  double rest = 0;
  for (; i < count; ++i) rest += static_cast<double>(x[i]);
  return sum_lanes(a + b) + rest;
}

template <class T>
LIPCORE_INLINE void add_powers(const T* x, int64_t count, TensorStats* stats) {
  const F64x16 mean = f64(stats->mean);
  F64x16 m2 = f64(0), m3 = f64(0), m4 = f64(0);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const F64x16 d = wide(x + i) - mean, square = d * d;
    m2 = m2 + square;
    m3 = m3 + square * d;
    m4 = m4 + square * square;
  }
  double rest2 = 0, rest3 = 0, rest4 = 0;
  for (; i < count; ++i) {
    const double d = static_cast<double>(x[i]) - stats->mean, square = d * d;
    rest2 += square;
    rest3 += square * d;
    rest4 += square * square;
  }
  stats->m2 = sum_lanes(m2) + rest2;
  stats->m3 = sum_lanes(m3) + rest3;
  stats->m4 = sum_lanes(m4) + rest4;
}

// The finite elements of a block, moved together. Rare, so plain.
template <class T>
LIPCORE_OUTLINE int64_t keep_finite(const T* x, int64_t count, T* kept) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    typename Bits<T>::Unsigned bits;
    memcpy(&bits, x + i, sizeof bits);
    if ((bits & (~decltype(bits){0} >> 1)) < Bits<T>::kInfinity) kept[found++] = x[i];
  }
  return found;
}

struct Histogram {
  uint32_t* tables;  // [several ? kTables : 1][kTensorBins]
  bool several;

  LIPCORE_MEMBER void add(const uint16_t* bins, int64_t count) {
    int64_t i = 0;
    if (several) {
      for (; i + kTables <= count; i += kTables)
        for (int k = 0; k < kTables; ++k) ++tables[k * kTensorBins + bins[i + k]];
    }
    for (; i < count; ++i) ++tables[bins[i]];
  }
};

// count <= kBlock
template <class T>
LIPCORE_INLINE void observe_block(const T* x, int64_t count, Histogram* histogram, TensorStats* stats) {
  alignas(64) uint16_t bins[kBlock];
  alignas(64) T kept[kBlock];
  Look<T> seen = look(x, count, bins);
  if (seen.nonfinite) {
    stats->nonfinite += static_cast<double>(seen.nonfinite);
    count = keep_finite(x, count, kept);
    if (count == 0) return;
    x = kept;
    seen = look(x, count, bins);
  }
  histogram->add(bins, count);
  TensorStats block{};
  block.count = static_cast<double>(count);
  block.zeros = static_cast<double>(seen.zeros);
  block.min = value_of_key<T>(seen.least);
  block.max = value_of_key<T>(seen.greatest);
  // Elements that are all the same have no deviation, whatever rounding would say.
  if (block.min == block.max) {
    block.mean = block.min;
  } else {
    block.mean = sum_of(x, count) / block.count;
    add_powers(x, count, &block);
  }
  merge(stats, block);
}

template <class E>
LIPCORE_OUTLINE void observe_run(const void* data, int64_t count, Histogram histogram, TensorStats* stats) {
  using Stored = typename E::Stored;
  using T = typename E::Mean;
  const auto* x = static_cast<const Stored*>(data);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    if constexpr (sizeof(Stored) == sizeof(T)) {
      observe_block<T>(reinterpret_cast<const T*>(x + begin), size, &histogram, stats);
    } else {
      alignas(64) T wide[kBlock];
      int64_t i = 0;
      for (; i + 16 <= size; i += 16) store(wide + i, E::read(x + begin + i));
      if (i < size) {
        Stored last[16] = {};
        memcpy(last, x + begin + i, static_cast<size_t>(size - i) * sizeof *x);
        store(wide + i, E::read(last));
      }
      observe_block<T>(wide, size, &histogram, stats);
    }
  }
}

void chunk(const void* x, DType dtype, int64_t count, TensorStats* out, uint32_t* bins) {
  TensorStats stats{};
  alignas(64) uint32_t tables[kTables * kTensorBins];
  Histogram histogram{bins, count >= kSeveralTables};
  if (histogram.several) {
    memset(tables, 0, sizeof tables);
    histogram.tables = tables;
  }
  with_dtype(dtype, [&](auto element) { observe_run<decltype(element)>(x, count, histogram, &stats); });
  for (int i = 0; histogram.several && i < kTensorBins; ++i)
    for (int k = 0; k < kTables; ++k) bins[i] += tables[k * kTensorBins + i];
  *out = stats;
}

}  // namespace

extern const TensorStatsKernels tensor_stats;
const TensorStatsKernels tensor_stats = {&chunk};

}  // namespace lipcore::LIPCORE_ISA
