// A single element of a tensor, widened.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

// offset in elements; of a tensor of a floating type on the CPU.
inline double read_element(const TensorView& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(view.data)[offset];
    case DType::kFloat32:
      return static_cast<const float*>(view.data)[offset];
    case DType::kBfloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(view.data)[offset]);
    default:
      return float16_to_float(static_cast<const uint16_t*>(view.data)[offset]);
  }
}

}  // namespace lipcore
