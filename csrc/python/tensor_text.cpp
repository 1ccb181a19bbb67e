#include "python/tensor_text.h"

#include <cstdio>
#include <cstring>

namespace lipcore {

ShapeText::ShapeText(const TensorView& view) {
  size_t used = 1;
  std::strcpy(text, "[");
  for (int d = 0; d < view.ndim && used < sizeof text - 32; ++d)
    used += static_cast<size_t>(
        std::snprintf(text + used, sizeof text - used, d ? ", %lld" : "%lld", static_cast<long long>(view.shape[d])));
  std::strcpy(text + used, "]");
}

const char* dtype_name(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "int64"};
  return names[static_cast<int>(dtype)];
}

}  // namespace lipcore
