// Tensors in error messages.
#pragma once

#include "python/tensor_view.h"

namespace lipcore {

// What a shape looks like in an error message: "[32, 10]".
struct ShapeText {
  char text[160];
  explicit ShapeText(const TensorView& view);
};

const char* dtype_name(DType dtype);

}  // namespace lipcore
