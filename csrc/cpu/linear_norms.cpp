// Blocks of per-sample weight gradients of Linear layers and of Gram matrices of their tokens. Built once per
// instruction set. Products and the sums along tokens or features are float32 (float64 for float64 input and for
// samples that need it), fused; squares are summed in float64 after each tile. Error of a squared norm: about
// 1e-7 sqrt(T), in the Gram form divided by its cancellation ratio.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"

#include "cpu/matrix_tile.h"

template <class T>
struct Scratch {
  T *a, *b, *first, *second;
  explicit Scratch(void* memory)
      : a(static_cast<T*>(memory)),
        b(a + kPadded * kDepth),
        first(b + kPadded * kDepth),
        second(first + kPadded * kPadded) {}
};
constexpr int64_t kScratchBytes = 8 * (2 * kPadded * kDepth + 2 * kPadded * kPadded);

template <class T, int kRows, int kVectors, class Lanes>
LIPCORE_INLINE F64x16 sum_squares_of(const Lanes (&c)[kRows][kVectors]) {
  Lanes sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = c[0][v] * c[0][v];
  for (int r = 1; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[v] = fma(c[r][v], c[r][v], sum[v]);
  F64x16 total = widened(sum[0]);
  for (int v = 1; v < kVectors; ++v) total = total + widened(sum[v]);
  return total;
}

// At the edge of a block zeros were packed, and 0 * infinity would turn a sample's infinite norm into NaN.
template <class T, int kRows, int kVectors, class Lanes>
LIPCORE_INLINE F64x16 sum_edge_squares(const Lanes (&c)[kRows][kVectors], int64_t rows, int64_t columns) {
  T tile[kRows * Tile<T>::kWidth];
  store_tile(tile, c);
  double lanes[16] = {};
  for (int64_t r = 0; r < rows && r < kRows; ++r)
    for (int64_t j = 0; j < columns && j < 16 * kVectors; ++j) {
      const double value = tile[r * Tile<T>::kWidth + j];
      lanes[j % 16] += value * value;
    }
  return load(lanes);
}

// Of a sample, from a token and a feature on.
LIPCORE_INLINE Rows input_rows(const LinearSample& s, int64_t token, int64_t feature) {
  return {s.x, s.dtype, token * s.x_stride + feature, s.x_stride, s.x_scale};
}
LIPCORE_INLINE Rows grad_rows(const LinearSample& s, int64_t token, int64_t feature) {
  return {s.grad, s.dtype, token * s.grad_stride + feature, s.grad_stride, s.grad_scale};
}

template <class T>
LIPCORE_INLINE double direct_of(const LinearSample& sample, const LinearBlock& block, void* memory) {
  constexpr int kRows = Tile<T>::kRows, kWidth = Tile<T>::kWidth;
  const Scratch<T> scratch(memory);
  F64x16 sum = f64(0);
  for (int64_t t = 0; t < sample.tokens; t += kDepth) {
    const int64_t steps = sample.tokens - t < kDepth ? sample.tokens - t : kDepth;
    const bool resume = t > 0, last = t + steps == sample.tokens;
    const Rows g = grad_rows(sample, t, block.row), x = input_rows(sample, t, block.column);
    pack_columns<T, kRows>(g, steps, block.rows, steps, 0, scratch.a);
    pack_columns<T, kWidth>(x, steps, block.columns, steps, 0, scratch.b);
    const Segment all{0, steps};
    multiply<T, kRows, kRows>(
        block.rows, block.columns, steps, &all, 1, scratch.a, scratch.b,
        [&](int64_t, int64_t j) { return block.columns - j; }, [&](int64_t, int64_t, int64_t, auto& c) { clear(c); },
        [&](int64_t i, int64_t j, int64_t, auto& c) {
          // Sums of panels are added up, which rounds less than one long sum.
          if (resume) add_tile(tile_at<T, kRows>(scratch.first, block.rows, i, j), c);
          if (!last) {
            store_tile(tile_at<T, kRows>(scratch.first, block.rows, i, j), c);
          } else if (sizeof(T) == 4 || (i + kRows <= block.rows && j + kWidth <= block.columns)) {
            sum = sum + sum_squares_of<T>(c);
          } else {
            sum = sum + sum_edge_squares<T>(c, block.rows - i, block.columns - j);
          }
        });
  }
  return sum_lanes(sum);
}

double direct(const LinearSample& sample, const LinearBlock& block, void* scratch) {
  return sample.in_float64 ? direct_of<double>(sample, block, scratch) : direct_of<float>(sample, block, scratch);
}

// Weight of element (row i, column j) of a lower triangle that counts twice: ramp[kRamp + j - i].
constexpr int kRamp = 256 + 64;
template <class T>
struct Ramps {
  T weight[2 * kRamp], diagonal[2 * kRamp];
};
template <class T>
constexpr Ramps<T> make_ramps() {
  Ramps<T> ramps{};
  for (int i = 0; i < 2 * kRamp; ++i) {
    ramps.weight[i] = i < kRamp ? T(2) : i == kRamp ? T(1) : T(0);
    ramps.diagonal[i] = i == kRamp ? T(1) : T(0);
  }
  return ramps;
}
template <class T>
constexpr Ramps<T> kRamps = make_ramps<T>();

template <class T>
LIPCORE_INLINE void gram_of(const LinearSample& sample, const LinearBlock& block, void* memory, GramSums* sums) {
  using Lanes = typename Tile<T>::Lanes;
  constexpr int kRows = Tile<T>::kSharedRows, kWidth = Tile<T>::kWidth;
  const Scratch<T> scratch(memory);
  const bool diagonal = block.row == block.column;
  F64x16 total = f64(0), both = f64(0), x_diagonal = f64(0), grad_diagonal = f64(0);
  for (int operand = 0; operand < 2; ++operand) {
    const int64_t features = operand ? block.outputs : block.inputs;
    T* sums_of = operand ? scratch.second : scratch.first;
    for (int64_t f = 0; f < features; f += kDepth) {
      const int64_t steps = features - f < kDepth ? features - f : kDepth;
      const bool resume = f > 0, last = f + steps == features;
      const auto pack = [&](int64_t token, int64_t count, T* to) {
        pack_rows<T, kWidth>(operand ? grad_rows(sample, token, f) : input_rows(sample, token, f), steps, count, to);
      };
      pack(block.row, block.rows, scratch.a);
      if (!diagonal) pack(block.column, block.columns, scratch.b);
      const Segment all{0, steps};
      multiply<T, kWidth, kRows>(
          block.rows, block.columns, steps, &all, 1, scratch.a, diagonal ? scratch.a : scratch.b,
          [&](int64_t i, int64_t j) {
            return diagonal && i + kRows - j < block.columns - j ? i + kRows - j : block.columns - j;
          },
          [&](int64_t i, int64_t j, int64_t, auto& c) {
            if (resume) {
              load_tile(tile_at<T, kRows>(sums_of, block.rows, i, j), c);
            } else {
              clear(c);
            }
          },
          [&](int64_t i, int64_t j, int64_t, auto& c) {
            constexpr int kVectors = sizeof c[0] / sizeof(Lanes);
            T* tile = tile_at<T, kRows>(scratch.first, block.rows, i, j);
            if (!last || !operand) return store_tile(operand ? tile_at<T, kRows>(sums_of, block.rows, i, j) : tile, c);
            Lanes sum[kVectors] = {};
            if (!diagonal || i >= j + kWidth) {
              for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kVectors; ++v) sum[v] = fma(c[r][v], load(tile + r * kWidth + 16 * v), sum[v]);
              for (int v = 0; v < kVectors; ++v) total = total + (widened(sum[v]) + widened(sum[v]));
              return;
            }
            Lanes product[kVectors] = {}, of_x[kVectors] = {}, of_grad[kVectors] = {};
            for (int r = 0; r < kRows; ++r)
              for (int v = 0; v < kVectors; ++v) {
                const int64_t at = kRamp + j - i - r + 16 * v;
                const Lanes k = load(tile + r * kWidth + 16 * v), on = load(kRamps<T>.diagonal + at);
                sum[v] = fma(c[r][v] * k, load(kRamps<T>.weight + at), sum[v]);
                product[v] = fma(c[r][v] * k, on, product[v]);
                of_x[v] = fma(k, on, of_x[v]);
                of_grad[v] = fma(c[r][v], on, of_grad[v]);
              }
            for (int v = 0; v < kVectors; ++v) {
              total = total + widened(sum[v]);
              both = both + widened(product[v]);
              x_diagonal = x_diagonal + widened(of_x[v]);
              grad_diagonal = grad_diagonal + widened(of_grad[v]);
            }
          });
    }
  }
  *sums = {sum_lanes(total), sum_lanes(both), sum_lanes(x_diagonal), sum_lanes(grad_diagonal)};
}

