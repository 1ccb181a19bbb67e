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
_ROW_TESTS = "functional/test_row_sum_norms.py"
_ROW_SUMS = (f"{_ROW_TESTS}::test_layouts_on_cuda", f"{_ROW_TESTS}::test_sizes_on_cuda")
_PACKED_SUMS = (f"{_ROW_TESTS}::test_packed_documents_on_cuda",)
_OFFSETS = (f"{_ROW_TESTS}::test_offsets_that_do_not_fit_give_nan_on_cuda",)
_LINEAR_TESTS = "functional/test_linear_norms.py"
_LINEAR_RANGE = (f"{_LINEAR_TESTS}::test_range_and_special_values_on_cuda",)
_LINEAR = (f"{_LINEAR_TESTS}::test_sizes_on_cuda", f"{_LINEAR_TESTS}::test_layouts_and_dtypes_on_cuda")
_LINEAR_RACES = (f"{_LINEAR_TESTS}::test_races_on_cuda",)
_CONV_TESTS = "functional/test_conv_norms.py"
_CONV = (f"{_CONV_TESTS}::test_geometries_on_cuda",)
_TOKEN_TESTS = "functional/test_embedding_norms.py"
_TOKENS = (f"{_TOKEN_TESTS}::test_packed_documents_on_cuda", f"{_TOKEN_TESTS}::test_sizes_on_cuda")

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
        "csrc/cuda/teams.cuh",
        "kSize == 32 ? 0xffffffffu",
        "kSize == 32 ? 0x7fffffffu",
        _NORMS,
    ),
    KernelMutant(
        "a mask of four lanes starts one lane too early",
        "csrc/cuda/teams.cuh",
        "((1u << kSize % 32) - 1) << (threadIdx.x % 32 / kSize * kSize)",
        "((1u << kSize % 32) - 1) << (threadIdx.x % 32 / kSize * kSize - (threadIdx.x % 32 >= 4))",
        _NORMS,
    ),
    KernelMutant(
        "every thread takes a block's sum for its own",
        "csrc/cuda/teams.cuh",
        "return share(Reduce(storage->reduce).Sum(x));",
        "return Reduce(storage->reduce).Sum(x);",
        _SPECIAL,
    ),
    KernelMutant(
        "a block's result is read before it is written",
        "csrc/cuda/teams.cuh",
        "if (threadIdx.x == 0) storage->result = x;\n    __syncthreads();",
        "if (threadIdx.x == 0) storage->result = x;",
        _RACES_OF_NORMS,
        mode="tsan",
    ),
    KernelMutant(
        "a block's storage is used again without a barrier",
        "csrc/cuda/teams.cuh",
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
    # ---- sums of rows
    KernelMutant(
        "a piece's last row is left out",
        "csrc/cuda/row_sum_norms.cu",
        "row < piece.rows; row += kWarps)",
        "row < piece.rows - 1; row += kWarps)",
        _ROW_SUMS,
    ),
    KernelMutant(
        "a run's last quad is left out",
        "csrc/cuda/row_sum_norms.cu",
        "row < piece.rows; row += kQuad * kWarp)",
        "row < piece.rows - kQuad; row += kQuad * kWarp)",
        _ROW_SUMS,
    ),
    KernelMutant(
        "a quad's tail is read as a whole one",
        "csrc/cuda/quads.cuh",
        "if (kQuads && count >= kQuad) {",
        "if (kQuads && count > 0) {",
        _ROW_SUMS,
    ),
    KernelMutant(
        "quads are read wherever neighbours are",
        "csrc/cuda/quads.cuh",
        "across % kQuad == 0 && sample % kQuad == 0 &&",
        "sample % kQuad == 0 &&",
        _ROW_SUMS,
    ),
    KernelMutant(
        "samples are taken for aligned",
        "csrc/cuda/quads.cuh",
        "across % kQuad == 0 && sample % kQuad == 0 &&",
        "across % kQuad == 0 &&",
        (f"{_ROW_TESTS}::test_samples_that_are_not_aligned_on_cuda",),
    ),
    KernelMutant(
        "the first element is taken for aligned",
        "csrc/cuda/quads.cuh",
        "reinterpret_cast<uintptr_t>(data) % alignment == 0",
        "alignment > 0",
        (f"{_ROW_TESTS}::test_neither_alignment_nor_run_changes_a_bit_on_cuda",),
    ),
    KernelMutant(
        "a warp's sums are left out",
        "csrc/cuda/row_sum_norms.cu",
        "for (int k = 1; k < kWarps; ++k) total",
        "for (int k = 1; k < kWarps - 1; ++k) total",
        _ROW_SUMS,
    ),
    KernelMutant(
        "sums of warps are added before all are there",
        "csrc/cuda/row_sum_norms.cu",
        "    __syncthreads();\n    const int64_t most",
        "    const int64_t most",
        (f"{_ROW_TESTS}::test_races_on_cuda",),
        mode="tsan",
    ),
    KernelMutant(
        "the sums' memory is used again too early",
        "csrc/cuda/row_sum_norms.cu",
        "    __syncthreads();  // the sums' memory is used again\n",
        "",
        (f"{_ROW_TESTS}::test_races_on_cuda",),
        mode="tsan",
        equivalent="a block takes a second turn only where there are more than a million of them",
    ),
    KernelMutant(
        "the last piece of a sample is not added up",
        "csrc/cuda/row_sum_norms.cu",
        "valid ? (rows.count + size - 1) / size : 0;",
        "valid ? rows.count / size : 0;",
        _ROW_SUMS,
    ),
    KernelMutant(
        "scale and shift change places",
        "csrc/cuda/row_sum_norms.cu",
        "out[(scale ? 0 : sums.scale) * sums.samples + sample]",
        "out[(scale ? sums.shift : 0) * sums.samples + sample]",
        _ROW_SUMS,
    ),
    KernelMutant(
        "what overflowed on the way stays so",
        "csrc/cuda/row_sum_norms.cu",
        "if (sums.dtype == DType::kFloat64 && !isfinite(squares))",
        "if (sums.dtype == DType::kFloat32 && !isfinite(squares))",
        (f"{_ROW_TESTS}::test_range_and_special_values_on_cuda",),
    ),
    KernelMutant(
        "packed samples have no places of their own",
        "csrc/cuda/row_sum_norms.cu",
        "return first_row / kPieceRows + sample;",
        "return first_row / kPieceRows;",
        _PACKED_SUMS,
    ),
    KernelMutant(
        "a piece of packed rows reaches into the next sample",
        "csrc/cuda/row_sum_norms.cu",
        "return {low, left < kPieceRows ? left : kPieceRows, rows.first + begin};",
        "return {low, kPieceRows, rows.first + begin};",
        _PACKED_SUMS,
    ),
    KernelMutant(
        "offsets are believed",
        "csrc/cuda/packed_rows.cuh",
        "return team.max(fine ? 0.0 : 1.0) == 0.0;",
        "return true;",
        _OFFSETS,
    ),
    KernelMutant(
        "the last offset is not looked at",
        "csrc/cuda/packed_rows.cuh",
        "offsets[0] == 0 && offsets[samples] == rows;",
        "offsets[0] == 0;",
        _OFFSETS,
    ),
    KernelMutant(
        "rows are read wherever offsets point to",
        "csrc/cuda/packed_rows.cuh",
        "  if (first < 0 || last > rows || first > last) return {0, 0};\n",
        "",
        _OFFSETS,
    ),
    # ---- weight gradients
    KernelMutant(
        "the last position of a step is left out",
        "csrc/cuda/weight_norms.cu",
        "for (int64_t first = 0; first < a.positions; first += kDepth)",
        "for (int64_t first = 0; first < a.positions - 1; first += kDepth)",
        _LINEAR,
    ),
    KernelMutant(
        "channels beyond the last are read",
        "csrc/cuda/weight_norms.cu",
        "if (m >= side.channels) return",
        "if (m > side.channels) return",
        _LINEAR,
    ),
    KernelMutant(
        "positions beyond the last are read",
        "csrc/cuda/weight_norms.cu",
        "if (k >= side.positions) return",
        "if (k > side.positions) return",
        _LINEAR,
    ),
    KernelMutant(
        "a second quad follows the first at once",
        "csrc/cuda/weight_norms.cu",
        "j / kQuad * kSide * kQuad + thread * kQuad",
        "j / kQuad * kQuad + thread * kQuad",
        (f"{_LINEAR_TESTS}::test_range_and_special_values_on_cuda",),
    ),
    KernelMutant(
        "tiles are multiplied before they are filled",
        "csrc/cuda/weight_norms.cu",
        "    fill<Sum, kTile, kPatches>(memory.b, memory.b_channels, b, first);\n    __syncthreads();",
        "    fill<Sum, kTile, kPatches>(memory.b, memory.b_channels, b, first);",
        _LINEAR_RACES,
        mode="tsan",
    ),
    KernelMutant(
        "tiles are filled before they are multiplied",
        "csrc/cuda/weight_norms.cu",
        "    __syncthreads();  // for the channels, and because the tiles are used again\n",
        "    if (first == 0) __syncthreads();\n",
        _LINEAR_RACES,
        mode="tsan",
    ),
    KernelMutant(
        "a pair of tiles of tokens counts once",
        "csrc/cuda/weight_norms.cu",
        "if (row != rest) sums.total *= 2;",
        "",
        (f"{_LINEAR_TESTS}::test_sizes_on_cuda",),
    ),
    KernelMutant(
        "Gram's result is always believed",
        "csrc/math/gram_sums.h",
        "  constexpr double kCancelled = 5e-3;",
        "  constexpr double kCancelled = -1e300;",
        (f"{_LINEAR_TESTS}::test_gram_knows_when_it_has_lost_its_digits_on_cuda",),
    ),
    KernelMutant(
        "what lost digits to underflow is believed",
        "csrc/cuda/weight_norms.cu",
        "(work.wide ? 1e-290 : 1e-44)",
        "0",
        _LINEAR_RANGE,
    ),
    KernelMutant(
        "what overflowed is believed",
        "csrc/cuda/weight_norms.cu",
        ": isfinite(total) && total >= safe_sum(work)",
        ": !(total < safe_sum(work))",
        _LINEAR_RANGE,
    ),
    KernelMutant(
        "what is made again is not scaled",
        "csrc/cuda/weight_norms.cu",
        "  const int exponent = -ilogb(largest);",
        "  const int exponent = 0;",
        _LINEAR_RANGE,
    ),
    KernelMutant(
        "infinity beside a tile's end makes NaN",
        "csrc/cuda/weight_norms.cu",
        "if (element_of(thread / kSide, i) < rows && element_of(thread % kSide, j) < columns) visit(i, j);",
        "visit(i, j);",
        _LINEAR_RANGE,
    ),
    KernelMutant(
        "packed tokens begin at the first row",
        "csrc/cuda/weight_norms.cu",
        "norms.offsets ? tokens.first * factor.along[2] : sample * factor.sample",
        "norms.offsets ? 0 : sample * factor.sample",
        (f"{_LINEAR_TESTS}::test_packed_documents_on_cuda",),
    ),
    KernelMutant(
        "the last unit is not added up",
        "csrc/cuda/weight_norms.cu",
        "unit < work.units; unit += kThreads)",
        "unit < work.units - (work.units > 1); unit += kThreads)",
        (f"{_LINEAR_TESTS}::test_sizes_on_cuda",),
    ),
    KernelMutant(
        "the tap's dilation is left out",
        "csrc/cuda/weight_norms.cu",
        "tap[d] * shape.dilation[d] - shape.padding[d]",
        "tap[d] - shape.padding[d]",
        _CONV,
    ),
    KernelMutant(
        "the position's stride is left out",
        "csrc/cuda/weight_norms.cu",
        "if (side.patches) at[d] *= side.shape->stride[d];",
        "",
        _CONV,
    ),
    KernelMutant(
        "the image is read beyond its lower end",
        "csrc/cuda/weight_norms.cu",
        "if (at < 0 || at >= side.shape->size[d]) return false;",
        "if (at >= side.shape->size[d]) return false;",
        _CONV,
    ),
    KernelMutant(
        "the image is read beyond its upper end",
        "csrc/cuda/weight_norms.cu",
        "if (at < 0 || at >= side.shape->size[d]) return false;",
        "if (at < 0 || at > side.shape->size[d]) return false;",
        _CONV,
    ),
    KernelMutant(
        "every group reads the first one's image",
        "csrc/cuda/weight_norms.cu",
        "start_of(x, norms, sample, group * shape.inputs, tokens)",
        "start_of(x, norms, sample, 0, tokens)",
        _CONV,
    ),
    KernelMutant(
        "rows with gaps are taken for one run",
        "csrc/cuda/weight_norms.cu",
        "size[1] == 1 || along[1] == along[2] * size[2]",
        "true",
        (f"{_CONV_TESTS}::test_layouts_and_dtypes_on_cuda",),
    ),
    KernelMutant(
        "the batch's gradient is the last sample's",
        "csrc/cuda/weight_norms.cu",
        "        total[i][j] += sums[i][j];",
        "        total[i][j] = sums[i][j];",
        (f"{_LINEAR_TESTS}::test_weight_grad_on_cuda",),
    ),
    KernelMutant(
        "the batch's gradient is written transposed",
        "csrc/cuda/weight_norms.cu",
        "to[(row + element_of(down, i)) * norms.total_stride + column + element_of(across, j)] =",
        "to[(row + element_of(across, j)) * norms.total_stride + column + element_of(down, i)] =",
        (f"{_LINEAR_TESTS}::test_weight_grad_on_cuda",),
    ),
    KernelMutant(
        "the batch's gradient is believed whatever offsets say",
        "csrc/cuda/weight_norms.cu",
        '          valid ? total[i][j] : static_cast<Sum>(nan(""));',
        "          total[i][j];",
        (f"{_LINEAR_TESTS}::test_weight_grad_on_cuda",),
    ),
    KernelMutant(
        "the gradient of no samples is not written",
        "csrc/cuda/weight_norms.cu",
        "if (work.units > 0 && (norms.samples > 0 || norms.total)) {",
        "if (work.units > 0 && norms.samples > 0) {",
        (f"{_LINEAR_TESTS}::test_weight_grad_on_cuda",),
    ),
    # ---- embeddings
    KernelMutant(
        "a run reaches into the next sample",
        "csrc/cuda/embedding_norms.cu",
        "norms.tokens[last] == token && norms.rows[last] < rows.first + rows.count)",
        "norms.tokens[last] == token)",
        _TOKENS,
    ),
    KernelMutant(
        "a run begins in the sample before",
        "csrc/cuda/embedding_norms.cu",
        "norms.tokens[place - 1] == token && norms.rows[place - 1] >= rows.first)",
        "norms.tokens[place - 1] == token)",
        _TOKENS,
    ),
    KernelMutant(
        "every place begins a run",
        "csrc/cuda/embedding_norms.cu",
        "if (place > 0 && norms.tokens[place - 1] == token",
        "if (place > work.rows && norms.tokens[place - 1] == token",
        _TOKENS,
    ),
    KernelMutant(
        "a run's last row is left out",
        "csrc/cuda/embedding_norms.cu",
        "place < run.last; ++place) {",
        "place < run.last - 1; ++place) {",
        _TOKENS,
    ),
    KernelMutant(
        "padding counts",
        "csrc/cuda/embedding_norms.cu",
        "if (work.padded && token == work.padding) return",
        "if (work.padded && token == work.padding && place == 0) return",
        (f"{_TOKEN_TESTS}::test_layouts_padding_and_weights_on_cuda",),
    ),
    KernelMutant(
        "weights are those of the sorted rows",
        "csrc/cuda/embedding_norms.cu",
        "norms.weights ? norms.weights[row] : 1;\n#pragma",
        "norms.weights ? norms.weights[place] : 1;\n#pragma",
        (f"{_TOKEN_TESTS}::test_layouts_padding_and_weights_on_cuda",),
    ),
    KernelMutant(
        "places without a run keep what was there",
        "csrc/cuda/embedding_norms.cu",
        "if (team.rank() == 0) partials[row",
        "if (team.rank() == 0 && run.first < run.last) partials[row",
        _TOKENS,
    ),
    KernelMutant(
        "strips after the first are left out",
        "csrc/cuda/embedding_norms.cu",
        "i < rows.count * work.strips; i += kThreads)\n      squares",
        "i < rows.count; i += kThreads)\n      squares",
        _TOKENS,
    ),
    KernelMutant(
        "what overflowed on the way to a token's sum stays so",
        "csrc/cuda/embedding_norms.cu",
        "if (!isfinite(squares) && (norms.dtype == DType::kFloat64 || norms.weights))",
        "if (!isfinite(squares) && norms.weights)",
        (f"{_TOKEN_TESTS}::test_range_and_special_values_on_cuda",),
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
)
