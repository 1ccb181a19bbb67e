// Sums of one optimizer step's update of a run of a parameter, from the parameter and the optimizer's state: up to
// three streams read, none written. Built once per instruction set. The update in float32 lanes (float64 as soon as one
// of the tensors is float64), every square and sum in float64, in 16 lanes that are added in a fixed order: error of a
// sum <= 1e-6 of what its terms would be without their signs, 1e-14 in float64.
#include "cpu/isa.h"

namespace lipcore::LIPCORE_ISA {
namespace {

#include "cpu/simd.h"
#include "cpu/simd_division.h"

constexpr int64_t kPrefetch = 512;  // elements ahead
constexpr int64_t kBlock = 512;     // elements widened at a time where dtypes differ; a multiple of 16

using Float32 = Element<DType::kFloat32>;
using Float64 = Element<DType::kFloat64>;

template <class E>
UpdateCoefficients<typename E::Lanes> coefficients(const UpdateScalars& s) {
  return {E::set(s.rate), E::set(s.mix), E::set(s.decay), E::set(s.first_scale), E::set(s.second_scale), E::set(s.eps)};
}

constexpr bool reads_first(UpdateForm form) { return form != UpdateForm::kHeld; }
constexpr bool reads_second(UpdateForm form) { return form == UpdateForm::kTwo || form == UpdateForm::kAdaptive; }

template <class E, UpdateForm kForm>
struct Sums {
  UpdateCoefficients<typename E::Lanes> c;
  F64x16 weight_sq = f64(0), dw_sq = f64(0), direction_sq = f64(0);
  typename E::Lanes max_dw = E::set(0);

  LIPCORE_MEMBER void observe_16(typename E::Lanes w, typename E::Lanes a, typename E::Lanes b, int64_t) {
    const auto update = update_of<kForm>(w, a, b, c);
    weight_sq = add_square(weight_sq, w);
    dw_sq = add_square(dw_sq, update.moved);
    if (kForm == UpdateForm::kAdaptive) direction_sq = add_square(direction_sq, update.direction);
    max_dw = max_abs(max_dw, update.moved);
  }
};

// Elements whose parameter or update is NaN or infinite. Only asked for when a sum was not finite.
template <class E, UpdateForm kForm>
struct Nonfinite {
  UpdateCoefficients<typename E::Lanes> c;
  int64_t found = 0;

  LIPCORE_MEMBER void observe_16(typename E::Lanes w, typename E::Lanes a, typename E::Lanes b, int64_t lanes) {
    typename E::Mean elements[2][16];
    store(elements[0], w);
    store(elements[1], update_of<kForm>(w, a, b, c).moved);
    for (int64_t i = 0; i < lanes; ++i) {
      const auto x = elements[0][i], y = elements[1][i];
      found += !(x - x == 0 && y - y == 0);  // NaN - NaN and inf - inf are NaN
    }
  }
};

template <class E, UpdateForm kForm, class Statistic>
LIPCORE_INLINE void observe_run(const typename E::Stored* w, const typename E::Stored* a, const typename E::Stored* b,
                                int64_t count, Statistic* statistic) {
  const auto zero = E::set(0);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __builtin_prefetch(w + i + kPrefetch);
    if (reads_first(kForm)) __builtin_prefetch(a + i + kPrefetch);
    if (reads_second(kForm)) __builtin_prefetch(b + i + kPrefetch);
    statistic->observe_16(E::read(w + i), reads_first(kForm) ? E::read(a + i) : zero,
                          reads_second(kForm) ? E::read(b + i) : zero, 16);
  }
  if (const int64_t rest = count - i) {
    // Padded so that it adds nothing: with 0, but with 1 under the root, where eps may be 0 as well.
    typename E::Stored last[3][16] = {};
    const size_t size = static_cast<size_t>(rest) * sizeof *w;
    memcpy(last[0], w + i, size);
    if (reads_first(kForm)) memcpy(last[1], a + i, size);
    if (reads_second(kForm)) memcpy(last[2], b + i, size);
    auto second = E::read(last[2]);
    if (kForm == UpdateForm::kAdaptive) {
      typename E::Mean lanes[16];
      store(lanes, second);
      for (int64_t k = rest; k < 16; ++k) lanes[k] = 1;
      second = load(lanes);
    }
    statistic->observe_16(E::read(last[0]), E::read(last[1]), second, rest);
  }
}

LIPCORE_INLINE void store_as(float* p, F32x16 x) { store(p, x); }
LIPCORE_INLINE void store_as(double* p, F32x16 x) { store(p, widen(x)); }
LIPCORE_INLINE void store_as(double* p, F64x16 x) { store(p, x); }
LIPCORE_INLINE void store_as(float*, F64x16) {}  // never: a float64 tensor makes all lanes float64

// count <= kBlock elements of any type; what lies behind them is left as it is.
template <class T>
void widen_block(T* out, const void* data, DType dtype, int64_t begin, int64_t count) {
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    const auto* x = static_cast<const typename E::Stored*>(data) + begin;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store_as(out + i, E::read(x + i));
    if (const int64_t rest = count - i) {
      typename E::Stored last[16] = {};
      memcpy(last, x + i, static_cast<size_t>(rest) * sizeof *x);
      store_as(out + i, E::read(last));
    }
  });
}

