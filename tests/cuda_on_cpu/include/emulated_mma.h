// What csrc/cuda/mma.cuh offers, as the PTX ISA describes it. Rows of matrices are read and copies are made by the GPU
// threads themselves, in this header, so that the sanitizers watch them.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace emulator {

#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void need_tensor_cores() {
  if (capability() < 80) finding("no tensor cores that take this are on a device of capability %d", capability());
}

// What is there until the copy lands is nobody's: NaN as every type, and written, so that whoever still reads it races.
inline void copy_async(void* shared, const void* from, int bytes) {
  need_tensor_cores();
  check_aligned(shared, 16, "cp.async to shared memory");
  check_aligned(from, 16, "cp.async");
  std::memset(shared, 0xff, 16);
  AsyncCopies& copies = async_copies();
  if (copies.count == AsyncCopies::kMost) return finding("cp.async: a thread has more than %d copies", copies.count);
  copies.all[copies.count++] = {shared, from, bytes, copies.group};
}

inline void commit_copies() { ++async_copies().group; }

inline void wait_for_copies(int left) {
  AsyncCopies& copies = async_copies();
  int kept = 0;
  for (int i = 0; i < copies.count; ++i) {
    const AsyncCopy copy = copies.all[i];
    if (copy.group >= copies.group - left) {
      copies.all[kept++] = copy;
      continue;
    }
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
  copies.count = kept;
}

inline void load_matrices(const void* row, bool transposed, uint32_t (&to)[4], EMULATOR_SITE) {
  check_aligned(row, 16, "ldmatrix");
  uint32_t mine[4];
  std::memcpy(mine, row, sizeof mine);
  const Collective kind = transposed ? Collective::kLoadTransposed : Collective::kLoad;
  collective(kind, ~0u, 0, mine, to, sizeof mine, {file, line});
}

inline void add_matrix_product(bool bfloat16, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&c)[4],
                               EMULATOR_SITE) {
  need_tensor_cores();
  MatrixProduct part;
  std::memcpy(part.a, a, sizeof part.a);
  std::memcpy(part.b, b, sizeof part.b);
  std::memcpy(part.c, c, sizeof part.c);
  MatrixProduct result;
  collective(Collective::kMatrixProduct, ~0u, bfloat16, &part, &result, sizeof part, {file, line});
  std::memcpy(c, result.c, sizeof part.c);
}

#undef EMULATOR_SITE

}  // namespace emulator
