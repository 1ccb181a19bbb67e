// Where the samples of packed rows begin and end.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

// Samples of packed rows: sample b is rows begin[b] to begin[b + 1].
struct Offsets {
  const int64_t* begin = nullptr;  // null: not packed
  int64_t samples = 0;
};

// Checks that int64 offsets, [samples + 1], ascend from 0 to `rows`.
bool read_offsets(const TensorView& offsets, int64_t rows, Offsets* out);

}  // namespace lipcore
