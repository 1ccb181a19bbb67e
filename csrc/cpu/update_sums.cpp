// Sums of one optimizer step's update of a run of a parameter, from the parameter and the optimizer's state: up to
// five streams read, none written. Built once per instruction set. The update in float32 lanes (float64 as soon as one
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

template <class E, UpdateForm kForm>
struct Sums {
  UpdateCoefficients<typename E::Lanes> c;
  F64x16 weight_sq = f64(0), dw_sq = f64(0), direction_sq = f64(0), momentum_sq = f64(0), second_moment_sq = f64(0);
  F64x16 ratio_sq = f64(0), unexplained_sq = f64(0);
  typename E::Lanes max_dw = E::set(0);

  // Returns -dw. `second` is b, without what is put under the root where there is no element.
  LIPCORE_MEMBER typename E::Lanes observe_16(typename E::Lanes w, typename E::Lanes a, typename E::Lanes b,
                                              typename E::Lanes second) {
    const auto update = update_of<kForm>(w, a, b, c);
    weight_sq = add_square(weight_sq, w);
    dw_sq = add_square(dw_sq, update.moved);
    if (kForm == UpdateForm::kAdaptive) direction_sq = add_square(direction_sq, update.direction);
    if (reads_first(kForm)) momentum_sq = add_square(momentum_sq, kForm == UpdateForm::kTwo ? second : a);
    if (kForm == UpdateForm::kAdaptive) second_moment_sq = add_square(second_moment_sq, second);
    max_dw = max_abs(max_dw, update.moved);
    return update.moved;
  }
  LIPCORE_MEMBER void observe_gradient_16(typename E::Lanes g, typename E::Lanes b) {
    ratio_sq = add_square(ratio_sq, g / max_abs(c.eps, second_root(b, c)));
  }
  LIPCORE_MEMBER void observe_previous_16(typename E::Lanes previous, typename E::Lanes w, typename E::Lanes moved) {
    unexplained_sq = add_square(unexplained_sq, (w - previous) + moved);
  }
};

template <class T>
struct Streams {
  const T *w, *a, *b;
  const T *gradient, *previous;  // null where they are not asked for
};

template <class E, UpdateForm kForm>
LIPCORE_INLINE void observe_run(const Streams<typename E::Stored>& from, int64_t count, Sums<E, kForm>* sums) {
  const auto [w, a, b, gradient, previous] = from;
  const auto zero = E::set(0);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    __builtin_prefetch(w + i + kPrefetch);
    if (reads_first(kForm)) __builtin_prefetch(a + i + kPrefetch);
    if (reads_second(kForm)) __builtin_prefetch(b + i + kPrefetch);
    if (kForm == UpdateForm::kAdaptive && gradient) __builtin_prefetch(gradient + i + kPrefetch);
    if (previous) __builtin_prefetch(previous + i + kPrefetch);
    const auto now = E::read(w + i);
    const auto second = reads_second(kForm) ? E::read(b + i) : zero;
    const auto moved = sums->observe_16(now, reads_first(kForm) ? E::read(a + i) : zero, second, second);
    if (kForm == UpdateForm::kAdaptive && gradient) sums->observe_gradient_16(E::read(gradient + i), second);
    if (previous) sums->observe_previous_16(E::read(previous + i), now, moved);
  }
  if (const int64_t rest = count - i) {
    // Padded so that it adds nothing: with 0, but with 1 under the root, where eps may be 0 as well.
    typename E::Stored last[5][16] = {};
    const size_t size = static_cast<size_t>(rest) * sizeof *w;
    memcpy(last[0], w + i, size);
    if (reads_first(kForm)) memcpy(last[1], a + i, size);
    if (reads_second(kForm)) memcpy(last[2], b + i, size);
    if (gradient) memcpy(last[3], gradient + i, size);
    if (previous) memcpy(last[4], previous + i, size);
    auto second = E::read(last[2]);
    if (kForm == UpdateForm::kAdaptive) {
      typename E::Mean lanes[16];
      store(lanes, second);
      for (int64_t k = rest; k < 16; ++k) lanes[k] = 1;
      second = load(lanes);
    }
    const auto now = E::read(last[0]);
    const auto moved = sums->observe_16(now, E::read(last[1]), second, E::read(last[2]));
    if (kForm == UpdateForm::kAdaptive && gradient) sums->observe_gradient_16(E::read(last[3]), second);
    if (previous) sums->observe_previous_16(E::read(last[4]), now, moved);
  }
}

LIPCORE_INLINE void store_as(float* p, F32x16 x) { store(p, x); }
LIPCORE_INLINE void store_as(double* p, F32x16 x) { store(p, widen(x)); }
LIPCORE_INLINE void store_as(double* p, F64x16 x) { store(p, x); }
LIPCORE_INLINE void store_as(float*, F64x16) {}  // never: a float64 tensor makes all lanes float64

