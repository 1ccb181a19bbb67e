#include "ops/offsets.h"

#include "python/tensor_text.h"

namespace lipcore {

bool read_offsets(const TensorView& offsets, const TensorView& like, int64_t rows, Offsets* out) {
  const int64_t last = offsets.numel - 1;
  if (offsets.ndim != 1 || last < 0)
    return fail({"offsets"}, "expected shape [B + 1], got %s", ShapeText(offsets).text);
  if (!offsets.same_device(like)) return fail({"offsets"}, "are on another device than the rows; put both on one");
  const auto* at = static_cast<const int64_t*>(offsets.data);
  *out = {at, last};
  if (!offsets.on_cpu()) return true;  // the kernels look
  if (at[0] != 0 || at[last] != rows)
    return fail({"offsets"}, "expected to go from 0 to the number of rows, %lld, got %lld to %lld",
                static_cast<long long>(rows), static_cast<long long>(at[0]), static_cast<long long>(at[last]));
  for (int64_t i = 0; i < last; ++i)
    if (at[i] > at[i + 1])
      return fail({"offsets"}, "expected ascending values, got %lld before %lld at index %lld",
                  static_cast<long long>(at[i]), static_cast<long long>(at[i + 1]), static_cast<long long>(i));
  return true;
}

}  // namespace lipcore
