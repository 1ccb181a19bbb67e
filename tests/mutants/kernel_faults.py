"""Small faults in the CUDA kernels and their launch code, as data; tests/cuda_on_cpu/mutate.py plants them."""

from __future__ import annotations

from dataclasses import dataclass

from faults import Mutant


@dataclass(frozen=True)
class KernelMutant(Mutant):
    """A fault that the GPU tests must see on the emulator.

    Args:
        mode: of tests/cuda_on_cpu/build.py; "tsan" for what is no wrong number yet.
        equivalent: why nobody can see it, for one that is listed to be looked at, not caught.
    """

    mode: str = "plain"
    equivalent: str = ""


_CUDA = "project/test_cuda.py"
_NORMS = (f"{_CUDA}::test_sample_norms_of_every_length", f"{_CUDA}::test_sample_norms_of_long_rows_and_many_rows")
_SPECIAL = (f"{_CUDA}::test_sample_norms_of_special_values", f"{_CUDA}::test_sample_norms_keep_the_whole_range")
_RACES_OF_NORMS = (f"{_CUDA}::test_sample_norms_keep_the_whole_range",)
_ALIGNMENT = (f"{_CUDA}::test_sample_norms_do_not_depend_on_alignment_or_run",)
_STEP = (f"{_CUDA}::test_trajectory_step_against_the_specification",)
_GROUPS = (f"{_CUDA}::test_trajectory_step_in_groups",)
_PLAN = (f"{_CUDA}::test_trajectory_agrees_with_the_cpu",)
_GRAPH = (f"{_CUDA}::test_steps_can_be_captured_in_a_graph",)
_SQUARES = (
    "core/test_tensor_sums.py::test_squares",
    "core/test_tensor_sums.py::test_squares_of_more_tensors_than_a_launch_takes",
)
_MEANS = ("core/test_tensor_sums.py::test_means_of_blocks",)
_OBSERVED = ("core/test_observed_rows.py::test_values",)
_LEDGER = ("core/test_ledger.py::test_steps_of_sums",)
_UPDATES = ("functional/test_update_sums.py::test_on_cuda",)
_RACES_OF_A_STEP = (f"{_CUDA}::test_a_past_that_is_not_finite_is_seen_in_every_sum",)
_RACES_OF_A_SKETCH = ("functional/test_sketch.py::test_many_tensors_on_cuda",)
_SKETCH = ("functional/test_sketch.py::test_sizes_on_cuda", "functional/test_sketch.py::test_plan_on_cuda")

