// Sums of one optimizer step's updates, from parameters and the optimizer's state: up to five streams read, none
// written. As on the CPU the update is in float32 (float64 as soon as one of the tensors is float64), multiplied then
// added, so max |dw| has the CPU's bits; every product and sum is float64: error <= 1e-6 of what the terms would be
// without their signs, 1e-14 in float64. The order of additions depends on a tensor's size alone: not on dtypes,
// alignment or the GPU.
#include "cuda/teams.cuh"
#include "cuda/tensor_slices.cuh"

namespace lipcore::cuda {
namespace {

// A slice names rules by their place: tensors of a group of an optimizer share one.
constexpr int kRules = 8;
struct Entry {
  const void *w, *first, *second;
  int64_t count, first_chunk;
  uint8_t dtype, first_dtype, second_dtype, rule;
};
// With streams that only some ask for: room for fewer tensors.
struct FullEntry : Entry {
  const void *gradient, *previous;
  uint8_t gradient_dtype, previous_dtype, has_gradient, has_previous;  // an empty tensor has no address
};
struct Rule {
  uint64_t bits[kUpdateScalars];  // of the value, or of its address
  int8_t stored[kUpdateScalars];  // the dtype of what lies at an address, -1 for a value
  uint8_t form, has_momentum;
};
template <class E>
constexpr int kEntries =
    static_cast<int>((kParameterBytes - sizeof(UpdateTables) - sizeof(SliceHead) - kRules * sizeof(Rule)) / sizeof(E));
template <class E>
struct Updates {
  SliceHead head;
  Rule rules[kRules];
  E tensors[kEntries<E>];
  static_assert(std::is_same_v<E, Entry> || std::is_same_v<E, FullEntry>);
};
static_assert(sizeof(UpdateTables) + sizeof(Updates<Entry>) <= kParameterBytes, "kernel parameters");
static_assert(sizeof(UpdateTables) + sizeof(Updates<FullEntry>) <= kParameterBytes, "kernel parameters");

using Reduce = ReduceBlock<UpdateSums>;

template <class T>
__device__ __forceinline__ T element_of(const void* data, DType dtype, int64_t i) {
  T x{};
  with_dtype(dtype, [&](auto element) {
    using E = decltype(element);
    x = static_cast<T>(E::widen(static_cast<const typename E::Stored*>(data)[i]));
  });
  return x;
}

template <class T>
__device__ __forceinline__ T scalar_of(const Rule& rule, int i) {
  double value;
  memcpy(&value, &rule.bits[i], sizeof value);
  if (rule.stored[i] >= 0)
    value = element_of<double>(reinterpret_cast<const void*>(rule.bits[i]), static_cast<DType>(rule.stored[i]), 0);
  return static_cast<T>(value);
}

template <class T, UpdateForm kForm>
struct Observer {
  UpdateCoefficients<T> c;
  double weight_sq = 0, dw_sq = 0, direction_sq = 0, momentum_sq = 0, second_moment_sq = 0;
  double ratio_sq = 0, unexplained_sq = 0;
  T max_dw = 0;
  int nonfinite = 0;

  __device__ explicit Observer(const Rule& rule)
      : c{scalar_of<T>(rule, 0), scalar_of<T>(rule, 1), scalar_of<T>(rule, 2),
          scalar_of<T>(rule, 3), scalar_of<T>(rule, 4), scalar_of<T>(rule, 5)} {}

  // Returns -dw.
  __device__ __forceinline__ T observe(T w, T a, T b) {
    const auto update = update_of<kForm>(w, a, b, c);
    weight_sq = add_product(weight_sq, w, w);
    dw_sq = add_product(dw_sq, update.moved, update.moved);
    if constexpr (kForm == UpdateForm::kAdaptive)
      direction_sq = add_product(direction_sq, update.direction, update.direction);
    if constexpr (reads_first(kForm)) {
      const T momentum = kForm == UpdateForm::kTwo ? b : a;
      momentum_sq = add_product(momentum_sq, momentum, momentum);
    }
    if constexpr (kForm == UpdateForm::kAdaptive) second_moment_sq = add_product(second_moment_sq, b, b);
    const T size = fabs(update.moved);
    if (size > max_dw) max_dw = size;
    nonfinite += !isfinite(update.moved);  // that of a w which is not finite is not: 0 inf is NaN
    return update.moved;
  }
  __device__ __forceinline__ void observe_gradient(T g, T b) {
    const T root = second_root(b, c);
    const T ratio = g / (root > c.eps ? root : c.eps);
    ratio_sq = add_product(ratio_sq, ratio, ratio);
  }
  __device__ __forceinline__ void observe_previous(T previous, T w, T moved) {
    const T unexplained = (w - previous) + moved;
    unexplained_sq = add_product(unexplained_sq, unexplained, unexplained);
  }

