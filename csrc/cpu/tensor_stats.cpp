// Statistics of a run of elements in one reading of memory. Built once per instruction set.
// A block of elements stays in the first cache for some passes: over the bits, for extremes; over the values, for the
// mean; over the deviations from that mean, for their powers, while bins are counted. Blocks are merged by Pebay's
// formulas. A mean that were carried along from element to element would take a division each; power sums about one
// point for the whole run would cancel where the mean moves. All in float64, multiplied then added, in 16 lanes that
// are added in a fixed order: every instruction set gives the same bits, and the sums of powers have an error of 1e-13
// of what they would be without signs.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

constexpr int64_t kBlock = 1024;      // elements, 4 KiB of float32; a multiple of 16
constexpr int64_t kPairsFrom = 8192;  // elements of a run for which a table of pairs pays

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

template <class T>
LIPCORE_INLINE typename Bits<T>::Unsigned bits_of(T x) {
  typename Bits<T>::Unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class T>
LIPCORE_INLINE T from_bits(typename Bits<T>::Unsigned bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Of a block that is not empty: bits of its extremes, and of their magnitudes.
template <class T>
struct Look {
  typename Bits<T>::Unsigned least, greatest, smallest, largest;
};

// As integers, for which compilers have vector instructions on every instruction set, which no NaN disturbs and no mode
// of the processor takes for 0. Positive numbers are in the order of their bits; of negative ones, which follow behind
// the sign, larger bits are the lower number.
template <class T>
LIPCORE_INLINE Look<T> look(const T* x, int64_t count) {
  using U = typename Bits<T>::Unsigned;
  using S = typename Bits<T>::Signed;
  constexpr U kMagnitude = ~U{0} >> 1;
  U first = ~U{0}, last = 0;
  S first_signed = static_cast<S>(kMagnitude), last_signed = -static_cast<S>(kMagnitude) - 1;
  for (int64_t i = 0; i < count; ++i) {
    const U bits = bits_of(x[i]);
    const S key = static_cast<S>(bits);
    first = bits < first ? bits : first;
    last = bits > last ? bits : last;
    first_signed = key < first_signed ? key : first_signed;
    last_signed = key > last_signed ? key : last_signed;
  }
  const bool negative = last > kMagnitude, positive = last_signed >= 0;               // whether there are any
  const U near = static_cast<U>(first_signed) & kMagnitude, far = last & kMagnitude;  // of negative ones
  const U most = static_cast<U>(last_signed);
  Look<T> seen;
  seen.least = negative ? last : first;
  seen.greatest = positive ? most : static_cast<U>(first_signed);
  seen.smallest = !negative || (positive && first < near) ? first : near;
  seen.largest = !negative || (positive && most > far) ? most : far;
  return seen;
}

template <class T>
LIPCORE_INLINE double value_of(typename Bits<T>::Unsigned bits) {
  return static_cast<double>(from_bits<T>(bits)) + 0.0;  // -0 becomes 0: which of them it is depends on their order
}

// The last elements, fewer than 16, go into sums of their own.
template <class T>
LIPCORE_INLINE double sum_of(const T* x, int64_t count) {
  F64x16 a = f64(0), b = f64(0);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    a = a + load_wide(x + i);
    b = b + load_wide(x + i + 16);
  }
  if (i + 16 <= count) {
    a = a + load_wide(x + i);
    i += 16;
  }
  double rest = 0;
  for (; i < count; ++i) rest += static_cast<double>(x[i]);
  return sum_lanes(a + b) + rest;
}

// Counts pairs of elements by both their bins at once, in a window of bins: half as many additions to memory, which are
// what a histogram takes, and few of them to what was added to just before.
constexpr int kSideBits = 7, kSide = 1 << kSideBits;  // bins of the window: 16 powers of two
constexpr int kHeadroom = 8;                          // bins above the first block's largest element
constexpr int kSlack = 40;                            // bins by which a block may stay below the window's top
constexpr int kMisfits = 4;                           // blocks outside of the window before it is moved
constexpr int kMoves = 2;                             // of the window in a run: what spreads further is counted singly
constexpr int kMostLow = 256;                         // elements of a run below the window, likewise
static_assert(kChunk / 2 <= UINT16_MAX, "pairs of a run in an element of the table");

struct PairTable {
  alignas(64) uint16_t counts[kSide * kSide];
};

struct Histogram {
  uint32_t* bins;    // [kTensorBins]
  PairTable* table;  // null for short runs
  int base = 0;      // bin that stands for itself and all below it; the window's others follow
  int misfits = 0;   // blocks since the window was set
  int moves = 0;
  int64_t low = 0;
  bool used = false;  // the table has counts

  // Whether a block with this largest bin is counted by pairs. The window moves for it where it must.
  LIPCORE_MEMBER bool takes(int largest) {
    if (!table) return false;
    const int top = base + kSide - 1;
    if (used && (largest > top || (base && largest + kSlack < top))) {
      if (++misfits < kMisfits) return false;
      unfold();
      if (++moves > kMoves) table = nullptr;
      if (!table) return false;
    }
    if (!used) {
      memset(table, 0, sizeof *table);
      base = largest + kHeadroom - kSide + 1;
      base = base < 0 ? 0 : base > kTensorBins - kSide ? kTensorBins - kSide : base;
      misfits = 0;
      used = true;
    }
    return true;
  }

  // Takes note of elements that were too low for it.
  LIPCORE_MEMBER void heed(int64_t found) {
    low += found;
    if (low <= kMostLow) return;
    unfold();
    table = nullptr;
  }

  // Adds what the table has to the bins; all but what its first row and column stand for.
  LIPCORE_MEMBER void unfold() {
    if (!used) return;
    used = false;
    uint32_t columns[kSide] = {};
    for (int row = 0; row < kSide; ++row) {
      const uint16_t* counts = table->counts + row * kSide;
      uint32_t total = 0;
      for (int column = 0; column < kSide; ++column) {
        total += counts[column];
        columns[column] += counts[column];
      }
      if (row) bins[base + row] += total;
    }
    for (int column = 1; column < kSide; ++column) bins[base + column] += columns[column];
  }
};

// Where the pairs of elements i and half + i are in the table.
template <class T>
LIPCORE_INLINE void find_pairs(const T* x, int64_t half, int base, uint32_t* places) {
  const auto low = static_cast<uint32_t>(base);
  for (int64_t i = 0; i < half; ++i) {
    const auto a = static_cast<uint32_t>(tensor_bin_of(x[i])), b = static_cast<uint32_t>(tensor_bin_of(x[half + i]));
    places[i] = ((a > low ? a : low) << kSideBits) + (b > low ? b : low) - low * (kSide + 1);
  }
}

// Powers of deviations from the mean; and, while vectors wait for nothing, counts pairs, half as many as elements.
template <bool kPairs, class T>
LIPCORE_INLINE void add_powers(const T* x, int64_t count, TensorStats* stats, const uint32_t* places = nullptr,
                               uint16_t* counts = nullptr) {
  const F64x16 mean = f64(stats->mean);
  F64x16 m2 = f64(0), m3 = f64(0), m4 = f64(0);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const F64x16 d = load_wide(x + i) - mean, square = d * d;
    m2 = m2 + square;
    m3 = m3 + square * d;
    m4 = m4 + square * square;
    if constexpr (kPairs)
      for (int64_t k = i / 2; k < i / 2 + 8; ++k) ++counts[places[k]];
  }
  if constexpr (kPairs)
    for (int64_t k = i / 2; k < count / 2; ++k) ++counts[places[k]];
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
  for (int64_t i = 0; i < count; ++i)
    if ((bits_of(x[i]) & (~typename Bits<T>::Unsigned{0} >> 1)) < Bits<T>::kInfinity) kept[found++] = x[i];
  return found;
}