// count <= kBlock elements of any type; what lies behind them is left as it is.
template <class T>
LIPCORE_OUTLINE void widen_block(T* out, const void* data, DType dtype, int64_t begin, int64_t count) {
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

// Calls body(streams, count) for every kBlock elements, widened to T.
template <class T, UpdateForm kForm, class Body>
LIPCORE_INLINE void for_widened(const UpdateChunk& chunk, const Body& body) {
  alignas(64) T w[kBlock], a[kBlock], b[kBlock], gradient[kBlock], previous[kBlock];
  for (int64_t begin = 0; begin < chunk.count; begin += kBlock) {
    const int64_t count = chunk.count - begin < kBlock ? chunk.count - begin : kBlock;
    widen_block(w, chunk.w, chunk.dtype, begin, count);
    if (reads_first(kForm)) widen_block(a, chunk.first, chunk.first_dtype, begin, count);
    if (reads_second(kForm)) widen_block(b, chunk.second, chunk.second_dtype, begin, count);
    if (chunk.gradient) widen_block(gradient, chunk.gradient, chunk.gradient_dtype, begin, count);
    if (chunk.previous) widen_block(previous, chunk.previous, chunk.previous_dtype, begin, count);
    body(Streams<T>{w, a, b, chunk.gradient ? gradient : nullptr, chunk.previous ? previous : nullptr}, count);
  }
}

template <class E, UpdateForm kForm, class Observe>
LIPCORE_INLINE void sums_of(const UpdateChunk& chunk, UpdateSums* out, const Observe& observe) {
  Sums<E, kForm> sums{coefficients<E>(chunk.scalars)};
  observe(&sums);
  out->step.weight_sq = sum_lanes(sums.weight_sq);
  out->step.dw_sq = sum_lanes(sums.dw_sq);
  out->step.max_abs_dw = max_lane(widen(sums.max_dw));
  out->direction_sq = sum_lanes(sums.direction_sq);
  out->ratio_sq = sum_lanes(sums.ratio_sq);
  out->momentum_sq = sum_lanes(sums.momentum_sq);
  out->second_moment_sq = sum_lanes(sums.second_moment_sq);
  out->unexplained_sq = sum_lanes(sums.unexplained_sq);
}

template <class E, UpdateForm kForm>
LIPCORE_OUTLINE void observe_mixed(const UpdateChunk& chunk, UpdateSums* out) {
  using T = typename E::Stored;
  sums_of<E, kForm>(chunk, out, [&](Sums<E, kForm>* sums) {
    for_widened<T, kForm>(
        chunk, [&](const Streams<T>& streams, int64_t count) { observe_run<E, kForm>(streams, count, sums); });
  });
}

template <class E, UpdateForm kForm>
LIPCORE_OUTLINE void observe_alike(const UpdateChunk& chunk, UpdateSums* out) {
  using Stored = typename E::Stored;
  sums_of<E, kForm>(chunk, out, [&](Sums<E, kForm>* sums) {
    const auto stored = [](const void* data) { return static_cast<const Stored*>(data); };
    observe_run<E, kForm>(
        {stored(chunk.w), stored(chunk.first), stored(chunk.second), stored(chunk.gradient), stored(chunk.previous)},
        chunk.count, sums);
  });
}

// The dtypes that are read; the parameter's own for a tensor that is not.
struct DTypes {
  DType w, others[4];
  LIPCORE_MEMBER bool alike() const {
    for (const DType other : others)
      if (other != w) return false;
    return true;
  }
  LIPCORE_MEMBER bool any_float64() const {
    bool any = w == DType::kFloat64;
    for (const DType other : others) any |= other == DType::kFloat64;
    return any;
  }
};
template <UpdateForm kForm>
LIPCORE_INLINE DTypes dtypes_of(const UpdateChunk& chunk) {
  return {chunk.dtype,
          {reads_first(kForm) ? chunk.first_dtype : chunk.dtype, reads_second(kForm) ? chunk.second_dtype : chunk.dtype,
           chunk.gradient ? chunk.gradient_dtype : chunk.dtype, chunk.previous ? chunk.previous_dtype : chunk.dtype}};
}

template <UpdateForm kForm>
LIPCORE_INLINE void observe(const UpdateChunk& chunk, UpdateSums* out) {
  const DTypes dtypes = dtypes_of<kForm>(chunk);
  if (dtypes.alike()) {
    with_dtype(chunk.dtype, [&](auto element) { observe_alike<decltype(element), kForm>(chunk, out); });
  } else if (dtypes.any_float64()) {
    observe_mixed<Float64, kForm>(chunk, out);
  } else {
    observe_mixed<Float32, kForm>(chunk, out);
  }
}

void chunk(const UpdateChunk& chunk, UpdateSums* out) {
  with_form(chunk.form, [&](auto form) { observe<decltype(form)::value>(chunk, out); });
}

// Elements whose parameter or update is NaN or infinite. Only asked for when a sum was not finite, so one element at a
// time will do, and one loop for all dtypes.
template <class T, UpdateForm kForm>
LIPCORE_OUTLINE int64_t nonfinite_of(const UpdateChunk& chunk) {
  const UpdateScalars& s = chunk.scalars;
  const UpdateCoefficients<T> c = {static_cast<T>(s.rate),         static_cast<T>(s.mix),
                                   static_cast<T>(s.decay),        static_cast<T>(s.first_scale),
                                   static_cast<T>(s.second_scale), static_cast<T>(s.eps)};
  int64_t found = 0;
  for_widened<T, kForm>(chunk, [&](const Streams<T>& from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const T a = reads_first(kForm) ? from.a[i] : T(0), b = reads_second(kForm) ? from.b[i] : T(0);
      const T y = update_of<kForm>(from.w[i], a, b, c).moved;
      found += !(y - y == 0);  // NaN - NaN and inf - inf are NaN; of a w that is not finite y is one of them
    }
  });
  return found;
}

int64_t count_nonfinite(const UpdateChunk& chunk) {
  return with_form(chunk.form, [&](auto form) {
    constexpr UpdateForm kForm = decltype(form)::value;
    return dtypes_of<kForm>(chunk).any_float64() ? nonfinite_of<double, kForm>(chunk)
                                                 : nonfinite_of<float, kForm>(chunk);
  });
}

}  // namespace

extern const UpdateSumsKernels update_sums;
const UpdateSumsKernels update_sums = {&chunk, &count_nonfinite};

}  // namespace lipcore::LIPCORE_ISA