  __device__ UpdateSums sums() const {
    return {{dw_sq, 0, static_cast<double>(max_dw), weight_sq, static_cast<double>(nonfinite)},
            direction_sq,
            ratio_sq,
            momentum_sq,
            second_moment_sq,
            unexplained_sq};
  }
};

// Elements of each array in flight per thread, as parts of groups: twice as many spill.
template <class E>
constexpr int kPart = sizeof(typename E::Stored) == 8 ? 2 : kGroup;
template <class E, class Tensor>
constexpr int kParts = sizeof(typename E::Stored) == 8 || std::is_same_v<Tensor, FullEntry> ? 1 : 2;

// The gradient and the parameter before the step, where there may be any.
struct Asked {
  const void *gradient, *previous;
  bool has_gradient, has_previous;
};
__device__ __forceinline__ Asked asked_for(const Entry&) { return {nullptr, nullptr, false, false}; }
__device__ __forceinline__ Asked asked_for(const FullEntry& tensor) {
  return {tensor.gradient, tensor.previous, tensor.has_gradient != 0, tensor.has_previous != 0};
}

// Of one dtype and aligned: groups of elements by wide accesses.
template <class E, UpdateForm kForm, class Tensor>
__device__ __forceinline__ UpdateSums sum_alike(const Tensor& tensor, const Rule& rule, const SliceChunk& chunk) {
  constexpr bool kFull = std::is_same_v<Tensor, FullEntry>, kAdaptive = kForm == UpdateForm::kAdaptive;
  using Stored = typename E::Stored;
  using Work = typename E::Work;
  Observer<Work, kForm> observer(rule);
  const auto* w = static_cast<const Stored*>(tensor.w) + chunk.begin;
  const auto* a = reads_first(kForm) ? static_cast<const Stored*>(tensor.first) + chunk.begin : nullptr;
  const auto* b = reads_second(kForm) ? static_cast<const Stored*>(tensor.second) + chunk.begin : nullptr;
  const Asked asked = asked_for(tensor);
  const auto* gradients = static_cast<const Stored*>(asked.gradient);
  const auto* before = static_cast<const Stored*>(asked.previous);
  if (kFull && gradients) gradients += chunk.begin;
  if (kFull && before) before += chunk.begin;
  const auto observe = [&](Stored now, Stored first, Stored second, Stored gradient, Stored previous) {
    const Work w_now = E::widen(now), b_now = reads_second(kForm) ? E::widen(second) : Work{0};
    const Work moved = observer.observe(w_now, reads_first(kForm) ? E::widen(first) : Work{0}, b_now);
    if constexpr (kFull && kAdaptive) observer.observe_gradient(E::widen(gradient), b_now);
    if constexpr (kFull) observer.observe_previous(E::widen(previous), w_now, moved);
  };
  const int groups = chunk.count / kGroup;
  constexpr int kElements = kPart<E>, kUnroll = kParts<E, Tensor>;
#pragma unroll kUnroll
  for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads) {
#pragma unroll 1
    for (int part = 0; part < kGroup; part += kElements) {
      const int at = i * kGroup + part;
      Stored now[kElements], first[kElements]{}, second[kElements]{}, gradient[kElements]{}, previous[kElements]{};
      load_lanes<true, Keep::kStream>(w + at, now);
      if constexpr (reads_first(kForm)) load_lanes<true, Keep::kStream>(a + at, first);
      if constexpr (reads_second(kForm)) load_lanes<true, Keep::kStream>(b + at, second);
      if (kFull && kAdaptive && gradients) load_lanes<true, Keep::kStream>(gradients + at, gradient);
      if (kFull && before) load_lanes<true, Keep::kStream>(before + at, previous);
#pragma unroll
      for (int k = 0; k < kElements; ++k) observe(now[k], first[k], second[k], gradient[k], previous[k]);
    }
  }
  const int rest = groups * kGroup + static_cast<int>(threadIdx.x);
  if (rest < chunk.count)
    observe(w[rest], reads_first(kForm) ? a[rest] : Stored{}, reads_second(kForm) ? b[rest] : Stored{},
            gradients ? gradients[rest] : Stored{}, before ? before[rest] : Stored{});
  return observer.sums();
}

// Of any dtypes: the same elements in the same order, one by one.
template <class T, UpdateForm kForm, class Tensor>
__device__ __forceinline__ UpdateSums sum_mixed(const Tensor& tensor, const Rule& rule, const SliceChunk& chunk) {
  Observer<T, kForm> observer(rule);
  const auto observe = [&](int i) {
    const int64_t at = chunk.begin + i;
    const T w = element_of<T>(tensor.w, static_cast<DType>(tensor.dtype), at);
    const T a = reads_first(kForm) ? element_of<T>(tensor.first, static_cast<DType>(tensor.first_dtype), at) : T{0};
    const T b = reads_second(kForm) ? element_of<T>(tensor.second, static_cast<DType>(tensor.second_dtype), at) : T{0};
    const T moved = observer.observe(w, a, b);
    if constexpr (std::is_same_v<Tensor, FullEntry>) {
      if (kForm == UpdateForm::kAdaptive && tensor.has_gradient)
        observer.observe_gradient(element_of<T>(tensor.gradient, static_cast<DType>(tensor.gradient_dtype), at), b);
      if (tensor.has_previous)
        observer.observe_previous(element_of<T>(tensor.previous, static_cast<DType>(tensor.previous_dtype), at), w,
                                  moved);
    }
  };
  const int groups = chunk.count / kGroup;
  for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads)
    for (int k = 0; k < kGroup; ++k) observe(i * kGroup + k);
  const int rest = groups * kGroup + static_cast<int>(threadIdx.x);
  if (rest < chunk.count) observe(rest);
  return observer.sums();
}