// Elements whose bin is `base` or below, and those that are 0.
struct Low {
  int64_t all, zeros;
};
template <class T>
LIPCORE_INLINE Low count_low(const T* x, int64_t count, int base) {
  typename Bits<T>::Unsigned all = 0, zeros = 0;
  for (int64_t i = 0; i < count; ++i) {
    all += tensor_bin_of(x[i]) <= base;
    zeros += (bits_of(x[i]) << 1) == 0;
  }
  return {static_cast<int64_t>(all), static_cast<int64_t>(zeros)};
}

// Counts elements that are not zero with bins up to `base`. Few, in few groups.
template <class T>
LIPCORE_OUTLINE void add_low(const T* x, int64_t count, int base, uint32_t* bins) {
  constexpr int64_t kGroup = 64;
  const auto is_low = [&](T value) {
    return static_cast<int>(tensor_bin_of(value) <= base) & static_cast<int>((bits_of(value) << 1) != 0);
  };
  for (int64_t i = 0; i < count; i += kGroup) {
    const int64_t end = i + kGroup < count ? i + kGroup : count;
    int any = 0;
    for (int64_t k = i; k < end; ++k) any |= is_low(x[k]);
    if (!any) continue;
    for (int64_t k = i; k < end; ++k)
      if (is_low(x[k])) ++bins[tensor_bin_of(x[k])];
  }
}

