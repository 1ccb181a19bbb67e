// Sums of one optimizer step's updates, from parameters and the optimizer's state: up to three streams read, none
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
struct Rule {
  uint64_t bits[kUpdateScalars];  // of the value, or of its address
  int8_t stored[kUpdateScalars];  // the dtype of what lies at an address, -1 for a value
  uint8_t form;
};
constexpr int kEntries = static_cast<int>(
    (kParameterBytes - sizeof(UpdateTables) - sizeof(SliceHead) - kRules * sizeof(Rule)) / sizeof(Entry));
struct Updates {
  SliceHead head;
  Rule rules[kRules];
  Entry tensors[kEntries];
};
static_assert(sizeof(UpdateTables) + sizeof(Updates) <= kParameterBytes, "kernel parameters");

using Reduce = ReduceBlock<UpdateSums>;

template <UpdateForm kForm>
struct Form {
  static constexpr UpdateForm value = kForm;
};
template <class Body>
__device__ __forceinline__ void with_form(UpdateForm form, const Body& body) {
  switch (form) {
    case UpdateForm::kOne:
      return body(Form<UpdateForm::kOne>{});
    case UpdateForm::kTwo:
      return body(Form<UpdateForm::kTwo>{});
    case UpdateForm::kAdaptive:
      return body(Form<UpdateForm::kAdaptive>{});
    default:
      return body(Form<UpdateForm::kHeld>{});
  }
}

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
  double weight_sq = 0, dw_sq = 0, direction_sq = 0;
  T max_dw = 0;
  int nonfinite = 0;

  __device__ explicit Observer(const Rule& rule)
      : c{scalar_of<T>(rule, 0), scalar_of<T>(rule, 1), scalar_of<T>(rule, 2),
          scalar_of<T>(rule, 3), scalar_of<T>(rule, 4), scalar_of<T>(rule, 5)} {}

  __device__ __forceinline__ void observe(T w, T a, T b) {
    const auto update = update_of<kForm>(w, a, b, c);
    weight_sq = add_product(weight_sq, w, w);
    dw_sq = add_product(dw_sq, update.moved, update.moved);
    if constexpr (kForm == UpdateForm::kAdaptive)
      direction_sq = add_product(direction_sq, update.direction, update.direction);
    const T size = fabs(update.moved);
    if (size > max_dw) max_dw = size;
    nonfinite += !(isfinite(w) && isfinite(update.moved));
  }

  __device__ UpdateSums sums() const {
    return {{dw_sq, 0, 0, static_cast<double>(max_dw), weight_sq, static_cast<double>(nonfinite)}, direction_sq};
  }
};

// Elements of each array in flight per thread, as parts of groups: twice as many spill.
template <class E>
constexpr int kPart = sizeof(typename E::Stored) == 8 ? 2 : kGroup;
template <class E>
constexpr int kParts = sizeof(typename E::Stored) == 8 ? 1 : 2;

// Of one dtype and aligned: groups of elements by wide accesses.
template <class E, UpdateForm kForm>
__device__ __forceinline__ UpdateSums sum_alike(const Entry& tensor, const Rule& rule, const SliceChunk& chunk) {
  using Stored = typename E::Stored;
  using Work = typename E::Work;
  Observer<Work, kForm> observer(rule);
  const auto* w = static_cast<const Stored*>(tensor.w) + chunk.begin;
  const auto* a = static_cast<const Stored*>(tensor.first) + chunk.begin;
  const auto* b = static_cast<const Stored*>(tensor.second) + chunk.begin;
  const auto observe = [&](Stored now, Stored first, Stored second) {
    observer.observe(E::widen(now), reads_first(kForm) ? E::widen(first) : Work{0},
                     reads_second(kForm) ? E::widen(second) : Work{0});
  };
  const int groups = chunk.count / kGroup;
  constexpr int kElements = kPart<E>, kUnroll = kParts<E>;
#pragma unroll kUnroll
  for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads) {
#pragma unroll 1
    for (int part = 0; part < kGroup; part += kElements) {
      const int at = i * kGroup + part;
      Stored now[kElements], first[kElements]{}, second[kElements]{};
      load_lanes<true, Keep::kStream>(w + at, now);
      if constexpr (reads_first(kForm)) load_lanes<true, Keep::kStream>(a + at, first);
      if constexpr (reads_second(kForm)) load_lanes<true, Keep::kStream>(b + at, second);
#pragma unroll
      for (int k = 0; k < kElements; ++k) observe(now[k], first[k], second[k]);
    }
  }
  const int rest = groups * kGroup + static_cast<int>(threadIdx.x);
  if (rest < chunk.count)
    observe(w[rest], reads_first(kForm) ? a[rest] : Stored{}, reads_second(kForm) ? b[rest] : Stored{});
  return observer.sums();
}

// Of any dtypes: the same elements in the same order, one by one.
template <class T, UpdateForm kForm>
__device__ __forceinline__ UpdateSums sum_mixed(const Entry& tensor, const Rule& rule, const SliceChunk& chunk) {
  Observer<T, kForm> observer(rule);
  const auto observe = [&](int i) {
    const int64_t at = chunk.begin + i;
    observer.observe(
        element_of<T>(tensor.w, static_cast<DType>(tensor.dtype), at),
        reads_first(kForm) ? element_of<T>(tensor.first, static_cast<DType>(tensor.first_dtype), at) : T{0},
        reads_second(kForm) ? element_of<T>(tensor.second, static_cast<DType>(tensor.second_dtype), at) : T{0});
  };
  const int groups = chunk.count / kGroup;
  for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads)
    for (int k = 0; k < kGroup; ++k) observe(i * kGroup + k);
  const int rest = groups * kGroup + static_cast<int>(threadIdx.x);
  if (rest < chunk.count) observe(rest);
  return observer.sums();
}