// Whether wide accesses read what is asked for: it has the parameter's dtype and is aligned.
template <class Tensor>
__device__ __forceinline__ bool asked_for_alike(const Tensor& tensor) {
  if constexpr (std::is_same_v<Tensor, FullEntry>)
    return (!tensor.has_gradient || (tensor.gradient_dtype == tensor.dtype && is_aligned(tensor.gradient))) &&
           (!tensor.has_previous || (tensor.previous_dtype == tensor.dtype && is_aligned(tensor.previous)));
  return true;
}
template <class Tensor>
__device__ __forceinline__ bool asked_for_is_double(const Tensor& tensor) {
  constexpr auto kDouble = static_cast<uint8_t>(DType::kFloat64);
  if constexpr (std::is_same_v<Tensor, FullEntry>)
    return (tensor.has_gradient && tensor.gradient_dtype == kDouble) ||
           (tensor.has_previous && tensor.previous_dtype == kDouble);
  return false;
}

template <UpdateForm kForm, class Tensor>
__device__ __forceinline__ UpdateSums sum_chunk(const Tensor& tensor, const Rule& rule, const SliceChunk& chunk) {
  constexpr bool kFirst = reads_first(kForm), kSecond = reads_second(kForm);
  const bool alike = (!kFirst || (tensor.first_dtype == tensor.dtype && is_aligned(tensor.first))) &&
                     (!kSecond || (tensor.second_dtype == tensor.dtype && is_aligned(tensor.second)));
  UpdateSums sums{};
  if (alike && is_aligned(tensor.w) && asked_for_alike(tensor)) {
    with_dtype(static_cast<DType>(tensor.dtype),
               [&](auto element) { sums = sum_alike<decltype(element), kForm>(tensor, rule, chunk); });
    return sums;
  }
  constexpr auto kDouble = static_cast<uint8_t>(DType::kFloat64);
  const bool wide = tensor.dtype == kDouble || (kFirst && tensor.first_dtype == kDouble) ||
                    (kSecond && tensor.second_dtype == kDouble) || asked_for_is_double(tensor);
  return wide ? sum_mixed<double, kForm>(tensor, rule, chunk) : sum_mixed<float, kForm>(tensor, rule, chunk);
}

// One block per chunk.
constexpr int kUpdateBlocksPerSm = kBlocksPerSm - 1;  // else registers spill, on sm_80 without more streams too
template <class Tensor>
__global__ void __launch_bounds__(kThreads, kUpdateBlocksPerSm)
    sum_updates(const __grid_constant__ UpdateTables tables, const __grid_constant__ Updates<Tensor> slice) {
  __shared__ typename Reduce::TempStorage storage;
  const SliceChunk chunk(slice.head, slice.tensors);
  const Tensor& tensor = slice.tensors[chunk.place];
  const Rule& rule = slice.rules[tensor.rule];
  const auto form = static_cast<UpdateForm>(rule.form);
  chunk.write_span(tables.spans, slice.head, slice.tensors, static_cast<double>(tensor.count));
  UpdateSums sums{};
  with_form(form, [&](auto known) { sums = sum_chunk<decltype(known)::value>(tensor, rule, chunk); });
  sums = Reduce(storage).Reduce(sums, Merge{});
  if (threadIdx.x != 0) return;
  const Asked asked = asked_for(tensor);
  leave_unknown(form, rule.has_momentum, asked.has_gradient, asked.has_previous, &sums);
  tables.partials[chunk.index] = sums;
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) finish_updates(const __grid_constant__ UpdateTables tables) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t tensor = blockIdx.x;
  const ChunkSpan span = tables.spans[tensor];
  const UpdateSums sums = Reduce(storage).Reduce(add_chunks(tables.partials, span, Merge{}), Merge{});
  if (threadIdx.x != 0) return;
  const bool finite = sums.step.nonfinite == 0;
  tables.rows[tensor] = finite ? sums.step : StepSums{kNaN, kNaN, kNaN, kNaN, sums.step.nonfinite};
  take_squares(sums, span.elements, tables.squares, gridDim.x, tensor);
}

