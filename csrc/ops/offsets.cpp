#include "ops/offsets.h"

#include "python/tensor_text.h"

namespace lipcore {

bool read_offsets(const TensorView& offsets, int64_t rows, Offsets* out) {
  const int64_t last = offsets.numel - 1;
  if (offsets.ndim != 1 || last < 0 || !offsets.on_cpu())
    return fail({"offsets"}, "expected shape [B + 1] on the CPU, got %s", ShapeText(offsets).text);
  const auto* at = static_cast<const int64_t*>(offsets.data);
  if (at[0] != 0 || at[last] != rows)
    return fail({"offsets"}, "expected to go from 0 to the number of rows, %lld, got %lld to %lld",
                static_cast<long long>(rows), static_cast<long long>(at[0]), static_cast<long long>(at[last]));
  for (int64_t i = 0; i < last; ++i)
    if (at[i] > at[i + 1])
      return fail({"offsets"}, "expected ascending values, got %lld before %lld at index %lld",
                  static_cast<long long>(at[i]), static_cast<long long>(at[i + 1]), static_cast<long long>(i));
  *out = {at, last};
  return true;
}

}  // namespace lipcore
