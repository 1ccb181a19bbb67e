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
_RACES_OF_A_STEP = (f"{_CUDA}::test_a_past_that_is_not_finite_is_seen_in_every_sum",)
_RACES_OF_A_SKETCH = ("functional/test_sketch.py::test_many_tensors_on_cuda",)
_SKETCH = ("functional/test_sketch.py::test_sizes_on_cuda", "functional/test_sketch.py::test_plan_on_cuda")
_STATS = ("functional/test_tensor_stats.py::test_on_cuda",)
_RACES_OF_STATS = ("functional/test_tensor_stats.py::test_many_tensors_on_cuda",)

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
        "ledger.rows[i].group == static_cast<double>(group)",
        "ledger.rows[i].group >= static_cast<double>(group)",
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
    # ---- statistics of tensors
    KernelMutant(
        "an element behind the last one is observed",
        "csrc/cuda/tensor_stats.cu",
        "if (rest < count) visit(E::widen(x[rest]));",
        "if (rest <= count) visit(E::widen(x[rest]));",
        _STATS,
    ),
    KernelMutant(
        "a chunk is taken for one of the tensor before",
        "csrc/cuda/tensor_stats.cu",
        "tables.tensors[middle].first_chunk <= chunk",
        "tables.tensors[middle].first_chunk < chunk",
        _STATS,
    ),
    KernelMutant(
        "the mean is read before it is there",
        "csrc/cuda/tensor_stats.cu",
        "  __syncthreads();  // for the mean and the counts\n",
        "",
        _STATS,
    ),
    KernelMutant(
        "counts are added to while others are still set to zero",
        "csrc/cuda/tensor_stats.cu",
        "counts[b] = 0;\n  __syncthreads();",
        "counts[b] = 0;",
        _RACES_OF_STATS,
        mode="tsan",
    ),
    KernelMutant(
        "deviations of what is not finite are added",
        "csrc/cuda/tensor_stats.cu",
        "    if (!isfinite(x)) return;\n",
        "",
        _STATS,
    ),
    KernelMutant(
        "what is in a row is lost",
        "csrc/cuda/tensor_stats.cu",
        "if (threadIdx.x == 0) merge(&tables.rows[tensor.place], all);",
        "if (threadIdx.x == 0) tables.rows[tensor.place] = all;",
        _STATS,
    ),
)