// Counts one element after the other; zeros, which may be many, in turn at places that no finite element has.
template <class T>
LIPCORE_INLINE void add_singly(const T* x, int64_t count, uint32_t* bins, uint32_t* places) {
  constexpr uint32_t kTurns = 4, kSpare = kTensorBins - kTurns;
  static_assert(kSpare > Bits<float>::kInfinity >> kTensorBinShift, "no element's bins");
  for (int64_t i = 0; i < count; ++i) {
    const auto bin = static_cast<uint32_t>(tensor_bin_of(x[i])), turn = kSpare + static_cast<uint32_t>(i) % kTurns;
    places[i] = (bits_of(x[i]) << 1) == 0 ? turn : bin;
  }
  for (int64_t i = 0; i < count; ++i) ++bins[places[i]];
  for (uint32_t k = kSpare; k < kSpare + kTurns; ++k) {
    bins[0] += bins[k];
    bins[k] = 0;
  }
}

// count <= kBlock. Outside of its callers, of which three share one.
template <class T>
LIPCORE_OUTLINE void observe_block(const T* x, int64_t count, Histogram* histogram, TensorStats* stats) {
  alignas(64) uint32_t places[kBlock];
  alignas(64) T kept[kBlock];
  Look<T> seen = look(x, count);
  if (seen.largest >= Bits<T>::kInfinity) {
    const int64_t finite = keep_finite(x, count, kept);
    stats->nonfinite += static_cast<double>(count - finite);
    if (finite == 0) return;
    count = finite;
    x = kept;
    seen = look(x, count);
  }
  const int smallest = tensor_bin_of(from_bits<T>(seen.smallest)), largest = tensor_bin_of(from_bits<T>(seen.largest));
  uint32_t* bins = histogram->bins;
  TensorStats block{};
  block.count = static_cast<double>(count);
  block.min = value_of<T>(seen.least);
  block.max = value_of<T>(seen.greatest);
  // Elements that are all the same have no deviation, whatever rounding would say.
  if (seen.largest == 0 || seen.least == seen.greatest) {
    block.mean = block.min;
    block.zeros = seen.largest == 0 ? block.count : 0;
    bins[largest] += static_cast<uint32_t>(count);
  } else {
    block.mean = sum_of(x, count) / block.count;
    const bool by_pairs = histogram->takes(largest);
    const int base = by_pairs ? histogram->base : -1;
    Low low{0, 0};
    if (smallest <= base || seen.smallest == 0) low = count_low(x, count, base);
    block.zeros = static_cast<double>(low.zeros);
    if (by_pairs) {
      find_pairs(x, count / 2, base, places);
      add_powers<true>(x, count, &block, places, histogram->table->counts);
      const int last = tensor_bin_of(x[count - 1]);
      if (count % 2 && last > base) ++bins[last];
      bins[0] += static_cast<uint32_t>(low.zeros);
      if (low.all > low.zeros) {
        add_low(x, count, base, bins);
        histogram->heed(low.all - low.zeros);
      }
    } else {
      add_singly(x, count, bins, places);
      add_powers<false>(x, count, &block);
    }
  }
  merge(stats, block);
}

template <class E>
LIPCORE_OUTLINE void observe_run(const void* data, int64_t count, Histogram* histogram, TensorStats* stats) {
  using Stored = typename E::Stored;
  using T = typename E::Mean;
  const auto* x = static_cast<const Stored*>(data);
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    if constexpr (sizeof(Stored) == sizeof(T)) {
      observe_block<T>(reinterpret_cast<const T*>(x + begin), size, histogram, stats);
    } else {
      alignas(64) T wide[kBlock];
      int64_t i = 0;
      for (; i + 16 <= size; i += 16) store(wide + i, E::read(x + begin + i));
      if (i < size) {
        Stored last[16] = {};
        memcpy(last, x + begin + i, static_cast<size_t>(size - i) * sizeof *x);
        store(wide + i, E::read(last));
      }
      observe_block<T>(wide, size, histogram, stats);
    }
  }
}

void chunk(const void* x, DType dtype, int64_t count, TensorStats* out, uint32_t* bins) {
  TensorStats stats{};
  PairTable table;
  Histogram histogram{bins, count >= kPairsFrom ? &table : nullptr};
  with_dtype(dtype, [&](auto element) { observe_run<decltype(element)>(x, count, &histogram, &stats); });
  histogram.unfold();
  *out = stats;
}

}  // namespace

extern const TensorStatsKernels tensor_stats;
const TensorStatsKernels tensor_stats = {&chunk};

}  // namespace lipcore::LIPCORE_ISA