#if defined(__AVX512F__)
#include "cpu/row_dots.h"

// The same for a whole sample, by all_dots().
LIPCORE_INLINE void gram_of_rows(const LinearSample& sample, const LinearBlock& block, void* memory, GramSums* sums) {
  const Scratch<float> scratch(memory);
  all_dots(static_cast<const float*>(sample.x), sample.x_stride, block.rows, block.inputs, scratch.a, scratch.first);
  all_dots(static_cast<const float*>(sample.grad), sample.grad_stride, block.rows, block.outputs, scratch.a,
           scratch.second);
  *sums = sum_dots(scratch.first, scratch.second, block.rows);
}
#endif

void gram(const LinearSample& sample, const LinearBlock& block, void* scratch, GramSums* sums) {
#if defined(__AVX512F__)
  if (!sample.in_float64 && sample.dtype == DType::kFloat32 && sample.tokens <= kDotRows)
    return gram_of_rows(sample, block, scratch, sums);
#endif
  if (sample.in_float64) return gram_of<double>(sample, block, scratch, sums);
  gram_of<float>(sample, block, scratch, sums);
}

// Whole samples are packed together as long as they fit, so that the block's running total is touched while it is in
// the first-level cache; a longer sample goes by kDepth tokens at a time.
template <class T>
LIPCORE_INLINE void weight_grad_of(const LinearSample* samples, int64_t count, const LinearBlock& block, void* memory,
                                   void* out, double* norms, int64_t norms_stride) {
  constexpr int kRows = Tile<T>::kRows, kWidth = Tile<T>::kWidth;
  const Scratch<T> scratch(memory);
  bool empty = true;  // no sample is in the running total yet
  Segment segments[kDepth];
  F64x16 sums[kDepth];
  int64_t owners[kDepth];
  int64_t token = 0;  // of samples[s], the next to pack
  for (int64_t s = 0; s < count;) {
    int64_t packed = 0, parts = 0;
    bool last = true;
    const bool resume = token > 0;
    const auto room = [&](int64_t steps) { return !packed || packed + steps <= kDepth; };
    while (s < count && last && parts < kDepth && room(samples[s].tokens - token) && !(resume && packed)) {
      const int64_t left = samples[s].tokens - token, steps = left < kDepth ? left : kDepth;
      segments[parts] = {packed, steps};
      sums[parts] = f64(0);
      owners[parts++] = s;
      packed += steps;
      last = steps == left;
      token = last ? 0 : token + steps;
      s += last;
    }
    for (int64_t p = 0; p < parts; ++p) {
      const LinearSample& sample = samples[owners[p]];
      const int64_t from = last ? (resume ? sample.tokens - segments[p].count : 0) : token - segments[p].count;
      const Rows g = grad_rows(sample, from, block.row), x = input_rows(sample, from, block.column);
      pack_columns<T, kRows>(g, segments[p].count, block.rows, packed, segments[p].begin, scratch.a);
      pack_columns<T, kWidth>(x, segments[p].count, block.columns, packed, segments[p].begin, scratch.b);
    }
    multiply<T, kRows, kRows>(
        block.rows, block.columns, packed, segments, parts, scratch.a, scratch.b,
        [&](int64_t, int64_t j) { return block.columns - j; }, [&](int64_t, int64_t, int64_t, auto& c) { clear(c); },
        [&](int64_t i, int64_t j, int64_t p, auto& c) {
          // Sums of panels are added up, which rounds less than one long sum.
          if (resume) add_tile(tile_at<T, kRows>(scratch.first, block.rows, i, j), c);
          if (!last) return store_tile(tile_at<T, kRows>(scratch.first, block.rows, i, j), c);
          sums[p] = sums[p] + sum_squares_of<T>(c);
          T* tile = tile_at<T, kRows>(scratch.second, block.rows, i, j);
          if (!empty || p > 0) add_tile(tile, c);
          store_tile(tile, c);
        });
    if (!last) continue;
    for (int64_t p = 0; p < parts; ++p) norms[owners[p] * norms_stride] = sum_lanes(sums[p]);
    empty = false;
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    T* row = static_cast<T*>(out) + (block.row + i) * block.inputs + block.column;
    for (int64_t j = 0; j < block.columns; j += kWidth) {
      const T* from = tile_at<T, kRows>(scratch.second, block.rows, i, j) + i % kRows * kWidth;
      if (block.columns - j >= kWidth) {  // of a constant size, no call
        memcpy(row + j, from, sizeof(T) * kWidth);
      } else {
        memcpy(row + j, from, sizeof(T) * static_cast<size_t>(block.columns - j));
      }
    }
  }
}

void weight_grad(const LinearSample* samples, int64_t count, const LinearBlock& block, void* scratch, void* out,
                 double* norms, int64_t norms_stride) {
  if (samples[0].in_float64) return weight_grad_of<double>(samples, count, block, scratch, out, norms, norms_stride);
  weight_grad_of<float>(samples, count, block, scratch, out, norms, norms_stride);
}

// On the bits, where NaN and infinity are larger than every number.
double largest(const void* rows, DType dtype, int64_t stride, int64_t count, int64_t length) {
  double found = 0;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < length; i += 256) {
      double values[256];
      const int64_t run = length - i < 256 ? length - i : 256;
      read_rows({rows, dtype, r * stride + i, stride, 1}, 0, 1, run, values, run);
      for (int64_t k = 0; k < run; ++k) {
        const double magnitude = values[k] < 0 ? -values[k] : values[k];
        found = found >= magnitude ? found : magnitude;
        if (found != found) return found;
      }
    }
  }
  return found;
}

}  // namespace

extern const LinearNormsKernels linear_norms;
const LinearNormsKernels linear_norms = {kBlock, kScratchBytes, &direct, &gram, &weight_grad, &largest};

}  // namespace lipcore::LIPCORE_ISA
