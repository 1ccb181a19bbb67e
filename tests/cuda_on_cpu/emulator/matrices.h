// What a warp does with matrices, of which every lane holds a part.
#pragma once

#include "emulator/block.h"

namespace emulator {

// ldmatrix.x4: what each lane gets of the rows that lanes 8 i ... 8 i + 7 hand in for matrix i.
void load_matrices(GpuThread* warp, bool transposed);

// mma.m16n8k16: d = a b + c in float32, from 16-bit numbers.
void multiply_matrices(GpuThread* warp);

}  // namespace emulator