// One thread per square.
__global__ void __launch_bounds__(kThreads) take_roots(const double* squares, int64_t columns, double* table) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column < columns) observe_square(table, columns, column, squares[column]);
}

Rule rule_of(const UpdateTensor& tensor) {
  Rule rule{};
  for (int i = 0; i < kUpdateScalars; ++i) {
    const UpdateScalar& scalar = tensor.scalars[i];
    rule.stored[i] = scalar.at ? static_cast<int8_t>(scalar.dtype) : int8_t{-1};
    if (scalar.at)
      rule.bits[i] = reinterpret_cast<uint64_t>(scalar.at);
    else
      memcpy(&rule.bits[i], &scalar.value, sizeof scalar.value);
  }
  rule.form = static_cast<uint8_t>(tensor.form);
  rule.has_momentum = tensor.has_momentum;
  return rule;
}

Entry entry_of(const UpdateTensor& tensor, int rule, Entry*) {
  return {tensor.w,
          tensor.first,
          tensor.second,
          tensor.count,
          tensor.first_chunk,
          static_cast<uint8_t>(tensor.dtype),
          static_cast<uint8_t>(tensor.first_dtype),
          static_cast<uint8_t>(tensor.second_dtype),
          static_cast<uint8_t>(rule)};
}
FullEntry entry_of(const UpdateTensor& tensor, int rule, FullEntry*) {
  return {entry_of(tensor, rule, static_cast<Entry*>(nullptr)),
          tensor.gradient,
          tensor.previous,
          static_cast<uint8_t>(tensor.gradient_dtype),
          static_cast<uint8_t>(tensor.previous_dtype),
          tensor.has_gradient,
          tensor.has_previous};
}

// A slice that is being filled.
template <class E>
struct Filling {
  Updates<E> slice{};
  int rules = 0;

  // False where it is full.
  bool add(const UpdateTensor& tensor, int64_t index) {
    if (slice.head.tensors == kEntries<E>) return false;
    const Rule rule = rule_of(tensor);
    int place = 0;
    while (place < rules && memcmp(&slice.rules[place], &rule, sizeof rule) != 0) ++place;
    if (place == kRules) return false;
    if (place == rules) slice.rules[rules++] = rule;
    if (slice.head.tensors == 0) slice.head = {tensor.first_chunk, index, 0};
    slice.tensors[slice.head.tensors++] = entry_of(tensor, place, static_cast<E*>(nullptr));
    return true;
  }
};

template <class E>
Status sum_slices(const UpdateTables& tables, const std::vector<UpdateTensor>& tensors, void* stream) {
  const auto count = static_cast<int64_t>(tensors.size());
  for (int64_t next = 0; next < count;) {
    Filling<E> filling;
    while (next < count && filling.add(tensors[next], next)) ++next;
    const Updates<E>& slice = filling.slice;
    const int64_t chunks = chunks_in(slice.head, tensors[next - 1]);
    const Status status = launch("adding up updates", &sum_updates<E>, chunks, stream, tables, slice);
    if (status.code) return status;
  }
  return {0, ""};
}

}  // namespace

Status update_sums(const UpdateTables& tables, const std::vector<UpdateTensor>& tensors, void* stream) {
  const auto asks = [](const UpdateTensor& tensor) { return tensor.has_gradient || tensor.has_previous; };
  const bool full = std::any_of(tensors.begin(), tensors.end(), asks);
  const Status status =
      full ? sum_slices<FullEntry>(tables, tensors, stream) : sum_slices<Entry>(tables, tensors, stream);
  if (status.code) return status;
  return launch("adding up the tensors", &finish_updates, static_cast<int64_t>(tensors.size()), stream, tables);
}

Status observe_squares(const double* squares, int64_t columns, double* table, void* stream) {
  const int64_t blocks = (columns + kThreads - 1) / kThreads;
  return launch("taking in squares", &take_roots, blocks, stream, squares, columns, table);
}

}  // namespace lipcore::cuda
