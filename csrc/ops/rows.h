// The rows of a [B, ...] tensor, as the kernels see them. Plain data, for host and device.
#pragma once

#include <cstdint>

#include "math/dtype.h"

namespace lipcore {

constexpr int kRowDims = 8;

// Dense rows are flat runs of memory; others are read element by element (CUDA) or gathered chunk by chunk (CPU).
struct Rows {
  const char* data;
  DType dtype;
  int64_t count, length, stride;  // stride between rows, in elements
  bool dense;
  int ndim;  // of a row, without dimensions of size 1 and with mergeable ones merged, innermost last
  int64_t shape[kRowDims], strides[kRowDims];  // not set for dense rows
};

}  // namespace lipcore
