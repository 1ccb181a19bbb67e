// What this core asks of tensor cores, and of copies into shared memory that nobody waits for: PTX in thin wrappers.
// From sm_80 on; on older devices these are never called. On the emulator (tests/cuda_on_cpu) other bodies follow PTX's
// words.
#pragma once

#include "cuda/common.cuh"

#if !defined(__CUDACC__)
#include <emulated_mma.h>
#endif

namespace lipcore::cuda {

constexpr int kMmaPtx = 80;  // the architecture that has all of them

#if defined(__CUDACC__)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define LIPCORE_PTX(...) asm volatile(__VA_ARGS__)
#else
#define LIPCORE_PTX(...) __trap()
#endif

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// 16 bytes: `bytes` of them from global memory, zeros behind. Both on 16 bytes; what is behind `bytes` is not touched.
__device__ __forceinline__ void copy_async(void* shared, const void* from, int bytes) {
  [[maybe_unused]] const unsigned to = shared_address(shared);
  LIPCORE_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)),
              "r"(bytes) : "memory");
}

// This thread's copies since the last call are a group.
__device__ __forceinline__ void commit_copies() { LIPCORE_PTX("cp.async.commit_group;" :: : "memory"); }

// Waits for all groups of this thread but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  LIPCORE_PTX("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four matrices of 8 x 8 16-bit numbers: lane 8 i + r says where row r of matrix i lies (8 numbers, on 16 bytes), and
// gets of each, in one word, the numbers [lane / 4][lane % 4 * 2] and the one behind; transposed, those of the
// transpose.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&to)[4]) {
  [[maybe_unused]] const unsigned from = shared_address(row);
  if constexpr (kTransposed)
    LIPCORE_PTX("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]),
                "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
  else
    LIPCORE_PTX("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]),
                "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

// c += a b in float32, of matrices [16, 16] and [16, 8] that a warp holds together. A word of a has row lane / 4, or
// the one 8 below (words 1, 3), and columns lane % 4 * 2, + 8 (words 2, 3), and the one behind; a word of b these as
// rows, and column lane / 4. c0, c1 are row lane / 4, columns lane % 4 * 2 and the one behind; c2, c3 8 rows below.
template <class E>
__device__ __forceinline__ void add_matrix_product(const uint32_t (&a)[4], const uint32_t (&b)[2], float& c0, float& c1,
                                                   float& c2, float& c3) {
  if constexpr (std::is_same_v<E, Bfloat16>)
    LIPCORE_PTX(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(c0),
        "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    LIPCORE_PTX(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};" : "+f"(c0),
        "+f"(c1), "+f"(c2), "+f"(c3) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#undef LIPCORE_PTX

#else

inline void copy_async(void* shared, const void* from, int bytes) { emulator::copy_async(shared, from, bytes); }
inline void commit_copies() { emulator::commit_copies(); }
template <int kLeft>
inline void wait_for_copies() {
  emulator::wait_for_copies(kLeft);
}
template <bool kTransposed>
inline void load_matrices(const void* row, uint32_t (&to)[4]) {
  emulator::load_matrices(row, kTransposed, to);
}
template <class E>
inline void add_matrix_product(const uint32_t (&a)[4], const uint32_t (&b)[2], float& c0, float& c1, float& c2,
                               float& c3) {
  static_assert(std::is_same_v<E, Bfloat16> || std::is_same_v<E, Float16>);
  float c[4] = {c0, c1, c2, c3};
  emulator::add_matrix_product(std::is_same_v<E, Bfloat16>, a, b, c);
  c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3];
}

#endif

}  // namespace lipcore::cuda