template <UpdateForm kForm>
__device__ __forceinline__ UpdateSums sum_chunk(const Entry& tensor, const Rule& rule, const SliceChunk& chunk) {
  constexpr bool kFirst = reads_first(kForm), kSecond = reads_second(kForm);
  const bool alike = (!kFirst || (tensor.first_dtype == tensor.dtype && is_aligned(tensor.first))) &&
                     (!kSecond || (tensor.second_dtype == tensor.dtype && is_aligned(tensor.second)));
  UpdateSums sums{};
  if (alike && is_aligned(tensor.w)) {
    with_dtype(static_cast<DType>(tensor.dtype),
               [&](auto element) { sums = sum_alike<decltype(element), kForm>(tensor, rule, chunk); });
    return sums;
  }
  constexpr auto kDouble = static_cast<uint8_t>(DType::kFloat64);
  const bool wide = tensor.dtype == kDouble || (kFirst && tensor.first_dtype == kDouble) ||
                    (kSecond && tensor.second_dtype == kDouble);
  return wide ? sum_mixed<double, kForm>(tensor, rule, chunk) : sum_mixed<float, kForm>(tensor, rule, chunk);
}

// One block per chunk.
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sum_updates(const __grid_constant__ UpdateTables tables, const __grid_constant__ Updates slice) {
  __shared__ typename Reduce::TempStorage storage;
  const SliceChunk chunk(slice.head, slice.tensors);
  const Entry& tensor = slice.tensors[chunk.place];
  const Rule& rule = slice.rules[tensor.rule];
  const auto form = static_cast<UpdateForm>(rule.form);
  const bool normalizes = form == UpdateForm::kAdaptive && tensor.count > 0;
  chunk.write_span(tables.spans, slice.head, slice.tensors, normalizes ? static_cast<double>(tensor.count) : kNaN);
  UpdateSums sums{};
  with_form(form, [&](auto known) { sums = sum_chunk<decltype(known)::value>(tensor, rule, chunk); });
  sums = Reduce(storage).Reduce(sums, Merge{});
  if (threadIdx.x == 0) tables.partials[chunk.index] = sums;
}

// One block per tensor.
__global__ void __launch_bounds__(kThreads) finish_updates(const __grid_constant__ UpdateTables tables) {
  __shared__ typename Reduce::TempStorage storage;
  const int64_t tensor = blockIdx.x;
  const ChunkSpan span = tables.spans[tensor];
  const UpdateSums sums = Reduce(storage).Reduce(add_chunks(tables.partials, span, Merge{}), Merge{});
  if (threadIdx.x != 0) return;
  const bool finite = sums.step.nonfinite == 0;
  tables.rows[tensor] = finite ? sums.step : StepSums{kNaN, kNaN, kNaN, kNaN, kNaN, sums.step.nonfinite};
  tables.normalized[tensor] = finite ? sums.direction_sq / span.elements : kNaN;
}

// One thread per tensor.
__global__ void __launch_bounds__(kThreads) take_normalized(const double* mean_square, int64_t tensors, double* table) {
  const int64_t tensor = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tensor < tensors) lipcore::observe_normalized(table, tensors, tensor, mean_square[tensor]);
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
  return rule;
}

// A slice that is being filled.
struct Filling {
  Updates slice{};
  int rules = 0;

  // False where it is full.
  bool add(const UpdateTensor& tensor, int64_t index) {
    if (slice.head.tensors == kEntries) return false;
    const Rule rule = rule_of(tensor);
    int place = 0;
    while (place < rules && memcmp(&slice.rules[place], &rule, sizeof rule) != 0) ++place;
    if (place == kRules) return false;
    if (place == rules) slice.rules[rules++] = rule;
    if (slice.head.tensors == 0) slice.head = {tensor.first_chunk, index, 0};
    slice.tensors[slice.head.tensors++] = {tensor.w,
                                           tensor.first,
                                           tensor.second,
                                           tensor.count,
                                           tensor.first_chunk,
                                           static_cast<uint8_t>(tensor.dtype),
                                           static_cast<uint8_t>(tensor.first_dtype),
                                           static_cast<uint8_t>(tensor.second_dtype),
                                           static_cast<uint8_t>(place)};
    return true;
  }
};

}  // namespace

Status update_sums(const UpdateTables& tables, const std::vector<UpdateTensor>& tensors, void* stream) {
  const auto count = static_cast<int64_t>(tensors.size());
  for (int64_t next = 0; next < count;) {
    Filling filling;
    while (next < count && filling.add(tensors[next], next)) ++next;
    const Updates& slice = filling.slice;
    const int64_t chunks = chunks_in(slice.head, tensors[next - 1]);
    const Status status = launch("adding up updates", &sum_updates, chunks, stream, tables, slice);
    if (status.code) return status;
  }
  return launch("adding up the tensors", &finish_updates, count, stream, tables);
}

Status observe_normalized(const double* mean_square, int64_t tensors, double* table, void* stream) {
  const int64_t blocks = (tensors + kThreads - 1) / kThreads;
  return launch("taking in normalised updates", &take_normalized, blocks, stream, mean_square, tensors, table);
}

}  // namespace lipcore::cuda