KERNEL_MUTANTS = (
    # ---- row norms
    KernelMutant(
        "an element behind the last one is read",
        "csrc/cuda/sample_norms.cu",
        "i < count; i += team.size()) fold(E::widen(x[i]));",
        "i <= count; i += team.size()) fold(E::widen(x[i]));",
        _NORMS,
    ),
    KernelMutant(
        "the last lane of a warp is not in its mask",
        "csrc/cuda/sample_norms.cu",
        "kSize == 32 ? 0xffffffffu",
        "kSize == 32 ? 0x7fffffffu",
        _NORMS,
    ),
    KernelMutant(
        "a mask of four lanes starts one lane too early",
        "csrc/cuda/sample_norms.cu",
        "((1u << kSize % 32) - 1) << (threadIdx.x % 32 / kSize * kSize)",
        "((1u << kSize % 32) - 1) << (threadIdx.x % 32 / kSize * kSize - (threadIdx.x % 32 >= 4))",
        _NORMS,
    ),
    KernelMutant(
        "every thread takes a block's sum for its own",
        "csrc/cuda/sample_norms.cu",
        "return share(Reduce(storage->reduce).Sum(x));",
        "return Reduce(storage->reduce).Sum(x);",
        _SPECIAL,
    ),
    KernelMutant(
        "a block's result is read before it is written",
        "csrc/cuda/sample_norms.cu",
        "if (threadIdx.x == 0) storage->result = x;\n    __syncthreads();",
        "if (threadIdx.x == 0) storage->result = x;",
        _RACES_OF_NORMS,
        mode="tsan",
    ),
    KernelMutant(
        "a block's storage is used again without a barrier",
        "csrc/cuda/sample_norms.cu",
        "    __syncthreads();  // the storage may be used again\n",
        "",
        _RACES_OF_NORMS,
        mode="tsan",
        equivalent="the next reduction has a barrier of its own before its thread 0 writes the result again",
    ),
    KernelMutant(
        "a remainder of a whole divisor is kept",
        "csrc/cuda/sample_norms.cu",
        "} else if (*rest >= divisor) {",
        "} else if (*rest > divisor) {",
        (f"{_CUDA}::test_sample_norms_of_sliced_rows_of_every_size",),
    ),
    KernelMutant(
        "a remainder below zero is kept",
        "csrc/cuda/sample_norms.cu",
        "if (*rest < 0) {",
        "if (*rest < -divisor) {",
        (f"{_CUDA}::test_sample_norms_of_sliced_rows_of_every_size",),
        equivalent="a rounded product reaches the next whole number from below only beyond 2^52 elements",
    ),
    KernelMutant(
        "strided rows leave out their last elements",
        "csrc/cuda/sample_norms.cu",
        "team.rank(); i < count; i += team.size())\n      fold(E::widen(x[strided",
        "team.rank() + 1; i < count; i += team.size())\n      fold(E::widen(x[strided",
        _NORMS,
    ),
    KernelMutant(
        "a sum that overflowed is not taken again",
        "csrc/cuda/sample_norms.cu",
        "constexpr double kLargestSum = 1e300;",
        "constexpr double kLargestSum = 1e309;",
        _SPECIAL,
    ),
    KernelMutant(
        "a sum that lost digits is not taken again",
        "csrc/cuda/sample_norms.cu",
        "constexpr double kSmallestSum = 1e-280;",
        "constexpr double kSmallestSum = 0;",
        _SPECIAL,
    ),
    KernelMutant(
        "a block's teams skip rows",
        "csrc/cuda/sample_norms.cu",
        "row < work.rows.count; row += gridDim.x * teams) {",
        "row < work.rows.count - 1; row += gridDim.x * teams) {",
        _NORMS,
    ),
    KernelMutant(
        "chunks of long rows are as long as the first",
        "csrc/cuda/sample_norms.cu",
        "const int64_t count = left < kCudaChunk ? left : kCudaChunk;",
        "const int64_t count = kCudaChunk;",
        _NORMS,
    ),
    KernelMutant(
        "a row's first partial sum is left out",
        "csrc/cuda/sample_norms.cu",
        "for (int64_t i = threadIdx.x; i < work.per_row; i += kThreads) sum +=",
        "for (int64_t i = threadIdx.x + 1; i < work.per_row; i += kThreads) sum +=",
        _NORMS,
    ),
    # ---- what all kernels share
    KernelMutant(
        "eight bytes are enough for a wide access",
        "csrc/cuda/common.cuh",
        "reinterpret_cast<uintptr_t>(p) & 15",
        "reinterpret_cast<uintptr_t>(p) & 7",
        (*_ALIGNMENT, *_STEP),
    ),
    KernelMutant(
        "bfloat16 read as float16",
        "csrc/cuda/common.cuh",
        "return body(Bfloat16{});",
        "return body(Float16{});",
        _NORMS,
    ),
    KernelMutant(
        "a wide store moves half of its bytes",
        "csrc/cuda/common.cuh",
        "for (int i = 0; i < kWords; ++i) __stcs(",
        "for (int i = 0; i < (kWords + 1) / 2; ++i) __stcs(",
        _STEP,
    ),
    KernelMutant(
        "a product of float64 is fused into its sum",
        "csrc/cuda/common.cuh",
        "{ return sum + a * b; }",
        "{ return __fma_rn(a, b, sum); }",
        _PLAN,
        equivalent="a last bit of a sum, within its tolerance: the CPU's bits are promised of w_prev and mean",
    ),
    # ---- the trajectory step
    KernelMutant(
        "the check reads an element behind the last one",
        "csrc/cuda/trajectory_step.cu",
        "if (rest < count) check_element",
        "if (rest <= count) check_element",
        _STEP,
    ),
    KernelMutant(
        "one thread leaves before the barrier",
        "csrc/cuda/trajectory_step.cu",
        "if (!whole) return;",
        "if (!whole || threadIdx.x == 3) return;",
        _STEP,
    ),
    KernelMutant(
        "threads ask whether to skip before it is known",
        "csrc/cuda/trajectory_step.cu",
        "    __syncthreads();  // for skip, and because the reduction's memory is used again\n",
        "",
        _RACES_OF_A_STEP,
        mode="tsan",
    ),
    KernelMutant(
        "once not finite, always not finite",
        "csrc/cuda/trajectory_step.cu",
        "  tables.not_finite[tensor] = 0;\n  if (tables.ledger.rows) observe_tensor",
        "  if (tables.ledger.rows) observe_tensor",
        _PLAN,
    ),
    KernelMutant(
        "a tensor that is not finite is stepped all the same",
        "csrc/cuda/trajectory_step.cu",
        "if (skip) return;",
        "",
        _STEP,
    ),
    KernelMutant(
        "large tensors that are not finite are stepped all the same",
        "csrc/cuda/trajectory_step.cu",
        "if (tables.not_finite[entry.tensor]) return;",
        "",
        (*_STEP, *_GROUPS),
    ),
    KernelMutant(
        "the second pack of two is left out",
        "csrc/cuda/trajectory_step.cu",
        "i < packs; i += kPacks * kThreads) {",
        "i < packs; i += 2 * kPacks * kThreads) {",
        _STEP,
    ),
    KernelMutant(
        "w_prev of the last elements is kept",
        "csrc/cuda/trajectory_step.cu",
        "    w_prev[rest] = w[rest];\n",
        "",
        _STEP,
    ),
    KernelMutant(
        "the largest movement is the last one",
        "csrc/cuda/trajectory_step.cu",
        "if (size > sums->max_dw) sums->max_dw = size;",
        "sums->max_dw = size;",
        _STEP,
    ),
    KernelMutant(
        "the mean of a new block starts from the old one",
        "csrc/cuda/trajectory_step.cu",
        "restart ? before - origin : *mean, inv_count);",
        "*mean, inv_count);",
        _PLAN,
    ),
    KernelMutant(
        "variances of a new block are added to the old ones",
        "csrc/cuda/trajectory_step.cu",
        "m2[i] = (restart ? typename E::Work{0} : m2[i]) + added;",
        "m2[i] = m2[i] + added;",
        ("project/test_cuda.py::test_variances_of_elements_agree_with_the_cpu",),
    ),
    KernelMutant(
        "a tensor's last chunk is not added up",
        "csrc/cuda/trajectory_step.cu",
        "(tables.tensors[tensor].count + kCudaChunk - 1) / kCudaChunk;\n  StepSums sums{};",
        "tables.tensors[tensor].count / kCudaChunk;\n  StepSums sums{};",
        _STEP,
    ),
    KernelMutant(
        "NaN does not reach the largest movement",
        "csrc/cuda/trajectory_step.cu",
        "  if (sums.dw_sq != sums.dw_sq) sums.max_abs_dw = sums.dw_sq;  // comparisons drop NaN\n",
        "",
        ("project/test_cuda.py::test_a_past_that_is_not_finite_is_seen_in_every_sum",),
    ),
    KernelMutant(
        "a group takes in its neighbour's tensors",
        "csrc/cuda/trajectory_step.cu",
        "ledger.rows[tensor].group == static_cast<double>(group)",
        "ledger.rows[tensor].group >= static_cast<double>(group)",
        _PLAN,
    ),
    KernelMutant(
        "the last entries of a batch are not written",
        "csrc/cuda/trajectory_step.cu",
        "const int64_t count = left < kBatch ? left : kBatch;",
        "const int64_t count = left < kBatch ? left : kBatch - 1;",
        _STEP,
    ),
    KernelMutant(
        "chunks of a tensor all read its first elements",
        "csrc/cuda/trajectory_step.cu",
        "= {static_cast<int32_t>(tensor), static_cast<int32_t>(i)};",
        "= {static_cast<int32_t>(tensor), 0};",
        _STEP,
    ),
    # ---- the sketch
    KernelMutant(
        "the queue of groups is half as long",
        "csrc/cuda/sketch.cu",
        "constexpr int kQueue = 128;",
        "constexpr int kQueue = 64;",
        _SKETCH,
    ),
    KernelMutant(
        "buckets are not cleared",
        "csrc/cuda/sketch.cu",
        "  for (int64_t b = thread; b < slice_buckets; b += kWarp) buckets[b] = 0;\n",
        "",
        _SKETCH,
    ),
    KernelMutant(
        "two groups add to the same buckets at once",
        "csrc/cuda/sketch.cu",
        "first_bucket(h, buckets) == first_bucket(other, buckets)",
        "false",
        _RACES_OF_A_SKETCH,
        mode="tsan",
    ),
    KernelMutant(
        "the queue is read before it is written",
        "csrc/cuda/sketch.cu",
        "queued += __popc(lows) + __popc(highs);\n    __syncwarp();",
        "queued += __popc(lows) + __popc(highs);",
        _RACES_OF_A_SKETCH,
        mode="tsan",
    ),
    KernelMutant(
        "the queue is written before it was read",
        "csrc/cuda/sketch.cu",
        "    __syncwarp();  // the queue is used again\n",
        "",
        _RACES_OF_A_SKETCH,
        mode="tsan",
        equivalent="drain() ends with a barrier of the warp after its last reading of the queue, and no group is left",
    ),
    KernelMutant(
        "the last group is left out",
        "csrc/cuda/sketch.cu",
        "base <= last_group / 2; base += kWarp",
        "base < last_group / 2; base += kWarp",
        _SKETCH,
    ),
    KernelMutant(
        "signs of the other half",
        "csrc/cuda/sketch.cu",
        "sign_bits(h) >> place & 1u",
        "sign_bits(other) >> place & 1u",
        _SKETCH,
    ),
    KernelMutant(
        "rows are added up before all warps are there",
        "csrc/cuda/sketch.cu",
        "sums[warp][thread] = sum;\n  __syncthreads();",
        "sums[warp][thread] = sum;",
        _RACES_OF_A_SKETCH,
        mode="tsan",
    ),
    KernelMutant(
        "a row without tensors keeps what was there",
        "csrc/cuda/sketch.cu",
        "places.empty ? 0.0 : *result;",
        "*result;",
        _SKETCH,
    ),
    KernelMutant(
        "rows stay not finite for ever",
        "csrc/cuda/sketch.cu",
        "    tables.not_finite[row] = 0;\n",
        "    ;\n",
        _SKETCH,
    ),
    KernelMutant(
        "a tensor's last slice is left out",
        "csrc/cuda/sketch.cu",
        "i < tensor.last_piece * tables.slices;",
        "i < tensor.last_piece * tables.slices - (tables.slices > 1);",
        _SKETCH,
    ),
    KernelMutant(
        "every batch of words is the first",
        "csrc/cuda/sketch.cu",
        "static_cast<const uint64_t*>(host) + first, static_cast",
        "static_cast<const uint64_t*>(host), static_cast",
        ("functional/test_sketch.py::test_many_tensors_on_cuda",),
    ),
    # ---- sums of many tensors
    KernelMutant(
        "a chunk is taken for one of the tensor behind it",
        "csrc/cuda/tensor_slices.cuh",
        "if (tensors[middle].first_chunk <= index)",
        "if (tensors[middle].first_chunk <= index + 1)",
        _SQUARES,
    ),
    KernelMutant(
        "chunks of tensors are as long as the first",
        "csrc/cuda/tensor_slices.cuh",
        "count = static_cast<int>(left < kCudaChunk ? left : kCudaChunk);",
        "count = static_cast<int>(kCudaChunk);",
        _SQUARES,
    ),
    KernelMutant(
        "an empty tensor has no chunk",
        "csrc/cuda/kernels.h",
        "return count > 0 ? (count + kCudaChunk - 1) / kCudaChunk : 1; }",
        "return (count + kCudaChunk - 1) / kCudaChunk; }",
        ("core/test_tensor_sums.py::test_squares_of_nothing",),
    ),
    KernelMutant(
        "a tensor's first chunk is not added up",
        "csrc/cuda/tensor_slices.cuh",
        "for (int64_t i = threadIdx.x; i < span.count; i += kThreads) sums =",
        "for (int64_t i = threadIdx.x + 1; i < span.count; i += kThreads) sums =",
        _SQUARES,
    ),
    KernelMutant(
        "every launch works on the first tensors",
        "csrc/cuda/tensor_slices.cuh",
        "std::copy(tensors.begin() + first, tensors.begin() + last, slice.tensors);",
        "std::copy(tensors.begin(), tensors.begin() + (last - first), slice.tensors);",
        (*_SQUARES, *_MEANS),
    ),
    KernelMutant(
        "eight bytes are read as sixteen",
        "csrc/cuda/tensor_slices.cuh",
        "std::conditional_t<sizeof lanes == sizeof(uint2), uint2, uint4>",
        "uint4",
        _SQUARES,
    ),
    KernelMutant(
        "squares of the last elements are left out",
        "csrc/cuda/square_sums.cu",
        "if (rest < count) observe<E>",
        "if (rest + 1 < count) observe<E>",
        _SQUARES,
    ),
    KernelMutant(
        "an overflow of squares is no infinite sum",
        "csrc/cuda/square_sums.cu",
        "isfinite(sum.square) ?",
        "sum.nonfinite == 0 ?",
        ("core/test_tensor_sums.py::test_squares_that_leave_float64",),
    ),
    KernelMutant(
        "one thread leaves before its tensor is added up",
        "csrc/cuda/square_sums.cu",
        "const int64_t tensor = blockIdx.x;\n",
        "const int64_t tensor = blockIdx.x;\n  if (threadIdx.x == 200) return;\n",
        _SQUARES,
    ),
    KernelMutant(
        "means of the last elements are kept",
        "csrc/cuda/fold_means.cu",
        "i < chunk.count; i += kThreads)",
        "i + 1 < chunk.count; i += kThreads)",
        _MEANS,
    ),
    KernelMutant(
        "all means have the first share",
        "csrc/cuda/fold_means.cu",
        "tables.share[slice.head.first_tensor + chunk.place]",
        "tables.share[0 * chunk.place]",
        _MEANS,
    ),
    KernelMutant(
        "shares are those of the first launch",
        "csrc/cuda/fold_means.cu",
        "tables.share[slice.head.first_tensor + chunk.place]",
        "tables.share[chunk.place]",
        _MEANS,
    ),
    KernelMutant(
        "a parameter's largest movement is the last one",
        "csrc/cuda/update_sums.cu",
        "if (size > max_dw) max_dw = size;",
        "max_dw = size;",
        _UPDATES,
    ),
    KernelMutant(
        "infinite parameters are not counted",
        "csrc/cuda/update_sums.cu",
        "nonfinite += !(isfinite(w) && isfinite(update.moved));",
        "nonfinite += !isfinite(update.moved);",
        ("functional/test_update_sums.py::test_values_that_are_not_finite_on_cuda",),
    ),
    KernelMutant(
        "the half of a group is left out",
        "csrc/cuda/update_sums.cu",
        "part < kGroup; part += kElements)",
        "part < kElements; part += kElements)",
        _UPDATES,
    ),
    KernelMutant(
        "an unaligned moment is read by wide accesses",
        "csrc/cuda/update_sums.cu",
        "(tensor.second_dtype == tensor.dtype && is_aligned(tensor.second))",
        "tensor.second_dtype == tensor.dtype",
        ("functional/test_update_sums.py::test_sums_on_cuda_do_not_depend_on_alignment_or_dtype",),
    ),
    KernelMutant(
        "a mixture with float64 is added up in float32",
        "csrc/cuda/update_sums.cu",
        "(kFirst && tensor.first_dtype == kDouble)",
        "false",
        ("functional/test_update_sums.py::test_mixtures_on_cuda",),
    ),
    KernelMutant(
        "a ninth rule is the first",
        "csrc/cuda/update_sums.cu",
        "if (place == kRules) return false;",
        "if (place == kRules) place = 0;",
        ("functional/test_update_sums.py::test_mixtures_on_cuda",),
    ),
    KernelMutant(
        "the address of a number is taken for it",
        "csrc/cuda/update_sums.cu",
        "if (rule.stored[i] >= 0)",
        "if (rule.stored[i] > 100)",
        ("functional/test_update_sums.py::test_numbers_of_a_rule_may_lie_on_cuda",),
    ),
    KernelMutant(
        "what is normalised is not divided by its elements",
        "csrc/cuda/update_sums.cu",
        "finite ? sums.direction_sq / span.elements : kNaN",
        "finite ? sums.direction_sq : kNaN",
        _UPDATES,
    ),
    KernelMutant(
        "the table of normalised updates has one column",
        "csrc/cuda/update_sums.cu",
        "if (tensor < tensors) lipcore",
        "if (tensor < 1) lipcore",
        ("functional/test_update_sums.py::test_update_sums_can_be_captured_in_a_graph",),
    ),
    KernelMutant(
        "partial sums have the room of one chunk less",
        "csrc/cuda/tensor_sums.cpp",
        "TorchMemory::size_of<Partial>(chunks) +",
        "TorchMemory::size_of<Partial>(chunks / 2) +",
        (*_SQUARES, *_UPDATES),
    ),
    # ---- distributions
    KernelMutant(
        "the last chunk of values is as long as the others",
        "csrc/cuda/observe_rows.cu",
        "static_cast<int>(left < kCudaChunk ? left : kCudaChunk);",
        "static_cast<int>(kCudaChunk);",
        _OBSERVED,
    ),
    KernelMutant(
        "places count in the first one's bins",
        "csrc/cuda/observe_rows.cu",
        "out.bins + place * kBins;",
        "out.bins + 0 * place * kBins;",
        _OBSERVED,
    ),
    KernelMutant(
        "values that are not there are counted in a bin",
        "csrc/cuda/observe_rows.cu",
        "if (bin >= 0) atomicAdd",
        "atomicAdd",
        _OBSERVED,
    ),
    KernelMutant(
        "bins are counted without care for other threads",
        "csrc/cuda/observe_rows.cu",
        "if (bin >= 0) atomicAdd(reinterpret_cast<unsigned long long*>(&bins[bin]), 1ull);",
        "if (bin >= 0) ++bins[bin];",
        _OBSERVED,
        mode="tsan",
    ),
    KernelMutant(
        "a step's moments replace those before",
        "csrc/cuda/observe_rows.cu",
        "if (out.chunks == 1)\n    merge(&out.rows[place], row);",
        "if (out.chunks == 1)\n    out.rows[place] = row;",
        _OBSERVED,
    ),
    KernelMutant(
        "chunks of other places are merged",
        "csrc/cuda/observe_rows.cu",
        "out.partials[place * out.chunks + i]",
        "out.partials[place + i]",
        _OBSERVED,
    ),
    KernelMutant(
        "values follow each other in every table",
        "csrc/cuda/observe_rows.cu",
        "E::widen(values[b * table.stride]);",
        "E::widen(values[b]);",
        ("core/test_observed_rows.py::test_dtypes_strides_and_special_values",),
    ),
    KernelMutant(
        "ratios are to the first gradient",
        "csrc/cuda/observe_rows.cu",
        "table.gradient[b * table.gradient_stride]",
        "table.gradient[0 * b * table.gradient_stride]",
        ("core/test_observed_rows.py::test_ratios",),
    ),
    # ---- the ledger
    KernelMutant(
        "the cursor moves while others read it",
        "csrc/cuda/trajectory_step.cu",
        "  __syncthreads();  // everybody has read the cursor\n",
        "",
        _LEDGER,
        mode="tsan",
    ),
    KernelMutant(
        "every other group is left out",
        "csrc/cuda/trajectory_step.cu",
        "group <= ledger.groups; group += kThreads / kWarp)",
        "group <= ledger.groups; group += 2 * kThreads / kWarp)",
        _LEDGER,
    ),
    KernelMutant(
        "the last lane's share of a group is left out",
        "csrc/cuda/trajectory_step.cu",
        "for (int distance = 16; distance; distance /= 2) {\n    double others",
        "for (int distance = 8; distance; distance /= 2) {\n    double others",
        _LEDGER,
    ),
    # ---- the launch code
    KernelMutant(
        "a plan forgets which tensors moved",
        "csrc/cuda/launch.cpp",
        "stale_ = stale_ || moved || captured_;",
        "stale_ = stale_ || captured_;",
        _PLAN,
    ),
    KernelMutant(
        "a captured step does not bring its pointers",
        "csrc/cuda/launch.cpp",
        "captured_ = captured_ || capturing != cudaStreamCaptureStatusNone;",
        "",
        _GRAPH,
    ),
    KernelMutant(
        "the flags of tensors have no memory of their own",
        "csrc/cuda/launch.cpp",
        "Memory::size_of<StepSums>(chunks) + Memory::size_of<int32_t>(tensors)",
        "Memory::size_of<StepSums>(chunks) + Memory::size_of<int32_t>(0)",
        _STEP,
    ),
    KernelMutant(
        "a tensor opens no group of its own",
        "csrc/cuda/step_schedule.cpp",
        "      launches.push_back({group_first, next - group_first, 0});\n      group_first = next;",
        "      launches.push_back({group_first, next - group_first, 0});",
        _GROUPS,
    ),
    KernelMutant(
        "a sketch forgets which tensors moved",
        "csrc/cuda/sketch_runner.cpp",
        "stale_ = stale_ || moved || captured_;",
        "stale_ = stale_ || captured_;",
        _SKETCH,
    ),
    KernelMutant(
        "a row's places end one too early",
        "csrc/cuda/sketch_runner.cpp",
        "row.last_place = task.place + 1;",
        "row.last_place = task.place;",
        _SKETCH,
    ),
)
