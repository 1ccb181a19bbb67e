// Where the samples of packed rows begin and end.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

// Samples of packed rows: sample b is rows begin[b] to begin[b + 1].
struct Offsets {
  const int64_t* begin = nullptr;  // null: not packed
  int64_t samples = 0;
};

// Checks that int64 offsets, [samples + 1], are on the device of `like` and ascend from 0 to `rows`; whether they do is
// on a CUDA device for the kernels to see, whose results are NaN where they do not.
bool read_offsets(const TensorView& offsets, const TensorView& like, int64_t rows, Offsets* out);

}  // namespace lipcore