template <class E, UpdateForm kForm, class Statistic>
void observe_mixed(const UpdateChunk& chunk, Statistic* statistic) {
  alignas(64) typename E::Stored w[kBlock], a[kBlock], b[kBlock];
  for (int64_t begin = 0; begin < chunk.count; begin += kBlock) {
    const int64_t count = chunk.count - begin < kBlock ? chunk.count - begin : kBlock;
    widen_block(w, chunk.w, chunk.dtype, begin, count);
    if (reads_first(kForm)) widen_block(a, chunk.first, chunk.first_dtype, begin, count);
    if (reads_second(kForm)) widen_block(b, chunk.second, chunk.second_dtype, begin, count);
    observe_run<E, kForm>(w, a, b, count, statistic);
  }
}

// Calls body(element type of the lanes, form, observe) with the reading that the chunk's dtypes need.
template <UpdateForm kForm, template <class, UpdateForm> class Statistic, class Finish>
void with_form(const UpdateChunk& chunk, const Finish& finish) {
  const DType first = reads_first(kForm) ? chunk.first_dtype : chunk.dtype;
  const DType second = reads_second(kForm) ? chunk.second_dtype : chunk.dtype;
  if (first == chunk.dtype && second == chunk.dtype) {
    with_dtype(chunk.dtype, [&](auto element) {
      using E = decltype(element);
      using Stored = typename E::Stored;
      Statistic<E, kForm> statistic{coefficients<E>(chunk.scalars)};
      observe_run<E, kForm>(static_cast<const Stored*>(chunk.w), static_cast<const Stored*>(chunk.first),
                            static_cast<const Stored*>(chunk.second), chunk.count, &statistic);
      finish(statistic);
    });
  } else if (chunk.dtype == DType::kFloat64 || first == DType::kFloat64 || second == DType::kFloat64) {
    Statistic<Float64, kForm> statistic{coefficients<Float64>(chunk.scalars)};
    observe_mixed<Float64, kForm>(chunk, &statistic);
    finish(statistic);
  } else {
    Statistic<Float32, kForm> statistic{coefficients<Float32>(chunk.scalars)};
    observe_mixed<Float32, kForm>(chunk, &statistic);
    finish(statistic);
  }
}

template <template <class, UpdateForm> class Statistic, class Finish>
void observe(const UpdateChunk& chunk, const Finish& finish) {
  switch (chunk.form) {
    case UpdateForm::kHeld:
      return with_form<UpdateForm::kHeld, Statistic>(chunk, finish);
    case UpdateForm::kOne:
      return with_form<UpdateForm::kOne, Statistic>(chunk, finish);
    case UpdateForm::kTwo:
      return with_form<UpdateForm::kTwo, Statistic>(chunk, finish);
    case UpdateForm::kAdaptive:
      return with_form<UpdateForm::kAdaptive, Statistic>(chunk, finish);
  }
}

void chunk(const UpdateChunk& chunk, UpdateSums* out) {
  observe<Sums>(chunk, [&](const auto& sums) {
    out->step.weight_sq = sum_lanes(sums.weight_sq);
    out->step.dw_sq = sum_lanes(sums.dw_sq);
    out->step.max_abs_dw = max_lane(widen(sums.max_dw));
    out->direction_sq = sum_lanes(sums.direction_sq);
  });
}

int64_t count_nonfinite(const UpdateChunk& chunk) {
  int64_t found = 0;
  observe<Nonfinite>(chunk, [&](const auto& nonfinite) { found = nonfinite.found; });
  return found;
}

}  // namespace

extern const UpdateSumsKernels update_sums;
const UpdateSumsKernels update_sums = {&chunk, &count_nonfinite};

}  // namespace lipcore::LIPCORE_ISA
